"""Tests of the project's text."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = [path for pattern in ("*.md", "docs/*.md", "scripts/*.sh", ".ci/run") for path in ROOT.glob(pattern)]
FILE = re.compile(r"\b(?:solq|tests|benchmarks|scripts|docs)/[\w/.-]+\.(?:py|md|sh|svg|jpg|png)\b")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    text = path.read_text()
    named = [ROOT / name for name in FILE.findall(text) if not (path.parent / name).exists()]
    named += [path.parent / name for name in LINK.findall(text)]
    assert [str(name) for name in named if not name.exists()] == []
