"""Check the arguments of the matching operators.

Shapes, dtypes and devices are checked for every backend and without waiting for a device. Values are checked on the
CPU; on a GPU the host would have to wait for them, so there only with the environment variable SOLQ_DEBUG=1.
"""

import os
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from .cost import ClassCostForm, PackedTargets

CHECK_ON_DEVICE = os.environ.get("SOLQ_DEBUG", "0") == "1"


def can_read_values(tensor: Tensor) -> bool:
    """Return whether the host may look at the values of `tensor`."""
    return tensor.device.type == "cpu" or CHECK_ON_DEVICE


def check_tensors(**tensors: Tensor) -> None:
    """Raise unless all are tensors on the device of the first."""
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, must be a tensor")
        if tensor.device != tensors[first].device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first} on {tensors[first].device}: move them to one device"
            )


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` has a dtype that the kernels compute with."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name} is {tensor.dtype}, must be float16, bfloat16, float32 or float64")


def check_offsets(target_offsets: Tensor, num_targets: int) -> None:
    """Raise unless `target_offsets` has the shape and dtype of offsets of `num_targets` targets."""
    if (
        target_offsets.ndim != 1
        or target_offsets.shape[0] == 0
        or target_offsets.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"target_offsets is {target_offsets.dtype} of shape {tuple(target_offsets.shape)}, "
            "must be int64 or int32 of shape (B+1,)"
        )
    if target_offsets.shape[0] == 1 and num_targets > 0:
        raise ValueError(f"target_offsets has 1 entry, that is no image, but there are {num_targets} targets")


def check_offset_values(target_offsets: Tensor, num_targets: int) -> None:
    """Raise unless `target_offsets` start at 0, never decrease and end at `num_targets`. Makes the host wait."""
    offsets = target_offsets.tolist()
    if offsets[0] != 0 or offsets[-1] != num_targets:
        raise ValueError(
            f"target_offsets goes from {offsets[0]} to {offsets[-1]}, must go from 0 to the {num_targets} targets"
        )
    for start, end in pairwise(offsets):
        if end < start:
            raise ValueError(f"target_offsets must not decrease, but has {end} after {start}")


def check_label_values(target_labels: Tensor, num_classes: int) -> None:
    """Raise unless all labels are classes. Makes the host wait."""
    unknown = target_labels[(target_labels < 0) | (target_labels >= num_classes)]
    if len(unknown):
        raise ValueError(
            f"target_labels has {unknown[0].item()}, must be in 0..{num_classes - 1} "
            f"as logits has {num_classes} classes"
        )


def check_cost_arguments(logits: Tensor, boxes: Tensor, targets: PackedTargets, class_cost_form: str) -> None:
    """Raise unless the arguments of `matching_cost` fit together."""
    if class_cost_form not in get_args(ClassCostForm):
        raise ValueError(f"class_cost_form is {class_cost_form!r}, must be 'focal' or 'softmax'")
    target_labels, target_boxes, target_offsets = targets
    check_tensors(
        logits=logits,
        boxes=boxes,
        target_labels=target_labels,
        target_boxes=target_boxes,
        target_offsets=target_offsets,
    )
    if logits.ndim != 4:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, must be (L, B, Q, C)")
    L, B, Q, C = logits.shape
    if boxes.shape != (L, B, Q, 4):
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}, must be {(L, B, Q, 4)} as logits is {(L, B, Q, C)}")
    if target_labels.ndim != 1:
        raise ValueError(f"target_labels has shape {tuple(target_labels.shape)}, must be (T,)")
    T = target_labels.shape[0]
    if target_boxes.shape != (T, 4):
        raise ValueError(
            f"target_boxes has shape {tuple(target_boxes.shape)}, must be {(T, 4)} as there are {T} target_labels"
        )
    for name, tensor in (("logits", logits), ("boxes", boxes), ("target_boxes", target_boxes)):
        check_floating(name, tensor)
    if target_labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"target_labels is {target_labels.dtype}, must be int64 or int32")
    if target_offsets.ndim == 1 and target_offsets.shape[0] != B + 1:
        raise ValueError(f"target_offsets has {target_offsets.shape[0]} entries, must have {B + 1} for {B} images")
    check_offsets(target_offsets, T)
