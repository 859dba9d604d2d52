"""Checkpoints of a training run: written whole or not at all, read without running code from them."""

import logging
import os
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

KEPT = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` (tensors, numbers, strings and containers of them) as `folder`/step_<step>.pt.

    The file appears when it is complete and on disk; then all but the newest two are removed.

    Raises:
        OSError: if it cannot be written, for example on a full disk. What was there before is left as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.pt"
    unfinished = path.with_suffix(".unfinished")
    try:
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        unfinished.unlink(missing_ok=True)
        raise OSError(
            f"checkpoint {path} cannot be written ({str(error).splitlines()[0]}): free some space, "
            "then continue with --resume"
        ) from error
    for old in checkpoints(folder)[KEPT:]:
        old.unlink()
    for leftover in folder.glob("*.unfinished"):  # of a process that was killed while it wrote
        leftover.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted(folder.glob("step_*.pt"), reverse=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU. No object other than tensors and plain containers is made.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or not a checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and tensor readers each raise their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path} is damaged or not a checkpoint ({reason}): use another one") from error
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"checkpoint {path} has no entry 'model': it is not a checkpoint of this project")
    return state


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint in `folder` that can be read, None if there is none at all; damaged ones are reported.

    Raises:
        ValueError: if there are some, but all are damaged.
    """
    error: ValueError | None = None
    for path in checkpoints(folder):
        try:
            return load_checkpoint(path)
        except ValueError as damaged:
            logger.warning("%s", damaged)
            error = damaged
    if error is not None:
        raise error
    return None
