"""bench/gpu_check.sh: which stages run, what becomes of one that fails, what is written; with stand-ins for tools."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("build", "test", "repeat", "sanitize", "parity", "bench")
# What the program of each stage prints where there is a GPU. What the script itself does in Python is done.
PYTHON = """#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
    *backend\\(*) echo "note: NVIDIA H200" ;;
    "- "*results.json* | -c*) exec {python} "$@" ;;
    "- "*) if [ -n "${{LACKS:-}}" ]; then exec {python} - "$2" "$LACKS"; fi ;;
    *) if [ -n "${{GPU:-}}" ]; then echo "error: no NVIDIA driver was found" >&2; exit 1; fi ;;&
    "setup.py build_ext --inplace") echo "archs $PYLLMC_CUDA_ARCHS cuda $PYLLMC_CUDA"; exit "${{BUILD:-0}}" ;;
    "-m pytest "*) echo "812 passed in 40.00s" ;;
    tests/repeated.py) echo "${{REPEATED:-the same bits}}"; exit "${{REPEAT:-0}}" ;;
    tests/smallest.py) echo "22 ops ran on NVIDIA H200" ;;
    bench/parity.py*) sleep "${{PARITY:-0}}"; echo "at most, and allowed: float32 differs by 3.0e-06 (0.0001)" ;;
    bench/compare.py\\ --from*) echo "the table of bench.json again"; echo "3 of 4 targets met" ;;
    bench/compare.py*) echo "{{}}" >"$OUT/bench.json"; sleep "${{BENCH:-0}}"; echo "6 of 9 targets met" ;;
    *) echo "no stand-in for $*"; exit 1 ;;
esac
"""
SANITIZER = """#!/bin/bash
# --tool NAME ... PYTHON PROGRAM
echo "========= COMPUTE-SANITIZER"
tool=$2
echo "$*" >>"$CALLS"
if [ "${DEVICE:-}" = refused ]; then echo "========= Device not supported"; exit 0; fi
"${@: -2}"
if [ "$tool" = racecheck ]; then
    echo "========= RACECHECK SUMMARY: ${HAZARDS:-0} hazards displayed (${HAZARDS:-0} errors, 0 warnings)"
    exit $((${HAZARDS:-0} ? 9 : 0))
fi
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs the script with stand-ins on PATH; gives its exit status, what it printed and the folder of the results."""
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    scripts = {"python3": PYTHON.format(python=sys.executable), "compute-sanitizer": SANITIZER, "nvcc": "#!/bin/sh\n"}
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))

    def run(*stages, without=(), **environment):
        for name in without:
            (tools / name).unlink()
        path = os.pathsep.join([str(tools), "/usr/bin", "/bin"])
        names = {"PATH": path, "OUT": str(out), "PYTHON": str(tools / "python3"), "CUDA_HOME": str(tmp_path)}
        done = subprocess.run(
            [str(ROOT / "bench" / "gpu_check.sh"), *stages], env=os.environ | names | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
        )  # fmt: skip
        return done.returncode, done.stdout, out

    return run


def results(out):
    return {stage["stage"]: stage for stage in json.loads((out / "results.json").read_text())["stages"]}


def test_all_stages_run_in_order_and_the_table_comes_last(check):
    code, printed, out = check()
    assert code == 0, printed
    assert re.findall(r"^==== (\w+)$", printed, re.MULTILINE) == list(STAGES)
    found = results(out)
    assert list(found) == list(STAGES) and all(stage["result"] == "ok" for stage in found.values())
    assert found["test"]["note"] == "812 passed in 40.00s" and found["bench"]["note"] == "6 of 9 targets met"
    assert "-o faulthandler_timeout=" in Path(os.environ["CALLS"]).read_text(), "a test that hangs would not be named"
    assert found["build"]["note"] == "NVIDIA H200" and "archs 90a cuda 1" in (out / "build.log").read_text()
    assert found["sanitize"]["note"].startswith("memcheck: 0 errors; racecheck: 0 hazards displayed (0 errors")
    table = printed.rpartition("stage ")[2].splitlines()
    assert [line.split()[0] for line in table[1:7]] == list(STAGES) and table[-1] == f"logs and JSON: {out}"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(f"{stage}.log" for stage in STAGES), "bench.json", "results.json"]
    )


def test_only_memcheck_looks_at_the_libraries_kernels(check):
    check("sanitize")
    calls = [line for line in Path(os.environ["CALLS"]).read_text().splitlines() if line.startswith("--tool ")]
    assert [call.split()[1] for call in calls] == ["memcheck", "racecheck", "synccheck"]
    assert ["--kernel-name kernel_substring=pyllmc " in call for call in calls] == [False, True, True]


def test_only_what_is_asked_for_runs(check):
    code, printed, out = check("parity", "build", PYLLMC_CUDA_ARCHS="80 90a")
    assert code == 0 and list(results(out)) == ["parity", "build"]
    assert "archs 80 90a cuda 1" in printed and "compare.py" not in Path(os.environ["CALLS"]).read_text()
    # Another call for the same folder, as where a command may only last so long.
    code, printed, _ = check("test", "build", BUILD="5")
    assert code == 1 and {name: stage["result"] for name, stage in results(out).items()} == {
        "parity": "ok", "test": "ok", "build": "FAILED",
    }  # fmt: skip
    assert "parity" not in printed.rpartition("stage ")[2]


def test_a_stage_that_fails_does_not_keep_the_next_from_running(check):
    code, printed, out = check("build", "test", BUILD="5")
    found = results(out)
    assert code == 1 and [stage["result"] for stage in found.values()] == ["FAILED", "ok"]
    assert re.search(r"^build +FAILED", printed, re.MULTILINE) and found["build"]["note"] == "archs 90a cuda 1"


def test_a_stage_that_ends_early_is_noted_by_the_last_that_it_said(check):
    code, _, out = check("parity", "test", GPU="none")
    found = {(stage["result"], stage["note"]) for stage in results(out).values()}
    assert code == 1 and found == {("FAILED", "error: no NVIDIA driver was found")}


def test_bits_that_differ_fail_with_what_differs(check):
    code, _, out = check("repeat", REPEATED="FAILED: attention_backward differs the 7. time", REPEAT="1")
    found = results(out)["repeat"]
    assert code == 1 and found["result"] == "FAILED" and found["note"].endswith("differs the 7. time")


def test_what_was_measured_before_the_end_is_shown(check):
    code, printed, out = check("bench", BENCH="60", STAGE_SECONDS="2")
    found = results(out)["bench"]
    assert code == 1 and found["result"] == "stopped" and "the table of bench.json again" in printed
    assert found["note"] == "3 of 4 targets met, of what was measured"


def test_a_stage_that_does_not_end_is_stopped(check):
    code, _, out = check("parity", "bench", PARITY="60", STAGE_SECONDS="1")
    assert code == 1 and [stage["result"] for stage in results(out).values()] == ["stopped", "ok"]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HAZARDS": "2"}, "racecheck: 2 hazards displayed (2 errors, 0 warnings) (exit status 9)"),
        ({"DEVICE": "refused"}, "memcheck: did not run (exit status 0)"),
    ],
    ids=["finds a hazard", "does not get to work"],
)
def test_a_sanitizer_that_finds_something_or_did_not_run_fails(check, environment, words):
    code, _, out = check("sanitize", **environment)
    found = results(out)["sanitize"]
    assert code == 1 and found["result"] == "FAILED" and words in found["note"]


@pytest.mark.parametrize(("stage", "tool"), [("sanitize", "compute-sanitizer"), ("build", "nvcc")])
def test_a_missing_tool_is_named(check, stage, tool):
    if shutil.which(tool, path="/usr/bin:/bin"):
        pytest.skip(f"{tool} is in a folder of the system")
    code, _, out = check(stage, without=[tool])
    assert code == 1 and results(out)[stage]["result"] == "missing"
    assert results(out)[stage]["note"].startswith(f"not run, {tool} is not on PATH")


def test_a_missing_package_is_named(check):
    code, _, out = check("parity", LACKS="no_such_package")
    assert code == 1 and results(out)["parity"]["result"] == "missing"
    assert results(out)["parity"]["note"].endswith("has no no_such_package")


def test_an_unknown_stage_is_refused_before_anything_runs(check):
    code, printed, out = check("test", "frob")
    assert code == 2 and printed == f"error: there is no stage frob; there are {' '.join(STAGES)}\n"
    assert not out.exists()


def test_a_python_that_is_too_old_is_refused(check, tmp_path):
    for name in ("python3", "python3.14", "python3.13", "python3.12", "python3.11"):
        (tmp_path / "tools" / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "tools" / name).chmod(0o755)
    code, printed, _ = check()
    assert code == 2 and printed.startswith("error: Python 3.11 or newer is needed")
