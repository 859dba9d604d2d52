"""Parse the flags of train.py: every setting of :class:`solq.training.config.TrainConfig`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import tyro

from solq.commands.parsing import one_line_errors
from solq.training.config import Preset, TrainConfig
from solq.training.presets import preset

GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, and either inside Windows' Linux


def command_line(description: str | None = None, args: Sequence[str] | None = None) -> TrainConfig:
    """Parse flags into the settings of a preset, changed by the flags; a mistake ends the program with one line.

    A preset differs between CPU and GPU. Flags are parsed for the likely one first, so that `--help` and mistakes are
    answered before torch is imported, which takes seconds.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=get_args(Preset), default="shapes")
    first.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    with one_line_errors():
        chosen, _ = first.parse_known_args(args)

        def parse(on_gpu: bool) -> TrainConfig:
            default = preset(chosen.preset, cpu=not on_gpu)
            settings: Any = TrainConfig[type(default.model)]  # type: ignore[misc]  # the flags of this model alone
            return tyro.cli(settings, default=default, description=description, args=args)

        likely = chosen.device == "cuda" or (chosen.device == "auto" and any(Path(p).exists() for p in GPU_DRIVERS))
        config = parse(on_gpu=likely)
        if chosen.device == "auto":
            from solq.devices import choose_device

            on_gpu = choose_device("auto").type == "cuda"
            config = config if on_gpu == likely else parse(on_gpu)
        return config
