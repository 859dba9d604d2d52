"""Configurations of the dynamic convolution to compile ahead of time, for `python -m benchmarks.compile_report`."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from solq.kernels.dynamic_conv.dynamic_conv_kernels import backward_kernel, forward_kernel
from solq.kernels.dynamic_conv.launch import NUM_WARPS, kernel_constants

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHANNELS, HIDDEN = 256, 64


NVIDIA, AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942",)


def compile_cases() -> Iterator[tuple[Any, ...]]:
    """Yield every kernel of QueryInst's widths, for regions of 7 × 7 and 14 × 14 positions."""
    for positions, (name, dtype), backward in product((49, 196), DTYPES.items(), (False, True)):
        pointers = {
            "features_ptr": f"*{name}",
            "parameters_ptr": f"*{name}",
            **dict.fromkeys(("norm_in_weight_ptr", "norm_in_bias_ptr"), "*fp32"),
            **dict.fromkeys(("norm_out_weight_ptr", "norm_out_bias_ptr"), "*fp32"),
        }
        constants = kernel_constants(dtype, CHANNELS, HIDDEN, positions, backward)
        num_stages = constants.pop("num_stages")
        if backward:
            whole = positions <= constants["BLOCK_POSITIONS"]
            pointers |= {
                "grad_output_ptr": f"*{name}",
                "grad_features_ptr": f"*{name}",
                "grad_parameters_ptr": f"*{name if whole else 'fp32'}",
                "grad_norms_ptr": "*fp32",
            }
        else:
            pointers["output_ptr"] = f"*{name}"
        signature = pointers | {"num_positions": "i32", "eps": "fp32"}
        kernel = backward_kernel if backward else forward_kernel
        label = f"dynamic_conv {'backward' if backward else 'forward'} {positions} {name}"
        for targets, precision in ((NVIDIA, "tf32x3"), (AMD, "ieee")):
            expectations = {"load": 16, "targets": targets}
            yield (
                label, kernel, signature, constants | {"PRECISION": precision},
                list(pointers), NUM_WARPS, num_stages, expectations,
            )  # fmt: skip
