"""The folder of a run: what the user put there is never lost, and of two processes one has it."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyllmc import GPT2Config, checkpoint, cli, convert, evaluate, generate, runs, train
from pyllmc.model import GPT2
from pyllmc.optimizer import AdamW
from pyllmc.settings import Settings

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
    "mark",
    [{"recipe.toml": "# The settings of this run. And more"}, {".lock": '{"program": "pyllmc.train", "pid": 1}\n'}],
)
def test_what_a_run_left_moves_aside(mark, tmp_path):
    folder = make(tmp_path / "exp", DATA | mark)
    with runs.claimed(folder, resume=False) as claim:
        assert claim.moved == tmp_path / "exp.1"
        assert os.listdir(folder) == [".lock"]
        assert content(tmp_path / "exp.1").items() >= DATA.items()


def test_a_refused_start_leaves_the_earlier_run_and_says_nothing_of_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make(Path("exp"), DATA | {"recipe.toml": runs.RUN_MARK, "DONE_00000004": ""})
    make(Path(), {"short.txt": "too short", "file": ""})
    assert cli.run_main(train.main, ["--text", "short.txt", "--out", "exp"]) == 1
    assert "exp.1" not in "".join(capsys.readouterr())
    assert content(folder).items() >= DATA.items()
    assert cli.run_main(train.main, ["--out", "file/exp"]) == 1
    assert f"{tmp_path / 'file'} is a file; choose another folder with --out" in capsys.readouterr().err


@pytest.mark.parametrize("files", [{}, {"train.bin": "old", "DONE_00000004": ""}])
def test_a_failing_start_deletes_only_its_own_files(files, tmp_path):
    """Its lock file too: with that the user's next files there would pass for a run's."""
    folder = make(tmp_path / "exp", files | {"notes.txt": "x"})
    with pytest.raises(KeyError), runs.claimed(folder, resume=bool(files)):
        make(folder, {"val.bin": "new", "tokenizer.bin": "new"})
        raise KeyError
    assert content(folder) == files | {"notes.txt": "x"}


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("recipe", ["# my notes\n", None])
def test_a_run_that_has_begun_loses_nothing_whatever_becomes_of_its_recipe(resume, recipe, tmp_path):
    folder = make(tmp_path / "exp", {"recipe.toml": runs.RUN_MARK} if resume else {})
    with pytest.raises(KeyError), runs.claimed(folder, resume) as claim:
        if not resume:
            claim.begin(Settings())
        make(folder, DATA | {"DONE_00000004": "", "main.log": ""})
        make(folder / "tensorboard", {"events": ""})
        (folder / "recipe.toml").unlink()
        if recipe:
            make(folder, {"recipe.toml": recipe})
        raise KeyError
    kept = {*DATA, "DONE_00000004", "main.log", "tensorboard", *(["recipe.toml"] if recipe else [])}
    assert kept.union([".lock"] if not resume else []) <= set(os.listdir(folder))


def test_a_start_that_fails_with_a_folder_in_its_way_says_why(tmp_path):
    with pytest.raises(KeyError), runs.claimed(tmp_path / "exp", resume=False):
        make(tmp_path / "exp" / "tensorboard", {"events": ""})
        raise KeyError
    assert os.listdir(tmp_path / "exp") == ["tensorboard"]


def test_a_run_to_resume_that_another_process_has_moved_is_not_begun_anew(tmp_path):
    with pytest.raises(ValueError, match="exp: the run to resume is gone"), runs.claimed(tmp_path / "exp", resume=True):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("becomes", ["moved", "replaced", "deleted"])
def test_a_folder_that_is_not_the_runs_any_more_is_noticed(becomes, tmp_path):
    folder = tmp_path / "exp"
    with runs.claimed(folder, resume=False) as claim:
        claim.begin(Settings())
        claim.check()
        if becomes == "deleted":
            shutil.rmtree(folder)
        else:
            folder.rename(tmp_path / "other")
        if becomes == "replaced":
            make(folder, {".lock": "of another run"})
        with pytest.raises(ValueError, match="exp: was moved, deleted or replaced while the run went on") as error:
            claim.check()
        assert "\n" not in str(error.value)
    assert not folder.exists() or content(folder) == {".lock": "of another run"}


def test_a_lock_file_that_is_none_is_named(tmp_path):
    folder = make(tmp_path / "exp", {"recipe.toml": runs.RUN_MARK})
    os.mkfifo(folder / ".lock")
    with pytest.raises(ValueError, match=r"\.lock: not a regular file, so it cannot be locked"):
        runs.claimed(folder, resume=True).__enter__()
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()
    with pytest.raises(OSError, match="cannot write this file: Is a directory") as error:
        runs.claimed(folder, resume=True).__enter__()
    assert error.value.filename == str(folder / ".lock")


def test_an_earlier_run_that_cannot_be_moved_is_told(tmp_path, monkeypatch):
    folder = make(tmp_path / "exp", {"recipe.toml": runs.RUN_MARK})

    def refuse(self, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match=r"cannot move this earlier run to exp\.1, so choose another --out: Permission"):
        runs.claimed(folder, resume=False).__enter__()
    assert os.listdir(tmp_path) == ["exp"]


def test_a_refused_process_leaves_the_others_lock(tmp_path, monkeypatch):
    """Even one that saw no lock file, because the other process made it a moment later."""
    with runs.claimed(tmp_path / "exp", resume=False):
        monkeypatch.setattr(Path, "exists", lambda path: path.name != ".lock" and os.path.exists(path))
        with (
            pytest.raises(ValueError, match=f"pid {os.getpid()} on host "),
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
def test_file_systems_without_locks(number, tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    make(tmp_path / "exp", {"recipe.toml": "# The settings of this run. And more"})
    with contextlib.ExitStack() as stack:
        assert stack.enter_context(runs.claimed(tmp_path / "exp", resume=False)).moved == tmp_path / "exp.1"
    told = capsys.readouterr().err
    assert told == f"{tmp_path / 'exp'}: no locks on this file system: let no other process train there\n"


def test_another_error_of_the_lock_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="cannot lock this file: broken"), runs.claimed(tmp_path / "exp", resume=False):
        pass


def refusal(folder: Path, resume: bool) -> str:
    """What a second one is told that wants the folder too; a lock is not shared within a process either."""
    with pytest.raises(ValueError) as error, runs.claimed(folder, resume):
        pass
    return str(error.value)


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_process_is_told_who_trains_there_since_when(resume, tmp_path):
    folder = make(tmp_path / "exp", {})
    with runs.claimed(folder, resume=False):
        holder = rf"pid {os.getpid()} on host {re.escape(platform.node())} has been training there since"
        assert re.search(rf"^{re.escape(str(folder))}: {holder} 20\d\d-\d\d-\d\d \d\d:\d\d; ", refusal(folder, resume))
        lock = folder / ".lock"
        told = json.loads(lock.read_text())
        assert set(told) == {"program", "pid", "host", "since"}
        # What the file says may be anything.
        for text in ("", "{", "[]", "{}", json.dumps(told | {"since": "then"}), json.dumps(told | {"since": 7})):
            lock.write_text(text)
            assert "another process is training there" in refusal(folder, resume)


def test_the_lock_goes_with_the_process_even_if_it_left_a_child(tmp_path):
    """A child of the run shares what it had open; a lock that outlived the run would lock its resume out."""
    folder = make(tmp_path / "exp", {})
    (begun, begins), (ended, ends) = os.pipe(), os.pipe()
    with runs.claimed(folder, resume=False):
        make(folder, {"recipe.toml": "# The settings of this run. And more"})
        if (child := os.fork()) == 0:
            os.close(ends)
            os.write(begins, b"x")
            os.read(ended, 1)  # returns when the parent closes its end
            os._exit(0)
        os.read(begun, 1)
        assert "has been training there" in refusal(folder, resume=True)
    try:
        with runs.claimed(folder, resume=True):
            pass
    finally:
        for descriptor in (begun, begins, ended, ends):
            os.close(descriptor)
        os.waitpid(child, 0)


def test_of_several_that_start_at_the_same_moment_one_goes_on(tmp_path, text):
    """On a folder that is not there, and on one with an earlier run, which is moved away once."""
    (tmp_path / "text.txt").write_text(text)
    small = "--layers 1 --heads 2 --channels 16 --context 16 --checkpoint-every 0 --sample-every 0 --val-every 0"
    command = [sys.executable, "-m", "pyllmc.train", "--text", "text.txt", "--out", "run", *small.split()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for earlier in ([], ["run.1"]):
        started = [
            subprocess.Popen(
                [*command, "--max-steps", "10000000", "--threads", "1"], cwd=tmp_path, env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for _ in range(3)
        ]  # fmt: skip
        told = []
        with contextlib.ExitStack() as stack:
            for process in started:
                stack.enter_context(process)
            while len(told) < 2:
                pid, status = os.wait()
                (process,) = (process for process in started if process.pid == pid)
                process.returncode = os.waitstatus_to_exitcode(status)
                told.append(process.stderr.read())
                assert process.returncode == 1, told
            (running,) = (process for process in started if process.returncode is None)
            # Before training begins a signal puts everything back as it was.
            while "| loss" not in running.stdout.readline():
                assert running.poll() is None
            running.send_signal(signal.SIGTERM)
            running.stdout.read()
            assert running.wait() == 143
        for line in told:
            assert f"pid {running.pid} on host" in line or "another process" in line or "cannot write" in line
        assert sorted(os.listdir(tmp_path)) == ["run", *earlier, "text.txt"]


def test_what_a_killed_run_had_begun_to_write_goes_away_when_its_folder_is_claimed(tmp_path):
    run = {"recipe.toml": "# The settings of this run. And more"}
    half = {".model_00000004.bin.0123abcd.tmp": "", ".recipe.toml.0123abcd.tmp": "", ".train.bin.0123abcd.tmp": ""}
    others = {".thesis.tex.0123abcd.tmp": "precious", ".model_00000004.bin.tmp": "", ".notes": "precious"}
    folder = make(tmp_path / "exp", run | half | others)
    make(folder / ".text-0a_b1c2d", {"train.bin": "half"})
    with runs.claimed(folder, resume=True):
        assert set(content(folder)) == {*run, *others, ".lock"}
    make(folder, half)
    with runs.claimed(folder, resume=False) as claim:
        assert set(content(claim.moved)) == {*run, *others, ".lock"} and os.listdir(folder) == [".lock"]


def test_a_start_that_was_killed_at_its_lock_can_be_made_again(tmp_path):
    """Its lock file is empty, and what comes beside it is marked as a run's again."""
    folder = make(tmp_path / "exp", {".lock": ""})
    with runs.claimed(folder, resume=False):
        assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()


def test_a_full_disk_names_the_folder(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="cannot write in this folder: No space") as error:
        runs.claimed(tmp_path / "exp", resume=False).__enter__()
    assert error.value.filename == str(tmp_path / "exp") and os.listdir(tmp_path) == []


@pytest.mark.parametrize("program", [generate, evaluate, convert])
@pytest.mark.parametrize("newer", [True, False])
def test_a_model_that_a_run_removes_before_it_is_opened(program, newer, tmp_path, monkeypatch, capsys):
    """The programs that read a model look again, as often as another one has taken its place."""
    monkeypatch.chdir(tmp_path)
    model = GPT2(GPT2Config(1, 1, 8, 5, 8))
    checkpoint.save_checkpoint(make(tmp_path / "run", {}), 3, model, AdamW(model))
    verified = checkpoint._verified

    def removed_when_found(folder, step, *others):
        found = verified(folder, step, *others)
        if step < 6:
            found.remove()
            if newer:
                checkpoint.save_checkpoint(folder, step + 1, model, AdamW(model))
        return found

    monkeypatch.setattr(checkpoint, "_verified", removed_when_found)
    arguments = {generate: ["--checkpoint", "run", "--max-new-tokens", "1"], convert: ["run", "model.bin"]}
    code = cli.run_main(program.main, arguments.get(program, ["run", "--hellaswag", "none.bin"]))
    out, err = capsys.readouterr()
    if newer and program is evaluate:
        assert code == 1 and err.startswith("error: none.bin: "), "the model is there, the questions are not"
    elif newer:
        assert code == 0 and "model_00000006.bin" in out + err
    else:
        assert code == 1
        assert err == "error: run: no checkpoint in this folder; name the folder of a run, or a model file\n"
