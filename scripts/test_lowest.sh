#!/usr/bin/env bash
# The tests with the lowest supported version of every dependency, in a virtual environment of their own.
# Run by hand before a release; the last result is in CONTRIBUTING.md. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${SOLQ_LOWEST_VENV:-.venv-lowest}
[ -d "$venv" ] || python3 -m venv "$venv"
"$venv/bin/python" - <<'PYTHON' > "$venv/lowest.txt"
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
for requirement in project["dependencies"] + extras["test"]:
    print(requirement.replace(">=", "=="))
PYTHON
"$venv/bin/pip" install --quiet -r "$venv/lowest.txt"
"$venv/bin/pip" install --quiet --no-deps -e .
"$venv/bin/pip" list | grep -iE '^(torch|torchvision|triton|numpy) '
"$venv/bin/pytest" "$@"
