"""Check the arguments of the dynamic convolution, alike for every backend and without waiting for a device."""

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_arguments(features: Tensor, parameters: Tensor, norms: dict[str, Tensor], eps: float) -> None:
    """Raise unless features, parameters and the four norm vectors, by their names, fit together."""
    for name, tensor in {"features": features, "parameters": parameters, **norms}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, must be a tensor")
        if tensor.device != features.device:
            raise ValueError(f"{name} is on {tensor.device} but features on {features.device}: move them to one device")
        if tensor.dtype not in FLOATING:
            raise ValueError(f"{name} is {tensor.dtype}, must be float16, bfloat16, float32 or float64")
    if features.ndim != 3 or 0 in features.shape[1:]:
        raise ValueError(f"features has shape {tuple(features.shape)}, must be (R, A, C) without a zero but R")
    R, _, C = features.shape
    if norms["norm_in_weight"].ndim != 1 or len(norms["norm_in_weight"]) == 0:
        raise ValueError(f"norm_in_weight has shape {tuple(norms['norm_in_weight'].shape)}, must be (D,)")
    D = norms["norm_in_weight"].shape[0]
    if parameters.shape != (R, 2 * C * D):
        raise ValueError(
            f"parameters has shape {tuple(parameters.shape)}, must be {(R, 2 * C * D)}: two matrices of {C} × {D} for "
            f"each of {R} regions"
        )
    for name, size in (("norm_in_bias", D), ("norm_out_weight", C), ("norm_out_bias", C)):
        if norms[name].shape != (size,):
            raise ValueError(f"{name} has shape {tuple(norms[name].shape)}, must be {(size,)}")
    if not eps > 0:
        raise ValueError(f"eps is {eps}, must be positive")
