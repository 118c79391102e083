"""The folder of a run: what the user put there is never lost, and of two processes one has it."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

import pytest

from pyllmc import cli, runs, train

DATA = {"train.bin": "tokens", "val.bin": "tokens", "tokenizer.bin": "vocabulary", "tokenizer.json": "{}"}


def make(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "files",
    [
        {"recipe.toml": "layers = 1"},
        DATA,
        DATA | {"recipe.toml": "layers = 1"},
        DATA | {".lock": ""},
        DATA | {".lock": "4711\n"},
        DATA | {".lock": "4711\n", "recipe.toml": "layers = 1"},
        {".lock": "of another program"},
    ],
)
def test_files_of_the_user_are_left_alone(files, tmp_path):
    folder = make(tmp_path / "exp", files)
    # A second attempt finds nothing that the first one left.
    for _ in range(2):
        with pytest.raises(ValueError, match="not from a training run") as error, runs.claimed(folder, resume=False):
            pass
        assert "\n" not in str(error.value)
        assert content(folder) == files and os.listdir(tmp_path) == ["exp"]


def test_a_recipe_in_the_folder_it_names_survives(tmp_path, capsys):
    files = {"recipe.toml": 'text = "short.txt"\n', "short.txt": "hello"}
    folder = make(tmp_path / "exp", files)
    assert cli.run_main(train.main, ["--recipe", str(folder / "recipe.toml"), "--out", str(folder)]) == 1
    assert content(folder) == files
    assert cli.run_main(train.main, ["--out", str(folder), "--resume"]) == 1
    assert "no run is there to resume" in capsys.readouterr().err
    assert content(folder) == files


@pytest.mark.parametrize(
    "mark", [{"recipe.toml": "# The settings of this run. And more"}, {".lock": "pyllmc.train 1\n"}]
)
def test_what_a_run_left_moves_aside(mark, tmp_path):
    folder = make(tmp_path / "exp", DATA | mark)
    with runs.claimed(folder, resume=False) as moved:
        assert moved == tmp_path / "exp.1"
        assert content(folder) == {".lock": f"pyllmc.train {os.getpid()}\n"}
    assert content(moved).items() >= DATA.items()


def test_a_failing_start_deletes_only_its_own_files(tmp_path):
    folder = make(tmp_path / "exp", {"train.bin": "old", "notes.txt": "x"})
    with pytest.raises(KeyError), runs.claimed(folder, resume=True):
        make(folder, {"val.bin": "new"})
        raise KeyError
    assert content(folder) == {"train.bin": "old", "notes.txt": "x"}


def test_a_refused_process_leaves_the_others_lock(tmp_path, monkeypatch):
    """Even one that saw no lock file, because the other process made it a moment later."""
    with runs.claimed(tmp_path / "exp", resume=False):
        monkeypatch.setattr(Path, "exists", lambda path: path.name != ".lock" and os.path.exists(path))
        with (
            pytest.raises(ValueError, match=f"process {os.getpid()} is training there"),
            runs._locked(tmp_path / "exp"),
        ):
            pass
        assert (tmp_path / "exp" / ".lock").is_file()


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path, monkeypatch):
    path, flock, seen = tmp_path / ".lock", fcntl.flock, []

    def replaced_meanwhile(descriptor, operation):
        if len(seen) < 2:
            path.unlink()
        if len(seen) == 1:
            path.touch()
        seen.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", replaced_meanwhile)
    with runs._locked(tmp_path):
        assert len(seen) == 3
        monkeypatch.undo()
        with open(path) as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_file_systems_without_locks(number, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(runs.claimed(tmp_path / "exp", resume=False)) is None
