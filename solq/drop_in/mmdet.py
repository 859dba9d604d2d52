"""Run mmdetection's Sparse R-CNN and QueryInst on the kernels of this project: ``solq.drop_in.mmdet.patch()``.

The patch replaces `SingleRoIExtractor.forward`, which many other detectors use too, and `DynamicConv.forward`, for
models made before and after. Neither calls an operator of mmcv then. mmdetection's own code serves what the kernels do
not know: other layers than RoIAlign with averages of a fixed number of samples, a single level, scaled boxes; dynamic
convolutions with another activation, norm or number of output channels.
"""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from solq.drop_in.mmcv import allow_missing
from solq.drop_in.patching import Patch, Replacement, Versions
from solq.kernels import dynamic_conv, multiscale_roi_align

KNOWN_TO_WORK = Versions("mmdet", "3.3", "3.3")


def _is_known_layer(layer: Any, first: Any) -> bool:
    """Tell whether a layer is RoIAlign as the kernel computes it, with the same options as the first level's."""
    return (
        type(layer).__name__ == "RoIAlign"
        and layer.pool_mode == "avg"
        and layer.sampling_ratio > 0
        and (layer.output_size, layer.sampling_ratio, layer.aligned)
        == (first.output_size, first.sampling_ratio, first.aligned)
    )


def _roi_extractor(extractor: type) -> Iterator[Replacement]:
    original: Any = extractor.forward  # type: ignore[attr-defined]

    def forward(self: Any, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Read the features of rois (R, 5), image and box: (R, C, *output_size). The boxes are not rounded."""
        layers = self.roi_layers[: len(feats)]
        known = all(_is_known_layer(layer, layers[0]) for layer in layers)
        if len(feats) == 1 or roi_scale_factor is not None or not known:
            return original(self, feats, rois, roi_scale_factor)
        return multiscale_roi_align(
            list(feats),
            rois[:, 1:],
            rois[:, 0].long(),
            tuple(layers[0].output_size),
            sampling_ratio=layers[0].sampling_ratio,
            finest_scale=self.finest_scale,
            strides=[1 / layer.spatial_scale for layer in layers],
            aligned=layers[0].aligned,
        ).to(feats[0].dtype)

    yield Replacement(extractor, "forward", forward)


def _dynamic_conv(module: type) -> Iterator[Replacement]:
    original: Any = module.forward  # type: ignore[attr-defined]

    def forward(self: Any, param_feature: Tensor, input_feature: Tensor) -> Tensor:
        """Convolve input_feature (R, C, H, W) by matrices made of param_feature (R, C): (R, C), or (R, H·W, C)."""
        norms = (self.norm_in, self.norm_out)
        known = (
            self.in_channels == self.out_channels
            and isinstance(self.activation, nn.ReLU)
            and all(isinstance(norm, nn.LayerNorm) and norm.elementwise_affine for norm in norms)
            and self.norm_in.eps == self.norm_out.eps
        )
        if not known:
            return original(self, param_feature, input_feature)
        output = dynamic_conv(
            input_feature.flatten(2).mT,
            self.dynamic_layer(param_feature),
            self.norm_in.weight,
            self.norm_in.bias,
            self.norm_out.weight,
            self.norm_out.bias,
            self.norm_in.eps,
        )
        return self.activation(self.fc_norm(self.fc_layer(output.flatten(1)))) if self.with_proj else output

    yield Replacement(module, "forward", forward)


def _find() -> Iterator[Replacement]:
    allow_missing("mmcv._ext")
    extractors = importlib.import_module("mmdet.models.roi_heads.roi_extractors")
    layers = importlib.import_module("mmdet.models.layers.transformer.utils")
    yield from _roi_extractor(extractors.SingleRoIExtractor)
    yield from _dynamic_conv(layers.DynamicConv)


_patch = Patch(KNOWN_TO_WORK, _find)
patch, unpatch, patched = _patch.patch, _patch.unpatch, _patch.patched
