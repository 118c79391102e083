"""What a run was made of: the token files, the versions and the arithmetic, saved with every checkpoint and compared
when the run goes on.

The position in shuffled data is a place in numbered files: with another file in their midst it would silently mean
other tokens. So a run goes on with the files it began with, which may lie in another folder: they are told by their
names without folders, their sizes, and SHA-256 over their first bytes and over samples of the rest, at most a megabyte
of each, read once at the start. An edit in the midst of a large file that leaves its size can stay unseen.

Called by prepare.py: what `describe` gives becomes part of the `extra` of each checkpoint, and `compare` gets it back.
Calls tokenfile.py, files.py, and devices.py for what computes. The JSON: data/README.md.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from . import __version__
from .devices import arithmetic, is_gpu
from .files import sha256_of, sha256_of_sample
from .tokenfile import HEADER_BYTES, Shard

_FILE = {"name": str, "bytes": int, "tokens": int, "header": str, "sample": str}
_ARITHMETIC = ("versions", "pyllmc"), ("algorithms", "isa"), ("algorithms", "build")


def describe(train: Sequence[Shard], val: Sequence[Shard], ops: ModuleType) -> dict:
    """JSON about a run: its files to train and to validate on, in the loaders' order, and `ops`, the backend, which
    decides the bits. OSError or ValueError if a file cannot be read or was changed since the loader was made.

    data        {"train": [file, ...], "val": [file, ...]}, a file: name, bytes, tokens, header and sample (SHA-256)
    versions    pyllmc, numpy, python
    algorithms  isa: the module with the ops; build: the SHA-256 of its file. Results are the same for one module; the
                constants that decide bits (KC in gemm.pxi) and the compiler's flags are part of it. For a GPU
                `with_products` adds library, device and products.
    """
    return {
        "data": {"train": [_describe_file(shard) for shard in train], "val": [_describe_file(shard) for shard in val]},
        "versions": {"pyllmc": __version__, "numpy": np.__version__, "python": platform.python_version()},
        "algorithms": {"isa": arithmetic(ops), "build": sha256_of(getattr(ops, "module", ops).__file__)},
    }


def with_products(made_of: dict, ops: ModuleType) -> dict:
    """What `describe` gave, on a GPU with the algorithm of each kind of matrix product that was met since."""
    return made_of | {"algorithms": made_of["algorithms"] | ops.algorithms()} if is_gpu(ops) else made_of


def use_products(saved: dict, ops: ModuleType, source: str) -> None:
    """Lets a GPU use the algorithms that were saved in the extra of a checkpoint whose DONE is `source`, for the same
    bits; where it cannot, with another library or GPU, a line on stderr says so."""
    table = saved.get("algorithms")
    if is_gpu(ops) and isinstance(table, dict) and "products" in table:
        try:
            ops.use_algorithms(table)
        except ValueError as error:
            _note(f"{source}: what follows may differ in rounding: {error}")


def _describe_file(shard: Shard) -> dict:
    size, _ = shard.stamp
    with shard.open() as file:
        header, sample = hashlib.sha256(file.read(HEADER_BYTES)).hexdigest(), sha256_of_sample(file)
    return {
        "name": os.path.basename(shard.path), "bytes": size, "tokens": shard.num_tokens,
        "header": header, "sample": sample,
    }  # fmt: skip


def compare(saved: dict, now: dict, source: str) -> None:
    """ValueError, with the first file that differs, if the files to train on `now` are not those of `saved`, the extra
    of a checkpoint whose DONE is `source`. What changes no meaning is a line on stderr: other files to validate on,
    another pyllmc or instruction set, or that nothing was saved, as by llm.c."""
    files = _saved_files(saved, source)
    if files is None:
        _note(f"{source}: does not say what the run was trained on, so it goes on with the data as they are")
    else:
        if difference := _difference(files["train"], now["data"]["train"]):
            raise ValueError(
                f"{source}: this run was trained on other data: {difference}; put the files back as they were, or "
                "start another run, with --init on this one's model"
            )
        if files["val"] and now["data"]["val"] and (difference := _difference(files["val"], now["data"]["val"])):
            _note(f"validation losses before and after {source} are of different data: {difference}")
    _compare_arithmetic(saved, now, source)


def _note(line: str) -> None:
    print(line, file=sys.stderr)


def _saved_files(saved: dict, source: str) -> dict[str, list[dict]] | None:
    """The files that a checkpoint names, checked; None if it names none."""
    if "data" not in saved:
        return None
    try:
        files = {part: [{key: file[key] for key in _FILE} for file in saved["data"][part]] for part in ("train", "val")}
    except (TypeError, KeyError):
        files = None
    if files is None or not all(
        isinstance(file[key], kind) for part in files.values() for file in part for key, kind in _FILE.items()
    ):
        raise ValueError(f"{source}: what it says of the data is damaged; put it back from a copy")
    return files


def _difference(before: list[dict], now: list[dict]) -> str | None:
    """The first file of the one list that is not in its place in the other, and what differs."""
    names = {file["name"] for file in before}, {file["name"] for file in now}
    for number, (old, new) in enumerate(zip(before, now), 1):
        if old["name"] != new["name"]:
            if old["name"] not in names[1]:
                return f"{old['name']} is missing"
            if new["name"] not in names[0]:
                return f"{new['name']} was added"
            return f"file {number} was {old['name']}, now it is {new['name']}: their folders sort otherwise"
        for key, what in (("bytes", "size in bytes"), ("tokens", "number of tokens")):
            if old[key] != new[key]:
                return f"{old['name']}: its {what} was {old[key]:,}, now it is {new[key]:,}"
        if old["header"] != new["header"]:
            return f"{old['name']}: has another header"
        if old["sample"] != new["sample"]:
            return f"{old['name']}: has other tokens"
    if len(before) > len(now):
        return f"{before[len(now)]['name']} is missing"
    if len(now) > len(before):
        return f"{now[len(before)]['name']} was added"
    return None


def _compare_arithmetic(saved: dict, now: dict, source: str) -> None:
    for part, name in _ARITHMETIC:
        before = saved.get(part)
        before = before.get(name) if isinstance(before, dict) else None
        if before is not None and before != now[part][name]:
            changed = "another build of the ops" if name == "build" else f"{name} {before}, now {now[part][name]}"
            _note(f"{source}: was computed with {changed}: what follows may differ from it in rounding")
            return
