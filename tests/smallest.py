"""python tests/smallest.py: the smallest case of each op on the GPU, and one that takes several blocks.

It is short enough for compute-sanitizer, under which bench/gpu_check.sh runs it; the last line says how much ran.
Results are held to nothing but that they are numbers: tests/test_cuda_ops.py compares them. Calls cases.py and the CUDA
backend.
"""

import sys
from pathlib import Path

sys.path[1:1] = [str(Path(__file__).resolve().parent.parent)]

import cases  # noqa: E402
import numpy as np  # noqa: E402
from on_device import OnDevice  # noqa: E402

from pyllmc import backend  # noqa: E402

DTYPES = ("float32", "bfloat16")


def chosen(op):
    """Two cases of an op: the smallest, and the middle one by what it moves."""
    by_size = sorted(cases.CASES[op], key=lambda case: cases.make(case).num_bytes())
    return by_size[0], by_size[len(by_size) // 2]


def run(device):
    """Runs them all on the module of a device's ops, in both types; returns how many ops there were."""
    for op in cases.CASES:
        for case in chosen(op):
            for dtype in DTYPES:
                call = cases.make(case)
                returned = getattr(OnDevice(device, dtype), op)(**call.inputs)
                arrays = returned if isinstance(returned, tuple) else (returned,)
                arrays = [*filter(lambda array: array is not None, arrays)]
                arrays += [call.inputs[name] for name in call.in_place]
                assert all(np.isfinite(array).all() for array in arrays), f"{case} in {dtype}: not all are numbers"
    device.synchronize()
    return len(cases.CASES)


if __name__ == "__main__":
    cuda = backend("cuda")
    print(f"{run(cuda.module)} ops ran on {cuda.device()['name']}")
