"""Load batches in processes of their own."""

import atexit
import functools
import logging
import multiprocessing
import signal
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from solq.data.batch import Size, collate


def make_loader(
    dataset: Dataset, sizes: Sequence[Size], workers: int, device: torch.device, **batching: Any
) -> DataLoader:
    """Make a loader of batches of a :class:`solq.data.coco.CocoDataset`.

    Args:
        dataset: the dataset, or a part of it.
        sizes: the heights and widths that batches are padded to.
        workers: number of processes that load images.
        device: memory is pinned for copies to a GPU.
        batching: `batch_size` or `batch_sampler`.
    """
    return DataLoader(
        dataset,
        collate_fn=functools.partial(collate, sizes=sizes),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
        **batching,
    )


def _start_worker(_: int) -> None:
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
