"""`python -m pyllmc` and `python -m pyllmc info`."""

import os
import re
import subprocess
import sys

import pytest

import pyllmc
from pyllmc import __main__, cli


def test_overview(capsys):
    assert cli.run_main(__main__.main, []) == 0
    out = capsys.readouterr().out
    for name in ("train", "generate", "plot", "datasets"):
        assert f"python -m pyllmc.{name}" in out
    assert "python -m pyllmc info" in out


def test_info(capsys):
    assert cli.run_main(__main__.main, ["info"]) == 0
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(rows) == [
        "pyllmc", "Python", "CUDA", "processor", "threads", "instruction set", "OpenMP", "peak", "memory"
    ]  # fmt: skip
    assert rows["pyllmc"] == pyllmc.__version__
    assert re.match(r"\d+ \(.+\)$", rows["threads"])
    assert rows["instruction set"].startswith(("baseline", "avx2", "avx512"))
    assert rows["OpenMP"].startswith(("yes", "no: "))
    assert rows["CUDA"].startswith(("available", "no: "))
    assert re.match(r"\d+ GFLOP/s", rows["peak"])


@pytest.mark.parametrize("isa", ["nonsense", "baseline"])
def test_info_in_a_process_of_its_own(isa):
    """A module set that cannot be is reported, and the rest of the information is still there."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYLLMC_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-m", "pyllmc", "info"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0 and done.stderr == ""
    if isa == "nonsense":
        assert re.search(
            r"CPU ops +not available: PYLLMC_ISA=nonsense is unknown; available here: baseline", done.stdout
        )
    else:
        assert re.search(r"instruction set +baseline( \(\w+\))?, \d+ floats at a time", done.stdout)
    assert "memory" in done.stdout


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run_main(__main__.main, ["inform"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
