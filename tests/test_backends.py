"""pyllmc/backends.py, and what `import pyllmc` costs and says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyllmc

ROOT = Path(pyllmc.__file__).parent.parent


def python(code, cwd=ROOT):
    """Runs code in a fresh interpreter that finds pyllmc in `cwd`."""
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60)


def test_cpu_is_there_and_auto_finds_it(monkeypatch):
    assert pyllmc.backend("cpu").matmul_forward
    monkeypatch.delenv("PYLLMC_DEVICE")
    assert pyllmc.backend() is pyllmc.backend("cuda" if pyllmc._cuda.AVAILABLE else "cpu")


def test_auto_is_cuda_where_that_can_run_unless_the_environment_says_otherwise(gpu, monkeypatch):
    assert pyllmc.backend("auto") is pyllmc.backend("cpu")  # conftest.py
    monkeypatch.delenv("PYLLMC_DEVICE")
    assert pyllmc.backend("auto") is pyllmc.backend("cuda") is pyllmc.backend("cuda", "bfloat16")
    assert pyllmc.backend("cuda", "float32") is not pyllmc.backend("cuda")
    assert pyllmc.backend("cuda", "float32").zeros(2).dtype == "float32"
    monkeypatch.setenv("PYLLMC_DEVICE", "tpu")
    with pytest.raises(ValueError, match="unknown backend 'tpu'; known are auto, cpu, cuda"):
        pyllmc.backend()


def test_cuda_says_why_not():
    from pyllmc import _cuda

    if _cuda.AVAILABLE:
        assert pyllmc.backend("cuda").device()["name"]
    else:
        with pytest.raises(ValueError, match="the CUDA backend is not available: .") as caught:
            pyllmc.backend("cuda")
        assert _cuda.REASON in str(caught.value)


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match="unknown backend 'tpu'; known are auto, cpu, cuda"):
        pyllmc.backend("tpu")


def test_every_public_name_is_there():
    for name in pyllmc.__all__:
        assert getattr(pyllmc, name) is not None and name in dir(pyllmc)
    with pytest.raises(AttributeError, match="module 'pyllmc' has no attribute 'gpt3'"):
        _ = pyllmc.gpt3


def test_importing_is_quick_and_loads_little():
    code = """
import sys, time
import numpy
start = time.process_time()
import pyllmc
print(time.process_time() - start)
pyllmc.GPT2, pyllmc.Tokenizer, pyllmc.DataLoader
print(*sys.modules)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    seconds, modules = result.stdout.splitlines()
    assert float(seconds) < 0.06
    assert not {"tiktoken", "tqdm", "matplotlib", "torch"} & set(modules.split())


def test_denormal_numbers_survive_the_import():
    """Extensions built with -ffast-math would set the processor to flush them to zero, for the whole process."""
    code = "import pyllmc, sys; pyllmc.backend('cpu'); print(sys.float_info.min / 2 != 0)"
    assert python(code).stdout.strip() == "True"


def test_an_unbuilt_tree_says_how_to_build(tmp_path):
    shutil.copytree(ROOT / "pyllmc", tmp_path / "pyllmc", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    code = """
import pyllmc
print(pyllmc.__version__, pyllmc.GPT2Config(1, 1, 8, 5, 4).num_parameters)
try:
    pyllmc.backend("cpu")
except ImportError as error:
    print(error)
"""
    result = python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == f"{pyllmc.__version__} 960"
    assert second == f"pyllmc's extensions are not built; in {tmp_path} run: pip install -e ."
