"""Every kernel compiles for GPUs that are not there, without the interpreter, and shows what is expected."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FEW = "ms_deform_attn_fused points (for|back)ward D=48 (float32|bfloat16)$|(roi_align|dynamic_conv).* (7|49) bf16"


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("sm_90", "^(?!ms_deform_attn)|ms_deform_attn.*(D=32|D=48)"),
        ("sm_80", FEW),
        ("sm_100", FEW),
        ("gfx942", FEW),
    ],
)
def test_kernels_compile_ahead_of_time(target: str, match: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.compile_report", "--targets", target, "--match", match, "--json", file]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert rows
    assert all(row["spills"] == 0 for row in rows)


def test_report_says_why_it_does_not_run_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "benchmarks.compile_report"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "unset" in done.stderr
