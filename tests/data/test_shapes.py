import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from solq.data.coco import CocoDataset
from solq.data.shapes import CLASS_NAMES, SETTINGS_FILE, describe_mask, draw_image, generate, trace_contours
from solq.data.transforms import EvalTransform


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes") / "data"
    generate(root, seed=1, num_train=60, num_val=20, image_size=96)
    return root


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_layout_and_fields(root: Path):
    seen: Counter[str] = Counter()
    for split, count in (("train", 60), ("val", 20)):
        content = json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())
        assert len(content["images"]) == len(list((root / f"{split}2017").iterdir())) == count
        assert [category["name"] for category in content["categories"]] == list(CLASS_NAMES)
        coco = COCO(str(root / "annotations" / f"instances_{split}2017.json"))
        for image in content["images"]:
            assert Image.open(root / f"{split}2017" / image["file_name"]).size == (96, 96)
            annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
            assert 1 <= len(annotations) <= 6
            masks = np.stack([coco.annToMask(annotation) for annotation in annotations])
            assert masks.sum(0).max() <= 1, "visible parts must not overlap"
            for annotation, mask in zip(annotations, masks, strict=True):
                ys, xs = np.nonzero(mask)
                assert annotation["iscrowd"] == 0
                assert annotation["area"] == mask.sum() > 0
                assert annotation["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
                segmentation = annotation["segmentation"]
                written = "polygons" if isinstance(segmentation, list) else type(segmentation["counts"]).__name__
                seen[written] += 1
                seen[coco.cats[annotation["category_id"]]["name"]] += 1
                if written == "polygons":
                    seen["several polygons"] += len(segmentation) > 1
    assert all(seen[kind] for kind in (*CLASS_NAMES, "polygons", "several polygons", "str", "list")), seen


def test_instances_overlap_and_keep_a_good_part_in_sight():
    rng = np.random.default_rng(0)
    touching = 0
    for _ in range(20):
        _, instances = draw_image(rng, 96)
        for _, mask in instances:
            assert mask.sum() >= 40
        grown = [np.pad(mask, 1)[:-2, 1:-1] | mask for _, mask in instances]
        touching += any((a & b[1]).any() for k, a in enumerate(grown) for b in instances[k + 1 :])
    assert touching >= 5


def test_splits_share_no_image(root: Path):
    contents = list(digests(root).values())
    assert len(set(contents)) == len(contents)
    ids = [
        {image["id"] for image in json.loads(path.read_text())["images"]} for path in (root / "annotations").iterdir()
    ]
    assert not ids[0] & ids[1]


def test_the_seed_decides_everything(root: Path, tmp_path: Path):
    generate(tmp_path / "same", seed=1, num_train=60, num_val=20, image_size=96)
    assert digests(tmp_path / "same") == digests(root)
    generate(tmp_path / "other", seed=2, num_train=3, num_val=1, image_size=96)
    assert not set(digests(tmp_path / "other").values()) & set(digests(root).values())


def test_a_finished_folder_is_reused_and_another_one_replaced(tmp_path: Path):
    root = tmp_path / "deep" / "shapes"
    small = {"num_train": 2, "num_val": 1, "image_size": 64}
    generate(root, **small)
    written = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    generate(root, **small)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == written
    generate(root, **small | {"num_train": 3})
    assert len(list((root / "train2017").iterdir())) == 3
    assert [path.name for path in root.parent.iterdir()] == ["shapes"]


def test_an_interrupted_generation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("solq.data.shapes.describe_mask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(tmp_path / "shapes", num_train=2, num_val=1, image_size=64)
    assert list(tmp_path.iterdir()) == []
    generate(tmp_path / "shapes", num_train=2, num_val=1, image_size=64)
    assert (tmp_path / "shapes" / SETTINGS_FILE).is_file()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("all there is")
    with pytest.raises(ValueError, match="is not a shapes dataset: name another folder or remove it"):
        generate(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "all there is"


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32 - 1))
def test_contours_give_the_mask_again(seed: int):
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, 24, 2)
    mask = rng.random((h, w)) < rng.random()
    painted = np.zeros_like(mask)
    for contour in trace_contours(mask):  # by the even-odd rule, so holes too
        rle = coco_mask.frPyObjects([contour.ravel().tolist()], int(h), int(w))
        painted ^= coco_mask.decode(rle)[..., 0].astype(bool)
    assert (painted == mask).all()


@pytest.mark.parametrize("compressed", [False, True])
def test_masks_with_holes_are_written_as_rle(compressed: bool):
    mask = np.zeros((20, 30), bool)
    mask[2:12, 3:15] = True
    full = describe_mask(mask, compressed=compressed)
    assert len(full["segmentation"]) == 1
    assert len(full["segmentation"][0]) == 2 * 8  # a rectangle with its corners cut by half a pixel
    mask[5:8, 6:10] = False
    mask[0, 0] = True
    holed = describe_mask(mask, compressed=compressed)
    assert isinstance(holed["segmentation"]["counts"], str if compressed else list)
    rle = holed["segmentation"] if compressed else coco_mask.frPyObjects(holed["segmentation"], 20, 30)
    assert (coco_mask.decode(rle) == mask).all()
    assert holed["area"] == mask.sum()
    assert holed["bbox"] == [0, 0, 15, 12]


def test_nothing_is_lost_in_a_dataset(root: Path):
    for split in ("train", "val"):
        annotations = root / "annotations" / f"instances_{split}2017.json"
        dataset = CocoDataset(root / f"{split}2017", annotations, EvalTransform(96, 96), train=True)
        assert not dataset.dropped
        total = sum(len(dataset[index][1]["labels"]) for index in range(len(dataset)))
        assert total == len(json.loads(annotations.read_text())["annotations"])
        assert dataset.class_names == ["", *CLASS_NAMES]
