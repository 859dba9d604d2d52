"""The numbers of the published code, recorded from mmdetection 3.3.0 with the same weights, images and objects.

Its model had a ResNet-18, 12 queries, two stages, a width of 32 and 5 classes; see `queryinst_cases.build_filled`.
"""

import pytest
import torch
from queryinst_cases import SIZES, build_filled, criterion_of, images, objects, pack, step
from torch import Tensor
from torchvision.ops import box_convert

from solq.models.queryinst.model import QueryInst
from solq.models.queryinst.official import official_names

# In each of two stages.
LOGITS = [[0.81805, 0.0985616, 0.618012], [-0.968557, -0.73501, 0.88365]]  # classes 0 to 2 of image 1, query 3
BOXES = [[16.906, -13.9791, 52.5705, 72.0209], [14.6571, 47.2822, 67.9926, 65.8201]]  # of image 0, query 2
MATCHES = [[9, 2, 11, 2, 4], [11, 2, 5, 0, 11]]
LOSSES = {
    "loss_ce": [5.73184, 11.0771],
    "loss_bbox": [4.21387, 2.71311],
    "loss_giou": [2.18714, 1.65144],
    "loss_mask": [4.98819, 4.13777],
}
GRADIENT_NORMS = {
    "rpn_head.init_proposal_bboxes.weight": 8.19139,
    "rpn_head.init_proposal_features.weight": 10.4371,
    "roi_head.bbox_head.0.instance_interactive_conv.dynamic_layer.weight": 28.457,
    "roi_head.mask_head.1.convs.0.bn.weight": 0.0416341,
    "roi_head.mask_head.0.conv_logits.weight": 0.149173,
    "neck.fpn_convs.0.conv.weight": 65.6734,
    "backbone.layer2.0.bn1.weight": 1.47287,
}
RUNNING_MEAN = [-0.086355, 0.176254, 0.0390421]  # of the last mask head's first batch norm, after the step
DETECTIONS = [  # of each image: scores and labels of the best four, the box of the best, pixels of the four masks
    ([0.854705, 0.833552, 0.829719, 0.74351], [4, 4, 2, 4], [14.6332, 44.4738, 36.449, 103.032], [1071, 0, 3724, 902]),
    ([0.855401, 0.794464, 0.77522, 0.762797], [4, 2, 4, 4], [12.4401, 52.0779, 26.7024, 93.6461], [351, 2340, 0, 270]),
]


@pytest.fixture(scope="module")
def model() -> QueryInst:
    return build_filled().train()


@pytest.fixture(scope="module")
def losses(model: QueryInst) -> dict[str, Tensor]:
    return step(model, model, pack(objects(), 128))


@torch.no_grad()
def test_outputs(model: QueryInst) -> None:
    outputs = model(*images())
    for stage in range(2):
        torch.testing.assert_close(
            outputs["pred_logits"][stage, 1, 3, :3], torch.tensor(LOGITS[stage]), atol=1e-4, rtol=1e-4
        )
        (height, width), box = SIZES[0], box_convert(outputs["pred_boxes"][stage, 0, 2], "cxcywh", "xyxy")
        torch.testing.assert_close(
            box * torch.tensor([width, height] * 2), torch.tensor(BOXES[stage]), atol=1e-2, rtol=1e-4
        )


@torch.no_grad()
def test_matches(model: QueryInst) -> None:
    outputs, targets = model(*images()), pack(objects())
    matcher = criterion_of(model).matcher
    queries = matcher.match(
        outputs["pred_logits"], outputs["pred_boxes"], targets.labels, targets.boxes, targets.offsets
    )
    assert queries.tolist() == MATCHES


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, model: QueryInst, losses: dict[str, Tensor]) -> None:
    weighted = torch.stack([losses[f"{name}_0"], losses[name]]) * model.loss_weights[name]
    tolerance = 1e-3 if name == "loss_mask" else 2e-4
    torch.testing.assert_close(weighted.detach(), torch.tensor(LOSSES[name]), atol=0, rtol=tolerance)


def test_gradients(model: QueryInst, losses: dict[str, Tensor]) -> None:
    norms = {}
    for name, parameter in model.named_parameters():
        [published] = official_names(name, model.config)
        if published in GRADIENT_NORMS:
            assert parameter.grad is not None
            norms[published] = parameter.grad.norm().item()
    assert norms == pytest.approx(GRADIENT_NORMS, rel=5e-3)


def test_running_statistics_of_a_mask_head(losses: dict[str, Tensor]) -> None:
    model = build_filled()
    step(model, model, pack(objects(), 128))
    mean = model.masks.heads[1].norms[0].running_mean
    torch.testing.assert_close(mean[:3], torch.tensor(RUNNING_MEAN), atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_detections() -> None:
    model = build_filled().eval()
    detections = model.postprocess(model(*images(), last_layer_only=True), torch.tensor(SIZES), top_k=12)
    for found, (scores, labels, box, areas) in zip(detections, DETECTIONS, strict=True):
        torch.testing.assert_close(found.scores[:4], torch.tensor(scores), atol=1e-4, rtol=0)
        assert found.labels[:4].tolist() == labels
        torch.testing.assert_close(found.boxes[0], torch.tensor(box), atol=1e-2, rtol=1e-4)
        torch.testing.assert_close(found.masks[:4].sum((1, 2)).float(), torch.tensor(areas).float(), atol=2, rtol=0)
