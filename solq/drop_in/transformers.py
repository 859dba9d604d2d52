"""Run Hugging Face transformers on the kernels of this project: ``solq.drop_in.transformers.patch()``.

The patch serves all models with multi-scale deformable attention, made before or after it, and the Hungarian matchers
whose cost is made of classes and boxes. The models are found by their code: a modeling file that defines the attention
is imported, and each definition whose parameters are those of one of the functions below is replaced by it.

`patch()` returns the names of the replaced attributes, `unpatch()` puts the original objects back, `patched()` is a
context manager that does both. Unpatch before an export to ONNX, which has no operators of this project.
"""

import importlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from functools import reduce
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from solq.drop_in.attention import Shapes, attention, attention_layer
from solq.drop_in.patching import Patch, Replacement, Versions
from solq.kernels import linear_assignment, matching_cost
from solq.kernels.matching import ClassCostForm

KNOWN_TO_WORK = Versions("transformers", "4.57", "5.23")
STORED_FUNCTION = "ms_deformable_attn_core"  # attribute in which layers of D-FINE store the function

# ---------------------------------------------------------------------------------------------------------------------
# Attention. Parameters are named as in transformers: by them a definition is recognized.
# ---------------------------------------------------------------------------------------------------------------------


def _attention_v2(
    value: Tensor,
    value_spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int],
    method: str = "default",
) -> Tensor:
    """Compute `multi_scale_deformable_attention_v2` of RT-DETRv2 and D-FINE.

    Args:
        value: (B, S, M, D).
        value_spatial_shapes: L pairs (H, W).
        sampling_locations: (B, Q, M, ΣP, 2), the points of all levels in one dimension.
        attention_weights: (B, Q, M, ΣP).
        num_points_list: L numbers of points, which may differ.
        method: "default" (bilinear) or "discrete" (the nearest pixel inside, without a gradient to the location).

    Returns:
        (B, Q, M·D), of the widest dtype of the three tensors: under autocast one of them may be in half precision, and
        D-FINE, which has no projection after this, goes on in float32.
    """
    dtype = reduce(torch.promote_types, (t.dtype for t in (value, sampling_locations, attention_weights)))
    if method == "discrete":
        sampling_locations = _pixel_centers(sampling_locations, value_spatial_shapes, num_points_list)
    elif method != "default":
        raise ValueError(f"method is {method!r}, must be 'default' or 'discrete'")
    L, P = len(num_points_list), max(num_points_list)
    if sum(num_points_list) == L * P:
        locations = sampling_locations.unflatten(-2, (L, P))
        weights = attention_weights.unflatten(-1, (L, P))
    else:  # as many points on every level; the additional ones lie outside, where nothing is read
        locations = torch.stack(
            [
                F.pad(level, (0, 0, 0, P - level.shape[-2]), value=-1.0)
                for level in sampling_locations.split(num_points_list, -2)
            ],
            dim=3,
        )
        weights = torch.stack(
            [F.pad(level, (0, P - level.shape[-1])) for level in attention_weights.split(num_points_list, -1)], dim=3
        )
    return attention(value, value_spatial_shapes, locations, weights).to(dtype)


def _pixel_centers(locations: Tensor, shapes: Shapes, num_points_list: list[int]) -> Tensor:
    """Move locations (…, ΣP, 2) to the center of the pixel that RT-DETRv2's discrete sampling reads."""
    sizes = [(int(width), int(height)) for height, width in shapes]
    size = torch.tensor(
        [pair for pair, points in zip(sizes, num_points_list, strict=True) for _ in range(points)],
        device=locations.device,
    )
    pixel = (locations.detach() * size + 0.5).long().clamp(min=0).minimum(size - 1)
    return (pixel.to(torch.promote_types(locations.dtype, torch.float32)) + 0.5) / size


# ---------------------------------------------------------------------------------------------------------------------
# Matchers
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _match(
    matcher: Any,
    outputs: dict[str, Tensor],
    targets: Sequence[dict[str, Tensor]],
    class_cost_form: ClassCostForm,
    alpha: float = 0.25,
    gamma: float = 2.0,
    groups: int = 1,
) -> list[tuple[Tensor, Tensor]]:
    """Match each group of queries by itself; return (query_index, target_index) per image, on the host."""
    logits, boxes = (outputs[key].unflatten(1, (groups, -1)).transpose(0, 1) for key in ("logits", "pred_boxes"))
    sizes = [len(target["boxes"]) for target in targets]
    offsets = torch.tensor([0, *accumulate(sizes)]).to(logits.device, non_blocking=True)
    cost = matching_cost(
        logits,
        boxes,
        torch.cat([target["class_labels"] for target in targets]),
        torch.cat([target["boxes"] for target in targets]),
        offsets,
        cost_class=matcher.class_cost,
        cost_bbox=matcher.bbox_cost,
        cost_giou=matcher.giou_cost,
        alpha=alpha,
        gamma=gamma,
        class_cost_form=class_cost_form,
    )
    queries = linear_assignment(cost, offsets).cpu()  # (groups, T), the one transfer
    first_query = torch.arange(groups)[:, None] * logits.shape[2]
    matches = []
    for of_image in queries.split(sizes, dim=1):
        group, target = (of_image >= 0).nonzero(as_tuple=True)
        query = (of_image + first_query)[group, target]
        order = query.argsort()
        matches.append((query[order], target[order]))
    return matches


def _match_softmax(self: Any, outputs: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]) -> Any:
    return _match(self, outputs, targets, "softmax")


def _match_focal(self: Any, outputs: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]) -> Any:
    return _match(self, outputs, targets, "focal")


def _match_groups(self: Any, outputs: dict[str, Tensor], targets: Sequence[dict[str, Tensor]], group_detr: int) -> Any:
    return _match(self, outputs, targets, "focal", groups=group_detr)


def _match_rt_detr(self: Any, outputs: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]) -> Any:
    return _match(self, outputs, targets, "focal" if self.use_focal_loss else "softmax", self.alpha, self.gamma)


_MATCHERS = {
    "loss_for_object_detection.HungarianMatcher": _match_softmax,
    "loss_deformable_detr.DeformableDetrHungarianMatcher": _match_focal,
    "loss_lw_detr.LwDetrHungarianMatcher": _match_groups,
    "loss_rt_detr.RTDetrHungarianMatcher": _match_rt_detr,
}

# ---------------------------------------------------------------------------------------------------------------------
# What is replaced
# ---------------------------------------------------------------------------------------------------------------------


def _modeling_modules() -> Iterator[ModuleType]:
    """Import all modules of transformers that define multi-scale deformable attention."""
    import transformers

    for path in sorted(Path(transformers.__path__[0]).glob("models/*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "class MultiScaleDeformableAttention(" in source or "def multi_scale_deformable_attention" in source:
            yield importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")


def _definitions(module: ModuleType) -> Iterator[tuple[Any, str]]:
    """Yield owner and name of each function in `module` that computes the attention."""
    for name, member in list(vars(module).items()):
        if getattr(member, "__module__", None) == module.__name__:
            if name == "MultiScaleDeformableAttention":
                yield member, "forward"
            elif name.startswith("multi_scale_deformable_attention"):
                yield module, name


def _storing_classes(module: ModuleType) -> Iterator[type]:
    """Yield the classes whose instances store the function, as in D-FINE: the access to it is patched."""
    for member in list(vars(module).values()):
        if isinstance(member, type) and member.__module__ == module.__name__:
            constructor = getattr(inspect.unwrap(member.__init__), "__code__", None)  # type: ignore[misc]
            if constructor and STORED_FUNCTION in constructor.co_names:
                yield member


def _store(self: Any, function: object) -> None:
    vars(self)[STORED_FUNCTION] = function  # for the time after unpatching


def _find() -> Iterator[Replacement]:
    ours = {tuple(inspect.signature(f).parameters): f for f in (attention_layer, attention, _attention_v2)}
    for module in _modeling_modules():
        storing = list(_storing_classes(module))
        for owner, name in _definitions(module):
            parameters = tuple(inspect.signature(getattr(owner, name)).parameters)
            new = ours.get(parameters)
            if new is None:
                warnings.warn(
                    f"{module.__name__} is left unpatched, its {name}({', '.join(parameters)}) is not known: "
                    f"{KNOWN_TO_WORK}",
                    stacklevel=3,
                )
            elif storing:
                for holder in storing:
                    yield Replacement(holder, STORED_FUNCTION, property(lambda self, new=new: new, _store))  # type: ignore[misc]
            else:
                yield Replacement(owner, name, new)
    for name, match in _MATCHERS.items():
        module_name, class_name = name.split(".")
        if find_spec(f"transformers.loss.{module_name}"):  # not every version has LW-DETR
            matcher = getattr(importlib.import_module(f"transformers.loss.{module_name}"), class_name)
            yield Replacement(matcher, "forward", match)


_patch = Patch(KNOWN_TO_WORK, _find)
patch, unpatch, patched = _patch.patch, _patch.unpatch, _patch.patched
