"""Write and read the checkpoints of a training run; reading runs no code from a file."""

import logging
from pathlib import Path
from typing import Any

import torch

from solq.errors import first_line
from solq.files import UNFINISHED, atomic_write

logger = logging.getLogger(__name__)

KEPT = 2  # newest checkpoints that stay in the folder


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` (tensors, numbers, strings and containers of them) as `folder`/step_<step>.pt.

    The file appears when it is complete and on disk; then all but the newest two are removed.

    Raises:
        OSError: the file cannot be written, for example on a full disk. The checkpoints before stay as they were.
    """
    path = folder / f"step_{step:08d}.pt"
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        raise OSError(
            f"checkpoint {path} cannot be written ({first_line(error)}): free some space, then continue with --resume"
        ) from error
    for old in checkpoints(folder)[KEPT:]:
        old.unlink()
    for leftover in folder.glob(f"*{UNFINISHED}"):  # left by a process that was killed while writing
        leftover.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in `folder`, newest first."""
    return sorted(folder.glob("step_*.pt"), reverse=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file of `save_checkpoint` to the CPU; only tensors and plain containers are unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or not a checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and tensor readers each raise their own
        raise ValueError(
            f"checkpoint {path} is damaged or not a checkpoint ({first_line(error)}): use another one"
        ) from error
    if not isinstance(state, dict) or "model" not in state:
        raise ValueError(f"checkpoint {path} has no entry 'model': it is not a checkpoint of this project")
    return state


def load_newest(folder: Path) -> dict[str, Any] | None:
    """Read the newest intact checkpoint in `folder`, or return None if there is none; damaged ones are logged.

    Raises:
        ValueError: there are checkpoints, but all are damaged.
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
