"""Check the arguments of multi-level RoIAlign, alike for every backend and without waiting for a device."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(features: Sequence[Tensor], boxes: Tensor, box_image: Tensor) -> None:
    """Raise unless features, boxes and the image of each box are tensors that fit together."""
    if not isinstance(features, (list, tuple)) or len(features) == 0:
        raise TypeError(f"features is a {type(features).__name__}, must be a list of at least one tensor")
    named_features = {f"features[{level}]": feature for level, feature in enumerate(features)}
    for name, tensor in (named_features | {"boxes": boxes, "box_image": box_image}).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, must be a tensor")
        if tensor.device != features[0].device:
            raise ValueError(
                f"{name} is on {tensor.device} but features[0] on {features[0].device}: move them to one device"
            )
        if name != "box_image" and tensor.dtype not in FLOATING:
            raise ValueError(f"{name} is {tensor.dtype}, must be float16, bfloat16, float32 or float64")
    for name, feature in named_features.items():
        if feature.ndim != 4 or 0 in feature.shape[1:]:
            raise ValueError(f"{name} has shape {tuple(feature.shape)}, must be (B, C, H, W), none of C, H, W zero")
        if feature.shape[:2] != features[0].shape[:2] or feature.dtype != features[0].dtype:
            raise ValueError(
                f"{name} is {feature.dtype} {tuple(feature.shape)}, but features[0] is {features[0].dtype} "
                f"{tuple(features[0].shape)}: they must agree in dtype, B and C"
            )
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}, must be (R, 4)")
    if box_image.shape != boxes.shape[:1] or box_image.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"box_image is {box_image.dtype} of shape {tuple(box_image.shape)}, "
            f"must be int64 or int32 of shape ({boxes.shape[0]},) as there are {boxes.shape[0]} boxes"
        )


def check_options(
    levels: int, output_size: tuple[int, int], sampling_ratio: int, finest_scale: float, strides: Sequence[float]
) -> None:
    """Raise unless the options are positive, and there is one stride for each level."""
    if len(strides) != levels:
        raise ValueError(f"strides has {len(strides)} entries, must have {levels} as features has levels")
    if min(*output_size, sampling_ratio) < 1:
        raise ValueError(f"output_size is {output_size} and sampling_ratio {sampling_ratio}, both must be at least 1")
    if min(finest_scale, *strides) <= 0:
        raise ValueError(f"finest_scale is {finest_scale} and strides {tuple(strides)}, both must be positive")


def check_images(box_image: Tensor, images: int) -> None:
    """Raise if a box is of an image that does not exist. Reads the values, so on a GPU the host would wait."""
    outside = box_image[(box_image < 0) | (box_image >= images)]
    if len(outside):
        raise ValueError(f"box_image has {outside[0].item()}, must be in 0..{images - 1}: there are {images} images")
