"""The report for bug reports, and that its self-test finds what is wrong."""

from dataclasses import replace

import pytest
import torch

from solq import kernels
from solq.commands import info as info_module
from solq.commands.info import Case, backend_and_reason, info, kernel_cases, run_case
from solq.commands.settings import InfoConfig
from solq.kernels import use_backend


def test_report(capsys):
    with use_backend("reference"):
        info(InfoConfig())
    printed = capsys.readouterr().out
    for text in ("solq", "torch", "triton", "python", "device", "backend: reference"):
        assert text in printed


def test_every_operator_is_tested():
    helpers = {"use_backend", "MSDeformAttn", "binarize", "mask_runs"}
    operators = set(kernels.__all__) - helpers - {"dct_decode_binary", "paste_masks", "paste_runs"}
    assert operators <= {*kernel_cases(torch.device("cpu"))}


@pytest.mark.parametrize("name", ["matching_cost", "dct_decode", "dct_decode_paste"])
def test_kernels_pass(device, name):
    passed, error = run_case(name, kernel_cases(device)[name])
    assert passed, error


@pytest.mark.gpu
def test_all_kernels_pass(capsys):
    info(InfoConfig(device="cuda"))
    assert "FAILED" not in capsys.readouterr().out


def test_a_wrong_kernel_fails(device, monkeypatch):
    case = kernel_cases(device)["dct_decode"]
    right = kernels.dct_decode
    monkeypatch.setattr(kernels, "dct_decode", lambda *arguments: right(*arguments) + 0.1)
    passed, error = run_case("dct_decode", case)
    assert not passed
    assert float(error) == pytest.approx(0.1, rel=0.1)


def test_a_wrong_gradient_fails(device, monkeypatch):
    """With the definition in the kernel's place, but for a factor in its backward pass."""

    def wrong(*arguments: torch.Tensor) -> torch.Tensor:
        with use_backend("reference"):
            result = kernels.reference.ms_deform_attn(*arguments)
        return result.detach() + (result - result.detach()) * 1.5

    case = kernel_cases(device)["ms_deform_attn"]
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "ms_deform_attn", wrong)
        assert not run_case("ms_deform_attn", case)[0]


def test_a_crashing_kernel_is_reported_with_its_reason(device):
    passed, error = run_case("dct_decode", Case((torch.zeros(2, 99, device=device), 4), 1.0))
    assert not passed
    assert "Error" in error


def test_a_failure_is_the_status(capsys, monkeypatch):
    cases = kernel_cases(torch.device("cpu"))
    broken = {"dct_decode": replace(cases["dct_decode"], tolerance=-1.0)}
    monkeypatch.setattr(info_module, "kernel_cases", lambda device: broken)
    monkeypatch.setattr(info_module, "backend_and_reason", lambda device: ("triton", "this test says so"))
    with pytest.raises(SystemExit) as ended:
        info(InfoConfig(device="cpu"))
    assert ended.value.code == 1
    assert "FAILED" in capsys.readouterr().out


def test_reasons():
    backend, why = backend_and_reason(torch.device("cpu"))
    assert backend == "reference"
    assert why
