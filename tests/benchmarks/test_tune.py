"""The tuner, with invented times: what it prints can be pasted into the launch table, and it finds the fastest."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import tune
from solq.kernels.ms_deform_attn.configuration import Problem, kernel_constants


def test_prints_entries_of_the_launch_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(tune, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "milliseconds", lambda direction, D, dtype, c: abs(c[0] - 16) + abs(c[1] - 2) + 1)
    file = tmp_path / "tune.json"
    monkeypatch.setattr(sys, "argv", ["tune", "--channels", "32", "48", "--json", str(file)])
    tune.main()
    table = ast.literal_eval("{" + capsys.readouterr().out + "}")
    assert table == {
        (direction, "sm_90", D, size): (32, 2) if direction == "windows" else (16, 2)
        for direction in ("forward", "windows", "backward")
        for D in (32, 48)
        for size in (2, 4)
    }
    measured = json.loads(file.read_text())["measured"]
    assert sum(row["best"] for row in measured) == len(table)
    assert {row["direction"] for row in measured if row["rule"]} == {
        "forward",
        "windows",
        "backward",
    }  # the rule is a candidate


def test_configurations_can_be_compiled() -> None:
    for D, dtype in ((32, torch.bfloat16), (48, torch.float32), (64, torch.float32)):
        for configuration in tune.candidates("backward", D, dtype):
            constants = kernel_constants(Problem(dtype, 8, 4, 4, D, 2), 0, configuration, 32)
            assert constants["BLOCK_QUERIES"] * constants["LANES"] == 32 * configuration[1]
            assert constants["LAST_BLOCK"] % constants["LANES"] == 0
