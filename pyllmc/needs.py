"""What a training run needs, and whether it is there: a batch that fits the model, memory, disk.

What is not there is told before anything is made, with what would fit instead. Called by prepare.py, by train.py before
the text is read, and by plan.py for the memory; calls settings.py, config.py, tensors.py, checkpoint.py for what is in
the folder, devices.py and hardware.py for what is free, figures.py and group.py.
"""

import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from . import devices, hardware
from .checkpoint import list_steps
from .config import GPT2Config
from .figures import format_bytes
from .group import Group
from .settings import Settings, flag
from .tensors import FLOAT_BYTES, MOST_RECOMPUTE

# The share of free memory that a batch which is proposed leaves: half a gigabyte of 8. What is free changes with what
# other programs do, and beside the arrays there are Python's own objects, kernels and graphs that a GPU's driver keeps,
# gaps between arrays.
MARGIN = 1 / 16


def op_set(settings: Settings) -> ModuleType:
    """What the settings let compute. ValueError, with the reason, if it cannot."""
    return devices.choose(settings.device, settings.dtype, autotune=True)


def batch_shape(settings: Settings, config: GPT2Config, ranks: int = 1) -> tuple[int, int, int]:
    """B, T, and the batches of each rank in a step; ValueError if they do not fit the model or one another."""
    B, T = settings.batch_size, settings.seq_len or config.max_seq_len
    if T > config.max_seq_len:
        raise ValueError(f"--seq-len {T} is more than the model's context of {config.max_seq_len}")
    total, smallest = settings.total_batch_size or B * T * ranks, B * T * ranks
    if total % smallest:
        batches = f"a batch of {B} x {T}" if ranks == 1 else f"{ranks} batches, one for each process, of {B} x {T}"
        processes = "" if ranks == 1 else ", or start another number of processes"
        raise ValueError(
            f"--total-batch-size {total} is no multiple of {batches} = {smallest} tokens; change it, --batch-size or "
            f"--seq-len{processes}"
        )
    return B, T, total // smallest


def needed_memory(settings: Settings, config: GPT2Config, ranks: int) -> int:
    """Bytes that training takes on each rank where it computes, and HellaSwag, whose batches have other shapes."""
    B, T, ops = settings.batch_size, settings.seq_len or config.max_seq_len, op_set(settings)
    number = devices.float_bytes(ops)
    needed = config.training_bytes(B, T, settings.recompute, number, ranks if settings.zero else 1)
    needed += devices.scratch_bytes(ops, config, B, T)
    return needed + (config.activation_bytes(B, T, training=False, float_bytes=number) if settings.hellaswag else 0)


def _fitting_batch(settings: Settings, config: GPT2Config, free: int, ranks: int) -> int:
    """The largest --batch-size below that of the settings with which training fits in `free` bytes and leaves MARGIN of
    them; 1 if none does."""
    free -= math.ceil(MARGIN * free)
    one, two = (needed_memory(replace(settings, batch_size=B), config, ranks) for B in (1, 2))
    B = min(settings.batch_size - 1, 1 + (free - one) // (two - one))
    sequences = (settings.total_batch_size or 0) // (settings.seq_len or config.max_seq_len)
    while B > 1 and sequences % (B * ranks):
        B -= 1
    return max(B, 1)


def _checkpoints_to_come(settings: Settings, folder: Path, start: int) -> int:
    """How many more checkpoints than now will be in the folder at most, of a run that has done `start` steps, as far as
    its settings say how many there are; a new one is complete before an old one goes."""
    every, last, keep = settings.checkpoint_every, settings.max_steps, settings.keep_checkpoints
    if every < 0 or 0 < last <= start:
        return 0
    if not keep:
        return max(1, math.ceil(last / every) - start // every) if every else 1
    # The newest; and of those before them the ones that stay for ever.
    in_all = keep + 1
    if every and settings.keep_every:
        in_all += max(0, ((last - 1) // every - keep) * every) // math.lcm(every, settings.keep_every)
    # What an earlier run left moves out of the way, and stays.
    return max(1, in_all - (len(list_steps(folder)) if start else 0))


def _checkpoint_bytes(ops: ModuleType, config: GPT2Config, states: int) -> int:
    """Bytes of the parameters, and of so many times m, v and, where the parameters have less than float32, masters."""
    number = devices.float_bytes(ops)
    return (number + states * (2 if number >= FLOAT_BYTES else 3) * FLOAT_BYTES) * config.num_parameters_padded


def check_needs(
    settings: Settings, folder: Path, config: GPT2Config, group: Group, text_bytes: int = 0, start: int = 0
) -> None:
    """ValueError if memory or disk cannot hold what training this model takes after `start` steps, or the batch does
    not fit the model."""
    batch_shape(settings, config, group.size)
    ops = op_set(settings)
    needed, free = needed_memory(settings, config, group.size), devices.free_memory(ops)
    if free is not None and not devices.is_gpu(ops):
        free //= group.local_size
    if free is not None and needed > free:
        smaller = "choose a smaller --init" if settings.init else "reduce --layers, --channels or --context"
        fitting, ways = _fitting_batch(settings, config, free, group.size), []
        for name, value in (("recompute", MOST_RECOMPUTE), ("batch_size", fitting)):
            then = needed_memory(replace(settings, **{name: value}), config, group.size)
            if then <= free:
                ways.append(f"{flag(name)} {value} needs {format_bytes(then)}; or ")
        raise ValueError(
            f"training this model needs {format_bytes(needed)} of memory, {format_bytes(free)} is free"
            f"{' on the GPU' if devices.is_gpu(ops) else ''}"
            f"{f' for each of {group.local_size} processes' if group.local_size > 1 else ''}; "
            f"{''.join(ways)}reduce --seq-len, or {smaller}"
        )
    # Parameters, m and v in each checkpoint, perhaps masters.
    needed = (
        _checkpoints_to_come(settings, folder, start)
        * _checkpoint_bytes(ops, config, 1 if settings.zero else group.size)
        + 2 * text_bytes
    )
    free = hardware.free_disk(folder)
    if free is not None and needed > free:
        raise ValueError(
            f"{folder}: the run needs {format_bytes(needed)} of disk, {format_bytes(free)} is free; choose another "
            "--out, a smaller model or fewer --keep-checkpoints"
        )
