"""Score detections by COCO's average precision and recall of boxes, masks and boundaries.

Box and mask numbers come from pycocotools, Boundary AP (Cheng et al. 2021; the SOLQ paper's Table 4) from
faster-coco-eval.
"""

import contextlib
import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.table import Table
from torch.utils.data import Subset

from solq.data.annotations import no_garbage_collection, read_coco, read_segmentation
from solq.data.batch import normalize, padded_sizes
from solq.data.coco import CocoDataset
from solq.data.loader import make_loader
from solq.data.transforms import EvalTransform
from solq.detections import Detections, ModelMeta
from solq.models.base import InstanceSegmenter
from solq.progress import track

logger = logging.getLogger(__name__)

METRICS = {  # COCO's twelve numbers, in pycocotools' order
    "AP": "AP, IoU 0.50:0.95",
    "AP50": "AP, IoU 0.50",
    "AP75": "AP, IoU 0.75",
    "APs": "AP, small (area < 32²)",
    "APm": "AP, medium (32² to 96²)",
    "APl": "AP, large (area > 96²)",
    "AR1": "AR, 1 detection per image",
    "AR10": "AR, 10 detections per image",
    "AR100": "AR, 100 detections per image",
    "ARs": "AR, small",
    "ARm": "AR, medium",
    "ARl": "AR, large",
}
IOU_TYPES = {"box": "bbox", "mask": "segm", "boundary": "boundary"}


class CocoEvaluator:
    """Gather detections image by image, then score them against an annotation file in COCO's format.

    Args:
        annotations: the file. Missing `info`, `licenses`, `iscrowd` and `area` are filled in; segmentations may be
            polygons, compressed or uncompressed run lengths.
        category_ids: the file's category for each of the model's labels.
        boundary: score boundaries too.
    """

    def __init__(self, annotations: Path, category_ids: Sequence[int], boundary: bool = False) -> None:
        self.dataset = load_ground_truth(Path(annotations))
        self.category_ids = list(category_ids)
        self.boundary = boundary
        self._image_ids = {image["id"] for image in self.dataset["images"]}
        self._results: dict[int, list[dict[str, Any]]] = {}

    def update(self, image_ids: Iterable[int], detections: Iterable[Detections]) -> None:
        """Keep the detections of these images as run lengths; those of an image that was seen before are ignored."""
        for image_id, found in zip(map(int, image_ids), detections, strict=True):
            if image_id not in self._image_ids:
                raise ValueError(f"image {image_id} is not in the annotation file that it is to be scored against")
            if image_id not in self._results:
                self._results[image_id] = found.to_coco(image_id, self.category_ids)

    @property
    def image_ids(self) -> list[int]:
        """Ids of the images that were seen, in rising order."""
        return sorted(self._results)

    def gather(self) -> None:
        """Give every process of the group the detections of all; an image that several have seen counts once."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._results)
        self._results = {image_id: found for results in reversed(gathered) for image_id, found in results.items()}

    def results(self) -> list[dict[str, Any]]:
        """List all detections in the format that COCO's test server takes, sorted by image."""
        return [entry for image_id in self.image_ids for entry in self._results[image_id]]

    def ground_truth(self, image_id: int) -> Detections:
        """Return the objects of an image as detections of score 1, without crowds."""
        annotations = self.dataset["annotations"]
        return self._as_detections(a for a in annotations if a["image_id"] == image_id and not a["iscrowd"])

    def predictions(self, image_id: int) -> Detections:
        """Return the detections that `update` was given for an image, on the CPU."""
        return self._as_detections(self._results[image_id])

    def _as_detections(self, entries: Iterable[dict[str, Any]]) -> Detections:
        label_of = {category: label for label, category in enumerate(self.category_ids)}
        entries = [entry for entry in entries if entry["category_id"] in label_of]
        corners, extents = torch.tensor([e["bbox"] for e in entries], dtype=torch.float32).reshape(-1, 2, 2).unbind(1)
        masks = None
        if entries and all("segmentation" in entry for entry in entries):
            decoded = coco_mask.decode([entry["segmentation"] for entry in entries])
            masks = torch.from_numpy(decoded).permute(2, 0, 1).bool()
        names = {category["id"]: category["name"] for category in self.dataset["categories"]}
        return Detections(
            torch.cat([corners, corners + extents], dim=1),
            torch.tensor([entry.get("score", 1.0) for entry in entries]),
            torch.tensor([label_of[entry["category_id"]] for entry in entries], dtype=torch.int64),
            masks,
            ModelMeta([names.get(category, "") for category in self.category_ids], self.category_ids),
        )

    def summarize(self, per_class: bool = False) -> dict[str, float]:
        """Compute COCO's twelve numbers as "box/AP", "box/AP50", … "mask/ARl", and "boundary/…" if asked for.

        A number that is not defined, such as the AP of small objects where there are none, is -1 as in pycocotools.
        Masks are left out where the detections have none. Objects of images that were not passed to `update` count as
        missed. With `per_class`, "box/AP/<class name>" and so on are added for every category.
        """
        results = self.results()
        kinds = ["box"]
        if all("segmentation" in entry for entry in results):
            kinds += ["mask", "boundary"] if self.boundary else ["mask"]
        metrics: dict[str, float] = {}
        for kind in kinds:
            evaluation = _evaluate(self.dataset, results, kind)
            metrics |= {f"{kind}/{name}": float(value) for name, value in zip(METRICS, evaluation.stats, strict=False)}
            if per_class:
                metrics |= {f"{kind}/AP/{name}": ap for name, ap in _average_precisions(evaluation).items()}
        return metrics


def evaluate(
    model: InstanceSegmenter,
    dataset: CocoDataset,
    evaluator: CocoEvaluator,
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch_size: int,
    workers: int,
) -> None:
    """Run `model` over a dataset and pass its detections to `evaluator`, gathered over all processes of the group.

    Args:
        model: takes images (B, 3, H, W) and padding_mask (B, H, W); its `postprocess` makes detections of the
            outputs. Not wrapped in DistributedDataParallel: processes may have different numbers of batches.
        dataset: a dataset with an :class:`EvalTransform`; each process takes a part of its images.
        evaluator: gathers and scores the detections.
        device: the device of the model.
        dtype: float32, or bfloat16 or float16 for automatic mixed precision.
        batch_size: images of a batch in each process.
        workers: processes that load images, for each process.

    Raises:
        ValueError: no image can be read.
    """
    assert isinstance(dataset.transform, EvalTransform)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sizes = padded_sizes((dataset.transform.size,), dataset.transform.max_size)
    part = Subset(dataset, range(rank, len(dataset), world_size))
    loader = make_loader(part, sizes, workers, device, batch_size=batch_size)
    was_training = model.training
    model.eval()
    try:
        for batch in track(loader, "evaluation", len(loader), enabled=rank == 0):
            if batch is None:  # all of its images were damaged
                continue
            batch = batch.to(device)
            with (
                torch.inference_mode(),
                torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
            ):
                outputs = model(normalize(batch.images, batch.padding_mask), batch.padding_mask, last_layer_only=True)
            detections = model.postprocess(outputs, batch.targets.orig_sizes, run_lengths=True)
            evaluator.update(batch.targets.image_ids.tolist(), detections)
    finally:
        model.train(was_training)
    evaluator.gather()
    if not evaluator.image_ids:
        raise ValueError(f"no image of {dataset.coco_json} can be read: restore the files in {dataset.images}")


def table(metrics: dict[str, float]) -> Table:
    """Show the twelve COCO numbers, with a column for each of boxes, masks and boundaries that `metrics` has."""
    return _table(metrics, METRICS, Table("", title="COCO evaluation"))


def class_table(metrics: dict[str, float]) -> Table:
    """Show the AP of every class, from the metrics of `summarize(per_class=True)`."""
    keys = [key.removeprefix("box/") for key in metrics if key.startswith("box/AP/")]
    return _table(metrics, {key: key.removeprefix("AP/") for key in keys}, Table("class", title="AP, IoU 0.50:0.95"))


def _table(metrics: dict[str, float], names: dict[str, str], rows: Table) -> Table:
    """Add a column for each kind of metrics, and a row for each of `names`."""
    kinds = [kind for kind in IOU_TYPES if f"{kind}/AP" in metrics]
    for kind in kinds:
        rows.add_column(kind)
    for key, name in names.items():
        values = [metrics[f"{kind}/{key}"] for kind in kinds]
        rows.add_row(name, *("n/a" if value < 0 else f"{value:.3f}" for value in values))
    return numbers_right(rows)


def numbers_right(rows: Table) -> Table:
    """Align all columns but the first to the right."""
    for column in rows.columns[1:]:
        column.justify = "right"
    return rows


@no_garbage_collection()
def load_ground_truth(path: Path) -> dict[str, Any]:
    """Read an annotation file and add what pycocotools needs: every key, and segmentations as compressed run lengths.

    Annotations get new ids, from 1: pycocotools takes the id 0 for "not matched", and an id that two annotations
    share for one annotation. An annotation without a usable segmentation counts for boxes only.

    Raises:
        OSError, ValueError: see :func:`solq.data.annotations.read_coco`.
    """
    content = read_coco(path)
    images = {image["id"]: image for image in content["images"]}
    filled: list[dict[str, Any]] = []
    unusable: list[Any] = []
    for annotation in content["annotations"]:
        entry = _filled(annotation, images[annotation["image_id"]])
        if entry is None:
            unusable.append(annotation.get("id"))
        else:
            filled.append(entry | {"id": len(filled) + 1})
    if unusable:
        logger.warning("%s: %d annotations have neither box nor mask (ids %s …)", path, len(unusable), unusable[:3])
    return {"info": {}, "licenses": [], **content, "annotations": filled}


def _filled(annotation: dict[str, Any], image: dict[str, Any]) -> dict[str, Any] | None:
    """Complete an annotation: segmentation as run lengths, `iscrowd`, `bbox` and `area`; None without box and mask."""
    H, W = image["height"], image["width"]
    filled = {"iscrowd": 0, **annotation}
    segmentation = filled.pop("segmentation", None)
    with contextlib.suppress(ValueError):  # CocoDataset logs which segmentations are unusable, and why
        shape = read_segmentation(segmentation, H, W)
        if isinstance(shape, bytes):
            rle = {"size": [H, W], "counts": shape}
        else:
            rle = coco_mask.merge(coco_mask.frPyObjects(shape, H, W))
        filled["segmentation"] = rle
        filled["bbox"] = filled.get("bbox") or coco_mask.toBbox(rle).tolist()
        filled.setdefault("area", float(coco_mask.area(rle)))
    try:
        _, _, width, height = map(float, filled["bbox"])
    except (KeyError, TypeError, ValueError):
        return None
    filled.setdefault("area", width * height)
    return filled


def _evaluate(dataset: dict[str, Any], results: list[dict[str, Any]], kind: str) -> COCOeval:
    """Evaluate with pycocotools, or with faster-coco-eval for boundaries."""
    iou_type = IOU_TYPES[kind]
    annotations = dataset["annotations"]
    if kind != "box":
        annotations = [annotation for annotation in annotations if "segmentation" in annotation]
        # With a bbox in it, pycocotools would take the box's area for the mask's.
        results = [{key: value for key, value in entry.items() if key != "bbox"} for entry in results]
    if kind == "boundary":
        from faster_coco_eval import COCO as Index
        from faster_coco_eval import COCOeval_faster as Evaluation
    else:
        Index, Evaluation = COCO, COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # hides the progress of the libraries
        truth, found = Index(), Index()
        # Both libraries write keys into the given entries, so they get copies.
        for index, entries in ((truth, [dict(annotation) for annotation in annotations]), (found, [])):
            index.dataset = {**dataset, "annotations": entries}
            index.createIndex()
        if results:  # pycocotools fails on none
            found = truth.loadRes([dict(entry) for entry in results])
        evaluation = Evaluation(truth, found, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _average_precisions(evaluation: COCOeval) -> dict[str, float]:
    """Return the AP of every category by its name, -1 where it has no object."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU thresholds, recalls, categories
    names = [evaluation.cocoGt.cats[category]["name"] for category in evaluation.params.catIds]
    defined = [precision[:, :, k][precision[:, :, k] > -1] for k in range(len(names))]
    return {name: float(values.mean()) if values.size else -1.0 for name, values in zip(names, defined, strict=True)}
