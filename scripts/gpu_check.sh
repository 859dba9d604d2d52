#!/usr/bin/env bash
# What only a GPU can tell: tests, benchmarks and tuning, on a machine with a GPU and without network.
#
#     scripts/gpu_check.sh OUT_DIR [PIECE ...]
#
# Pieces: tests, report, tune, and one per file benchmarks/bench_*.py by its name without "bench_" and ".py".
# Without pieces all of them run, in that order. Each piece has a time limit, so that all together stay within ten
# minutes, and leaves OUT_DIR/PIECE.json (JUnit XML for the tests) and OUT_DIR/PIECE.log. PYTHON chooses the interpreter.
set -uo pipefail
out=${1:?usage: scripts/gpu_check.sh OUT_DIR [PIECE ...]}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU here"' || exit 1

if [ $# -eq 0 ]; then
    set -- tests report tune
    for file in benchmarks/bench_*.py; do
        name=${file#benchmarks/bench_}
        set -- "$@" "${name%.py}"
    done
fi

failed=0
for piece in "$@"; do
    start=$SECONDS
    case $piece in
        tests) timeout 150 "$python" -m pytest tests/kernels -q --junitxml="$out/tests.xml" ;;
        report) timeout 120 "$python" -m benchmarks.compile_report --json "$out/report.json" ;;
        tune) timeout 90 "$python" -m benchmarks.tune --json "$out/tune.json" ;;
        ms_deform_attn)
            timeout 150 "$python" -m pytest benchmarks/bench_ms_deform_attn.py --benchmark-only -q \
                --benchmark-json="$out/$piece.json" ;;
        *)
            timeout 60 "$python" -m pytest "benchmarks/bench_$piece.py" --benchmark-only -q \
                --benchmark-json="$out/$piece.json" ;;
    esac >"$out/$piece.log" 2>&1
    status=$?
    echo "$piece: exit $status, $((SECONDS - start)) s"
    [ $status -eq 0 ] || { failed=1; tail -n 15 "$out/$piece.log"; }
done
exit $failed
