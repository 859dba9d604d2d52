"""Which backend serves a call, and that asking for Triton where it cannot run is an error."""

import pytest
import torch

from solq.kernels import ms_deform_attn, runtime, use_backend


def test_forced_backend_is_undone() -> None:
    tensor = torch.zeros(1)
    unforced = runtime.backend_for(tensor)
    with use_backend("reference"):
        assert runtime.backend_for(tensor) == "reference"
        with use_backend("reference"):
            pass
        assert runtime.backend_for(tensor) == "reference"
    assert runtime.backend_for(tensor) == unforced


def test_cpu_tensors_are_served_by_the_reference_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    assert runtime.backend_for(torch.zeros(1)) == "reference"


def test_triton_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    value, locations, weights = torch.zeros(1, 4, 1, 2), torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1)
    with use_backend("triton"), pytest.raises(RuntimeError, match="Triton backend was asked for with tensors on cpu"):
        ms_deform_attn(value, [(2, 2)], [0], locations, weights)
    levels = torch.tensor([[2, 2]]), torch.tensor([0])
    with pytest.raises(RuntimeError, match="Triton backend"):  # the operator itself never falls back either
        torch.ops.solq.ms_deform_attn(value, *levels, locations, weights)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend is 'cuda', must be 'reference' or 'triton'"), use_backend("cuda"):
        pass


def test_interpreter_has_an_architecture() -> None:
    assert runtime.architecture(torch.device("cpu")) == "interpreter"
    assert runtime.warp_size(torch.device("cpu")) == 32
