"""What the datasets share: writing token files, what a prepared folder holds, and their common options.

Called by the modules of the datasets; calls files.py and tokenizer.py. The format is documented in dataloader.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..cli import ArgumentParser
from ..dataloader import HEADER_BYTES, MAGIC, TOKEN, VERSION
from ..files import atomic_write
from ..tokenizer import TOKENIZER_FILE, Tokenizer

TRAIN_FILE = "train.bin"
VAL_FILE = "val.bin"


@dataclass(frozen=True)
class Prepared:
    """A folder with train.bin, val.bin and tokenizer.bin, and what they hold."""

    folder: Path
    tokenizer: Tokenizer
    num_train: int
    num_val: int

    @property
    def train(self) -> Path:
        return self.folder / TRAIN_FILE

    @property
    def val(self) -> Path:
        return self.folder / VAL_FILE

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.num_train:,} tokens to train on ({TRAIN_FILE}), {self.num_val:,} held out "
            f"({VAL_FILE}), vocabulary of {self.tokenizer.vocab_size:,} ({TOKENIZER_FILE})"
        )


class TokenWriter:
    """Appends tokens to a token file of which the number of tokens is known only at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_tokens = 0
        self._file.write(bytes(HEADER_BYTES))

    def append(self, tokens: Iterable[int] | np.ndarray) -> None:
        """Add ids of any integer type, (n,). ValueError if one does not fit in uint16."""
        tokens = np.asarray(tokens)
        if tokens.size == 0:
            return
        if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 1:
            raise ValueError(f"tokens must be integers in one dimension, got {tokens.dtype} of shape {tokens.shape}")
        if tokens.min() < 0 or tokens.max() > np.iinfo(TOKEN).max:
            place = int(np.argmax((tokens < 0) | (tokens > np.iinfo(TOKEN).max)))
            raise ValueError(f"token {self.num_tokens + place} is {tokens[place]}, expected 0 to 65535")
        self._file.write(tokens.astype(TOKEN).tobytes())
        self.num_tokens += tokens.size

    def finish(self) -> None:
        """Write the header, now that the number of tokens is known."""
        if self.num_tokens >= 2**31:
            raise ValueError(f"a token file holds fewer than 2^31 tokens, got {self.num_tokens}; write several")
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = MAGIC, VERSION, self.num_tokens
        self._file.seek(0)
        self._file.write(header.tobytes())


@contextlib.contextmanager
def token_file(path: str | os.PathLike) -> Iterator[TokenWriter]:
    """A writer for a token file, which appears at `path`, complete, when the block ends without an error."""
    with atomic_write(path) as file:
        writer = TokenWriter(file)
        yield writer
        writer.finish()


def write_tokens(path: str | os.PathLike, tokens: Iterable[int] | np.ndarray) -> None:
    """Write one token file: ids (n,), each 0 to 65535. On ValueError or OSError `path` stays as it was."""
    with token_file(path) as writer:
        writer.append(tokens)


def add_common_options(parser: ArgumentParser, name: str) -> None:
    """The options that every dataset has."""
    parser.add_argument("--output", type=Path, default=Path("data", name), metavar="FOLDER", help="where to write")
    parser.add_argument("--tokenizer", choices=("char",), default="char", help="what a token is")
