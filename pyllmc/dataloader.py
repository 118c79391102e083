"""Token files to batches, in the order in which llm.c's DataLoader gives them.

    offset   type      token file (little endian)
    0        int32     magic 20240520
    4        int32     version 1
    8        int32     number of tokens n
    12       int32     zeros up to byte 1024
    1024     uint16    n tokens; the file ends there

A sample is world_size * B * T consecutive tokens of one shard (file); rank r reads B * T + 1 of them from r * B * T on,
and the targets are the inputs one token later. The tail of a shard that fills no sample is left out. Shuffling draws
the order of the shards anew at every epoch and the order of the samples anew at every shard, from MT19937.

So the B rows of a batch are neighbours in the text, and a small batch sees little of its variety. With scatter_rows
every row is a sample of its own, drawn as llm.c draws the batches of B = 1: a batch is B of those.

Called by train.py; the files come from `pyllmc.datasets` or from llm.c. Files are read with pread, not mapped, so that
one that shrinks meanwhile is an error and not a crash.
"""

from __future__ import annotations

import glob
import operator
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import rng
from .files import file_size, open_regular

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
TOKEN = np.dtype("<u2")


@dataclass(frozen=True)
class Shard:
    """One token file and how many tokens it holds."""

    path: str
    num_tokens: int


class DataLoader:
    """Batches from all files that match a glob pattern, for ever.

    pattern      path of one token file, or a glob pattern; the shards are taken in the order of their names
    B, T         int, batch size and sequence length
    shuffle      as described above; otherwise everything in its order
    scatter_rows as described above; otherwise the rows of a batch follow one another, as llm.c's do
    seed         int, of the shuffling; rank r uses seed + r, so each rank has an order of its own
    rank         int in [0, world_size), which slice of every sample is ours
    vocab_size   int or None; with it, a token >= vocab_size is a ValueError with file and position

    Raises OSError (FileNotFoundError if nothing matches) or ValueError, naming the file, for files that cannot be used:
    wrong header or size, or fewer than world_size * B * T + 1 tokens.
    """

    def __init__(
        self,
        pattern: str | os.PathLike,
        B: int,
        T: int,
        *,
        shuffle: bool = False,
        scatter_rows: bool = False,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        self._file = None
        self.B, self.T = _at_least(1, B, "B"), _at_least(1, T, "T")
        self.world_size, self.rank = _at_least(1, world_size, "world_size"), _at_least(0, rank, "rank")
        if self.rank >= self.world_size:
            raise ValueError(f"DataLoader: rank must be in [0, {self.world_size}), got {self.rank}")
        self.shuffle = bool(shuffle)
        self._sample_rows = 1 if scatter_rows else self.B
        self.vocab_size = vocab_size
        self.shards = [Shard(path, _read_num_tokens(path)) for path in _matching(pattern)]
        for shard in self.shards:
            if shard.num_tokens <= self._sample_tokens:
                raise ValueError(
                    f"{shard.path}: {shard.num_tokens} tokens are too few: a batch of {self._sample_rows} x {self.T} "
                    f"tokens{f' in {self.world_size} processes' if self.world_size > 1 else ''} needs at least "
                    f"{self._sample_tokens + 1}; use more text, a smaller batch or a shorter context"
                )
        self._generator = rng.TorchGenerator(seed + self.rank)
        self._shard_order = np.arange(len(self.shards), dtype=np.int32)
        self.reset()

    @property
    def num_tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_batches(self) -> int:
        """Batches in one epoch."""
        return sum(self._num_samples(shard) for shard in self.shards) * self._sample_rows // self.B

    @property
    def _sample_tokens(self) -> int:
        return self.world_size * self._sample_rows * self.T

    def _num_samples(self, shard: Shard) -> int:
        return (shard.num_tokens - 1) // self._sample_tokens

    def reset(self) -> None:
        """Begin an epoch: the first shard, in a new order of shards if they are shuffled."""
        if self.shuffle:
            # llm.c shuffles the order that the epoch before has left.
            rng.shuffle(self._shard_order, self._generator)
        self._begin_shard(0)

    def _begin_shard(self, index: int) -> None:
        self._open_shard(index)
        samples = self._num_samples(self._shard)
        self._sample = 0
        self._sample_order = rng.random_permutation(samples, self._generator) if self.shuffle else None

    def _open_shard(self, index: int) -> None:
        """Make the index-th shard of this epoch's order the current one."""
        shard = self.shards[self._shard_order[index]]
        self.close()
        self._file = open_regular(shard.path)
        self._shard_index, self._shard = index, shard

    def next_batch(self) -> tuple[np.ndarray, np.ndarray]:
        """The next inputs and targets, int32 (B, T), fresh arrays. After the last sample the next epoch begins."""
        inputs = np.empty((self.B, self.T), np.int32)
        targets = np.empty((self.B, self.T), np.int32)
        for row in range(0, self.B, self._sample_rows):
            tokens = self._next_sample()
            inputs[row : row + self._sample_rows] = tokens[:-1].reshape(-1, self.T)
            targets[row : row + self._sample_rows] = tokens[1:].reshape(-1, self.T)
        return inputs, targets

    def _next_sample(self) -> np.ndarray:
        """This rank's tokens of the next sample, and the one that follows them."""
        if self._sample >= self._num_samples(self._shard):
            if self._shard_index + 1 < len(self.shards):
                self._begin_shard(self._shard_index + 1)
            else:
                self.reset()
        sample = self._sample if self._sample_order is None else int(self._sample_order[self._sample])
        count = self._sample_rows * self.T
        tokens = self._read(sample * self._sample_tokens + self.rank * count, count + 1)
        self._sample += 1
        return tokens

    def _read(self, position: int, count: int) -> np.ndarray:
        """`count` tokens of the current shard from `position` on, uint16."""
        wanted = count * TOKEN.itemsize
        offset = HEADER_BYTES + position * TOKEN.itemsize
        data = os.pread(self._file.fileno(), wanted, offset)
        while len(data) < wanted:
            more = os.pread(self._file.fileno(), wanted - len(data), offset + len(data))
            if not more:
                raise ValueError(
                    f"{self._shard.path}: ends at byte {offset + len(data)}, before the last of its "
                    f"{self._shard.num_tokens} tokens; it was changed while in use"
                )
            data += more
        tokens = np.frombuffer(data, TOKEN)
        if self.vocab_size is not None and tokens.max() >= self.vocab_size:
            place = int(np.argmax(tokens >= self.vocab_size))
            raise ValueError(
                f"{self._shard.path}: token {position + place} is {tokens[place]}, expected less than the vocabulary's "
                f"{self.vocab_size}: these tokens are not of this model's tokenizer"
            )
        return tokens

    def state_dict(self) -> dict:
        """The exact position: what `load_state_dict` needs to go on with the batch that would have come next.

        shuffle        bool
        shard          int, index into shard_order; sample: int, index into sample_order
        shard_order    int32 (number of shards,), sample_order int32 (samples in this shard,) or None if not shuffled
        generator      bytes, llm.c's struct of the MT19937 state
        """
        return {
            "shuffle": self.shuffle,
            "shard": self._shard_index,
            "sample": self._sample,
            "shard_order": self._shard_order.copy(),
            "sample_order": None if self._sample_order is None else self._sample_order.copy(),
            "generator": self._generator.to_bytes(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go to a saved position. ValueError, and nothing changed, if it does not fit the shards, B, T or shuffling."""
        if state["shuffle"] != self.shuffle:
            raise ValueError(f"the saved position has shuffle={state['shuffle']}, this run shuffle={self.shuffle}")
        # Without shuffling both orders are known, and llm.c's state file does not hold them.
        order = state["shard_order"] if self.shuffle else np.arange(len(self.shards))
        shard_order = _permutation(order, len(self.shards), "shard")
        shard, sample = operator.index(state["shard"]), operator.index(state["sample"])
        if not 0 <= shard < len(self.shards):
            raise ValueError(f"the saved position is in shard {shard}, expected less than {len(self.shards)}")
        samples = self._num_samples(self.shards[shard_order[shard]])
        if not 0 <= sample <= samples:
            raise ValueError(
                f"the saved position is sample {sample} of its shard, which has {samples}; were the files, the batch "
                "size and the context the same?"
            )
        sample_order = _permutation(state["sample_order"], samples, "sample") if self.shuffle else None
        generator = rng.TorchGenerator.from_bytes(state["generator"]) if self.shuffle else self._generator
        self._shard_order, self._sample_order, self._generator = shard_order, sample_order, generator
        self._open_shard(shard)
        self._sample = sample

    def close(self) -> None:
        """Close the current shard's file."""
        if self._file is not None:
            self._file.close()

    def __del__(self) -> None:
        self.close()


def _at_least(least: int, value: int, name: str) -> int:
    value = operator.index(value)
    if value < least:
        raise ValueError(f"DataLoader: {name} must be at least {least}, got {value}")
    return value


def _permutation(order, n: int, what: str) -> np.ndarray:
    """`order` as an int32 array, if it is a permutation of 0 .. n-1."""
    if not np.array_equal(np.sort(order), np.arange(n)):
        raise ValueError(
            f"the saved {what} order is no permutation of {n} {what}s; were the files, the batch size and the context "
            "the same?"
        )
    return np.array(order, np.int32)


def _matching(pattern: str | os.PathLike) -> list[str]:
    """The files that a path or a glob pattern names, sorted by the bytes of their names, as C's glob sorts them."""
    pattern = os.fspath(pattern)
    # A file whose name contains [ or * is meant literally.
    paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern), key=os.fsencode)
    if not paths:
        raise FileNotFoundError(f"{pattern}: no such token file; python -m pyllmc.datasets makes them")
    return paths


def _read_num_tokens(path: str) -> int:
    """The number of tokens in the header of a token file, once magic, version and the file's size agree with it."""
    with open_regular(path) as file:
        size = file_size(file)
        data = file.read(HEADER_BYTES)
    if len(data) < HEADER_BYTES:
        raise ValueError(f"{path}: {size} bytes are too few for a token file, whose header alone has {HEADER_BYTES}")
    magic, version, count = (int(field) for field in np.frombuffer(data, "<i4", 3))
    if magic != MAGIC:
        raise ValueError(
            f"{path}: magic is {magic}, expected {MAGIC}: not a token file; python -m pyllmc.datasets makes them"
        )
    if version != VERSION:
        raise ValueError(f"{path}: version is {version}, expected {VERSION}")
    if count < 0 or size != HEADER_BYTES + count * TOKEN.itemsize:
        raise ValueError(
            f"{path}: number of tokens is {count}, expected {(size - HEADER_BYTES) / TOKEN.itemsize:g} in {size} bytes"
        )
    return count
