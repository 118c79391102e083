"""The benchmarks run, at tiny sizes: so that they cannot rot. Figures are not looked at."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import shim

from pyllmc import _cuda

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"


def python(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def load(name):
    """A module of bench/, under a name of its own: tests/ has a compare.py too."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(monkeypatch):
    """What loads a module of bench/ that imports others of it."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    return load


def test_every_benchmark_runs():
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "bench", "--model", "tiny"]
    result = python(*command, "--batch", "2", "--context", "16", "--benchmark-disable")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The JSON of two contestants and their probes, and what was printed."""
    path = tmp_path_factory.mktemp("results") / "deep" / "results.json"
    command = [BENCH / "compare.py", "--suite", "tiny", "--rounds", "2", "--threads", "1", "--json", path]
    command += ["--contestants", "cpu,numpy,fma,copy,read,update,cpu-products,fma-1t,cpu-1t"]
    result = python(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    return path, result.stdout


def test_contestants_take_turns(results):
    data = json.loads(results[0].read_text())
    assert data["errors"] == []
    assert {"machine_info", "commit_info", "benchmarks", "datetime", "version"} <= set(data)
    machine = data["machine_info"]["pyllmc"]
    assert machine["threads"] == 1 and machine["peak_gflops"] > 0 and machine["copy_gbytes_per_second"] > 0
    played = {}
    for record in data["benchmarks"]:
        info = record["extra_info"]
        played.setdefault(info["benchmark"], {})[info["contestant"]] = record
        assert len(info.get("figures", record["stats"]["data"])) == record["stats"]["rounds"] == 2
        assert record["stats"]["min"] > 0 and record["params"]["contestant"] == info["contestant"]
    products = [players for name, players in played.items() if name.startswith("products")]
    assert products and all(set(players) == {"cpu", "numpy", "fma"} for players in products)
    assert all("cpu" in players for players in played.values())
    assert all(p["cpu"]["extra_info"]["peak_rss"] > 1e7 for name, p in played.items() if name.startswith("long"))


def test_table_of_targets_is_printed_again(results):
    path, printed = results
    again = python(BENCH / "compare.py", "--from", path)
    assert again.returncode == 0 and again.stdout == printed
    for part in ("product forward", "products over numpy, lowest", "attention backward, T = 64", "adamw update",
                 "classifier over its three products", "step T=64 over its limit", "all threads over one",
                 "generation, of read bandwidth", "prefill, of peak", "import pyllmc", "targets met"):  # fmt: skip
        assert part in printed, part
    assert "GFLOP/s" in python(BENCH / "compare.py", "--from", path, "--details").stdout


def test_roofline_is_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    done = python(BENCH / "roofline.py", results[0], tmp_path / "roofline.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_sweeps_add_their_rounds(bench):
    compare = bench("compare")
    args = ["--suite", "tiny", "--only", "products", "--rounds", "4", "--sweeps", "2", "--threads", "1"]
    match = compare.Match(compare.parse_arguments([*args, "--contestants", "cpu,fma"]))
    match.entries = match.entries[:2]
    match.play()
    assert match.errors == [] and not match.players
    who = [(record["extra_info"]["benchmark"], record["extra_info"]["contestant"]) for record in match.records]
    assert who == [(entry.name, name) for entry in match.entries for name in ("cpu", "fma")]
    for record in match.records:
        stats = record["stats"]
        assert stats["rounds"] == len(stats["data"]) == 4 and stats["min"] == min(stats["data"])
        assert len(record["extra_info"].get("figures", [0] * 4)) == 4


def test_a_contestant_that_dies_is_reported(bench, monkeypatch):
    compare = bench("compare")
    args = ["--suite", "tiny", "--only", "import,products", "--rounds", "2", "--threads", "1"]
    match = compare.Match(compare.parse_arguments([*args, "--contestants", "cpu,numpy"]))
    match.entries = match.entries[:3] + match.entries[-1:]
    turn = compare.turns.Player.turn

    def deadly_turn(player):
        if player.name == "numpy" and len(match.records) >= 2:
            player.process.kill()
        return turn(player)

    monkeypatch.setattr(compare.turns.Player, "turn", deadly_turn)
    match.play()
    ((name, what, why),) = match.errors
    assert name == "numpy" and what == match.entries[1].name and "ended with -9" in why
    played = [record["extra_info"]["contestant"] for record in match.records]
    assert played == ["cpu", "numpy", "cpu", "cpu", "cpu"]


def test_a_case_that_fails_is_reported_and_the_next_is_played(bench, monkeypatch, tmp_path):
    """Through a broken NumPy of its own: one product raises, the rest goes on."""
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
        import numpy, os, sys
        if any(word == "numpy" for word in sys.orig_argv):
            matmul, calls = numpy.matmul, []
            def broken(*arguments, **options):
                calls.append(1)
                if len(calls) == 1:
                    raise MemoryError("a broken product")
                return matmul(*arguments, **options)
            numpy.matmul = broken
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    compare = bench("compare")
    args = ["--suite", "tiny", "--only", "products", "--rounds", "1", "--threads", "1", "--contestants", "cpu,numpy"]
    match = compare.Match(compare.parse_arguments(args))
    match.entries = match.entries[:2]
    match.play()
    assert match.errors == [("numpy", match.entries[0].name, "MemoryError: a broken product")]
    assert [record["extra_info"]["contestant"] for record in match.records] == ["cpu", "cpu", "numpy"]


def test_llmc_takes_turns(bench, tmp_path):
    """A program that prints what llm.c's does: steps are timed from outside, what lies between them is left out."""
    program = tmp_path / "train_gpt2"
    program.write_text(
        textwrap.dedent(f"""\
        #!{sys.executable}
        import time
        print("[GPT-2]")
        for step in range(8):
            if step == 4:
                print("val loss 5.0")
                time.sleep(0.3)
            time.sleep(0.03)
            print(f"step {{step}}: train loss 4.0 (took 30.0 ms)")
        """)
    )
    program.chmod(0o755)
    player = bench("llmc_program").Program("llmc", program, ["step: a step"], dict(os.environ), timeout=20)
    assert player.start() == ["step: a step"]
    assert 0.02 < player.prepare("step: a step") < 0.2
    player.begin(5)
    assert all(0.02 < player.turn() < 0.25 for _ in range(5))
    record = player.end()
    assert record["stats"]["rounds"] == 5 and record["extra_info"]["contestant"] == "llmc"
    player.finish()


# ---- on a GPU --------------------------------------------------------------------------------------------------------

# Every Python of a match has the kernels as plain C++ for its CUDA backend.
WITH_STAND_IN = f"""
import importlib.util, os, sys
if any(word.endswith(("compare.py", "pytest")) for word in sys.orig_argv):
    sys.path.append({str(ROOT / "tests")!r})
    import shim
    from pyllmc import _cuda
    _cuda.module, _cuda.REASON, _cuda.AVAILABLE = shim.load(), "", True
    vars(_cuda).update({{k: v for k, v in vars(_cuda.module.op_set("bfloat16")).items() if not k.startswith("_")}})
"""


def test_without_a_gpu_one_line_says_so():
    if _cuda.AVAILABLE:
        pytest.skip("there is a GPU")
    done = python(BENCH / "compare.py", "--device", "cuda")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: --device cuda: {_cuda.REASON} (bench/compare.py --help lists the options)\n"


def test_a_match_on_a_gpu(tmp_path):
    """With the kernels as plain C++: all benchmarks, pyllmc in all ways, the probes, and PyTorch where it is there."""
    if shim.compiler() is None:
        pytest.skip("no C++ compiler")
    shim.load()
    (tmp_path / "sitecustomize.py").write_text(WITH_STAND_IN)
    path = tmp_path / "results.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCH / "compare.py"), "--device", "cuda", "--suite", "cuda-tiny", "--rounds", "1"]
    command += ["--threads", "1", "--json", str(path), "--details"]
    # PyTorch compiles for minutes.
    ways = "cuda,cuda-first,cuda-128M,gemm,device-copy" + (",torch" if importlib.util.find_spec("torch") else "")
    done = subprocess.run([*command, "--contestants", ways], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(path.read_text())
    assert data["errors"] == [] and data["too_large"] == []
    who = {}
    for record in data["benchmarks"]:
        who.setdefault(record["extra_info"]["group"], set()).add(record["extra_info"]["contestant"])
    assert who["gpu-step"] == who["gpu-recompute"] == who["gpu-large"] == {"cuda"}
    assert who["gpu-memory"] == {"cuda", "gemm", "device-copy"} < who["gpu-products"] >= {"cuda-first"}
    assert who["gpu-classifier"] >= {"cuda-128M"} and ("torch" in who["gpu-attention"]) == ("torch" in ways)
    for part in ("training, the public frontier", "memory of a sequence", "the largest model, MFU", "of copy bandwidth",
                 "attention forward and backward", "2 layers of 32, T=16", "of limit", "targets met"):  # fmt: skip
        assert part in done.stdout, part


def record(group, contestant, seconds, **info):
    sizes = {key: info.pop(key) for key in ("L", "C", "B", "T", "recompute", "NH", "HS") if key in info}
    name = f"{group}: {info.get('what', 'step')}-" + ",".join(f"{k}={v}" for k, v in sizes.items())
    known = {"what": "step", "benchmark": name, "group": group, "contestant": contestant, "sizes": sizes}
    stats = {"min": seconds, "median": 2 * seconds, "rounds": 1, "data": [seconds]}
    return {"extra_info": known | {"flops": 0, "bytes": 0} | info, "stats": stats}


def test_what_is_reached_on_a_gpu_is_held_to_the_targets(bench):
    model, a_step = {"L": 12, "C": 768, "T": 1000}, {"flops": 989e9}
    attention = {"B": 1, "T": 1024, "NH": 12, "HS": 64}
    roofs = {"unit": "GFLOP/s", "what": "gelu_forward"}
    records = [
        record("gpu-step", "cuda", 0.004, **model, B=1, **a_step),
        record("gpu-step", "torch-compile", 0.008, **model, B=1, **a_step),
        record("gpu-step", "torch-graphs", 0.005, **model, B=1, **a_step),
        record("gpu-step", "cuda", 0.01, **model, B=5, **a_step),
        record("gpu-step", "torch-compile", 0.0125, **model, B=5, **a_step),
        record("gpu-recompute", "cuda", 1.0, **model, B=2, recompute=1, device_bytes=500 * 2**20),
        record("gpu-recompute", "cuda", 1.0, **model, B=4, recompute=1, device_bytes=900 * 2**20),
        record("gpu-large", "cuda", 0.002, L=48, C=1600, T=1000, B=8, recompute=1, flops=989e9),
        record("gpu-large", "cuda", 0.001, L=48, C=1600, T=1000, B=4, recompute=1, flops=989e9),
        record("gpu-memory", "cuda", 1.0, **roofs, B=1, bytes=3.6e12),
        record("gpu-memory", "device-copy", 1.0, **roofs, B=1, figures=[4000.0]),
        record("gpu-memory", "gemm", 1.0, **roofs, B=1, figures=[790e3]),
        record("gpu-attention", "cuda", 0.1, what="attention_forward", **attention, flops=20e12),
        record("gpu-attention", "torch", 0.05, what="attention_forward", **attention, flops=20e12),
        record("gpu-attention", "cuda", 0.2, what="attention_backward", **attention, flops=50e12),
    ]
    data = {"machine_info": {}, "benchmarks": records, "datetime": "", "suite": "cuda", "errors": [],
            "too_large": [["torch-compile", "gpu-step: B=9", "OutOfMemoryError: all of it"]]}  # fmt: skip
    targets = bench("targets")
    rows = {row.what: row for row in targets.rows(targets.Results.of(data))}
    reached = {what: (round(row.value.best, 3), row.met) for what, row in rows.items()}
    assert reached == {
        "training, the public frontier": (500e3, True),
        "training over torch.compile": (1.25, True),
        "training, excellent": (500e3, False),
        "fine-tuning step over torch.compile's better mode": (1.25, False),
        "memory of a sequence, recompute 1": (200, True),
        "the largest model, MFU": (0.5, False),
        "gelu forward, of copy bandwidth": (0.9, True),
        "attention forward": (200, False),
        "attention forward and backward": (233.333, True),
    }
    assert rows["training over torch.compile"].theirs == "torch-compile 400.0k, B=5"
    assert rows["the largest model, MFU"].shape == "B=8, the largest"
    printed = bench("targets").table(data, details=True)
    assert "does not fit: torch-compile: gpu-step: B=9: OutOfMemoryError" in printed
    assert re.search(r"12 layers of 768, T=1000 +5 +0 +cuda +500,000 +10\.00 +10\.0 %", printed)
    assert re.search(r"gpu-memory.* cuda .* 90\.0 %", printed)


def test_a_step_that_does_not_fit_ends_its_row_of_batches(bench):
    """The larger ones are not asked of that contestant; the others go on, and it with other groups."""
    compare = bench("compare")
    match = compare.Match(compare.parse_arguments(["--suite", "tiny", "--only", "products"]))
    match.args.suite = "cuda"
    entries = [entry for entry in compare.suite.benchmarks("cuda") if entry.group in ("gpu-step", "gpu-attention")]
    player, other = types.SimpleNamespace(name="torch-compile"), types.SimpleNamespace(name="cuda")

    def out_of_memory(name):
        raise compare.turns.Failed("OutOfMemoryError: CUDA out of memory")

    assert all(match._may_fit(player, entry) for entry in entries)
    assert match._attempt(player, entries[3].name, out_of_memory, entries[3].name) is None
    assert match.errors == [] and match.too_large[0][:2] == ("torch-compile", entries[3].name)
    assert not match._may_fit(player, entries[4]) and match._may_fit(other, entries[4])
    assert match._may_fit(player, entries[-1]) and entries[-1].group == "gpu-attention"
