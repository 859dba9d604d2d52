"""What a training run tells on its way: the terminal, and log.jsonl and TensorBoard in the folder of the run."""

import atexit
import contextlib
import json
import logging
import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

console = Console()


def say(text: str) -> None:
    """Print a line, above the progress bar if there is one; not wrapped, so that paths in it stay whole."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def start_logging(is_main: bool) -> None:
    """Show what the package logs; of several processes the others show errors only."""
    level = logging.INFO if is_main else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[_ConsoleHandler()], force=True)


def start_worker(_: int) -> None:
    """Of a process that loads images: it outlives the signals that its parent handles, and logs without the console.

    The console was forked with its lock and its progress bar, perhaps in the middle of being drawn.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)


@atexit.register
def _kill_workers() -> None:
    """Those that an error has left, whose loader its traceback holds: Python would send them SIGTERM, and wait."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes it for an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """A list that the names of SIGTERM and SIGINT (Ctrl-C) are added to when they arrive; a second Ctrl-C kills."""
    received: list[str] = []

    def receive(number: int, _: object) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RunLog:
    """Progress bar, TensorBoard, and one JSON line per logged step, in log.jsonl.

    Args:
        output: folder of the run.
        start: step that the run continues after; later lines of an interrupted run are dropped, as they come again.
        steps: length of the run.
        enabled: false for all processes but one.
    """

    def __init__(self, output: Path, start: int, steps: int, enabled: bool) -> None:
        self.output, self.start, self.steps, self.enabled = output, start, steps, enabled

    def __enter__(self) -> Self:
        if self.enabled:
            path = self.output / "log.jsonl"
            kept = _lines_until(path, self.start)
            path.write_text("".join(kept))
            self.file = open(path, "a", buffering=1)
            self.board = SummaryWriter(self.output / "tensorboard", purge_step=self.start + 1)
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.progress.add_task("training", total=self.steps, completed=self.start, status="")
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self.progress.stop()
            self.file.close()
            self.board.close()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log `values`, which have a ``loss`` and ``images_per_second``, of a step."""
        if not self.enabled:
            return
        line = {"step": step, **values}
        self.file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            self.board.add_scalar(f"train/{name}", value, step)
        status = f"loss {values['loss']:.3f}  {values['images_per_second']:.1f} images/s"
        self.progress.update(self.task, completed=step, status=status)


def _lines_until(path: Path, step: int) -> list[str]:
    """The lines of a log.jsonl up to a step, without any that was cut short when its process was killed."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    return kept
