"""From the JSON of a benchmark run to Markdown tables and a chart: `python -m benchmarks.table RESULTS.json …`.

Tables go to standard output, one per group of benchmarks, fastest first, with each contender's time relative to the
fastest: the median of the calls, or the time on the GPU where the benchmark has measured that. `--readme FILE` puts
one table, a line per group and a column per contender, between the lines `<!-- benchmarks -->` and
`<!-- /benchmarks -->` of a file, `--chart FILE.svg` draws the times as bars, and `--match` chooses groups.
"""

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def groups(files: list[Path], match: str) -> dict[str, list[dict[str, Any]]]:
    """The benchmarks of each group that matches, fastest first; of one run by several files, the last wins."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for file in files:
        for benchmark in json.loads(file.read_text())["benchmarks"]:
            group = benchmark["group"] or benchmark["fullname"].split("[")[0].split("/")[-1]
            if re.search(match, group):
                found[group][benchmark["name"]] = benchmark
    return {group: sorted(rows.values(), key=seconds) for group, rows in found.items()}


def seconds(row: dict[str, Any]) -> float:
    """What contenders are compared by: the time on the GPU where it was measured, or else the median of the calls."""
    return row["extra_info"].get("device_ms", row["stats"]["median"] * 1e3) / 1e3


def cell(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def milliseconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value * 1e3:.0f} ms"


def machines(files: list[Path]) -> str:
    """What was measured, and where."""
    lines = []
    for file in files:
        run = json.loads(file.read_text())
        machine, commit = run["machine_info"], run["commit_info"]
        lines.append(
            f"{machine.get('device')}, torch {machine.get('torch')}, triton {machine.get('triton')}, "
            f"commit {commit.get('id', '?')[:10]}{' with changes' if commit.get('dirty') else ''}, "
            f"{run['datetime'][:10]}"
        )
    return "\n\n".join(lines)


def compact(files: list[Path], match: str = "") -> str:
    """One table: time, relative to the fastest, and peak memory of all contenders of a group in a line."""
    found = groups(files, match)
    contenders = list(dict.fromkeys(name(row) for rows in found.values() for row in rows))
    lines = [f"| | {' | '.join(contenders)} |", "|---" * (len(contenders) + 1) + "|"]
    for group, rows in found.items():
        cells = dict.fromkeys(contenders, "")
        for row in rows:
            peak = row["extra_info"].get("peak_bytes")
            parts = [milliseconds(seconds(row)), f"{seconds(row) / seconds(rows[0]):.2f} ×"]
            cells[name(row)] = ", ".join(parts + ([f"{peak / 2**20:.0f} MiB"] if peak else []))
        lines.append(f"| {group} | {' | '.join(cells.values())} |")
    return f"{machines(files)}\n\n" + "\n".join(lines)


def markdown(files: list[Path], match: str = "") -> str:
    """A table per group."""
    parts = [machines(files)]
    for group, rows in groups(files, match).items():
        on_gpu = any("device_ms" in row["extra_info"] for row in rows)
        titles = [
            "contender",
            "a call",
            *(["on the GPU"] if on_gpu else []),
            "relative",
            "GB/s",
            "of a copy",
            "peak memory",
        ]
        lines = [f"**{group}**", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for row in rows:
            extra = row["extra_info"]
            peak = extra.get("peak_bytes")
            cells = [name(row), milliseconds(row["stats"]["median"])]
            cells += [milliseconds(seconds(row))] if on_gpu else []
            cells += [f"{seconds(row) / seconds(rows[0]):.2f}", cell(extra.get("GB/s"), "{:.3g}")]
            cells += [cell(extra.get("share_of_copy"), "{:.0%}"), cell(peak and peak / 2**20, "{:.0f} MiB")]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def name(row: dict[str, Any]) -> str:
    """`test_x[case-float32-forward-ours]`: what distinguishes it within its group comes last."""
    inside = row["name"].partition("[")[2].rstrip("]")
    return inside.rsplit("-", 1)[-1] or row["name"]


def chart(files: list[Path], target: Path, match: str = "") -> None:
    """Horizontal bars, one panel per group."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    panels = groups(files, match)
    sizes = [len(rows) + 1 for rows in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, 0.3 * sum(sizes) + 1), height_ratios=sizes, squeeze=False, layout="constrained"
    )
    for axis, (group, rows) in zip(axes.flat, panels.items(), strict=True):
        axis.barh([name(row) for row in rows], [seconds(row) * 1e3 for row in rows])
        axis.invert_yaxis()
        axis.set_title(group, fontsize=9, loc="left")
        axis.set_xlabel("milliseconds", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.savefig(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of pytest-benchmark")
    parser.add_argument("--readme", type=Path, help=f"file with the lines {START} and {END}")
    parser.add_argument("--chart", type=Path, help="SVG or PNG file to draw")
    parser.add_argument("--match", default="", help="regular expression that groups must match")
    arguments = parser.parse_args()
    if arguments.readme:
        text = arguments.readme.read_text()
        if START not in text or END not in text:
            parser.error(f"{arguments.readme} has no lines {START} and {END}")
        before, _, rest = text.partition(START)
        table = compact(arguments.results, arguments.match)
        arguments.readme.write_text(f"{before}{START}\n{table}\n{END}{rest.partition(END)[2]}")
    else:
        print(markdown(arguments.results, arguments.match))
    if arguments.chart:
        chart(arguments.results, arguments.chart, arguments.match)


if __name__ == "__main__":
    main()
