"""Training states in llm.c's format: what a run needs beside its model file to go on.

The format: data/README.md. Every number of a header is checked against the size of its file before anything is
allocated. Called by checkpoint.py; calls tensors.py, files.py, rng.py, hardware.py and, for arrays that suit the ops,
backends.py.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from .backends import backend
from .files import SLOTS, atomic_write, check_size, file_size, open_regular, read_exact, read_into, read_slots
from .hardware import require_memory
from .rng import MT_STRUCT
from .tensors import FLOAT_BYTES, check_flat

STATE_MAGIC = 20240527

# llm.c seeds the generator of its stochastic rounding with this. Nothing is drawn from it here: AdamW's rounding is a
# function of the run's seed and the step.
ROUNDING_SEED = 13371337


@dataclass
class TrainingState:
    """What a run needs beside its parameters to go on: step, AdamW's m and v (flat), and the loader's state_dict.

    `loader` is None in a run without one. `rounding` are llm.c's two random states of stochastic rounding; `masters`
    its float32 copies of low-precision parameters.
    """

    step: int
    m: np.ndarray
    v: np.ndarray
    loader: dict | None = None
    num_processes: int = 1
    rank: int = 0
    rounding: tuple[int, int] = (ROUNDING_SEED, ROUNDING_SEED)
    masters: np.ndarray | None = None


def write_state(path: str | os.PathLike, state: TrainingState) -> None:
    """Writes a training state as llm.c does."""
    loader = state.loader or {"shuffle": False, "shard": 0, "sample": 0}
    arrays = [state.m, state.v] + ([] if state.masters is None else [state.masters])
    for array in arrays:
        check_flat(array, state.m.size, "write_state: m, v and the masters")
    header = bytearray(SLOTS.size)
    flags = (len(arrays) - 2, loader["shuffle"])
    struct.pack_into("<6i", header, 0, STATE_MAGIC, 1, state.num_processes, state.rank, *flags)
    struct.pack_into("<i", header, 4 * 10, state.step)
    struct.pack_into("<2Q", header, 4 * 20, *state.rounding)
    struct.pack_into("<2Q", header, 4 * 30, loader["shard"], loader["sample"])
    with atomic_write(path) as file:
        file.write(header)
        for array in arrays:
            file.write(memoryview(array).cast("B"))
        if loader["shuffle"]:
            for order in (loader["shard_order"], loader["sample_order"]):
                file.write(struct.pack("<Q", len(order)))
                file.write(np.asarray(order, dtype="<i4").tobytes())
            file.write(loader["generator"])


def read_state(path: str | os.PathLike, num_parameters: int) -> TrainingState:
    """The training state of a model of this many (padded) parameters."""
    with open_regular(path) as file:
        slots = _read_header(file, num_parameters)
        require_memory(file_size(file), f"{file.name}: the optimizer's state")
        arrays = [backend("cpu").empty(num_parameters) for _ in range(2 + slots[4])]
        for array in arrays:
            read_into(file, array, "its numbers")
        loader = {"shuffle": bool(slots[5]), "shard": _uint64(slots, 30), "sample": _uint64(slots, 32)}
        loader |= dict.fromkeys(("shard_order", "sample_order", "generator"))
        if loader["shuffle"]:
            loader["shard_order"] = _read_order(file)
            loader["sample_order"] = _read_order(file)
            loader["generator"] = read_exact(file, MT_STRUCT.size, "the loader's generator")
        check_size(file, file.tell(), "a training state of this model")
    return TrainingState(
        step=slots[10],
        m=arrays[0],
        v=arrays[1],
        loader=loader,
        num_processes=slots[2],
        rank=slots[3],
        rounding=(_uint64(slots, 20), _uint64(slots, 22)),
        masters=arrays[2] if slots[4] else None,
    )


def _uint64(slots: tuple[int, ...], at: int) -> int:
    return (slots[at] & 0xFFFFFFFF) | (slots[at + 1] & 0xFFFFFFFF) << 32


def check_state(path: str | os.PathLike, num_parameters: int) -> None:
    """ValueError or OSError if this is no training state of so many parameters, by its header and its size."""
    with open_regular(path) as file:
        _read_header(file, num_parameters)


def _read_header(file: BinaryIO, num_parameters: int) -> tuple[int, ...]:
    """The slots of a training state, checked, with a file big enough for its arrays."""
    slots = read_slots(file, STATE_MAGIC)
    if slots[1] != 1:
        raise ValueError(f"{file.name}: version {slots[1]} of the training state cannot be read, only 1")
    if not 0 <= slots[3] < slots[2]:
        raise ValueError(f"{file.name}: not a training state: rank {slots[3]} of {slots[2]} processes")
    if slots[4] not in (0, 1) or slots[5] not in (0, 1) or slots[10] < 0:
        raise ValueError(f"{file.name}: not a training state: slots 4, 5, 10 hold {slots[4]}, {slots[5]}, {slots[10]}")
    arrays_end = SLOTS.size + FLOAT_BYTES * num_parameters * (2 + slots[4])
    if not slots[5]:
        check_size(file, arrays_end, f"the training state of a model of {num_parameters} parameters")
    elif file_size(file) < arrays_end + 16 + MT_STRUCT.size:
        raise ValueError(
            f"{file.name}: {file_size(file)} bytes found, more than {arrays_end} expected for the training state of a "
            f"model of {num_parameters} parameters; the file is truncated or of another model"
        )
    return slots


def _read_order(file: BinaryIO) -> np.ndarray:
    (count,) = struct.unpack("<Q", read_exact(file, 8, "the length of an order"))
    left = file_size(file) - file.tell()
    if 4 * count > left:
        raise ValueError(f"{file.name}: an order of {count} samples or shards in the last {left} bytes; it is damaged")
    order = np.empty(count, np.int32)
    if count:
        read_into(file, order, "an order of samples or shards")
    return order
