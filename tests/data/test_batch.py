import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solq.data.batch import Batch, PackedTargets, collate, fill_up, normalize, padded_sizes
from solq.data.transforms import TrainTransform


def sample(height: int, width: int, n: int, image_id: int = 1) -> tuple[torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(image_id)
    target = {
        "labels": torch.randint(5, (n,), generator=generator),
        "boxes": torch.rand(n, 4, generator=generator),
        "masks": torch.randint(2, (n, 16, 16), generator=generator).to(torch.uint8),
        "image_id": image_id,
        "orig_size": torch.tensor([height * 2, width * 2]),
        "size": torch.tensor([height, width]),
    }
    return torch.randint(1, 256, (3, height, width), dtype=torch.uint8, generator=generator), target


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])), key


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_pack_and_unpack(counts: list[int]):
    targets = [sample(8, 9, n, image_id)[1] for image_id, n in enumerate(counts)]
    packed = PackedTargets.pack(targets)
    assert packed.offsets.tolist() == [sum(counts[:b]) for b in range(len(counts) + 1)]
    assert packed.labels.dtype == packed.offsets.dtype == packed.image_ids.dtype == packed.sizes.dtype == torch.int64
    assert packed.boxes.shape == (sum(counts), 4)
    assert packed.masks.shape == (sum(counts), 16, 16)
    assert packed.masks.dtype == torch.uint8
    for given_target, target in zip(targets, packed.to("cpu").unpack(), strict=True):
        assert_same(given_target, target)


def test_collate_pads_to_the_smallest_size_that_fits():
    samples = [sample(20, 30, 2, 1), sample(24, 10, 0, 2)]
    batch = collate(samples, sizes=[(64, 64), (24, 40), (32, 32), (24, 24)])
    assert batch.images.shape == (2, 3, 24, 40)
    assert batch.images.dtype == torch.uint8
    assert batch.padding_mask.shape == (2, 24, 40)
    for b, (image, target) in enumerate(samples):
        _, h, w = image.shape
        assert torch.equal(batch.images[b, :, :h, :w], image)
        assert not batch.padding_mask[b, :h, :w].any()
        assert batch.padding_mask[b].sum() == 24 * 40 - h * w
        assert batch.images[b].masked_select(batch.padding_mask[b]).sum() == 0
        assert_same(batch.targets.unpack()[b], target)
    assert batch.skipped == 0


def test_damaged_images_are_left_out_and_counted():
    batch = collate([None, sample(8, 8, 1), None], sizes=[(8, 8)])
    assert len(batch.images) == 1
    assert batch.skipped == batch.to("cpu").skipped == 2
    assert collate([None, None], sizes=[(8, 8)]) is None


def test_a_batch_without_objects():
    batch = collate([sample(8, 8, 0), sample(8, 8, 0)], sizes=[(8, 8)])
    assert batch.targets.offsets.tolist() == [0, 0, 0]
    assert batch.targets.masks.shape == (0, 16, 16)


def test_collate_says_when_nothing_fits():
    with pytest.raises(ValueError, match=r"needs 20x30 pixels but the largest of sizes is \(16, 64\)"):
        collate([sample(20, 30, 1)], sizes=[(16, 64), (8, 8)])


def test_normalize():
    images = torch.tensor([[[[0, 255, 9]], [[0, 255, 9]], [[0, 255, 9]]]], dtype=torch.uint8)
    padding_mask = torch.tensor([[[False, False, True]]])
    result = normalize(images, padding_mask)
    assert result.dtype == torch.float32
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(result[0, :, 0, 0], -mean / std)
    torch.testing.assert_close(result[0, :, 0, 1], (1 - mean) / std)
    assert result[0, :, 0, 2].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("scales", "max_size"),
    [(range(480, 801, 32), 1333), (range(416, 1089, 32), 1536), ((800,), 1333), ((100, 128), 170)],
)
def test_padded_sizes_are_few_and_hold_every_view(scales, max_size: int):
    sizes = padded_sizes(scales, max_size)
    assert len(sizes) == len(set(sizes)) <= 15
    assert all(side % 32 == 0 for size in sizes for side in size)
    transform = TrainTransform(scales=tuple(scales), max_size=max_size)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        H, W = transform(tuple(rng.integers(20, 2000, 2).tolist()), rng, rng).size
        assert any(size[0] >= H and size[1] >= W for size in sizes)


def test_padded_sizes_of_square_images_of_one_scale():
    assert padded_sizes((128,), 128) == [(128, 128)]


@pytest.mark.gpu
def test_pinned_batches_are_copied_to_the_device():
    batch = collate([sample(8, 8, 2)], sizes=[(8, 8)]).pin_memory()
    assert isinstance(batch, Batch)
    assert batch.images.is_pinned()
    assert batch.targets.masks.is_pinned()
    assert batch.to("cuda").targets.boxes.is_cuda


def test_skipped_images_are_filled_up_with_black_ones() -> None:
    """So that the shape is the one that the model is compiled for; nothing else of the batch changes."""
    samples = [sample(20, 30, 2), None, sample(32, 10, 1), None]
    batch = collate(samples, sizes=[(32, 32), (64, 64)])
    filled = fill_up(batch, 4, (64, 64), 128)
    assert filled.images.shape == (4, 3, 32, 32)
    assert filled.skipped == 2
    assert torch.equal(filled.images[:2], batch.images)
    assert not filled.images[2:].any()
    assert not filled.padding_mask[2:].any()
    assert filled.targets.offsets.tolist() == [0, 2, 3, 3, 3]
    assert [len(target["labels"]) for target in filled.targets.unpack()] == [2, 1, 0, 0]
    assert filled.targets.sizes[2:].tolist() == [[32, 32]] * 2
    assert fill_up(filled, 4, (64, 64), 128) is filled


def test_a_batch_of_damaged_images_only() -> None:
    filled = fill_up(None, 3, (64, 32), 16)
    assert filled.images.shape == (3, 3, 64, 32)
    assert filled.targets.masks.shape == (0, 16, 16)
    assert filled.targets.offsets.tolist() == [0, 0, 0, 0]
    assert filled.skipped == 3
