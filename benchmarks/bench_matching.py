"""Time the matching of six decoder layers: the cost alone, the assignment alone, both.

Contenders: this project; DETR's formulation (the cost of all B·Q × T pairs, layer by layer, `.cpu()`, SciPy per image);
the same with only the blocks of one image copied; torch-linear-assignment where it is installed.
`extra_info` has the host synchronizations and the peak memory of one call, on a GPU.

    pytest benchmarks/bench_matching.py --benchmark-only
    python -m benchmarks.bench_matching    # from how many targets on SciPy would be the better choice on a GPU
"""

import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from solq.kernels import linear_assignment, matching_cost, use_backend
from solq.training.matcher import HungarianMatcher

LAYERS, QUERIES, CLASSES = 6, 300, 91
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND = "triton" if torch.cuda.is_available() else "reference"  # never the interpreter

Matches = list[list[tuple[Tensor, Tensor]]]


class Batch(NamedTuple):
    """The arguments of `HungarianMatcher.match`, and the targets per image for DETR's formulation."""

    logits: Tensor
    boxes: Tensor
    target_labels: Tensor
    target_boxes: Tensor
    target_offsets: Tensor
    sizes: list[int]


def make_batch(images: int, crowded: bool) -> Batch:
    """Make random predictions and targets.

    An image has 150 targets if `crowded`, else a log-normal number of COCO's mean (7.3) and largest number (93).
    """
    generator = torch.Generator().manual_seed(images)
    drawn = torch.exp(1.5 + torch.randn(images, generator=generator)).round().clamp(max=93)
    sizes = [150] * images if crowded else drawn.int().tolist()
    T = sum(sizes)
    tensors = (
        torch.randn(LAYERS, images, QUERIES, CLASSES, generator=generator) - 4,
        torch.rand(LAYERS, images, QUERIES, 4, generator=generator) * 0.5 + 0.1,
        torch.randint(CLASSES, (T,), generator=generator),
        torch.rand(T, 4, generator=generator) * 0.5 + 0.1,
        torch.tensor([0, *sizes]).cumsum(0),
    )
    return Batch(*(tensor.to(DEVICE) for tensor in tensors), sizes)


def detr_cost(batch: Batch, layer: int) -> Tensor:
    """Compute Deformable DETR's cost (B·Q, T) of one layer, with all pairs of the batch."""
    probability = batch.logits[layer].flatten(0, 1).sigmoid()
    boxes = batch.boxes[layer].flatten(0, 1)
    negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
    positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
    focal = positive[:, batch.target_labels] - negative[:, batch.target_labels]
    l1 = torch.cdist(boxes, batch.target_boxes, p=1)
    giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(batch.target_boxes, "cxcywh", "xyxy"))
    return 2 * focal + 5 * l1 - 2 * giou


def our_cost(batch: Batch) -> Tensor:
    return matching_cost(*batch[:5])


def detr_costs(batch: Batch) -> list[Tensor]:
    return [detr_cost(batch, layer) for layer in range(LAYERS)]


def our_assignment(batch: Batch, cost: Tensor) -> Tensor:
    return linear_assignment(cost, batch.target_offsets)


def scipy_on_host(batch: Batch, cost: Tensor) -> Tensor:
    with use_backend("reference"):
        return linear_assignment(cost, batch.target_offsets)


def scipy_per_layer(batch: Batch, costs: list[Tensor]) -> Matches:
    """Assign as DETR does: copy the whole matrix of a layer to the host, and solve image by image."""
    images = len(batch.sizes)
    return [
        [
            tuple(map(torch.as_tensor, linear_sum_assignment(block[image])))
            for image, block in enumerate(cost.view(images, QUERIES, -1).cpu().split(batch.sizes, -1))
        ]
        for cost in costs
    ]


def scipy_of_blocks(batch: Batch, costs: list[Tensor]) -> Matches:
    """Assign likewise, but copy only the pairs of the same image, once per layer."""
    images = len(batch.sizes)
    matches = []
    for cost in costs:
        blocks = cost.view(images, QUERIES, -1).split(batch.sizes, -1)
        host = torch.cat([block[image].flatten() for image, block in enumerate(blocks)]).cpu()
        of_image = host.split([QUERIES * size for size in batch.sizes])
        matches.append(
            [
                tuple(map(torch.as_tensor, linear_sum_assignment(block.view(QUERIES, size))))
                for block, size in zip(of_image, batch.sizes, strict=True)
            ]
        )
    return matches


def torch_linear_assignment(batch: Batch, costs: list[Tensor]) -> list[Tensor]:
    """Assign one padded batch per layer with https://github.com/ivan-chai/torch-linear-assignment."""
    solver = pytest.importorskip("torch_linear_assignment", reason="torch-linear-assignment is not installed")
    images, most = len(batch.sizes), max(batch.sizes)
    solved = []
    for cost in costs:
        padded = cost.new_zeros(images, most, QUERIES)
        for image, block in enumerate(cost.view(images, QUERIES, -1).split(batch.sizes, -1)):
            padded[image, : batch.sizes[image]] = block[image].T
        solved.append(solver.batch_linear_assignment(padded))
    return solved


def our_matching(batch: Batch) -> Tensor:
    return HungarianMatcher().match(*batch[:5])


def detr_matching(batch: Batch) -> Matches:
    return [matches for layer in range(LAYERS) for matches in scipy_per_layer(batch, [detr_cost(batch, layer)])]


def block_matching(batch: Batch) -> Matches:
    return [matches for layer in range(LAYERS) for matches in scipy_of_blocks(batch, [detr_cost(batch, layer)])]


def torch_linear_assignment_matching(batch: Batch) -> list[Tensor]:
    return torch_linear_assignment(batch, detr_costs(batch))


def run(benchmark, call: Callable[[], object]) -> None:
    """Time `call` on DEVICE; on a GPU count its host synchronizations and its memory too."""

    def timed() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with use_backend(BACKEND):
        timed()  # compiles
        start = time.perf_counter()
        timed()
        rounds = int(0.3 / (time.perf_counter() - start))  # in 0.3 seconds, but no less than 3
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            benchmark.extra_info["synchronizations"] = sum("synchroniz" in str(w.message) for w in caught)
            benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        benchmark.pedantic(timed, rounds=min(max(rounds, 3), 50))


batches = pytest.mark.parametrize(
    ("images", "crowded"),
    [(images, crowded) for crowded in (False, True) for images in (1, 4, 16, 32)],
    ids=lambda value: ("crowded" if value else "coco") if isinstance(value, bool) else f"batch{value}",
)


@pytest.mark.parametrize("contender", [our_cost, detr_costs])
@batches
@pytest.mark.benchmark(group="matching cost of 6 layers")
def test_cost(benchmark, images: int, crowded: bool, contender: Callable[[Batch], object]) -> None:
    benchmark.group += f", batch {images}, {'crowded' if crowded else 'COCO'}"
    batch = make_batch(images, crowded)
    run(benchmark, lambda: contender(batch))


@pytest.mark.parametrize(
    "contender", [our_assignment, scipy_on_host, scipy_per_layer, scipy_of_blocks, torch_linear_assignment]
)
@batches
@pytest.mark.benchmark(group="assignment of 6 layers")
def test_assignment(benchmark, images: int, crowded: bool, contender: Callable[[Batch, object], object]) -> None:
    benchmark.group += f", batch {images}, {'crowded' if crowded else 'COCO'}"
    batch = make_batch(images, crowded)
    with use_backend(BACKEND):
        cost = our_cost(batch) if contender in (our_assignment, scipy_on_host) else detr_costs(batch)
    run(benchmark, lambda: contender(batch, cost))


@pytest.mark.parametrize("contender", [our_matching, detr_matching, block_matching, torch_linear_assignment_matching])
@batches
@pytest.mark.benchmark(group="matching of 6 layers")
def test_matching(benchmark, images: int, crowded: bool, contender: Callable[[Batch], object]) -> None:
    benchmark.group += f", batch {images}, {'crowded' if crowded else 'COCO'}"
    batch = make_batch(images, crowded)
    run(benchmark, lambda: contender(batch))


def contested(cost: Tensor) -> Tensor:
    """Make all targets want the same queries, so that the assignment takes as many steps as it can."""
    return cost * 1e-3 + torch.arange(cost.shape[-1], device=cost.device)


def milliseconds(call: Callable[[], object]) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    call()  # compiles
    return 1e3 * statistics.median(seconds() for _ in range(5))


def main() -> None:
    """Compare the two ways to solve the assignment of a GPU's tensors: the kernel, and SciPy with its copy and wait."""
    print(f"assignment, {LAYERS} layers, {QUERIES} queries, {torch.get_num_threads()} threads of the host")
    print("| images | costs | targets per image | SciPy | kernel |\n|---|---|---|---|---|")
    scipy_is_faster = []
    for images in (1, 16):
        for kind, make_cost in (("random", torch.clone), ("contested", contested)):
            for targets in (7, 30, 150, 300):
                offsets = torch.arange(images + 1, device=DEVICE) * targets
                cost = make_cost(torch.rand(LAYERS, images * targets, QUERIES, device=DEVICE))
                solve = functools.partial(linear_assignment, cost, offsets)
                with use_backend("reference"):
                    scipy = milliseconds(solve)
                case = f"{images} | {kind} | {targets}"
                if DEVICE.type == "cpu":
                    print(f"| {case} | {scipy:.2f} ms | needs a GPU |")
                    continue
                kernel = milliseconds(solve)
                print(f"| {case} | {scipy:.2f} ms | {kernel:.2f} ms |")
                if scipy < kernel:
                    scipy_is_faster.append(case)
    if DEVICE.type == "cuda":
        print(f"SciPy is faster in {len(scipy_is_faster)} of these cases: {scipy_is_faster}")


if __name__ == "__main__":
    main()
