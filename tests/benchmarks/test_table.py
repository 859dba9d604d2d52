"""From the JSON of a benchmark run to tables."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table


def row(contender: str, median: float, **extra: Any) -> dict[str, Any]:
    return {"group": "case", "name": f"test_x[case-{contender}]", "stats": {"median": median}, "extra_info": extra}


@pytest.fixture
def write(tmp_path: Path):
    def write(*rows: dict[str, Any]) -> Path:
        run = {"machine_info": {"device": "a machine"}, "commit_info": {}, "datetime": "2026-01-02", "benchmarks": rows}
        file = tmp_path / "run.json"
        file.write_text(json.dumps(run))
        return file

    return write


def test_fastest_first(write) -> None:
    lines = table.markdown([write(row("slow", 3.0), row("fast", 0.002, peak_bytes=1 << 20))]).splitlines()
    assert lines[-2:] == ["| fast | 2 ms | 1.00 |  |  | 1 MiB |", "| slow | 3000 ms | 1500.00 |  |  |  |"]


def test_compares_by_the_time_on_the_gpu_where_it_was_measured(write) -> None:
    lines = table.markdown([write(row("a", 0.001, device_ms=0.9), row("b", 0.002, device_ms=0.3))]).splitlines()
    assert lines[-4] == "| contender | a call | on the GPU | relative | GB/s | of a copy | peak memory |"
    assert lines[-2:] == ["| b | 2 ms | 0.3 ms | 1.00 |  |  |  |", "| a | 1 ms | 0.9 ms | 3.00 |  |  |  |"]


def test_one_line_per_group(write) -> None:
    other = row("b", 0.001) | {"group": "other case"}
    file = write(row("a", 0.001, peak_bytes=1 << 20), row("b", 0.002), other)
    assert table.compact([file]).splitlines()[2:] == [
        "| | a | b |",
        "|---|---|---|",
        "| case | 1 ms, 1.00 ×, 1 MiB | 2 ms, 2.00 × |",
        "| other case |  | 1 ms, 1.00 × |",
    ]
    assert len(table.compact([file], match="^case").splitlines()) == 5


def test_replaces_what_stands_between_the_marks(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["table", str(write(row("ours", 1.0))), "--readme", str(readme)])
    table.main()
    text = readme.read_text()
    assert text.startswith(f"before\n{table.START}\n")
    assert text.endswith(f"{table.END}\nafter\n")
    assert "ours" in text
    assert "old" not in text
