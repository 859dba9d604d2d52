"""torchvision's MultiScaleRoIAlign, and a Mask R-CNN with it, give the same when patched."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import MultiScaleRoIAlign, poolers

from solq.drop_in import torchvision as drop_in
from solq.kernels import use_backend

IMAGE_SIZES = [(128, 160), (120, 150)]


@pytest.fixture(autouse=True)
def _unpatch() -> Iterator[None]:
    yield
    drop_in.unpatch()


def inputs(strides: tuple[int, ...] = (4, 8, 16, 32)) -> tuple[dict[str, Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    features = {
        str(level): torch.randn(2, 3, 128 // stride, 160 // stride, generator=generator).requires_grad_()
        for level, stride in enumerate(strides)
    }
    corners = torch.rand(9, 2, generator=generator) * 60
    sides = torch.rand(9, 2, generator=generator) * 60 + torch.tensor([1.0, 120, 300]).repeat(3)[:, None]
    boxes = torch.cat([corners, corners + sides], dim=1)
    return features, [boxes[:4], boxes[4:]]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("canonical_scale", [224, 96])
def test_the_module_gives_the_same(backend: str, canonical_scale: int) -> None:
    features, boxes = inputs()
    pooler = MultiScaleRoIAlign(list("0123"), 2, sampling_ratio=2, canonical_scale=canonical_scale)
    expected = pooler(features, boxes, IMAGE_SIZES)
    with drop_in.patched() as names, use_backend(backend):
        actual = pooler(features, boxes, IMAGE_SIZES)
    assert names == ["torchvision.ops.poolers._multiscale_roi_align"]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, list(features.values()), weights)
    ours = torch.autograd.grad(actual, list(features.values()), weights)
    for grad, of_torchvision in zip(ours, theirs, strict=True):
        torch.testing.assert_close(grad, of_torchvision, rtol=1e-4, atol=1e-5)


def test_no_boxes() -> None:
    features, boxes = inputs()
    with drop_in.patched(), use_backend("reference"):
        output = MultiScaleRoIAlign(list("0123"), 3, 2)(features, [box[:0] for box in boxes], IMAGE_SIZES)
    assert output.shape == (0, 3, 3, 3)


@pytest.mark.parametrize(
    ("strides", "sampling_ratio"), [((4, 8, 16, 32), 0), ((8,), 2), ((4, 16), 2)], ids=["adaptive", "one", "quarters"]
)
def test_what_the_kernel_does_not_know_stays_with_torchvision(strides: tuple[int, ...], sampling_ratio: int) -> None:
    features, boxes = inputs(strides)
    pooler = MultiScaleRoIAlign(list(features), 2, sampling_ratio)
    expected = pooler(features, boxes, IMAGE_SIZES)
    with drop_in.patched(), use_backend("reference"):
        assert torch.equal(pooler(features, boxes, IMAGE_SIZES), expected)


def test_autocast_keeps_the_dtype_of_the_features() -> None:
    features, boxes = inputs()
    pooler = MultiScaleRoIAlign(list("0123"), 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = pooler(features, boxes, IMAGE_SIZES)
        with drop_in.patched(), use_backend("reference"):
            actual = pooler(features, boxes, IMAGE_SIZES)
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_losses_of_mask_rcnn() -> None:
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=96, max_size=128, rpn_post_nms_top_n_train=50
    ).train()
    images = [torch.rand(3, 96, 128), torch.rand(3, 96, 96)]
    masks = torch.zeros(1, 96, 128, dtype=torch.uint8)
    masks[:, 20:70, 10:80] = 1
    target = {"boxes": torch.tensor([[10.0, 20, 80, 70]]), "labels": torch.tensor([1])}
    targets = [target | {"masks": masks}, target | {"masks": masks[..., :96]}]

    def losses() -> dict[str, Tensor]:
        torch.manual_seed(1)  # proposals are drawn
        return model(images, targets)

    with torch.no_grad():
        expected = losses()
        with drop_in.patched(), use_backend("reference"):
            actual = losses()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_unpatching_restores_the_very_function() -> None:
    original = poolers._multiscale_roi_align
    drop_in.patch()
    assert poolers._multiscale_roi_align is not original
    drop_in.unpatch()
    assert poolers._multiscale_roi_align is original
