"""Show what is going on: lines of text, and the progress of what takes long, in a terminal or in a file."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as track_in_terminal

console = Console()

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 15  # of a file, in which a progress bar cannot be drawn


def say(text: str) -> None:
    """Print a line at once, above a progress bar if there is one; it is not wrapped, so that paths can be copied."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)
    console.file.flush()


def track(items: Iterable[Item], description: str, total: int, *, enabled: bool = True) -> Iterator[Item]:
    """Yield the items; show a progress bar in a terminal, and otherwise a line every 15 seconds.

    Args:
        items: what is worked through.
        description: name of the work.
        total: number of items.
        enabled: whether anything is shown.
    """
    if not enabled:
        yield from items
    elif console.is_terminal:
        yield from track_in_terminal(items, description, total, console=console)
    else:
        start = shown = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if done == total or now - shown >= SECONDS_BETWEEN_LINES:
                say(f"{description} {done}/{total}, {duration((now - start) / done * (total - done))} left")
                shown = now


def duration(seconds: float) -> str:
    """Write a duration as hours, minutes and seconds."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"
