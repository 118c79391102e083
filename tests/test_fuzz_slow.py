"""100,000 damaged files of every format, each read in a process with limits on memory and time: `pytest -m slow`."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import pytest
from hostile import KINDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit the memory of a process"),
]

SEED = 20240520
FILES = 100_000
# GPT-2's own table takes longer to read than all of the others together.
LARGE, LARGE_FILES = "tokenizer-v1", 1_000
PER_PROCESS = 2_000


def jobs():
    """(kind, first file, number of files) of each process."""
    each = -(-(FILES - LARGE_FILES) // (len(KINDS) - 1))
    for name in KINDS:
        count = LARGE_FILES if name == LARGE else each
        for first in range(0, count, PER_PROCESS):
            yield name, first, min(PER_PROCESS, count - first)


def read_damaged(job, folder):
    """How many of these files could be read, and None or what went wrong."""
    name, first, count = job
    folder.mkdir()
    command = [sys.executable, hostile.__file__, name, str(SEED), str(first), str(count), str(folder)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
    }  # fmt: skip
    with open(folder / "stderr", "wb") as errors:
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=errors, env=environment, timeout=300, check=False
            )
            status, output = done.returncode, done.stdout.decode()
        except subprocess.TimeoutExpired as error:
            status, output = "none, it hung", (error.stdout or b"").decode()
    lines = output.splitlines()
    if status == 0:
        assert len(lines) == count + 1
        return json.loads(lines[-1])["readable"], None
    last = (folder / "stderr").read_text(errors="replace").strip().rpartition("\n")[2]
    return 0, f"{name}, seed {SEED}, file {lines[-1] if lines else first}: exit status {status}: {last}"


def test_100_000_damaged_files(tmp_path):
    todo = list(jobs())
    assert sum(count for _, _, count in todo) >= FILES
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(read_damaged, todo, (tmp_path / str(i) for i in range(len(todo)))))
    assert [problem for _, problem in results if problem] == []
    # Damage that is always seen, or never, would be no test.
    for name in KINDS:
        total = sum(count for kind, _, count in todo if kind == name)
        readable = sum(number for (kind, _, _), (number, _) in zip(todo, results) if kind == name)
        assert 0 < readable < 0.9 * total, f"{readable} of {total} damaged files of {name} could be read"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("bytearray(2**29)", "MemoryError"),
        ("while True: pass", f"exit status -{signal.SIGALRM:d}:"),
        ("import ctypes; ctypes.string_at(0)", f"exit status -{signal.SIGSEGV:d}:"),
        ("raise KeyError('gone')", "KeyError: 'gone'"),
        ("raise ValueError('no name')", "AssertionError: names no file: 'no name'"),
    ],
)
def test_what_would_be_noticed(tmp_path, monkeypatch, code, told):
    """The test above can fail: a reader that does one of these at its 17th file is named, with the file's number."""
    program = f"""
import hostile, itertools, dataclasses
hostile.SECONDS = 1
kind = hostile.KINDS["model-v3"]
calls = itertools.count()
def read(folder):
    if next(calls) == 18:
        {code}
    kind.read(folder)
hostile.KINDS["model-v3"] = dataclasses.replace(kind, read=read)
import sys
hostile.main(*sys.argv[1:])
"""
    (tmp_path / "worker.py").write_text(program)
    monkeypatch.setattr(hostile, "__file__", str(tmp_path / "worker.py"))
    readable, problem = read_damaged(("model-v3", 0, 30), tmp_path / "files")
    assert readable == 0 and problem.startswith(f"model-v3, seed {SEED}, file 17: exit status ") and told in problem
