"""One stage: boxes that move, a convolution of each query's own, and the initial values."""

import math

import pytest
import torch
import torch.nn.functional as F
from queryinst_cases import build, images
from torch import Tensor

from solq.models.queryinst.stages import DynamicConv, Stage, refine_boxes


def test_boxes_move_by_halves_of_their_sides_and_grow_exponentially() -> None:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    deltas = torch.tensor([[1.0, -0.5, math.log(2), 0.0]])
    # The center (20, 40) moves by 0.5 · 20 and −0.25 · 40; the width doubles.
    torch.testing.assert_close(refine_boxes(boxes, deltas), torch.tensor([[10.0, 10.0, 50.0, 50.0]]))


def test_growth_is_bounded_on_both_sides() -> None:
    boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    for delta, side in ((100.0, 1000.0), (-100.0, 16 * 16 / 1000)):
        x0, _, x1, _ = refine_boxes(boxes, torch.tensor([[0.0, 0.0, delta, 0.0]]))[0].tolist()
        assert x1 - x0 == pytest.approx(side, rel=1e-4)


def test_dynamic_convolution_reads_filters_row_by_row() -> None:
    torch.manual_seed(0)
    conv = DynamicConv(6, 4)
    queries, regions = torch.randn(3, 6), torch.randn(3, 6, 2, 5)
    got = conv(queries, regions)
    assert got.shape == (3, 10, 6)
    filters = conv.dynamic_layer(queries)
    for region in range(3):
        first, second = filters[region, :24].view(6, 4), filters[region, 24:].view(4, 6)
        pixels = regions[region].flatten(1).T  # row by row
        middle = F.layer_norm(pixels @ first, (4,)).relu()
        torch.testing.assert_close(got[region], F.layer_norm(middle @ second, (6,)).relu(), atol=1e-5, rtol=1e-5)


def stage_inputs() -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 5, 32, generator=generator)
    corner = torch.rand(2, 5, 2, generator=generator) * 64
    boxes = torch.cat([corner, corner + 8 + 56 * torch.rand(2, 5, 2, generator=generator)], dim=2)
    return queries, boxes, [torch.randn(2, 32, 128 // s, 128 // s, generator=generator) for s in (4, 8, 16, 32)]


def test_queries_see_their_own_image_only() -> None:
    torch.manual_seed(0)
    stage = Stage(32, 4, 64, 8, 3)
    queries, boxes, pyramid = stage_inputs()
    together = stage(queries, boxes, pyramid)
    alone = stage(queries[1:], boxes[1:], [level[1:] for level in pyramid])
    for got, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(got[1:], expected, atol=1e-4, rtol=1e-4)


def test_boxes_have_a_gradient_through_their_update_only() -> None:
    torch.manual_seed(0)
    stage = Stage(32, 4, 64, 8, 3)
    queries, boxes, pyramid = stage_inputs()
    boxes.requires_grad_()
    _, _, logits, refined = stage(queries, boxes, pyramid)
    assert torch.autograd.grad(logits.sum(), boxes, retain_graph=True, allow_unused=True) == (None,)
    [gradient] = torch.autograd.grad(refined.sum(), boxes)
    # Corners add up to twice the center, which moves by half the predicted share of the sides.
    assert gradient.shape == boxes.shape
    assert (gradient != 0).all()


def test_boxes_that_no_region_can_be_sampled_in() -> None:
    """Boxes of no area, far away and NaN give finite predictions of the other queries."""
    torch.manual_seed(0)
    stage = Stage(32, 4, 64, 8, 3)
    queries, boxes, pyramid = stage_inputs()
    boxes[0, 0] = torch.tensor([30.0, 30.0, 30.0, 30.0])
    boxes[0, 1] = 1e9
    boxes[0, 2] = math.nan
    boxes[0, 3] = torch.tensor([-500.0, -500.0, -400.0, -400.0])
    refined, attended, logits, new_boxes = stage(queries, boxes, pyramid)
    for output in (refined, attended, logits, new_boxes[0, [0, 1, 3, 4]], new_boxes[1]):
        assert output.isfinite().all()
    assert new_boxes[0, 2].isnan().any()


def test_initial_values_of_a_stage() -> None:
    torch.manual_seed(0)
    stage = Stage(64, 8, 128, 16, 7)
    torch.testing.assert_close(stage.class_embed.bias.detach().sigmoid(), torch.full((7,), 0.01))
    assert stage.bbox_embed.bias.count_nonzero() == 0
    assert stage.attention.in_proj_bias.count_nonzero() == 0
    for name, parameter in stage.named_parameters():
        if parameter.dim() == 2:  # Xavier; the projections of the attention as one matrix
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.95 * bound < parameter.abs().max() <= bound, name
    bias = stage.dynamic_conv.dynamic_layer.bias  # PyTorch's
    assert 0.95 / 64**0.5 < bias.abs().max() <= 1 / 64**0.5


def test_first_boxes_are_whole_images() -> None:
    from solq.models.queryinst.model import QueryInst

    config = build().config
    torch.manual_seed(0)
    model = QueryInst(config)
    for stage in model.stages:
        torch.nn.init.zeros_(stage.bbox_embed.weight)
    boxes = model(*images())["mask_boxes"]
    expected = torch.tensor([[0.0, 0.0, 128.0, 96.0], [0.0, 0.0, 96.0, 80.0]])  # without their padding
    torch.testing.assert_close(boxes, expected[None, :, None].expand_as(boxes))
