"""Who takes part, and how each does what a benchmark asks: `prepare(name, benchmark, threads)` -> Work.

cpu, cuda        pyllmc's backends, as far as this machine has them
cpu-1t           the CPU backend on one thread
cpu-products     the CPU backend's bare products, which the classifier is held to
cuda-first       the CUDA backend with the algorithms that the library thinks fastest, instead of timed ones
cuda-128M, ...   the CUDA backend with chunks of so many bytes of logits in the classifier
numpy, torch, torch-compile, transformers       the peers, as far as they are installed
torch-graphs     PyTorch compiled with CUDA graphs, its mode reduce-overhead
fma, fma-1t, copy, read, update                 the probes of probes.py
gemm, device-copy                               those of a GPU
llmc             llm.c's CPU program, where compare.py is told of one; not run by pytest

What is for a GPU (Benchmark.on_gpu), PyTorch does there too, in bfloat16.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import cases
import models
import numpy as np
import peers
import probes

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = "-1t"
PEERS = {"numpy": "numpy", "torch": "torch", "torch-compile": "torch", "torch-graphs": "torch",
         "transformers": "transformers"}  # fmt: skip
OTHER_WAYS = ("cpu-1t", "cpu-products")
# The CUDA backend, and how each contestant has its matrix products done.
CUDA_WAYS = {"cuda": {"autotune": True}, "cuda-first": {"autotune": False}}
CUDA_WAYS |= {f"cuda-{mib}M": {"autotune": True, "logits_bytes": mib * 2**20} for mib in (128, 256, 512, 1024)}

# How long a waiting thread spins before it sleeps: about 3 ms for GNU's OpenMP and OpenBLAS (2^23 cycles), 4 ms for
# LLVM's. Their own choices are 10, 25 and 200 ms and cost nothing but the wait at the end of a turn, see turns.py. Far
# shorter ones cost speed: at 10,000 spins (0.3 ms) a pool that once fell asleep between two calls of 16 us was woken
# call after call, 70 us each; at 100,000 it is as fast as with its own choice.
SPINNING = {"GOMP_SPINCOUNT": "100000", "OPENBLAS_THREAD_TIMEOUT": "23", "KMP_BLOCKTIME": "4"}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# A round on the CPU is a loop of so many seconds; before it, untimed, the threads wake up and the caches fill. A GPU
# that waited for its turn needs longer, until its clocks are up.
ROUND_SECONDS, WAKE_SECONDS = 0.005, 0.002
GPU_ROUND_SECONDS, GPU_WAKE_SECONDS = 0.02, 0.03
LONG_CALL_SECONDS = 0.02


@dataclass
class Work:
    """What a contestant does in a benchmark."""

    call: Callable[[], object]
    flops: int = 0
    bytes: int = 0
    finish: Callable[[], None] | None = None  # waits for a GPU
    unit: str | None = None  # of a probe, whose call returns the figure itself
    device_bytes: int | None = None  # of a GPU's memory that it holds, arrays for the length of a call included

    @property
    def round_seconds(self):
        return ROUND_SECONDS if self.finish is None else GPU_ROUND_SECONDS

    def wake_seconds(self, call_seconds):
        """How long it works before a round of calls that take so long."""
        if self.finish is not None:
            return GPU_WAKE_SECONDS
        return WAKE_SECONDS if call_seconds < LONG_CALL_SECONDS else 0.0

    def run(self, loops=1):
        for _ in range(loops):
            result = self.call()
        if self.finish is not None:
            self.finish()
        return result


def backends():
    from pyllmc import _cuda

    return ["cpu", *(["cuda"] if _cuda.AVAILABLE else [])]


def installed():
    """Every contestant that can be started here."""
    found = [name for name, module in PEERS.items() if find_spec(module)]
    if "torch" not in found and "transformers" in found:
        found.remove("transformers")
    on_gpu = [*list(CUDA_WAYS)[1:], *probes.GPU_PROBES] if "cuda" in backends() else []
    return [*backends(), *OTHER_WAYS, *found, *probes.PROBES, "fma-1t", *on_gpu]


def takes_part(name, benchmark):
    return name in benchmark.others or name in benchmark.backends


def threads_of(name, threads):
    return 1 if name.endswith(ONE_THREAD) else threads


def environment(name, threads):
    """The environment of a contestant's process: the same number of threads for every library, and short spinning."""
    count = str(threads_of(name, threads))
    settings = dict.fromkeys(THREADS, count)
    if name in probes.PROBES:
        settings["OPENBLAS_NUM_THREADS"] = "1"  # the probes have threads of their own
    # Left to the spin counts above; with it, threads would sleep at once, or never.
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return inherited | settings | SPINNING | {"OMP_DYNAMIC": "false", "PYTHONPATH": path}


def prepare(name, benchmark, threads):
    """The Work of a contestant; whatever the benchmark's call does not do is done here."""
    kind = name.removesuffix(ONE_THREAD)
    if kind in probes.PROBES:
        return Work(probes.make(kind, threads_of(name, threads)), unit=probes.PROBES[kind])
    if kind in probes.GPU_PROBES:
        return Work(probes.make_for_gpu(kind, benchmark.probe_size), unit=probes.GPU_PROBES[kind])
    if kind.startswith("torch") or kind == "transformers":
        import torch

        torch.set_num_threads(threads)
    if kind in CUDA_WAYS:
        _backend("cuda").product_options(**CUDA_WAYS[kind])
    if benchmark.is_model:
        return _prepare_model(kind, benchmark)
    call = make_call(benchmark.case)
    if kind == "numpy":
        return Work(peers.numpy_op(call), call.flops, call.num_bytes())
    if kind == "torch":
        return _prepare_torch_op(call, benchmark.on_gpu)
    if kind == "cpu-products":
        return _bare_products(call)
    return _prepare_op(kind, call)


def release(name):
    """Gives the GPU's memory of a benchmark that is over back, for the other contestants."""
    if name in CUDA_WAYS or name in probes.GPU_PROBES:
        _backend("cuda").release_cache()
    elif "torch" in sys.modules:
        import torch

        if "torch._dynamo" in sys.modules:  # what it compiled refers to arrays of its own
            torch._dynamo.reset()
        torch.cuda.empty_cache()


def torch_device():
    """Where PyTorch does what is for a GPU: there, or for the tests' small sizes on the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _prepare_model(kind, benchmark):
    what, sizes = benchmark.what, dict(benchmark.sizes)
    flops, num_bytes = models.flops(what, sizes), models.num_bytes(what, sizes)
    if kind in CUDA_WAYS:
        ops = _backend("cuda")
        return _on_gpu(lambda: models.make(what, sizes, "pyllmc", ops), flops, num_bytes, ops.synchronize, _free_bytes)
    if kind == "cpu":
        return Work(models.make(what, sizes, "pyllmc", _backend("cpu")), flops, num_bytes)
    if not benchmark.on_gpu:
        return Work(models.make(what, sizes, kind), flops, num_bytes)
    import torch

    device = torch_device()
    if device == "cpu":
        return Work(models.make(what, sizes, kind, device), flops, num_bytes)

    def free_bytes():
        return torch.cuda.mem_get_info()[0]

    return _on_gpu(lambda: models.make(what, sizes, kind, device), flops, num_bytes, torch.cuda.synchronize, free_bytes)


def _free_bytes():
    return _backend("cuda").device()["free"]


def _on_gpu(make, flops, num_bytes, finish, free_bytes):
    """A model's Work on a GPU. All others sleep, so what is less free after a first call is its own."""
    finish()
    before = free_bytes()
    work = Work(make(), flops, num_bytes, finish)
    work.run()
    work.device_bytes = before - free_bytes()
    return work


def _prepare_torch_op(call, on_gpu):
    if not on_gpu:
        return Work(peers.torch_op(call), call.flops, call.num_bytes())
    import torch

    device = torch_device()
    # What an op of PyTorch allocates is there, and is this.
    torch.set_default_device(device)
    torch.set_default_dtype(torch.bfloat16)
    finish = torch.cuda.synchronize if device == "cuda" else None
    return Work(peers.torch_op(call, device, torch.bfloat16), call.flops, call.num_bytes(2), finish)


def _prepare_op(kind, call):
    """One call with its outputs given and all arrays the backend's own, as the model makes it."""
    ops = _backend("cpu" if kind == "cpu" else "cuda")

    def own(name, array):
        integers = array.dtype == np.int32
        return ops.from_host(array, out=ops.empty(array.shape, "int32" if integers else own_type(name)))

    def own_type(name):
        return "wide" if cases.is_wide(call.op, name) else None

    inputs = {k: own(k, v) if isinstance(v, np.ndarray) else v for k, v in call.inputs.items()}
    outputs = {k: ops.empty(shape, own_type(k)) for k, shape in call.outputs.items()}
    work = partial(getattr(ops, call.op), **inputs, **outputs)
    if kind == "cpu":
        return Work(work, call.flops, call.num_bytes())
    return Work(work, call.flops, call.num_bytes(2), ops.synchronize)


def _bare_products(call):
    """The three products of the LM head at once, with all logits in memory and no loss between them."""
    ops = _backend("cpu")
    inputs = {k: ops.from_host(v, out=ops.empty(v.shape, v.dtype)) if isinstance(v, np.ndarray) else v
              for k, v in call.inputs.items()}  # fmt: skip
    weight = inputs["weight"][: inputs["vocab_size"]]
    logits = ops.empty((*inputs["inp"].shape[:-1], weight.shape[0]))
    dinp, dweight = ops.empty(inputs["inp"].shape), ops.empty(weight.shape)

    def products():
        ops.matmul_forward(inputs["inp"], weight, out=logits)
        ops.matmul_backward(logits, inputs["inp"], weight, bias=False, dinp=dinp, dweight=dweight)

    return Work(products, 3 * 2 * logits.size * weight.shape[1])


def _backend(name):
    from pyllmc import backend

    return backend(name)


def make_call(case):
    """The Call of a case, what a forward left for its backward being the op's own: the float64 reference of
    tests/cases.py would take minutes and gigabytes at these sizes."""

    def saved(op, *inputs, **options):
        return getattr(_backend("cpu"), op)(*inputs, **options)

    reference, cases._saved = cases._saved, saved
    try:
        return cases.make(case)
    finally:
        cases._saved = reference
