"""Samples against pycocotools' own reading of the same file, and every way in which a file can be wrong."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from solq.data.annotations import labels_of_categories, read_segmentation, split_paths
from solq.data.batch import collate, padded_sizes
from solq.data.coco import CocoDataset
from solq.data.sampler import TrainSampler
from solq.data.transforms import EvalTransform, TrainTransform
from solq.kernels.reference import crop_masks

H, W = 48, 64
SQUARE = [10.0, 10, 30, 10, 30, 30, 10, 30]
AS_IS = EvalTransform(size=H, max_size=W)


def annotation(**changes: Any) -> dict[str, Any]:
    base = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 400.0, "bbox": [10.0, 10, 20, 20]}
    return base | {"segmentation": [SQUARE]} | changes


class Folder:
    """A dataset on disk: two images, and whatever annotations a test gives it."""

    def __init__(self, root: Path) -> None:
        self.images, self.file = root / "images", root / "instances.json"
        self.images.mkdir()
        self.content: dict[str, Any] = {
            "images": [
                {"id": 1, "file_name": "a.png", "height": H, "width": W},
                {"id": 2, "file_name": "b.jpg", "height": H, "width": W},
            ],
            "annotations": [annotation()],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        }
        rng = np.random.default_rng(0)
        for name in ("a.png", "b.jpg"):
            Image.fromarray(rng.integers(0, 255, (H, W, 3), dtype=np.uint8)).save(self.images / name)

    def open(self, transform: TrainTransform | EvalTransform = AS_IS, **options: Any) -> CocoDataset:
        self.file.write_text(json.dumps(self.content))
        return CocoDataset(self.images, self.file, transform, **({"train": False, "mask_size": 32} | options))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# ---- what a sample is -----------------------------------------------------------------------------------------------


def test_a_sample(folder: Folder):
    image, target = folder.open()[0]
    assert image.shape == (3, H, W)
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(np.array(Image.open(folder.images / "a.png"))).permute(2, 0, 1))
    assert target["labels"].tolist() == [1]
    assert target["labels"].dtype == torch.int64
    assert target["boxes"].tolist() == pytest.approx(np.array([[20 / W, 20 / H, 20 / W, 20 / H]]))
    assert target["boxes"].dtype == torch.float32
    assert target["masks"].shape == (1, 32, 32)
    assert target["masks"].dtype == torch.uint8
    assert target["masks"].all()
    assert target["image_id"] == 1
    assert target["orig_size"].tolist() == target["size"].tolist() == [H, W]


def test_an_image_without_annotations_is_kept(folder: Folder):
    dataset = folder.open()
    assert len(dataset) == 2
    _, target = dataset[1]
    assert target["labels"].shape == (0,)
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 32, 32)


def test_crowds_are_no_targets(folder: Folder):
    rle = {"size": [H, W], "counts": [0, H * W]}
    folder.content["annotations"].append(annotation(id=2, iscrowd=1, segmentation=rle))
    for train in (False, True):
        dataset = folder.open(train=train)
        assert len(dataset[0][1]["labels"]) == 1
        assert not dataset.dropped
    assert COCO(str(dataset.coco_json)).getAnnIds(iscrowd=True) == [2]  # where evaluation finds them


@pytest.mark.parametrize("kind", ["polygons", "compressed", "uncompressed"])
def test_all_ways_to_write_a_mask_agree(folder: Folder, kind: str):
    parts = [[5.0, 5, 25, 5, 25, 25, 5, 25], [35, 30, 45, 30, 45, 40, 35, 40], [1, 1]]
    rle = coco_mask.merge(coco_mask.frPyObjects(parts[:2], H, W))
    mask = coco_mask.decode(rle)
    pixels = mask.ravel(order="F").tolist()
    runs, value = [0], 0
    for pixel in pixels:
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    segmentation = {
        "polygons": parts,
        "compressed": {"size": [H, W], "counts": rle["counts"].decode()},
        "uncompressed": {"size": [H, W], "counts": runs},
    }[kind]
    folder.content["annotations"] = [annotation(bbox=[5, 5, 40, 35], segmentation=segmentation)]
    _, target = folder.open()[0]
    exact = crop_masks(torch.from_numpy(mask)[None], torch.tensor([[5.0, 5, 45, 40]]), 32)[0]
    assert (target["masks"][0].bool() == exact).float().mean() > 0.98


def test_instances_stay_with_their_images_in_any_order(folder: Folder):
    rle = {"size": [H, W], "counts": [0, H * W]}
    folder.content["annotations"] = [
        annotation(id=1, image_id=2, category_id=2),
        annotation(id=2, image_id=1, category_id=2, segmentation=rle),
        annotation(id=3, image_id=2, category_id=1, segmentation=[[10, 10, 30, 10, 10, 30], [0, 0, 1, 0, 1, 1]]),
        annotation(id=4, image_id=1, category_id=1, segmentation=[[10, 10, 30, 30, 10, 30]]),
    ]
    dataset = folder.open()
    (_, first), (_, second) = dataset[0], dataset[1]
    assert first["labels"].tolist() == [2, 1]
    assert second["labels"].tolist() == [2, 1]
    assert first["masks"].float().mean((1, 2)).tolist() == pytest.approx([1, 0.5], abs=0.03)
    assert second["masks"].float().mean((1, 2)).tolist() == pytest.approx([1, 0.5], abs=0.03)
    assert not torch.equal(first["masks"][1], second["masks"][1])


def test_an_instance_of_which_a_crop_shows_only_the_box_is_no_target(folder: Folder):
    corner = [0.0, 0, 4, 0, 4, 4, 0, 4]
    folder.content["annotations"] = [annotation(bbox=[0, 0, W, H], segmentation=[corner])]
    crops = TrainTransform(scales=(H,), max_size=100, crop_scales=(H,), crop_range=(16, 20), flip=False)
    dataset = folder.open(crops)
    counts = {len(dataset[(0, seed)][1]["labels"]) for seed in range(40)}
    assert counts == {0, 1}


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *(("png", mode) for mode in ("L", "RGBA", "P", "I;16")),
        *(("jpg", mode) for mode in ("L", "CMYK")),
        *(("tif", mode) for mode in ("L", "RGBA", "P", "CMYK")),
    ],
)
def test_images_of_any_kind_become_rgb(folder: Folder, mode: str, suffix: str):
    gray = np.full((H, W), 100, np.uint8)
    image = Image.fromarray(gray.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(gray).convert("RGB")
    name = f"c.{suffix}"
    (image if mode == "I;16" else image.convert(mode, palette=Image.Palette.ADAPTIVE)).save(folder.images / name)
    folder.content["images"][0]["file_name"] = name
    pixels, _ = folder.open()[0]
    assert pixels.shape == (3, H, W)
    assert pixels.dtype == torch.uint8
    assert (pixels.int() - 100).abs().max() <= 3


def test_a_photograph_annotated_upright_is_turned_by_its_exif_entry(folder: Folder):
    sideways = Image.fromarray(np.zeros((W, H, 3), np.uint8))
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(folder.images / "b.jpg", exif=exif)
    assert folder.open()[1][0].shape == (3, H, W)


def test_file_names_with_folders_and_other_letters(folder: Folder):
    (folder.images / "früh").mkdir()
    (folder.images / "b.jpg").rename(folder.images / "früh" / "b 1.jpg")
    folder.content["images"][1]["file_name"] = "früh/b 1.jpg"
    assert folder.open()[1] is not None


# ---- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3], [0, 1, 2, 3]),
        ([0, 1], [0, 1]),
        ([3, 1], [0, 1, 2, 3]),
        ([2, 7], [2, 7]),
        ([1000, 20, 5], [5, 20, 1000]),
        ([-1, 1], [-1, 1]),
        ([7], [7]),
    ],
)
def test_labels_are_the_ids_unless_they_have_wide_gaps(ids: list[int], expected: list[int]):
    category_ids, class_names = labels_of_categories({i: f"name {i}" for i in ids})
    assert category_ids == expected
    assert class_names == [f"name {i}" if i in ids else "" for i in expected]


def test_dense_labels():
    assert labels_of_categories({2: "two", 1: "one", 4: "four"}, dense=True) == ([1, 2, 4], ["one", "two", "four"])


def test_ids_with_wide_gaps_in_a_dataset(folder: Folder):
    folder.content["categories"] = [{"id": 900, "name": "dog"}, {"id": 30, "name": "cat"}]
    folder.content["annotations"] = [annotation(category_id=900), annotation(id=2, category_id=30)]
    dataset = folder.open()
    assert dataset.num_classes == 2
    assert dataset.class_names == ["cat", "dog"]
    assert [dataset.category_ids[label] for label in dataset[0][1]["labels"]] == [900, 30]


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_missing_annotation_file(folder: Folder):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json is missing"):
        CocoDataset(folder.images, folder.file.with_name("nowhere.json"), AS_IS, train=True)
    with pytest.raises(OSError, match=f"{folder.images.name} cannot be read"):
        CocoDataset(folder.images, folder.images, AS_IS, train=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('{"images": [', "is not JSON"),
        ("\x00\xff", "is not JSON"),
        ("[1, 2]", "not in COCO's format: it has no list 'images'"),
        ('{"images": {}}', "it has no list 'images'"),
        ('{"images": [{"id": 1}]}', "an entry of 'images' has no 'file_name'"),
        ('{"images": [3]}', "an entry of 'images' has no 'id'"),
        ('{"images": []}', "it has no list 'annotations'"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "has no images"),
    ],
)
def test_files_that_are_not_coco(folder: Folder, text: str, message: str):
    folder.file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        CocoDataset(folder.images, folder.file, AS_IS, train=True)
    assert str(folder.file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": 9}, "annotation 1 is of image 9, which is not among images"),
        ({"category_id": 9}, "annotation 1 is of category 9, which is not among categories"),
    ],
)
def test_annotations_of_what_is_not_there(folder: Folder, changes: dict[str, int], message: str):
    folder.content["annotations"] = [annotation(**changes)]
    with pytest.raises(ValueError, match=message):
        folder.open()


def test_wrong_types_of_ids_and_sizes(folder: Folder):
    folder.content["images"][0]["height"] = "48 px"
    with pytest.raises(ValueError, match="an entry of 'images' has 'height': '48 px', which is not a number"):
        folder.open()
    folder.content["images"][0]["height"] = 0
    with pytest.raises(ValueError, match="has images without height or width"):
        folder.open()


def test_images_of_the_same_id(folder: Folder):
    folder.content["images"][1]["id"] = 1
    with pytest.raises(ValueError, match="several images the same id"):
        folder.open()


def test_missing_images(folder: Folder):
    (folder.images / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 images of .* are missing, the first is .*b\.jpg"):
        folder.open()
    folder.images.rename(folder.images.with_name("moved"))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        folder.open()


def test_nothing_to_learn_from(folder: Folder):
    folder.content["annotations"] = []
    assert len(folder.open(train=False)) == 2
    with pytest.raises(ValueError, match="has no instance to learn from"):
        folder.open(train=True)


RLE = {"size": [H, W], "counts": [0, H * W]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": [10, 10, 0, 5]}, "bbox has no area"),
        ({"bbox": [10, 10, 5, -1]}, "bbox has no area"),
        ({"bbox": [W, 0, 5, 5]}, "bbox lies outside the image"),
        ({"bbox": [-9, 0, 9, 5]}, "bbox lies outside the image"),
        ({"bbox": [1, 2, 3]}, "bbox is not four numbers"),
        ({"bbox": None}, "bbox is not four numbers"),
        ({"bbox": [1, 2, 3, "4"]}, "bbox is not four numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, "bbox is not finite"),
        ({"segmentation": [[1, 2, 3, 4]]}, "its polygons have fewer than 3 points"),
        ({"segmentation": [[]]}, "its polygons have fewer than 3 points"),
        ({"segmentation": []}, "it has no segmentation"),
        ({"segmentation": None}, "it has no segmentation"),
        ({"segmentation": [[1, 2, 3, 4, 5]]}, "a polygon is not a list of x, y pairs"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, "a polygon is not a list of x, y pairs"),
        ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, "a polygon is not a list of numbers"),
        ({"segmentation": [[1, 2, 3, 4, 5, [6]]]}, "a polygon is not a list of numbers"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("inf")]]}, "a polygon is not finite"),
        ({"segmentation": RLE | {"size": [W, H]}}, "the RLE's size is not the image's"),
        ({"segmentation": RLE | {"size": 3}}, "the RLE's size is not the image's"),
        ({"segmentation": RLE | {"counts": [5, 5]}}, "the RLE's counts do not sum to the image's pixels"),
        ({"segmentation": RLE | {"counts": "zzzz"}}, "the RLE's counts do not sum to the image's pixels"),
        ({"segmentation": RLE | {"counts": "ä"}}, "the RLE's counts do not sum to the image's pixels"),
        ({"segmentation": RLE | {"counts": ""}}, "the RLE's counts do not sum to the image's pixels"),
        ({"segmentation": RLE | {"counts": [-1, H * W + 1]}}, "the RLE's counts are neither text nor numbers"),
        ({"segmentation": {"size": [H, W]}}, "the RLE's counts are neither text nor numbers"),
    ],
)
def test_unusable_annotations_are_left_out_and_reported(
    folder: Folder, changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
):
    folder.content["annotations"] = [annotation(), *(annotation(id=k, **changes) for k in (5, 6, 7, 8))]
    with caplog.at_level(logging.WARNING):
        dataset = folder.open()
    assert dataset.dropped == {reason: 4}
    assert len(dataset[0][1]["labels"]) == 1
    (record,) = caplog.records
    assert record.getMessage() == f"{folder.file}: 4 annotations left out: {reason} (ids 5, 6, 7, …)"


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(1, 20))
def test_compressed_rle_is_checked(seed: int, cut: int):
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, 150, 2).tolist()
    mask = np.asfortranarray(rng.random((h, w)) < rng.random(), dtype=np.uint8)
    counts = coco_mask.encode(mask)["counts"]
    assert read_segmentation({"size": [h, w], "counts": counts.decode()}, h, w) == counts
    with pytest.raises(ValueError, match="do not sum"):
        read_segmentation({"size": [h, w + 1], "counts": counts.decode()}, h, w + 1)
    if (short := counts[:-cut]) != counts:
        lengths_remain = coco_mask.area({"size": [h, w], "counts": short})
        if lengths_remain != coco_mask.area({"size": [h, w], "counts": counts}):
            with pytest.raises(ValueError, match="do not sum"):
                read_segmentation({"size": [h, w], "counts": short.decode()}, h, w)


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"<html>" * 50}[how])


@pytest.mark.parametrize("how", ["truncated", "empty", "text"])
@pytest.mark.parametrize("name", ["a.png", "b.jpg", "c.bmp"])
def test_damaged_images_are_skipped_or_stop_a_strict_run(
    folder: Folder, how: str, name: str, caplog: pytest.LogCaptureFixture
):
    if name == "c.bmp":
        Image.open(folder.images / "a.png").save(folder.images / name)
        folder.content["images"][0]["file_name"] = name
    index = int(name == "b.jpg")
    damage(folder.images / name, how)
    with caplog.at_level(logging.WARNING):
        assert folder.open()[index] is None
    (record,) = caplog.records
    assert str(folder.images / name) in record.getMessage()
    assert "\n" not in record.getMessage()
    assert folder.open()[1 - index] is not None
    with pytest.raises(ValueError, match=f"{name} cannot be used: .*; restore the file or remove it"):
        folder.open(strict=True)[index]


def test_an_image_of_another_size_than_annotated_is_damaged(folder: Folder, caplog: pytest.LogCaptureFixture):
    Image.new("RGB", (W, W)).save(folder.images / "a.png")
    assert folder.open()[0] is None
    assert f"it is {W}x{W} but annotated as {H}x{W} (height x width)" in caplog.text


def test_an_image_that_vanished_during_the_run_is_skipped(folder: Folder):
    dataset = folder.open()
    (folder.images / "a.png").unlink()
    assert dataset[0] is None


def test_a_loader_goes_on_past_a_damaged_image(folder: Folder):
    damage(folder.images / "b.jpg", "truncated")
    loader = DataLoader(folder.open(), batch_size=2, collate_fn=partial(collate, sizes=[(64, 64)]))
    (batch,) = loader
    assert batch.skipped == 1
    assert batch.targets.image_ids.tolist() == [1]


# ---- whole datasets -------------------------------------------------------------------------------------------------


def open_coco_tiny(root: Path, split: str, transform: TrainTransform | EvalTransform) -> CocoDataset:
    return CocoDataset(*split_paths(root, f"{split}2017"), transform, train=split == "train")


def test_real_images_agree_with_pycocotools(coco_tiny: Path):
    """Boxes, labels and masks of every instance; masks against RoIAlign of the whole image's mask."""
    dataset = open_coco_tiny(coco_tiny, "val", EvalTransform(200, 333))
    coco = COCO(str(dataset.coco_json))
    assert dataset.num_classes == 91
    ious, areas = [], []
    for index in range(0, len(dataset), 4):
        _, target = dataset[index]
        annotations = [a for a in coco.loadAnns(coco.getAnnIds(target["image_id"])) if not a["iscrowd"]]
        height, width = target["orig_size"].tolist()
        pixel = (target["orig_size"] / target["size"]).tolist()
        seen = [a for a in annotations if a["bbox"][2] >= pixel[1] and a["bbox"][3] >= pixel[0]]
        assert target["labels"].tolist() == [a["category_id"] for a in seen]
        for annotated, box, mask in zip(seen, target["boxes"], target["masks"].bool(), strict=True):
            x, y, w, h = annotated["bbox"]
            expected = torch.tensor([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
            torch.testing.assert_close(box, expected, atol=2e-3, rtol=0)  # a box may reach past the image
            full = torch.from_numpy(coco.annToMask(annotated))
            exact = crop_masks(full[None], torch.tensor([[x, y, x + w, y + h]]))[0]
            ious.append(float((mask & exact).sum() / (mask | exact).sum()))
            areas.append(w * h)
    ious, areas = np.array(ious), np.array(areas)
    assert np.median(ious[areas > 96**2]) > 0.98
    assert np.median(ious[areas > 32**2]) > 0.96
    assert np.median(ious[areas <= 32**2]) > 0.85  # a few pixels: the mask of the image is coarse, the polygon is not


@pytest.mark.parametrize("num_workers", [0, 2])
def test_samples_do_not_depend_on_workers(folder: Folder, num_workers: int):
    dataset = folder.open(TrainTransform(scales=(40, 48), max_size=80, crop_scales=(48,), crop_range=(20, 40)))
    sampler = TrainSampler(len(dataset), 2, seed=3)
    sizes = padded_sizes((40, 48), 80)
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=partial(collate, sizes=sizes)
    )
    torch.manual_seed(num_workers)  # global random states must not matter
    for batch, keys, _ in zip(loader, sampler, range(6), strict=False):
        expected = collate([dataset[key] for key in keys], sizes=sizes)
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.targets.masks, expected.targets.masks)
        assert torch.equal(batch.targets.boxes, expected.targets.boxes)


def test_the_same_key_gives_the_same_sample(coco_tiny: Path):
    dataset = open_coco_tiny(coco_tiny, "train", TrainTransform(scales=(200, 232), max_size=333))
    (image, target), (again, target_again) = dataset[(7, 11)], dataset[(7, 11)]
    assert torch.equal(image, again)
    assert all(torch.equal(torch.as_tensor(target[k]), torch.as_tensor(target_again[k])) for k in target)
    assert {tuple(dataset[(7, seed)][1]["size"].tolist()) for seed in range(8)} != {tuple(target["size"].tolist())}


def test_samples_agree_with_torchvisions_transforms_step_by_step(coco_tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """The benchmark's other contender draws the same random numbers, and mirrors, resizes and crops full masks."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks.bench_data import TRANSFORM, UsualDataset

    dataset = open_coco_tiny(coco_tiny, "train", TRANSFORM)
    usual = UsualDataset(dataset.images, dataset.coco_json, "torchvision")
    ious, differences = [], []
    for key in ((index, seed) for index in (0, 9, 18, 27) for seed in (1, 2)):
        (image, target), (usual_image, usual_target) = dataset[key], usual[key]
        seen = usual_target["masks"].any(2).any(1)
        assert torch.equal(target["labels"], usual_target["labels"][seen])
        # A crop is a whole number of pixels, here of the original image, there of the resized one.
        assert (target["size"] - usual_target["size"]).abs().max() <= 4
        torch.testing.assert_close(target["boxes"], usual_target["boxes"][seen], atol=0.01, rtol=0)
        masks, usual_masks = target["masks"].bool(), usual_target["masks"][seen].bool()
        large = target["boxes"][:, 2:].mul(target["size"].flip(0)).prod(1) > 96**2  # the usual masks are of pixels
        ious += ((masks & usual_masks).sum((1, 2)) / (masks | usual_masks).sum((1, 2)))[large].tolist()
        h, w = torch.minimum(target["size"], usual_target["size"]).tolist()
        differences.append(float((image[:, :h, :w].float() - usual_image[:, :h, :w].float()).abs().mean()))
    assert np.median(ious) > 0.95
    assert min(differences) == 0  # without a crop the pixels are the same
    assert max(differences) < 20  # with one they are shifted by a fraction of a pixel; mirrored, it would be 50
