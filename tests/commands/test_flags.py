"""How fast train.py answers what it does not run."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY

PROGRAM = """
import runpy, sys
sys.argv = ["train.py", *sys.argv[1:]]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as end:
    print(end.code)
print("torch is imported" if "torch" in sys.modules else "torch is not imported")
"""


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--zzz", "error: Unrecognized options: --zzz (--help lists all settings)"),
        (
            "--batchsize=3",
            "error: Unrecognized options: --batchsize=3; perhaps you meant --batch-size (--help lists all settings)",
        ),
        ("--help", "0"),
    ],
)
def test_help_and_mistakes_do_not_wait_for_torch(flag: str, answer: str) -> None:
    command = [sys.executable, "-c", PROGRAM, flag]
    shown = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.splitlines()
    assert shown[-2:] == [answer, "torch is not imported"]
