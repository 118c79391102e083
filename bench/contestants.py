"""Who takes part, and how each does what a benchmark asks: `prepare(name, benchmark, threads)` -> Work.

cpu, cuda        pyllmc's backends, as far as this machine has them
cpu-1t           the CPU backend on one thread
cpu-products     the CPU backend's bare products, which the classifier is held to
numpy, torch, torch-compile, transformers       the peers, as far as they are installed
fma, fma-1t, copy, read, update                 the probes of probes.py
llmc             llm.c's CPU program, where compare.py is told of one; not run by pytest
"""

import os
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
PEERS = {"numpy": "numpy", "torch": "torch", "torch-compile": "torch", "transformers": "transformers"}
OTHER_WAYS = ("cpu-1t", "cpu-products")

# How long a waiting thread spins before it sleeps: about 3 ms for GNU's OpenMP and OpenBLAS (2^23 cycles), 4 ms for
# LLVM's. Their own choices are 10, 25 and 200 ms and cost nothing but the wait at the end of a turn, see turns.py. Far
# shorter ones cost speed: at 10,000 spins (0.3 ms) a pool that once fell asleep between two calls of 16 us was woken
# call after call, 70 us each; at 100,000 it is as fast as with its own choice.
SPINNING = {"GOMP_SPINCOUNT": "100000", "OPENBLAS_THREAD_TIMEOUT": "23", "KMP_BLOCKTIME": "4"}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Work:
    """What a contestant does in a benchmark."""

    call: Callable[[], object]
    flops: int = 0
    bytes: int = 0
    finish: Callable[[], None] | None = None  # waits for an accelerator
    unit: str | None = None  # of a probe, whose call returns the figure itself

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
    return [*backends(), *OTHER_WAYS, *found, *probes.PROBES, "fma-1t"]


def takes_part(name, benchmark):
    return name in benchmark.others or name in backends()


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
    if kind.startswith("torch") or kind == "transformers":
        import torch

        torch.set_num_threads(threads)
    if benchmark.is_model:
        return _prepare_model(kind, benchmark)
    call = make_call(benchmark.case)
    if kind in PEERS:
        return Work({"numpy": peers.numpy_op, "torch": peers.torch_op}[kind](call), call.flops, call.bytes)
    if kind == "cpu-products":
        return _bare_products(call)
    return _prepare_op(kind, call)


def _prepare_model(kind, benchmark):
    what, sizes = benchmark.what, dict(benchmark.sizes)
    ours = kind in backends()
    call = models.make(what, sizes, "pyllmc" if ours else kind, _backend(kind) if ours else None)
    return Work(call, models.flops(what, sizes), models.num_bytes(what, sizes))


def _prepare_op(kind, call):
    """One call with its outputs given and all arrays the backend's own, as the model makes it."""
    ops = _backend(kind)
    inputs = {k: _own(ops, v) if isinstance(v, np.ndarray) else v for k, v in call.inputs.items()}
    outputs = {k: ops.empty(shape) for k, shape in call.outputs.items()}
    finish = None if kind == "cpu" else ops.synchronize
    return Work(partial(getattr(ops, call.op), **inputs, **outputs), call.flops, call.bytes, finish)


def _own(ops, array):
    return ops.from_host(array, out=ops.empty(array.shape, array.dtype))


def _bare_products(call):
    """The three products of the LM head at once, with all logits in memory and no loss between them."""
    ops = _backend("cpu")
    inputs = {k: _own(ops, v) if isinstance(v, np.ndarray) else v for k, v in call.inputs.items()}
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
