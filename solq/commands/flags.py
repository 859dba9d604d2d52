"""Parse the flags of train.py: every setting of :class:`solq.training.config.TrainConfig`."""

import argparse
from collections.abc import Sequence
from typing import Any, get_args

import tyro

from solq.commands.parsing import one_line_errors
from solq.devices import choose_device
from solq.training.config import Preset, TrainConfig
from solq.training.presets import preset


def command_line(description: str | None = None, args: Sequence[str] | None = None) -> TrainConfig:
    """Parse flags into the settings of a preset, changed by the flags; a mistake ends the program with one line."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=get_args(Preset), default="shapes")
    first.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    with one_line_errors():
        chosen, _ = first.parse_known_args(args)
        device = choose_device("auto").type if chosen.device == "auto" else chosen.device
        default = preset(chosen.preset, cpu=device == "cpu")
        settings: Any = TrainConfig[type(default.model)]  # type: ignore[misc]  # the flags of this model alone
        return tyro.cli(settings, default=default, description=description, args=args)
