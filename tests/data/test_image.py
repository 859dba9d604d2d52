"""Images of every kind become the same upright RGB pixels."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import as_tensor, picture

from solq.data.image import folder_images, read_rgb


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "LA", "1", "I;16", "I", "F"])
@pytest.mark.parametrize("from_file", [True, False], ids=["file", "PIL"])
def test_modes_of_pillow(tmp_path, mode, from_file):
    pixels = picture()
    image = Image.fromarray(pixels)
    expected = as_tensor(pixels)
    if mode in ("L", "LA", "1", "I;16", "I", "F"):
        gray = pixels.max(-1)  # white on black
        expected = as_tensor(np.stack([gray] * 3, axis=-1))
        image = Image.fromarray(gray)
        if mode.startswith("I"):
            image = Image.fromarray(gray.astype(np.uint16) * 257)
    image = image.convert(mode)
    assert image.mode == mode
    if from_file:
        path = tmp_path / f"image.{'tif' if mode in ('CMYK', 'I', 'F') else 'png'}"
        image.save(path)
        assert torch.equal(read_rgb(path), expected)
        assert torch.equal(read_rgb(str(path)), expected)
    else:
        assert torch.equal(read_rgb(image), expected)


def test_floats_up_to_one():
    levels = (picture().max(-1) / 255).astype(np.float32)
    assert torch.equal(read_rgb(Image.fromarray(levels)), as_tensor(picture().max(-1, keepdims=True)).expand(3, -1, -1))


def test_cmyk_jpeg(tmp_path):
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "image.jpg", quality=95)
    error = (read_rgb(tmp_path / "image.jpg").int() - as_tensor(picture()).int()).abs()
    assert error.float().mean() < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    """The file stores the picture as a camera held another way does; it is read as a person saw it."""
    upright = Image.fromarray(picture())
    stored_as = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(stored_as[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "image.png", exif=exif)
    assert torch.equal(read_rgb(tmp_path / "image.png"), as_tensor(picture()))


@pytest.mark.parametrize(
    "image",
    [
        picture(),
        np.concatenate([picture(), np.full((40, 60, 1), 7, np.uint8)], axis=-1),
        picture().astype(np.uint16) * 257,
        picture() / 255,
        (picture() / 255).astype(np.float16),
        picture() > 0,
        picture()[::-1][::-1],
        as_tensor(picture()),
        as_tensor(picture()) / 255,
        torch.from_numpy(picture().astype(np.uint16) * 257).permute(2, 0, 1),
    ],
    ids=["uint8", "RGBA", "uint16", "float64", "float16", "bool", "view", "tensor", "float tensor", "uint16 tensor"],
)
def test_arrays_and_tensors(image):
    assert torch.equal(read_rgb(image), as_tensor(picture()))


def test_arrays_that_cannot_be_written_to(recwarn):
    assert torch.equal(read_rgb(np.asarray(Image.fromarray(picture()))), as_tensor(picture()))
    assert not recwarn.list


def test_gray_arrays():
    gray = picture()[..., 0]
    expected = torch.from_numpy(gray).expand(3, -1, -1)
    for image in (gray, gray[..., None], torch.from_numpy(gray)[None]):
        assert torch.equal(read_rgb(image), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 3, 4, 5)), r"shape \(2, 3, 4, 5\), must be \(H, W\)"),
        (np.zeros((5, 6, 2), np.uint8), "2 channels"),
        (np.zeros((0, 6, 3), np.uint8), "channels of 0x6 pixels, must have 1, 3 or 4"),
        (torch.zeros(48, 64, 3), "48 channels of 64x3 pixels, must have 1, 3 or 4"),
        (np.full((5, 6, 3), 255.0), "floats must be in 0..1"),
        (np.full((5, 6, 3), np.nan), "floats must be in 0..1"),
        (np.zeros((5, 6, 3), np.int64), r"type is torch\.int64, must be uint8"),
        (torch.zeros(5, 6), r"shape \(5, 6\), must be \(3, H, W\)"),
        (17, "an image is a int"),
        (Image.fromarray(np.full((5, 6), 300, np.float32)), "from 300 to 300, floats must be in 0..1 or in 0..255"),
    ],
)
def test_what_is_no_image(image, message):
    with pytest.raises((OSError, ValueError, TypeError), match=message):
        read_rgb(image)


def test_readers_that_raise_anything(tmp_path):
    """Pillow's readers end with any exception: this one, of a file without pixels, in some versions with IndexError."""
    (tmp_path / "short.qoi").write_bytes(b"qoif" + struct.pack(">II", 8, 8) + b"\3\0")
    with pytest.raises(OSError, match=r"short.qoi cannot be read as an image \("):
        read_rgb(tmp_path / "short.qoi")
    with (
        Image.open(tmp_path / "short.qoi") as lazy,
        pytest.raises(OSError, match=r"it cannot be read as an image \("),
    ):
        read_rgb(lazy)


def test_a_folder_holds_more_than_images(tmp_path):
    for name in ("b.JPG", "a.png", "paper.pdf", "clip.mpg", "._b.JPG", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "c.png").mkdir()
    assert [path.name for path in folder_images(tmp_path)] == ["a.png", "b.JPG"]
