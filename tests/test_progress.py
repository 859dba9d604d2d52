"""What is shown of long work where output is a file."""

import io

import pytest
from rich.console import Console

from solq import progress


def test_progress_in_a_file_is_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, width=40))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    assert list(progress.track("abc", "spelling", 3)) == ["a", "b", "c"]
    assert file.getvalue().splitlines()[1:] == ["spelling 2/3, 0:00:00 left", "spelling 3/3, 0:00:00 left"]
    assert "\x1b" not in file.getvalue()


def test_nothing_is_shown_unless_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file))
    assert list(progress.track("ab", "spelling", 2, enabled=False)) == ["a", "b"]
    assert file.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (61, "0:01:01"), (7325, "2:02:05")])
def test_duration(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text
