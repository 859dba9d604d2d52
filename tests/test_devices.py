"""Choice of a device, and of the precision that it computes fastest in."""

import os
import subprocess
import sys

import pytest
import torch

from solq import devices
from solq.devices import choose_device, choose_precision

CPU = torch.device("cpu")


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device is cuda:2 but torch finds 2 GPUs, numbered from 0"):
        choose_device("cuda:2")


def test_metal_is_accepted_where_torch_has_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is mps but this torch has no Metal: use cpu"):
        choose_device("mps")


def test_a_processor_limited_to_avx2_computes_in_float32():
    code = "import torch; from solq.devices import *; print(choose_precision(torch.device('cpu')))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert shown.stdout == "float32 (this CPU has no instructions for bfloat16)\n"


@pytest.mark.parametrize(
    ("has_instructions", "times", "dtype"),
    [
        (True, {}, torch.bfloat16),
        (False, {}, torch.float32),
        (None, {torch.float32: 3.0, torch.bfloat16: 1.0}, torch.bfloat16),
        (None, {torch.float32: 1.0, torch.bfloat16: 14.0}, torch.float32),
    ],
)
def test_a_cpu_is_measured_where_its_instructions_do_not_tell(has_instructions, times, dtype, monkeypatch):
    monkeypatch.setattr(devices, "_cpu_has_bfloat16", lambda: has_instructions)
    monkeypatch.setattr(devices, "_processor_time", lambda dtype: times[dtype])
    assert choose_precision(CPU).dtype == dtype


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_a_gpu_is_asked_for_its_compute_capability(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    precision = choose_precision(torch.device("cuda"))
    assert precision == (dtype, f"compute capability {capability[0]}.{capability[1]}")


def test_a_named_precision_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(devices, "_cpu_has_bfloat16", lambda: False)
    assert choose_precision(CPU, "float16").dtype == torch.float16
    assert "slow: this CPU has no instructions for it" in str(choose_precision(CPU, "bfloat16"))
    with pytest.raises(ValueError, match="precision is 'int8', must be one of auto, float32, bfloat16, float16"):
        choose_precision(CPU, "int8")
