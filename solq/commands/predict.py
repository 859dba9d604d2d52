"""`solq predict`: write pictures of the objects found in files, and results in COCO's format."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from solq.commands.settings import PredictConfig
from solq.data.image import folder_images, is_folder, rgb_pixels
from solq.data.video import is_video, read_video, write_video
from solq.devices import choose_device, choose_precision
from solq.evaluation import numbers_right
from solq.files import write_json
from solq.predictor import Prediction, Predictor, map_ahead
from solq.progress import console, say


@dataclass
class _Found:
    """Counts for the summary at the end, and the entries of results.json."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    failed: int = 0

    def add(self, prediction: Prediction, image_id: int, file: Path) -> None:
        if prediction.detections is None:
            return self.report_error(prediction.error)
        self.frames += 1
        self.classes.update(prediction.detections.class_names)
        self.entries += [entry | {"file_name": file.name} for entry in prediction.detections.to_coco(image_id)]

    def report_error(self, message: object) -> None:
        self.failed += 1
        print(f"error: {message}", file=sys.stderr)


def predict(config: PredictConfig) -> None:
    """Predict on all files; those that cannot be used are reported in a line each, and the status is then 1."""
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
    device = choose_device(config.device)
    precision = choose_precision(device, config.precision)
    say(f"device {device}, precision {precision}")
    predictor = Predictor(
        config.checkpoint,
        device=device,
        dtype=precision.dtype,
        compile=config.compile,
        class_names=None if config.class_names is None else read_lines(config.class_names),
        size=config.size,
        max_size=config.max_size,
        batch_size=config.batch_size,
        workers=config.workers,
    )
    config.output.mkdir(parents=True, exist_ok=True)

    clock = time.perf_counter()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        _predict_images(predictor, images, config, found, progress)
        for video, name in zip(videos, output_names(videos, ".mp4"), strict=True):
            try:
                _predict_video(predictor, video, name, config, found, progress)
            except (OSError, ValueError) as error:
                found.report_error(error)
    seconds = time.perf_counter() - clock

    write_json(config.output / "results.json", found.entries)
    if found.classes:
        counts = Table("class", "found")
        for name, count in found.classes.most_common():
            counts.add_row(name, str(count))
        console.print(numbers_right(counts))
    elif found.frames:
        console.print(f"nothing has a score of {config.threshold} or more: lower --threshold to see more")
    console.print(
        f"{found.classes.total()} objects in {found.frames} images, {found.frames / seconds:.2f} images per second"
    )
    console.print(f"pictures and results.json are in {config.output}", soft_wrap=True)
    if found.failed:
        print(f"error: {found.failed} of the files given could not be used, see above", file=sys.stderr)
        raise SystemExit(1)


def _predict_images(
    predictor: Predictor, images: list[Path], config: PredictConfig, found: _Found, progress: Progress
) -> None:
    """Write a picture of each image, while the next ones are read and computed."""
    pictures = output_names(images, ".jpg")
    ids = image_ids(images)

    def write(numbered: tuple[int, Prediction]) -> tuple[int, Prediction]:
        index, prediction = numbered
        if prediction.detections is not None and prediction.image is not None:
            prediction.detections.draw(prediction.image).save(config.output / pictures[index], quality=92)
            prediction.image = None
        return numbered

    task = progress.add_task("images", total=len(images), visible=bool(images))
    stream = enumerate(predictor.stream(images, threshold=config.threshold, top_k=config.top_k))
    with ThreadPoolExecutor(config.workers) as pool:
        for index, prediction in map_ahead(pool, write, stream, 2 * config.workers):
            found.add(prediction, ids[index], images[index])
            progress.advance(task)


def _predict_video(
    predictor: Predictor, video: Path, name: str, config: PredictConfig, found: _Found, progress: Progress
) -> None:
    """Write a video with the objects found in each frame; in the results, a frame's number is its image id."""
    source = read_video(video)
    task = progress.add_task(video.name, total=source.num_frames)
    with write_video(config.output / name, source.frames_per_second) as write:
        try:
            stream = predictor.stream(source.frames, threshold=config.threshold, top_k=config.top_k)
            for frame, prediction in enumerate(stream):
                assert prediction.detections is not None
                assert prediction.image is not None
                write(rgb_pixels(prediction.detections.draw(prediction.image)))
                found.add(prediction, frame, video)
                progress.advance(task)
        except KeyboardInterrupt:  # ends a webcam; the frames so far are kept
            return


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: write the name of each class on a line") from error


def output_names(files: Sequence[Path], ending: str) -> list[str]:
    """Name the output of each file after the file, with a number if another file has the same name."""
    names: dict[str, None] = {}
    for file in files:
        stem, number = file.stem.replace(":", ""), 1  # `webcam:1` has a colon
        while (name := f"{stem}{ending}" if number == 1 else f"{stem}-{number}{ending}") in names:
            number += 1
        names[name] = None
    return list(names)


def image_ids(images: Sequence[Path]) -> list[int]:
    """Take image ids from the names of the files if all are numbers, as in COCO; otherwise 1, 2, 3, …"""
    stems = [image.stem for image in images]
    if all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        return [int(stem) for stem in stems]
    return list(range(1, len(images) + 1))
