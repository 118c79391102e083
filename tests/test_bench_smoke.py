"""The benchmarks run, at tiny sizes: so that they cannot rot."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_benchmarks_run():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench", "--model", "tiny"]
    command += ["--batch", "2", "--context", "16", "--benchmark-disable"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and "skipped" not in result.stdout
