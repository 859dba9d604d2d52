"""The kernels of deformable attention, for benchmarks/compile_report.py."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from solq.kernels.ms_deform_attn.configuration import (
    Problem,
    kernel_constants,
    launch_configuration,
    max_registers,
)
from solq.kernels.ms_deform_attn.kernels import backward_kernel, forward_kernel
from solq.kernels.ms_deform_attn.windows import (
    max_window_registers,
    window_configuration,
    window_constants,
    window_kernel,
)

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}
NVIDIA = ("sm_80", "sm_90", "sm_100")
FORMS = {0: "ms_deform_attn", 2: "ms_deform_attn_fused points", 4: "ms_deform_attn_fused boxes"}


class Inputs(NamedTuple):
    """The form of a call, by the coordinates of its reference points, and its dtypes; M = 8, L = P = 4."""

    reference_size: int
    D: int
    dtype: torch.dtype
    points_dtype: torch.dtype  # of coordinates and weights

    @property
    def problem(self) -> Problem:
        return Problem(self.dtype, M=8, L=4, P=4, D=self.D, reference_size=self.reference_size)

    def label(self, kernel: str, *remarks: str) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([FORMS[self.reference_size], kernel, f"D={self.D}", dtype, *remarks])


def compile_cases() -> Iterator[tuple[Any, ...]]:
    """Yield every kernel in the configurations that launches choose, see benchmarks/compile_report.py.

    D and dtypes are those in use: Deformable DETR (32), SOLQ (48), and the ends of the range.
    """
    usual = list(itertools.product((32, 48, 64), (torch.float32, torch.bfloat16)))
    fused = [Inputs(form, D, dtype, dtype) for D, dtype in usual for form in (2, 4)]
    others = [Inputs(0, D, dtype, torch.float32) for D, dtype in usual]
    others += [Inputs(2, 48, dtype, dtype) for dtype in (torch.float16, torch.float64)]
    others += [Inputs(0, 48, torch.float64, torch.float64)]
    others += [Inputs(2, D, dtype, dtype) for D in (1, 16, 20, 128, 256) for dtype in (torch.float32, torch.bfloat16)]
    for inputs in fused + others:
        for target in _targets(inputs):
            yield _forward_case(inputs, target)
            yield _backward_case(inputs, target)
    for inputs in fused:
        for target in _targets(inputs):
            yield _backward_case(inputs, target, in_windows=True)
            yield _window_case(inputs, target)
    for target in NVIDIA:
        for inputs in (
            Inputs(2, 20, torch.bfloat16, torch.bfloat16),
            Inputs(2, 128, torch.bfloat16, torch.bfloat16),
            Inputs(2, 64, torch.float16, torch.float16),
        ):
            yield _window_case(inputs, target)
        yield _window_case(Inputs(0, 48, torch.float16, torch.float32), target, deterministic=True)
        for dtype in (torch.float32, torch.bfloat16):
            points, boxes = (Inputs(form, 48, dtype, dtype) for form in (2, 4))
            yield _forward_case(points, target, few_rows=True)
            yield _backward_case(boxes, target, grad_reference=True)
            yield _backward_case(points, target, grad_reference=True, in_windows=True)
            yield _backward_case(points, target, deterministic=True)


def _targets(inputs: Inputs) -> tuple[str, ...]:
    return (*NVIDIA, "gfx942") if (inputs.reference_size, inputs.D) == (2, 48) else NVIDIA


def _signature(inputs: Inputs) -> dict[str, str]:
    return {
        "output_ptr": POINTERS[inputs.dtype],
        "value_ptr": POINTERS[inputs.dtype],
        "levels_ptr": "*i64",
        "reference_ptr": "*fp64" if inputs.dtype == torch.float64 else "*fp32",
        "coordinates_ptr": POINTERS[inputs.points_dtype],
        "weights_ptr": POINTERS[inputs.points_dtype],
        "num_rows": "i32",
        "num_queries": "i32",
        "channel_start": "i32",
    }


def _aligned(signature: dict[str, str]) -> list[str]:
    return [name for name in signature if name.endswith("_ptr") or name == "channel_start"]


def _constants(inputs: Inputs, target: str, block_words: int, num_warps: int) -> dict[str, Any]:
    return kernel_constants(inputs.problem, 0, (block_words, num_warps), 64 if target == "gfx942" else 32)


def _expectations(inputs: Inputs, target: str, registers: int | None, is_usual: bool) -> dict[str, Any]:
    expectations: dict[str, Any] = {"targets": (target,)}
    if target != "gfx942":
        expectations["options"] = {"maxnreg": registers}
    if is_usual and inputs.dtype != torch.float64 and inputs.D % 16 == 0:
        expectations |= {"load": 16, "occupancy": 0.5 if registers == 64 else 0.25}
    return expectations


def _forward_case(inputs: Inputs, target: str, few_rows: bool = False) -> tuple[Any, ...]:
    block_words, num_warps = launch_configuration("forward", target, inputs.D, inputs.dtype)
    num_warps = 1 if few_rows else num_warps
    signature, constants = _signature(inputs), _constants(inputs, target, block_words, num_warps)
    registers = max_registers("forward", target, inputs.D, inputs.dtype)
    expectations = _expectations(inputs, target, registers, is_usual=True)
    label = inputs.label("forward", *["few rows"] * few_rows)
    return label, forward_kernel, signature, constants, _aligned(signature), num_warps, 3, expectations


def _backward_case(
    inputs: Inputs, target: str, *, grad_reference: bool = False, deterministic: bool = False, in_windows: bool = False
) -> tuple[Any, ...]:
    """Compile `backward_kernel`: with value's gradient, for one warp, unless that is summed `in_windows`."""
    block_words, num_warps = launch_configuration("backward", target, inputs.D, inputs.dtype)
    num_warps = num_warps if in_windows else 1
    compute = POINTERS[torch.promote_types(inputs.dtype, torch.float32)]
    signature = _signature(inputs) | {
        "grad_value_ptr": "*i64" if deterministic else compute,
        "grad_reference_ptr": compute,
        "grad_coordinates_ptr": POINTERS[inputs.points_dtype],
        "grad_weights_ptr": POINTERS[inputs.points_dtype],
        "scale_ptr": "*fp64",
        "grad_output_ptr": POINTERS[inputs.dtype],
    }
    constants = _constants(inputs, target, block_words, num_warps)
    constants = constants | {"GRAD_REFERENCE": grad_reference, "GRAD_VALUE": not in_windows, "BLOCK_P": 4}
    registers = max_registers(
        "deterministic" if deterministic else "backward", target, inputs.D, inputs.dtype, inputs.reference_size,
        grad_reference=grad_reference, grad_value=not in_windows,
    )  # fmt: skip
    expectations = _expectations(inputs, target, registers, is_usual=not deterministic)
    expectations["vector_atomics"] = "load" in expectations and not in_windows
    remarks = {"with reference": grad_reference, "deterministic": deterministic, "without value": in_windows}
    label = inputs.label("backward", *[remark for remark, holds in remarks.items() if holds])
    return label, backward_kernel, signature, constants, _aligned(signature), num_warps, 3, expectations


def _window_case(inputs: Inputs, target: str, deterministic: bool = False) -> tuple[Any, ...]:
    signature = _signature(inputs) | {
        "grad_value_ptr": "*i64" if deterministic else "*fp32",
        "scale_ptr": "*fp64",
        "grad_output_ptr": POINTERS[inputs.dtype],
    }
    for name in ("output_ptr", "value_ptr", "num_queries", "channel_start"):
        del signature[name]
    queries, num_warps = window_configuration(target, inputs.D, inputs.dtype)
    constants = window_constants(inputs.problem, queries)
    expectations: dict[str, Any] = {"targets": (target,), "vector_atomics": inputs.D % 4 == 0 and not deterministic}
    if target != "gfx942":
        expectations["options"] = {"maxnreg": max_window_registers(target, inputs.D, inputs.dtype)}
    label = inputs.label("value gradient", *["deterministic"] * deterministic)
    return label, window_kernel, signature, constants, _aligned(signature), num_warps, 3, expectations
