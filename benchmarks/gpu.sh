#!/usr/bin/env bash
# What a GPU has to tell, in two halves of under ten minutes each.
#
#     bash benchmarks/gpu.sh pack                       # where there is a network: into .gpu, 14 MB that git ignores
#     OUT=/tmp/out bash benchmarks/gpu.sh proof         # tests, sanitizer
#     OUT=/tmp/out bash benchmarks/gpu.sh speed         # benchmarks, a profile, a training run
#
# From the repository's root, on a machine with CUDA, torch, triton, transformers, pytest, pytest-xdist and
# pytest-benchmark. What else it lacks, and real data and recordings, it finds in .gpu; without, less is tested. Each
# part has its own time limit, and one that fails does not stop the others; the exit codes come last (124: out of time,
# 77: left out). $OUT gets few files: a log, the benchmarks' report, result file and figure, and the profiles.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
half=${1:?proof, speed or pack}
PACK=$PWD/.gpu

if [[ $half == pack ]]; then
    set -e
    rm -rf "$PACK"
    mkdir "$PACK"
    cp -r "${LAD_FAST_SHARED:-../shared}" "$PACK/shared"
    git describe --always --abbrev=12 --exclude='*' --dirty=" with changes" >"$PACK/commit"
    # The command line's parser: small, and in pure Python.
    "$PYTHON" -m pip install --quiet --no-deps --target "$PACK/site" -c constraints.txt tyro docstring-parser typeguard
    exit
fi

: "${OUT:?set OUT to the folder for what comes out}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$OUT"
unset TRITON_INTERPRET
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
if [[ -d $PACK ]]; then
    export LAD_FAST_SHARED=$PACK/shared PYTHONPATH=$PACK/site${PYTHONPATH:+:$PYTHONPATH}
    LAD_FAST_COMMIT=$(<"$PACK/commit")
    export LAD_FAST_COMMIT
fi
names=() codes=()

# Run a command, its output at the end of the log: part NAME SECONDS COMMAND...
part() {
    local name=$1 seconds=$2
    shift 2
    echo "== $name (at most $seconds s)" | tee -a "$OUT/$half.log"
    # Interrupted, pytest still writes what it has.
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >"$scratch/part.log" 2>&1
    local code=$?
    cat "$scratch/part.log" >>"$OUT/$half.log"
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
PYTEST=("$PYTHON" -P -m pytest -q -p no:cacheprovider --continue-on-collection-errors)
# Compiling is what takes long, one kernel after another: many processes share the GPU where nothing is timed.
MANY=(--numprocesses=14)

proof() {
    part doctor 45 "$PYTHON" benchmarks/gpu_parts.py doctor
    part check 140 "$PYTHON" benchmarks/gpu_parts.py check
    part kernels 150 "${PYTEST[@]}" --gpu "${MANY[@]}" -k "not torch" \
        tests/kernels/test_{aggregate,chain_loss,forms,losses,random,range}.py
    # The longest first.
    part tests 140 "${PYTEST[@]}" --gpu "${MANY[@]}" \
        tests/test_{soak,tuning,golden,training,packed,processes,resume,data,teacher_cache}.py
    for tool in memcheck racecheck; do
        if command -v compute-sanitizer >/dev/null; then
            part "$tool" 50 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" benchmarks/gpu_parts.py small
        else
            names+=("$tool")
            codes+=(77)
        fi
    done
}

speed() {
    # What matters most first: out of time, the report has what was measured until then.
    part bench 360 "${PYTEST[@]}" benchmarks/test_{step,engine,objective,scaling}.py --benchmark-json="$OUT/bench.json"
    part record 20 "$PYTHON" benchmarks/bench_record.py convert --report "$OUT/bench.json" --output-dir "$OUT"
    part forms 90 "$PYTHON" benchmarks/gpu_parts.py forms
    part profile 40 "$PYTHON" benchmarks/gpu_parts.py profile "$OUT"
    part train 75 "$PYTHON" benchmarks/gpu_parts.py train "$scratch"
}

"$half"
echo "== exit codes"
failed=0
for i in "${!names[@]}"; do
    printf '%-10s %s\n' "${names[$i]}" "${codes[$i]}"
    [[ ${codes[$i]} == 0 || ${codes[$i]} == 77 ]] || failed=1
done
exit "$failed"
