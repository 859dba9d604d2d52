"""Which backend serves a call, and that asking for Triton where it cannot run is an error."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

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
    levels = torch.tensor([[2], [2], [0]])
    with pytest.raises(RuntimeError, match="Triton backend"):  # the operator itself never falls back either
        torch.ops.solq.ms_deform_attn(value, levels, None, locations, weights)


def test_triton_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "HAS_TRITON", False)
    with FakeTensorMode():
        on_gpu = torch.empty(0, device="cuda")
    with pytest.raises(RuntimeError, match=r"^tensors on cuda:0 are served by Triton but .* not installed") as raised:
        runtime.backend_for(on_gpu)
    assert "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match=r"^backend is 'triton' but .* not installed"), use_backend("triton"):
        pass


def test_definition_where_there_is_one() -> None:
    with use_backend("definition"):
        assert runtime.backend_for(torch.zeros(1), has_definition=True) == "definition"
        assert runtime.backend_for(torch.zeros(1)) == "reference"


def test_unknown_backend() -> None:
    message = "backend is 'cuda', must be 'reference', 'triton' or 'definition'"
    with pytest.raises(ValueError, match=message), use_backend("cuda"):
        pass


def test_interpreter_has_an_architecture() -> None:
    assert runtime.architecture(torch.device("cpu")) == "interpreter"
    assert runtime.warp_size(torch.device("cpu")) == 32
