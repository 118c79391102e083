"""Settings: recipes, the command line over them, and what a resumed run may change."""

import re
import tomllib
from dataclasses import MISSING
from pathlib import Path

import pytest

from pyllmc import cli, settings
from pyllmc.config import GPT2Config


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def with_defaults(**values) -> settings.Settings:
    return settings.Settings(**settings.default_settings() | values)


def test_each_default_stands_in_one_place():
    """In the default recipe or, for what that leaves out, in the table."""
    recipe = settings.load_recipe(settings.DEFAULT_RECIPE)
    table = {name for name, setting in settings.FIELDS.items() if setting.default is not MISSING}
    assert table | recipe.keys() == settings.FIELDS.keys()
    assert not table & recipe.keys()
    assert settings.default_settings().items() >= recipe.items()


@pytest.mark.parametrize("name", settings.recipe_names())
def test_packaged_recipes_are_whole(name):
    values = settings.Settings(**settings.default_settings() | settings.load_recipe(name))
    GPT2Config(values.layers, values.heads, values.channels, 65, values.context)
    assert values.warmup < values.max_steps


def test_every_setting_is_an_option_with_help():
    parser = cli.ArgumentParser()
    settings.add_options(parser, settings.default_settings())
    help = parser.format_help()
    for name in settings.FIELDS:
        assert settings.flag(name) in help
    given = vars(parser.parse_args(["--layers", "3", "--final-lr-fraction", "0.25"]))
    assert {name: value for name, value in given.items() if value is not None} == {
        "layers": 3,
        "final_lr_fraction": 0.25,
    }


def test_the_help_shows_the_default_recipes_values():
    parser = cli.ArgumentParser()
    settings.add_options(parser, settings.default_settings() | {"batch_size": 77})
    assert re.search(r"--batch-size N +sequences in one step \(default: 77\)", parser.format_help())


def test_saved_recipe_is_loaded_as_it_was(tmp_path):
    text = tmp_path / 'a "quoted" \x7f\t\\ näme.txt'
    before = with_defaults(text=str(text), learning_rate=1e-5, layers=7, schedule="wsd", out="elsewhere")
    settings.save_recipe(before, tmp_path / "recipe.toml")
    values = settings.load_recipe(str(tmp_path / "recipe.toml"))
    assert "out" not in values
    assert settings.Settings(**values | {"out": "elsewhere"}) == before


def test_relative_text_counts_from_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    name = write(Path("sub/mine.toml"), 'text = "notes.txt"\n')
    assert settings.load_recipe(name)["text"] == "sub/notes.txt"
    settings.save_recipe(with_defaults(text="notes.txt"), "recipe.toml")
    assert tomllib.loads(Path("recipe.toml").read_text())["text"] == str(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "text, message",
    [
        ("layer = 3", "no setting is called 'layer'; did you mean 'layers'"),
        ("qqqq = 3", "known are text, layers"),
        ("layers = 0", "layers: expected a whole number of at least 1, got 0"),
        ("layers = 1.5", "layers: expected a whole number"),
        ('layers = "3"', "layers must be a number, got '3'"),
        ("layers = true", "layers must be a number"),
        ("text = 3", "text must be a string"),
        ('schedule = "sine"', "schedule must be one of cosine, linear, constant, wsd"),
        ("learning_rate = nan", "learning_rate: expected a number"),
        ("beta1 = 1.0", "beta1: expected a number in [0, 1)"),
        ("layers = ", "not a recipe"),
        ("[model]\nlayers = 3", "no setting is called 'model'"),
    ],
)
def test_bad_recipe(text, message, tmp_path):
    name = write(tmp_path / "mine.toml", text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        settings.load_recipe(name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_recipe_that_is_nested_too_deeply(tmp_path):
    name = write(tmp_path / "mine.toml", "layers = " + "[" * 100_000)
    with pytest.raises(ValueError, match="mine.toml: not a recipe"):
        settings.load_recipe(name)


def test_recipe_that_is_no_text(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        settings.load_recipe(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize(
    "recipe, text, name",
    [
        ("shakespeare", None, "shakespeare"),
        ("shakespeare", "some/notes.txt", "notes"),
        ("configs/tiny.toml", None, "tiny"),
        ("out/old/recipe.toml", None, "old"),
    ],
)
def test_run_name(recipe, text, name):
    assert settings.run_name(recipe, text) == name


def test_only_settings_without_influence_on_the_result_change_on_resume():
    recorded = settings.default_settings() | {"layers": 4, "text": "a.txt", "beta1": 0.75}
    free = {"threads": 3, "val_every": 7, "sample_every": 1, "log_every": 2, "out": "x", "text": "b.txt", "layers": 4}
    settings.check_resumable(recorded, free | {"beta1": 0.75}, Path("out/a"))
    with pytest.raises(ValueError, match="out/a: this run has layers = 4, and --layers 5 was asked for"):
        settings.check_resumable(recorded, {"layers": 5}, Path("out/a"))
    with pytest.raises(ValueError, match="--beta1"):
        settings.check_resumable(recorded, {"beta1": 0.5}, Path("out/a"))
