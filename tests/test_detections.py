"""Outputs to detections, against a computation in plain Python of one detection at a time."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from stub_model import postprocess
from torch import Tensor

from solq.detections import Detections, encode_masks, encode_runs
from solq.kernels import crop_dct_encode, dct_decode_binary, dct_decode_paste, paste_runs
from solq.kernels.reference import mask_runs
from solq.models import base


def decode_masks(outputs: dict, image: int, queries: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """As a model does that codes masks of 32×32 by their DCT."""
    return dct_decode_paste(outputs["pred_vectors"][image, queries], boxes, image_size, size=32)


def random_outputs(B: int = 2, Q: int = 7, C: int = 4, n: int = 40, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pred_logits": torch.randn(B, Q, C, generator=generator) * 2,
        "pred_boxes": torch.rand(B, Q, 4, generator=generator) * 0.5 + 0.2,
        "pred_vectors": torch.randn(B, Q, n, generator=generator),
    }


@pytest.mark.parametrize("top_k", [1, 10, 100])
def test_against_one_detection_at_a_time(top_k):
    outputs = random_outputs()
    sizes = [(37, 61), (90, 24)]
    for image, ((H, W), detections) in enumerate(
        zip(sizes, postprocess(outputs, torch.tensor(sizes), decode_masks, top_k), strict=True)
    ):
        pairs = [
            (1 / (1 + math.exp(-logit)), query, label)
            for query, logits in enumerate(outputs["pred_logits"][image].tolist())
            for label, logit in enumerate(logits)
        ]
        best = sorted(pairs, reverse=True)[:top_k]
        assert len(detections) == len(best) == min(top_k, 28)
        assert detections.labels.tolist() == [label for _, _, label in best]
        assert detections.scores.tolist() == pytest.approx([score for score, _, _ in best])
        assert detections.masks.dtype == torch.bool
        for (_, query, _), box, mask in zip(best, detections.boxes, detections.masks, strict=True):
            cx, cy, w, h = outputs["pred_boxes"][image, query].tolist()
            expected = [(cx - w / 2) * W, (cy - h / 2) * H, (cx + w / 2) * W, (cy + h / 2) * H]
            assert box.tolist() == pytest.approx(expected, abs=1e-4)
            vector = outputs["pred_vectors"][image, query][None]
            assert torch.equal(mask, dct_decode_paste(vector, box[None], (H, W), size=32)[0])


def test_a_mask_comes_back_from_its_own_vector():
    """A perfect prediction, all the way: the mask of an object → vector → outputs → detection."""
    H, W = 60, 90
    y, x = torch.arange(H)[:, None] + 0.5, torch.arange(W) + 0.5
    mask = ((x - 45) / 25) ** 2 + ((y - 30) / 18) ** 2 < 1
    box = torch.tensor([20.0, 12, 70, 48])
    outputs = {
        "pred_logits": torch.tensor([[[-4.0, 3.0], [-5.0, -5.0]]]),
        "pred_boxes": torch.tensor([[[45 / W, 30 / H, 50 / W, 36 / H], [0.5, 0.5, 0.1, 0.1]]]),
        "pred_vectors": crop_dct_encode(mask[None].repeat(2, 1, 1), box.repeat(2, 1))[None],
    }

    def decode_128(outputs: dict, image: int, queries: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
        return dct_decode_paste(outputs["pred_vectors"][image, queries], boxes, image_size)

    (detections,) = postprocess(outputs, torch.tensor([[H, W]]), decode_128, score_threshold=0.5)
    assert detections.labels.tolist() == [1]
    torch.testing.assert_close(detections.boxes[0], box)
    overlap = (detections.masks[0] & mask).sum() / (detections.masks[0] | mask).sum()
    assert overlap > 0.97


def test_each_query_is_decoded_once():
    outputs = random_outputs(B=1, Q=3, C=5)
    decoded = []

    def counting(outputs: dict, image: int, queries: Tensor, *rest: Any) -> Tensor:
        decoded.append(len(queries))
        return decode_masks(outputs, image, queries, *rest)

    (detections,) = postprocess(outputs, torch.tensor([[20, 30]]), counting)
    assert len(detections) == 15
    assert decoded == [3]


def test_huge_images_are_decoded_in_parts(monkeypatch):
    outputs, sizes = random_outputs(), torch.tensor([[40, 50], [31, 17]])
    whole = postprocess(outputs, sizes, decode_masks)
    monkeypatch.setattr(base, "MASK_PIXELS", 3 * 40 * 50)
    for expected, parts in zip(whole, postprocess(outputs, sizes, decode_masks), strict=True):
        assert torch.equal(parts.masks, expected.masks)


def test_run_lengths_instead_of_masks(monkeypatch):
    outputs, sizes = random_outputs(), torch.tensor([[40, 50], [31, 17]])
    outputs["pred_boxes"][0, 0] *= torch.tensor([1, 1, 9, 9])  # over all borders

    def decode_runs(outputs: dict, image: int, queries: Tensor, boxes: Tensor, size: tuple[int, int]) -> Any:
        return paste_runs(dct_decode_binary(outputs["pred_vectors"][image, queries], 32), boxes, size)

    whole = postprocess(outputs, sizes, decode_masks, score_threshold=0.3)
    monkeypatch.setattr(base, "MASK_PIXELS", 3 * 40 * 50)
    runs = postprocess(outputs, sizes, None, score_threshold=0.3, decode_runs=decode_runs)
    for expected, found in zip(whole, runs, strict=True):
        assert len(found) > 3
        assert found.masks is None
        assert found.rle() == expected.rle()
        assert found.to_coco(3) == expected.to_coco(3)
        for kept in (slice(1, 3), found.scores > found.scores[2], torch.tensor([2, 0])):
            assert found[kept].to("cpu").rle() == expected[kept].rle()


def test_threshold_and_none():
    outputs, sizes = random_outputs(), torch.tensor([[40, 50], [31, 17]])
    for everything, some in zip(
        postprocess(outputs, sizes, decode_masks),
        postprocess(outputs, sizes, decode_masks, score_threshold=0.8),
        strict=True,
    ):
        kept = int((everything.scores >= 0.8).sum())
        assert 0 < kept == len(some) < len(everything)
        assert torch.equal(some.boxes, everything.boxes[:kept])
        assert torch.equal(some.masks, everything.masks[:kept])
    for detections, (H, W) in zip(
        postprocess(outputs, sizes, decode_masks, score_threshold=1.1), sizes.tolist(), strict=True
    ):
        assert len(detections) == 0
        assert detections.masks.shape == (0, H, W)
        assert detections.to_coco(1) == []


def test_without_masks():
    outputs = random_outputs()
    del outputs["pred_vectors"]
    detections = postprocess(outputs, torch.tensor([[40, 50], [31, 17]]), None)
    assert detections[0].masks is None
    assert "segmentation" not in detections[0].to_coco(1)[0]
    with pytest.raises(ValueError, match="no masks to encode"):
        detections[0].rle()


def test_half_precision_outputs_give_float32_boxes():
    outputs = {key: value.bfloat16() for key, value in random_outputs().items()}
    detections = postprocess(outputs, torch.tensor([[40, 50], [31, 17]]), decode_masks)[0]
    assert detections.boxes.dtype == detections.scores.dtype == torch.float32


def test_sizes_of_another_batch_are_an_error():
    with pytest.raises(ValueError, match="orig_sizes has 1 images but the outputs have 2"):
        postprocess(random_outputs(), torch.tensor([[40, 50]]), decode_masks)


@pytest.mark.parametrize("shape", [(6, 31, 47), (3, 1, 9), (3, 9, 1), (2, 1, 1)])
def test_run_lengths_are_those_of_pycocotools(shape):
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    masks[0], masks[1] = False, True
    encoded = encode_masks(masks)
    expected = coco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
    assert [rle["counts"] for rle in encoded] == [rle["counts"].decode() for rle in expected]
    assert encode_runs(*mask_runs(masks), shape[1:]) == encoded
    assert torch.equal(torch.from_numpy(coco_mask.decode(encoded)).permute(2, 0, 1).bool(), masks)


def test_coco_entries():
    detections = Detections(
        torch.tensor([[1.0, 2, 4, 8], [0.12345, 0, 1, 1]]),
        torch.tensor([0.9, 0.1234567]),
        torch.tensor([1, 0]),
        torch.ones(2, 3, 3, dtype=torch.bool),
    )
    first, second = detections.to_coco(5, category_ids=[10, 20])
    assert first == {
        "image_id": 5,
        "category_id": 20,
        "bbox": [1, 2, 3, 6],
        "score": 0.9,
        "segmentation": detections.rle()[0],
    }
    assert (second["bbox"], second["score"]) == ([0.123, 0, 0.877, 1], 0.123457)
    assert [entry["category_id"] for entry in detections.to_coco(5)] == [1, 0]
    assert detections[:1].to_coco(5, [10, 20]) == [first]
    assert detections[detections.scores > 0.5].masks.shape == (1, 3, 3)
