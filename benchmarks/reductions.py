"""Count the atomic additions that an encoder's gradient of `value` takes: `python -m benchmarks.reductions`.

The direct kernel makes one per corner and sample. With windows, where 64 queries are summed in a window of 16 × 16
pixels first (`solq/kernels/ms_deform_attn/windows.py`), it is one per pixel of the rows that the window's samples meet,
and one per corner of the samples outside. The image has 800 × 1333 pixels; offsets are Deformable DETR's initial ones,
one to four pixels in the direction of each head, plus normal noise. No GPU is needed, and no time is measured.
"""

import argparse

import torch

from benchmarks.bench_ms_deform_attn import LARGE, Case, M, P
from solq.kernels.ms_deform_attn.configuration import Problem
from solq.kernels.ms_deform_attn.windows import window_configuration, window_constants

QUERIES, _ = window_configuration("", 32, torch.bfloat16)
constants = window_constants(Problem(torch.bfloat16, M, 4, P, 32, 2), QUERIES)
STRIP, WINDOW = constants["STRIP"], constants["WINDOW"]


def strips(shapes: list[tuple[int, int]]) -> torch.Tensor:
    """List the pixels in the order of `pixel_in_strips`."""
    order, start = [], 0
    for height, width in shapes:
        level = torch.arange(start, start + height * width).view(height, width)
        order += [strip.T.flatten() for strip in level.split(STRIP)]
        start += height * width
    return torch.cat(order)


def count(head: int, noise: float) -> tuple[int, int]:
    """Count the additions of one head, in rows of channels, without windows and with them."""
    case = Case(LARGE, 32, 1, decoder=False)
    order = strips(case.shapes)
    centers = case.centers[order]
    angle = torch.tensor(2 * torch.pi * head / M)
    direction = torch.stack([angle.cos(), angle.sin()])
    direction = direction / direction.abs().max() * torch.arange(1, P + 1)[:, None]
    corners = left_over = 0
    for height, width in case.shapes:
        size = torch.tensor([width, height])
        position = centers[:, None] * size - 0.5 + direction + noise * torch.randn(len(order), P, 2)
        meets = ((position > -1) & (position < size)).all(-1)
        corners += 4 * int(meets.sum())
        for samples, counts in zip(position.split(QUERIES), meets.split(QUERIES), strict=True):
            samples = samples[counts]
            if len(samples):
                first = (samples.mean(0).floor() - (WINDOW // 2 - 1)).clamp(min=-1)
                inside = ((samples >= first) & (samples < first + WINDOW - 1)).all(-1)
                columns = min(int(first[0]) + WINDOW, width) - max(int(first[0]), 0)
                rows = samples[inside, 1].floor()
                if len(rows):
                    left_over += columns * int((rows.max() + 1).clamp(max=height - 1) - rows.min().clamp(min=0) + 1)
                left_over += 4 * int((~inside).sum())
    return corners, left_over


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--noise", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="standard deviation in pixels")
    torch.manual_seed(0)
    for noise in parser.parse_args().noise:
        corners, left_over = (sum(numbers) for numbers in zip(*(count(head, noise) for head in range(M)), strict=True))
        print(
            f"noise of {noise} pixels: {corners:,} rows corner by corner, {left_over / corners:.0%} of them in windows"
        )


if __name__ == "__main__":
    main()
