"""Choice of the device to compute on, and of the precision that it computes fastest in."""

import os
import platform
import re
import time
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn

PrecisionName = Literal["auto", "float32", "bfloat16", "float16"]


class Precision(NamedTuple):
    """The dtype of matrix products and convolutions, and the reason for the choice in a few words."""

    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} ({self.reason})"


def choose_device(device: str | torch.device) -> torch.device:
    """Return the device of that name; "auto" is the GPU if there is one, else the CPU.

    Raises:
        ValueError: if there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?|mps", str(device)):
        raise ValueError(f"device is {str(device)!r}, must be auto, cpu, cuda, cuda:<number> or mps")
    chosen = torch.device(device)
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is mps but this torch has no Metal: use cpu")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device} but torch finds no GPU: use cpu, or check the driver")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device} but torch finds {torch.cuda.device_count()} GPUs, numbered from 0")
    return chosen


def choose_precision(device: torch.device, name: PrecisionName = "auto") -> Precision:
    """Choose the precision of automatic mixed precision: the fastest that the device computes well.

    Args:
        device: the device to compute on.
        name: a dtype is taken as it is; "auto" chooses by the device's instructions and, on a CPU where these do not
            tell, by a measurement of less than a second.

    Raises:
        ValueError: if there is no such precision.
    """
    if name not in get_args(PrecisionName):
        raise ValueError(f"precision is {name!r}, must be one of {', '.join(get_args(PrecisionName))}")
    if name != "auto":
        slow = device.type == "cpu" and name == "bfloat16" and _cpu_has_bfloat16() is False
        reason = "as asked for, though slow: this CPU has no instructions for it" if slow else "as asked for"
        return Precision(getattr(torch, name), reason)
    if device.type == "cuda":
        if torch.version.hip:
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return Precision(torch.bfloat16 if native else torch.float16, torch.cuda.get_device_name(device))
        major, minor = torch.cuda.get_device_capability(device)
        dtype = torch.bfloat16 if major >= 8 else torch.float16
        return Precision(dtype, f"compute capability {major}.{minor}")
    if device.type == "mps":
        return Precision(torch.float32, "half precision is not measured on Metal")
    match _cpu_has_bfloat16():
        case True:
            return Precision(torch.bfloat16, "this CPU has instructions for it")
        case False:
            return Precision(torch.float32, "this CPU has no instructions for bfloat16")
    faster = _processor_time(torch.float32) / _processor_time(torch.bfloat16)
    if faster > 1.2:
        return Precision(torch.bfloat16, f"measured {faster:.1f} times as fast as float32")
    return Precision(torch.float32, f"bfloat16 was measured {faster:.1f} times as fast")


def _cpu_has_bfloat16() -> bool | None:
    """Tell whether the CPU has instructions for products in bfloat16, as far as torch may use them; None if unknown.

    oneDNN obeys ONEDNN_MAX_CPU_ISA, torch's own kernels ATEN_CPU_CAPABILITY.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        return None
    if platform.machine() not in ("x86_64", "AMD64"):
        return True  # oneDNN has asked for the BF16 or SVE-BF16 extension of ARM
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # AVX512 alone emulates it


def _processor_time(dtype: torch.dtype) -> float:
    """Measure the processor time of a convolution and a matrix product, forward and backward, in seconds."""
    convolution, linear = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(256, 256)
    images, queries = torch.zeros(4, 64, 32, 32), torch.zeros(1024, 256)
    times = []
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for _ in range(4):
            start = time.process_time()
            (convolution(images).sum() + linear(queries).sum()).backward()
            times.append(time.process_time() - start)
    return min(times[1:])
