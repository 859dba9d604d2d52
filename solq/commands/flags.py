"""The flags of train.py: every setting of :class:`solq.training.config.TrainConfig`."""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
import tyro

from solq.training.config import Preset, TrainConfig
from solq.training.presets import preset


def command_line(description: str | None = None, args: Sequence[str] | None = None) -> TrainConfig:
    """The settings of the preset, changed by the flags; what is wrong with them ends the program in one line."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=get_args(Preset), default="shapes")
    first.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    with one_line_complaints():
        chosen, _ = first.parse_known_args(args)
        cpu = chosen.device == "cpu" or (chosen.device == "auto" and not torch.cuda.is_available())
        default = preset(chosen.preset, cpu=cpu)
        settings: Any = TrainConfig[type(default.model)]  # type: ignore[misc]  # the flags of this model alone
        return tyro.cli(settings, default=default, description=description, args=args)


@contextlib.contextmanager
def one_line_complaints() -> Iterator[None]:
    """What argparse or tyro complains about ends the program in one line."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            yield
    except SystemExit as end:
        if not end.code:  # --help
            raise
        sys.exit(f"error: {_one_line(complaint.getvalue())} (--help lists all settings)")


def _one_line(complaint: str) -> str:
    """What argparse says in its last line, and tyro below the title of a box, above its first rule."""
    lines = [line.strip(" │") for line in complaint.splitlines()]
    if lines[0].startswith("usage:"):
        return lines[-1].partition("error: ")[2]
    parts = re.split(r"^[─-]{3,}$", "\n".join(lines[1:]), flags=re.MULTILINE)
    return " ".join(next(part for part in parts if part.strip()).split())
