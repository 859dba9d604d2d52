"""What all benchmarks share: results name the machine, and a bandwidth to compare with.

    pytest benchmarks/ --benchmark-only --benchmark-json=benchmarks/results/NAME.json
    python -m benchmarks.table benchmarks/results/NAME.json

The JSON has the commit (pytest-benchmark writes it), the device and the versions, and per row `extra_info`.
With SOLQ_BENCHMARK_SECONDS in the environment, what would start later than so many seconds is skipped.
"""

import os
import statistics
import time
from typing import Any

import pytest
import torch
import triton

START = time.monotonic()


def pytest_runtest_setup() -> None:
    seconds = float(os.environ.get("SOLQ_BENCHMARK_SECONDS", "inf"))
    if time.monotonic() - START > seconds:
        pytest.skip(f"the {seconds:.0f} seconds of SOLQ_BENCHMARK_SECONDS are over")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    on_gpu = torch.cuda.is_available()
    for name in ("node", "release", "python_build", "python_compiler"):  # of this host, which say nothing
        machine_info.pop(name, None)
    machine_info["cpu"] = {name: machine_info["cpu"].get(name) for name in ("brand_raw", "count")}
    threads = torch.get_num_threads()
    cpu = f"{machine_info['cpu']['brand_raw'] or 'CPU'}, {threads} thread{'s' if threads > 1 else ''}"
    machine_info["device"] = torch.cuda.get_device_name() if on_gpu else cpu
    machine_info["torch"] = torch.__version__
    machine_info["triton"] = triton.__version__
    machine_info["runtime"] = torch.version.hip or torch.version.cuda if on_gpu else None


@pytest.fixture(scope="session")
def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a copy of 1 GiB on a GPU or 256 MiB on a CPU."""
    on_gpu = torch.cuda.is_available()
    source = torch.empty(1 << (30 if on_gpu else 28), dtype=torch.uint8, device="cuda" if on_gpu else "cpu").fill_(1)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        target.copy_(source)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / statistics.median(seconds[2:])
