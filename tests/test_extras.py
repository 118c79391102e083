"""Optional packages: what is said where one is missing, and that it can be installed so."""

import tomllib
from pathlib import Path

import pytest

from pyllmc.extras import PACKAGES, needed

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


@pytest.mark.parametrize("extra", PACKAGES)
def test_the_cure_installs_what_is_missing(extra):
    (requirement,) = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"][extra]
    assert requirement.partition(">")[0] == PACKAGES[extra]
    with pytest.raises(ImportError) as caught, needed(extra, "x/y"):
        raise ImportError("anything\nat all")
    assert str(caught.value) == f"x/y: needs {PACKAGES[extra]}; pip install 'pyllmc[{extra}]'"


def test_what_else_one_can_do():
    with pytest.raises(ImportError, match=r"; pip install 'pyllmc\[hub\]', or walk$"), needed("hub", "x", "walk"):
        raise ImportError
