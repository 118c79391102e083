"""The CUDA backend for machines without a GPU: pyllmc/_cuda compiled as plain C++ through tests/cuda_shim, or, where
nvcc is, to PTX that tests/cuda_ptx runs.

`load(backend)` gives the module that setup.py builds with nvcc, here built from the same .cu and .pyx files; it is
compiled when a source changed, into build/cuda_shim. Called by conftest.py, ptx_counts.py and the tests of the CUDA
backend.
"""

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "pyllmc" / "_cuda"
SHIM = ROOT / "tests" / "cuda_shim"
MACHINE = ROOT / "tests" / "cuda_ptx"
BACKENDS = ("cuda_shim", "cuda_ptx")
BUILD = ROOT / "build" / "cuda_shim"

# As for the kernels on a GPU, a product and a sum may fuse; nothing else of the arithmetic is free.
FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"]
# Kernels as PTX only, for the GPU whose code .ci/run compiles, uncompressed, with the lines of the source.
NVCC = shutil.which("nvcc")
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-gencode=arch=compute_90a,code=compute_90a"]
NVCC_FLAGS += ["-lineinfo", "--no-compress", "-cudart=none"]
# The machine runs on this processor only. It finds CUDA's headers because nvcc calls the compiler.
MACHINE_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-gnu-unique,-fno-strict-aliasing"]
MACHINE_FLAGS += ["-Xcompiler=-Wall,-Wextra,-Werror,-ffp-contract=off,-fno-math-errno,-march=native"]
HOST_PARTS = ("runtime", "streams", "cublaslt", "nccl")  # of the shim, which the machine has as well
# As setup.py's: PYLLMC_SANITIZE=address,undefined, and the sanitizers' libraries in LD_PRELOAD.
SANITIZE = os.environ.get("PYLLMC_SANITIZE", "")
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"] if SANITIZE else []


def compiler():
    """The C++ compiler's command, or None where there is none."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return command if shutil.which(command[0]) else None


@cache
def missing(backend):
    """Why a backend cannot be compiled here, or "" where it can."""
    if compiler() is None:
        return "no C++ compiler"
    if backend == "cuda_shim":
        return ""
    if NVCC is None:
        return "no nvcc, which makes the PTX"
    release = re.search(r"release (\d+)", _version(NVCC))
    return "" if release and int(release[1]) >= 13 else "nvcc is older than 13, whose host code the machine serves"


def sources():
    """Every file that a build depends on."""
    return sorted(path for folder in (CUDA, SHIM, MACHINE) for path in folder.iterdir() if path.is_file())


@cache
def _version(program):
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout


def _digest(words, paths):
    digest = hashlib.sha256(repr(words).encode())
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stdout}{done.stderr}")


def _compile(source, depends, command):
    """source -> its object file, named by the hash of all that decides what is in it."""
    target = BUILD / f"{source.stem}-{_digest([_version(command[0]), *command], [source, *depends])}.o"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.o")
        _run([*command, "-c", source, "-o", partial])
        partial.replace(target)
    return target


def _cython():
    """ops.pyx as C++."""
    depends = [path for path in sources() if path.suffix in (".pyx", ".pxi", ".pxd")]
    target = BUILD / f"ops-{_digest([sys.version, version('cython')], depends)}.cpp"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.cpp")
        options = ["-3", "--cplus", "-X", "cdivision=True", "-X", "binding=True", "-I", ROOT]
        _run([sys.executable, "-m", "cython", *options, CUDA / "ops.pyx", "-o", partial])
        partial.replace(target)
    return target


def _commands(backend):
    """{source: the command that compiles it} of all but the Cython part."""
    cxx = [*compiler(), *FLAGS, *SANITIZE_FLAGS, f"-I{CUDA}"]
    if backend == "cuda_shim":
        cxx.append(f"-I{SHIM}")
        kernels = {path: [*cxx, "-x", "c++"] for path in sources() if path.suffix == ".cu" and path.parent != MACHINE}
        return kernels | dict.fromkeys(SHIM.glob("*.cpp"), cxx)
    kernels = {path: [NVCC, *NVCC_FLAGS, f"-I{CUDA}"] for path in sources() if path.suffix == ".cu"}
    machine = [*(SHIM / f"{name}.cpp" for name in HOST_PARTS), *MACHINE.glob("*.cpp")]
    return kernels | dict.fromkeys(machine, [NVCC, *MACHINE_FLAGS, f"-I{CUDA}"])


def build(backend="cuda_shim"):
    """The extension's path."""
    headers = [path for path in sources() if path.suffix in (".h", ".cuh")]
    folders = [f"-I{path}" for path in (SHIM, CUDA, sysconfig.get_path("include"))]
    python = [*compiler(), *FLAGS, *SANITIZE_FLAGS, *folders, "-w"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        wrapper = pool.submit(lambda: _compile(_cython(), headers, python))
        commands = sorted(_commands(backend).items())
        objects = [*pool.map(lambda item: _compile(item[0], headers, item[1]), commands), wrapper.result()]
    target = BUILD / _digest(objects, []) / "ops.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        _run([*compiler(), "-shared", *SANITIZE_FLAGS, *objects, "-o", partial])
        partial.replace(target)
    return target


@cache
def load(backend="cuda_shim"):
    """The backend's module of ops; the same one for the whole process."""
    path = build(backend)
    loader = importlib.machinery.ExtensionFileLoader(f"{backend}.ops", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(loader.name, path, loader=loader))
    loader.exec_module(module)
    # The stand-ins are part of the same file.
    module._find_cublaslt = module._find_nccl = lambda: [str(path)]
    return module


def backend_of(module):
    """The name of the backend that `load` gave this module for."""
    return module.__name__.partition(".")[0]


class Gpu:
    """What programs find on this machine; `reset` at the end."""

    def __init__(self, backend="cuda_shim"):
        self.library = ctypes.CDLL(load(backend).__file__)
        self.library.shim_free_memory.argtypes = [ctypes.c_size_t]

    def is_like(self, driver=13000, count=1, capability=9):
        """The driver's CUDA version, 0 for none, how many GPUs it sees, and their major compute capability."""
        self.library.shim_gpu(driver, count, capability)

    def has_free(self, num_bytes):
        """So much memory is free from now on, beside what the backend keeps for the next arrays."""
        self.library.shim_free_memory(num_bytes)

    def has_graphs(self, there):
        """Whether its driver can record graphs."""
        self.library.shim_graphs(int(there))

    def waits(self):
        """How often the host waited for it since the last call."""
        return self.library.shim_waits()

    def reset(self):
        self.is_like()
        self.has_graphs(True)
        self.has_free(8 << 30)


class Barriers:
    """The barriers of the kernels (__syncthreads, waits for copies, __syncwarp in PTX), which can be left out one at a
    time, and the order of threads."""

    def __init__(self, backend="cuda_shim"):
        self.library = ctypes.CDLL(load(backend).__file__)

    def met(self):
        """("layernorm.cu", 123) of every barrier since the last call."""
        text = ctypes.create_string_buffer(1 << 16)
        self.library.shim_barriers(text, len(text))
        return [(name, int(line)) for name, _, line in (row.partition(":") for row in text.value.decode().split())]

    def skip(self, file="", line=0):
        """Nobody waits at this one; without arguments all are back."""
        self.library.shim_skip_barrier(file.encode(), line)

    def reverse(self, on):
        """Whether the threads of a block take their turns from the last to the first."""
        self.library.shim_reverse(int(on))
