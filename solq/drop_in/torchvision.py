"""Run torchvision's MultiScaleRoIAlign on the kernel of this project: ``solq.drop_in.torchvision.patch()``.

The patch replaces the function that `MultiScaleRoIAlign.forward` calls, for models made before and after; Faster R-CNN,
Mask R-CNN and Keypoint R-CNN use it. On a GPU it no longer asks the host which boxes belong to which level. Adaptive
sampling (a sampling_ratio below 1), a single level, levels that do not halve one after another, and tracing keep
torchvision's own code. Unpatch before `torch.jit.script`, which cannot read the replacement. The result is
channels-last.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from solq.drop_in.patching import Patch, Replacement, Versions
from solq.kernels import multiscale_roi_align

KNOWN_TO_WORK = Versions("torchvision", "0.26", "0.29")


def _find() -> Iterator[Replacement]:
    module = importlib.import_module("torchvision.ops.poolers")
    original = getattr(module, "_multiscale_roi_align", None)
    if original is None:
        return

    def _multiscale_roi_align(
        x_filtered: list[Tensor],
        boxes: list[Tensor],
        output_size: tuple[int, int],
        sampling_ratio: int,
        scales: list[float] | None,
        mapper: Any,
    ) -> Tensor:
        """Read the features of the boxes (n, 4) of each image: (R, C, *output_size) in the dtype of the first level."""
        halving = scales is not None and all(scale * 2**level == scales[0] for level, scale in enumerate(scales))
        if sampling_ratio < 1 or len(x_filtered) == 1 or not halving or torch.jit.is_tracing() or mapper is None:
            return original(x_filtered, boxes, output_size, sampling_ratio, scales, mapper)
        assert scales is not None
        dtype = x_filtered[0].dtype
        image_numbers = [
            torch.full((len(of_image),), image, device=of_image.device) for image, of_image in enumerate(boxes)
        ]
        return multiscale_roi_align(
            [feature.to(dtype) for feature in x_filtered],
            torch.cat(boxes),
            torch.cat(image_numbers),
            output_size,
            sampling_ratio=sampling_ratio,
            finest_scale=mapper.s0 * 2.0 ** (mapper.k_min - mapper.lvl0),
            strides=[1 / scale for scale in scales],
            aligned=False,
        ).to(dtype)

    yield Replacement(module, "_multiscale_roi_align", _multiscale_roi_align)


_patch = Patch(KNOWN_TO_WORK, _find)
patch, unpatch, patched = _patch.patch, _patch.unpatch, _patch.patched
