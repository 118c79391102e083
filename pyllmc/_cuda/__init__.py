"""The CUDA backend: the op set on an NVIDIA GPU, where the extension was built and a GPU can run it.

backends.py reads AVAILABLE, shows REASON to whoever asks for "cuda", and hands out `op_set`. README.md beside this says
how the ops are made.
"""

import functools
import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType


def _load():
    """(the module of ops or None, why no op can run here or "")"""
    if not any((Path(__file__).parent / f"ops{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return None, "pyllmc was built without nvcc, so it has no CUDA kernels"
    try:
        module = importlib.import_module("pyllmc._cuda.ops")
    except ImportError as error:
        return None, f"the CUDA extension cannot be loaded: {error}"
    return module, module.why_unavailable()


module, REASON = _load()
AVAILABLE = not REASON


@functools.cache
def op_set(dtype: str) -> ModuleType:
    """The ops of ops.pyx with `dtype`, "bfloat16" or "float32", as the float of new arrays; one module for each."""
    return module.op_set(dtype)
