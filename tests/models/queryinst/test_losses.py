"""The losses of classes and boxes: the definition, and what small and empty boxes give."""

import torch
from queryinst_cases import objects, pack
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from solq.models.base import Matches
from solq.models.queryinst.losses import detection_losses, generalized_iou


def test_definition() -> None:
    """Stage by stage in pixels, with one-hot targets, as the published code computes them."""
    generator = torch.Generator().manual_seed(0)
    targets = pack(objects((3, 2)))
    logits, boxes = (torch.randn(2, 2, 7, 5, generator=generator), torch.rand(2, 2, 7, 4, generator=generator))
    queries = torch.tensor([[0, 3, 6, 2, 1], [5, 4, -1, 0, 6]])
    count = torch.tensor(5.0)
    matches = Matches(queries, targets.image_index(), torch.tensor(99.0), count)
    losses = detection_losses(logits, boxes, targets, matches)
    for stage in range(2):
        one_hot, l1, giou = torch.zeros(2, 7, 5), 0.0, 0.0
        for row, (query, image) in enumerate(zip(queries[stage].tolist(), matches.images.tolist(), strict=True)):
            if query < 0:
                continue
            one_hot[image, query, targets.labels[row]] = 1
            extent = targets.sizes[image].flip(0).repeat(2)
            a = box_convert(boxes[stage, image, query], "cxcywh", "xyxy") * extent
            b = box_convert(targets.boxes[row], "cxcywh", "xyxy") * extent
            l1 += ((a - b).abs() / extent).sum()
            giou += generalized_box_iou_loss(a, b)
        focal = sigmoid_focal_loss(logits[stage], one_hot, alpha=0.25, gamma=2, reduction="sum")
        torch.testing.assert_close(losses["loss_ce"][stage], focal / count)
        torch.testing.assert_close(losses["loss_bbox"][stage], l1 / count)
        torch.testing.assert_close(losses["loss_giou"][stage], giou / count)


def test_overlap_of_small_boxes_is_exact() -> None:
    """Half of a box of 2 pixels in an image of 4000 overlaps."""
    a, b = torch.tensor([[100.0, 100, 102, 102]]) / 4000, torch.tensor([[101.0, 100, 103, 102]]) / 4000
    torch.testing.assert_close(generalized_iou(a, b), torch.tensor([2 / 6]), atol=1e-4, rtol=0)


def test_empty_boxes_have_finite_overlaps_and_gradients() -> None:
    a = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.1, 0.1]], requires_grad=True)
    b = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.2, 0.2, 0.0, 0.0]])
    overlap = generalized_iou(box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy"))
    assert overlap[0] == 0
    overlap.sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
