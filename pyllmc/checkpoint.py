"""Model files, debug states and training states in llm.c's formats, and folders of checkpoints.

All files are little-endian and start with 256 int32, the slots; those not named are 0. The payload follows without
gaps: the parameters in the order of tensors.TENSORS, each over all layers.

    model .bin       0 magic 20240326, 1 version, 2 maxT, 3 V, 4 L, 5 NH, 6 C, 7 Vp (not in version 1)
                     version 1: float32, wte has V rows; 3: float32, Vp rows; 5: bfloat16, Vp rows
    debug state      0 magic 20240327, 1 version, 2 B, 3 T, 4 steps n (0 in llm.c's); then inputs and targets int32
                     (B,T), logits float32 (B,T,V), the loss, the gradients float32 (version 1: V rows of wte; 2:
                     Vp rows), n losses, n norms float32
    training state   0 magic 20240527, 1 version 1, 2 processes, 3 rank, 4 masters?, 5 shuffled?, 10 step, 20-21 and
                     22-23 uint64 random states, 30-31 shard, 32-33 sample; then m, v, masters float32; if shuffled:
                     uint64 S, int32 (S) order of the shards, uint64 K, int32 (K) order of the samples, 2520 bytes
                     generator (rng.TorchGenerator)

A checkpoint is model_%08d.bin, state_%08d_00000.bin and, written last, DONE_%08d with their sizes and SHA-256 in JSON
(llm.c's is empty). Every number of a header is checked against the size of its file before anything is allocated.

Called by model.py, train.py, generate.py and verify.py; calls config.py, tensors.py, files.py and hardware.py.
"""

from __future__ import annotations

import json
import os
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .config import GPT2Config
from .files import KINDS_BY_MAGIC, atomic_write, file_size, open_regular, read_exact, read_into, sha256_of
from .hardware import require_memory
from .rng import MT_STRUCT
from .tensors import FLOAT_BYTES, num_elements, tensor_shapes

SLOTS = struct.Struct("<256i")
MODEL_MAGIC, DEBUG_MAGIC, STATE_MAGIC = 20240326, 20240327, 20240527

# version -> bytes per number
MODEL_VERSIONS = {1: 4, 3: 4, 5: 2}
DTYPE_VERSIONS = {"float32": 3, "bfloat16": 5}

# llm.c seeds the generator of its stochastic rounding with this; the CPU never draws from it.
ROUNDING_SEED = 13371337

# The steps of AdamW whose losses and norms a debug state holds: the values of llm.c's test on a GPU.
DEBUG_ADAMW = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
DEBUG_MAX_NORM = 1.0
DEBUG_MAX_STEPS = 10_000

# Numbers are converted in pieces of this many.
CHUNK = 1 << 20


# ---- reading and writing pieces --------------------------------------------------------------------------------------


def _read_slots(file: BinaryIO, magic: int) -> tuple[int, ...]:
    slots = SLOTS.unpack(read_exact(file, SLOTS.size, "the header"))
    if slots[0] != magic:
        found = KINDS_BY_MAGIC.get(slots[0], f"no file of this family (first number {slots[0]}, expected {magic})")
        raise ValueError(f"{file.name}: not {KINDS_BY_MAGIC[magic]} but {found}")
    return slots


def _check_size(file: BinaryIO, expected: int, what: str) -> None:
    found = file_size(file)
    if found != expected:
        problem = "the file is truncated" if found < expected else "the file is damaged or of another kind"
        raise ValueError(f"{file.name}: {found} bytes found, {expected} expected for {what}; {problem}")


def _read_floats(file: BinaryIO, out: np.ndarray, itemsize: int) -> None:
    """Fills a contiguous float32 array from float32 (itemsize 4) or bfloat16 (2) numbers."""
    out = out.reshape(-1)
    if itemsize == 4:
        read_into(file, out, "its numbers")
        return
    piece = np.empty(min(CHUNK, out.size), dtype=np.uint16)
    for start in range(0, out.size, CHUNK):
        bits = out[start : start + CHUNK].view(np.uint32)
        read_into(file, piece[: bits.size], "its numbers")
        np.left_shift(piece[: bits.size], 16, out=bits, dtype=np.uint32)


def _write_floats(file: BinaryIO, array: np.ndarray, itemsize: int) -> None:
    array = array.reshape(-1)
    if itemsize == 4:
        file.write(memoryview(array).cast("B"))
        return
    pieces = (array[start : start + CHUNK] for start in range(0, array.size, CHUNK))
    file.writelines(memoryview(to_bfloat16(piece)).cast("B") for piece in pieces)


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16 as uint16, rounded to nearest, ties to even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded[is_nan] = bits[is_nan] >> 16 | 0x40
    return rounded.astype(np.uint16)


def _read_parameters(file: BinaryIO, config: GPT2Config, rows: int, itemsize: int) -> np.ndarray:
    """All parameters (or their gradients) as a flat float32 array with Vp rows of wte, from a file with `rows` rows."""
    require_memory(FLOAT_BYTES * config.num_parameters_padded, f"{file.name}: reading {config.num_parameters} numbers")
    flat = np.zeros(config.num_parameters_padded, dtype=np.float32)
    used = config.vocab_size * config.channels
    _read_floats(file, flat[:used], itemsize)
    file.seek((rows - config.vocab_size) * config.channels * itemsize, os.SEEK_CUR)
    _read_floats(file, flat[config.padded_vocab_size * config.channels :], itemsize)
    return flat


def _write_parameters(file: BinaryIO, config: GPT2Config, flat: np.ndarray, itemsize: int) -> None:
    """The opposite of _read_parameters with Vp rows; the padding rows are written as zeros whatever they hold."""
    used, end = config.vocab_size * config.channels, config.padded_vocab_size * config.channels
    _write_floats(file, flat[:used], itemsize)
    file.write(bytes((end - used) * itemsize))
    _write_floats(file, flat[end:], itemsize)


def _host_floats(array, size: int, what: str) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype != np.float32 or array.shape != (size,) or not array.flags.c_contiguous:
        raise ValueError(f"{what} must be a flat float32 array of {size}, got {array.dtype} {array.shape}")
    return array


# ---- model files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelHeader:
    """What a model file says of itself: version, geometry, rows of its wte, bytes per number."""

    version: int
    config: GPT2Config
    rows: int
    itemsize: int


def read_header(path: str | os.PathLike) -> ModelHeader:
    """The checked header of a model file, whose size is right too; ValueError or OSError if it is not one."""
    with open_regular(path) as file:
        return _read_model_header(file)


def _read_model_header(file: BinaryIO) -> ModelHeader:
    _, version, max_seq_len, vocab_size, num_layers, num_heads, channels, rows = _read_slots(file, MODEL_MAGIC)[:8]
    if version not in MODEL_VERSIONS:
        raise ValueError(f"{file.name}: version {version} of the model format cannot be read, only 1, 3 and 5")
    try:
        config = GPT2Config(num_layers, num_heads, channels, vocab_size, max_seq_len)
    except ValueError as error:
        raise ValueError(f"{file.name}: not a model: {error}") from None
    if version == 1:
        rows = vocab_size
    if rows < vocab_size:
        raise ValueError(f"{file.name}: not a model: {vocab_size} tokens in a table of {rows} rows")
    numbers = num_elements(tensor_shapes(config, rows))
    itemsize = MODEL_VERSIONS[version]
    _check_size(file, SLOTS.size + numbers * itemsize, f"a model of {numbers} parameters")
    return ModelHeader(version, config, rows, itemsize)


def read_model(path: str | os.PathLike) -> tuple[GPT2Config, np.ndarray]:
    """The configuration and the flat float32 parameters of a model file, version 1, 3 or 5; padding rows are zero."""
    with open_regular(path) as file:
        header = _read_model_header(file)
        return header.config, _read_parameters(file, header.config, header.rows, header.itemsize)


def write_model(path: str | os.PathLike, config: GPT2Config, flat: np.ndarray, dtype: str = "float32") -> None:
    """Writes flat float32 parameters as a model file: "float32" as version 3, "bfloat16", rounded, as version 5."""
    if dtype not in DTYPE_VERSIONS:
        raise ValueError(f"the dtype of a model file must be one of {', '.join(DTYPE_VERSIONS)}, got {dtype!r}")
    flat = _host_floats(flat, config.num_parameters_padded, "write_model: the parameters")
    version = DTYPE_VERSIONS[dtype]
    slots = [MODEL_MAGIC, version, config.max_seq_len, config.vocab_size, config.num_layers, config.num_heads]
    slots += [config.channels, config.padded_vocab_size]
    with atomic_write(path) as file:
        file.write(SLOTS.pack(*slots, *[0] * (256 - len(slots))))
        _write_parameters(file, config, flat, MODEL_VERSIONS[version])


# ---- debug states ----------------------------------------------------------------------------------------------------


def _no_steps() -> np.ndarray:
    return np.empty(0, np.float32)


@dataclass
class DebugState:
    """One batch and what a reference made of it: inputs, targets int32 (B,T), logits (B,T,V), loss, flat gradients.

    losses, norms: float32 (n,), the loss before each of n steps of AdamW on this batch, as DEBUG_ADAMW has them, and
    the norm of its gradients before they are clipped to DEBUG_MAX_NORM. llm.c's files have none.
    """

    inputs: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    loss: float
    grads: np.ndarray
    losses: np.ndarray = field(default_factory=_no_steps)
    norms: np.ndarray = field(default_factory=_no_steps)


def read_debug_state(path: str | os.PathLike, config: GPT2Config) -> DebugState:
    """A debug state, version 1 or 2, of a model of this geometry."""
    with open_regular(path) as file:
        _, version, B, T, steps = _read_slots(file, DEBUG_MAGIC)[:5]
        if version not in (1, 2):
            raise ValueError(f"{file.name}: version {version} of the debug state cannot be read, only 1 and 2")
        if B < 1 or not 1 <= T <= config.max_seq_len:
            raise ValueError(f"{file.name}: a batch of {B} x {T} tokens does not fit a model of {config.max_seq_len}")
        if not 0 <= steps <= DEBUG_MAX_STEPS:
            raise ValueError(f"{file.name}: losses of {steps} steps, expected 0 to {DEBUG_MAX_STEPS}; it is damaged")
        rows = config.vocab_size if version == 1 else config.padded_vocab_size
        numbers = B * T * (2 + config.vocab_size) + 1 + num_elements(tensor_shapes(config, rows)) + 2 * steps
        expected, found = SLOTS.size + 4 * numbers, file_size(file)
        if found != expected:
            raise ValueError(
                f"{file.name}: {found} bytes found, {expected} expected for {B} x {T} tokens, {steps} steps and "
                f"{config}; it is of another model, or damaged"
            )
        require_memory(4 * numbers, f"{file.name}: a debug state")
        inputs, targets = np.empty((B, T), np.int32), np.empty((B, T), np.int32)
        logits, loss = np.empty((B, T, config.vocab_size), np.float32), np.empty(1, np.float32)
        for array in (inputs, targets, logits, loss):
            read_into(file, array, "its numbers")
        for name, tokens, lowest in (("inputs", inputs, 0), ("targets", targets, -1)):
            if tokens.min() < lowest or tokens.max() >= config.vocab_size:
                raise ValueError(
                    f"{file.name}: {name} from {tokens.min()} to {tokens.max()} do not fit a vocabulary of "
                    f"{config.vocab_size}; it is of another model, or damaged"
                )
        grads = _read_parameters(file, config, rows, 4)
        losses, norms = np.empty((2, steps), np.float32)
        if steps:
            read_into(file, losses, "the losses")
            read_into(file, norms, "the norms")
        return DebugState(inputs, targets, logits, float(loss[0]), grads, losses, norms)


def write_debug_state(path: str | os.PathLike, config: GPT2Config, state: DebugState) -> None:
    """Writes a debug state as version 2."""
    B, T = state.inputs.shape
    steps = len(state.losses)
    if steps > DEBUG_MAX_STEPS:
        raise ValueError(f"write_debug_state: {steps} steps, at most {DEBUG_MAX_STEPS} are expected")
    grads = _host_floats(state.grads, config.num_parameters_padded, "write_debug_state: the gradients")
    with atomic_write(path) as file:
        file.write(SLOTS.pack(DEBUG_MAGIC, 2, B, T, steps, *[0] * 251))
        _write_array(file, state.inputs, (B, T), np.int32)
        _write_array(file, state.targets, (B, T), np.int32)
        _write_array(file, state.logits, (B, T, config.vocab_size), np.float32)
        _write_array(file, state.loss, (), np.float32)
        _write_parameters(file, config, grads, 4)
        _write_array(file, state.losses, (steps,), np.float32)
        _write_array(file, state.norms, (steps,), np.float32)


def _write_array(file: BinaryIO, array, shape: tuple[int, ...], dtype) -> None:
    file.write(np.ascontiguousarray(array, dtype=dtype).reshape(shape).tobytes())


# ---- training states -------------------------------------------------------------------------------------------------


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
    arrays = [_host_floats(array, state.m.size, "write_state: m, v and the masters") for array in arrays]
    header = bytearray(SLOTS.size)
    flags = (len(arrays) - 2, loader["shuffle"])
    struct.pack_into("<6i", header, 0, STATE_MAGIC, 1, state.num_processes, state.rank, *flags)
    struct.pack_into("<i", header, 4 * 10, state.step)
    struct.pack_into("<2Q", header, 4 * 20, *state.rounding)
    struct.pack_into("<2Q", header, 4 * 30, loader["shard"], loader["sample"])
    with atomic_write(path) as file:
        file.write(header)
        for array in arrays:
            _write_floats(file, array, 4)
        if loader["shuffle"]:
            for order in (loader["shard_order"], loader["sample_order"]):
                file.write(struct.pack("<Q", len(order)))
                file.write(np.asarray(order, dtype="<i4").tobytes())
            file.write(loader["generator"])


def read_state(path: str | os.PathLike, num_parameters: int) -> TrainingState:
    """The training state of a model of this many (padded) parameters."""
    with open_regular(path) as file:
        slots = _read_state_header(file, num_parameters)
        require_memory(file_size(file), f"{file.name}: the optimizer's state")
        arrays = [np.empty(num_parameters, np.float32) for _ in range(2 + slots[4])]
        for array in arrays:
            _read_floats(file, array, 4)
        loader = {"shuffle": bool(slots[5]), "shard": _uint64(slots, 30), "sample": _uint64(slots, 32)}
        loader |= dict.fromkeys(("shard_order", "sample_order", "generator"))
        if loader["shuffle"]:
            loader["shard_order"] = _read_order(file)
            loader["sample_order"] = _read_order(file)
            loader["generator"] = read_exact(file, MT_STRUCT.size, "the loader's generator")
        _check_size(file, file.tell(), "a training state of this model")
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


def _read_state_header(file: BinaryIO, num_parameters: int) -> tuple[int, ...]:
    """The slots of a training state, checked, with a file big enough for its arrays."""
    slots = _read_slots(file, STATE_MAGIC)
    if slots[1] != 1:
        raise ValueError(f"{file.name}: version {slots[1]} of the training state cannot be read, only 1")
    if not 0 <= slots[3] < slots[2]:
        raise ValueError(f"{file.name}: not a training state: rank {slots[3]} of {slots[2]} processes")
    if slots[4] not in (0, 1) or slots[5] not in (0, 1) or slots[10] < 0:
        raise ValueError(f"{file.name}: not a training state: slots 4, 5, 10 hold {slots[4]}, {slots[5]}, {slots[10]}")
    arrays_end = SLOTS.size + FLOAT_BYTES * num_parameters * (2 + slots[4])
    if not slots[5]:
        _check_size(file, arrays_end, f"the training state of a model of {num_parameters} parameters")
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


# ---- folders of checkpoints ------------------------------------------------------------------------------------------

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint in a folder, with `step` updates done; `extra` is what the run saved beside the formats."""

    folder: Path
    step: int
    extra: dict = field(default_factory=dict)

    @property
    def model_path(self) -> Path:
        return self.folder / f"model_{self.step:08d}.bin"

    @property
    def state_path(self) -> Path:
        return self.folder / f"state_{self.step:08d}_00000.bin"

    @property
    def done_path(self) -> Path:
        return self.folder / f"DONE_{self.step:08d}"

    def remove(self) -> None:
        """Deletes its files. DONE goes first: a checkpoint that is half removed is none."""
        for path in (self.done_path, self.model_path, self.state_path):
            path.unlink(missing_ok=True)


def save_checkpoint(folder, step: int, model, optimizer, loader=None, extra: dict | None = None) -> Checkpoint:
    """Writes a checkpoint after `step` updates: model, optimizer and the position of `loader` (a DataLoader).

    `extra` takes what JSON can hold: the states of other random generators, the settings of the run. The folder is
    made. ValueError if the step has a checkpoint already: a failure halfway would spoil it (Checkpoint.remove deletes).
    """
    checkpoint = Checkpoint(Path(folder), step, extra or {})
    if checkpoint.done_path.exists():
        raise ValueError(f"{checkpoint.done_path}: step {step} has a checkpoint already; remove it first")
    checkpoint.folder.mkdir(parents=True, exist_ok=True)
    model.save(checkpoint.model_path)
    to_host = model.ops.to_host
    state = TrainingState(
        step, to_host(optimizer.m), to_host(optimizer.v), loader=None if loader is None else loader.state_dict()
    )
    write_state(checkpoint.state_path, state)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in (checkpoint.model_path, checkpoint.state_path)
    }
    manifest = {"version": MANIFEST_VERSION, "step": step, "files": files, "extra": checkpoint.extra}
    with atomic_write(checkpoint.done_path) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    return checkpoint


def load_checkpoint(checkpoint: Checkpoint, optimizer, loader=None) -> dict:
    """Restores optimizer and loader, so that the run goes on bit for bit; returns the checkpoint's `extra`.

    The model is the optimizer's, read before with GPT2.from_checkpoint(checkpoint.model_path).
    """
    state = read_state(checkpoint.state_path, optimizer.model.config.num_parameters_padded)
    if state.step != checkpoint.step:
        raise ValueError(f"{checkpoint.state_path}: is of step {state.step}, not {checkpoint.step}")
    if state.num_processes != 1:
        raise ValueError(f"{checkpoint.state_path}: is of a run of {state.num_processes} processes, this is one")
    if loader is not None:
        try:
            loader.load_state_dict(state.loader)
        except ValueError as error:
            raise ValueError(f"{checkpoint.state_path}: {error}") from None
    if state.masters is not None:
        # What llm.c trained in bfloat16 goes on from its float32 masters.
        optimizer.model.flat_params[:] = optimizer.model.ops.from_host(state.masters)
    optimizer.load_state(state.step, state.m, state.v)
    return checkpoint.extra


def list_steps(folder) -> list[int]:
    """The steps whose checkpoint was completed, oldest first; empty if there is no such folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"DONE_(\d{8,18})", name, re.ASCII)))


def find_latest(
    folder, *, with_state: bool = True, report: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> Checkpoint | None:
    """The newest checkpoint whose files are whole, or None; each newer, damaged one is told to `report` in one line.

    Without `with_state` only the model file is looked at: enough to generate.
    """
    for step in reversed(list_steps(folder)):
        checkpoint = Checkpoint(Path(folder), step)
        try:
            return _verified(checkpoint, with_state)
        except (OSError, ValueError) as error:
            report(f"checkpoint {step} in {folder} is damaged and not used: {error}")
    return None


def _verified(checkpoint: Checkpoint, with_state: bool) -> Checkpoint:
    """The checkpoint with its `extra`, if its files are what they were when it was written."""
    config = read_header(checkpoint.model_path).config
    if with_state:
        with open_regular(checkpoint.state_path) as file:
            _read_state_header(file, config.num_parameters_padded)
    with open_regular(checkpoint.done_path) as file:
        text = file.read()
    # llm.c writes an empty file: then the formats' own sizes are all there is to check.
    if not text.strip():
        return checkpoint
    problem = f"{checkpoint.done_path}: not a manifest of version {MANIFEST_VERSION}"
    try:
        manifest = json.loads(text)
        version, files, extra = manifest["version"], manifest["files"], manifest["extra"]
        known = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(problem) from None
    if version != MANIFEST_VERSION or not isinstance(extra, dict):
        raise ValueError(problem)
    for path in (checkpoint.model_path, checkpoint.state_path) if with_state else (checkpoint.model_path,):
        if known.get(path.name) != (path.stat().st_size, sha256_of(path)):
            raise ValueError(f"{path}: is not the file that was saved")
    return Checkpoint(checkpoint.folder, checkpoint.step, extra)


def remove_old_checkpoints(folder, keep: int, keep_every: int = 0) -> None:
    """Removes all but the newest `keep` checkpoints (0 keeps all), except those at multiples of `keep_every`."""
    if keep < 1:
        return
    for step in list_steps(folder)[:-keep]:
        if keep_every and step % keep_every == 0:
            continue
        Checkpoint(Path(folder), step).remove()
