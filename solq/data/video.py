"""Read frames of videos and webcams and write videos, through OpenCV (`pip install solq[video]`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass
class Video:
    """Frames (3, H, W) uint8, their number or None if unknown, and the frame rate."""

    frames: Iterator[Tensor]
    num_frames: int | None
    frames_per_second: float


def is_video(path: Path) -> bool:
    """Tell whether a path is named like a video, or is `webcam` or `webcam:<number>`."""
    return path.suffix.lower() in SUFFIXES or _camera(path) is not None


def read_video(path: Path) -> Video:
    """Open a video file, or a webcam, whose frames have no end.

    Raises:
        ImportError: OpenCV is not installed.
        OSError: the video cannot be opened or has no frame.
    """
    cv2 = _opencv()
    camera = _camera(path)
    if camera is None and not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    capture = cv2.VideoCapture(str(path) if camera is None else camera)
    more, first = capture.read()
    if not more:
        kind = "is damaged, or of a kind that OpenCV cannot read" if camera is None else "is not there, or in use"
        raise OSError(f"{path} cannot be opened: it {kind}")

    def frames() -> Iterator[Tensor]:
        frame, more = first, True
        try:
            while more:
                yield torch.from_numpy(np.ascontiguousarray(frame[:, :, ::-1])).permute(2, 0, 1)
                more, frame = capture.read()
        finally:
            capture.release()

    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if camera is None else 0
    rate = capture.get(cv2.CAP_PROP_FPS)
    return Video(frames(), count if count > 0 else None, rate if rate > 0 else 25.0)


@contextmanager
def write_video(path: Path, frames_per_second: float) -> Iterator[Callable[[Tensor], None]]:
    """Open an MP4 file and yield the function that adds a frame (3, H, W) uint8; all frames have the same size."""
    cv2 = _opencv()
    writer = cv2.VideoWriter()

    def write(frame: Tensor) -> None:
        _, H, W = frame.shape
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        if not writer.isOpened() and not writer.open(str(path), codec, frames_per_second, (W, H)):
            raise OSError(f"{path} cannot be written as MP4")
        writer.write(np.ascontiguousarray(frame.permute(1, 2, 0).numpy()[:, :, ::-1]))

    try:
        yield write
    finally:
        writer.release()


def _camera(path: Path) -> int | None:
    name, _, number = str(path).partition(":")
    return int(number or 0) if name == "webcam" and (number or "0").isdecimal() else None


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError("videos need OpenCV: pip install solq[video]") from error
    return cv2
