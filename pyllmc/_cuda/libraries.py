"""Where NVIDIA's libraries lie: the files to try, in order, and what to say when none of them serves.

They come with the nvidia-* wheels, with a CUDA toolkit, or from the system; each is opened by its absolute path. Called
by ops.pyx.
"""

import importlib.util
import os
from pathlib import Path

# Newest first, as the folders in the wheels are named and as the files are.
_VERSIONS = (("cu13", "13"), ("cublas", "12"))


def _wheel_folders() -> list[Path]:
    """The folders `nvidia` of all places that Python imports from."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        return []
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def _toolkits() -> list[Path]:
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    return [Path(place) for place in dict.fromkeys([*filter(None, named), "/usr/local/cuda"])]


def cublaslt() -> list[str]:
    """Files that may be cuBLASLt: those there are in wheels and toolkits, then names for the system's own search."""
    files = [
        folder / part / "lib" / f"libcublasLt.so.{version}"
        for part, version in _VERSIONS
        for folder in _wheel_folders()
    ]
    files += [
        toolkit / part / f"libcublasLt.so.{version}"
        for toolkit in _toolkits()
        for _, version in _VERSIONS
        for part in ("lib64", "lib")
    ]
    there = [str(file.absolute()) for file in files if file.exists()]
    return there + [f"libcublasLt.so.{version}" for _, version in _VERSIONS]


def not_found(name: str, package: str, reasons: list[str]) -> str:
    """One line: what is missing, what was tried, what to install."""
    places = ", ".join(map(str, [*_wheel_folders(), *_toolkits()]))
    return (
        f"{name} was not found in {places}, nor by the system ({'; '.join(reasons)}); "
        f"to install it: pip install {package}"
    )
