"""Text files to tokens: `python -m pyllmc.datasets text FILE...`, and `prepare_text` for prepare.py.

The program makes GPT-2's tokens unless told otherwise: any text has them, and the files then fit GPT-2's weights and
llm.c. Characters are for small models on small texts, which is what a training run makes of its own text.

How much is held out is known only when all is tokenised; until then the tokens are in a temporary file. So the memory
this takes does not depend on the length of the text, but with GPT-2's tokens on that of its longest run without white
space, which common.py limits, and with JSON lines and Parquet on that of the longest document. With characters the text
is read twice: once to find them.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..cli import ArgumentParser
from ..tokenfile import MAX_TOKENS, TokenWriter
from ..tokenizer import CharTokenizer, Tokenizer
from .common import Prepared, add_common_options, encode_pieces, make_tokenizer, split_files
from .documents import PIECE_BYTES, Piece, read_documents, split_documents
from .progress import Progress

HELP = "your own files: plain text (UTF-8), JSON lines, Parquet"
TOKEN = np.dtype("<u2")
COPIED_TOKENS = 1 << 20


def prepare_text(
    source: str | Path | Sequence[Path],
    folder: str | os.PathLike,
    tokenizer: str | Tokenizer = "char",
    *,
    held_out: float = 0.1,
    min_tokens: int = 2,
    field: str = "text",
    workers: int | None = None,
) -> Prepared:
    """Tokenise text into `folder`: train.bin, val.bin, tokenizer.bin, tokenizer.json.

    source      a Path or several: files of the kinds in documents.py; a str is the text itself
    tokenizer   "char": a vocabulary of the text's own characters; "gpt2"; or a tokenizer that is there already
    held_out    float in (0, 1), the fraction at the end that goes to val.bin
    min_tokens  int, how many tokens either part must have: B * T + 1 for one batch
    field       where the text is in JSON lines and Parquet
    workers     int, threads that tokenise; None: one per processor

    Each document begins with the end-of-text token. Raises OSError or ValueError (empty, too short, not UTF-8, a
    character that is not in the vocabulary, a file in `folder` that is no dataset's), naming the file; then `folder` is
    as it was. What an earlier call made there is replaced.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, got {held_out}")
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    if not sources:
        raise ValueError("there is no file to make tokens of")
    vocabulary = _vocabulary(sources, field, tokenizer)
    inputs = [source for source in sources if isinstance(source, Path)]
    with split_files(Path(folder), vocabulary, inputs=inputs) as (train, val), _spool(Path(folder)) as spool:
        for tokens in encode_pieces(_pieces(sources, field, "tokens"), vocabulary, workers):
            spool.write(tokens.astype(TOKEN, copy=False).data)
            _check_not_too_many(spool.tell() // TOKEN.itemsize, held_out)
        num_tokens = spool.tell() // TOKEN.itemsize
        num_val = int(num_tokens * held_out)
        if min(num_val, num_tokens - num_val) < min_tokens:
            needed = math.ceil(min_tokens / min(held_out, 1 - held_out))
            raise ValueError(
                f"{_name(sources[0])}{' and others' if len(sources) > 1 else ''}: {num_tokens:,} tokens are too few: "
                f"with {held_out:g} of them held out, {needed:,} are needed; use more text, a smaller batch or a "
                "shorter context"
            )
        spool.seek(0)
        _copy(spool, num_tokens - num_val, train)
        _copy(spool, num_val, val)
    return Prepared(Path(folder), vocabulary, train.num_tokens, val.num_tokens)


def _vocabulary(sources: Sequence[str | Path], field: str, tokenizer: str | Tokenizer) -> Tokenizer:
    if isinstance(tokenizer, str):
        return make_tokenizer(tokenizer, (text for text, _ in _pieces(sources, field, "characters")))
    if isinstance(tokenizer, CharTokenizer):
        used = make_tokenizer("char", (text for text, _ in _pieces(sources, field, "characters")))
        if unknown := sorted(set(used.tokens) - set(tokenizer.tokens) - {used.tokens[used.eot]}):
            raise ValueError(
                f"{_name(sources[0])}: has {len(unknown)} characters that the vocabulary has not, such as "
                f"{unknown[0].decode()!r} (U+{ord(unknown[0].decode()):04X})"
            )
    return tokenizer


def _pieces(sources: Sequence[str | Path], field: str, what: str) -> Iterator[Piece]:
    """All documents. ValueError for a source without any text."""
    with Progress(what, sum(_size(source) for source in sources)) as progress:
        for source in sources:
            empty = True
            for piece in _documents(source, field, progress.advance):
                empty = False
                yield piece
            if empty:
                raise ValueError(f"{_name(source)}: is empty; there is nothing to learn from it")


def _documents(source: str | Path, field: str, report: Callable[[int], object]) -> Iterator[Piece]:
    if isinstance(source, Path):
        return read_documents(source, field, report)
    return split_documents(source[start : start + PIECE_BYTES] for start in range(0, len(source), PIECE_BYTES))


def _size(source: str | Path) -> int:
    return source.stat().st_size if isinstance(source, Path) else len(source)


def _name(source: str | Path) -> str:
    return str(source) if isinstance(source, Path) else "the text"


@contextlib.contextmanager
def _spool(folder: Path):
    """A temporary file without a name, on the disk where the tokens go."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            yield file
    except OSError as error:
        if error.errno and error.filename is None:
            raise OSError(
                error.errno, f"cannot write a temporary file here: {os.strerror(error.errno)}", str(folder)
            ) from None
        raise


def _check_not_too_many(num_tokens: int, held_out: float) -> None:
    if num_tokens * max(held_out, 1 - held_out) > MAX_TOKENS:
        raise ValueError(
            f"these files have more than {num_tokens:,} tokens, more than token files hold; make several datasets of "
            "them, each with its own --output"
        )


def _copy(spool, count: int, writer: TokenWriter) -> None:
    while count:
        tokens = np.frombuffer(spool.read(min(count, COPIED_TOKENS) * TOKEN.itemsize), TOKEN)
        writer.append(tokens)
        count -= len(tokens)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE",
        help=".jsonl and .ndjson: JSON lines; .parquet; any other: a document of plain text, or several with lines "
        "<|endoftext|> between them",
    )  # fmt: skip
    parser.add_argument("--field", default="text", help="where the text is in JSON lines and Parquet")
    add_common_options(parser, "text", "gpt2")


def prepare(args: argparse.Namespace) -> Prepared:
    return prepare_text(args.files, args.output, args.tokenizer, field=args.field, workers=args.workers)
