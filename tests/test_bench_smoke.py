"""The benchmarks run, at tiny sizes: so that they cannot rot. Figures are not looked at."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

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
