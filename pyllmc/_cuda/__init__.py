"""The CUDA backend: the op set on an NVIDIA GPU, where the extension was built and a GPU can run it.

backends.py reads AVAILABLE, and shows REASON to whoever asks for "cuda". The ops are those of ops.pyx, with bfloat16 as
the float of new arrays; `op_set("float32")` is the same with float32. README.md beside this says how they are made.
"""

import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path


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

if AVAILABLE:
    globals().update({name: op for name, op in vars(module.op_set("bfloat16")).items() if not name.startswith("_")})
