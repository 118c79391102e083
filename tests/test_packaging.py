"""What is in the source distribution and in the wheel, and that the wheel works outside the checkout.

The source distribution is built from a copy of the repository's files, the wheel from the source distribution, as an
installer would do it, in this environment (no build isolation, so nothing is downloaded).
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import pyllmc
from pyllmc._ops import isa

pytest.importorskip("Cython", minversion="3.0.12")
pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parent.parent
NAME = f"pyllmc-{pyllmc.__version__}"
TOP_LEVEL = ("CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py", ".ci/run")
FOLDERS = ("pyllmc", "tests", "bench", "docs")
MADE_BY_SETUPTOOLS = {"PKG-INFO", "setup.cfg"}
DATA = {"pyllmc/py.typed", "pyllmc/ops.pyi", "pyllmc/assets/shakespeare.txt", "pyllmc/assets/gpt2_tokenizer.bin",
        "pyllmc/assets/README.md"}  # fmt: skip
MAX_WHEEL_BYTES = 5_000_000


def repository_files():
    """Every file that belongs to the repository: no build products, no prepared data, no runs."""
    found = [Path(name) for name in TOP_LEVEL]
    found += [path.relative_to(ROOT) for path in (ROOT / "data").iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {
        str(path) for path in found if "__pycache__" not in path.parts and path.suffix not in (".so", ".pyd", ".pyc")
    }


def python(*arguments, cwd, path=None):
    """Runs python in `cwd` and returns what it printed; only `path` is where it finds pyllmc before site-packages."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYLLMC_") and k != "PYTHONPATH"}
    environment["PYLLMC_CUDA"] = "0"  # its kernels take minutes to compile, and tests/test_build.py has the rules
    if path:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [sys.executable, *arguments], check=False, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked."""
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    for name in repository_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    python("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=tree)
    with tarfile.open(folder / f"{NAME}.tar.gz") as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / NAME


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel's path, built from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    python("-c", f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})", cwd=sdist)
    (path,) = folder.glob("*.whl")
    return path


def test_sdist_has_every_source_and_nothing_else(sdist):
    files = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    files = {name for name in files if not name.startswith(("pyllmc.egg-info/", "build/"))}
    assert files - MADE_BY_SETUPTOOLS == repository_files()
    assert {Path(name).suffix for name in files} >= {".pyx", ".pxi", ".pxd", ".h", ".cu", ".cuh"}
    assert not any(name.endswith(".c") for name in files)


def test_wheel_has_modules_and_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = [name for name in repository_files() if name.startswith("pyllmc/")]
    modules = {name for name in files if name.endswith(".py")}
    recipes = {name for name in files if name.startswith("pyllmc/recipes/") and name.endswith(".toml")}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    extensions = {f"pyllmc/_ops/{name}{suffix}" for name in ["isa", *(f"_{isa_name}" for isa_name in isa.BUILT)]}
    package = {name for name in names if not name.startswith(f"{NAME}.dist-info/")}
    assert package == modules | extensions | recipes | DATA and recipes
    licences = {name for name in names if "/licenses/" in name}
    assert licences == {f"{NAME}.dist-info/licenses/{name}" for name in ("LICENSE", "pyllmc/assets/README.md")}


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    where = python("-c", "import pyllmc._ops; print(pyllmc._ops.__file__)", cwd=elsewhere, path=site)
    assert Path(where.strip()).is_relative_to(site)
    assert pyllmc.__version__ in python("-m", "pyllmc", "info", cwd=elsewhere, path=site)
    train = ["--max-steps", "3", "--layers", "1", "--channels", "16", "--heads", "1", "--val-batches", "1"]
    python("-m", "pyllmc.train", *train, "--sample-length", "20", cwd=elsewhere, path=site)
    assert list((elsewhere / "out" / "shakespeare").glob("model_*.bin"))
    python("-m", "pyllmc.generate", "--max-new-tokens", "20", cwd=elsewhere, path=site)
    python("-m", "pyllmc.datasets", "shakespeare", "--tokenizer", "gpt2", cwd=elsewhere, path=site)
    assert (elsewhere / "data" / "shakespeare" / "train.bin").stat().st_size > 500_000
