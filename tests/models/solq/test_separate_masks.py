"""The separate mask branch in small pieces, against computations written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from solq.models.solq.separate_masks import SeparateMasks
from solq.models.solq.transformer import TransformerOutput

WIDTH, HEADS = 64, 4
SHAPES = [(8, 12), (4, 6), (2, 3), (1, 2)]  # C3, C4, C5, C6 of an image of 64×96 pixels


@pytest.fixture
def head() -> SeparateMasks:
    torch.manual_seed(0)
    return SeparateMasks(WIDTH, HEADS, [24, 40])


def inputs(padded_columns: int = 0) -> tuple[TransformerOutput, list[Tensor], Tensor]:
    """Two images, five queries; the second image is padded on the right by `padded_columns` elements of C5."""
    generator = torch.Generator().manual_seed(1)
    padding = []
    for level, (h, w) in enumerate(SHAPES):
        mask = torch.zeros(2, h, w, dtype=torch.bool)
        if level == 2:
            mask[1, :, w - padded_columns :] = padded_columns > 0
        padding.append(mask.flatten(1))
    hidden = torch.randn(2, 5, WIDTH, generator=generator)
    memory = torch.randn(2, sum(h * w for h, w in SHAPES), WIDTH, generator=generator)
    features = [torch.randn(2, 24, 8, 12, generator=generator), torch.randn(2, 40, 4, 6, generator=generator)]
    decoded = TransformerOutput([hidden], [], memory, torch.cat(padding, dim=1), SHAPES)
    return decoded, features, torch.zeros(2, 64, 96, dtype=torch.bool)


@torch.no_grad()
def test_masks_of_queries_one_by_one(head: SeparateMasks) -> None:
    """DETR's way for one query at a time: memory and attention maps joined, then one stack of convolutions."""
    given = decoded, features, _ = inputs(padded_columns=1)
    pairs = [(0, 3), (1, 0), (1, 4), (0, 3)]
    image_index, query_index = torch.tensor(pairs).T
    logits = head.mask_logits(head(*given)["mask_features"], image_index, query_index)
    assert logits.shape == (4, 8, 12)
    start = 8 * 12 + 4 * 6
    for (image, query), mask in zip(pairs, logits, strict=True):
        memory = decoded.memory[image, start : start + 6]
        padding = decoded.padding_mask[image, start : start + 6]
        q = head.query_proj(decoded.hidden_states[-1][image, query])
        keys = head.key_proj(memory)
        maps = []
        for m in range(HEADS):
            channels = slice(m * WIDTH // HEADS, (m + 1) * WIDTH // HEADS)
            scores = [float(q[channels] @ key[channels]) / math.sqrt(WIDTH // HEADS) for key in keys]
            weights = [0.0 if p else math.exp(s) for s, p in zip(scores, padding, strict=True)]
            maps.append(torch.tensor(weights).view(2, 3) / sum(weights))
        joined = torch.cat([memory.T.reshape(WIDTH, 2, 3), torch.stack(maps)])[None]
        weight = torch.cat([head.memory_conv.weight, head.attention_conv.weight], dim=1)
        x = head.norm(F.conv2d(joined, weight, head.memory_conv.bias, padding=1)).relu()
        for feature, lateral, refine in zip(reversed(features), head.lateral, head.refine, strict=True):
            x = refine(x.repeat_interleave(2, 2).repeat_interleave(2, 3) + lateral(feature[image, None]))
        torch.testing.assert_close(mask, head.output(x)[0, 0], atol=1e-4, rtol=1e-4)


def test_padding_is_not_attended_to(head: SeparateMasks) -> None:
    attention = head(*inputs(padded_columns=2))["mask_features"]["attention"]
    assert attention.shape == (2, 5, HEADS, 2, 3)
    torch.testing.assert_close(attention.sum((3, 4)), torch.ones(2, 5, HEADS))
    assert (attention[1, :, :, :, 1:] == 0).all()
    assert (attention[0] > 0).all()


def test_compiles_without_graph_break(head: SeparateMasks) -> None:
    given, pair = inputs(), torch.tensor([1])
    compiled = torch.compile(head, backend="eager", fullgraph=True)
    expected = head.mask_logits(head(*given)["mask_features"], pair, pair)
    torch.testing.assert_close(head.mask_logits(compiled(*given)["mask_features"], pair, pair), expected)


def ramp(weights: tuple[float, float, float], h: int = 8, w: int = 12) -> Tensor:
    """A map (h, w) of stride 8 whose value is ax + by + c at pixel (x, y): interpolation of it is exact."""
    y, x = torch.meshgrid(8 * torch.arange(h) + 4.0, 8 * torch.arange(w) + 4.0, indexing="ij")
    return weights[0] * x + weights[1] * y + weights[2]


def test_loss_sample_by_sample(head: SeparateMasks) -> None:
    """Focal and dice loss over the frame of twice the box's sides, cut where the image ends."""
    N, height, width = 8, 60, 80
    logits = torch.stack([ramp((0.02, -0.03, 0.1)), ramp((-0.05, 0.01, 0.5))])
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 2, (2, N, N), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[0.5, 0.5, 0.25, 0.2], [0.9, 0.4, 0.2, 0.3]])  # the second frame leaves the image
    sizes = torch.tensor([[height, width]] * 2)
    losses = head.loss(logits, masks, boxes, sizes)
    for k, (a, b, c) in enumerate([(0.02, -0.03, 0.1), (-0.05, 0.01, 0.5)]):
        cx, cy, w, h = (boxes[k] * torch.tensor([width, height, width, height])).tolist()
        focal = overlap = total = count = 0.0
        for row in range(N):
            for column in range(N):
                x, y = cx + (column + 0.5 - N / 2) * 2 * w / N, cy + (row + 0.5 - N / 2) * 2 * h / N
                if not (0 < x < width and 0 < y < height):
                    continue
                r, s = 2 * row - N // 2, 2 * column - N // 2  # the box is the middle half of the frame
                inner = 0 <= r < N and 0 <= s < N
                t = float(masks[k, r : r + 2, s : s + 2].float().mean()) if inner else 0.0
                p = 1 / (1 + math.exp(-(a * x + b * y + c)))
                agreement = p * t + (1 - p) * (1 - t)
                entropy = -t * math.log(p) - (1 - t) * math.log(1 - p)
                focal += (0.25 * t + 0.75 * (1 - t)) * (1 - agreement) ** 2 * entropy
                overlap, total, count = overlap + p * t, total + p + t, count + 1
        assert float(losses["loss_mask"][k]) == pytest.approx(focal / count, rel=1e-4)
        assert float(losses["loss_dice"][k]) == pytest.approx(1 - (2 * overlap + 1) / (total + 1), rel=1e-4)
    assert count < N * N


def test_loss_gradient(head: SeparateMasks) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    masks = torch.randint(0, 2, (2, 8, 8), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.1, 0.8, 0.5, 0.3]], dtype=torch.float64)
    sizes = torch.tensor([[32, 40], [30, 33]])
    assert torch.autograd.gradcheck(lambda x: tuple(head.loss(x, masks, boxes, sizes).values()), (logits,))


def test_loss_of_no_targets_and_degenerate_boxes(head: SeparateMasks) -> None:
    none = head.mask_logits(head(*inputs())["mask_features"], *torch.zeros(2, 0, dtype=torch.int64))
    assert none.shape == (0, 8, 12)
    masks, sizes = torch.ones(3, 16, 16, dtype=torch.uint8), torch.tensor([[64, 96]] * 3)
    losses = head.loss(none, masks[:0], torch.zeros(0, 4), sizes[:0])
    assert [loss.shape for loss in losses.values()] == [(0,), (0,)]
    sum(loss.sum() for loss in losses.values()).backward()
    assert all((p.grad == 0).all() for p in head.parameters())  # parallel training waits for every gradient
    boxes = torch.tensor([[0.5, 0.5, 0.0, 0.0], [3.0, 3.0, 0.1, 0.1], [0.5, 0.5, 50.0, 50.0]])
    logits = torch.randn(3, 8, 12, requires_grad=True)
    losses = head.loss(logits, masks, boxes, sizes)
    (gradient,) = torch.autograd.grad(sum(loss.sum() for loss in losses.values()), logits)
    assert all(loss.isfinite().all() for loss in losses.values())
    assert gradient.isfinite().all()


def test_masks_are_where_the_logit_is_positive_in_the_box(head: SeparateMasks) -> None:
    logits = torch.stack([ramp((1.0, 0.0, -40.2)), ramp((0.0, -1.0, 20.2))])  # x > 40.2; y < 20.2
    boxes = torch.tensor([[10.0, 5.0, 70.0, 50.0], [0.0, 0.0, 90.0, 60.0]])
    masks = head.paste(logits, boxes, torch.tensor([60, 90]), (60, 90))
    y, x = torch.meshgrid(torch.arange(60) + 0.5, torch.arange(90) + 0.5, indexing="ij")
    assert masks.dtype == torch.bool
    assert torch.equal(masks[0], (x > 40.2) & (x < 70) & (y > 5) & (y < 50))
    assert torch.equal(masks[1], y < 20.2)


def test_masks_at_the_size_of_another_image(head: SeparateMasks) -> None:
    """The image of 60×90 pixels in the batch was 120×270 on disk: x > 40.2 becomes x > 120.6."""
    boxes = torch.tensor([[0.0, 0.0, 270.0, 120.0]])
    masks = head.paste(ramp((1.0, 0.0, -40.2))[None], boxes, torch.tensor([60, 90]), (120, 270))
    expected = (torch.arange(270) + 0.5 > 120.6).expand(120, 270)
    assert torch.equal(masks[0], expected)


def test_masks_of_boxes_that_show_nothing(head: SeparateMasks) -> None:
    boxes = torch.tensor([[50.0, 5.0, 10.0, 50.0], [float("nan")] * 4, [200.0, 0.0, 300.0, 60.0]])
    masks = head.paste(torch.full((3, 8, 12), 5.0), boxes, torch.tensor([60, 90]), (60, 90))
    assert not masks.any()
    assert head.paste(torch.zeros(0, 8, 12), torch.zeros(0, 4), torch.tensor([60, 90]), (60, 90)).shape == (0, 60, 90)


def test_learns_two_masks(head: SeparateMasks) -> None:
    """Two queries of one image learn a disc and its box without the disc, of the same box."""
    given = inputs()
    offset = (torch.arange(32) - 15.5) / 16
    disc = torch.hypot(offset[:, None], offset[None]) < 0.8
    masks = torch.stack([disc, ~disc]).to(torch.uint8)
    boxes, sizes = torch.tensor([[0.5, 0.5, 0.6, 0.8]] * 2), torch.tensor([[64, 96]] * 2)
    image_index, query_index = torch.tensor([[0, 0], [1, 2]])
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(150):
        logits = head.mask_logits(head(*given)["mask_features"], image_index, query_index)
        loss = torch.stack(list(head.loss(logits, masks, boxes, sizes).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x0, y0, x1, y1 = 19.2, 6.4, 76.8, 57.6
    corners = torch.tensor([[x0, y0, x1, y1]] * 2)
    drawn = head.paste(logits.detach(), corners, torch.tensor([64, 96]), (64, 96))
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    in_box = (x > x0) & (x < x1) & (y > y0) & (y < y1)
    round_ = torch.hypot((x - 48) / (x1 - x0), (y - 32) / (y1 - y0)) < 0.4
    expected = torch.stack([in_box & round_, in_box & ~round_])
    iou = (drawn & expected).sum((1, 2)) / (drawn | expected).sum((1, 2))
    assert (iou > 0.8).all(), iou


def test_a_width_that_cannot_be_grouped() -> None:
    with pytest.raises(ValueError, match="width is 96, must be a multiple of 64 for 2 features"):
        SeparateMasks(96, 8, [24, 40])
