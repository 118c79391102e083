"""TinyStories as llm.c has it: 5 million short stories of simple words, written by GPT-3.5 and GPT-4 (1.6 GB to load).

The archive holds 50 files, data00.json to data49.json, each a JSON array of objects with a "story". data00 is held out.
The stories of a file are shuffled by Python's generator, seeded with 1337 plus the file's place in its part (data00: 0,
data01: 0, data02: 1), freed of white space around them, and each begins with the end of text.

The files come in the order of the archive, so the result is the same every time; llm.c takes them as they get ready.
The archive is read as a stream and never unpacked: no name in it becomes the name of a file, and what is not called
dataNN.json is passed over. Of at most two of its files the stories are in memory.

The archive's size and SHA-256 are those that other projects which load it hold it to; the numbers of tokens are
llm.c's.
"""

from __future__ import annotations

import argparse
import codecs
import gzip
import random
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from json import JSONDecodeError, JSONDecoder
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
from .documents import Piece, text_of_field
from .download import fetch, refuse_web_page
from .parallel import one_ahead, ordered_map
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
MAX_MEMBER_BYTES = 1 << 30
MAX_STORY_CHARACTERS = 1 << 24
CHUNK_BYTES = 1 << 18

_MEMBER = re.compile(r"(?:.*/)?data(\d\d)\.json", re.ASCII | re.DOTALL)
_SPACE = re.compile(r"[ \t\n\r]*")


def add_options(parser: ArgumentParser) -> None:
    add_common_options(parser, "tinystories", "gpt2")
    add_input_option(parser, "the archive")


def prepare(args: argparse.Namespace) -> Prepared:
    with new_folder(args.output):
        path = args.input or fetch(ADDRESS, args.output / ARCHIVE_FILE, size=SIZE, sha256=SHA256)
        refuse_web_page(path)
        all_stories = (story for _, stories in read_archive(path, "characters") for story in stories)
        tokenizer = make_tokenizer(args.tokenizer, all_stories)
        with split_files(args.output, tokenizer, TRAIN_FILE, VAL_FILE) as (train, val):
            for number, tokens in _encode(path, tokenizer, args.workers or default_workers()):
                (train if number else val).append(tokens)
    note = ""
    if args.tokenizer == "gpt2" and (train.num_tokens, val.num_tokens) != (NUM_TRAIN, NUM_VAL):
        note = f"this is not llm.c's archive, which has {NUM_TRAIN:,} tokens to train on and {NUM_VAL:,} held out"
    return Prepared(args.output, tokenizer, train.num_tokens, val.num_tokens, TRAIN_FILE, VAL_FILE, note)


def _encode(path: Path, tokenizer: Tokenizer, workers: int) -> Iterator[tuple[int, np.ndarray]]:
    """The tokens of the archive in order, with the number of the file that they come from."""
    files = read_archive(path, "tokens")
    if workers > 1:
        files = one_ahead(files)

    def encode(item: tuple[int, Batch]) -> tuple[int, np.ndarray]:
        number, batch = item
        return number, tokenizer.encode_documents(batch.texts)

    tokenizer.encode("")  # what it makes at first use, it makes before there are threads
    return ordered_map(encode, ((n, batch) for n, stories in files for batch in batches(map(Piece, stories))), workers)


# ---- the archive -----------------------------------------------------------------------------------------------------


def read_archive(path: Path, what: str) -> Iterator[tuple[int, list[str]]]:
    """(number, stories in their shuffled order) of each dataNN.json, in the order of the archive.

    Raises OSError, or ValueError that names the archive, the file in it and the line: damaged, cut short, no archive
    of this kind.
    """
    found: set[int] = set()
    with open_regular(path) as file, Progress(what, file_size(file)) as progress:
        try:
            with gzip.GzipFile(fileobj=file) as unpacked:
                with tarfile.open(fileobj=unpacked, mode="r|", bufsize=CHUNK_BYTES) as archive:
                    for count, member in enumerate(archive):
                        if count == MAX_MEMBERS:
                            raise ValueError(f"{path}: has more than {MAX_MEMBERS} members; TinyStories has 50")
                        match = _MEMBER.fullmatch(member.name)
                        if match is None or not member.isreg():
                            continue
                        number, place = int(match[1]), f"{path}: data{match[1]}.json"
                        if number in found:
                            raise ValueError(f"{place}: is there twice")
                        if member.size > MAX_MEMBER_BYTES:
                            raise ValueError(
                                f"{place}: has {member.size:,} bytes, expected {MAX_MEMBER_BYTES:,} at most"
                            )
                        found.add(number)
                        texts = _decoded(archive.extractfile(member), place, lambda: progress.reach(file.tell()))
                        stories = [text.strip() for text in read_stories(texts, place)]
                        random.Random(SEED + max(number - 1, 0)).shuffle(stories)
                        yield number, stories
                # The checksum of the whole stands at the end, behind what the archive needs.
                while unpacked.read(CHUNK_BYTES):
                    pass
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: is no whole tar.gz archive: {error}") from None
    if 0 not in found or len(found) == 1:
        raise ValueError(f"{path}: has no data00.json and data01.json, which TinyStories has")


def _decoded(file: BinaryIO, place: str, report: Callable[[], object]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    while data := file.read(CHUNK_BYTES):
        yield _decode(decoder, data, offset, place)
        offset += len(data)
        report()
    yield _decode(decoder, b"", offset, place)


def _decode(decoder: codecs.IncrementalDecoder, data: bytes, offset: int, place: str) -> str:
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: byte {offset - pending + error.start} is not UTF-8") from None


# ---- JSON ------------------------------------------------------------------------------------------------------------


def read_stories(texts: Iterator[str], place: str) -> Iterator[str]:
    """The "story" of each object in a JSON array that comes in pieces. ValueError names `place` and line."""
    text = _Window(texts, place)
    text.expect("[", "an array of stories")
    if text.peek() == "]":
        text.expect("]", "")
    else:
        number = 0
        while True:
            number += 1
            yield text_of_field(text.read_value(), "story", f"{place}: story {number}")
            if text.peek() != ",":
                break
            text.expect(",", "")
        text.expect("]", "a comma or the end of the array")
    if text.peek():
        text.fail("there is something behind the end of the array")


class _Window:
    """JSON text that comes in pieces, of which only those that are being read are there."""

    def __init__(self, texts: Iterator[str], place: str) -> None:
        self._texts, self._path = texts, place
        self._text, self._at, self._line = "", 0, 1
        self._decoder = JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def expect(self, char: str, what: str) -> None:
        """Reads `char`."""
        if self.peek() != char:
            self.fail(f"expected {what}")
        self._at += 1

    def read_value(self) -> object:
        """Reads a value of any kind, which has to be there as a whole to be read."""
        self.peek()
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
            except JSONDecodeError as error:
                # Each time twice as much, so that a long value is not looked at from its beginning again and again.
                wanted = 2 * (len(self._text) - self._at)
                if wanted > MAX_STORY_CHARACTERS or not self._more(wanted):
                    self._at = error.pos
                    self.fail(f"is no JSON: {error.msg}")
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
                self.fail(f"is JSON that cannot be read: {error}")
            else:
                return value

    def fail(self, what: str) -> None:
        line = self._line + self._text.count("\n", 0, self._at)
        raise ValueError(f"{self._path}: line {line}: {what}")

    def _more(self, wanted: int = 0) -> bool:
        """Adds a piece or, if there is so much, `wanted` characters; False at the end."""
        self._line += self._text.count("\n", 0, self._at)
        pieces = [self._text[self._at :]]
        length = before = len(pieces[0])
        for piece in self._texts:
            pieces.append(piece)
            length += len(piece)
            if length > max(before, wanted):
                break
        self._text, self._at = "".join(pieces), 0
        return length > before
