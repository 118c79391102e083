"""Plain text files to tokens: `python -m pyllmc.datasets text FILE...`, and `prepare_text` for train.py.

The text is read twice, piece by piece: once to find its characters and its length, once to write the tokens. So the
memory it takes does not depend on its length.
"""

from __future__ import annotations

import argparse
import codecs
import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..cli import ArgumentParser
from ..files import open_regular
from ..tokenizer import TOKENIZER_FILE, CharTokenizer, Tokenizer
from .common import Prepared, add_common_options, token_file

HELP = "your own text files (UTF-8)"
PIECE_BYTES = 1 << 20


def read_text(path: str | os.PathLike) -> Iterator[str]:
    """A UTF-8 file in pieces, every line end as a line feed, without the byte-order mark some editors put first.

    Raises OSError, or ValueError with the place of the first byte that is not UTF-8.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; name the text files in it")
    decoder = codecs.getincrementaldecoder("utf-8")()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    with open_regular(path) as file:
        while True:
            data = file.read(PIECE_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place, byte = offset - pending + error.start, error.object[error.start]
                raise ValueError(f"{path}: byte {place} (0x{byte:02x}) is not UTF-8; save the file as UTF-8") from None
            if offset == 0:
                text = text.removeprefix("\ufeff")
            offset += len(data)
            yield line_ends.decode(text, final=not data)
            if not data:
                return


def prepare_text(
    source: str | Path | Sequence[Path],
    folder: str | os.PathLike,
    tokenizer: str = "char",
    *,
    held_out: float = 0.1,
    min_tokens: int = 2,
) -> Prepared:
    """Tokenise text into `folder`: train.bin, val.bin, tokenizer.bin, tokenizer.json.

    source      a Path or several: files, each of them a document; a str is the text itself
    tokenizer   "char": a vocabulary of the text's own characters
    held_out    float in (0, 1), the fraction at the end that goes to val.bin
    min_tokens  int, how many tokens either part must have: B * T + 1 for one batch

    Each document begins with the end-of-text token. Raises OSError or ValueError (empty, too short, not UTF-8, too many
    different characters), naming the file, before anything is written.
    """
    if tokenizer != "char":
        raise ValueError(f"tokenizer must be char, got {tokenizer!r}")
    if not 0 < held_out < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, got {held_out}")
    documents = [source] if isinstance(source, (str, Path)) else list(source)
    characters, num_tokens = _survey(documents)
    num_val = int(num_tokens * held_out)
    if min(num_val, num_tokens - num_val) < min_tokens:
        needed = math.ceil(min_tokens / min(held_out, 1 - held_out))
        raise ValueError(
            f"{_name(documents[0])}{' and others' if len(documents) > 1 else ''}: {num_tokens:,} tokens are too few: "
            f"with {held_out:g} of them held out, {needed:,} are needed; use more text, a smaller batch or a shorter "
            "context"
        )
    vocabulary = CharTokenizer.from_characters(characters)
    prepared = Prepared(Path(folder), vocabulary, num_tokens - num_val, num_val)
    prepared.folder.mkdir(parents=True, exist_ok=True)
    with token_file(prepared.train) as train, token_file(prepared.val) as val:
        for tokens in _encode(documents, vocabulary):
            left = prepared.num_train - train.num_tokens
            train.append(tokens[:left])
            val.append(tokens[left:])
        vocabulary.save(prepared.folder / TOKENIZER_FILE)
    return prepared


def _pieces(document: str | Path) -> Iterator[str]:
    if isinstance(document, Path):
        return read_text(document)
    return (document[start : start + PIECE_BYTES] for start in range(0, len(document), PIECE_BYTES))


def _name(document: str | Path) -> str:
    return str(document) if isinstance(document, Path) else "the text"


def _survey(documents: Sequence[str | Path]) -> tuple[set[str], int]:
    """All characters, and how many tokens the documents will make."""
    characters: set[str] = set()
    num_tokens = 0
    for document in documents:
        length = 0
        for piece in _pieces(document):
            characters.update(piece)
            length += len(piece)
        if length == 0:
            raise ValueError(f"{_name(document)}: is empty; there is nothing to learn from it")
        num_tokens += 1 + length
    return characters, num_tokens


def _encode(documents: Sequence[str | Path], vocabulary: Tokenizer) -> Iterator[np.ndarray]:
    for document in documents:
        yield np.array([vocabulary.eot], np.uint16)
        for piece in _pieces(document):
            yield vocabulary.encode(piece)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="text file; each one is a document")
    add_common_options(parser, "text")


def prepare(args: argparse.Namespace) -> Prepared:
    return prepare_text(args.files, args.output, args.tokenizer)
