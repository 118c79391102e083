"""The embedded text: nine of Shakespeare's plays, which need no download. What training starts from by default.

The file, its origin and its licence are described in pyllmc/assets/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..cli import ArgumentParser
from .common import Prepared, add_common_options
from .text import prepare_text

HELP = "nine of Shakespeare's plays, 1.2 MB, which come with pyllmc"
SHAKESPEARE = Path(__file__).parent.parent / "assets" / "shakespeare.txt"


def add_options(parser: ArgumentParser) -> None:
    add_common_options(parser, "shakespeare", "char")


def prepare(args: argparse.Namespace) -> Prepared:
    return prepare_text(SHAKESPEARE, args.output, args.tokenizer, workers=args.workers)
