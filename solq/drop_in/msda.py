"""Replace the compiled extension of Deformable DETR: ``import solq.drop_in.msda`` before the model.

After that, ``import MultiScaleDeformableAttention as MSDA`` finds this module: the two functions below have the
signatures of the extension (https://github.com/fundamentalvision/Deformable-DETR, models/ops/src), which Deformable
DETR, DINO, DN-DETR, Mask2Former, MaskDINO, SOLQ and others wrap in a `torch.autograd.Function` of their own. Unlike the
extension they serve every floating dtype, any batch size whatever the `im2col_step`, and tensors on a CPU.
"""

import sys

import torch
from torch import Tensor

from solq.kernels import ms_deform_attn
from solq.kernels.ms_deform_attn.operators import level_table
from solq.kernels.ms_deform_attn.operators import ms_deform_attn_backward as ms_deform_attn_backward_operator
from solq.kernels.runtime import backend_for

EXTENSION = "MultiScaleDeformableAttention"


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """Call `solq.kernels.ms_deform_attn` under the name, and with the arguments, of the extension.

    Args:
        value: (B, S, M, D).
        spatial_shapes: (L, 2) rows (H, W), int64.
        level_start_index: (L,) int64.
        sampling_loc: (B, Q, M, L, P, 2) as (x, y), 0..1.
        attn_weight: (B, Q, M, L, P).
        im2col_step: ignored.

    Returns:
        (B, Q, M·D), of the dtype of `value`, under autocast too.

    Raises:
        TypeError, ValueError: see `solq.kernels.ms_deform_attn`.
    """
    with torch.autocast(value.device.type, enabled=False):
        return ms_deform_attn(value, spatial_shapes, level_start_index, sampling_loc, attn_weight)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `ms_deform_attn_forward`.

    Args:
        grad_output: (B, Q, M·D); the others as in the forward pass.

    Returns:
        (grad_value, grad_sampling_loc, grad_attn_weight), of the shapes and dtypes of the three arguments.
    """
    if backend_for(value) == "triton":
        grad_value, _, grad_locations, grad_weights = ms_deform_attn_backward_operator(
            grad_output, None, value, level_table(spatial_shapes, value), None, sampling_loc, attn_weight, False
        )
        return grad_value, grad_locations, grad_weights
    v, locations, weights = (tensor.detach().requires_grad_() for tensor in (value, sampling_loc, attn_weight))
    with torch.enable_grad():
        output = ms_deform_attn_forward(v, spatial_shapes, level_start_index, locations, weights, im2col_step)
    grad_value, grad_locations, grad_weights = torch.autograd.grad(output, (v, locations, weights), grad_output)
    return grad_value, grad_locations, grad_weights


if sys.modules.setdefault(EXTENSION, sys.modules[__name__]) is not sys.modules[__name__]:
    raise ImportError(
        f"{EXTENSION} was already imported from {sys.modules[EXTENSION].__file__}: "
        "import solq.drop_in.msda before the model that imports it"
    )
