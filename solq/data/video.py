"""Read frames of videos and webcams and write videos, through OpenCV (`pip install solq[video]`)."""

from collections.abc import Iterator
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


class VideoWriter:
    """Write frames of one size to an MP4 file, inside a `with`."""

    def __init__(self, path: Path, frames_per_second: float) -> None:
        self.path, self.frames_per_second = path, frames_per_second
        self.writer: Any = None  # opened with the first frame, which gives the size

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, frame: Tensor) -> None:
        """Add a frame (3, H, W) uint8."""
        cv2 = _opencv()
        _, H, W = frame.shape
        if self.writer is None:
            self.writer = cv2.VideoWriter(
                str(self.path), cv2.VideoWriter.fourcc(*"mp4v"), self.frames_per_second, (W, H)
            )
            if not self.writer.isOpened():
                raise OSError(f"{self.path} cannot be written as MP4")
        self.writer.write(np.ascontiguousarray(frame.permute(1, 2, 0).numpy()[:, :, ::-1]))

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.release()


def _camera(path: Path) -> int | None:
    name, _, number = str(path).partition(":")
    return int(number or 0) if name == "webcam" and (number or "0").isdecimal() else None


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError("videos need OpenCV: pip install solq[video]") from error
    return cv2
