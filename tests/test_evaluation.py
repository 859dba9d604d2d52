"""Evaluation against pycocotools called directly, on annotation files written here."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from stub_model import postprocess
from torch import Tensor, nn

from solq.data.transforms import EvalTransform
from solq.detections import Detections
from solq.evaluation import METRICS, CocoEvaluator, class_table, evaluate, load_ground_truth, table

H, W = 80, 120
CATEGORIES = [3, 7, 90]  # with gaps, as in COCO
# image id: (label, x0, y0, x1, y1) of its rectangles; small, medium and large ones
OBJECTS = {
    11: [(0, 5, 5, 25, 25), (1, 40, 10, 110, 70)],
    12: [(2, 0, 0, 119, 79), (0, 60, 30, 100, 62)],
    13: [],
    20: [(1, 10, 10, 60, 60), (1, 70, 10, 115, 60), (2, 20, 62, 40, 78)],
}


def polygon(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def annotation(number: int, image_id: int, label: int, *box: float) -> dict:
    x0, y0, x1, y1 = box
    return {
        "id": number,
        "image_id": image_id,
        "category_id": CATEGORIES[label],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
        "iscrowd": 0,
        "segmentation": polygon(*box),
    }


def dataset() -> dict:
    objects = [(image_id, *thing) for image_id, things in OBJECTS.items() for thing in things]
    return {
        "info": {},
        "licenses": [],
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": H, "width": W} for i in OBJECTS],
        "categories": [{"id": c, "name": n} for c, n in zip(CATEGORIES, ["cat", "dog", "kite"], strict=True)],
        "annotations": [annotation(number, *thing) for number, thing in enumerate(objects, start=1)],
    }


def write(folder: Path, content: object) -> Path:
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def rectangles(boxes: Tensor) -> Tensor:
    """Masks (K, H, W) of boxes with whole coordinates."""
    y, x = torch.arange(H)[:, None], torch.arange(W)
    x0, y0, x1, y1 = (side[:, None, None] for side in boxes.unbind(-1))
    return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def found(image_id: int, shift: int = 0) -> Detections:
    """The objects of an image, moved to the right."""
    things = OBJECTS[image_id]
    boxes = torch.tensor([box for _, *box in things], dtype=torch.float32).reshape(-1, 4)
    boxes += torch.tensor([shift, 0, shift, 0])
    labels = torch.tensor([label for label, *_ in things], dtype=torch.int64)
    return Detections(boxes, torch.linspace(0.9, 0.5, len(things)), labels, rectangles(boxes))


def evaluator_of(path: Path, shift: int = 0, **settings: bool) -> CocoEvaluator:
    evaluator = CocoEvaluator(path, CATEGORIES, **settings)
    evaluator.update(OBJECTS, [found(image_id, shift) for image_id in OBJECTS])
    return evaluator


def directly(path: Path, results: list[dict], iou_type: str) -> np.ndarray:
    """The twelve numbers by pycocotools alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def assert_is(metrics: dict[str, float], kind: str, stats: np.ndarray) -> None:
    np.testing.assert_allclose([metrics[f"{kind}/{name}"] for name in METRICS], stats, rtol=0, atol=1e-12)


def test_perfect_predictions_have_ap_1(tmp_path):
    metrics = evaluator_of(write(tmp_path, dataset()), boundary=True).summarize()
    assert set(metrics) == {f"{kind}/{name}" for kind in ("box", "mask", "boundary") for name in METRICS}
    for kind in ("box", "mask", "boundary"):
        for name in METRICS:
            if name not in ("AR1",):  # one detection per image cannot find two
                assert metrics[f"{kind}/{name}"] == pytest.approx(1), (kind, name)


@pytest.mark.parametrize("shift", [3, 8])
def test_shifted_predictions_have_the_values_of_pycocotools(tmp_path, shift):
    path = write(tmp_path, dataset())
    metrics = evaluator_of(path, shift).summarize()
    boxes, masks = [], []
    for image_id in OBJECTS:
        detections = found(image_id, shift)
        for (x0, y0, x1, y1), score, label, mask in zip(
            detections.boxes.tolist(),
            detections.scores.tolist(),
            detections.labels.tolist(),
            detections.masks,
            strict=True,
        ):
            entry = {"image_id": image_id, "category_id": CATEGORIES[label], "score": score}
            boxes.append(entry | {"bbox": [x0, y0, x1 - x0, y1 - y0]})
            masks.append(entry | {"segmentation": coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))})
    assert 0.1 < metrics["box/AP"] < 0.9
    assert_is(metrics, "box", directly(path, boxes, "bbox"))
    assert_is(metrics, "mask", directly(path, masks, "segm"))


def test_boundaries_are_judged_harder_than_masks(tmp_path):
    metrics = evaluator_of(write(tmp_path, dataset()), shift=2, boundary=True).summarize()
    assert 0 < metrics["boundary/AP"] < metrics["mask/AP"] < 1


def test_boundary_ap_against_boundaries_by_hand(tmp_path):
    """One large square moved by 2: IoU of the masks and of rings as wide as 2% of the diagonal, the lower counts."""
    side, shift = 60, 2
    truth = dataset() | {"annotations": [annotation(1, 11, 0, 10, 10, 10 + side, 10 + side)]}
    evaluator = CocoEvaluator(write(tmp_path, truth), CATEGORIES, boundary=True)
    box = torch.tensor([[10.0 + shift, 10, 10 + shift + side, 10 + side]])
    evaluator.update([11], [Detections(box, torch.ones(1), torch.zeros(1, dtype=torch.int64), rectangles(box))])

    def ring(x: int) -> set[tuple[int, int]]:
        width = round(0.02 * (H**2 + W**2) ** 0.5)
        outer = {(i, j) for i in range(10, 10 + side) for j in range(x, x + side)}
        return {(i, j) for i, j in outer if min(i - 10, 10 + side - 1 - i, j - x, x + side - 1 - j) < width}

    overlap = len(ring(10) & ring(10 + shift)) / len(ring(10) | ring(10 + shift))
    passed = sum(overlap >= threshold for threshold in np.linspace(0.5, 0.95, 10))
    assert 0 < passed < 10
    metrics = evaluator.summarize()
    assert metrics["boundary/AP"] == pytest.approx(passed / 10)
    assert metrics["mask/AP"] > metrics["boundary/AP"]


def test_results_are_what_loadres_takes(tmp_path):
    path = write(tmp_path, dataset())
    evaluator = evaluator_of(path, shift=5)
    (tmp_path / "results.json").write_text(json.dumps(evaluator.results()))
    results = json.loads((tmp_path / "results.json").read_text())
    assert {entry["category_id"] for entry in results} == set(CATEGORIES)
    first = results[0]
    assert set(first) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert (first["image_id"], first["category_id"], first["bbox"]) == (11, 3, [10.0, 5.0, 20.0, 20.0])
    assert isinstance(first["segmentation"]["counts"], str)
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(COCO(str(path)).loadRes(str(tmp_path / "results.json")).anns) == len(results)
    metrics = evaluator.summarize()
    assert_is(metrics, "box", directly(path, json.loads(json.dumps(results)), "bbox"))
    assert json.loads(json.dumps(evaluator.results())) == results, "summarize changed the results"


def test_an_image_seen_twice_counts_once(tmp_path):
    evaluator = evaluator_of(write(tmp_path, dataset()))
    before = evaluator.results()
    evaluator.update([11], [found(11)])
    assert evaluator.results() == before


def test_objects_of_unseen_images_are_missed(tmp_path):
    path = write(tmp_path, dataset())
    evaluator = CocoEvaluator(path, CATEGORIES)
    evaluator.update([11, 13], [found(11), found(13)])
    results = [{key: value for key, value in entry.items() if key != "bbox"} for entry in evaluator.results()]
    assert_is(evaluator.summarize(), "mask", directly(path, results, "segm"))
    assert evaluator.summarize()["mask/AP"] < 0.7


def test_no_detections(tmp_path):
    evaluator = CocoEvaluator(write(tmp_path, dataset()), CATEGORIES, boundary=True)
    assert evaluator.summarize()["box/AP"] == 0
    nothing = found(13)
    evaluator.update(OBJECTS, [nothing] * len(OBJECTS))
    metrics = evaluator.summarize()
    assert {metrics[f"{kind}/{name}"] for kind in ("box", "mask", "boundary") for name in METRICS} == {0.0}
    assert evaluator.results() == []


def test_no_annotations_is_not_a_number_of_any_kind(tmp_path):
    metrics = evaluator_of(write(tmp_path, dataset() | {"annotations": []}), boundary=True).summarize(per_class=True)
    assert set(metrics.values()) == {-1.0}
    console = Console(file=io.StringIO(), width=100)
    console.print(table(metrics))
    console.print(class_table(metrics))
    shown = console.file.getvalue()
    assert "n/a" in shown
    assert "-1" not in shown


def test_no_masks_leaves_box_numbers(tmp_path):
    evaluator = CocoEvaluator(write(tmp_path, dataset()), CATEGORIES)
    for image_id in OBJECTS:
        boxes_only = found(image_id)
        boxes_only.masks = None
        evaluator.update([image_id], [boxes_only])
    metrics = evaluator.summarize()
    assert metrics["box/AP"] == pytest.approx(1)
    assert not any(key.startswith("mask") for key in metrics)


def test_crowds_are_neither_missed_nor_found(tmp_path):
    """A crowd takes any number of detections, which count neither for nor against; a file may give it as runs."""
    truth = dataset()
    crowd = {
        "id": 100,
        "image_id": 13,
        "category_id": CATEGORIES[0],
        "iscrowd": 1,
        "area": H * W // 2,
        "bbox": [0, 0, W // 2, H],
        "segmentation": {"size": [H, W], "counts": [0, H * W // 2, H * W // 2]},
    }
    truth["annotations"].append(crowd)
    path = write(tmp_path, truth)
    assert evaluator_of(path).summarize()["mask/AP"] == pytest.approx(1), "the crowd was counted as missed"

    evaluator = CocoEvaluator(path, CATEGORIES)
    evaluator.update([i for i in OBJECTS if i != 13], [found(i) for i in OBJECTS if i != 13])
    inside = torch.tensor([[2.0, 2, 30, 30], [10, 30, 50, 70]])
    evaluator.update([13], [Detections(inside, torch.tensor([0.99, 0.98]), torch.zeros(2).long(), rectangles(inside))])
    metrics = evaluator.summarize()
    assert metrics["mask/AP"] == pytest.approx(1)
    assert metrics["box/AP"] == pytest.approx(1)


def test_missing_keys_are_filled_in(tmp_path):
    whole = evaluator_of(write(tmp_path, dataset()), shift=4, boundary=True).summarize()
    bare = dataset()
    del bare["info"], bare["licenses"]
    for entry in bare["annotations"]:
        del entry["iscrowd"], entry["area"], entry["id"]
    assert evaluator_of(write(tmp_path, bare), shift=4, boundary=True).summarize() == whole


def test_annotation_ids_of_zero_and_duplicates_do_not_matter(tmp_path):
    for ids in (lambda n: n, lambda n: 5):
        truth = dataset()
        for number, entry in enumerate(truth["annotations"]):
            entry["id"] = ids(number)
        metrics = evaluator_of(write(tmp_path, truth)).summarize()
        assert metrics["box/AP"] == pytest.approx(1)
        assert metrics["mask/AP"] == pytest.approx(1)


def test_segmentations_of_every_kind_are_the_same_masks(tmp_path):
    truth = dataset()
    for number, entry in enumerate(truth["annotations"]):
        rle = coco_mask.merge(coco_mask.frPyObjects(entry["segmentation"], H, W))
        pixels = coco_mask.decode(rle).ravel(order="F")
        ends = np.flatnonzero(np.diff(pixels, prepend=0)).tolist()
        if number % 3 == 1:
            entry["segmentation"] = {"size": [H, W], "counts": rle["counts"].decode()}
        elif number % 3 == 2:
            entry["segmentation"] = {"size": [H, W], "counts": np.diff([0, *ends, H * W]).tolist()}
        else:
            entry["segmentation"].append([1, 1, 2, 2])  # a polygon of two points is no polygon
    metrics = evaluator_of(write(tmp_path, truth)).summarize()
    assert metrics["mask/AP"] == pytest.approx(1)


def test_objects_without_a_mask_count_for_boxes_only(tmp_path):
    truth = dataset()
    truth["annotations"][0]["segmentation"] = []
    loaded = load_ground_truth(write(tmp_path, truth))
    assert "segmentation" not in loaded["annotations"][0]
    evaluator = CocoEvaluator(write(tmp_path, truth), CATEGORIES)
    evaluator.update([12, 20], [found(12), found(20)])
    metrics = evaluator.summarize(per_class=True)
    assert metrics["mask/AP/cat"] == pytest.approx(1)
    assert metrics["box/AP/cat"] < 0.6


def test_annotations_with_neither_box_nor_mask_are_reported(tmp_path, caplog):
    truth = dataset()
    truth["annotations"][1] |= {"bbox": [], "segmentation": [[1, 2]]}
    loaded = load_ground_truth(write(tmp_path, truth))
    assert len(loaded["annotations"]) == len(truth["annotations"]) - 1
    assert "1 annotations have neither box nor mask (ids [2]" in caplog.text


def test_a_missing_box_is_that_of_the_mask(tmp_path):
    truth = dataset()
    for entry in truth["annotations"]:
        entry["bbox"] = []
    assert evaluator_of(write(tmp_path, truth)).summarize()["box/AP"] == pytest.approx(1)


def test_average_precision_per_class(tmp_path):
    path = write(tmp_path, dataset())
    evaluator = CocoEvaluator(path, CATEGORIES, boundary=True)
    moved = {0: 0, 1: 2, 2: 400}  # by label: cats in place, dogs a bit off, kites nowhere
    for image_id in OBJECTS:
        detections = found(image_id)
        for box, label in zip(detections.boxes, detections.labels.tolist(), strict=True):
            box[[0, 2]] += moved[label]
        detections.masks = rectangles(detections.boxes)
        evaluator.update([image_id], [detections])
    metrics = evaluator.summarize(per_class=True)
    for kind in ("box", "mask", "boundary"):
        assert metrics[f"{kind}/AP/cat"] == pytest.approx(1)
        assert 0 < metrics[f"{kind}/AP/dog"] < 1
        assert metrics[f"{kind}/AP/kite"] == 0
        mean = np.mean([metrics[f"{kind}/AP/{name}"] for name in ("cat", "dog", "kite")])
        assert metrics[f"{kind}/AP"] == pytest.approx(mean)
    console = Console(file=io.StringIO(), width=100)
    console.print(class_table(metrics))
    assert "kite" in console.file.getvalue()


def test_the_table_has_the_twelve_numbers(tmp_path):
    metrics = evaluator_of(write(tmp_path, dataset()), shift=3).summarize()
    console = Console(file=io.StringIO(), width=100)
    console.print(table(metrics))
    shown = console.file.getvalue()
    assert f"{metrics['box/AP']:.3f}" in shown
    assert f"{metrics['mask/ARl']:.3f}" in shown
    assert "boundary" not in shown
    assert len(table(metrics).rows) == 12


def test_unknown_images_and_labels_are_named(tmp_path):
    evaluator = CocoEvaluator(write(tmp_path, dataset()), CATEGORIES)
    with pytest.raises(ValueError, match="image 99 is not in"):
        evaluator.update([99], [found(11)])
    wrong = found(11)
    wrong.labels[0] = 3
    with pytest.raises(ValueError, match="label 3 but there are 3 categories"):
        evaluator.update([11], [wrong])


def test_annotation_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.json is missing"):
        CocoEvaluator(tmp_path / "nowhere.json", CATEGORIES)
    for content in ([1, 2], {"images": []}):
        with pytest.raises(ValueError, match=r"annotations.json is not in COCO's format"):
            CocoEvaluator(write(tmp_path, content), CATEGORIES)
    (tmp_path / "annotations.json").write_text("{")
    with pytest.raises(ValueError, match=r"annotations.json is not JSON"):
        CocoEvaluator(tmp_path / "annotations.json", CATEGORIES)
    stray = dataset()
    stray["annotations"][1]["image_id"] = 99
    with pytest.raises(ValueError, match=r"annotations.json: annotation 2 is of image 99, which is not among"):
        CocoEvaluator(write(tmp_path, stray), CATEGORIES)


class Oracle(nn.Module):
    """Answers with the objects of the images that it is asked about, in turn; remembers how it was called."""

    def __init__(self, image_ids: list[int]) -> None:
        super().__init__()
        self.answers = iter(image_ids)
        self.calls: list[tuple[torch.dtype, bool, torch.dtype]] = []
        self.linear = nn.Linear(1, 1)

    def forward(self, images: Tensor, padding_mask: Tensor, last_layer_only: bool) -> dict[str, Tensor]:
        assert images.shape[2:] == padding_mask.shape[1:]
        assert not images[padding_mask[:, None].expand_as(images)].any()
        self.calls.append((images.dtype, self.training, self.linear(images.new_zeros(1)).dtype))
        B, Q = len(images), 4
        logits, boxes = torch.full((B, Q, 3), -9.0), torch.full((B, Q, 4), 0.5)
        for image in range(B):
            truth = found(next(self.answers))
            for query, (box, score, label) in enumerate(zip(truth.boxes, truth.scores, truth.labels, strict=True)):
                logits[image, query, label] = score.logit()
                x0, y0, x1, y1 = (box / torch.tensor([W, H, W, H])).tolist()
                boxes[image, query] = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
        return {"pred_logits": logits, "pred_boxes": boxes}

    def postprocess(self, outputs: dict, orig_sizes: Tensor, run_lengths: bool) -> list[Detections]:
        assert run_lengths
        return postprocess(outputs, orig_sizes, lambda outputs, i, q, boxes, size: rectangles(boxes.round()))


def sample(image_id: int, size: tuple[int, int]) -> tuple[Tensor, dict]:
    """An image as the data set gives it, resized to `size`."""
    target = {
        "labels": torch.zeros(0, dtype=torch.int64),
        "boxes": torch.zeros(0, 4),
        "masks": torch.zeros(0, 128, 128, dtype=torch.uint8),
        "image_id": image_id,
        "orig_size": (H, W),
        "size": size,
    }
    return torch.full((3, *size), 200, dtype=torch.uint8), target


class Samples(list):
    """A dataset of given samples, None for a damaged image, that evaluation pads to 64×96."""

    transform = EvalTransform(64, 96)
    coco_json, images = Path("annotations.json"), Path("val2017")


def run_evaluation(model: nn.Module, samples: Samples, evaluator: CocoEvaluator, dtype: torch.dtype) -> None:
    evaluate(model, samples, evaluator, torch.device("cpu"), dtype, batch_size=2, workers=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loop_scores_an_oracle_with_1(tmp_path, dtype):
    first, last = [sample(11, (40, 60)), sample(12, (64, 96))], [sample(13, (64, 96)), None, sample(20, (32, 48))]
    evaluator = CocoEvaluator(write(tmp_path, dataset()), CATEGORIES, boundary=True)
    model = Oracle(list(OBJECTS)).train()
    run_evaluation(model, Samples([*first, None, None, *last]), evaluator, dtype)
    assert model.calls == [(torch.float32, False, dtype)] * 3, "no call for two damaged images"
    assert model.training
    metrics = evaluator.summarize()
    assert [metrics[f"{kind}/AP"] for kind in ("box", "mask", "boundary")] == pytest.approx([1, 1, 1])


def test_damaged_images_alone_cannot_be_evaluated(tmp_path):
    evaluator = CocoEvaluator(write(tmp_path, dataset()), CATEGORIES)
    with pytest.raises(ValueError, match=r"no image of annotations.json can be read: restore the files in val2017"):
        run_evaluation(Oracle([]), Samples([None]), evaluator, torch.float32)


def test_two_processes_count_every_image_once(tmp_path):
    """Process 0 sees images 11, 12, 13 and process 1 sees 20, 11: the sampler repeated one to even them out."""
    path = write(tmp_path, dataset())
    torch.multiprocessing.spawn(_one_of_two_processes, (path, tmp_path), nprocs=2)
    alone = evaluator_of(path, shift=5)
    for rank in range(2):
        assert json.loads((tmp_path / f"results{rank}.json").read_text()) == alone.results()
        assert json.loads((tmp_path / f"metrics{rank}.json").read_text()) == alone.summarize()


def _one_of_two_processes(rank: int, path: Path, folder: Path) -> None:
    store = torch.distributed.FileStore(str(folder / "rendezvous"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    evaluator = CocoEvaluator(path, CATEGORIES)
    for image_id in ([11, 12, 13], [20, 11])[rank]:
        evaluator.update([image_id], [found(image_id, shift=5)])
    evaluator.gather()
    (folder / f"results{rank}.json").write_text(json.dumps(evaluator.results()))
    (folder / f"metrics{rank}.json").write_text(json.dumps(evaluator.summarize()))
    torch.distributed.destroy_process_group()
