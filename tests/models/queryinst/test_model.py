"""The whole model: its outputs, gradients, bad input, precision, and its one graph."""

import math

import pytest
import torch
from queryinst_cases import HEIGHT, SIZES, WIDTH, build, criterion_of, images, objects, pack, step
from torch._dynamo.testing import CompileCounterWithBackend
from torchvision.ops import box_convert

from solq.models import build as build_any
from solq.models.queryinst.config import QueryInstConfig
from solq.models.queryinst.model import QueryInst

# ---- outputs


@torch.no_grad()
def test_outputs_of_all_stages_and_of_the_last_alone() -> None:
    model = build(num_stages=3).eval()
    outputs = model(*images())
    assert outputs["pred_logits"].shape == (3, 2, 12, 5)
    assert outputs["pred_boxes"].shape == (3, 2, 12, 4)
    assert outputs["mask_queries"].shape == (3, 2, 12, 32)
    assert [tuple(level.shape) for level in outputs["pyramid"]] == [
        (2, 32, HEIGHT // s, WIDTH // s) for s in (4, 8, 16, 32)
    ]
    for image, (height, width) in enumerate(SIZES):  # in 0..1 of the image, without its padding
        pixels = box_convert(outputs["pred_boxes"][:, image], "cxcywh", "xyxy") * torch.tensor([width, height] * 2)
        torch.testing.assert_close(pixels, outputs["mask_boxes"][:, image], atol=1e-3, rtol=1e-4)
    last = model(*images(), last_layer_only=True)
    for name in ("pred_logits", "pred_boxes", "mask_queries", "mask_boxes"):
        torch.testing.assert_close(last[name], outputs[name][-1:], atol=0, rtol=0)


def test_built_from_its_config() -> None:
    assert isinstance(build_any(build().config), QueryInst)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_stages": 0}, "model.num_stages is 0, must be at least 1"),
        ({"num_queries": 0}, "model.num_queries is 0, must be at least 1"),
        ({"width": 100}, r"model.width is 100, must be a multiple of num_heads \(8\)"),
    ],
)
def test_settings_that_no_model_can_have(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QueryInstConfig(**changes).check()


def test_learning_rate_groups_hold_every_trained_parameter_once() -> None:
    model = build(backbone="resnet18", backbone_norm="running")
    groups = model.learning_rate_groups()
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert sorted(map(id, groups["backbone"] + groups["others"])) == sorted(trained)
    assert {id(p) for p in groups["backbone"]} == {id(p) for p in model.backbone.parameters()} & trained


# ---- gradients


@pytest.mark.parametrize("loss", ["loss_ce", "loss_bbox", "loss_giou", "loss_mask"])
def test_what_a_loss_of_the_last_stage_reaches(loss: str) -> None:
    """Queries carry a gradient from stage to stage, boxes do not."""
    model = build(num_stages=3)
    criterion_of(model)(model(*images()), pack(objects()))[loss].backward()

    def reached(module: torch.nn.Module) -> bool:
        return any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())

    for stage in (0, 1):
        assert reached(model.stages[stage].attention)
        assert not reached(model.stages[stage].bbox_embed)
        assert not reached(model.stages[stage].class_embed)
    assert reached(model.proposal_features)
    assert not reached(model.proposal_boxes)
    assert [reached(head) for head in model.masks.heads] == [False, False, loss == "loss_mask"]
    assert reached(model.stages[2].linear2) == (loss != "loss_mask")  # masks branch off before


def test_first_boxes_learn_from_the_box_losses_of_the_first_stage() -> None:
    model = build(num_stages=2)
    losses = criterion_of(model)(model(*images()), pack(objects()))
    for name, loss in losses.items():
        [gradient] = torch.autograd.grad(loss, model.proposal_boxes.weight, retain_graph=True, allow_unused=True)
        learns = gradient is not None and bool(gradient.abs().sum() > 0)
        assert learns == (name in ("loss_bbox_0", "loss_giou_0"))


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (1, 0), (5, 30)])
def test_every_parameter_takes_part_in_every_step(counts: tuple[int, int]) -> None:
    """Also without an object, with one region only, and with more objects than queries."""
    model = build()
    losses = step(model, model, pack(objects(counts)))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(loss.isfinite() for loss in losses.values())
    if counts == (0, 0):
        assert losses["loss_bbox"] == losses["loss_giou"] == losses["loss_mask"] == 0
        assert losses["loss_ce"] < 100  # divided by 1, not by a number close to 0


def test_more_objects_than_queries_cost_no_more_than_the_matched_ones() -> None:
    """1000 objects in one of two images: batch norm reads the matched 12 + 2 regions alone."""
    model = build()
    seen: list[tuple[int, int]] = []
    model.masks.heads[1].norms[0].register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), args[1].sum())))
    losses = step(model, model, pack(objects((1000, 2)), 16))
    assert seen == [(24, 14)]  # rows: at most all queries of the batch
    assert losses["loss_mask"].isfinite()


def test_losses_of_unmatched_objects_are_those_without_them() -> None:
    """The 12 of 30 objects that queries are matched with give the same mask losses as if only they were there."""
    model, found = build(), objects((30, 2))
    outputs = model(*images())
    targets = pack(found)
    criterion = criterion_of(model)
    queries = criterion.matcher.match(
        outputs["pred_logits"][-1:], outputs["pred_boxes"][-1:], targets.labels, targets.boxes, targets.offsets
    )[0, :30]
    matched = queries >= 0
    assert matched.sum() == 12
    fewer = [{name: value[matched] for name, value in found[0].items()}, found[1]]
    few, many = criterion(outputs, pack(fewer)), criterion(outputs, targets)
    for name in ("loss_bbox", "loss_giou", "loss_mask", "loss_ce"):
        torch.testing.assert_close(few[name], many[name], atol=1e-4, rtol=1e-4)


# ---- bad input


@torch.no_grad()
def test_detections_of_queries_that_are_not_finite_and_of_empty_boxes() -> None:
    model = build().eval()
    model.proposal_boxes.weight[0] = torch.tensor([0.5, 0.5, 0.0, 0.0])
    model.proposal_boxes.weight[1] = torch.tensor([40.0, 40.0, 1.0, 1.0])
    model.proposal_boxes.weight[2] = math.nan
    detections = model.postprocess(model(*images(), last_layer_only=True), torch.tensor(SIZES), top_k=60)
    for found, (height, width) in zip(detections, SIZES, strict=True):
        assert found.masks.shape == (60, height, width)
        for query in (0, 1, 2):
            assert not found.masks[found.queries == query].any()
        assert found.scores.isfinite().all()


# ---- precision, memory, graphs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    """Boxes, logits and losses are float32, the mask heads run in half precision after the forward pass too."""
    model, targets = build(), pack(objects())
    expected = step(model, model, targets)
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        outputs = model(*images())
    assert outputs["pyramid"][0].dtype == dtype
    assert outputs["pred_boxes"].dtype == outputs["pred_logits"].dtype == outputs["mask_boxes"].dtype == torch.float32
    seen: list[torch.dtype] = []
    model.masks.heads[0].register_forward_hook(lambda _, __, features: seen.append(features.dtype))
    criterion = criterion_of(model)
    losses = criterion(outputs, targets)
    criterion.total(losses).backward()
    assert seen == [dtype]
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], atol=0.02, rtol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_changes_no_number() -> None:
    targets = pack(objects())
    plain, checkpointed = build(), build(gradient_checkpointing=True)
    expected, losses = step(plain, plain, targets), step(checkpointed, checkpointed, targets)
    torch.testing.assert_close(losses, expected, atol=0, rtol=0)
    torch.testing.assert_close(dict(checkpointed.named_buffers()), dict(plain.named_buffers()), atol=0, rtol=0)
    for parameter, other in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_one_graph_without_breaks(gradient_checkpointing: bool) -> None:
    torch.compiler.reset()
    model, targets = build(gradient_checkpointing=gradient_checkpointing), pack(objects())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    expected = step(model, model, targets)
    gradients = [p.grad.clone() for p in model.parameters()]
    losses = step(compiled, model, targets)
    assert counter.frame_count == 1
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-3, rtol=1e-3)
    torch.compiler.reset()
