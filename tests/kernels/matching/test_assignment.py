"""linear_assignment against SciPy in float64: the same total cost, and the same indices where there are no ties."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from solq.kernels import linear_assignment, reference, use_backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LARGE = DEVICE.type == "cuda"  # the interpreter takes milliseconds for a step


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def offsets_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes], device=DEVICE).cumsum(0)


def random_cost(L: int, sizes: list[int], Q: int, seed: int = 0) -> Tensor:
    return torch.randn(L, sum(sizes), Q, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def check(cost: Tensor, sizes: list[int], assignment: Tensor) -> None:
    """One-to-one, as many pairs as possible, and SciPy's total with as few costs as possible that are not finite."""
    assert assignment.shape == cost.shape[:2]
    assert assignment.dtype == torch.int64
    Q = cost.shape[2]
    starts = np.cumsum([0, *sizes])
    for layer_cost, layer_assignment in zip(cost.cpu().double().numpy(), assignment.cpu().numpy(), strict=True):
        for start, size in zip(starts, sizes, strict=False):
            problem, queries = layer_cost[start : start + size], layer_assignment[start : start + size]
            assert ((queries >= -1) & (queries < Q)).all()
            rows = np.flatnonzero(queries >= 0)
            assert len(rows) == len(set(queries[rows])) == min(size, Q)

            finite = np.isfinite(problem)
            scale = np.abs(problem[finite]).max(initial=0)
            relative = np.where(finite, problem, 0) / (scale or 1)  # at most 1 in size
            best = linear_sum_assignment(np.where(finite, relative, 4.0 * (size + 1)))
            assert (~finite[rows, queries[rows]]).sum() == (~finite[best]).sum()
            np.testing.assert_allclose(relative[rows, queries[rows]].sum(), relative[best].sum(), atol=1e-6)


costs = st.one_of(
    st.integers(0, 2).map(float),  # many ties
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(-(2.0**-100), 2.0**-100, width=32),
    st.sampled_from([math.nan, math.inf, -math.inf, 3.4e38, -3.4e38]),
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, list[int]]:
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    Q, T = draw(st.integers(1, 6)), sum(sizes)
    kind = st.one_of(st.integers(-3, 3).map(float), costs) if draw(st.booleans()) else st.integers(-3, 3).map(float)
    row = st.lists(kind, min_size=Q, max_size=Q)
    equal_rows = draw(st.booleans())
    rows = [draw(row)] * T if equal_rows else draw(st.lists(row, min_size=T, max_size=T))
    return torch.tensor(rows, dtype=torch.float32).view(1, T, Q), sizes


@pytest.mark.parametrize("backend_name", ["reference", "triton"])
@settings(max_examples=50, deadline=None)
@given(problem=problems())
def test_optimal(problem: tuple[Tensor, list[int]], backend_name: str) -> None:
    cost, sizes = problem
    with use_backend(backend_name):
        assignment, non_finite = linear_assignment(cost.to(DEVICE), offsets_of(sizes), return_non_finite=True)
    check(cost, sizes, assignment)
    assert torch.equal(non_finite.cpu(), (~cost.isfinite()).sum(-1))


@pytest.mark.parametrize(("sizes", "scale"), [([17, 0, 0, 3, 12], 1.0), ([0, 4], 1e30), ([9, 0], 1e-30), ([0, 0], 1.0)])
def test_same_indices_as_scipy(sizes: list[int], scale: float) -> None:
    cost = random_cost(2, sizes, 12, seed=len(sizes)) * scale
    with use_backend("triton"):
        assignment = linear_assignment(cost, offsets_of(sizes))
    check(cost, sizes, assignment)
    with use_backend("reference"):
        assert torch.equal(assignment, linear_assignment(cost, offsets_of(sizes)))
    assert torch.equal(assignment, reference.linear_assignment(cost, offsets_of(sizes)))


@pytest.mark.parametrize(
    ("sizes", "Q"),
    [([1000, 7], 300), ([93, 0, 7, 300, 301], 300), ([1000], 2000)] if LARGE else [([20], 30), ([30], 6)],
)
def test_large(sizes: list[int], Q: int) -> None:
    cost = random_cost(1, sizes, Q)
    with use_backend("triton"):
        check(cost, sizes, linear_assignment(cost, offsets_of(sizes)))
        contested = cost * 1e-3 + torch.arange(Q, device=DEVICE)  # all targets want the same queries
        check(contested, sizes, linear_assignment(contested, offsets_of(sizes)))
        if LARGE:  # ties without end
            check(cost.round(), sizes, linear_assignment(cost.round(), offsets_of(sizes)))


@pytest.mark.parametrize("value", [0.0, 7.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("T", [1, 4, 9])
def test_equal_costs(T: int, value: float, backend: str) -> None:
    cost = torch.full((1, T, 4), value, device=DEVICE)
    assignment, non_finite = linear_assignment(cost, offsets_of([T]), return_non_finite=True)
    check(cost, [T], assignment)
    assert non_finite.sum() == (0 if math.isfinite(value) else 4 * T)


def test_costs_that_are_not_finite_are_avoided(backend: str) -> None:
    """Target 0 could have query 0 for 1, but then target 1 would be left with a NaN."""
    cost = torch.tensor([[[1.0, 100.0], [2.0, math.nan]]], device=DEVICE)
    assert linear_assignment(cost, offsets_of([2])).tolist() == [[1, 0]]
    cost = torch.tensor([[[-math.inf, 5.0]]], device=DEVICE)  # worse than every finite one, though it is small
    assert linear_assignment(cost, offsets_of([1])).tolist() == [[1]]


def test_float64_costs_near_overflow(backend: str) -> None:
    """From 1e290 on they count as infinite: neither SciPy nor the kernel could add them up."""
    cost = torch.tensor([[[math.nan, math.nan], [1.7e308, 1.0], [-1.7e308, 3.0]]], dtype=torch.float64, device=DEVICE)
    for sizes in ([2, 1], [3]):
        assignment, non_finite = linear_assignment(cost, offsets_of(sizes), return_non_finite=True)
        check(cost.where(cost.abs() < 1e290, math.inf), sizes, assignment)
        assert non_finite.tolist() == [[2, 1, 1]]


def test_a_bad_image_does_not_disturb_the_others(backend: str) -> None:
    sizes = [3, 4, 2]
    cost = random_cost(2, sizes, 5)
    clean = linear_assignment(cost, offsets_of(sizes))
    cost[1, 3:7] = math.nan
    assignment, non_finite = linear_assignment(cost, offsets_of(sizes), return_non_finite=True)
    others = torch.ones_like(clean, dtype=torch.bool)
    others[1, 3:7] = False
    assert torch.equal(assignment[others], clean[others])
    assert torch.equal(non_finite, torch.where(others, 0, 5))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape: tuple[int, int, int], backend: str) -> None:
    cost = torch.zeros(shape, device=DEVICE)
    assignment, non_finite = linear_assignment(cost, offsets_of([shape[1]]), return_non_finite=True)
    assert assignment.shape == non_finite.shape == shape[:2]
    assert (assignment == -1).all()


def test_no_images(backend: str) -> None:
    assert linear_assignment(torch.zeros(2, 0, 4, device=DEVICE), offsets_of([])).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    cost = random_cost(1, [3, 6], 5).to(dtype)
    check(cost, [3, 6], linear_assignment(cost, offsets_of([3, 6]).int()))


def test_inputs_need_not_be_contiguous(backend: str) -> None:
    cost = random_cost(1, [4, 2], 5)
    strided = cost.mT.contiguous().mT
    assert torch.equal(linear_assignment(strided, offsets_of([4, 2])), linear_assignment(cost, offsets_of([4, 2])))


def test_does_not_change_its_input(backend: str) -> None:
    cost = random_cost(1, [4], 5)
    cost[0, 1, 1] = math.nan
    before = cost.clone()
    linear_assignment(cost, offsets_of([4]))
    assert torch.equal(cost.nan_to_num(99), before.nan_to_num(99))


@pytest.mark.parametrize(
    ("cost", "offsets", "message"),
    [
        (torch.zeros(3, 4), [0, 3], r"cost has shape \(3, 4\), must be \(L, T, Q\)"),
        (torch.zeros(1, 3, 4, dtype=torch.int64), [0, 3], "cost is torch.int64, must be float16, bfloat16"),
        (torch.zeros(1, 3, 4).to(torch.float8_e4m3fn), [0, 3], "cost is torch.float8_e4m3fn, must be float16"),
        (torch.zeros(1, 3, 4), [0.0, 3.0], r"target_offsets is torch.float32 of shape \(2,\), must be int64 or int32"),
        (torch.zeros(1, 3, 4), [[0, 3]], r"target_offsets is torch.int64 of shape \(1, 2\)"),
        (torch.zeros(1, 3, 4), [0], "target_offsets has 1 entry, that is no image, but there are 3 targets"),
        (torch.zeros(1, 3, 4), [0, 2], "target_offsets goes from 0 to 2, must go from 0 to the 3 targets"),
        (torch.zeros(1, 3, 4), [0, 4, 3], "target_offsets must not decrease, but has 3 after 4"),
    ],
)
def test_errors(cost: Tensor, offsets: list, message: str, backend: str, monkeypatch) -> None:
    monkeypatch.setattr("solq.kernels.matching.checks.CHECK_ON_DEVICE", True) if LARGE else None
    with pytest.raises(ValueError, match=message) as error:
        linear_assignment(cost.to(DEVICE), torch.tensor(offsets, device=DEVICE))
    assert "\n" not in str(error.value)


def test_tensors_on_one_device() -> None:
    with pytest.raises(ValueError, match=f"target_offsets is on meta but cost on {DEVICE.type}.*: move them to one"):
        linear_assignment(random_cost(1, [2], 3), offsets_of([2]).to("meta"))
    with pytest.raises(TypeError, match="cost is a ndarray, must be a tensor"):
        linear_assignment(np.zeros((1, 2, 3)), offsets_of([2]))


@pytest.mark.gpu
def test_wrong_offsets_on_the_device_stay_inside_the_tensors() -> None:
    cost = random_cost(2, [5], 4)
    for offsets in ([-3, 9], [0, 4, 2, 5], [7, 9]):
        assignment = linear_assignment(cost, torch.tensor(offsets, device=DEVICE))
        assert ((assignment >= -1) & (assignment < 4)).all()


def test_operator(backend: str) -> None:
    cost = random_cost(1, [3, 1], 2)
    torch.library.opcheck(torch.ops.solq.linear_assignment, (cost, offsets_of([3, 1])))


def test_compiles_whole_for_any_number_of_targets(backend: str) -> None:
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(linear_assignment, fullgraph=True, dynamic=True, backend=graphs)
    for sizes in ([2, 3], [4, 2], [1, 6]):
        cost, offsets = random_cost(1, sizes, 4), offsets_of(sizes)
        assert torch.equal(compiled(cost, offsets), linear_assignment(cost, offsets))
    assert graphs.frame_count == 1


def test_exports(backend: str) -> None:
    class Assignment(torch.nn.Module):
        def forward(self, cost: Tensor, target_offsets: Tensor) -> Tensor:
            return linear_assignment(cost, target_offsets)

    arguments = (random_cost(1, [2, 3], 4), offsets_of([2, 3]))
    program = torch.export.export(Assignment(), arguments, dynamic_shapes=({1: torch.export.Dim("T")}, None))
    cost, offsets = random_cost(1, [4, 3], 4), offsets_of([4, 3])
    assert torch.equal(program.module()(cost, offsets), linear_assignment(cost, offsets))
