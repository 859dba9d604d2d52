"""matching_cost against a float64 definition pair by pair, and against DETR's formulation."""

import math

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from solq.kernels import matching_cost, reference, use_backend

Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
centers = st.integers(0, 50).map(lambda fiftieths: fiftieths / 50)  # closer ones differ by roundings of float32
extents = st.one_of(st.sampled_from([0.0, -0.3]), st.floats(0.03, 1))


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest):
    with use_backend(request.param):
        yield request.param


def random_case(L: int, sizes: list[int], Q: int, C: int, device: torch.device, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    B, T = len(sizes), sum(sizes)
    tensors = (
        torch.randn(L, B, Q, C, generator=generator) * 3,
        torch.rand(L, B, Q, 4, generator=generator) * 0.8 + 0.1,
        torch.randint(C, (T,), generator=generator),
        torch.rand(T, 4, generator=generator) * 0.8 + 0.1,
        torch.tensor([0, *sizes]).cumsum(0),
    )
    return tuple(tensor.to(device) for tensor in tensors)


def focal(logit: float, alpha: float, gamma: float) -> float:
    present, absent = 1 / (1 + math.exp(-logit)), 1 / (1 + math.exp(logit))
    positive = alpha * absent**gamma * -math.log(present + 1e-8)
    negative = (1 - alpha) * present**gamma * -math.log(absent + 1e-8)
    return positive - negative


def interval(center: float, extent: float) -> tuple[float, float]:
    return center - max(extent, 0) / 2, center + max(extent, 0) / 2


def giou(a: list[float], b: list[float]) -> float:
    overlap = hull = area_a = area_b = 1.0
    for axis in (0, 1):
        (low_a, high_a), (low_b, high_b) = interval(a[axis], a[axis + 2]), interval(b[axis], b[axis + 2])
        overlap *= max(min(high_a, high_b) - max(low_a, low_b), 0)
        hull *= max(high_a, high_b) - min(low_a, low_b)
        area_a *= high_a - low_a
        area_b *= high_b - low_b
    union = area_a + area_b - overlap
    return (overlap / union if union else 0) - ((hull - union) / hull if hull else 0)


def pairwise(case: Case, class_cost_form: str, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """The definition, one pair at a time in Python's float64, with the default weights."""
    logits, boxes, labels, target_boxes, offsets = (tensor.tolist() for tensor in case)
    cost = torch.zeros(len(logits), len(labels), case[0].shape[2], dtype=torch.float64)
    for l, layer in enumerate(logits):
        for b, image in enumerate(layer):
            for q, scores in enumerate(image):
                for t in range(offsets[b], offsets[b + 1]):
                    if class_cost_form == "softmax":
                        of_class = -math.exp(scores[labels[t]]) / sum(map(math.exp, scores))
                    else:
                        of_class = focal(scores[labels[t]], alpha, gamma)
                    box, target = boxes[l][b][q], target_boxes[t]
                    l1 = sum(abs(x - y) for x, y in zip(box, target, strict=True))
                    cost[l, t, q] = 2 * of_class + 5 * l1 - 2 * giou(box, target)
    return cost


@st.composite
def cases(draw: st.DrawFn) -> Case:
    L, Q, C = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    B, T = len(sizes), sum(sizes)

    def drawn(shape: tuple[int, ...], elements: st.SearchStrategy[float]) -> Tensor:
        count = math.prod(shape)
        return torch.tensor(draw(st.lists(elements, min_size=count, max_size=count)), dtype=torch.float32).view(shape)

    def drawn_boxes(shape: tuple[int, ...]) -> Tensor:
        return torch.cat([drawn((*shape, 2), centers), drawn((*shape, 2), extents)], dim=-1)

    labels = torch.tensor(draw(st.lists(st.integers(0, C - 1), min_size=T, max_size=T)), dtype=torch.int64)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return drawn((L, B, Q, C), st.floats(-30, 30)), drawn_boxes((L, B, Q)), labels, drawn_boxes((T,)), offsets


@pytest.mark.parametrize("class_cost_form", ["focal", "softmax"])
@pytest.mark.parametrize("backend_name", ["reference", "triton"])
@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_definition(case: Case, class_cost_form: str, backend_name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with use_backend(backend_name):
        cost = matching_cost(*(tensor.to(device) for tensor in case), class_cost_form=class_cost_form)
    assert cost.dtype == torch.float32
    torch.testing.assert_close(cost.cpu().double(), pairwise(case, class_cost_form), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 3.0])
def test_alpha_and_gamma(gamma: float, backend: str, device: torch.device) -> None:
    case = random_case(2, [2, 3], 4, 3, device)
    case[0][0, 0, 0] = torch.tensor([-200.0, 200.0, 0.0])
    expected = pairwise(case, "focal", alpha=0.4, gamma=gamma)
    cost = matching_cost(*case, alpha=0.4, gamma=gamma)
    torch.testing.assert_close(cost.cpu().double(), expected, rtol=1e-4, atol=1e-4)


def test_weights(backend: str, device: torch.device) -> None:
    case = random_case(1, [3], 4, 3, device)

    def cost(cost_class: float, cost_bbox: float, cost_giou: float) -> Tensor:
        return matching_cost(*case, cost_class=cost_class, cost_bbox=cost_bbox, cost_giou=cost_giou)

    torch.testing.assert_close(cost(3, 0.5, 7), 3 * cost(1, 0, 0) + 0.5 * cost(0, 1, 0) + 7 * cost(0, 0, 1))


def test_reference_has_the_same_keywords_and_defaults(device: torch.device) -> None:
    case = random_case(2, [2, 3], 4, 3, device)
    options = {
        "cost_class": 3,
        "cost_bbox": 0.5,
        "cost_giou": 7,
        "alpha": 0.4,
        "gamma": 1.5,
        "class_cost_form": "softmax",
    }
    with use_backend("reference"):
        for chosen in ({}, options, {"alpha": 0.4, "gamma": 1.5}):
            assert torch.equal(reference.matching_cost(*case, **chosen), matching_cost(*case, **chosen))
    with pytest.raises(TypeError, match="cost_classes"):
        reference.matching_cost(*case, cost_classes=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    logits, boxes, labels, target_boxes, offsets = random_case(2, [2, 0, 3], 6, 5, device)
    logits, boxes, target_boxes = logits.to(dtype), boxes.to(dtype), target_boxes.to(dtype)
    cost = matching_cost(logits, boxes, labels.int(), target_boxes, offsets.int())
    assert cost.dtype == torch.float32
    expected = matching_cost(logits.float(), boxes.float(), labels, target_boxes.float(), offsets)
    torch.testing.assert_close(cost, expected)


def test_same_as_detr(backend: str, device: torch.device) -> None:
    """The blocks of one image in the matrix (B·Q, T) of Deformable DETR, whose float32 has no digits of 1 − p ≈ 0."""
    logits, boxes, labels, target_boxes, _ = case = random_case(2, [3, 0, 7], 300, 91, device)
    cost = matching_cost(*case)
    logits, boxes, target_boxes = logits.double(), boxes.double(), target_boxes.double()
    for layer in range(2):
        probability = logits[layer].flatten(0, 1).sigmoid()
        negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
        positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
        queries = boxes[layer].flatten(0, 1)
        full = (
            2 * (positive - negative)[:, labels]
            + 5 * torch.cdist(queries, target_boxes, p=1)
            - 2 * generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (queries, target_boxes)))
        ).view(3, 300, -1)
        for image, (start, end) in enumerate([(0, 3), (3, 3), (3, 10)]):
            expected = full[image, :, start:end].T.float()
            torch.testing.assert_close(cost[layer, start:end], expected, rtol=1e-5, atol=1e-4)


def test_degenerate_boxes_are_finite(backend: str, device: torch.device) -> None:
    logits, boxes, labels, target_boxes, offsets = random_case(1, [4], 6, 2, device)
    odd = [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0.2], [0.5, 0.5, -1, 0.2], [0.5, 0.5, 1e-20, 1e-20]]
    boxes[0, 0, :4] = target_boxes[:] = torch.tensor(odd, device=device)
    cost = matching_cost(logits, boxes, labels, target_boxes, offsets, cost_class=0, cost_bbox=0, cost_giou=1)
    assert cost.isfinite().all()
    assert cost.abs().max() <= 1 + 1e-6  # a GIoU lies in -1 … 1, of whatever boxes


def test_saturated_logits_are_finite(backend: str, device: torch.device) -> None:
    case = random_case(1, [3], 4, 3, device)
    case[0][:] = torch.tensor([-1e4, 0, 1e4], device=device)
    assert matching_cost(*case).isfinite().all()
    assert matching_cost(*case, class_cost_form="softmax").isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_predictions_that_are_not_finite_are_seen(bad: float, backend: str, device: torch.device) -> None:
    case = random_case(1, [3, 2], 4, 3, device)
    case[1][0, 1, 2, 0] = bad
    if math.isnan(bad):
        case[0][0, 0, 1] = bad
    cost = matching_cost(*case)
    expected = torch.ones_like(cost, dtype=torch.bool)
    expected[0, 3:, 2] = False
    expected[0, :3, 1] = not math.isnan(bad)
    assert torch.equal(cost.isfinite(), expected)


@pytest.mark.parametrize("sizes", [[], [0, 0], [0, 2, 0, 0, 3, 0]])
def test_empty_images(sizes: list[int], backend: str, device: torch.device) -> None:
    case = random_case(2, sizes, 5, 3, device)
    cost = matching_cost(*case)
    assert cost.shape == (2, sum(sizes), 5)
    torch.testing.assert_close(cost.cpu().double(), pairwise(case, "focal"), rtol=1e-4, atol=1e-4)


def test_inputs_need_not_be_contiguous(backend: str, device: torch.device) -> None:
    logits, boxes, labels, target_boxes, offsets = case = random_case(2, [2, 3], 5, 3, device)
    strided = (logits.mT.contiguous().mT, boxes.mT.contiguous().mT, labels, target_boxes.T.contiguous().T, offsets)
    torch.testing.assert_close(matching_cost(*strided), matching_cost(*case))


def test_no_gradient(backend: str, device: torch.device) -> None:
    logits, boxes, *targets = random_case(1, [2], 3, 3, device)
    assert not matching_cost(logits.requires_grad_(), boxes.requires_grad_(), *targets).requires_grad


def test_queries_beyond_one_block(device: torch.device) -> None:
    case = random_case(1, [2], 300, 2, device)
    with use_backend("triton"):
        cost = matching_cost(*case)
    with use_backend("reference"):
        torch.testing.assert_close(cost, matching_cost(*case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("position", "replace", "message"),
    [
        (0, lambda x: x[0], r"logits has shape \(2, 5, 3\), must be \(L, B, Q, C\)"),
        (0, lambda x: x.long(), "logits is torch.int64, must be float16, bfloat16, float32 or float64"),
        (1, lambda x: x[:, :, :4], r"boxes has shape \(1, 2, 4, 4\), must be \(1, 2, 5, 4\)"),
        (2, lambda x: x[None], r"target_labels has shape \(1, 5\), must be \(T,\)"),
        (2, lambda x: x.float(), "target_labels is torch.float32, must be int64 or int32"),
        (2, lambda x: x + 2, r"target_labels has \d, must be in 0..2 as logits has 3 classes"),
        (2, lambda x: x - 9, r"target_labels has -\d, must be in 0..2"),
        (3, lambda x: x[1:], r"target_boxes has shape \(4, 4\), must be \(5, 4\) as there are 5 target_labels"),
        (4, lambda x: x.float(), "target_offsets is torch.float32"),
        (4, lambda x: x[:-1], "target_offsets has 2 entries, must have 3 for 2 images"),
        (4, lambda x: x + 1, "target_offsets goes from 1 to 6, must go from 0 to the 5 targets"),
        (
            4,
            lambda x: x * torch.tensor([0, 3, 1], device=x.device),
            "target_offsets must not decrease, but has 5 after 6",
        ),
    ],
)
def test_errors(position: int, replace, message: str, backend: str, device: torch.device, monkeypatch) -> None:
    monkeypatch.setattr("solq.kernels.matching.checks.CHECK_ON_DEVICE", True) if device.type == "cuda" else None
    case = list(random_case(1, [2, 3], 5, 3, device))
    case[position] = replace(case[position])
    with pytest.raises(ValueError, match=message) as error:
        matching_cost(*case)
    assert "\n" not in str(error.value)


def test_tensors_on_one_device(device: torch.device) -> None:
    case = list(random_case(1, [2], 3, 2, device))
    with pytest.raises(
        ValueError, match=f"target_boxes is on meta but logits on {device.type}.*: move them to one device"
    ):
        matching_cost(*case[:3], case[3].to("meta"), case[4])
    with pytest.raises(TypeError, match="target_offsets is a list, must be a tensor"):
        matching_cost(*case[:4], [0, 2])


def test_unknown_class_cost(device: torch.device) -> None:
    with pytest.raises(ValueError, match="class_cost_form is 'l2', must be 'focal' or 'softmax'"):
        matching_cost(*random_case(1, [1], 2, 2, device), class_cost_form="l2")


@pytest.mark.gpu
def test_unknown_label_on_the_device_gives_nan(device: torch.device) -> None:
    case = random_case(1, [2], 5, 3, device)
    case[2][1] = 10**6
    cost = matching_cost(*case)
    assert cost[:, 0].isfinite().all()
    assert cost[:, 1].isnan().all()


def test_operator(backend: str, device: torch.device) -> None:
    weights = (2.0, 5.0, 2.0, 0.25, 2.0)
    arguments = (*random_case(1, [2, 1], 3, 3, device), *weights, "focal")
    torch.library.opcheck(torch.ops.solq.matching_cost, arguments)


def test_compiles_whole_for_any_number_of_targets(backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(matching_cost, fullgraph=True, dynamic=True, backend=graphs)
    for sizes in ([2, 3], [4, 2], [1, 6]):
        case = random_case(1, sizes, 4, 3, device)
        torch.testing.assert_close(compiled(*case), matching_cost(*case))
    assert graphs.frame_count == 1


def test_exports(backend: str, device: torch.device) -> None:
    class Cost(torch.nn.Module):
        def forward(self, *case: Tensor) -> Tensor:
            return matching_cost(*case)

    T = torch.export.Dim("T")
    shapes = (None, None, {0: T}, {0: T}, None)
    program = torch.export.export(Cost(), random_case(1, [2, 3], 4, 3, device), dynamic_shapes={"case": shapes})
    case = random_case(1, [4, 3], 4, 3, device)
    torch.testing.assert_close(program.module()(*case), matching_cost(*case))
