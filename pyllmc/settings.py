"""Every setting of a training run: one table that gives the command line, the recipe files and their checks.

A run's settings are those of the default recipe, overridden by a recipe (a TOML file, packaged or the user's),
overridden by the command line. The table gives values only to what the default recipe leaves out. The run's folder
keeps all of them as `recipe.toml`, which is itself a recipe and what `--resume` reads.
Called by train.py; calls cli.py for the checks.
"""

import argparse
import difflib
import json
import tomllib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from importlib import resources
from pathlib import Path

from . import cli
from .files import atomic_write
from .schedules import SCHEDULES

DEFAULT_RECIPE = "shakespeare"
RECIPE_FILE = "recipe.toml"
# How the recipe in the folder of a run begins; the user's own recipes do not, which is how runs.py tells them apart.
RUN_MARK = "# The settings of this run."


# What an int32 of a training state holds; no setting needs more.
LARGEST = 2**31 - 1


def _count(text: str) -> int:
    """A whole number of at least 1."""
    return _limited(cli.positive_int(text))


def _count_or_zero(text: str) -> int:
    """A whole number of at least 0."""
    return _limited(cli.non_negative_int(text))


def _below_one(text: str) -> float:
    """A number in [0, 1): with 1 AdamW would divide by zero."""
    number = cli.fraction(text)
    if number == 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1), got {text}")
    return number


def _limited(number: int) -> int:
    if number > LARGEST:
        raise argparse.ArgumentTypeError(f"expected at most {LARGEST}, got {number}")
    return number


def option(check: Callable, help: str, *, default=MISSING, choices=None, metavar: str = "N", result: bool = True):
    """A field of Settings. `check` turns the option's text into its value or raises argparse.ArgumentTypeError;
    `result` says that the trained weights depend on it, so that a resumed run cannot change it. Without a `default` the
    value is the default recipe's."""
    metadata = {"check": check, "help": help, "choices": choices, "metavar": metavar, "result": result}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one training run, all checked one by one; what they mean together is checked by train.py."""

    text: str = option(
        str, "text file (UTF-8) to train on; without it, the built-in Shakespeare", default="", metavar="FILE"
    )
    layers: int = option(_count, "transformer blocks")
    heads: int = option(_count, "attention heads; must divide the channels")
    channels: int = option(_count, "width of the model")
    context: int = option(_count, "tokens that the model sees at once; a token is a character")
    batch_size: int = option(_count, "sequences in one step")
    max_steps: int = option(_count, "steps to train")
    learning_rate: float = option(cli.positive_float, "peak learning rate", metavar="X")
    warmup: int = option(_count_or_zero, "steps in which the learning rate rises to its peak")
    schedule: str = option(str, "how the learning rate falls after the warm-up", choices=SCHEDULES)
    final_lr_fraction: float = option(cli.fraction, "the last learning rate, as a fraction of the peak", metavar="X")
    weight_decay: float = option(cli.non_negative_float, "AdamW's decay of the matrices", metavar="X")
    beta1: float = option(_below_one, "AdamW's memory of the gradient", default=0.9, metavar="X")
    beta2: float = option(_below_one, "AdamW's memory of its square", metavar="X")
    grad_clip: float = option(
        cli.non_negative_float, "scale gradients down to this norm; 0 leaves them alone", metavar="X"
    )
    seed: int = option(cli.seed, "seed of the first weights and of the order of the data")
    threads: int = option(_count_or_zero, "CPU threads; 0 takes all there are", default=0, result=False)
    out: str = option(
        str,
        "the run's folder; by default out/ and the recipe's or the text's name",
        default="",
        metavar="FOLDER",
        result=False,
    )
    val_every: int = option(_count_or_zero, "steps between validations; 0 means only at the end", result=False)
    val_batches: int = option(
        _count_or_zero, "batches in one validation; 0 means all of the held-out text", result=False
    )
    sample_every: int = option(_count_or_zero, "steps between samples of text; 0 means none", result=False)
    sample_length: int = option(_count, "tokens in a sample", default=300, result=False)
    checkpoint_every: int = option(_count_or_zero, "steps between checkpoints; 0 means only at the end", result=False)
    keep_checkpoints: int = option(_count_or_zero, "newest checkpoints to keep; 0 keeps all", default=1, result=False)
    log_every: int = option(
        _count_or_zero,
        "steps between lines when the output is not a terminal; 0 gives about forty lines in all",
        default=0,
        result=False,
    )


FIELDS = {setting.name: setting for setting in fields(Settings)}


def flag(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")


def add_options(parser: cli.ArgumentParser, defaults: dict) -> None:
    """Gives `parser` one option for each setting; those not on the command line come out as None. The help shows
    `defaults`, which has all settings."""
    for name, setting in FIELDS.items():
        metadata = setting.metadata
        choices, default = metadata["choices"], defaults[name]
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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not a recipe: {error}") from None
    values = {key: _checked(key, value, name) for key, value in values.items()}
    if values.get("text"):
        values["text"] = str(Path(name).parent / values["text"])
    return values


def default_settings() -> dict:
    """All settings of a run for which nothing is asked: the default recipe's, and the table's where it has none."""
    values = {name: setting.default for name, setting in FIELDS.items() if setting.default is not MISSING}
    return values | load_recipe(DEFAULT_RECIPE)


def run_name(recipe: str, text: str | None) -> str:
    """What a run is called, and its folder under out/: after the user's text if there is one, else its recipe."""
    path = Path(text or recipe)
    # The recipe that a run left in its folder runs it again.
    return path.absolute().parent.name if path.name == RECIPE_FILE else path.stem


def save_recipe(settings: Settings, path: str | Path) -> None:
    """Writes all settings but the folder as a recipe. The text's path becomes absolute, to mean the same anywhere."""
    lines = [f"{RUN_MARK} To run them again:  python -m pyllmc.train --recipe FILE --out FOLDER"]
    for name in (name for name in FIELDS if name != "out"):
        value = getattr(settings, name)
        if name == "text" and value:
            value = str(Path(value).absolute())
        # JSON's numbers and strings are TOML's too, but for one character that TOML wants escaped.
        literal = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        lines.append(f"{name} = {literal}")
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode("utf-8", "replace"))


def check_resumable(recorded: dict, asked: dict, folder: Path) -> None:
    """ValueError if `asked` changes a setting on which the result of the run in `folder` depends. `recorded` has all
    settings."""
    for name, value in asked.items():
        if FIELDS[name].metadata["result"] and name != "text" and value != recorded[name]:
            raise ValueError(
                f"{folder}: this run has {name} = {recorded[name]}, and {flag(name)} {value} was asked for; resume it "
                f"without {flag(name)}, or start another run with another --out"
            )
