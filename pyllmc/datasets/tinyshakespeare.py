"""Tiny Shakespeare as llm.c has it: 40,000 lines of the plays, 1.1 MB.

A document is what stands between empty lines, with the two line feeds after it where another one follows; each begins
with the end of text. The first 32,768 tokens are held out. With GPT-2's tokens the files are llm.c's, byte for byte.
"""

from __future__ import annotations

import argparse

from ..cli import ArgumentParser
from ..files import file_size, open_regular
from .common import Prepared, add_common_options, add_input_option, make_tokenizer, new_folder, split_files
from .documents import read_text
from .download import fetch, refuse_web_page

HELP = "40,000 lines of Shakespeare's plays, 1.1 MB, as llm.c has them"
ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1_115_394
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TEXT_FILE = "tiny_shakespeare.txt"
TRAIN_FILE = "tiny_shakespeare_train.bin"
VAL_FILE = "tiny_shakespeare_val.bin"
NUM_VAL = 32_768
NUM_TRAIN = 305_260  # of GPT-2's tokens
MAX_BYTES = 1 << 26  # it is read as a whole


def add_options(parser: ArgumentParser) -> None:
    add_common_options(parser, "tinyshakespeare", "gpt2")
    add_input_option(parser, "the text")


def prepare(args: argparse.Namespace) -> Prepared:
    with new_folder(args.output):
        path = args.input or fetch(ADDRESS, args.output / TEXT_FILE, size=SIZE, sha256=SHA256)
        refuse_web_page(path)
        with open_regular(path) as file:
            if file_size(file) > MAX_BYTES:
                raise ValueError(f"{path}: is too long to be this text; `python -m pyllmc.datasets text` takes any")
        sections = "".join(read_text(path)).split("\n\n")
        documents = [*(section + "\n\n" for section in sections[:-1]), sections[-1]]
        tokenizer = make_tokenizer(args.tokenizer, documents)
        tokens = tokenizer.encode_documents(documents)
        if len(tokens) <= NUM_VAL + 1:
            raise ValueError(f"{path}: {len(tokens):,} tokens are too few: the first {NUM_VAL:,} are held out")
        with split_files(args.output, tokenizer, TRAIN_FILE, VAL_FILE, inputs=[path]) as (train, val):
            val.append(tokens[:NUM_VAL])
            train.append(tokens[NUM_VAL:])
    note = ""
    if args.tokenizer == "gpt2" and train.num_tokens != NUM_TRAIN:
        note = f"this is not llm.c's text, which has {NUM_TRAIN:,} tokens to train on"
    return Prepared(args.output, tokenizer, train.num_tokens, val.num_tokens, TRAIN_FILE, VAL_FILE, note)
