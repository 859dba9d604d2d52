"""Configurations of the multi-level RoIAlign to compile ahead of time, for `python -m benchmarks.compile_report`."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from solq.kernels.roi_align.definition import Sampling
from solq.kernels.roi_align.launch import NUM_WARPS, kernel_constants
from solq.kernels.roi_align.roi_align_kernels import backward_kernel, forward_kernel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEVELS, CHANNELS = 4, 256
# The widest load that channels-last features allow: AMD's 64 lanes share the 256 channels of a pixel.
TARGETS = ((("sm_80", "sm_90", "sm_100"), 16), (("gfx942",), 8))


def compile_cases() -> Iterator[tuple[Any, ...]]:
    """Yield every kernel that QueryInst's pyramid can launch, for boxes of 7 × 7 and 14 × 14 bins."""
    for bins, (name, dtype), (targets, load) in product((7, 14), DTYPES.items(), TARGETS):
        sampling = Sampling((bins, bins), 2, 56.0, (4, 8, 16, 32), aligned=True)
        shared = {
            "sizes": (("fp32", "fp32"),) * LEVELS,
            "boxes_ptr": "*fp32",
            "box_image_ptr": "*i64",
            "num_images": "i32",
            "num_channels": "i32",
        }
        for channels_last in (True, False):
            constants = kernel_constants(sampling, CHANNELS, dtype, channels_last)
            signature = shared | {"features": (f"*{name}",) * LEVELS, "output_ptr": f"*{name}"}
            aligned = ["features", "boxes_ptr", "box_image_ptr", "output_ptr", "num_channels"]
            expectations = {"targets": targets} | ({"load": load, "occupancy": 0.25} if channels_last else {})
            label = f"roi_align forward {bins} {name} {'channels-last' if channels_last else 'planar'}"
            yield (
                label, forward_kernel, signature, constants | {"CHANNELS_LAST": channels_last},
                aligned, NUM_WARPS, 3, expectations,
            )  # fmt: skip
        for fixed_point in (False, True):
            constants = kernel_constants(sampling, CHANNELS, dtype, True)
            signature = shared | {
                "grads": (f"*{'i64' if fixed_point else 'fp32'}",) * LEVELS,
                "grad_output_ptr": f"*{name}",
                "unit_ptr": "*fp64" if fixed_point else f"*{name}",
            }
            aligned = ["grads", "boxes_ptr", "box_image_ptr", "grad_output_ptr", "unit_ptr", "num_channels"]
            expectations = {"targets": targets, "load": load}
            expectations |= {} if fixed_point else {"vector_atomics": True, "occupancy": 0.5}
            label = f"roi_align backward {bins} {name}{' deterministic' if fixed_point else ''}"
            yield (
                label, backward_kernel, signature, constants | {"FIXED_POINT": fixed_point},
                aligned, NUM_WARPS, 3, expectations,
            )  # fmt: skip
