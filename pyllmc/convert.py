"""`python -m pyllmc.convert SOURCE TARGET`: models between llm.c's files and the folders of Hugging Face.

    SOURCE    a model file, the folder of a run, the folder of a Hugging Face GPT-2, or a name: gpt2, gpt2-medium, ...
    TARGET    a model file if it ends in .bin, else a folder that transformers loads; nothing is written over

Numbers keep their dtype unless --dtype says another; a model file has no float16, which becomes float32. Calls
runs.py to find the source, model.py, modelfile.py, huggingface.py, floats.py and tokenizer.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from . import cli, huggingface, modelfile
from .floats import DTYPES
from .model import model_folder, model_format
from .runs import find_model, opened
from .tokenizer import GPT2Tokenizer, find_tokenizer


def parse_arguments(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(
        prog="python -m pyllmc.convert",
        description="Convert a model between llm.c's file format and the folder of a Hugging Face GPT-2.",
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE",
        help=f"model file, folder of a run, folder of a Hugging Face GPT-2, or {', '.join(huggingface.HUB_NAMES)}",
    )  # fmt: skip
    parser.add_argument("target", type=Path, metavar="TARGET", help="model file, if it ends in .bin, or new folder")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the numbers written (default: as in the source)")
    parser.add_argument(
        "--shard-megabytes", type=cli.positive_int, default=huggingface.MAX_SHARD_BYTES // 10**6, metavar="N",
        help="what one file of a folder holds at most",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    target = args.target
    to_file = target.suffix == ".bin"
    if to_file and target.exists():
        raise ValueError(f"{target}: is there already; name a new file")
    if to_file and args.dtype == "float16":
        raise ValueError(f"{target}: a model file has float32 or bfloat16 numbers, --dtype float16 is for a folder")
    if not to_file:
        huggingface.check_new_folder(target)

    def open_source():
        source = find_model(args.source)
        read = model_format(source)
        header = read.read_header(source)
        tokenizer = None if to_file else find_tokenizer([model_folder(source)], header.config.vocab_size)
        return source, header.dtype, tokenizer, *read.read_model(source)

    source, dtype, tokenizer, config, flat = opened(open_source)
    dtype = args.dtype or dtype
    if to_file:
        dtype = dtype if dtype in modelfile.DTYPE_VERSIONS else "float32"
        modelfile.write_model(target, config, flat, dtype)
        note = ""
    else:
        shard_bytes = args.shard_megabytes * 10**6
        huggingface.write_model(target, config, flat, dtype, tokenizer=tokenizer, max_shard_bytes=shard_bytes)
        note = f", without tokenizer files: transformers has no tokenizer for these {config.vocab_size} tokens"
        if isinstance(tokenizer, GPT2Tokenizer):
            note = ", with the tokenizer that AutoTokenizer loads"
    print(f"{target}: {config.num_parameters:,} parameters, {dtype}, from {source}{note}")


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
