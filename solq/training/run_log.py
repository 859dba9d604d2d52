"""Report on a training run while it goes on: in the terminal, in log.jsonl and in TensorBoard."""

import contextlib
import json
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn

from solq.progress import console, duration, say

WIDE = 100  # columns of a terminal in which a progress bar has room


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def start_logging(is_main: bool) -> None:
    """Show log messages in the terminal: all from the main process, errors only from the others."""
    level = logging.INFO if is_main else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[_ConsoleHandler()], force=True)


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collect the names of arriving SIGTERM and SIGINT (Ctrl-C) signals in a list; a second Ctrl-C kills.

    Each is answered at once, because the step that it arrives in may take long.
    """
    received: list[str] = []

    def receive(number: int, _: object) -> None:
        name = signal.Signals(number).name
        received.append(name)
        say(f"{name}: saving after this step" + ("; Ctrl-C again stops without" if number == signal.SIGINT else ""))
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RunLog:
    """Show a progress bar; write logged steps to TensorBoard and as JSON lines to log.jsonl.

    Args:
        output: folder of the run.
        start: the step after which the run continues; later lines of an interrupted run are dropped.
        steps: length of the run.
        enabled: false for all processes but one.
        num_graphs: how many graphs are compiled; 0 if the model is not compiled.
    """

    def __init__(self, output: Path, start: int, steps: int, enabled: bool, num_graphs: int = 0) -> None:
        self.output, self.start, self.steps, self.enabled = output, start, steps, enabled
        self.num_graphs = num_graphs
        self.compiled: set[torch.Size] = set()

    def __enter__(self) -> Self:
        if self.enabled:
            from torch.utils.tensorboard import SummaryWriter  # imported only where a log is written

            path = self.output / "log.jsonl"
            kept = _lines_until(path, self.start)
            path.write_text("".join(kept))
            self.file = open(path, "a", buffering=1)
            self.board = SummaryWriter(self.output / "tensorboard", purge_step=self.start + 1)
            columns: list[ProgressColumn] = [MofNCompleteColumn(), TextColumn("{task.fields[status]}")]
            if console.width >= WIDE:
                columns = [TextColumn("training"), BarColumn(), *columns]
            self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
            self.task = self.progress.add_task("", total=self.steps, completed=self.start, status="")
            self.progress.start()
            self.clock, self.logged = time.monotonic(), self.start
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self.progress.stop()
            self.file.close()
            self.board.close()

    def announce_graph(self, shape: torch.Size) -> None:
        """Say that a graph is compiled, if images of this shape are the first ones."""
        if self.enabled and self.num_graphs and shape not in self.compiled:
            self.compiled.add(shape)
            say(f"compiling graph {len(self.compiled)} of {self.num_graphs}, for images of {shape[2]}×{shape[3]}")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log the values of a step, ``loss`` and ``images_per_second`` among them."""
        if not self.enabled:
            return
        line = {"step": step, **values}
        self.file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            self.board.add_scalar(f"train/{name}", value, step)
        now = time.monotonic()
        left = (now - self.clock) / max(1, step - self.logged) * (self.steps - step)
        self.clock, self.logged = now, step
        status = f"loss {values['loss']:.3f}  {values['images_per_second']:.1f} images/s  {duration(left)} left"
        self.progress.update(self.task, completed=step, status=status)
        if not console.is_terminal:
            say(f"step {step}/{self.steps}  {status}")


def _lines_until(path: Path, step: int) -> list[str]:
    """Read the lines of a log.jsonl up to a step, without a line that was cut short when its process was killed."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    return kept
