"""Every setting of a training run: one table that gives the command line, the recipe files and their checks.

A run's settings are the defaults below, overridden by a recipe (a TOML file, packaged or the user's), overridden by
the command line. The run's folder keeps them as `recipe.toml`, which is itself a recipe and what `--resume` reads.
Called by train.py; calls cli.py for the checks.
"""

import argparse
import difflib
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path

from . import cli
from .files import atomic_write
from .schedules import SCHEDULES

DEFAULT_RECIPE = "shakespeare"
RECIPE_FILE = "recipe.toml"


# What an int32 of a training state holds; no setting needs more.
LARGEST = 2**31 - 1


def _count(text: str) -> int:
    """A whole number of at least 1."""
    return _limited(cli.positive_int(text))


def _count_or_zero(text: str) -> int:
    """A whole number of at least 0."""
    return _limited(cli.non_negative_int(text))


def _limited(number: int) -> int:
    if number > LARGEST:
        raise argparse.ArgumentTypeError(f"expected at most {LARGEST}, got {number}")
    return number


def option(default, check: Callable, help: str, *, choices=None, metavar: str = "N", result: bool = True):
    """A field of Settings. `check` turns the option's text into its value or raises argparse.ArgumentTypeError;
    `result` says that the trained weights depend on it, so that a resumed run cannot change it."""
    metadata = {"check": check, "help": help, "choices": choices, "metavar": metavar, "result": result}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """The settings of one training run, all checked one by one; what they mean together is checked by train.py."""

    text: str = option("", str, "text file (UTF-8) to train on; without it, the built-in Shakespeare", metavar="FILE")
    layers: int = option(4, _count, "transformer blocks")
    heads: int = option(4, _count, "attention heads; must divide the channels")
    channels: int = option(128, _count, "width of the model")
    context: int = option(64, _count, "tokens that the model sees at once; a token is a character")
    batch_size: int = option(12, _count, "sequences in one step")
    max_steps: int = option(2000, _count, "steps to train")
    learning_rate: float = option(3e-4, cli.positive_float, "peak learning rate", metavar="X")
    warmup: int = option(0, _count_or_zero, "steps in which the learning rate rises to its peak")
    schedule: str = option("cosine", str, "how the learning rate falls after the warm-up", choices=SCHEDULES)
    final_lr_fraction: float = option(
        0.1, cli.fraction, "the last learning rate, as a fraction of the peak", metavar="X"
    )
    weight_decay: float = option(0.0, cli.non_negative_float, "AdamW's decay of the matrices", metavar="X")
    beta1: float = option(0.9, cli.fraction, "AdamW's memory of the gradient", metavar="X")
    beta2: float = option(0.95, cli.fraction, "AdamW's memory of its square", metavar="X")
    grad_clip: float = option(
        1.0, cli.non_negative_float, "scale gradients down to this norm; 0 leaves them alone", metavar="X"
    )
    seed: int = option(42, cli.seed, "seed of the first weights and of the order of the data")
    threads: int = option(0, _count_or_zero, "CPU threads; 0 takes all there are", result=False)
    out: str = option(
        "", str, "the run's folder; by default out/ and the recipe's or the text's name", metavar="FOLDER", result=False
    )
    val_every: int = option(250, _count_or_zero, "steps between validations; 0 means only at the end", result=False)
    val_batches: int = option(
        20, _count_or_zero, "batches in one validation; 0 means all of the held-out text", result=False
    )
    sample_every: int = option(1000, _count_or_zero, "steps between samples of text; 0 means none", result=False)
    sample_length: int = option(300, _count, "tokens in a sample", result=False)
    checkpoint_every: int = option(
        1000, _count_or_zero, "steps between checkpoints; 0 means only at the end", result=False
    )
    keep_checkpoints: int = option(1, _count_or_zero, "newest checkpoints to keep; 0 keeps all", result=False)
    log_every: int = option(
        0,
        _count_or_zero,
        "steps between lines when the output is not a terminal; 0 gives about forty lines in all",
        result=False,
    )


FIELDS = {setting.name: setting for setting in fields(Settings)}


def flag(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")


def add_options(parser: cli.ArgumentParser, defaults: dict) -> None:
    """Gives `parser` one option for each setting; those not on the command line come out as None. The help shows
    `defaults`, and for settings that are not in them those of the table."""
    for name, setting in FIELDS.items():
        metadata = setting.metadata
        choices, default = metadata["choices"], defaults.get(name, setting.default)
        parser.add_argument(
            flag(name), type=metadata["check"], choices=choices, metavar=None if choices else metadata["metavar"],
            help=metadata["help"] + (f" (default: {default})" if default != "" else ""),
        )  # fmt: skip


def _checked(name: str, value, source: str):
    """A recipe's value after the check that the command line's text goes through; ValueError naming `source`."""
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(FIELDS)}"
        raise ValueError(f"{source}: no setting is called {name!r}{hint}")
    setting = FIELDS[name]
    choices = setting.metadata["choices"]
    wanted = (str,) if setting.type is str else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise ValueError(f"{source}: {name} must be a {'string' if setting.type is str else 'number'}, got {value!r}")
    if choices and value not in choices:
        raise ValueError(f"{source}: {name} must be one of {', '.join(choices)}, got {value!r}")
    try:
        return setting.metadata["check"](str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{source}: {name}: {error}") from None


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files(__package__) / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str) -> dict:
    """The settings in a recipe: the name of a packaged one, or the path of a `.toml` file. ValueError says what is
    wrong with it. A relative `text` counts from the recipe file's folder."""
    if name.endswith(".toml"):
        try:
            content = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{name}: not a recipe: it is not UTF-8 text") from None
    elif name in recipe_names():
        content = (resources.files(__package__) / "recipes" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        known = ", ".join(recipe_names())
        raise ValueError(f"no recipe is called {name!r}; there are {known}, and a file's name must end in .toml")
    try:
        values = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{name}: not a recipe: {error}") from None
    values = {key: _checked(key, value, name) for key, value in values.items()}
    if values.get("text"):
        values["text"] = str(Path(name).parent / values["text"])
    return values


def run_name(recipe: str, text: str | None) -> str:
    """What a run is called, and its folder under out/: after the user's text if there is one, else its recipe."""
    path = Path(text or recipe)
    # The recipe that a run left in its folder runs it again.
    return path.absolute().parent.name if path.name == RECIPE_FILE else path.stem


def save_recipe(settings: Settings, path: str | Path) -> None:
    """Writes all settings but the folder as a recipe. The text's path becomes absolute, to mean the same anywhere."""
    lines = ["# The settings of this run. To run them again:  python -m pyllmc.train --recipe FILE --out FOLDER"]
    for name in (name for name in FIELDS if name != "out"):
        value = getattr(settings, name)
        if name == "text" and value:
            value = str(Path(value).absolute())
        # JSON's numbers and strings are TOML's too.
        lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode("utf-8", "replace"))


def check_resumable(recorded: dict, asked: dict, folder: Path) -> None:
    """ValueError if `asked` changes a setting on which the result of the run in `folder` depends."""
    for name, value in asked.items():
        if FIELDS[name].metadata["result"] and name != "text" and value != recorded.get(name, FIELDS[name].default):
            before = recorded.get(name, FIELDS[name].default)
            raise ValueError(
                f"{folder}: this run has {name} = {before}, and {flag(name)} {value} was asked for; resume it without "
                f"{flag(name)}, or start another run with another --out"
            )
