"""The mask heads: batch norm over matched regions, one class's mask of each region, the dice loss, decoding."""

import pytest
import torch
from pycocotools import mask as coco_mask
from queryinst_cases import build, images
from torch import nn

from solq.models.queryinst.masks import MaskHead, RegionBatchNorm2d, dice_loss


def norms() -> tuple[RegionBatchNorm2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    norm = RegionBatchNorm2d(4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(norm.state_dict())
    return norm, plain


@pytest.mark.parametrize("matched", [[True, False, True, True, False], [True] * 5])
def test_batch_norm_of_matched_regions_is_that_of_them_alone(matched: list[bool]) -> None:
    norm, plain = norms()
    chosen, x = torch.tensor(matched), 3 * torch.randn(5, 4, 3, 3) + 1
    x.requires_grad_()
    got, expected = norm(x, chosen)[chosen], plain(x[chosen])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norm.state_dict(), plain.state_dict(), atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(expected)
    gradient, expected_gradient = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, expected))
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


def test_batch_norm_of_all_regions_is_the_plain_one() -> None:
    norm, plain = norms()
    x = torch.randn(5, 4, 3, 3)
    torch.testing.assert_close(norm(x), plain(x), atol=0, rtol=0)
    torch.testing.assert_close(norm.state_dict(), plain.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(norm.eval()(x), plain.eval()(x), atol=0, rtol=0)


def test_statistics_stay_without_a_matched_region() -> None:
    norm, _ = norms()
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    assert norm(torch.randn(3, 4, 2, 2), torch.zeros(3, dtype=torch.bool)).isfinite().all()
    assert norm(torch.randn(0, 4, 2, 2)).shape == (0, 4, 2, 2)
    for name in ("running_mean", "running_var"):
        assert torch.equal(norm.state_dict()[name], before[name])


def test_one_class_of_each_region() -> None:
    torch.manual_seed(0)
    head = MaskHead(8, 4, 1, 5)
    features, labels = torch.randn(3, 8, 28, 28), torch.tensor([4, 0, 4])
    expected = head.class_masks(features)[torch.arange(3), labels]
    torch.testing.assert_close(head.select(features, labels), expected, atol=1e-5, rtol=1e-5)


def test_initial_values_of_a_mask_head() -> None:
    torch.manual_seed(0)
    head = MaskHead(64, 16, 4, 10)
    for conv in head.convs:
        assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    for layer, fan_in in ((head.dynamic_conv.dynamic_layer, 64), (head.upsample, 64 * 4), (head.class_masks, 64)):
        assert 0.9 * fan_in**-0.5 < layer.weight.abs().max() <= fan_in**-0.5  # PyTorch's initial values
        assert 0 < layer.bias.abs().max() <= fan_in**-0.5


def test_dice_loss() -> None:
    logits = torch.tensor([[[100.0, 100.0], [-100.0, -100.0]], [[0.0, 0.0], [0.0, 0.0]]])
    targets = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]])
    # All right; probabilities of 1/2: 1 − 2 · 0.5 / (4 · 0.25 + 1).
    torch.testing.assert_close(dice_loss(logits, targets), torch.tensor([0.0, 0.5]), atol=1e-4, rtol=0)


def test_run_lengths_are_those_of_the_masks() -> None:
    model = build().eval()
    with torch.no_grad():
        outputs = model(*images(), last_layer_only=True)
    sizes = torch.tensor([[96, 128], [41, 77]])
    as_masks = model.postprocess(outputs, sizes, top_k=20)
    as_runs = model.postprocess(outputs, sizes, top_k=20, run_lengths=True)
    assert sum(int(found.masks.sum()) for found in as_masks) > 0
    for found, encoded, size in zip(as_masks, as_runs, sizes.tolist(), strict=True):
        assert found.masks.shape == (20, *size)
        decoded = torch.from_numpy(coco_mask.decode(encoded.run_lengths)).permute(2, 0, 1)
        assert torch.equal(decoded.bool(), found.masks)


def test_mask_depends_on_the_class() -> None:
    """A query that is found with two classes has a mask for each, and each is computed as if it were alone."""
    model = build().eval()
    with torch.no_grad():
        outputs = model(*images())
        queries, labels = torch.tensor([3, 3, 1]), torch.tensor([0, 2, 2])
        boxes = torch.tensor([[10.0, 10.0, 90.0, 80.0]]).expand(3, 4)
        masks = model.masks.masks(outputs, 1, queries, labels, boxes, (96, 128))
        assert not torch.equal(masks[0], masks[1])
        for k in range(3):
            alone = model.masks.masks(outputs, 1, queries[k : k + 1], labels[k : k + 1], boxes[:1], (96, 128))
            assert (alone[0] != masks[k]).sum() <= 2  # a pixel may change sides for a rounding error


def test_boxes_outside_the_image_and_not_finite_have_empty_masks() -> None:
    model = build().eval()
    with torch.no_grad():
        outputs = model(*images())
    boxes = torch.tensor(
        [[500.0, 0.0, 600.0, 50.0], [20.0, 20.0, 20.0, 40.0], [torch.nan] * 4, [-90.0, -90.0, -10.0, -10.0]]
    )
    queries, labels = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    assert not model.masks.masks(outputs, 0, queries, labels, boxes, (96, 128)).any()
    positions, counts = model.masks.runs(outputs, 0, queries, labels, boxes, (96, 128))
    assert len(positions) == 0
    assert counts.tolist() == [0, 0, 0, 0]


def test_exported_masks_are_those_of_the_selection() -> None:
    from solq.models.base import select_top_k

    model = build().eval()
    with torch.no_grad():
        outputs = model(*images(), last_layer_only=True)
        selection = select_top_k(outputs, 6)
        exported = model.masks.export(outputs, selection)
    assert exported.keys() == model.masks.describe_export(6).keys()
    probabilities = exported["mask_probabilities"]
    assert probabilities.shape == (2, 6, 28, 28)
    boxes = selection.boxes * torch.tensor([128.0, 96.0, 128.0, 96.0])
    from solq.kernels.reference import paste_masks

    for image in range(2):
        pasted = paste_masks(probabilities[image], boxes[image], (96, 128))
        queries, labels = selection.queries[image], selection.labels[image]
        expected = model.masks.masks(outputs, image, queries, labels, boxes[image], (96, 128))
        assert (pasted != expected).sum() <= 4
