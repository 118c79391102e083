"""Many files of documents to shards of tokens, all of one size, made by runs that may be stopped and go on.

The shards are cut from one row of tokens: the files in their order, the documents in theirs, each after an end of text.
So they do not depend on the number of workers, nor on where a run was stopped. The first is the validation shard, and
only the last may be shorter. A document can end in another shard than it begins in.

With each shard goes a manifest, a small JSON file: what the shards are made of, how many there are, and where the last
one ends. The end of text stands only where a document begins, so that place can be read from the tokens themselves:
how many documents of the file are begun, and how many tokens of the last one are in a shard. The manifest takes its
name after the shard; a shard that it does not count yet is made again, and is the same. An empty one comes before the
first shard, so that shards of one origin are never taken for those of another.

Called by fineweb.py; calls common.py, documents.py, progress.py, files.py, lock.py, tokenfile.py and tokenizer.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from ..files import atomic_write, atomic_writes, read_json, remove_temporaries
from ..lock import locked
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
class Manifest:
    """What the shards of a folder are made of (`source`: whatever tells it from others), how many there are, whether
    these are all, and where the last one ends."""

    source: dict
    shard_size: int
    shards: int
    complete: bool
    place: Place

    @classmethod
    def empty(cls, source: dict, shard_size: int) -> Self:
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
    """The shards of one name in a folder, and their manifest."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.manifest_path = folder / f"{name}.json"
        self.val_file, self.train_files = f"{name}_val_000000.bin", f"{name}_train_*.bin"
        self._shard_name = re.compile(rf"{name}_(val|train)_\d{{6,9}}\.bin", re.ASCII)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """The block in which this process alone writes shards of this name to the folder; ValueError if another one
        does. What a process that was killed had begun to write is deleted."""
        with locked(self.folder / f".{self.name}.lock", "making shards", "--output") as lock:
            lock.write_holder("pyllmc.datasets")
            own = re.compile(rf"{self._shard_name.pattern}|{re.escape(self.manifest_path.name)}", re.ASCII)
            remove_temporaries(self.folder, own)
            yield

    def path(self, number: int) -> Path:
        return self.folder / (f"{self.name}_train_{number:06d}.bin" if number else self.val_file)

    def paths(self) -> list[Path]:
        """Those that are there, the validation shard first."""
        found = (path for path in self.folder.glob(f"{self.name}_*.bin") if self._shard_name.fullmatch(path.name))
        return sorted(found, key=lambda path: (path.name != self.val_file, path.name))

    def num_tokens(self) -> tuple[int, int]:
        """How many tokens there are to train on, and how many are held out."""
        val, *train = (read_shard(path).num_tokens for path in self.paths())
        return sum(train), val

    def find_manifest(self, source: dict, shard_size: int) -> Manifest | None:
        """The manifest that an earlier run left, None if there was none. ValueError if the folder does not hold the
        shards that it names, or they are not made of what is wanted now: every entry of `source`, and the size."""
        manifest = self._read_manifest() if self.manifest_path.exists() else None
        before = {"shard size": manifest.shard_size, **manifest.source} if manifest else {}
        for what, wanted in {"shard size": shard_size, **source}.items():
            if manifest and (found := before.get(what)) != wanted:
                shown = _first_other_file(found, wanted) if what == "files" else f"{found} before, {wanted} now"
                raise ValueError(
                    f"{self.manifest_path}: the shards here are made of something else ({what}: {shown}); "
                    f"{self.otherwise}"
                )
        self._check_shards(manifest)
        return manifest

    def _read_manifest(self) -> Manifest:
        found = read_json(self.manifest_path)
        try:
            place = Place(**found.pop("place"))
            version, manifest = found.pop("version"), Manifest(place=place, **found)
        except (KeyError, TypeError):
            version, manifest = None, Manifest.empty({}, 0)
        numbers = (manifest.shard_size, manifest.shards, *dataclasses.astuple(manifest.place))
        if (
            version != VERSION
            or any(type(number) is not int or number < 0 for number in numbers)
            or type(manifest.complete) is not bool
            or not isinstance(manifest.source, dict)
        ):
            raise ValueError(f"{self.manifest_path}: is not the manifest of shards; {self.otherwise}")
        return manifest

    def _check_shards(self, manifest: Manifest | None) -> None:
        for path in self.paths():
            number = int(path.stem.rpartition("_")[2])
            # The next one may be there if the run was stopped before it could name the manifest.
            if manifest is None or path != self.path(number) or number > manifest.shards:
                raise ValueError(f"{path}: is there, but not in {self.manifest_path.name}; {self.otherwise}")
        if manifest is None:
            return
        for path in map(self.path, range(manifest.shards)):
            if not path.exists():
                raise ValueError(f"{path}: is not there, but in {self.manifest_path.name}; {self.otherwise}")
            found, last = read_shard(path).num_tokens, path == self.path(manifest.shards - 1)
            if found != manifest.shard_size and not (manifest.complete and last):
                raise ValueError(f"{path}: has {found:,} tokens, expected {manifest.shard_size:,}; {self.otherwise}")

    @property
    def otherwise(self) -> str:
        return f"delete {self.manifest_path.name} and the shards, or choose another --output"


def _first_other_file(before: object, now: list) -> str:
    """Of two lists of files, each a list that begins with a name, the first file that is not in both. `before` may be
    anything."""
    before = [file for file in before if isinstance(file, list) and file] if isinstance(before, list) else []
    names_before, names_now = [file[0] for file in before], [file[0] for file in now]
    for file in before:
        if file not in now:
            return f"{file[0]} is {'another file now' if file[0] in names_now else 'missing'}"
    return next((f"{file[0]} was added" for file in now if file[0] not in names_before), "another order")


def write_shards(
    folder: ShardFolder, manifest: Manifest, source: Source, tokenizer: Tokenizer, workers: int | None
) -> None:
    """Make the shards that are missing. Raises OSError, or ValueError that names the file that is wrong; the shards
    that were finished stay then, and the next call goes on after them."""
    check_replaceable([folder.path(manifest.shards)])
    try:
        if not manifest.shards:
            with atomic_write(folder.manifest_path) as file:
                file.write(manifest.content())
        with Progress("tokens", sum(source.sizes)) as progress:
            progress.start_at(sum(source.sizes[: manifest.place.file]))
            parts = _encode(source, manifest.place, tokenizer, workers, progress.advance)
            row = _Row(parts, tokenizer.eot, manifest.place)
            while row.has_more():
                manifest = _write_shard(folder, manifest, row)
    except BaseException:
        if not folder.paths():
            folder.manifest_path.unlink(missing_ok=True)
        raise
    if not manifest.complete:
        raise ValueError(f"{folder.manifest_path}: names a place behind the end of the files; {folder.otherwise}")


def _write_shard(folder: ShardFolder, manifest: Manifest, row: _Row) -> Manifest:
    """The next shard, and the manifest with it, which is returned."""
    with atomic_writes(folder.path(manifest.shards), folder.manifest_path) as (file, manifest_file):
        writer = TokenWriter(file)
        while writer.num_tokens < manifest.shard_size and row.has_more():
            writer.append(row.take(manifest.shard_size - writer.num_tokens))
        writer.finish()
        complete = not row.has_more()
        if complete and not manifest.shards:
            raise ValueError(
                f"{folder.folder}: {writer.num_tokens:,} tokens are too few: the first {manifest.shard_size:,} "
                "are held out; choose a smaller --shard-size"
            )
        following = dataclasses.replace(manifest, shards=manifest.shards + 1, complete=complete, place=row.place)
        manifest_file.write(following.content())
    return following


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
