"""The folder of a training run: what is in it, who may write to it, and that no run destroys another.

    recipe.toml                     all settings; there as soon as training begins (settings.py)
    train.bin val.bin               the text as tokens (dataloader.py)
    tokenizer.bin tokenizer.json    the vocabulary (tokenizer.py)
    main.log times.csv tensorboard  what was measured, and when (record.py)
    loss.png                        a picture of it (plot.py)
    model_* state_* DONE_*          checkpoints (checkpoint.py)

    .lock                           who trains here, or did: JSON; locked as long as the process lives

Programs that only read a run (generate, evaluate, plot, verify) take no lock: every file but those of record.py appears
complete. Called by train.py and llmc.py: `claimed` is the block in which a run owns its folder. Calls settings.py,
files.py, and takes the names of the files from the modules that write them.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from .datasets.common import TRAIN_FILE, VAL_FILE
from .events import EVENTS_FOLDER
from .files import final_name, parse_json
from .logs import LOG_FILE, TIMES_FILE
from .settings import RECIPE_FILE, RUN_MARK
from .tokenizer import TOKENIZER_FILE

_NAMES = (
    RECIPE_FILE, TRAIN_FILE, VAL_FILE, TOKENIZER_FILE, "tokenizer.json", LOG_FILE, TIMES_FILE, EVENTS_FOLDER, "loss.png"
)  # fmt: skip
_OWN_FILE = re.compile("|".join(map(re.escape, _NAMES)) + r"|model_\d{8,}\.bin|state_\d{8,}_\d{5}\.bin|DONE_\d{8,}")
# How the name of a folder begins in which prepare.py makes the tokens of a text once more, to compare them.
TEXT_AGAIN = ".text-"
_LOCK_FILE = ".lock"
# What the lock file of a run begins with: the first member of its JSON.
_LOCK_MARK = '{"program": "pyllmc.train"'


def run_files(folder: Path) -> list[str]:
    """The names in `folder` that a run may have written, sorted."""
    return sorted(name for name in os.listdir(folder) if _OWN_FILE.fullmatch(name))


def has_run(folder: Path) -> bool:
    """Whether a training run began in `folder`: a recipe.toml that the user wrote does not make it one."""
    return _begins_with(folder / RECIPE_FILE, RUN_MARK)


def _begins_with(path: Path, mark: str) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(mark)) == mark.encode()


@contextlib.contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[Path | None]:
    """The block in which this process alone writes to `folder`, which is made if it is not there.

    For a new run what an earlier one left moves out of the way, as a whole, to FOLDER.1 (.2, ...), and the block gets
    that path. ValueError or OSError, and nothing changed, if that cannot be done safely, if another process trains
    there, if the files there are not a run's, or if nothing can be written there. What a run that was killed had
    begun to write is deleted.

    If the block fails before `recipe.toml` is there, what it wrote, and nothing else, is deleted again.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another folder with --out")
    # Links are followed first, so that a rename moves the folder itself.
    folder = Path(os.path.realpath(folder))
    moved = None
    if folder.is_dir() and not resume:
        began_here = has_run(folder) or _begins_with(folder / _LOCK_FILE, _LOCK_MARK)
        # Whoever holds this lock cannot have its folder moved away; the lock file moves along.
        with _locked(folder):
            if began_here:
                _remove_leftovers(folder)
            moved = _make_room(folder, began_here)
    new_folders = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder) as is_locked:
            if not is_locked:
                print(f"{folder}: no locks on this file system: let no other process train there", file=sys.stderr)
            if resume:
                _remove_leftovers(folder)
            before = run_files(folder)
            if before and not resume:
                raise ValueError(f"{folder}: another process wrote {before[0]} there just now; choose another --out")
            try:
                yield moved
            except BaseException:
                if not has_run(folder):
                    for name in set(run_files(folder)).difference(before):
                        (folder / name).unlink(missing_ok=True)
                raise
    finally:
        # Only those that are still empty can go.
        with contextlib.suppress(OSError):
            for parent in new_folders:
                parent.rmdir()
        if moved is not None and not folder.exists():
            moved.rename(folder)


def _remove_leftovers(folder: Path) -> None:
    """Deletes what a run that was killed had begun to write in its folder, which is locked."""
    for name in os.listdir(folder):
        if _OWN_FILE.fullmatch(final_name(name) or ""):
            (folder / name).unlink()
        elif name.startswith(TEXT_AGAIN):
            shutil.rmtree(folder / name, ignore_errors=True)


def _make_room(folder: Path, began_here: bool) -> Path | None:
    """Clears a locked folder for a new run; returns where it put the run that was there, if there was one.
    `began_here`: a run was in this folder, be it one that was killed while it got ready."""
    own = run_files(folder)
    if not own:
        return None
    if not began_here:
        raise ValueError(f"{folder}: {own[0]} is there already, and not from a training run; choose another --out")
    others = sorted(name for name in os.listdir(folder) if name not in own and not name.startswith("."))
    if others or Path.cwd().is_relative_to(folder):
        what = f"other files ({', '.join(others[:3])})" if others else "the current folder's name"
        raise ValueError(f"{folder}: holds an earlier run and {what}; choose another --out, or --resume that run")
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside


# ---- the lock --------------------------------------------------------------------------------------------------------

# The lock files that this process has open. A process forked from it shares their locks: it closes them, so as not to
# hold a folder when this process is gone.
_descriptors: set[int] = set()


def _close(descriptor: int) -> None:
    if descriptor in _descriptors:
        _descriptors.remove(descriptor)
        os.close(descriptor)


def _close_all() -> None:
    for descriptor in list(_descriptors):
        _close(descriptor)


os.register_at_fork(after_in_child=_close_all)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the folder's lock file; the lock goes with the process, however that ends. The block gets False if the file
    system has no locks. ValueError naming its holder if another process has it."""
    path = folder / _LOCK_FILE
    while True:
        is_new = not path.exists()
        with _naming(folder):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _descriptors.add(descriptor)
        try:
            is_locked = _lock(descriptor, folder)
            # If the process that held the lock has deleted or moved its file since, this one's lock is of no use.
            is_current = _is_open_as(descriptor, path)
        except BaseException:
            _close(descriptor)
            raise
        if is_current:
            break
        _close(descriptor)
    try:
        content = os.pread(descriptor, len(_LOCK_MARK), 0)
        if content and content != _LOCK_MARK.encode() and not has_run(folder):
            raise ValueError(f"{path}: is not from a training run; choose another --out")
        # An empty lock file that was there is not marked as a run's: what lies beside it may be another program's.
        if is_new or content or has_run(folder) or not run_files(folder):
            with _naming(folder):
                os.ftruncate(descriptor, os.pwrite(descriptor, _holder(), 0))
        yield is_locked
    except BaseException:
        # A refused or failed start leaves nothing in a folder that is not a run's.
        if is_new and not has_run(folder):
            path.unlink(missing_ok=True)
        raise
    finally:
        _close(descriptor)


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write in this folder: {error.strerror}", str(folder)) from None


def _holder() -> bytes:
    """What this process writes into the lock file."""
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"program": "pyllmc.train", "pid": os.getpid(), "host": platform.node(), "since": since}
    return json.dumps(holder).encode() + b"\n"


def _lock(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{folder}: {_describe_holder(descriptor)}; wait for it, stop it, or choose another --out"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise OSError(error.errno, f"cannot lock this file: {error.strerror}", str(folder / _LOCK_FILE)) from None
        return False
    return True


def _describe_holder(descriptor: int) -> str:
    # A process that got the lock just now has yet to write who it is.
    time.sleep(0.1)
    try:
        holder = parse_json(os.pread(descriptor, 4096, 0), _LOCK_FILE)
        since = datetime.fromisoformat(holder["since"]).astimezone()
        return f"pid {holder['pid']} on host {holder['host']} has been training there since {since:%Y-%m-%d %H:%M}"
    except (ValueError, TypeError, KeyError, OverflowError):
        return "another process is training there"


def _is_open_as(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the file that `descriptor` has open."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
