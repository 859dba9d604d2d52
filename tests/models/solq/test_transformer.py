"""The deformable transformer in small pieces, against computations written out here."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solq.kernels.ms_deform_attn.module import MSDeformAttn
from solq.models.solq.transformer import (
    MLP,
    DecoderLayer,
    DeformableTransformer,
    EncoderLayer,
    TransformerOutput,
    inverse_sigmoid,
)

WIDTH, HEADS, LEVELS, POINTS, QUERIES, CLASSES = 16, 2, 2, 3, 5, 4
SHAPES = [(4, 6), (2, 3)]


def build(two_stage: bool = False, dropout: float = 0.0, checkpointing: bool = False) -> DeformableTransformer:
    torch.manual_seed(0)
    return DeformableTransformer(
        WIDTH, HEADS, 2, 3, 32, dropout, LEVELS, POINTS, QUERIES, two_stage, gradient_checkpointing=checkpointing
    )


def randomize(module: nn.Module) -> None:
    """Away from the initial values, many of which are zero."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)


def heads(count: int = 4) -> tuple[nn.ModuleList, nn.ModuleList]:
    torch.manual_seed(1)
    class_embed = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(count))
    bbox_embed = nn.ModuleList(MLP(WIDTH, WIDTH, 4, 3) for _ in range(count))
    return class_embed, bbox_embed


def inputs(
    shapes: list[tuple[int, int]], valid: list[tuple[int, int]], seed: int = 2
) -> tuple[list[Tensor], list[Tensor]]:
    """Features and masks of two images, the second of which covers `valid` (rows, columns) of each level."""
    generator = torch.Generator().manual_seed(seed)
    features = [torch.randn(2, WIDTH, h, w, generator=generator) for h, w in shapes]
    masks = []
    for (h, w), (rows, columns) in zip(shapes, valid, strict=True):
        mask = torch.zeros(2, h, w, dtype=torch.bool)
        mask[1, rows:] = True
        mask[1, :, columns:] = True
        masks.append(mask)
    return features, masks


def run(transformer: DeformableTransformer, features: list[Tensor], masks: list[Tensor]) -> TransformerOutput:
    class_embed, bbox_embed = heads()
    query_embed = None
    if not transformer.two_stage:
        query_embed = torch.randn(QUERIES, 2 * WIDTH, generator=torch.Generator().manual_seed(3))
        class_embed, bbox_embed = class_embed[:3], bbox_embed[:3]
    return transformer(features, masks, query_embed, class_embed, bbox_embed)


def arguments_of(layers: nn.ModuleList) -> list[tuple]:
    """A list that gets the positional arguments of each layer's call."""
    seen: list[tuple] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args))
    return seen


def test_inverse_sigmoid() -> None:
    x = torch.tensor([0.25, 0.5, 0.9])
    torch.testing.assert_close(inverse_sigmoid(x), torch.tensor([math.log(p / (1 - p)) for p in (0.25, 0.5, 0.9)]))
    ends = inverse_sigmoid(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    low = math.log(1e-5 / 1.0)
    torch.testing.assert_close(ends, torch.tensor([low, -low, low, -low]))


def test_mlp() -> None:
    mlp, x = MLP(3, 7, 2, 3), torch.randn(5, 3)
    expected = x
    for index in range(3):
        expected = expected @ mlp.layers[index].weight.T + mlp.layers[index].bias
        if index < 2:
            expected = expected.clamp(min=0)
    torch.testing.assert_close(mlp(x), expected)


@torch.no_grad()
def test_encoder_layer_step_by_step() -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(WIDTH, 32, 0.1, LEVELS, HEADS, POINTS).eval()
    randomize(layer)
    S = sum(h * w for h, w in SHAPES)
    src, pos, references = torch.randn(2, S, WIDTH), torch.randn(2, S, WIDTH), torch.rand(2, S, LEVELS, 2)
    padding = torch.zeros(2, S, dtype=torch.bool)
    padding[1, -2:] = True
    got = layer(src, pos, references, SHAPES, [0, 24], padding)
    attended = layer.self_attn(src + pos, references, src, SHAPES, [0, 24], padding)
    x = F.layer_norm(src + attended, (WIDTH,), layer.norm1.weight, layer.norm1.bias)
    hidden = (x @ layer.linear1.weight.T + layer.linear1.bias).relu()
    x = x + hidden @ layer.linear2.weight.T + layer.linear2.bias
    torch.testing.assert_close(got, F.layer_norm(x, (WIDTH,), layer.norm2.weight, layer.norm2.bias))


@torch.no_grad()
def test_decoder_layer_step_by_step() -> None:
    """Self-attention with the position in queries and keys only, then attention to the memory, then the network."""
    torch.manual_seed(0)
    layer = DecoderLayer(WIDTH, 32, 0.1, LEVELS, HEADS, POINTS).eval()
    randomize(layer)
    S = sum(h * w for h, w in SHAPES)
    tgt, query_pos, memory = torch.randn(2, QUERIES, WIDTH), torch.randn(2, QUERIES, WIDTH), torch.randn(2, S, WIDTH)
    references, padding = torch.rand(2, QUERIES, LEVELS, 4), torch.zeros(2, S, dtype=torch.bool)
    got = layer(tgt, query_pos, references, memory, SHAPES, [0, 24], padding)

    weight_q, weight_k, weight_v = layer.self_attn.in_proj_weight.chunk(3)
    bias_q, bias_k, bias_v = layer.self_attn.in_proj_bias.chunk(3)
    q, k = (tgt + query_pos) @ weight_q.T + bias_q, (tgt + query_pos) @ weight_k.T + bias_k
    v = tgt @ weight_v.T + bias_v
    D = WIDTH // HEADS
    mixed = torch.cat(
        [
            (q[..., m * D : (m + 1) * D] @ k[..., m * D : (m + 1) * D].mT / math.sqrt(D)).softmax(-1)
            @ v[..., m * D : (m + 1) * D]
            for m in range(HEADS)
        ],
        dim=-1,
    )
    x = tgt + mixed @ layer.self_attn.out_proj.weight.T + layer.self_attn.out_proj.bias
    x = F.layer_norm(x, (WIDTH,), layer.norm2.weight, layer.norm2.bias)
    x = x + layer.cross_attn(x + query_pos, references, memory, SHAPES, [0, 24], padding)
    x = F.layer_norm(x, (WIDTH,), layer.norm1.weight, layer.norm1.bias)
    hidden = (x @ layer.linear1.weight.T + layer.linear1.bias).relu()
    x = x + hidden @ layer.linear2.weight.T + layer.linear2.bias
    torch.testing.assert_close(got, F.layer_norm(x, (WIDTH,), layer.norm3.weight, layer.norm3.bias))


@torch.no_grad()
def test_encoder_reference_points() -> None:
    """A pixel's own center within its image, mapped onto every level by that level's valid share."""
    transformer = build().eval()
    seen = arguments_of(transformer.encoder.layers)
    valid = [(3, 4), (2, 2)]
    run(transformer, *inputs(SHAPES, valid))
    assert len(seen) == 2
    references = seen[0][2]
    assert torch.equal(references, seen[1][2])
    assert references.shape == (2, 30, LEVELS, 2)
    for image, valid_of_image in enumerate([SHAPES, valid]):
        s = 0
        for (h, w), (rows, columns) in zip(SHAPES, valid_of_image, strict=True):
            for y in range(h):
                for x in range(w):
                    for level, ((to_h, to_w), (to_rows, to_columns)) in enumerate(
                        zip(SHAPES, valid_of_image, strict=True)
                    ):
                        expected = ((x + 0.5) / columns * to_columns / to_w, (y + 0.5) / rows * to_rows / to_h)
                        torch.testing.assert_close(references[image, s, level], torch.tensor(expected))
                    s += 1


@torch.no_grad()
def test_encoder_positions_have_their_level() -> None:
    transformer = build().eval()
    seen = arguments_of(transformer.encoder.layers)
    features, masks = inputs(SHAPES, SHAPES)
    run(transformer, features, masks)
    src, pos = seen[0][:2]
    torch.testing.assert_close(src[0, 24 + 1 * 3 + 2], features[1][0, :, 1, 2])
    before = pos.clone()
    transformer.level_embed[1] += 1.0
    run(transformer, features, masks)
    after = seen[2][1]
    torch.testing.assert_close(after[:, :24], before[:, :24])
    torch.testing.assert_close(after[:, 24:], before[:, 24:] + 1.0)


@torch.no_grad()
def test_refinement_of_boxes_layer_by_layer() -> None:
    """A layer's head moves the reference in logit space: first a point, without a size of its own, then boxes."""
    transformer = build().eval()
    _, bbox_embed = heads()
    seen = arguments_of(transformer.decoder.layers)
    valid = [(3, 4), (2, 2)]
    features, masks = inputs(SHAPES, valid)
    out = run(transformer, features, masks)
    ratios = torch.ones(2, LEVELS, 2)
    ratios[1] = torch.tensor([[columns / w, rows / h] for (h, w), (rows, columns) in zip(SHAPES, valid, strict=True)])

    query_embed = torch.randn(QUERIES, 2 * WIDTH, generator=torch.Generator().manual_seed(3))
    position, content = query_embed[:, :WIDTH], query_embed[:, WIDTH:]
    points = (position @ transformer.reference_points.weight.T + transformer.reference_points.bias).sigmoid()
    torch.testing.assert_close(seen[0][0], content.expand(2, -1, -1))
    torch.testing.assert_close(seen[0][1], position.expand(2, -1, -1))
    torch.testing.assert_close(seen[0][2], points[None, :, None] * ratios[:, None])
    moved = bbox_embed[0](out.hidden_states[0])
    start = torch.cat([torch.logit(points), torch.zeros(QUERIES, 2)], dim=-1)
    torch.testing.assert_close(out.pred_boxes[0], (start + moved).sigmoid())
    for layer in (1, 2):
        before = out.pred_boxes[layer - 1]
        torch.testing.assert_close(seen[layer][2], before[:, :, None] * ratios.repeat(1, 1, 2)[:, None])
        torch.testing.assert_close(seen[layer][0], out.hidden_states[layer - 1])
        expected = (torch.logit(before, eps=1e-5) + bbox_embed[layer](out.hidden_states[layer])).sigmoid()
        torch.testing.assert_close(out.pred_boxes[layer], expected)


def test_no_gradient_from_a_box_to_the_layers_before() -> None:
    transformer = build()
    class_embed, bbox_embed = heads(3)
    features, masks = inputs(SHAPES, SHAPES)
    query_embed = torch.randn(QUERIES, 2 * WIDTH)
    out = transformer(features, masks, query_embed, class_embed, bbox_embed)
    earlier, own = bbox_embed[0].layers[0].weight, bbox_embed[1].layers[0].weight
    gradients = torch.autograd.grad(out.pred_boxes[1].sum(), [earlier, own], allow_unused=True, retain_graph=True)
    assert gradients[0] is None
    assert gradients[1].abs().sum() > 0
    point = transformer.reference_points.weight
    assert torch.autograd.grad(out.pred_boxes[0].sum(), point)[0].abs().sum() > 0


@pytest.mark.parametrize("two_stage", [False, True])
@torch.no_grad()
def test_padding_changes_nothing(two_stage: bool) -> None:
    """Neither how much there is, nor what is in it, nor the other image of the batch."""
    transformer = build(two_stage).eval()
    randomize(transformer)
    both = heads() if two_stage else tuple(part[:3] for part in heads())
    query_embed = None if two_stage else torch.randn(QUERIES, 2 * WIDTH, generator=torch.Generator().manual_seed(3))
    valid = [(4, 4), (2, 2)]
    features, masks = inputs([(4, 8), (2, 4)], valid)
    together = transformer(features, masks, query_embed, *both)
    cut = [f[1:, :, :rows, :columns] for f, (rows, columns) in zip(features, valid, strict=True)]
    unpadded = [torch.zeros(1, rows, columns, dtype=torch.bool) for rows, columns in valid]
    alone = transformer(cut, unpadded, query_embed, *both)
    other_features = [f.clone() for f in features]
    for f, (_, columns) in zip(other_features, valid, strict=True):
        f[1, :, :, columns:] = 7.0
        f[0] = -f[0]
    other = transformer(other_features, masks, query_embed, *both)
    for layer in range(3):
        for result in (together, other):
            torch.testing.assert_close(result.pred_boxes[layer][1:], alone.pred_boxes[layer], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                result.hidden_states[layer][1:], alone.hidden_states[layer], atol=1e-4, rtol=1e-4
            )


@torch.no_grad()
def test_proposals_of_two_stages() -> None:
    """One box per pixel, at its center and of its level's size; the best by the first class become queries."""
    transformer = build(two_stage=True).eval()
    class_embed, bbox_embed = heads()
    valid = [(3, 4), (2, 2)]
    seen = arguments_of(transformer.decoder.layers)
    out = run(transformer, *inputs(SHAPES, valid))
    assert out.proposal_logits.shape == (2, 30, CLASSES)
    assert out.proposal_boxes.shape == (2, 30, 4)
    for image, valid_of_image in enumerate([SHAPES, valid]):
        s, expected_boxes = 0, []
        for level, ((h, w), (rows, columns)) in enumerate(zip(SHAPES, valid_of_image, strict=True)):
            for y in range(h):
                for x in range(w):
                    prior = [(x + 0.5) / columns, (y + 0.5) / rows, 0.05 * 2**level, 0.05 * 2**level]
                    usable = y < rows and x < columns and all(0.01 < p < 0.99 for p in prior)
                    memory = out.memory[image, s] if usable else torch.zeros(WIDTH)
                    hidden = transformer.enc_output_norm(transformer.enc_output(memory))
                    torch.testing.assert_close(out.proposal_logits[image, s], class_embed[-1](hidden))
                    box = (
                        (bbox_embed[-1](hidden) + torch.logit(torch.tensor(prior))).sigmoid()
                        if usable
                        else torch.ones(4)
                    )
                    torch.testing.assert_close(out.proposal_boxes[image, s], box)
                    expected_boxes.append(box)
                    s += 1
        best = sorted(range(30), key=lambda s: -out.proposal_logits[image, s, 0].item())[:QUERIES]
        chosen = torch.stack([expected_boxes[s] for s in best])
        ratio = torch.tensor(
            [[columns / w, rows / h] * 2 for (h, w), (rows, columns) in zip(SHAPES, valid_of_image, strict=True)]
        )
        torch.testing.assert_close(seen[0][2][image], chosen[:, None] * ratio)
        # Position and content of a query are made of its box.
        angles = chosen[..., None] * 2 * math.pi / 10000.0 ** (2 * (torch.arange(8) // 2) / 8)
        encoded = torch.where(torch.arange(8) % 2 == 0, angles.sin(), angles.cos()).flatten(1)
        made = transformer.pos_trans_norm(transformer.pos_trans(encoded))
        torch.testing.assert_close(seen[0][1][image], made[:, :WIDTH], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen[0][0][image], made[:, WIDTH:], atol=1e-5, rtol=1e-4)


def test_fewer_pixels_than_queries() -> None:
    transformer = build(two_stage=True)
    class_embed, bbox_embed = heads()
    features = [torch.randn(1, WIDTH, 1, 2), torch.randn(1, WIDTH, 1, 1)]
    masks = [torch.zeros(1, 1, 2, dtype=torch.bool), torch.zeros(1, 1, 1, dtype=torch.bool)]
    out = transformer(features, masks, None, class_embed, bbox_embed)
    assert out.pred_boxes[-1].shape == (1, 3, 4)
    assert out.pred_boxes[-1].isfinite().all()


def test_initial_values() -> None:
    transformer = build()
    attention = [module for module in transformer.modules() if isinstance(module, MSDeformAttn)]
    assert len(attention) == 5
    for module in attention:
        for zero in (module.sampling_offsets.weight, module.attention_weights.weight, module.attention_weights.bias):
            assert not zero.any()
        offsets = module.sampling_offsets.bias.view(HEADS, LEVELS, POINTS, 2)
        for head in range(HEADS):
            angle = 2 * math.pi * head / HEADS
            x, y = math.cos(angle), math.sin(angle)
            largest = max(abs(x), abs(y))
            for point in range(POINTS):
                expected = torch.tensor([x, y]) / largest * (point + 1)
                torch.testing.assert_close(offsets[head, :, point], expected.expand(LEVELS, 2))
        bound = math.sqrt(6 / (2 * WIDTH))
        assert 0.9 * bound < module.value_proj.weight.abs().max() <= bound
        assert not module.value_proj.bias.any()
    bound = math.sqrt(6 / (WIDTH + 2))
    assert 0.8 * bound < transformer.reference_points.weight.abs().max() <= bound
    assert not transformer.reference_points.bias.any()
    assert 0.7 < transformer.level_embed.std() < 1.3


@pytest.mark.parametrize("two_stage", [False, True])
def test_gradient_checkpointing_changes_nothing_but_memory(two_stage: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        transformer = build(two_stage, dropout=0.2, checkpointing=checkpointing)
        randomize_seed = torch.Generator().manual_seed(5)
        for parameter in transformer.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=randomize_seed))
        recomputed = arguments_of(transformer.encoder.layers)
        features, masks = inputs(SHAPES, [(3, 4), (2, 2)])
        torch.manual_seed(9)  # of dropout
        out = run(transformer, features, masks)
        (sum(boxes.sum() for boxes in out.pred_boxes) + out.memory.square().mean()).backward()
        assert len(recomputed) == (4 if checkpointing else 2)
        gradients.append([p.grad for p in transformer.parameters()])
    for without, with_checkpoints in zip(*gradients, strict=True):
        torch.testing.assert_close(with_checkpoints, without, rtol=1e-5, atol=1e-6)
