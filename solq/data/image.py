"""Images, from files or Pillow's, to pixels: RGB (3, H, W) uint8."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def read_image(path: Path, image_size: tuple[int, int]) -> Tensor:
    """An annotated image file as RGB (3, H, W) uint8.

    Raises:
        Exception: of any type, as Pillow's readers have it, if the file is missing, damaged or of an unknown format.
        ValueError: it is not of `image_size` (height, width).
    """
    with Image.open(path) as opened:
        # Some tools annotate a photograph as its EXIF entry turns it, most as its pixels are stored.
        turned = opened if opened.size[::-1] == image_size else ImageOps.exif_transpose(opened)
        if turned.size[::-1] != image_size:
            stored = f"{opened.height}x{opened.width}"
            raise ValueError(f"it is {stored} but annotated as {image_size[0]}x{image_size[1]} (height x width)")
        return rgb_pixels(turned)


def rgb_pixels(image: Image.Image) -> Tensor:
    """A Pillow image of any mode as RGB (3, H, W) uint8, its memory channels last.

    Of more than 8 bits the upper 8 remain; floats reach to 1 or to 255; transparency is dropped.

    Raises:
        ValueError: its values are floats beyond that.
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
