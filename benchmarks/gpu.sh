#!/usr/bin/env bash
# What a GPU has to tell, in under ten minutes: tests, sanitizer, benchmarks, a profile, a training run.
#
#     OUT=/tmp/out bash benchmarks/gpu.sh
#
# From the repository's root, on a machine with CUDA, torch, triton, transformers, pytest and pytest-benchmark. Real
# data and recordings are used where $LAD_FAST_SHARED has them. Each part has its own time limit, and one that fails
# does not stop the others; the exit codes come last (124: out of time, 77: left out). $OUT gets few files: the log, the
# benchmarks' report, result file and figure, and the profiles.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
: "${OUT:?set OUT to the folder for what comes out}"
PYTHON=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$OUT"
unset TRITON_INTERPRET
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
names=() codes=()

# Run a command, its output at the end of the log: part NAME SECONDS COMMAND...
part() {
    local name=$1 seconds=$2
    shift 2
    echo "== $name (at most $seconds s)" | tee -a "$OUT/gpu.log"
    # Interrupted, pytest still writes what it has.
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$scratch/part.log" 2>&1
    local code=$?
    cat "$scratch/part.log" >>"$OUT/gpu.log"
    tail -n 15 "$scratch/part.log"
    names+=("$name")
    codes+=("$code")
}

# lad_fast from this folder without an installation: kernels/ belongs inside the package, and the root stays off the
# path, where kernels/ would hide Hugging Face's.
if ! "$PYTHON" -P -c 'import lad_fast.kernels' 2>/dev/null; then
    site=$scratch/site
    mkdir -p "$site/lad_fast"
    ln -s "$PWD"/lad_fast/* "$site/lad_fast/"
    ln -s "$PWD/kernels" "$site/lad_fast/kernels"
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
PYTEST=("$PYTHON" -P -m pytest -q -p no:cacheprovider)

part doctor 30 "$PYTHON" benchmarks/gpu_parts.py doctor
part check 70 "$PYTHON" benchmarks/gpu_parts.py check
part forms 40 "$PYTHON" benchmarks/gpu_parts.py forms
# A module whose imports are missing here does not stop the others.
part tests 30 "${PYTEST[@]}" -m cuda --continue-on-collection-errors --ignore=tests/kernels tests
part kernels 80 "${PYTEST[@]}" -k triton --continue-on-collection-errors --ignore=tests/kernels/test_aot.py tests/kernels

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        part "$tool" 30 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" benchmarks/gpu_parts.py small
    done
else
    names+=(memcheck racecheck)
    codes+=(77 77)
fi

part bench 180 "${PYTEST[@]}" benchmarks --benchmark-json="$OUT/bench.json"
part record 20 "$PYTHON" benchmarks/bench_record.py convert --report "$OUT/bench.json" --output-dir "$OUT"
part profile 30 "$PYTHON" benchmarks/gpu_parts.py profile "$OUT"
part train 40 "$PYTHON" benchmarks/gpu_parts.py train "$scratch"

echo "== exit codes"
failed=0
for i in "${!names[@]}"; do
    printf '%-10s %s\n' "${names[$i]}" "${codes[$i]}"
    [[ ${codes[$i]} == 0 || ${codes[$i]} == 77 ]] || failed=1
done
exit "$failed"
