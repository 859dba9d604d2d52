"""Deformable attention: the fast CPU path against the definition, the Triton kernels against the fast CPU path."""

from itertools import accumulate
from typing import ClassVar

import pytest
import torch
import triton
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from solq import kernels
from solq.kernels import ms_deform_attn, ms_deform_attn_fused, reference, use_backend
from solq.kernels.ms_deform_attn import configuration, cpu, launch, operators, plain
from solq.kernels.runtime import INTERPRETED

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(3, 4), (1, 1), (2, 5)]
FORMS = ["plain", "points", "boxes"]
EXAMPLES = 20 if torch.cuda.is_available() else 5  # each takes seconds: on a GPU to compile, or in the interpreter


def starts_of(shapes: list[tuple[int, int]]) -> list[int]:
    return list(accumulate((h * w for h, w in shapes[:-1]), initial=0))


def make(
    form: str,
    B: int = 2,
    Q: int = 3,
    M: int = 2,
    D: int = 4,
    P: int = 2,
    shapes: list[tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float64,
    points_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """The floating arguments of a form: value, [reference points,] locations or offsets, weights or logits."""
    generator = torch.Generator().manual_seed(seed)
    points_dtype = points_dtype or dtype
    S, L = sum(h * w for h, w in shapes), len(shapes)

    def uniform(*size: int, low: float, high: float) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64) * (high - low) + low

    value = uniform(B, S, M, D, low=-1, high=1).to(dtype)
    points = uniform(B, Q, M, L, P, 2, low=-0.3, high=1.3) * (1 if form == "plain" else 3)
    weights = uniform(B, Q, M, L, P, low=-1, high=1)
    inputs = [value, points.to(points_dtype), weights.to(points_dtype)]
    if form != "plain":
        size = 2 if form == "points" else 4
        inputs.insert(1, uniform(B, Q, L, size, low=0, high=1).to(torch.promote_types(points_dtype, torch.float32)))
    return [tensor.to(DEVICE).requires_grad_() for tensor in inputs]


def call(
    form: str, inputs: list[Tensor], shapes: object = SHAPES, starts: object = None, module: object = None
) -> Tensor:
    function = getattr(module or kernels, "ms_deform_attn" if form == "plain" else "ms_deform_attn_fused")
    value, *others = inputs
    return function(value, shapes, starts_of(SHAPES) if starts is None else starts, *others)


def results(form: str, inputs: list[Tensor], **levels: object) -> list[Tensor]:
    """The output and the gradient to every input."""
    return with_gradients(call(form, inputs, **levels), inputs)


def with_gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    direction = torch.linspace(-1, 1, output.numel(), device=DEVICE).view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, direction)]


def in_float64(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in inputs]


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Within `tolerance` of the largest magnitude of each tensor."""
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape
        if e.numel():
            assert (f.double() - e.double()).abs().max() <= tolerance * e.abs().max().clamp(min=1e-3)


class TestReference:
    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(
        B=st.integers(1, 3),
        Q=st.integers(1, 9),
        M=st.integers(1, 3),
        P=st.integers(1, 3),
        shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
        seed=st.integers(0, 1 << 30),
    )
    @example(B=1, Q=2100, M=2, P=1, shapes=SHAPES, seed=0)  # gradients of weights are made in parts of 4096 bags
    def test_equals_the_definition(self, B, Q, M, P, shapes, seed) -> None:
        inputs = value, locations, weights = make("plain", B, Q, M, 5, P, shapes, seed=seed)
        expected = plain.ms_deform_attn(value, shapes, locations, weights)
        found = reference.ms_deform_attn(value, shapes, starts_of(shapes), locations, weights)
        assert_near(with_gradients(found, inputs), with_gradients(expected, inputs), 1e-12)

    @pytest.mark.parametrize("form", ["points", "boxes"])
    def test_fused_form_is_softmax_and_locations(self, form: str) -> None:
        value, points, offsets, logits = make(form)
        weights = logits.flatten(-2).softmax(-1).view(logits.shape)
        centers = points[:, :, None, :, None]
        if form == "points":
            sizes = torch.tensor([(w, h) for h, w in SHAPES], device=DEVICE)
            locations = centers + offsets / sizes[:, None]
        else:
            locations = centers[..., :2] + offsets / offsets.shape[4] * centers[..., 2:] * 0.5
        expected = plain.ms_deform_attn(value, SHAPES, locations, weights)
        assert_near([call(form, [value, points, offsets, logits], module=reference)], [expected], 1e-12)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("form", FORMS)
    def test_forced_definition(self, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu, "ms_deform_attn", None)  # which the definition is not made of
        inputs = make(form, dtype=dtype)
        with use_backend("definition"):
            found = results(form, inputs, shapes=torch.tensor(SHAPES, device=DEVICE))
        assert found[0].dtype == dtype
        monkeypatch.undo()
        expected = results(form, in_float64(inputs), module=reference)
        assert_near(found, expected, 1e-12 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps)

    def test_equals_transformers(self) -> None:
        modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
        value, locations, weights = make("plain", dtype=torch.float32)
        expected = modeling.MultiScaleDeformableAttention()(
            value,
            torch.tensor(SHAPES, device=DEVICE),
            SHAPES,
            torch.tensor(starts_of(SHAPES), device=DEVICE),
            locations,
            weights,
            64,
        )
        found = reference.ms_deform_attn(value, SHAPES, starts_of(SHAPES), locations, weights)
        assert_near([found], [expected], 1e-5)

    @pytest.mark.parametrize("form", FORMS)
    def test_gradcheck(self, form: str) -> None:
        inputs = make(form, B=1, Q=2)
        assert torch.autograd.gradcheck(lambda *tensors: call(form, list(tensors), module=reference), inputs)

    @pytest.mark.parametrize("form", FORMS)
    def test_functional_gradients(self, form: str) -> None:
        def loss(inputs: list[Tensor]) -> Tensor:
            return call(form, inputs, module=reference).square().sum()

        inputs = make(form)
        assert_near(torch.func.grad(loss)(inputs), torch.autograd.grad(loss(inputs), inputs), 1e-12)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
    @pytest.mark.parametrize(
        ("argument", "numbers"), [(1, slice(2)), (1, slice(2, 4)), (2, slice(2))], ids=["center", "size", "offset"]
    )
    def test_boxes_that_are_not_finite_sample_zero(self, argument: int, numbers: slice, bad: float) -> None:
        inputs = make("boxes", B=1, dtype=torch.float32)
        inputs[argument].data[:, 0, ..., numbers] = bad
        output, *gradients = results("boxes", inputs, module=reference)
        assert not output[:, 0].any()
        assert output[:, 1:].any()
        assert all(not gradient[:, 0].any() for gradient in gradients[1:])
        assert all(gradient.isfinite().all() for gradient in gradients)

    @pytest.mark.parametrize("form", FORMS)
    def test_compiles_as_one_graph(self, form: str) -> None:
        with use_backend("reference"):
            compiled = torch.compile(lambda *tensors: call(form, list(tensors)), fullgraph=True, backend="aot_eager")
            inputs = make(form)
            assert_near(with_gradients(compiled(*inputs), inputs), results(form, inputs), 1e-12)


class TestTriton:
    @pytest.fixture(autouse=True)
    def _triton(self):
        with use_backend("triton"):
            yield

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
    @given(
        form=st.sampled_from(FORMS),
        B=st.integers(1, 2),
        Q=st.integers(1, 9),
        M=st.integers(1, 2),
        D=st.integers(1, 40),
        P=st.integers(1, 2),
        shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=2),
        seed=st.integers(0, 1 << 30),
    )
    def test_equals_reference(self, form, B, Q, M, D, P, shapes, seed) -> None:
        inputs = make(form, B, Q, M, D, P, shapes, seed=seed)
        levels = {"shapes": shapes, "starts": starts_of(shapes)}
        assert_near(
            results(form, inputs, **levels), results(form, in_float64(inputs), module=reference, **levels), 1e-11
        )

    @pytest.mark.parametrize(
        ("D", "dtype"),
        [(32, torch.float32), (48, torch.float32), (300, torch.float32), (34, torch.bfloat16)],  # 34: one word is left
    )
    def test_channels(self, D: int, dtype: torch.dtype) -> None:
        if D > 96 and INTERPRETED and triton.__version__.startswith("3.6."):
            pytest.skip("triton 3.6's interpreter reads a mask of one element as if only the first lane had it")
        inputs = make("points", B=1, Q=2, M=2, D=D, P=1, dtype=dtype)
        tolerance = 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 5e-6
        assert_near(results("points", inputs), results("points", in_float64(inputs), module=reference), tolerance)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        ("dtype", "points_dtype"),
        [
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float16),
            (torch.bfloat16, torch.float32),  # what autocast gives
            (torch.float16, torch.float32),
        ],
    )
    def test_dtypes(self, form: str, dtype: torch.dtype, points_dtype: torch.dtype) -> None:
        inputs = make(form, B=1, D=6, dtype=dtype, points_dtype=points_dtype)
        found = results(form, inputs)
        assert found[0].dtype == dtype
        assert [g.dtype for g in found[1:]] == [t.dtype for t in inputs]
        # Sums are in float32; what is left is the rounding of results, and in the fused form of the saved output.
        expected = results(form, in_float64(inputs), module=reference)
        assert_near(found, expected, 8 * torch.finfo(dtype).eps if dtype != torch.float32 else 5e-6)

    @pytest.mark.parametrize("form", FORMS)
    def test_gradcheck(self, form: str) -> None:
        inputs = make(form, B=1, Q=1, M=1, D=2, P=1, shapes=[(2, 3)])
        levels = {"shapes": [(2, 3)], "starts": [0]}
        assert torch.autograd.gradcheck(lambda *t: call(form, list(t), **levels), inputs, fast_mode=True)

    def test_levels_may_be_tensors(self) -> None:
        inputs = make("points", B=1)
        expected = call("points", inputs)
        for dtype in (torch.int32, torch.int64):
            shapes = torch.tensor(SHAPES, device=DEVICE, dtype=dtype)
            starts = torch.tensor(starts_of(SHAPES), device=DEVICE, dtype=dtype)
            assert torch.equal(call("points", inputs, shapes, starts), expected)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("empty", ["B", "Q"])
    def test_nothing_to_do(self, form: str, empty: str) -> None:
        inputs = make(form, **{empty: 0})
        output, *gradients = results(form, inputs)
        assert output.numel() == 0
        assert all(not gradient.any() for gradient in gradients)

    def test_strided_and_unaligned_inputs(self) -> None:
        inputs = make("points", B=1, dtype=torch.float32)
        strided = []
        for tensor in inputs:
            wide = tensor.detach().new_zeros(*tensor.shape, 3).select(-1, 1)  # every third element, starting at 4 bytes
            strided.append(wide.copy_(tensor.detach()).requires_grad_())
        assert_near(results("points", strided), results("points", inputs), 1e-6)
        flat = torch.zeros(inputs[0].numel() + 1, device=DEVICE)
        unaligned = flat[1:].view(inputs[0].shape).copy_(inputs[0].detach())
        assert torch.equal(call("points", [unaligned, *inputs[1:]]), call("points", inputs))

    @pytest.mark.parametrize("form", FORMS)
    def test_non_finite_locations_sample_zero_within_bounds(self, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if INTERPRETED and triton.__version__.startswith("3.6."):
            pytest.skip("triton 3.6's interpreter takes the minimum of NaN and a number for NaN, unlike any GPU")
        inputs = make(form, B=1, Q=4, dtype=torch.float32)
        points = inputs[-2].detach()
        bad = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 2e9, -1e10]
        points[:, :3] = (
            torch.tensor(bad, device=DEVICE)
            .repeat(points[:, :3].numel())[: points[:, :3].numel()]
            .view_as(points[:, :3])
        )
        inputs[-2] = points.requires_grad_()
        original, guarded = launch._launch, 0

        def guarded_launch(kernel, direction, tensors, *others, **options):
            """The same launch with 64 elements of nonsense before and after every tensor."""
            nonlocal guarded
            buffers = []
            for tensor in tensors:
                nonsense = float("nan") if tensor.is_floating_point() else 1 << 20
                buffer = torch.full((tensor.numel() + 128,), nonsense, dtype=tensor.dtype, device=DEVICE)
                buffer[64:-64] = tensor.flatten()
                buffers.append(buffer)
            inner = [b[64:-64].view(t.shape) for b, t in zip(buffers, tensors, strict=True)]
            original(kernel, direction, inner, *others, **options)
            for tensor, buffer, result in zip(tensors, buffers, inner, strict=True):
                band = torch.cat([buffer[:64], buffer[-64:]])
                assert (band.isnan() if tensor.is_floating_point() else band == 1 << 20).all()
                tensor.copy_(result)
            guarded += 1

        monkeypatch.setattr(launch, "_launch", guarded_launch)
        output, *gradients = results(form, inputs)
        assert guarded == 2
        assert not output[:, :3].any()
        assert output[:, 3].any()
        assert all(gradient.isfinite().all() for gradient in gradients)
        expected = results(form, inputs, module=reference)
        assert_near([output, gradients[0]], expected[:2], 5e-6)

    @pytest.mark.parametrize("form", FORMS)
    def test_deterministic_backward(self, form: str) -> None:
        inputs = make(form, B=1, dtype=torch.float32)
        torch.use_deterministic_algorithms(True)
        try:
            first, second = results(form, inputs), results(form, inputs)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert_near(first, results(form, in_float64(inputs), module=reference), 5e-6)

    @pytest.mark.parametrize("backend", ["reference", "triton"])
    def test_autocast_rounds_value_only(self, backend: str) -> None:
        inputs = make("points", B=1, dtype=torch.float32)
        with use_backend(backend):
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                output, *gradients = results("points", inputs)
            rounded = [inputs[0].detach().bfloat16().requires_grad_(), *inputs[1:]]
            assert torch.equal(output, call("points", rounded))
        assert output.dtype == torch.bfloat16
        assert all(gradient.dtype == torch.float32 for gradient in gradients)

    @pytest.mark.parametrize("form", FORMS)
    def test_opcheck(self, form: str) -> None:
        value, *others = make(form, B=1, Q=1, M=1, P=1, dtype=torch.float32)
        levels = operators.level_table(SHAPES, value)
        arguments = (value, levels, None, *others) if form == "plain" else (value, levels, *others)
        torch.library.opcheck(torch.ops.solq.ms_deform_attn.default, arguments, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("form", ["plain", "points"])
    def test_compiles_once_for_all_batches_and_queries(self, form: str) -> None:
        graphs = []

        def backend(graph, _):
            graphs.append(graph)
            return graph

        def loss(*inputs: Tensor) -> Tensor:
            return call(form, list(inputs)).square().sum()

        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
        for B, Q in ((5, 7), (4, 9)):  # sizes that nothing else has
            inputs = make(form, B=B, Q=Q, M=2, D=3, P=2, dtype=torch.float32)
            expected, found = loss(*inputs), compiled(*inputs)
            assert_near([found], [expected], 1e-5)
            assert_near(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), 1e-5)
        assert len(graphs) == 1

    @pytest.mark.parametrize("form", ["plain", "points"])
    def test_compiled_backward(self, form: str) -> None:
        inputs = make(form, B=1, Q=2, dtype=torch.float32)
        compiled = torch.compile(lambda *t: call(form, list(t)), fullgraph=True, backend="aot_eager")
        direction = torch.ones_like(call(form, inputs))
        found = torch.autograd.grad(compiled(*inputs), inputs, direction)
        assert_near(found, torch.autograd.grad(call(form, inputs), inputs, direction), 1e-5)

    @pytest.mark.parametrize("backend", ["reference", "triton"])
    @pytest.mark.parametrize("form", ["plain", "points"])
    def test_export(self, form: str, backend: str) -> None:
        class Attention(torch.nn.Module):
            def forward(self, *inputs: Tensor) -> Tensor:
                return call(form, list(inputs))

        B, Q = torch.export.Dim("B", max=64), torch.export.Dim("Q", max=512)
        sizes = ({0: B}, *[{0: B, 1: Q}] * (2 if form == "plain" else 3))
        inputs = [tensor.detach() for tensor in make(form, B=2, Q=3)]
        with use_backend(backend):
            program = torch.export.export(Attention(), tuple(inputs), dynamic_shapes={"inputs": sizes})
            other = [tensor.detach() for tensor in make(form, B=3, Q=4)]
            assert_near([program.module()(*other)], [call(form, other)], 1e-12)

    @pytest.mark.parametrize("backend", ["reference", "triton"])
    @pytest.mark.parametrize("form", ["plain", "points"])
    def test_exported_program_has_all_gradients(self, form: str, backend: str) -> None:
        class Attention(torch.nn.Module):
            def forward(self, *inputs: Tensor) -> Tensor:
                return call(form, list(inputs))

        inputs = make(form, B=1, Q=2)
        with use_backend(backend):
            program = torch.export.export(Attention(), tuple(inputs)).module()
            found = torch.autograd.grad(program(*inputs).square().sum(), inputs)
            assert_near(found, torch.autograd.grad(call(form, inputs).square().sum(), inputs), 1e-11)

    @pytest.mark.parametrize("common", [1e4, -3e38])
    def test_logits_of_any_size(self, common: float) -> None:
        inputs = make("points", dtype=torch.float32)
        with torch.no_grad():
            inputs[-1].add_(common)
        assert_near(results("points", inputs), results("points", in_float64(inputs), module=reference), 5e-6)

    @pytest.mark.parametrize("size", [float("inf"), float("nan")])
    def test_boxes_that_are_not_finite(self, size: float) -> None:
        inputs = make("boxes", dtype=torch.float32)
        with torch.no_grad():
            inputs[1][:, :1, :, 2:] = size
        output, *gradients = results("boxes", inputs)
        assert not output[:, 0].any()
        assert output[:, 1:].any()
        assert all(gradient.isfinite().all() for gradient in gradients)

    @pytest.mark.parametrize("form", FORMS)
    def test_float64_value_with_bfloat16_points(self, form: str) -> None:
        inputs = make(form, B=1, D=3, points_dtype=torch.bfloat16)
        found, expected = results(form, inputs), results(form, in_float64(inputs), module=reference)
        assert [gradient.dtype for gradient in found[1:]] == [tensor.dtype for tensor in inputs]
        assert_near(found, expected, 2 * torch.finfo(torch.bfloat16).eps)

    def test_traced_levels_are_made_on_the_device(self) -> None:
        """A copy from the host in a compiled graph would make it wait, at each call."""
        with FakeTensorMode():
            value, *others = (torch.empty(t.shape, device="cuda") for t in make("points"))
            graph = make_fx(lambda *tensors: ms_deform_attn_fused(tensors[0], SHAPES, starts_of(SHAPES), *tensors[1:]))
            nodes = [str(node.target) for node in graph(value, *others).graph.nodes]
        assert "solq.ms_deform_attn.default" in nodes
        assert not any("copy" in node or "lift" in node for node in nodes)

    @pytest.mark.gpu
    def test_cuda_graph(self) -> None:
        inputs = [tensor.detach() for tensor in make("points", dtype=torch.float32)]
        shapes = [(7, 2), (1, 1), (2, 4)]  # not seen before
        with pytest.raises(RuntimeError, match="before this CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            call("points", inputs, shapes, starts_of(shapes))
        expected = call("points", inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call("points", inputs)
        output.zero_()
        graph.replay()
        assert torch.equal(output, expected)

    @pytest.mark.gpu
    def test_does_not_wait_for_the_gpu(self) -> None:
        inputs = make("points", dtype=torch.float32)
        results("points", inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            results("points", inputs)
            shapes = [(4, 3), (1, 1), (5, 2)]  # not seen before
            results("points", inputs, shapes=shapes, starts=starts_of(shapes))
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.gpu
    def test_more_than_two_to_the_31_elements(self) -> None:
        shapes, M, D, B = [(512, 512)], 8, 64, 17
        value = torch.zeros(B, 512 * 512, M, D, dtype=torch.bfloat16, device=DEVICE)
        assert value.numel() > 2**31
        value[-1] = 1
        locations = torch.rand(B, 4, M, 1, 4, 2, device=DEVICE) * 0.9 + 0.05
        weights = torch.full((B, 4, M, 1, 4), 0.25, device=DEVICE)
        output = ms_deform_attn(value, shapes, [0], locations, weights)
        assert (output[-1] == 1).all()
        assert not output[:-1].any()


class TestWindows:
    """The gradient of `value` in an encoder, summed in windows."""

    LEVELS: ClassVar = {"shapes": [(9, 11), (5, 6), (1, 1)], "starts": [0, 99, 129]}

    @pytest.fixture(autouse=True)
    def _every_encoder(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(configuration, "FEW_ROWS", 0)
        with use_backend("triton"):
            yield

    def make(self, form: str, spread: float = 2.0, B: int = 1, M: int = 1, **options: object) -> list[Tensor]:
        """One query per pixel, whose samples are some `spread` pixels away."""
        shapes = options.setdefault("shapes", self.LEVELS["shapes"])
        options.setdefault("dtype", torch.float32)
        grids = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w) for h, w in shapes]
        points = torch.cat(grids).flip(-1).to(DEVICE)
        inputs = make(form, B, len(points), M, **options)
        P = inputs[-2].shape[4]
        offsets = torch.randn(inputs[-2].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) * spread + 0.01
        sizes = torch.tensor([(w, h) for h, w in shapes], device=DEVICE)
        with torch.no_grad():
            if form == "plain":
                inputs[1].copy_(points[None, :, None, None, None] + offsets / sizes[:, None])
            else:
                inputs[1][..., :2] = points[None, :, None]
                inputs[2].copy_(offsets * (P if form == "boxes" else 1))
        return inputs

    def check(self, form: str, inputs: list[Tensor], tolerance: float, monkeypatch: pytest.MonkeyPatch) -> Tensor:
        launched = []
        original = launch.launch_windows
        monkeypatch.setattr(launch, "launch_windows", lambda *given: launched.append(original(*given)))
        found = results(form, inputs, **self.LEVELS)
        assert len(launched) == 1
        expected = results(form, in_float64(inputs), module=reference, **self.LEVELS)
        assert_near(found[:2], expected[:2], tolerance)  # others have bends where half-precision offsets meet pixels
        return found[1]

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("spread", [0.5, 30.0])  # all inside one window; nearly all outside
    def test_equals_reference(self, form: str, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.check(form, self.make(form, spread, D=20, P=3), 5e-6, monkeypatch)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = self.make("points", M=2, D=48, dtype=dtype)
        self.check("points", inputs, 8 * torch.finfo(dtype).eps, monkeypatch)

    @pytest.mark.parametrize(("weight", "gradient"), [(1e-7, 3e4), (1e5, 1e-4)])
    def test_weights_beyond_half_precision(self, weight: float, gradient: float) -> None:
        inputs = self.make("plain", dtype=torch.float16, points_dtype=torch.float32)
        with torch.no_grad():
            inputs[2].mul_(weight)
        found = []
        for tensors, module in ((inputs, kernels), (in_float64(inputs), reference)):
            output = call("plain", tensors, module=module, **self.LEVELS)
            found += torch.autograd.grad(output, tensors[0], torch.full_like(output, gradient))
        assert_near(found[:1], found[1:], 8 * torch.finfo(torch.float16).eps)

    @pytest.mark.gpu
    def test_large_encoder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shapes = [(100, 167), (50, 84), (25, 42), (13, 21)]
        inputs = self.make("points", B=2, M=8, D=48, P=4, shapes=shapes, dtype=torch.bfloat16)
        in_windows = results("points", inputs, shapes=shapes, starts=starts_of(shapes))
        monkeypatch.setattr(launch, "uses_windows", lambda *given: False)
        corner_by_corner = results("points", inputs, shapes=shapes, starts=starts_of(shapes))
        assert_near(in_windows, corner_by_corner, 8 * torch.finfo(torch.bfloat16).eps)

    def test_deterministic(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = self.make("points", P=3)
        torch.use_deterministic_algorithms(True)
        try:
            first = self.check("points", inputs, 5e-6, monkeypatch)
            assert torch.equal(first, self.check("points", inputs, 5e-6, monkeypatch))
        finally:
            torch.use_deterministic_algorithms(False)

    def test_locations_that_meet_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = self.make("plain")
        bad = torch.tensor([float("inf"), -float("inf"), 3e38, -1e10, -1.0, 2.0], device=DEVICE)
        with torch.no_grad():
            inputs[1][:, ::2] = bad.repeat(inputs[1][:, ::2].numel() // 6 + 1)[: inputs[1][:, ::2].numel()].view_as(
                inputs[1][:, ::2]
            )
        original = launch.launch_windows

        def guarded(tensors: list[Tensor], *others: object) -> None:
            """The same launch with 64 elements of nonsense around value's gradient, which alone is written."""
            buffer = torch.full((tensors[0].numel() + 128,), 7.0, device=DEVICE)
            inner = buffer[64:-64].view(tensors[0].shape)
            inner.zero_()
            original([inner, *tensors[1:]], *others)
            assert (torch.cat([buffer[:64], buffer[-64:]]) == 7).all()
            tensors[0].copy_(inner)

        monkeypatch.setattr(launch, "launch_windows", guarded)
        assert self.check("plain", inputs, 5e-6, monkeypatch).isfinite().all()


def broken(**changes: object) -> dict[str, object]:
    value, points, offsets, logits = (tensor.detach() for tensor in make("points", B=1))
    arguments = {
        "value": value,
        "spatial_shapes": SHAPES,
        "level_start_index": starts_of(SHAPES),
        "reference_points": points,
        "sampling_offsets": offsets,
        "attention_logits": logits,
    }
    return arguments | {name: change(arguments[name]) for name, change in changes.items()}


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("value", lambda t: t[0], ValueError),
        ("value", lambda t: t.long(), TypeError),
        ("value", lambda t: t[:, :, :, :0], ValueError),
        ("value", lambda t: t.to("meta"), ValueError),
        ("spatial_shapes", lambda s: s[:2], ValueError),
        ("spatial_shapes", lambda s: [*s[:2], (2, 6)], ValueError),
        ("spatial_shapes", lambda s: [*s[:2], (-2, -5)], ValueError),
        ("spatial_shapes", lambda s: torch.tensor(s).float(), TypeError),
        ("spatial_shapes", lambda s: torch.tensor(s).flatten(), ValueError),
        ("spatial_shapes", lambda s: torch.tensor([*s[:2], (2, 6)]), ValueError),
        ("spatial_shapes", lambda s: None, TypeError),
        ("spatial_shapes", lambda s: torch.tensor(s).numpy(), TypeError),
        ("spatial_shapes", lambda s: [h * w for h, w in s], ValueError),
        ("spatial_shapes", lambda s: [(float(h), w) for h, w in s], TypeError),
        ("level_start_index", lambda s: 0, TypeError),
        ("level_start_index", lambda s: [float(start) for start in s], TypeError),
        ("level_start_index", lambda s: s[:2], ValueError),
        ("level_start_index", lambda s: [0, 12, 14], ValueError),
        ("reference_points", lambda t: t[..., :1], ValueError),
        ("reference_points", lambda t: t[:, :2], ValueError),
        ("sampling_offsets", lambda t: t[..., 0], ValueError),
        ("sampling_offsets", lambda t: t[:, :, :1], ValueError),
        ("sampling_offsets", lambda t: t.int(), TypeError),
        ("attention_logits", lambda t: t[:, :, :, :2], ValueError),
        ("attention_logits", lambda t: t.tolist(), TypeError),
    ],
)
def test_errors_name_the_argument_in_one_line(backend: str, name: str, change, error: type[Exception]) -> None:
    with use_backend(backend), pytest.raises(error, match=name) as raised:
        ms_deform_attn_fused(**broken(**{name: change}))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_are_errors(form: str, backend: str) -> None:
    inputs = make(form, B=1, Q=1, P=1)
    with use_backend(backend):
        for loss in (torch.sum, torch.linalg.vector_norm):  # the first one's gradient is a constant
            gradients = torch.autograd.grad(loss(call(form, inputs)), inputs, create_graph=True)
            for gradient in gradients:
                for other in inputs:
                    with pytest.raises(RuntimeError, match=r"differentiated twice|not implemented|no autograd formula"):
                        torch.autograd.grad(gradient.sum(), other, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_forward_mode_is_an_error(backend: str) -> None:
    value, *others = (tensor.detach() for tensor in make("points", B=1, Q=1))
    with use_backend(backend), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="value has a forward"):
        call("points", [forward_ad.make_dual(value, torch.ones_like(value)), *others])


@pytest.mark.parametrize("backend", ["reference", "triton", "definition"])
@pytest.mark.parametrize("form", FORMS)
def test_level_start_index_may_be_left_out(form: str, backend: str) -> None:
    value, *others = make(form, B=1)
    function = ms_deform_attn if form == "plain" else ms_deform_attn_fused
    with use_backend(backend):
        assert torch.equal(function(value, SHAPES, None, *others), function(value, SHAPES, [0, 12, 13], *others))


def test_level_counts_that_disagree() -> None:
    value, locations, weights = make("plain")
    with pytest.raises(ValueError, match="sampling_locations has 3 levels but spatial_shapes has 4"):
        ms_deform_attn(value, [*SHAPES, (1, 1)], [*starts_of(SHAPES), 23], locations, weights)
