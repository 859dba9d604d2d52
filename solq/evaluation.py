"""Detections to COCO's average precision and recall, of boxes, masks and boundaries.

Box and mask numbers come from pycocotools, Boundary AP (Cheng et al. 2021; the SOLQ paper's Table 4) from
faster-coco-eval.
"""

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.table import Table
from torchvision.ops import box_convert

from solq.data.batch import Batch, normalize
from solq.data.coco import read_segmentation
from solq.detections import Detections
from solq.models.base import InstanceSegmenter

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
    """Gathers detections image by image, then scores them against an annotation file in COCO's format.

    Args:
        annotations: the file. Missing `info`, `licenses`, `iscrowd` and `area` are filled in; segmentations may be
            polygons, compressed or uncompressed run lengths.
        category_ids: the file's category of each of the model's labels.
        boundary: score boundaries too.
    """

    def __init__(self, annotations: Path, category_ids: Sequence[int], boundary: bool = False) -> None:
        self.dataset = load_ground_truth(Path(annotations))
        self.category_ids = list(category_ids)
        self.boundary = boundary
        self._image_ids = {image["id"] for image in self.dataset["images"]}
        self._results: dict[int, list[dict[str, Any]]] = {}

    def update(self, image_ids: Iterable[int], detections: Iterable[Detections]) -> None:
        """Keep the detections of these images as run lengths; an image that was already seen is left as it is."""
        for image_id, of_image in zip(map(int, image_ids), detections, strict=True):
            if image_id not in self._image_ids:
                raise ValueError(f"image {image_id} is not in the annotation file that it is to be scored against")
            if image_id not in self._results:
                self._results[image_id] = of_image.to_coco(image_id, self.category_ids)

    @property
    def image_ids(self) -> list[int]:
        """The images that were seen, in rising order."""
        return sorted(self._results)

    def gather(self) -> None:
        """Give every process of the group the detections of all, an image of several processes once."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        of_process: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_process, self._results)
        self._results = {}
        for results in of_process:
            for image_id, of_image in results.items():
                self._results.setdefault(image_id, of_image)

    def results(self) -> list[dict[str, Any]]:
        """All detections in the format that COCO's test server takes, by image."""
        return [entry for image_id in self.image_ids for entry in self._results[image_id]]

    def ground_truth(self, image_id: int) -> Detections:
        """The objects of an image as detections of score 1, without crowds."""
        annotations = self.dataset["annotations"]
        return self._as_detections(a for a in annotations if a["image_id"] == image_id and not a["iscrowd"])

    def predictions(self, image_id: int) -> Detections:
        """What `update` was given for an image, on the CPU."""
        return self._as_detections(self._results[image_id])

    def _as_detections(self, entries: Iterable[dict[str, Any]]) -> Detections:
        label_of = {category: label for label, category in enumerate(self.category_ids)}
        entries = [entry for entry in entries if entry["category_id"] in label_of]
        boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32).reshape(-1, 4)
        masks = None
        if entries and all("segmentation" in entry for entry in entries):
            masks = (
                torch.from_numpy(coco_mask.decode([entry["segmentation"] for entry in entries])).permute(2, 0, 1).bool()
            )
        return Detections(
            box_convert(boxes, "xywh", "xyxy"),
            torch.tensor([entry.get("score", 1.0) for entry in entries]),
            torch.tensor([label_of[entry["category_id"]] for entry in entries], dtype=torch.int64),
            masks,
        )

    def save(self, path: Path) -> None:
        """Write :meth:`results` as JSON; the file is there whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(json.dumps(self.results()))
        unfinished.replace(path)

    def summarize(self, only_seen_images: bool = False, per_class: bool = False) -> dict[str, float]:
        """COCO's twelve numbers as "box/AP", "box/AP50", … "mask/ARl", and "boundary/…" if asked for.

        A number that is not defined, such as the AP of small objects where there are none, is -1 as in pycocotools.
        Masks are left out where the detections have none.

        Args:
            only_seen_images: score the images passed to `update` alone; otherwise the objects of all other images of
                the file count as missed.
            per_class: add "box/AP/<class name>" and so on for every category.
        """
        results = self.results()
        kinds = ["box"]
        if all("segmentation" in entry for entry in results):
            kinds += ["mask", "boundary"] if self.boundary else ["mask"]
        metrics: dict[str, float] = {}
        for kind in kinds:
            evaluation = _evaluate(self.dataset, results, kind, self.image_ids if only_seen_images else None)
            metrics |= {f"{kind}/{name}": float(value) for name, value in zip(METRICS, evaluation.stats, strict=False)}
            if per_class:
                metrics |= {f"{kind}/AP/{name}": ap for name, ap in _average_precisions(evaluation).items()}
        return metrics


def evaluate(
    model: InstanceSegmenter,
    loader: Iterable[Batch | None],
    evaluator: CocoEvaluator,
    device: torch.device,
    *,
    autocast_dtype: torch.dtype | None = None,
    top_k: int = 100,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Run `model` over `loader` and pass its detections to `evaluator`, gathered over all processes.

    Args:
        model: takes images (B, 3, H, W) and padding_mask (B, H, W); its `postprocess` makes detections of the
            outputs. Not wrapped in DistributedDataParallel: processes may have different numbers of batches.
        autocast_dtype: of the model's forward; None computes in the type of its weights.
        top_k: detections kept per image.
        progress: called after every batch with the number of its images.
    """
    was_training = model.training
    model.eval()
    try:
        for batch in loader:
            if batch is None:  # all of its images were damaged
                continue
            images = batch.images.to(device, non_blocking=True)
            padding_mask = batch.padding_mask.to(device, non_blocking=True)
            with (
                torch.inference_mode(),
                torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None),
            ):
                outputs = model(normalize(images, padding_mask), padding_mask, last_layer_only=True)
            detections = model.postprocess(outputs, batch.targets.orig_sizes, top_k, run_lengths=True)
            evaluator.update(batch.targets.image_ids.tolist(), detections)
            if progress is not None:
                progress(len(detections))
    finally:
        model.train(was_training)
    evaluator.gather()


def table(metrics: dict[str, float]) -> Table:
    """The twelve COCO numbers, a column for each of boxes, masks and boundaries that `metrics` has."""
    kinds = [kind for kind in IOU_TYPES if f"{kind}/AP" in metrics]
    rows = Table("", *kinds, title="COCO evaluation")
    for name, meaning in METRICS.items():
        rows.add_row(meaning, *(_shown(metrics[f"{kind}/{name}"]) for kind in kinds))
    return _numbers_right(rows)


def class_table(metrics: dict[str, float]) -> Table:
    """The AP of every class, from the metrics of `summarize(per_class=True)`."""
    kinds = [kind for kind in IOU_TYPES if f"{kind}/AP" in metrics]
    rows = Table("class", *kinds, title="AP, IoU 0.50:0.95")
    for name in [key.removeprefix("box/AP/") for key in metrics if key.startswith("box/AP/")]:
        rows.add_row(name, *(_shown(metrics[f"{kind}/AP/{name}"]) for kind in kinds))
    return _numbers_right(rows)


def _shown(value: float) -> str:
    return "n/a" if value < 0 else f"{value:.3f}"


def _numbers_right(rows: Table) -> Table:
    for column in rows.columns[1:]:
        column.justify = "right"
    return rows


def load_ground_truth(path: Path) -> dict[str, Any]:
    """The annotation file with what pycocotools needs: every key there, segmentations as compressed run lengths.

    Annotations get new ids, from 1: pycocotools takes the id 0 for "not matched", and an id that two annotations
    share for one annotation. An annotation without a usable segmentation counts for boxes only.
    """
    try:
        file = json.loads(path.read_bytes())
        images = {image["id"]: image for image in file["images"]}
        annotations, categories = file["annotations"], file["categories"]
    except OSError as error:
        raise OSError(f"cannot read the annotation file {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not an annotation file in COCO's format (JSON with images, annotations, categories): {error!r}"
        ) from error

    filled: list[dict[str, Any]] = []
    unusable: list[Any] = []
    for annotation in annotations:
        number, image_id = annotation.get("id"), annotation.get("image_id")
        if image_id not in images:
            raise ValueError(
                f"{path}: annotation {number} is of image {image_id}, which is not among images: "
                "add the image or remove the annotation"
            )
        entry = _filled(annotation, images[image_id])
        if entry is None:
            unusable.append(number)
        else:
            filled.append(entry | {"id": len(filled) + 1})
    if unusable:
        logger.warning("%s: %d annotations have neither box nor mask (ids %s …)", path, len(unusable), unusable[:3])
    return {"info": {}, "licenses": [], **file, "categories": categories, "annotations": filled}


def _filled(annotation: dict[str, Any], image: dict[str, Any]) -> dict[str, Any] | None:
    """The annotation with the segmentation as run lengths and `iscrowd`, `bbox` and `area` filled in."""
    H, W = image["height"], image["width"]
    filled = {"iscrowd": 0, **annotation}
    segmentation = filled.pop("segmentation", None)
    with contextlib.suppress(ValueError):  # the data set says which segmentations are unusable, and why
        shape = read_segmentation(segmentation, H, W)
        rle = {"size": [H, W], "counts": shape} if isinstance(shape, bytes) else _union(shape, H, W)
        filled["segmentation"] = rle
        filled["bbox"] = filled.get("bbox") or coco_mask.toBbox(rle).tolist()
        filled.setdefault("area", float(coco_mask.area(rle)))
    try:
        _, _, width, height = map(float, filled["bbox"])
    except (KeyError, TypeError, ValueError):
        return None
    filled.setdefault("area", width * height)
    return filled


def _union(polygons: list[Sequence[float]], height: int, width: int) -> dict[str, Any]:
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


def _evaluate(
    dataset: dict[str, Any], results: list[dict[str, Any]], kind: str, image_ids: list[int] | None
) -> COCOeval:
    """The finished evaluation of pycocotools, or of faster-coco-eval for boundaries."""
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

    with contextlib.redirect_stdout(io.StringIO()):  # progress of the libraries
        # Both libraries write keys into the entries that they are given, so they get copies.
        truth = _indexed(Index, {**dataset, "annotations": [dict(annotation) for annotation in annotations]})
        found = _indexed(Index, {**dataset, "annotations": []})
        if results:  # pycocotools fails on none
            found = truth.loadRes([dict(entry) for entry in results])
        evaluation = Evaluation(truth, found, iou_type)
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _indexed(index_type: type, dataset: dict[str, Any]) -> Any:
    index = index_type()
    index.dataset = dataset
    index.createIndex()
    return index


def _average_precisions(evaluation: COCOeval) -> dict[str, float]:
    """AP of every category by its name, -1 where it has no object."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU thresholds, recalls, categories
    names = [evaluation.cocoGt.cats[category]["name"] for category in evaluation.params.catIds]
    defined = [precision[:, :, k][precision[:, :, k] > -1] for k in range(len(names))]
    return {name: float(values.mean()) if values.size else -1.0 for name, values in zip(names, defined, strict=True)}
