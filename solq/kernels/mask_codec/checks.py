"""Check the arguments of the mask codec, alike for every backend and without waiting for a device."""

import torch
from torch import Tensor


def check_size(size: int, name: str = "size") -> None:
    if isinstance(size, float) or size % 16 or not 16 <= size <= 256:
        raise ValueError(f"{name} is {size}, must be a multiple of 16 from 16 to 256")


def check_num_coefficients(num_coefficients: int, size: int, name: str = "num_coefficients") -> None:
    if isinstance(num_coefficients, float) or not 1 <= num_coefficients <= size * size:
        raise ValueError(
            f"{name} is {num_coefficients}, must be a whole number in 1..{size * size} for masks of {size} × {size}"
        )


def check_masks(masks: Tensor, shape: str) -> None:
    """Raise unless `masks` has three dimensions, called `shape`, and a dtype that can be encoded."""
    if masks.ndim != 3:
        raise ValueError(f"masks has shape {tuple(masks.shape)}, must be {shape}")
    if masks.dtype not in (torch.bool, torch.uint8) and not masks.is_floating_point():
        raise ValueError(f"masks is {masks.dtype}, must be bool, uint8 or floating-point")


def check_square(masks: Tensor) -> None:
    if masks.ndim != 3 or masks.shape[1] != masks.shape[2]:
        raise ValueError(f"masks has shape {tuple(masks.shape)}, must be square: (K, N, N)")


def check_coefficients(coefficients: Tensor, size: int) -> None:
    """Raise unless `coefficients` can be decoded to masks of side `size`."""
    check_size(size)
    if coefficients.ndim != 2:
        raise ValueError(f"coefficients has shape {tuple(coefficients.shape)}, must be (K, n)")
    if not coefficients.is_floating_point():
        raise ValueError(f"coefficients is {coefficients.dtype}, must be a floating-point tensor")
    check_num_coefficients(coefficients.shape[1], size, "the length of coefficients")


def check_boxes(boxes: Tensor, others: Tensor, name: str) -> None:
    """Raise unless there is one box for each of `others`, called `name`, on their device."""
    if boxes.ndim != 2 or boxes.shape[0] != others.shape[0] or boxes.shape[1] != 4:
        raise ValueError(
            f"boxes has shape {tuple(boxes.shape)}, must be {(others.shape[0], 4)}: one x0 y0 x1 y1 for each of {name}"
        )
    if boxes.is_complex() or boxes.dtype == torch.bool:
        raise ValueError(f"boxes is {boxes.dtype}, must be real numbers")
    if boxes.device != others.device:
        raise ValueError(f"boxes is on {boxes.device} but {name} on {others.device}: move them to one device")


def check_paste(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> None:
    """Raise unless `masks` can be pasted into `boxes` of an image of that size."""
    check_square(masks)
    if masks.dtype not in (torch.bool, torch.uint8) and not masks.is_floating_point():
        raise ValueError(f"masks is {masks.dtype}, must be bool, uint8 or floating-point")
    check_boxes(boxes, masks, "masks")
    check_image_size(image_size)


def check_image_size(image_size: tuple[int, int]) -> None:
    if len(image_size) != 2 or min(image_size) < 1 or any(isinstance(side, float) for side in image_size):
        raise ValueError(f"image_size is {tuple(image_size)}, must be (H, W), whole numbers from 1 on")
