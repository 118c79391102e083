#!/usr/bin/env bash
# What only a GPU can tell, in stages that end by themselves: on a machine with an NVIDIA GPU, nvcc, PyTorch and
# NVIDIA's wheels, without a network.
#
#     bench/gpu_check.sh                     all of them
#     bench/gpu_check.sh build test          some of: build test repeat sanitize parity bench
#
#   build      compiles the extensions in place
#   test       the tests of the CUDA backend on the GPU; where there are several, two processes that train one model too
#   repeat     the same bits again and again, of blocks that wait for each other and of graphs that are replayed
#   sanitize   compute-sanitizer's memcheck, and of our own kernels racecheck and synccheck, on the smallest cases of
#              each op
#   parity     ten training steps beside PyTorch's
#   bench      bench/compare.py --device cuda: figures, targets
#
# A stage that fails does not keep the next from running. Logs and JSON are written as they come; the last lines are a
# table of the stages, and the exit code is 0 where all went well. Environment:
#     OUT=FOLDER             where they go (default: bench/results/gpu-DATE)
#     PYTHON=python3.12      which Python, from 3.11 on (default: python3, or the newest other there is)
#     PYLLMC_CUDA_ARCHS=90a  what to build for
#     STAGE_SECONDS=480      after which a stage is stopped
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
all=(build test repeat sanitize parity bench)
limit=${STAGE_SECONDS:-480}
missing=77  # the exit status of a stage that lacks something
export OUT=${OUT:-$root/bench/results/gpu-$(date +%F)}
export PYTHONPATH=$root PYTHONUNBUFFERED=1
# Where CUDA keeps what is not always on PATH.
cuda=${CUDA_HOME:-/usr/local/cuda}
export PATH=$PATH:$cuda/bin:$cuda/compute-sanitizer

# ---- the stages: the line "note: ..." goes into the table ------------------------------------------------------------

stage_build() {
    needs "$1" setuptools Cython numpy || return $missing
    has "$1" nvcc "${CC:-cc}" || return $missing
    PYLLMC_CUDA=1 PYLLMC_CUDA_ARCHS=${PYLLMC_CUDA_ARCHS:-90a} "$PYTHON" setup.py build_ext --inplace || return
    "$PYTHON" -c 'from pyllmc import backend; print("note:", backend("cuda").device()["name"])'
}

stage_test() {
    needs "$1" pytest hypothesis numpy requests tiktoken tqdm || return $missing
    # A newer package than the tests were written with may warn; that is not what is asked here. What hangs, in blocks
    # that wait for each other for one, ends with a traceback, not with the stage.
    "$PYTHON" -m pytest -q -p no:cacheprovider -W default -o faulthandler_timeout=120 \
        -o faulthandler_exit_on_timeout=true --device cuda --maxfail 30 tests | tee "$scratch"
    local status=${PIPESTATUS[0]}
    note "$(tail -n 1 "$scratch")"
    return "$status"
}

stage_repeat() {
    needs "$1" numpy || return $missing
    "$PYTHON" tests/repeated.py 2>&1 | tee "$scratch"
    local status=${PIPESTATUS[0]}
    note "$(tail -n 1 "$scratch")"
    return "$status"
}

stage_sanitize() {
    needs "$1" pytest numpy || return $missing
    has "$1" compute-sanitizer || return $missing
    local tool summary status=0 notes=() options
    for tool in memcheck racecheck synccheck; do
        echo "---- $tool"
        # The runtimes ask the driver for functions of other versions, which is no error; ours are told as exceptions.
        options=(--tool "$tool" --report-api-errors no --error-exitcode 9)
        # The libraries' kernels have barriers of their own kinds, which look like hazards; what they read and write is
        # what we gave them.
        if [ "$tool" != memcheck ]; then options+=(--kernel-name kernel_substring=pyllmc); fi
        timeout -k 5 $((limit / 3)) compute-sanitizer "${options[@]}" "$PYTHON" tests/smallest.py 2>&1 | tee "$scratch"
        local code=${PIPESTATUS[0]}
        summary=$(grep -E '^=+ (ERROR|RACECHECK) SUMMARY: ' "$scratch" | tail -n 1 | sed 's/.*SUMMARY: //')
        # A tool that did not get to work may end well: its summary and the program's last line have to be there.
        if [ "$code" -ne 0 ] || [ -z "$summary" ] || ! grep -q ' ops ran on ' "$scratch"; then
            status=1
            summary="${summary:-did not run} (exit status $code)"
        fi
        notes+=("$tool: $summary")
    done
    printf 'note: %s' "${notes[0]}"
    printf '; %s' "${notes[@]:1}"
    echo
    return "$status"
}

stage_parity() {
    needs "$1" torch tiktoken || return $missing
    "$PYTHON" bench/parity.py --json "$OUT/parity.json" | tee "$scratch"
    local status=${PIPESTATUS[0]}
    note "$(grep '^at most' "$scratch" | tail -n 1)"
    return "$status"
}

stage_bench() {
    needs "$1" torch pytest pytest_benchmark || return $missing
    "$PYTHON" bench/compare.py --device cuda --details --threads "$(nproc)" --json "$OUT/bench.json" | tee "$scratch"
    local status=${PIPESTATUS[0]}
    note "$(grep 'targets met$' "$scratch" | tail -n 1)"
    return "$status"
}

# ---- what they share -------------------------------------------------------------------------------------------------

# note TEXT: the line for the table; none where there is nothing to tell, so that the last that was said goes there.
note() {
    if [ -n "$1" ]; then echo "note: $1"; fi
}

# needs STAGE MODULE...: says which of Python's modules are missing; false where some are.
needs() {
    "$PYTHON" - "$@" <<'END'
import importlib.util, sys
stage, *wanted = sys.argv[1:]
missing = [name for name in wanted if importlib.util.find_spec(name) is None]
if missing:
    print(f"note: not run, {sys.executable} has no {', '.join(missing)}")
sys.exit(bool(missing))
END
}

# has STAGE COMMAND...: the same of commands.
has() {
    local command
    for command in "${@:2}"; do
        if ! command -v "$command" >/dev/null; then
            echo "note: not run, $command is not on PATH nor in $cuda"
            return 1
        fi
    done
}

# The newest Python that is there, python3 first; all it has to be is 3.11 or newer.
find_python() {
    local name
    for name in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# record STAGE RESULT SECONDS NOTE: puts a stage into results.json, beside those of earlier calls; "machine" begins it.
record() {
    "$PYTHON" - "$OUT/results.json" "$@" <<'END'
import importlib.metadata, json, pathlib, platform, subprocess, sys
path, stage, result, seconds, note = sys.argv[1:]

def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

path = pathlib.Path(path)
try:
    stages = json.loads(path.read_text())["stages"]
except (OSError, ValueError, KeyError):
    stages = []
if stage == "machine":
    data = {
        "gpu": said("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        "nvcc": (said("nvcc", "--version") or "").splitlines()[-1:], "python": platform.python_version(),
        "packages": {name: version(name) for name in ("Cython", "numpy", "setuptools", "torch", "pytest")},
        "commit": said("git", "rev-parse", "HEAD") or None, "stages": stages,
    }
    print("\n".join(f"{key}: {value}" for key, value in data.items() if key != "stages"))
else:
    data = json.loads(path.read_text())
    this = {"stage": stage, "result": result, "seconds": int(seconds), "note": note}
    data["stages"] = [*(other for other in stages if other["stage"] != stage), this]
path.write_text(json.dumps(data, indent=1) + "\n")
END
}

# ---- one stage, as the script calls itself ---------------------------------------------------------------------------

if [ "${1:-}" = --stage ]; then
    cd "$root" || exit 1
    scratch=$(mktemp)
    trap 'rm -f "$scratch"' EXIT
    "stage_$2" "$2"
    exit
fi

# ---- all that were asked for -----------------------------------------------------------------------------------------

for stage in "$@"; do
    case " ${all[*]} " in
        *" $stage "*) ;;
        *) echo "error: there is no stage $stage; there are ${all[*]}" >&2; exit 2 ;;
    esac
done
if ! found=$(find_python); then
    echo "error: Python 3.11 or newer is needed; name one with PYTHON=" >&2
    exit 2
fi
export PYTHON=$found
if [ $# -eq 0 ]; then set -- "${all[@]}"; fi
mkdir -p "$OUT" || exit 2
cd "$root" || exit 2
record machine "" 0 ""

failed=0
table=$(printf '%-10s %-10s %8s  %s' stage result seconds note)
for stage in "$@"; do
    printf '\n==== %s\n' "$stage"
    log=$OUT/$stage.log start=$SECONDS
    timeout -k 15 "$limit" "$BASH" "${BASH_SOURCE[0]}" --stage "$stage" 2>&1 | tee "$log"
    case ${PIPESTATUS[0]} in
        0) result=ok ;;
        $missing) result=missing ;;
        124 | 137) result=stopped ;;
        *) result=FAILED ;;
    esac
    if [ $result != ok ]; then failed=1; fi
    if [ "$stage $result" = "bench stopped" ] && [ -f "$OUT/bench.json" ]; then  # the table of what there was time for
        "$PYTHON" bench/compare.py --from "$OUT/bench.json" --details | tee -a "$log"
        echo "note: $(grep 'targets met$' "$log" | tail -n 1), of what was measured" >>"$log"
    fi
    note=$(grep '^note: ' "$log" | tail -n 1)
    note=${note#note: }
    # Where it came to no note, the last that it said.
    if [ -z "$note" ]; then note=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1); fi
    record "$stage" "$result" $((SECONDS - start)) "$note"
    table+=$(printf '\n%-10s %-10s %8d  %s' "$stage" "$result" $((SECONDS - start)) "$note")
done
printf '\n%s\n\nlogs and JSON: %s\n' "$table" "$OUT"
exit $failed
