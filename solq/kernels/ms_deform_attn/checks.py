"""Check the arguments of the public functions, alike for every backend and without waiting for a device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .plain import SpatialShapes

LevelStartIndex = Tensor | Sequence[int]

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_arguments(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: LevelStartIndex | None,
    reference_points: Tensor | None = None,
    **samples: Tensor,
) -> None:
    """Raise an error that names the argument.

    `samples` are the locations or offsets (B, Q, M, L, P, 2), and the weights or logits, by their public names.
    """
    tensors = {"value": value, **samples}
    if reference_points is not None:
        tensors["reference_points"] = reference_points
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, value)
    (points_name, points), (weights_name, weights) = samples.items()
    _check_sample_shapes(value, points_name, points, weights_name, weights)
    if reference_points is not None:
        _check_reference_points(reference_points, points_name, points)
    L = points.shape[3]
    _check_level_argument("spatial_shapes", spatial_shapes, 2, value)
    _check_level_count("spatial_shapes", spatial_shapes, points_name, L)
    sizes = _check_sizes(spatial_shapes, value) if is_readable(spatial_shapes) else None
    if level_start_index is not None:
        _check_level_argument("level_start_index", level_start_index, 1, value)
        _check_level_count("level_start_index", level_start_index, points_name, L)
        if sizes and is_readable(level_start_index):
            _check_starts(level_start_index, sizes)


def is_readable(given: SpatialShapes | LevelStartIndex) -> bool:
    """Return whether the content can be looked at without making the host wait, or a compiler give up."""
    return not isinstance(given, Tensor) or (given.device.type == "cpu" and not torch.compiler.is_compiling())


def _check_tensor(name: str, tensor: Tensor, value: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, must be a tensor")
    if tensor.dtype not in _FLOATING:
        raise TypeError(f"{name} is {tensor.dtype}, must be float16, bfloat16, float32 or float64")
    if tensor.device != value.device:
        raise ValueError(f"{name} is on {tensor.device} but value is on {value.device}: move one of them")
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"{name} has a forward-mode tangent, which has no formula here: use torch.autograd.grad"
        )


def _check_sample_shapes(value: Tensor, points_name: str, points: Tensor, weights_name: str, weights: Tensor) -> None:
    if value.ndim != 4:
        raise ValueError(f"value has shape {_shape(value)}, must have 4 dimensions (B, S, M, D)")
    B, _, M, _ = value.shape
    if points.ndim != 6 or points.shape[-1] != 2:
        raise ValueError(f"{points_name} has shape {_shape(points)}, must be (B, Q, M, L, P, 2)")
    if points.shape[0] != B or points.shape[2] != M:
        raise ValueError(f"{points_name} has shape {_shape(points)}, must be (B={B}, Q, M={M}, L, P, 2) as value says")
    if 0 in (*value.shape[1:], *points.shape[2:]):
        raise ValueError(f"value is {_shape(value)} and {points_name} {_shape(points)}, but only B and Q may be 0")
    if weights.shape != points.shape[:-1]:
        raise ValueError(
            f"{weights_name} has shape {_shape(weights)}, must be {_shape(points[..., 0])} as {points_name}"
        )


def _check_reference_points(reference_points: Tensor, points_name: str, points: Tensor) -> None:
    B, Q, _, L, _, _ = points.shape
    if reference_points.ndim != 4 or reference_points.shape[-1] not in (2, 4):
        raise ValueError(f"reference_points has shape {_shape(reference_points)}, must be (B, Q, L, 2) or (B, Q, L, 4)")
    if reference_points.shape[:3] != (B, Q, L):
        raise ValueError(
            f"reference_points has shape {_shape(reference_points)}, must be (B={B}, Q={Q}, L={L}, …) as {points_name}"
        )


def _check_level_argument(name: str, given: SpatialShapes | LevelStartIndex, ndim: int, value: Tensor) -> None:
    if isinstance(given, Tensor):
        if given.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} is {given.dtype}, must be int64 or int32")
        if given.device.type != "cpu" and given.device != value.device:
            raise ValueError(f"{name} is on {given.device} but value is on {value.device}: move one of them")
        if given.ndim != ndim or given.shape[1:] not in ((), (2,)):
            raise ValueError(f"{name} has shape {_shape(given)}, must be {'(L, 2)' if ndim == 2 else '(L,)'}")
    elif not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{name} is a {type(given).__name__}, must be a tensor or a list")


def _check_level_count(name: str, given: SpatialShapes | LevelStartIndex, points_name: str, L: int) -> None:
    if len(given) != L:
        raise ValueError(f"{points_name} has {L} levels but {name} has {len(given)}")


def _check_sizes(spatial_shapes: SpatialShapes, value: Tensor) -> list[int]:
    """Check heights and widths, and return the number of pixels of each level."""
    shapes = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else list(spatial_shapes)
    if any(not isinstance(pair, Sequence) or len(pair) != 2 for pair in shapes):
        raise ValueError(f"spatial_shapes is {shapes}, must be pairs (H, W)")
    _check_integers("spatial_shapes", [size for pair in shapes for size in pair])
    if any(height < 1 or width < 1 for height, width in shapes):
        raise ValueError(f"spatial_shapes is {shapes}, heights and widths must be at least 1")
    sizes = [height * width for height, width in shapes]
    if sum(sizes) != value.shape[1]:
        raise ValueError(f"spatial_shapes {shapes} has {sum(sizes)} pixels but value has {value.shape[1]}")
    return sizes


def _check_starts(level_start_index: LevelStartIndex, sizes: list[int]) -> None:
    starts = level_start_index.tolist() if isinstance(level_start_index, Tensor) else list(level_start_index)
    _check_integers("level_start_index", starts)
    if starts != [sum(sizes[:level]) for level in range(len(sizes))]:
        raise ValueError(f"level_start_index is {starts}, must be the sums of the sizes {sizes} before each level")


def _check_integers(name: str, numbers: list[Any]) -> None:
    if not torch.compiler.is_compiling() and not all(hasattr(number, "__index__") for number in numbers):
        raise TypeError(f"{name} has {numbers}, must be integers")


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
