"""Measure the time and the memory of a call, on a GPU or a CPU."""

import statistics
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from solq.kernels import use_backend

ON_GPU = torch.cuda.is_available()


def peak_of(call: Callable[[], object]) -> int:
    """Return the most bytes held at once by one call, beyond those held before it."""
    if ON_GPU:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in changes))


def device_seconds(call: Callable[[], object]) -> float:
    """Return the median time of a call on the GPU, kept busy until all is launched, with its caches cleared."""
    cache = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(10):
        torch.cuda._sleep(10_000_000)  # cycles, about 5 ms
        cache.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def time_launch(benchmark: Any, launch: Callable[[], object]) -> float:
    """Time a call that may return before the device is done; note its memory and, on a GPU, the device's own time.

    Args:
        benchmark: the fixture of pytest-benchmark.
        launch: the call.

    Returns:
        The median in seconds: the device's time on a GPU, wall time on a CPU.
    """

    def call() -> None:
        launch()
        if ON_GPU:
            torch.cuda.synchronize()

    with use_backend("triton" if ON_GPU else "reference"):
        call()  # compiles
        benchmark.extra_info["peak_bytes"] = peak_of(call)
        if ON_GPU:
            seconds = device_seconds(launch)
            benchmark.extra_info["device_ms"] = seconds * 1e3
            benchmark.pedantic(call, rounds=max(5, min(50, int(0.3 / seconds))), warmup_rounds=3)
            return seconds
        benchmark.pedantic(call, rounds=7, warmup_rounds=1)
        return benchmark.stats.stats.median if benchmark.stats else 0.0
