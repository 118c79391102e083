"""Many files of documents to shards of tokens, all of one size, made by runs that may be stopped and go on.

The shards are cut from one row of tokens: the files in their order, the documents in theirs, each after an end of text.
So they do not depend on the number of workers, nor on where a run was stopped. The first is held out, and only the last
may be shorter. A document can end in another shard than it begins in.

With each shard goes a record, a small JSON file: what the shards are made of, how many there are, and where the last
one ends. The end of text stands only where a document begins, so that place can be read from the tokens themselves:
how many documents of the file are begun, and how many tokens of the last one are in a shard. The record takes its name
after the shard; a shard without it is made again, and is the same.

Called by fineweb.py; calls common.py, documents.py, progress.py, files.py, tokenfile.py and tokenizer.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from ..files import atomic_writes, read_json
from ..tokenfile import TokenWriter, read_shard
from ..tokenizer import Tokenizer
from .common import check_replaceable, encode_pieces
from .documents import read_documents
from .progress import Progress

VERSION = 1
FIELD = "text"


@dataclass(frozen=True)
class Place:
    """Where a shard ends: the file, how many of its documents are begun, how many tokens of the last of them are in
    this shard or one before."""

    file: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Record:
    """What the shards of a folder are made of (`source`: whatever tells it from others), how many there are, whether
    these are all, and where the last one ends."""

    source: dict
    shard_size: int
    shards: int
    complete: bool
    place: Place

    @classmethod
    def of_none(cls, source: dict, shard_size: int) -> Self:
        """Before the first shard."""
        return cls(source, shard_size, 0, False, Place(0, 0, 0))

    def content(self) -> bytes:
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1).encode() + b"\n"


@dataclass(frozen=True)
class Source:
    """Files with a document in each line or row: their sizes in bytes, and what gets the path of each."""

    sizes: list[int]
    path: Callable[[int], Path]


class ShardFolder:
    """The shards of one name in a folder, and their record."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.record_path = folder / f"{name}.json"
        self.val_file, self.train_files = f"{name}_val_000000.bin", f"{name}_train_*.bin"

    def path(self, number: int) -> Path:
        return self.folder / (f"{self.name}_train_{number:06d}.bin" if number else self.val_file)

    def paths(self) -> list[Path]:
        """Those that are there, the one that is held out first."""
        pattern = re.compile(rf"{self.name}_(val|train)_\d{{6,9}}\.bin", re.ASCII)
        found = (path for path in self.folder.glob(f"{self.name}_*.bin") if pattern.fullmatch(path.name))
        return sorted(found, key=lambda path: (path.name != self.val_file, path.name))

    def num_tokens(self) -> tuple[int, int]:
        """How many tokens there are to train on, and how many are held out."""
        val, *train = (read_shard(path).num_tokens for path in self.paths())
        return sum(train), val

    def find_record(self, source: dict, shard_size: int) -> Record | None:
        """The record that an earlier run left, None if there was none. ValueError if the folder does not hold the
        shards that it names, or they are not made of what is wanted now: every entry of `source`, and the size."""
        record = self._read_record() if self.record_path.exists() else None
        before = {"shard size": record.shard_size, **record.source} if record else {}
        for what, wanted in {"shard size": shard_size, **source}.items():
            if record and (found := before.get(what)) != wanted:
                shown = f": {found} before, {wanted} now" if isinstance(wanted, (int, str)) else ""
                raise ValueError(
                    f"{self.record_path}: the shards here are made of something else ({what}{shown}); {self.otherwise}"
                )
        self._check_shards(record or Record.of_none(source, shard_size))
        return record

    def _read_record(self) -> Record:
        found = read_json(self.record_path)
        try:
            place = Place(**found.pop("place"))
            version, record = found.pop("version"), Record(place=place, **found)
        except (KeyError, TypeError):
            version, record = None, Record.of_none({}, 0)
        numbers = (record.shard_size, record.shards, *dataclasses.astuple(record.place))
        if (
            version != VERSION
            or any(type(number) is not int or number < 0 for number in numbers)
            or type(record.complete) is not bool
            or not isinstance(record.source, dict)
        ):
            raise ValueError(f"{self.record_path}: is not the record of shards; {self.otherwise}")
        return record

    def _check_shards(self, record: Record) -> None:
        for path in self.paths():
            number = int(path.stem.rpartition("_")[2])
            # The next one may be there if the run was stopped before it could name the record.
            if path != self.path(number) or number > record.shards:
                raise ValueError(f"{path}: is there, and not in the record {self.record_path.name}; {self.otherwise}")
        for path in map(self.path, range(record.shards)):
            if not path.exists():
                raise ValueError(f"{path}: is not there, but in {self.record_path.name}; {self.otherwise}")
            found, last = read_shard(path).num_tokens, path == self.path(record.shards - 1)
            if found != record.shard_size and not (record.complete and last):
                raise ValueError(f"{path}: has {found:,} tokens, expected {record.shard_size:,}; {self.otherwise}")

    @property
    def otherwise(self) -> str:
        return f"delete {self.record_path.name} and the shards, or choose another --output"


def write_shards(
    folder: ShardFolder, record: Record, source: Source, tokenizer: Tokenizer, workers: int | None
) -> None:
    """Make the shards that are missing. Raises OSError, or ValueError that names the file that is wrong; the shards
    that were finished stay then, and the next call goes on after them."""
    check_replaceable([folder.path(record.shards)])
    with Progress("tokens", sum(source.sizes)) as progress:
        progress.start_at(sum(source.sizes[: record.place.file]))
        row = _Row(_encode(source, record.place, tokenizer, workers, progress.advance), tokenizer.eot, record.place)
        while row.has_more():
            with atomic_writes(folder.path(record.shards), folder.record_path) as (file, record_file):
                writer = TokenWriter(file)
                while writer.num_tokens < record.shard_size and row.has_more():
                    writer.append(row.take(record.shard_size - writer.num_tokens))
                writer.finish()
                complete = not row.has_more()
                if complete and not record.shards:
                    raise ValueError(
                        f"{folder.folder}: {writer.num_tokens:,} tokens are too few: the first {record.shard_size:,} "
                        "are held out; choose a smaller --shard-size"
                    )
                record = dataclasses.replace(record, shards=record.shards + 1, complete=complete, place=row.place)
                record_file.write(record.content())
    if not record.complete:
        raise ValueError(f"{folder.record_path}: names a place behind the end of the files; {folder.otherwise}")


class _Row:
    """The tokens of all the files, and how far they are taken."""

    def __init__(self, parts: Iterator[tuple[int, np.ndarray]], eot: int, place: Place) -> None:
        self._parts, self._eot, self.place = parts, eot, place
        self._waiting = np.zeros(0, np.uint16)

    def has_more(self) -> bool:
        while not len(self._waiting):
            file, self._waiting = next(self._parts, (None, None))
            if file is None:
                self._waiting = np.zeros(0, np.uint16)
                return False
            if file != self.place.file:
                self.place = Place(file, 0, 0)
        return True

    def take(self, most: int) -> np.ndarray:
        """The next tokens, at most so many; `has_more` must have said so."""
        taken, self._waiting = self._waiting[:most], self._waiting[most:]
        starts = np.flatnonzero(taken == self._eot)
        of_last = len(taken) - int(starts[-1]) if len(starts) else self.place.tokens + len(taken)
        self.place = Place(self.place.file, self.place.documents + len(starts), of_last)
        return taken


def _encode(
    source: Source, place: Place, tokenizer: Tokenizer, workers: int | None, report: Callable[[int], object]
) -> Iterator[tuple[int, np.ndarray]]:
    """The tokens from a place on, each part with the number of its file. ValueError for a file without any text."""
    for file in range(place.file, len(source.sizes)):
        before = place if file == place.file else Place(file, 0, 0)
        path, skipped, empty = source.path(file), before.tokens, True
        # The last document that is begun is encoded again: where it was cut, its tokens cannot be made alone.
        pieces = itertools.islice(read_documents(path, FIELD, report), max(before.documents - 1, 0), None)
        for tokens in encode_pieces(pieces, tokenizer, workers):
            cut = min(skipped, len(tokens))
            skipped, empty = skipped - cut, False
            yield file, tokens[cut:]
        if skipped:
            raise ValueError(f"{path}: ends before the place where the last shard ends: it is not the file it was")
        if empty:
            raise ValueError(f"{path}: is empty; there is nothing to learn from it")
