"""What the CUDA kernels ask of a GPU, counted while their PTX runs on the CPU (cuda_ptx): a line for each kernel.

    PYTHONPATH=.:tests python tests/ptx_counts.py [op ...]

conflicts: passes over the banks of shared memory for one that would do; asked: bytes that lanes load and store for each
byte of the 32-byte sectors that they touch, more than 1 where lanes share; unique: KiB of the sectors, each counted
once, so what memory has to move at least; again: how often each of them is asked for. Under a kernel stand the
lines that are far from the best. Uses shim.py; called by test_cuda_ptx.py.
"""

import ctypes
import sys
from collections import namedtuple

import cases
import compare
import numpy as np
import shim
from on_device import OnDevice

FIELDS = "kernel launches unique instruction place warps lanes wavefronts ideal sectors bytes"
Row = namedtuple("Row", FIELDS)
Kernel = namedtuple("Kernel", "name launches warps lanes mma conflicts asked again unique")

# As in GPT-2 124M, with few rows and tokens; where it is no size of these, the largest of the op's own cases.
SIZES = {
    "B": 2, "T": 128, "maxT": 128, "C": 768, "OC": 768, "NH": 12, "HS": 64, "V": 1000, "Vp": 1024,
    "leading": (2, 128), "shape": (64, 768), "parts": 0, "position": 100, "n": 1,
}  # fmt: skip
MASTERS = ("adamw_update", "bfloat16")  # has exact masters beside the parameters


class Counts:
    """Counts what is launched while it is entered."""

    def __init__(self):
        self.library = ctypes.CDLL(shim.load("cuda_ptx").__file__)
        self.library.ptx_counts.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        self.library.ptx_counts.restype = ctypes.c_size_t

    def __enter__(self):
        self.library.ptx_count(1)
        return self

    def __exit__(self, *_):
        self.library.ptx_count(0)

    def rows(self):
        """Each instruction that ran, with the kernel that it is of."""
        size = self.library.ptx_counts(None, 0) + 1
        text = ctypes.create_string_buffer(size)
        self.library.ptx_counts(text, size)
        split = (line.split("\t") for line in text.value.decode().splitlines())
        return [Row(words[0], *map(int, words[1:3]), *words[3:5], *map(int, words[5:])) for words in split]


def kernels(rows):
    """{Kernel: its rows}"""
    groups = {}
    for row in rows:
        groups.setdefault((row.kernel, row.launches, row.unique), []).append(row)
    return {_kernel(*key, group): group for key, group in sorted(groups.items())}


def _kernel(name, launches, unique, rows):
    def total(field):
        return sum(getattr(row, field) for row in rows)

    mma = sum(row.warps for row in rows if row.instruction.startswith("mma."))
    warps, sectors = total("warps"), max(1, total("sectors"))
    lanes, conflicts = total("lanes") / warps / 32, total("wavefronts") / max(1, total("ideal"))
    asked, again = total("bytes") / sectors / 32, sectors / max(1, unique)
    return Kernel(name, launches, warps, lanes, mma, conflicts, asked, again, unique / 32)


def far_from_best(rows):
    """{(place, instruction): [passes, those that would do, sectors, bytes / 32]} of lines that take half as many passes
    again as they need, or touch twice the sectors, and do a twentieth of all that the kernel does of it."""
    lines = {}
    for row in rows:
        line = lines.setdefault((row.place, row.instruction), [0, 0, 0, 0])
        for i, value in enumerate((row.wavefronts, row.ideal, row.sectors, row.bytes // 32)):
            line[i] += value
    passes, sectors = (sum(line[i] for line in lines.values()) for i in (0, 2))
    return {
        where: line
        for where, line in lines.items()
        if (line[0] > max(1.5 * line[1], passes / 20)) or (line[2] >= max(2 * line[3], sectors / 20))
    }


def count(op, dtype):
    """The kernels of an op at the sizes above, without those that convert what goes to the device and comes back."""
    sizes = dict(cases.CASES[op][-1].sizes)
    sizes |= {name: value for name, value in SIZES.items() if name in sizes}
    sizes |= {"master": True} if (op, dtype) == MASTERS else {}
    call = cases.make(cases.Case(op, tuple(sizes.items())))
    outputs = {name: np.full(shape, np.nan, np.float32) for name, shape in call.outputs.items()}
    with Counts() as counts:
        compare.run(OnDevice(shim.load("cuda_ptx"), dtype), call, **outputs)
        rows = counts.rows()
    return kernels(row for row in rows if not row.kernel.startswith("cast_kernel"))


def main(ops):
    head = ("op, kernel", "warp instr.", "lanes", "mma", "conflicts", "asked", "again", "unique KiB")
    print("{:<76}{:>12}{:>7}{:>8}{:>10}{:>7}{:>7}{:>12}".format(*head))
    for op in ops or cases.CASES:
        for dtype in ("bfloat16", "float32"):
            for kernel, rows in count(op, dtype).items():
                name = f"{op} {dtype}: {kernel.name}"[:75]
                numbers = f"{kernel.warps:12}{kernel.lanes:7.2f}{kernel.mma:8}{kernel.conflicts:10.2f}"
                print(f"{name:<76}{numbers}{kernel.asked:7.2f}{kernel.again:7.2f}{kernel.unique:12.0f}")
                for (place, instruction), (passes, enough, sectors, full) in far_from_best(rows).items():
                    what = f"{passes} passes, {enough} would do" if enough else f"{sectors} sectors, {full} would do"
                    print(f"    {place:<24}{instruction:<24}{what}")


if __name__ == "__main__":
    main(sys.argv[1:])
