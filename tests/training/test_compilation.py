"""What happens where a model cannot be compiled."""

import logging

import pytest
import torch

from solq.training.compilation import can_compile


def test_a_missing_compiler_is_said_and_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no working C++ compiler\nfound in a list")

    monkeypatch.setattr(torch, "compile", fails)
    with caplog.at_level(logging.WARNING):
        assert not can_compile(torch.device("cpu"))
    assert caplog.messages == ["--compile is left out, because compiling fails here: no working C++ compiler"]
