"""Datasets: from text to token files that DataLoader reads. `python -m pyllmc.datasets NAME` makes one.

One module per dataset; it has `HELP`, `add_options(parser)` and `prepare(args)`, which __main__.py calls, and common.py
has what they share. prepare.py calls `prepare_text` for the `--text` of a run and for the embedded Shakespeare.
"""

from .common import Prepared
from .shakespeare import SHAKESPEARE
from .text import prepare_text

__all__ = ["SHAKESPEARE", "Prepared", "prepare_text"]
