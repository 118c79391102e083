"""`python -m pyllmc.datasets NAME`: make the token files of a dataset, or the evaluation file of HellaSwag.

Calls the modules of the datasets, cli.py, and runs.py so as not to write into the folder of a training run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .. import runs
from ..cli import ArgumentParser, run_main
from . import fineweb, hellaswag, shakespeare, text, tinyshakespeare, tinystories

DATASETS = {
    "shakespeare": shakespeare,
    "tinyshakespeare": tinyshakespeare,
    "tinystories": tinystories,
    "fineweb": fineweb,
    "hellaswag": hellaswag,
    "text": text,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m pyllmc.datasets", description="Turn text into token files.")
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in DATASETS.items():
        module.add_options(names.add_parser(name, help=module.HELP, description=f"The files of {module.HELP}."))
    args = parser.parse_args(argv)
    if runs.has_run(args.output):
        raise ValueError(f"{args.output}: is the folder of a training run; choose another --output")
    print(DATASETS[args.name].prepare(args))


if __name__ == "__main__":
    sys.exit(run_main(main))
