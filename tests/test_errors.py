"""One line of any error, and lower bounds."""

import pytest

from solq.errors import check_at_least, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("what was wrong\nand a traceback"), "what was wrong"),
        (IndexError(), "IndexError()"),
        (KeyError("height"), "KeyError('height')"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_lower_bounds() -> None:
    check_at_least(1, size=1, max_size=None)
    with pytest.raises(ValueError, match="max_size is 0, must be at least 1"):
        check_at_least(1, size=1, max_size=0)
