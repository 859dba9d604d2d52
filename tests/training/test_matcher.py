"""HungarianMatcher against DETR's formulation, and criterion and matcher as one graph."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from solq.data.batch import PackedTargets
from solq.kernels import use_backend
from solq.models.solq.config import SOLQConfig
from solq.models.solq.model import SOLQ
from solq.training.criterion import SetCriterion
from solq.training.matcher import HungarianMatcher

Target = dict[str, Tensor]


def random_case(sizes: list[int], Q: int, C: int, device: torch.device, seed: int = 0) -> tuple[Target, list[Target]]:
    generator = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> Tensor:
        return (torch.rand(*shape, 4, generator=generator) * 0.8 + 0.1).to(device)

    outputs = {
        "pred_logits": torch.randn(len(sizes), Q, C, generator=generator).to(device),
        "pred_boxes": boxes(len(sizes), Q),
    }
    targets = [{"labels": torch.randint(C, (n,), generator=generator).to(device), "boxes": boxes(n)} for n in sizes]
    return outputs, targets


def random_layers(L: int, sizes: list[int], Q: int, C: int, device: torch.device) -> tuple[Tensor, ...]:
    """The arguments of `match`."""
    layers = [random_case(sizes, Q, C, device, seed)[0] for seed in range(L)]
    targets = random_case(sizes, Q, C, device)[1]
    return (
        torch.stack([layer["pred_logits"] for layer in layers]),
        torch.stack([layer["pred_boxes"] for layer in layers]),
        torch.cat([target["labels"] for target in targets]),
        torch.cat([target["boxes"] for target in targets]),
        torch.tensor([0, *sizes], device=device).cumsum(0),
    )


def detr_matches(outputs: Target, targets: list[Target], class_cost_form: str) -> list[tuple[Tensor, Tensor]]:
    """DETR's matcher: all pairs of the batch, then SciPy per image. Focal cost as in Deformable DETR."""
    B, Q = outputs["pred_logits"].shape[:2]
    logits, boxes = outputs["pred_logits"].flatten(0, 1), outputs["pred_boxes"].flatten(0, 1)
    labels = torch.cat([target["labels"] for target in targets])
    target_boxes = torch.cat([target["boxes"] for target in targets])
    if class_cost_form == "softmax":
        cost = -logits.softmax(-1)[:, labels]
    else:
        p = logits.sigmoid()
        positive, negative = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log(), 0.75 * p**2 * -(1 - p + 1e-8).log()
        cost = (positive - negative)[:, labels]
    giou = generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (boxes, target_boxes)))
    cost = (1.5 * cost + 4 * torch.cdist(boxes, target_boxes, p=1) - 3 * giou).view(B, Q, -1).cpu()
    blocks = cost.split([len(target["boxes"]) for target in targets], -1)
    return [
        tuple(torch.as_tensor(index, dtype=torch.int64) for index in linear_sum_assignment(block[image]))
        for image, block in enumerate(blocks)
    ]


@pytest.mark.parametrize("class_cost_form", ["focal", "softmax"])
@pytest.mark.parametrize("sizes", [[3, 0, 12, 1], [0, 0], [40, 20, 21]])
def test_same_as_detr(sizes: list[int], class_cost_form: str, device: torch.device) -> None:
    outputs, targets = random_case(sizes, 20, 7, device)
    matches = HungarianMatcher(1.5, 4, 3, class_cost_form=class_cost_form)(outputs, targets)
    for (query, target), (expected_query, expected_target) in zip(
        matches, detr_matches(outputs, targets, class_cost_form), strict=True
    ):
        assert query.dtype == target.dtype == torch.int64
        assert torch.equal(query.cpu(), expected_query)
        assert torch.equal(target.cpu(), expected_target)


def test_boxes_compared_by_their_corners() -> None:
    """The cost of Sparse R-CNN, pair by pair."""
    logits, boxes, labels, target_boxes, offsets = random_layers(3, [4, 0, 9], 7, 5, torch.device("cpu"))
    got = HungarianMatcher(box_l1="corners").match(logits, boxes, labels, target_boxes, offsets)
    probability = logits.double().sigmoid()
    image_of = torch.bucketize(torch.arange(13), offsets[1:], right=True)
    for layer in range(3):
        for image in (0, 2):
            own = image_of == image
            p = probability[layer, image][:, labels[own]]
            cost = 2 * (-0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log())
            a, b = (box_convert(x.double(), "cxcywh", "xyxy") for x in (boxes[layer, image], target_boxes[own]))
            cost += 5 * torch.cdist(a, b, p=1) - 2 * generalized_box_iou(a, b)
            queries, targets = linear_sum_assignment(cost)
            expected = torch.full((int(own.sum()),), -1)
            expected[torch.from_numpy(targets)] = torch.from_numpy(queries)
            assert torch.equal(got[layer, own], expected)
    by_center = HungarianMatcher().match(logits, boxes, labels, target_boxes, offsets)
    assert not torch.equal(got, by_center)  # the choice matters for these boxes


@pytest.mark.parametrize("sizes", [[3, 0, 9, 1], [0]])
def test_triton_and_scipy_match_alike(sizes: list[int], device: torch.device) -> None:
    arguments = random_layers(2, sizes, 8, 5, device)
    matcher = HungarianMatcher()
    with use_backend("triton"):
        queries = matcher.match(*arguments)
    with use_backend("reference"):
        assert torch.equal(queries, matcher.match(*arguments))


def test_every_layer_matches_as_if_it_were_alone(device: torch.device) -> None:
    sizes = [3, 0, 12]
    matcher = HungarianMatcher(class_cost_form="softmax", alpha=0.5, gamma=1.0)
    logits, boxes, *targets = random_layers(3, sizes, 10, 5, device)
    queries = matcher.match(logits, boxes, *targets)
    assert (queries == -1).sum(1).tolist() == [2, 2, 2]
    for layer in range(3):
        assert torch.equal(queries[layer], matcher.match(logits[layer, None], boxes[layer, None], *targets)[0])


def test_half_precision_predictions(device: torch.device) -> None:
    logits, boxes, *targets = random_layers(1, [3, 5], 10, 5, device)
    logits, boxes = logits.bfloat16(), boxes.bfloat16()
    matcher = HungarianMatcher()
    assert torch.equal(matcher.match(logits, boxes, *targets), matcher.match(logits.float(), boxes.float(), *targets))


def test_no_gradient(device: torch.device) -> None:
    outputs, targets = random_case([2], 5, 3, device)
    outputs = {name: tensor.requires_grad_() for name, tensor in outputs.items()}
    matches = HungarianMatcher()(outputs, targets)
    assert not any(index.requires_grad for pair in matches for index in pair)


def test_counts_costs_that_are_not_finite(device: torch.device) -> None:
    matcher = HungarianMatcher()
    logits, boxes, *targets = random_layers(2, [2, 3], 4, 5, device)
    matcher.match(logits, boxes, *targets)
    assert matcher.non_finite_costs == 0
    boxes[1, 1, 2, 0] = torch.nan  # a query of the image with 3 targets
    matcher.match(logits, boxes, *targets)
    assert matcher.non_finite_costs == 3
    matcher.match(logits, boxes, *targets)
    assert matcher.non_finite_costs == 6
    assert not matcher.state_dict()


def test_errors(device: torch.device) -> None:
    with pytest.raises(ValueError, match="cost_class, cost_bbox and cost_giou are all 0"):
        HungarianMatcher(0, 0, 0)
    outputs, targets = random_case([2, 1], 5, 3, device)
    with pytest.raises(ValueError, match="targets has 1 entries but pred_logits has 2 images"):
        HungarianMatcher()(outputs, targets[:1])
    # The sums over the images agree.
    targets[0]["labels"], targets[1]["labels"] = targets[0]["labels"][:1], targets[0]["labels"]
    with pytest.raises(ValueError, match=r"targets\[0\] has 1 labels but 2 boxes, must have as many of both"):
        HungarianMatcher()(outputs, targets)


def test_compiles_whole_for_any_number_of_targets(device: torch.device) -> None:
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    matcher, eager = HungarianMatcher(), HungarianMatcher()
    compiled = torch.compile(matcher.match, fullgraph=True, dynamic=True, backend=graphs)
    counts = []
    for sizes in ([3, 4], [4, 6], [9, 6]):  # no sum is another size of the case: those would be taken for one
        arguments = random_layers(2, sizes, 8, 5, device)
        arguments[1][0, 0, 0] = torch.nan
        assert torch.equal(compiled(*arguments), eager.match(*arguments))
        assert torch.equal(matcher.non_finite_costs, eager.non_finite_costs)
        counts.append(graphs.frame_count)
    assert counts[0] == counts[-1], "compiled again for another number of targets"


def criterion_case(sizes: list[int], device: torch.device) -> tuple[dict, PackedTargets]:
    L, Q, C, N, n = 3, 6, 4, 16, 12

    def outputs(seed: int) -> Target:
        layer = random_case(sizes, Q, C, device, seed)[0]
        layer["pred_vectors"] = torch.randn(len(sizes), Q, n, generator=torch.Generator().manual_seed(seed)).to(device)
        return {name: tensor.requires_grad_() for name, tensor in layer.items()}

    targets = [
        target
        | {
            "masks": torch.ones(len(target["labels"]), N, N, dtype=torch.uint8, device=device),
            "image_id": torch.tensor(0, device=device),
            "orig_size": torch.tensor([32, 32], device=device),
            "size": torch.tensor([32, 32], device=device),
        }
        for target in random_case(sizes, Q, C, device)[1]
    ]
    layers = [outputs(seed) for seed in range(L)]
    stacked = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    return stacked, PackedTargets.pack(targets)


def make_criterion(device: torch.device) -> SetCriterion:
    config = SOLQConfig(backbone="resnet10", num_classes=4, width=64, encoder_layers=1, decoder_layers=3)
    model = SOLQ(replace(config, num_coefficients=12, mask_size=16))
    return SetCriterion(HungarianMatcher(), model).to(device)


def test_criterion_compiles_whole_for_any_number_of_targets(device: torch.device) -> None:
    torch._dynamo.reset()
    criterion = make_criterion(device)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=graphs)
    counts = []
    for sizes in ([3, 4], [4, 6], [9, 6]):
        outputs, targets = criterion_case(sizes, device)
        losses = compiled(outputs, targets)
        criterion.total(losses).backward()
        torch.testing.assert_close(losses, criterion(outputs, targets))
        counts.append(graphs.frame_count)
    assert counts[0] == counts[-1], "compiled again for another number of targets"


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_matching_and_losses_never_wait_for_the_device(compiled: bool, device: torch.device) -> None:
    criterion = make_criterion(device)
    forward = torch.compile(criterion, fullgraph=True) if compiled else criterion
    outputs, targets = criterion_case([2, 0, 9], device)
    criterion.total(forward(outputs, targets)).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion.total(forward(outputs, targets)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
