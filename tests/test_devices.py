"""Choice of a device."""

import pytest
import torch

from solq.devices import choose_device


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device is cuda:2 but torch finds 2 GPUs, numbered from 0"):
        choose_device("cuda:2")
