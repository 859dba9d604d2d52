"""The processes of a training run: who they are, and how they agree."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from solq.devices import choose_device


class Process(NamedTuple):
    """One process of a run: its rank, the number of processes, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Tell whether this is the process that writes files and talks to the terminal."""
        return self.rank == 0


def start_process(device_name: str) -> Process:
    """Choose the device of this process, and join the others if torchrun started any.

    Raises:
        ValueError: if there is no such device.
    """
    device = choose_device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "RANK" not in os.environ:
        return Process(0, 1, device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Process(dist.get_rank(), dist.get_world_size(), device)


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def any_process(flag: bool, device: torch.device) -> bool:
    """Tell whether `flag` is true in any process; the processes wait for each other."""
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags > 0)


def sum_over_processes(values: Mapping[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Sum each value over all processes; the host waits for the device."""
    sums = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))
