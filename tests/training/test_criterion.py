"""The losses against DETR's formulation, layer by layer and image by image, and their gradients."""

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from solq.data.batch import PackedTargets
from solq.models.base import MaskBranch, NoMasks
from solq.models.solq.config import SOLQConfig
from solq.models.solq.mask_coding import DCTCoding, FlatCoding, MaskCoding, PCACoding
from solq.models.solq.masks import VectorMasks
from solq.models.solq.model import SOLQ
from solq.models.solq.separate_masks import SeparateMasks
from solq.models.solq.transformer import TransformerOutput
from solq.training.criterion import SetCriterion
from solq.training.matcher import HungarianMatcher

LAYERS, QUERIES, CLASSES, SIDE, COEFFICIENTS = 3, 6, 4, 16, 12


def make_targets(*counts: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def image(index: int, n: int) -> dict[str, Any]:
        centers = 0.3 + 0.4 * torch.rand(n, 2, generator=generator)
        sides = 0.1 + 0.4 * torch.rand(n, 2, generator=generator)
        return {
            "labels": torch.randint(CLASSES, (n,), generator=generator),
            "boxes": torch.cat([centers, sides], dim=1),
            "masks": (torch.rand(n, SIDE, SIDE, generator=generator) > 0.4).to(torch.uint8),
            "image_id": index,
            "orig_size": torch.tensor([64, 96]),
            "size": torch.tensor([64, 96]),
        }

    return [image(index, n) for index, n in enumerate(counts)]


def make_outputs(images: int, vector: int = COEFFICIENTS, seed: int = 1, two_stage: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def layer(queries: int) -> dict[str, Tensor]:
        boxes = torch.cat([random(images, queries, 2), random(images, queries, 2) - 1], dim=-1).sigmoid()
        return {"pred_logits": 2 * random(images, queries, CLASSES) - 2, "pred_boxes": boxes}

    layers = [layer(QUERIES) | {"pred_vectors": random(images, QUERIES, vector)} for _ in range(LAYERS)]
    outputs = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    if two_stage:
        proposals = layer(30)
        outputs |= {"enc_logits": proposals["pred_logits"], "enc_boxes": proposals["pred_boxes"]}
    return outputs


def layer_of(outputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return the outputs (B, Q, …) of one decoder layer."""
    return {name: value[index] for name, value in outputs.items() if name.startswith("pred")}


@functools.cache
def detector() -> SOLQ:
    """Build the smallest model with as many decoder layers as the outputs; its forward pass is never run."""
    return SOLQ(SOLQConfig(backbone="resnet10", num_classes=CLASSES, width=64, decoder_layers=LAYERS, encoder_layers=1))


def make_criterion(
    coding: MaskCoding | None = None,
    *,
    matcher: HungarianMatcher | None = None,
    masks: MaskBranch | None = None,
    loss_weight: float = 3.0,
    loss_start: int = 0,
) -> SetCriterion:
    model = copy.copy(detector())
    model._modules = model._modules.copy()
    model.masks = masks or VectorMasks(64, 8, coding or DCTCoding(COEFFICIENTS, SIDE), loss_weight, loss_start)
    return SetCriterion(matcher or HungarianMatcher(), model)


# ---- the losses as DETR writes them


def detr_match(logits: Tensor, boxes: Tensor, target: dict[str, Any]) -> list[tuple[int, int]]:
    """Pairs (query, target) of one image, by the cost of Deformable DETR."""
    probability = logits.sigmoid()[:, target["labels"]]
    negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
    positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
    l1 = torch.cdist(boxes, target["boxes"], p=1)
    giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(target["boxes"], "cxcywh", "xyxy"))
    cost = 2 * (positive - negative) + 5 * l1 - 2 * giou
    return list(zip(*linear_sum_assignment(cost.numpy()), strict=True))


def detr_losses(
    layer: dict[str, Tensor], targets: list[dict[str, Any]], coding: MaskCoding | None, one_class: bool = False
) -> dict[str, Tensor]:
    if one_class:
        targets = [target | {"labels": torch.zeros_like(target["labels"])} for target in targets]
    num_boxes = max(sum(len(target["labels"]) for target in targets), 1)
    onehot = torch.zeros_like(layer["pred_logits"])
    sums: dict[str, list[Tensor]] = {"bbox": [], "giou": [], "vector": []}
    for image, target in enumerate(targets):
        if len(target["labels"]) == 0:
            continue
        boxes = layer["pred_boxes"][image]
        for query, t in detr_match(layer["pred_logits"][image], boxes, target):
            onehot[image, query, target["labels"][t]] = 1
            sums["bbox"].append(F.l1_loss(boxes[query], target["boxes"][t], reduction="sum"))
            corners = [box_convert(box[None], "cxcywh", "xyxy") for box in (boxes[query], target["boxes"][t])]
            sums["giou"].append(1 - generalized_box_iou(*corners)[0, 0])
            if coding:
                vector = coding.encode(target["masks"][t : t + 1])[0]
                sums["vector"].append((layer["pred_vectors"][image, query] - vector).abs().mean())
    zero = torch.zeros(())
    losses = {
        "loss_ce": sigmoid_focal_loss(layer["pred_logits"], onehot, reduction="sum") / num_boxes,
        "loss_bbox": sum(sums["bbox"], zero) / num_boxes,
        "loss_giou": sum(sums["giou"], zero) / num_boxes,
    }
    if coding:
        losses["loss_vector"] = 3 * sum(sums["vector"], zero) / max(len(sums["vector"]), 1)
    return losses


@pytest.mark.parametrize(
    "counts",
    [(3, 2), (0, 4), (1, 0, 2), (0, 0), (9, 2), (6, 7)],
    ids=["usual", "first_empty", "middle_empty", "no_object", "more_than_queries", "as_many_as_queries"],
)
@pytest.mark.parametrize("two_stage", [False, True])
def test_all_losses_against_detr(counts: tuple[int, ...], two_stage: bool) -> None:
    criterion, targets = make_criterion(), make_targets(*counts)
    outputs = make_outputs(len(counts), two_stage=two_stage)
    losses = criterion(outputs, targets)
    expected = {}
    for index in range(LAYERS):
        suffix = "" if index == LAYERS - 1 else f"_{index}"
        for name, loss in detr_losses(layer_of(outputs, index), targets, criterion.model.masks.coding).items():
            expected[name + suffix] = loss
    if two_stage:
        proposals = {"pred_logits": outputs["enc_logits"], "pred_boxes": outputs["enc_boxes"]}
        for name, loss in detr_losses(proposals, targets, None, one_class=True).items():
            expected[f"{name}_enc"] = loss
    assert set(losses) == set(expected)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")

    weights = {"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2, "loss_vector": 1}
    total = sum(weights["_".join(name.split("_")[:2])] * loss for name, loss in expected.items())
    torch.testing.assert_close(criterion.total(losses), total, rtol=1e-4, atol=1e-4)
    assert set(losses) <= set(criterion.weight_dict)


def test_packed_targets_give_the_same() -> None:
    criterion, targets, outputs = make_criterion(), make_targets(3, 0, 2), make_outputs(3)
    from_list = criterion(outputs, targets)
    from_packed = criterion(outputs, PackedTargets.pack(targets))
    assert from_list == from_packed


def test_perfect_predictions() -> None:
    criterion, targets = make_criterion(), make_targets(2, 3)
    outputs = make_outputs(2)
    outputs["pred_logits"][:] = -20.0
    for image, target in enumerate(targets):
        for t in range(len(target["labels"])):
            outputs["pred_logits"][:, image, 5 - t, target["labels"][t]] = 20.0
            outputs["pred_boxes"][:, image, 5 - t] = target["boxes"][t]
            vectors = criterion.model.masks.coding.encode(target["masks"][t : t + 1])
            outputs["pred_vectors"][:, image, 5 - t] = vectors[0]
    for name, loss in criterion(outputs, targets).items():
        assert abs(loss) < 1e-5, name


def test_degenerate_boxes() -> None:
    """Boxes without area, of targets and of predictions, give finite losses and gradients."""
    criterion, targets = make_criterion(), make_targets(3)
    targets[0]["boxes"][0, 2:] = 0
    targets[0]["boxes"][1] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    outputs = make_outputs(1)
    outputs["pred_boxes"][-1, 0, :3] = targets[0]["boxes"]
    outputs["pred_boxes"][-1, 0, 3:, 2:] = 0
    outputs["pred_boxes"].requires_grad_()
    losses = criterion(outputs, targets)
    criterion.total(losses).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert outputs["pred_boxes"].grad.isfinite().all()


# ---- gradients


class FixedMatcher(HungarianMatcher):
    """Always the same pairs: where a matching changes, losses have no derivative."""

    def match(self, logits: Tensor, *_: Tensor) -> Tensor:
        return torch.tensor([4, 1, 0, -1, 2]).expand(len(logits), -1)


@pytest.mark.parametrize(
    ("loss", "output"),
    [
        ("loss_ce", "pred_logits"),
        ("loss_bbox", "pred_boxes"),
        ("loss_giou", "pred_boxes"),
        ("loss_vector", "pred_vectors"),
    ],
)
@pytest.mark.parametrize("coding", [DCTCoding(COEFFICIENTS, SIDE), FlatCoding(SIDE)], ids=["dct", "flat"])
def test_gradients_by_finite_differences(
    loss: str, output: str, coding: MaskCoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = coding.encode
    monkeypatch.setattr(coding, "encode", lambda masks: encode(masks).double())
    masks = None if loss == "loss_vector" else NoMasks()
    criterion = make_criterion(coding, matcher=FixedMatcher(), masks=masks)
    packed = PackedTargets.pack(make_targets(2, 3))
    packed.boxes = packed.boxes.double()
    outputs = {name: value.double() for name, value in make_outputs(2, coding.num_coefficients).items()}
    # Two images, all queries, but few classes or coefficients: finite differences cost two calls per number.
    _, middle, last = outputs[output]
    inputs, rest = last[..., :14].clone().requires_grad_(), last[..., 14:]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        changed = torch.cat([x, rest], dim=-1)
        losses = criterion(outputs | {output: torch.stack([changed, middle, changed])}, packed)
        return losses[loss], losses[f"{loss}_0"]

    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-5)
    assert torch.autograd.grad(function(inputs)[0], inputs)[0].abs().sum() > 0


def test_unmatched_targets_have_no_gradient() -> None:
    """Targets beyond the queries count as boxes, and nothing else."""
    criterion = make_criterion(matcher=FixedMatcher())
    outputs, targets = make_outputs(2), make_targets(2, 3)
    outputs["pred_boxes"].requires_grad_()
    criterion(outputs, targets)["loss_bbox"].backward()
    touched = outputs["pred_boxes"].grad[-1].abs().sum(-1) > 0
    assert not outputs["pred_boxes"].grad[:-1].any()
    assert touched.nonzero().tolist() == [[0, 1], [0, 4], [1, 0], [1, 2]]


# ---- settings


@pytest.mark.parametrize("start", [0, 1, 2])
def test_start_of_the_vector_loss(start: int) -> None:
    criterion, outputs, targets = make_criterion(loss_start=start), make_outputs(2), make_targets(2, 1)
    losses, all_layers = criterion(outputs, targets), make_criterion()(outputs, targets)
    names = [name for name in losses if name.startswith("loss_vector")]
    assert sorted(names) == sorted(["loss_vector_0", "loss_vector_1", "loss_vector"][start:])
    assert all(torch.equal(losses[name], all_layers[name]) for name in losses)


def test_weight_of_the_vector_loss() -> None:
    outputs, targets = make_outputs(2), make_targets(2, 1)
    one = make_criterion(loss_weight=1.0)(outputs, targets)
    seven = make_criterion(loss_weight=7.0)(outputs, targets)
    for name, loss in one.items():
        torch.testing.assert_close(seven[name], loss * (7 if "vector" in name else 1))


def test_flat_coding() -> None:
    """L2 plus dice of the masks themselves (paper, Table 3a)."""
    coding = FlatCoding(SIDE)
    criterion, targets = make_criterion(coding), make_targets(2, 1)
    outputs = make_outputs(2, vector=SIDE**2)
    got = criterion(outputs, targets)["loss_vector"]
    expected = []
    for image, target in enumerate(targets):
        for query, t in detr_match(outputs["pred_logits"][-1, image], outputs["pred_boxes"][-1, image], target):
            vector, mask = outputs["pred_vectors"][-1, image, query], target["masks"][t].flatten().float()
            dice = 1 - (2 * (vector * mask).sum() + 1) / (vector.square().sum() + mask.square().sum() + 1)
            expected.append(F.mse_loss(vector, mask) + dice)
    torch.testing.assert_close(got, 3 * torch.stack(expected).mean())


def test_pca_coding() -> None:
    coding = PCACoding(COEFFICIENTS, SIDE)
    coding.fit(torch.cat([target["masks"] for target in make_targets(20, 20, seed=7)]))
    criterion, outputs, targets = make_criterion(coding), make_outputs(2), make_targets(2, 1)
    expected = detr_losses(layer_of(outputs, -1), targets, coding)["loss_vector"]
    torch.testing.assert_close(criterion(outputs, targets)["loss_vector"], expected)


def test_without_masks() -> None:
    """mask_branch="none": no vectors among the outputs, no loss of them."""
    outputs = make_outputs(2)
    del outputs["pred_vectors"]
    losses = make_criterion(masks=NoMasks())(outputs, make_targets(2, 1))
    assert {name.split("_")[1] for name in losses} == {"ce", "bbox", "giou"}


@pytest.mark.parametrize("counts", [(2, 3), (0, 0), (8, 1)])
def test_separate_mask_branch(counts: tuple[int, int]) -> None:
    """Its losses are those of the matched pairs of the last layer, over the number of boxes."""
    torch.manual_seed(0)
    head = SeparateMasks(64, 4, [24, 40])
    shapes = [(8, 12), (4, 6), (2, 3)]
    S = sum(h * w for h, w in shapes)
    features = [torch.randn(2, 24, 8, 12), torch.randn(2, 40, 4, 6)]
    padding = torch.zeros(2, S, dtype=torch.bool)
    decoded = TransformerOutput([torch.randn(2, QUERIES, 64)], [], torch.randn(2, S, 64), padding, shapes)
    outputs, targets = make_outputs(2), make_targets(*counts)
    del outputs["pred_vectors"]
    outputs |= head(decoded, features, torch.zeros(2, 64, 96, dtype=torch.bool))
    prepared = outputs["mask_features"]
    criterion = make_criterion(masks=head)
    losses = criterion(outputs, targets)
    sums = {"loss_mask": torch.zeros(()), "loss_dice": torch.zeros(())}
    for image, target in enumerate(targets):
        if len(target["labels"]):
            for query, t in detr_match(outputs["pred_logits"][-1, image], outputs["pred_boxes"][-1, image], target):
                logits = head.mask_logits(prepared, torch.tensor([image]), torch.tensor([query]))
                pair = head.loss(logits, target["masks"][t][None], target["boxes"][t][None], target["size"][None])
                sums = {name: value + pair[name][0] for name, value in sums.items()}
    for name, value in sums.items():
        torch.testing.assert_close(losses[name], value / max(sum(counts), 1), rtol=1e-4, atol=1e-6)
        assert criterion.weight_dict[name] == 1
    criterion.total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


# ---- accumulation


@pytest.mark.parametrize("counts", [(3, 2, 0, 1), (9, 0, 8, 1), (0, 0, 0, 0)])
def test_parts_of_a_batch_add_up_to_the_batch(counts: tuple[int, ...]) -> None:
    criterion, targets, outputs = make_criterion(), make_targets(*counts), make_outputs(len(counts), two_stage=True)
    whole = criterion(outputs, targets)
    parts = [PackedTargets.pack(targets[:3]), PackedTargets.pack(targets[3:])]
    counted = criterion.count_targets(parts, QUERIES)
    added: dict[str, Tensor] = {}
    for part, images in zip(parts, (slice(0, 3), slice(3, 4)), strict=True):
        part_outputs = {
            name: value[images] if name.startswith("enc") else value[:, images] for name, value in outputs.items()
        }
        for name, loss in criterion(part_outputs, part, counted).items():
            added[name] = added.get(name, 0) + loss
    for name, loss in whole.items():
        torch.testing.assert_close(added[name], loss, rtol=1e-5, atol=1e-6)


def test_counts_of_boxes() -> None:
    """All targets, and those that can be matched; at least one of both."""
    packed = [PackedTargets.pack(make_targets(9, 0)), PackedTargets.pack(make_targets(2))]
    assert SetCriterion.count_targets(packed, QUERIES).tolist() == [11, 8]
    assert SetCriterion.count_targets([PackedTargets.pack(make_targets(0))], QUERIES).tolist() == [1, 1]


def test_labels_beyond_the_classes() -> None:
    targets = make_targets(2)
    targets[0]["labels"][1] = CLASSES
    with pytest.raises((IndexError, ValueError)):
        make_criterion()(make_outputs(1), targets)


def test_one_graph_without_breaks() -> None:
    torch.compiler.reset()
    criterion, targets, outputs = make_criterion(), PackedTargets.pack(make_targets(2, 3)), make_outputs(2)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)(outputs, targets)
    for name, loss in criterion(outputs, targets).items():
        torch.testing.assert_close(compiled[name], loss)
    torch.compiler.reset()
