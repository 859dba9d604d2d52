"""`solq predict`: files to pictures of what a model found in them, and to a list of results in COCO's format."""

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torchvision.transforms.v2.functional import pil_to_tensor

from solq.data.video import VideoWriter, is_video, read_video
from solq.predictor import Prediction, Predictor, ahead, folder_images, is_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class PredictConfig:
    """Find the objects of images and videos; write pictures of them, and results.json in COCO's format."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A file of solq.save, of train.py, or an official SOLQ checkpoint."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Images, folders of images, videos, or `webcam` (`webcam:1` for the second one; Ctrl-C ends it)."""
    output: Path = Path("predictions")
    """Folder to write to."""
    threshold: float = 0.4
    """Least score of an object; give 0 for results that are to be scored."""
    top_k: int = 100
    """Most objects of an image."""
    class_names: Path | None = None
    """Text file with the name of each class on a line, instead of the names in the checkpoint."""
    size: int | None = None
    """Length of the shorter image side in the model; as in training unless given."""
    max_size: int | None = None
    """Bound of the longer side; as in training unless given."""
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Lower than float32 is automatic mixed precision."""
    compile: bool = False
    """Compile the model first, which pays for many images."""
    batch_size: int | None = None
    """Most images computed at once; 8 on a GPU, 1 on a CPU unless given."""
    workers: int = 4
    """Threads that read and write images."""


@dataclass
class _Found:
    """What is shown at the end, and the entries of results.json."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    failed: int = 0

    def add(self, prediction: Prediction, image_id: int, labels: dict[str, Any]) -> None:
        assert prediction.detections is not None
        self.frames += 1
        self.classes.update(prediction.detections.class_names)
        self.entries += [entry | labels for entry in prediction.detections.to_coco(image_id)]

    def report_error(self, message: object) -> None:
        self.failed += 1
        print(f"error: {message}", file=sys.stderr)


def predict(config: PredictConfig) -> None:
    """Predict on all files. What cannot be used is reported in a line each, and ends the program with status 1.

    Raises:
        OSError, ValueError: the checkpoint, the class names or the output folder cannot be used.
        ImportError: a video is given but OpenCV is not installed.
    """
    console = Console()
    if not config.images:
        raise ValueError("no images are given: name files or folders")
    found = _Found()
    images, videos = [], []
    for path in config.images:
        if is_video(path):
            videos.append(path)
        elif is_folder(path):
            try:
                images += folder_images(path)
            except ValueError as error:
                found.report_error(error)
        else:
            images.append(path)
    if config.output.resolve() in {path.resolve().parent for path in (*images, *videos)}:
        raise ValueError(f"{config.output} holds images that are to be predicted on: give --output another folder")
    predictor = Predictor(
        config.checkpoint,
        device=config.device,
        dtype=DTYPES[config.dtype],
        compile=config.compile,
        class_names=None if config.class_names is None else read_lines(config.class_names),
        size=config.size,
        max_size=config.max_size,
        batch_size=config.batch_size,
        workers=config.workers,
    )
    config.output.mkdir(parents=True, exist_ok=True)

    clock = time.perf_counter()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console) as progress:
        _predict_images(predictor, images, config, found, progress)
        for video, name in zip(videos, output_names(videos, ".mp4"), strict=True):
            try:
                _predict_video(predictor, video, name, config, found, progress)
            except (OSError, ValueError) as error:
                found.report_error(error)
    seconds = time.perf_counter() - clock

    results = config.output / "results.json"
    results.write_text(json.dumps(found.entries))
    if found.classes:
        console.print(class_counts(found.classes))
    elif found.frames:
        console.print(f"nothing has a score of {config.threshold} or more: lower --threshold to see more")
    console.print(
        f"{found.classes.total()} objects in {found.frames} images, {found.frames / seconds:.2f} images per second"
    )
    console.print(f"pictures and {results.name} are in {config.output}", soft_wrap=True)
    if found.failed:
        print(f"error: {found.failed} of the files given could not be used, see above", file=sys.stderr)
        raise SystemExit(1)


def _predict_images(
    predictor: Predictor, images: list[Path], config: PredictConfig, found: _Found, progress: Progress
) -> None:
    """Write a picture of each image; reading, computing and writing go on at the same time."""
    pictures = output_names(images, ".jpg")
    ids = image_ids(images)

    def write(numbered: tuple[int, Prediction]) -> tuple[int, Prediction]:
        index, prediction = numbered
        if prediction.detections is not None:
            prediction.detections.draw(prediction.image).save(config.output / pictures[index], quality=92)
            prediction.image = None
        return numbered

    task = progress.add_task("images", total=len(images), visible=bool(images))
    stream = enumerate(predictor.stream(images, threshold=config.threshold, top_k=config.top_k))
    with ThreadPoolExecutor(config.workers) as pool:
        for index, prediction in ahead(pool, write, stream, 2 * config.workers):
            if prediction.error is None:
                found.add(prediction, ids[index], {"file_name": images[index].name})
            else:
                found.report_error(prediction.error)
            progress.advance(task)


def _predict_video(
    predictor: Predictor, video: Path, name: str, config: PredictConfig, found: _Found, progress: Progress
) -> None:
    """Write a video with the objects of each frame, whose results have the number of the frame as image id."""
    source = read_video(video)
    task = progress.add_task(video.name, total=source.num_frames)
    with VideoWriter(config.output / name, source.frames_per_second) as writer:
        try:
            stream = predictor.stream(source.frames, threshold=config.threshold, top_k=config.top_k)
            for frame, prediction in enumerate(stream):
                assert prediction.detections is not None
                writer.write(pil_to_tensor(prediction.detections.draw(prediction.image)))
                found.add(prediction, frame, {"file_name": video.name})
                progress.advance(task)
        except KeyboardInterrupt:  # how a webcam is ended: what was seen so far is kept
            return


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: write the name of each class on a line") from error


def output_names(files: Sequence[Path], ending: str) -> list[str]:
    """A name in the output folder for each file, its own where no other file has it."""
    names: dict[str, None] = {}
    for file in files:
        stem, number = file.stem.replace(":", ""), 1  # of `webcam:1`
        while (name := f"{stem}{ending}" if number == 1 else f"{stem}-{number}{ending}") in names:
            number += 1
        names[name] = None
    return list(names)


def image_ids(images: Sequence[Path]) -> list[int]:
    """COCO's ids from the names of the files if all are numbers, as COCO's are, else 1, 2, 3, …"""
    stems = [image.stem for image in images]
    if all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        return [int(stem) for stem in stems]
    return list(range(1, len(images) + 1))


def class_counts(classes: Counter[str]) -> Table:
    """How often each class was found."""
    table = Table("class", "found")
    table.columns[1].justify = "right"
    for name, count in classes.most_common():
        table.add_row(name, str(count))
    return table
