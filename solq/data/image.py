"""Images from files, Pillow, arrays or tensors as RGB pixels (3, H, W) uint8, and the image files of a folder."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from solq.errors import first_line

ImageLike = str | Path | Image.Image | NDArray[Any] | Tensor

# Suffixes of files that Pillow knows, but reads no pixels of by itself.
NO_PIXELS = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".bufr", ".grib", ".eps", ".ps", ".wmf", ".emf"}


# ---- one image


def read_rgb(image: ImageLike) -> Tensor:
    """Read an image of any kind as RGB (3, H, W) uint8, rotated as its EXIF entry says.

    Images with more than 8 bits keep the upper 8; transparency is dropped.

    Args:
        image: a path, a PIL image, an array (H, W), (H, W, 3) or (H, W, 4) of uint8, uint16, or floats in 0..1, or a
            tensor (3, H, W) or (1, H, W) of the same types.

    Raises:
        OSError: a file is missing, damaged or no image.
        ValueError, TypeError: an array or tensor has another shape or type.
    """
    if is_folder(image):
        folder_images(Path(image))
        raise ValueError(f"{image} is a folder, where one image is wanted")
    if isinstance(image, str | Path | Image.Image):
        given = isinstance(image, Image.Image)
        try:
            with nullcontext(image) if isinstance(image, Image.Image) else Image.open(image) as opened:
                return rgb_pixels(ImageOps.exif_transpose(opened))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{image}: no such file") from error
        except Exception as error:  # Pillow's readers raise anything
            name = "it" if given else image
            raise OSError(f"{name} cannot be read as an image ({first_line(error)})") from error
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3):
            raise ValueError(f"an array has shape {image.shape}, must be (H, W), (H, W, 3) or (H, W, 4)")
        pixels = torch.from_numpy(np.array(image if image.ndim == 3 else image[:, :, None]))  # may be read-only
        return _tensor_to_rgb(pixels.permute(2, 0, 1))
    if isinstance(image, Tensor):
        if image.ndim != 3:
            raise ValueError(f"a tensor has shape {tuple(image.shape)}, must be (3, H, W) or (1, H, W)")
        return _tensor_to_rgb(image.detach().cpu())
    raise TypeError(f"an image is a {type(image).__name__}, must be a path, a PIL image, an array or a tensor")


def read_annotated_image(path: Path, image_size: tuple[int, int]) -> Tensor:
    """Read an image file whose annotations are for a size of `image_size` (height, width) as RGB (3, H, W) uint8.

    The EXIF rotation is applied only where the size asks for it: some tools annotate a photograph as its EXIF entry
    rotates it, most as its pixels are stored.

    Raises:
        ValueError: the image has another size.
        Exception: any type that Pillow's readers raise for a file that is missing, damaged or of an unknown format.
    """
    with Image.open(path) as opened:
        upright = opened if opened.size[::-1] == image_size else ImageOps.exif_transpose(opened)
        if upright.size[::-1] != image_size:
            stored = f"{opened.height}x{opened.width}"
            raise ValueError(f"it is {stored} but annotated as {image_size[0]}x{image_size[1]} (height x width)")
        return rgb_pixels(upright)


def rgb_pixels(image: Image.Image) -> Tensor:
    """Convert a Pillow image of any mode to RGB (3, H, W) uint8, its memory channels last.

    Values of more than 8 bits keep the upper 8; floats reach to 1 or to 255; transparency is dropped.

    Raises:
        ValueError: float values lie outside 0..255.
    """
    if image.mode.startswith("I"):  # 16 or 32 bits, which `convert` would cut off at 255
        values = np.asarray(image).astype(np.int64)
        shift = 8 if image.mode != "I" or values.max() > 255 else 0
        image = Image.fromarray((values >> shift).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        levels = np.asarray(image)
        if not (levels.min() >= 0 and levels.max() <= 255):
            raise ValueError(f"values from {levels.min():g} to {levels.max():g}, floats must be in 0..1 or in 0..255")
        image = Image.fromarray((levels * (255 if levels.max() <= 1 else 1)).round().astype(np.uint8))
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)


def pil_image(pixels: Tensor) -> Image.Image:
    """Convert RGB pixels (3, H, W) uint8 to a Pillow image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _tensor_to_rgb(pixels: Tensor) -> Tensor:
    """Convert pixels (1, 3 or 4, H, W) of any accepted type to (3, H, W) uint8."""
    if pixels.shape[0] not in (1, 3, 4) or 0 in pixels.shape:
        C, H, W = pixels.shape
        raise ValueError(
            f"it has {C} channels of {H}x{W} pixels, must have 1, 3 or 4: arrays are (H, W, channels), tensors "
            "(channels, H, W)"
        )
    if pixels.dtype == torch.uint16:
        pixels = (pixels.to(torch.int32) >> 8).to(torch.uint8)
    elif pixels.is_floating_point():
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise ValueError(f"its values reach from {pixels.min():g} to {pixels.max():g}, floats must be in 0..1")
        pixels = (pixels * 255).round().to(torch.uint8)
    elif pixels.dtype == torch.bool:
        pixels = pixels.to(torch.uint8) * 255
    elif pixels.dtype != torch.uint8:
        raise TypeError(f"its type is {pixels.dtype}, must be uint8, uint16 or float")
    return pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]


# ---- folders


def is_folder(image: object) -> TypeGuard[str | Path]:
    """Tell whether `image` is the path of a folder."""
    return isinstance(image, str | Path) and Path(image).is_dir()


def expand_folders(images: Iterable[ImageLike]) -> Iterator[ImageLike]:
    """Yield the images, each folder replaced by its image files in the order of names; an empty folder remains."""
    for image in images:
        if is_folder(image):
            yield from _image_files(Path(image)) or [Path(image)]
        else:
            yield image


def folder_images(folder: Path) -> list[Path]:
    """List the image files of a folder, told by their suffixes, in the order of names.

    Raises:
        ValueError: if there are none.
    """
    files = _image_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no images: name another folder")
    return files


def _image_files(folder: Path) -> list[Path]:
    suffixes = Image.registered_extensions().keys() - NO_PIXELS
    files = (path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())
    return sorted(path for path in files if not path.name.startswith("."))
