"""TinyStories as llm.c has it: 5 million short stories of simple words, written by GPT-3.5 and GPT-4 (1.6 GB to load).

The archive holds 50 files, data00.json to data49.json, each a JSON array of objects with a "story". data00 is held out.
The stories of a file are shuffled by Python's generator, seeded with 1337 plus the file's place in its part (data00: 0,
data01: 0, data02: 1), freed of white space around them, and each begins with the end of text.

The files come in the order of the archive, so the result is the same every time; llm.c takes them as they get ready.
The archive is read as a stream and never unpacked: no name in it becomes the name of a file, and what is not called
dataNN.json is passed over. Of at most two of its files, 130 MB each, the stories are in memory; one larger than
MAX_MEMBER_BYTES is refused.

The archive's size and SHA-256 are those that other projects which load it hold it to; the numbers of tokens are
llm.c's.

Called by __main__.py; calls common.py, documents.py, download.py, parallel.py, progress.py, files.py and tokenizer.py.
"""

from __future__ import annotations

import argparse
import gzip
import random
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..cli import ArgumentParser
from ..files import file_size, open_regular
from ..tokenizer import Tokenizer
from .common import (
    Batch,
    Prepared,
    add_common_options,
    add_input_option,
    batches,
    default_workers,
    make_tokenizer,
    new_folder,
    split_files,
)
from .documents import Piece, decode_utf8, kind_of, parse_json, text_of_field
from .download import fetch, refuse_web_page
from .parallel import ordered_map, prefetch
from .progress import Progress

HELP = "5 million short stories of simple words, 1.6 GB to download, as llm.c has them"
ADDRESS = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
SIZE = 1_608_001_638
SHA256 = "26cf7605aca15bc4ea6fa637256400d9d01317b28ed296172b2d1dd160cd7699"
ARCHIVE_FILE = "TinyStories_all_data.tar.gz"
TRAIN_FILE = "TinyStories_train.bin"
VAL_FILE = "TinyStories_val.bin"
NUM_TRAIN, NUM_VAL = 925_653_391, 19_043_638  # of GPT-2's tokens
SEED = 1337
MAX_MEMBERS = 1000
MAX_MEMBER_BYTES = 1 << 28
MAX_MEMBER_VALUES = 1 << 24  # there are about 3 million
CHUNK_BYTES = 1 << 18

_MEMBER = re.compile(r"(?:.*/)?data(\d\d)\.json", re.ASCII | re.DOTALL)


def add_options(parser: ArgumentParser) -> None:
    add_common_options(parser, "tinystories", "gpt2")
    add_input_option(parser, "the archive")


def prepare(args: argparse.Namespace) -> Prepared:
    with new_folder(args.output):
        path = args.input or fetch(ADDRESS, args.output / ARCHIVE_FILE, size=SIZE, sha256=SHA256)
        refuse_web_page(path)
        all_stories = (story for _, stories in read_archive(path, "characters") for story in stories)
        tokenizer = make_tokenizer(args.tokenizer, all_stories)
        with split_files(args.output, tokenizer, TRAIN_FILE, VAL_FILE, inputs=[path]) as (train, val):
            for number, tokens in _encode(path, tokenizer, args.workers or default_workers()):
                (train if number else val).append(tokens)
            for part, name in ((val, "data00.json"), (train, "every file but data00.json")):
                if not part.num_tokens:
                    raise ValueError(f"{path}: {name}: has no story, and a token file of none cannot be loaded")
    note = ""
    if args.tokenizer == "gpt2" and (train.num_tokens, val.num_tokens) != (NUM_TRAIN, NUM_VAL):
        note = f"this is not llm.c's archive, which has {NUM_TRAIN:,} tokens to train on and {NUM_VAL:,} held out"
    return Prepared(args.output, tokenizer, train.num_tokens, val.num_tokens, TRAIN_FILE, VAL_FILE, note)


def _encode(path: Path, tokenizer: Tokenizer, workers: int) -> Iterator[tuple[int, np.ndarray]]:
    """The tokens of the archive in order, with the number of the file that they come from."""
    files = read_archive(path, "tokens")
    if workers > 1:
        files = prefetch(files)

    def encode(item: tuple[int, Batch]) -> tuple[int, np.ndarray]:
        number, batch = item
        return number, tokenizer.encode_documents(batch.texts)

    tokenizer.encode("")  # what it makes at first use, it makes before there are threads
    return ordered_map(encode, ((n, batch) for n, stories in files for batch in batches(map(Piece, stories))), workers)


# ---- the archive -----------------------------------------------------------------------------------------------------


def read_archive(path: Path, what: str) -> Iterator[tuple[int, list[str]]]:
    """(number, stories in their shuffled order) of each dataNN.json, in the order of the archive.

    Raises OSError, or ValueError that names the archive, the file in it, the line or the story: damaged, cut short, no
    archive of this kind.
    """
    try:
        with (
            open_regular(path) as file,
            Progress(what, file_size(file)) as progress,
            gzip.GzipFile(fileobj=file) as unpacked,
            tarfile.open(fileobj=(bounded := _Bounded(unpacked)), mode="r|", bufsize=CHUNK_BYTES) as archive,
        ):
            for number, place, member in _members(archive, path, bounded):
                yield number, _shuffled(read_stories(decode_utf8(_content(member), place), place), number)
                progress.reach(file.tell())
            # The checksum of the whole stands at the end, behind what the archive needs.
            while unpacked.read(CHUNK_BYTES):
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, RecursionError) as error:
        raise ValueError(f"{path}: is no whole tar.gz archive: {error}") from None


def _members(archive: tarfile.TarFile, path: Path, bounded: _Bounded) -> Iterator[tuple[int, str, BinaryIO]]:
    """Number, what errors call it, and content of each dataNN.json; ValueError if they are not what they should be."""
    found: set[int] = set()
    for count, member in enumerate(archive):
        if count == MAX_MEMBERS:
            raise ValueError(f"{path}: has more than {MAX_MEMBERS} members; TinyStories has 50")
        bounded.reset()
        match = _MEMBER.fullmatch(member.name)
        if match is None or not member.isreg() or member.issparse():
            continue
        number, place = int(match[1]), f"{path}: data{match[1]}.json"
        if number in found:
            raise ValueError(f"{place}: is there twice")
        if member.size > MAX_MEMBER_BYTES:
            raise ValueError(f"{place}: has {member.size:,} bytes, expected {MAX_MEMBER_BYTES:,} at most")
        found.add(number)
        yield number, place, archive.extractfile(member)
    if 0 not in found or len(found) == 1:
        raise ValueError(f"{path}: has no data00.json and data01.json, which TinyStories has")


class _Bounded:
    """The unpacked archive as tarfile reads it. From one member to the next it gives no more than a member may have:
    tarfile itself takes any length that a header asks for, for a name as for a content."""

    def __init__(self, unpacked: gzip.GzipFile) -> None:
        self._unpacked = unpacked
        self.reset()

    def reset(self) -> None:
        self._left = MAX_MEMBER_BYTES + 2 * CHUNK_BYTES

    def read(self, size: int) -> bytes:
        data = self._unpacked.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.ReadError(f"one member has more than {MAX_MEMBER_BYTES:,} bytes")
        return data


def _content(member: BinaryIO) -> bytearray:
    # In one piece tarfile needs three times its memory.
    content = bytearray()
    while chunk := member.read(CHUNK_BYTES):
        content += chunk
    return content


def read_stories(text: str, place: str) -> list[str]:
    """The "story" of each object in a JSON array, without white space around it. ValueError names `place`."""
    # Before each value but the first stands one of these, and a value of two bytes can take 64 in memory.
    if sum(map(text.count, ",[{")) > MAX_MEMBER_VALUES:
        raise ValueError(f"{place}: has more than {MAX_MEMBER_VALUES:,} commas and brackets: these are no stories")
    found = parse_json(text, place, _only_story)
    if not isinstance(found, list):
        raise ValueError(f"{place}: expected an array of stories, found {kind_of(found)}")
    return [text_of_field(item, "story", f"{place}: story {number}") for number, item in enumerate(found, 1)]


def _only_story(item: dict) -> dict:
    # All the rest of an object goes as soon as it is read, so that it takes no memory.
    story = item.get("story")
    return {"story": story.strip()} if isinstance(story, str) else item


def _shuffled(stories: list[str], number: int) -> list[str]:
    random.Random(SEED + max(number - 1, 0)).shuffle(stories)
    return stories
