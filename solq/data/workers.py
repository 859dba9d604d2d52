"""Processes that load images."""

import atexit
import logging
import multiprocessing
import signal


def start_worker(_: int) -> None:
    """Prepare a loader process: ignore SIGINT and SIGTERM, which its parent handles, and log without the console.

    The console was forked with its lock and its progress bar, perhaps in the middle of being drawn.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)


@atexit.register
def _kill_workers() -> None:
    """Kill the loader processes that an error has left, whose loader is alive in the error's traceback.

    Python would send them SIGTERM, which they ignore, and wait for their end.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes the kill for an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
