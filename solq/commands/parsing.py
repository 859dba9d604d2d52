"""End a program whose flags have a mistake with one line."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line where argparse or tyro would write several and exit."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    except SystemExit as end:
        if not end.code:  # --help
            raise
        sys.exit(f"error: {_one_line(stderr.getvalue())} (--help lists all settings)")


def _one_line(message: str) -> str:
    """Shorten a message of argparse to its last line, and a box drawn by tyro to its first part and its first hint."""
    lines = [line.strip(" │") for line in message.splitlines()]
    if lines[0].startswith("usage:"):
        return lines[-1].partition("error: ")[2]
    parts = re.split(r"^[─-]{3,}$", "\n".join(lines[1:]), flags=re.MULTILINE)
    fault = " ".join(next(part for part in parts if part.strip()).split())
    meant = re.search(r"Perhaps you meant:\s*(--\S+)", "\n".join(lines))
    return f"{fault}; perhaps you meant {meant[1]}" if meant else fault
