"""Choice of the device to compute on."""

import re

import torch


def choose_device(device: str | torch.device) -> torch.device:
    """Return the device of that name; "auto" is the GPU if there is one, else the CPU.

    Raises:
        ValueError: if there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", str(device)):
        raise ValueError(f"device is {str(device)!r}, must be auto, cpu, cuda or cuda:<number>")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device} but torch finds no GPU: use cpu, or check the driver")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {device} but torch finds {torch.cuda.device_count()} GPUs, numbered from 0")
    return chosen
