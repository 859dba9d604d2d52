#!/usr/bin/env bash
# What only a GPU can tell: tests, benchmarks and tuning, on a machine with a GPU and without network.
#
#     scripts/gpu_check.sh OUT_DIR [PIECE ...]
#
# Pieces: one per file benchmarks/bench_*.py by its name without "bench_" and ".py", tune, tests, report. Without pieces
# all of them run, the kernels first. Each has a time limit; all together have ten minutes, and so has a piece that runs
# alone. Benchmarks that would start too late are skipped, tests are interrupted. A piece leaves OUT_DIR/PIECE.json
# (JUnit XML for the tests) and OUT_DIR/PIECE.log. PYTHON chooses the interpreter.
set -uo pipefail
out=${1:?usage: scripts/gpu_check.sh OUT_DIR [PIECE ...]}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

"$python" - <<'END' || exit 1
import importlib.util, sys
missing = [m for m in ("pytest", "pytest_benchmark", "hypothesis", "scipy") if importlib.util.find_spec(m) is None]
if missing:
    print("not installed, so that what needs it fails:", *missing)
import torch
if not torch.cuda.is_available():
    sys.exit("gpu_check.sh needs a GPU, torch sees none")
END

if [ $# -eq 0 ]; then
    set -- ms_deform_attn mask_codec matching tune tests
    for file in benchmarks/bench_*.py; do
        name=${file#benchmarks/bench_}
        name=${name%.py}
        case " $* " in *" $name "*) ;; *) set -- "$@" "$name" ;; esac
    done
    set -- "$@" report
fi

failed=0
pieces=$#
for piece in "$@"; do
    start=$SECONDS
    case $piece in
        ms_deform_attn) limit=180 ;;
        tests) limit=180 ;;
        tune | report) limit=120 ;;
        *) limit=60 ;;
    esac
    [ $pieces -gt 1 ] || limit=600
    left=$((600 - start))
    if [ $left -lt 10 ]; then
        echo "$piece: not run, ten minutes are over: scripts/gpu_check.sh OUT_DIR $piece"
        failed=1
        continue
    fi
    case $piece in
        tests)
            command=(-m pytest tests/kernels tests/models tests/test_host_wait.py tests/training/test_matcher.py
                -q --junitxml="$out/tests.xml")
            ;;
        report) command=(-m benchmarks.compile_report --json "$out/report.json") ;;
        tune) command=(-m benchmarks.tune --json "$out/tune.json") ;;
        *) command=(-m pytest "benchmarks/bench_$piece.py" --benchmark-only -q --benchmark-json="$out/$piece.json") ;;
    esac
    limit=$((limit < left ? limit : left))
    # Benchmarks write their results at the end: the last ones are skipped in time. Interrupted tests write theirs.
    SOLQ_BENCHMARK_SECONDS=$((limit * 3 / 4)) timeout -s INT -k 10 $limit "$python" "${command[@]}" >"$out/$piece.log" 2>&1
    status=$?
    echo "$piece: exit $status, $((SECONDS - start)) s"
    [ $status -eq 0 ] || { failed=1; tail -n 15 "$out/$piece.log"; }
done
exit $failed
