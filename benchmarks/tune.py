"""Measure launch configurations on this machine's GPU: `python -m benchmarks.tune [--json FILE]`.

Prints the entries of `LAUNCH_TABLE` in `solq/kernels/ms_deform_attn/configuration.py`: for every D and dtype in use the
fastest words per block and warps, forward and backward, and queries and warps of the windows in which value's gradient
is summed ((0, 0): none pay), at the encoder's shape of an 800×1333 image. Copy them into the table.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

from benchmarks.bench_ms_deform_attn import LARGE, Case, make, ours_fused
from solq.kernels.ms_deform_attn.configuration import LAUNCH_TABLE, launch_configuration
from solq.kernels.ms_deform_attn.windows import window_configuration
from solq.kernels.runtime import architecture

DEVICE = torch.device("cuda")


def candidates(direction: str, D: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Return blocks of 8 to 128 words, at least half filled by a row, of 1 to 8 warps; windows of 32 to 128 queries."""
    if direction == "windows":
        return [(64, 4), (32, 2), (128, 8), (0, 0)]
    words = D // (2 if dtype.itemsize == 2 and D % 2 == 0 else 1)
    blocks = [block for block in (8, 16, 32, 64, 128) if block // 2 < words]
    return list(itertools.product(blocks, (1, 2, 4, 8)))


def milliseconds(direction: str, D: int, dtype: torch.dtype, configuration: tuple[int, int]) -> float:
    """Measure the fused function in one direction, with one configuration in LAUNCH_TABLE."""
    inputs = make(Case(LARGE, D, 2, decoder=False), dtype)
    key = (direction, architecture(DEVICE), D, dtype.itemsize)
    before = dict(LAUNCH_TABLE)
    LAUNCH_TABLE[key] = configuration
    try:
        if direction == "forward":
            with torch.no_grad():
                return do_bench(lambda: ours_fused(inputs), quantiles=[0.5])
        output = ours_fused(inputs)
        leaves = [inputs.value, inputs.offsets, inputs.logits]
        return do_bench(lambda: torch.autograd.grad(output, leaves, output, retain_graph=True), quantiles=[0.5])
    finally:
        LAUNCH_TABLE.clear()
        LAUNCH_TABLE.update(before)


def by_rule(direction: str, D: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the configuration that the launchers choose where nothing was measured."""
    target = architecture(DEVICE)
    if direction == "windows":
        return window_configuration(target, D, dtype)
    return launch_configuration(direction, target, D, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--channels", type=int, nargs="+", default=[48, 32, 64], help="D, the most wanted first")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning needs a GPU")
    header = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    measured: list[dict[str, Any]] = []
    for dtype, D, direction in itertools.product(
        (torch.bfloat16, torch.float32), arguments.channels, ("forward", "windows", "backward")
    ):
        times = {c: milliseconds(direction, D, dtype, c) for c in candidates(direction, D, dtype)}
        best = min(times, key=times.__getitem__)
        rule = by_rule(direction, D, dtype)
        print(f'    ("{direction}", "{architecture(DEVICE)}", {D}, {dtype.itemsize}): {best},', flush=True)
        measured += [
            {
                "direction": direction,
                "architecture": architecture(DEVICE),
                "D": D,
                "dtype": str(dtype),
                "configuration": configuration,
                "milliseconds": time,
                "best": configuration == best,
                "rule": configuration == rule,
            }
            for configuration, time in times.items()
        ]
        if arguments.json:  # each time: what is measured stays if the rest is cut off
            arguments.json.write_text(json.dumps({**header, "measured": measured}, indent=1))


if __name__ == "__main__":
    main()
