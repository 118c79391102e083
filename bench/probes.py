"""What the machine gives at this moment, as contestants of their own: the roofs that every other figure is held to.

    fma       GFLOP/s of register-only multiply-adds on all threads
    copy      GB/s, bytes read plus written, of the faster of a streaming and an ordinary copy
    read      GB/s of a loop that only reads
    update    GB/s of AdamW's seven streams: three arrays read and written in place, one read

The memory loops are NumPy's in threads (it lets go of the interpreter's lock for large arrays), over arrays far beyond
the caches. Each call takes some milliseconds and returns the figure itself. On a GPU:

    gemm            GFLOP/s of a product of two square matrices of random bfloat16, cuBLASLt's fastest algorithm
    device-copy     GB/s, bytes read plus written, of a copy within its memory
"""

import platform
import subprocess
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

PROBES = {"fma": "GFLOP/s", "copy": "GB/s", "read": "GB/s", "update": "GB/s"}
GPU_PROBES = {"gemm": "GFLOP/s", "device-copy": "GB/s"}
FMA_SECONDS, GPU_SECONDS = 0.01, 0.02
ARRAY_BYTES = 128 * 2**20
# Floats of one NumPy call: long enough for the call itself not to count.
PIECE, LONG_PIECE = 2**17, 2**22


def make(name, threads, array_bytes=ARRAY_BYTES):
    """The function that measures once: () -> GFLOP/s or GB/s."""
    if name == "fma":
        from pyllmc import backend

        return partial(backend("cpu").fma_peak, FMA_SECONDS)
    return _MEMORY[name](_Team(threads), array_bytes // 4)


class _Team:
    """Threads that each take an equal part of an array."""

    def __init__(self, threads):
        self.threads, self.pool = threads, ThreadPoolExecutor(threads)

    def gbytes_per_second(self, loop, size, num_bytes):
        """The rate of loop(part), a slice of [0, size) for each thread."""
        bounds = [size * i // self.threads for i in range(self.threads + 1)]
        parts = [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)]
        start = time.perf_counter()
        for _ in self.pool.map(loop, parts):
            pass
        return num_bytes / (time.perf_counter() - start) / 1e9


def _pieces(part, size):
    for start in range(part.start, part.stop, size):
        yield slice(start, min(start + size, part.stop))


def _copy(team, size):
    source, target = np.ones(size, np.float32), np.zeros(size, np.float32)

    def streaming(part):  # memcpy: past the caches for blocks as large as these
        np.copyto(target[part], source[part])

    def by_pieces(part):  # memcpy as it does smaller blocks
        for piece in _pieces(part, PIECE):
            np.copyto(target[piece], source[piece])

    def ordinary(part):  # loads and stores
        for piece in _pieces(part, PIECE):
            np.multiply(source[piece], np.float32(1.0), out=target[piece])

    return lambda: max(team.gbytes_per_second(loop, size, 8 * size) for loop in (streaming, by_pieces, ordinary))


def _read(team, size):
    array = np.ones(size, np.float32)

    def loop(part):  # OpenBLAS's dot product is the fastest reader here; on one thread, see contestants.environment
        for piece in _pieces(part, LONG_PIECE):
            np.dot(array[piece], array[piece])

    return lambda: team.gbytes_per_second(loop, size, 4 * size)


def _update(team, size):
    size //= 2
    grad, *others = (np.ones(size, np.float32) for _ in range(4))

    def loop(part):
        for piece in _pieces(part, PIECE):
            np.dot(grad[piece], grad[piece])
            for array in others:
                np.multiply(array[piece], np.float32(1.0), out=array[piece])

    return lambda: team.gbytes_per_second(loop, size, 28 * size)


_MEMORY = {"copy": _copy, "read": _read, "update": _update}


# ---- a GPU's ---------------------------------------------------------------------------------------------------------


def make_for_gpu(name, size):
    """The same on a GPU; size: rows of the matrices, whose elements times 4 are those of the array that is copied."""
    from pyllmc import backend

    ops = backend("cuda")
    values = np.random.default_rng(0).standard_normal(2**20 + 1, dtype=np.float32)
    if name == "gemm":
        ops.product_options(autotune=True)
        left, right = (ops.from_host(np.resize(part, (size, size))) for part in (values, values[::-1]))
        out, amount = ops.empty((size, size)), 2 * size**3
        call = partial(ops.matmul_forward, left, right, out=out)
    else:
        source = ops.from_host(np.resize(values, (4 * size, size)))
        target, amount = ops.empty(source.shape), 2 * source.nbytes
        call = partial(ops.from_host, source, out=target)
    seconds = _seconds_of(call, 1, ops)
    loops = max(1, int(GPU_SECONDS / _seconds_of(call, max(1, int(GPU_SECONDS / seconds)), ops)))

    def measure():
        _seconds_of(call, loops, ops)  # the clocks rise
        return amount / _seconds_of(call, loops, ops) / 1e9

    return measure


def _seconds_of(call, loops, ops):
    """Of one of so many calls."""
    start = time.perf_counter()
    for _ in range(loops):
        call()
    ops.synchronize()
    return (time.perf_counter() - start) / loops


def machine(threads=None):
    """What every figure must be read with: processor, instruction set, threads, compiler, the roofs now, the GPU."""
    from pyllmc import _cuda, backend, hardware

    cpu = backend("cpu")
    gpu = backend("cuda").device() | {"library": backend("cuda").algorithms()["library"]} if _cuda.AVAILABLE else None
    threads = threads or cpu.get_num_threads()
    return {
        "processor": hardware.cpu_name(), "isa": cpu.NAME, "openmp": cpu.OPENMP, "threads": threads,
        "compiler": compiler(), "numpy": np.__version__, "gpu": gpu, "peak_gflops": cpu.fma_peak(0.5),
        **{f"{name}_gbytes_per_second": max(map(_figure, [make(name, threads)] * 5)) for name in _MEMORY},
    }  # fmt: skip


def _figure(measure):
    return measure()


def compiler():
    """The compiler that builds extensions for this Python; not more is known of the one that built pyllmc's."""
    command = (sysconfig.get_config_var("CC") or "cc").split()
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return platform.python_compiler()
