"""Multi-scale deformable attention: forward, and forward + backward.

    pytest benchmarks/bench_ms_deform_attn.py --benchmark-only

Contenders: ours and ours fused (Triton, on a GPU only: interpreter times mean nothing), the reference eager and
compiled, grid_sample (the definition: one per level), and where they are importable mmcv's operator, Deformable DETR's
extension, DCNv4's FlashDeformAttn, and transformers (which stacks all samples). All but "ours fused" are given
locations and weights; "unfused" is ours with softmax and locations computed by PyTorch, as "ours fused" includes them.
FlashDeformAttn has no backward pass in bfloat16: in the rows of bfloat16 it is given float16, its locations and logits
packed as it wants them.

The times of pytest-benchmark are those of a call by itself, with launch and wait. On a GPU `extra_info` has "device_ms"
too: the time between two events, launched ahead so that the host is not in it, with the inputs not in the caches.
It also has the bytes that must move (each input read once, each result written once), GB/s, their share of a large
copy's bandwidth, and the peak memory of one call beyond its inputs.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.measure import time_launch
from solq.kernels import ms_deform_attn, ms_deform_attn_fused, reference
from solq.kernels.ms_deform_attn import plain

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
M, P = 8, 4


class Case(NamedTuple):
    """One call; the decoder has 300 queries, the encoder one per pixel."""

    image: tuple[int, int]
    D: int
    B: int
    decoder: bool

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [tuple(-(-side // stride) for side in self.image) for stride in (8, 16, 32, 64)]  # type: ignore[misc]

    @property
    def centers(self) -> Tensor:
        """The centers of all pixels, (S, 2) as (x, y) in 0..1."""
        grids = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in self.shapes]
        return torch.cat(grids).flip(-1)

    def __str__(self) -> str:
        where = "decoder" if self.decoder else "encoder"
        return f"{where}-{self.image[0]}x{self.image[1]}-D{self.D}-B{self.B}"


LARGE, MIDDLE, SMALL, TOY = (800, 1333), (480, 640), (320, 320), (128, 128)
GPU_CASES = [Case(LARGE, D, 1, decoder) for D in (48, 32) for decoder in (False, True)]
GPU_CASES += [Case(SMALL, D, 1, decoder) for D in (48, 32) for decoder in (False, True)]
GPU_CASES += [Case(LARGE, D, B, decoder) for D, B in ((48, 4), (32, 4), (32, 16)) for decoder in (False, True)]
CPU_CASES = [Case(MIDDLE, 32, 1, False), Case(MIDDLE, 48, 1, False), Case(MIDDLE, 48, 2, False)]
CPU_CASES += [Case(MIDDLE, 48, 1, True), Case(SMALL, 48, 1, False), Case(TOY, 16, 16, False)]


class Inputs(NamedTuple):
    value: Tensor
    shapes: list[tuple[int, int]]
    starts: list[int]
    points: Tensor
    offsets: Tensor
    logits: Tensor
    locations: Tensor
    weights: Tensor
    levels: tuple[Tensor, Tensor]  # shapes and starts as the extensions take them: a copy would wait for the GPU
    flash: tuple[Tensor, Tensor]  # value, and locations and logits in one, as FlashDeformAttn takes them


@lru_cache(maxsize=1)  # contenders take turns at the same inputs
def make(case: Case, dtype: torch.dtype) -> Inputs:
    """Points at pixel centers in the encoder; offsets of a few pixels, as trained models have."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shapes = case.shapes
    L, S = len(shapes), sum(h * w for h, w in shapes)
    centers = case.centers
    if case.decoder:
        centers = torch.rand(300, 2, generator=generator, device=DEVICE)
    Q = len(centers)
    points = centers.to(DEVICE)[None, :, None].expand(case.B, Q, L, 2).contiguous()
    offsets = torch.randn(case.B, Q, M, L, P, 2, generator=generator, device=DEVICE) * 2
    logits = torch.randn(case.B, Q, M, L, P, generator=generator, device=DEVICE)
    sizes = torch.tensor([(w, h) for h, w in shapes], device=DEVICE)
    locations = points[:, :, None, :, None] + offsets / sizes[:, None]
    weights = logits.flatten(-2).softmax(-1).view(logits.shape)
    value = torch.randn(case.B, S, M, case.D, generator=generator, device=DEVICE)

    def leaf(tensor: Tensor, dtype: torch.dtype = dtype) -> Tensor:
        return tensor.to(dtype).requires_grad_()

    starts = list(accumulate((h * w for h, w in shapes[:-1]), initial=0))
    packed = torch.cat([locations.flatten(-3), logits.flatten(-2)], dim=-1)
    return Inputs(
        leaf(value), shapes, starts, points, leaf(offsets), leaf(logits),
        leaf(locations, torch.float32), leaf(weights, torch.float32),
        (torch.tensor(shapes, device=DEVICE), torch.tensor(starts, device=DEVICE)),
        (leaf(value, torch.float16), leaf(packed, torch.float16)),
    )  # fmt: skip


def ours(i: Inputs) -> Tensor:
    return ms_deform_attn(i.value, i.shapes, i.starts, i.locations, i.weights)


def ours_fused(i: Inputs) -> Tensor:
    return ms_deform_attn_fused(i.value, i.shapes, i.starts, i.points, i.offsets, i.logits)


def ours_unfused(i: Inputs) -> Tensor:
    locations = i.points[:, :, None, :, None] + i.offsets / i.levels[0].flip(-1)[:, None]
    weights = i.logits.float().flatten(-2).softmax(-1).view(i.logits.shape)
    return ms_deform_attn(i.value, i.shapes, i.starts, locations, weights)


def reference_eager(i: Inputs) -> Tensor:
    return reference.ms_deform_attn(i.value, i.shapes, i.starts, i.locations, i.weights)


torch._dynamo.config.recompile_limit = 64  # of graphs: one per shape, dtype and direction
reference_compiled = torch.compile(reference_eager, fullgraph=True, dynamic=False)
reference_compiled.__name__ = "reference_compiled"


def grid_sample(i: Inputs) -> Tensor:
    return plain.ms_deform_attn(i.value, i.shapes, i.locations, i.weights)


def mmcv(i: Inputs) -> Tensor:
    ops = pytest.importorskip("mmcv.ops.multi_scale_deform_attn", reason="mmcv is not installed")
    if i.value.dtype == torch.bfloat16:
        pytest.skip("mmcv's operator has no bfloat16")
    return ops.MultiScaleDeformableAttnFunction.apply(i.value, *i.levels, i.locations, i.weights, 64)


class _ExtensionFunction(torch.autograd.Function):
    """Around the extension's two functions, as Deformable DETR has it."""

    @staticmethod
    def forward(ctx, extension, *tensors):
        ctx.extension = extension
        ctx.save_for_backward(*tensors)
        return extension.ms_deform_attn_forward(*tensors, 64)

    @staticmethod
    def backward(ctx, grad):
        value, locations, weights = ctx.extension.ms_deform_attn_backward(*ctx.saved_tensors, grad.contiguous(), 64)
        return None, value, None, None, locations, weights


def deformable_detr(i: Inputs) -> Tensor:
    extension = pytest.importorskip("MultiScaleDeformableAttention", reason="the extension is not compiled here")
    if i.value.dtype != torch.float32:
        pytest.skip("the extension has no half precision")
    return _ExtensionFunction.apply(extension, i.value, *i.levels, i.locations, i.weights)


def flash_deform_attn(i: Inputs) -> Tensor:
    dcnv4 = pytest.importorskip("DCNv4.functions", reason="DCNv4 is not installed")
    if i.value.dtype == torch.float32:
        pytest.skip("FlashDeformAttn is compared in half precision")
    value, packed = i.flash
    return dcnv4.FlashDeformAttnFunction.apply(value, *i.levels, packed, 64, P)


def transformers(i: Inputs) -> Tensor:
    modeling = pytest.importorskip(
        "transformers.models.deformable_detr.modeling_deformable_detr", reason="transformers is not installed"
    )
    module = modeling.MultiScaleDeformableAttention()
    dtype = i.value.dtype
    return module(i.value, None, i.shapes, None, i.locations.to(dtype), i.weights.to(dtype), 64)


CONTENDERS = [ours, ours_fused, ours_unfused, deformable_detr, mmcv, flash_deform_attn]
CONTENDERS += [reference_eager, grid_sample, transformers]


def compulsory_bytes(contender: Callable[[Inputs], Tensor], i: Inputs, backward: bool) -> int:
    """Inputs once and the output once; backward the same again with the gradients' sizes."""
    read: tuple[Tensor, ...] = (i.value, i.locations, i.weights)
    if contender in (ours_fused, ours_unfused):
        read = (i.value, i.points, i.offsets, i.logits)
    elif contender is flash_deform_attn:
        read = i.flash
    output = i.value.element_size() * i.locations.shape[0] * i.locations.shape[1] * M * i.value.shape[-1]
    moved = sum(t.nbytes for t in read) + output
    return moved * 3 if backward else moved


def measure(benchmark, copy_bandwidth: float, case: Case, dtype, direction: str, contender) -> None:
    if not ON_GPU and contender in (ours, ours_fused, ours_unfused):
        pytest.skip("Triton needs a GPU: interpreter times mean nothing")
    if not ON_GPU and dtype == torch.bfloat16:
        pytest.skip("on a CPU all contenders are compared in float32")
    backward = direction == "forward_backward"
    inputs = make(case, dtype)
    leaves = [t for t in (*inputs, *inputs.flash) if isinstance(t, Tensor) and t.requires_grad]

    def launch() -> None:
        with torch.set_grad_enabled(backward):
            output = contender(inputs)
        if backward:
            torch.autograd.grad(output, leaves, output.detach(), allow_unused=True)

    benchmark.group = f"{case} {str(dtype).removeprefix('torch.')} {direction}"
    seconds = time_launch(benchmark, launch)
    moved = compulsory_bytes(contender, inputs, backward)
    if benchmark.stats:
        benchmark.extra_info |= {"bytes": moved, "GB/s": moved / seconds / 1e9}
        benchmark.extra_info["share_of_copy"] = moved / seconds / copy_bandwidth


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.__name__)
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", GPU_CASES if ON_GPU else CPU_CASES, ids=str)
def test_ms_deform_attn(benchmark, copy_bandwidth: float, case: Case, dtype, direction: str, contender) -> None:
    measure(benchmark, copy_bandwidth, case, dtype, direction, contender)


@pytest.mark.parametrize("contender", [reference_compiled], ids=["reference_compiled"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", GPU_CASES if ON_GPU else CPU_CASES, ids=str)
def test_compiled(benchmark, copy_bandwidth: float, case: Case, dtype, direction: str, contender) -> None:
    """Last, for compiling takes longer than all the rest."""
    measure(benchmark, copy_bandwidth, case, dtype, direction, contender)
