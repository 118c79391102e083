"""The folder of a training run: what is in it, who may write to it, and that no run destroys another.

    recipe.toml                     all settings; there as soon as training begins (settings.py)
    train.bin val.bin               the text as tokens (dataloader.py)
    tokenizer.bin tokenizer.json    the vocabulary (tokenizer.py)
    main.log times.csv tensorboard  what was measured, and when (record.py)
    loss.png                        a picture of it (curves.py, plot.py)
    model_* state_* DONE_*          checkpoints (checkpoint.py)

    .lock                           who trains here, or did: JSON; locked as long as the process lives

Programs that only read a run (generate, evaluate, plot, verify) take no lock: every file but those of record.py appears
complete. Called by train.py and llmc.py: `claimed` is the block in which a run owns its folder; and for a model by
prepare.py (`find_model`), generate.py, evaluate.py and convert.py (`opened` too). Calls settings.py, checkpoint.py,
huggingface.py, lock.py and files.py, and takes the names of the files from the modules that write them.
"""

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from . import huggingface
from .checkpoint import FILE_NAME, find_latest, list_steps
from .curves import PICTURE_FILE
from .datasets.common import TRAIN_FILE, VAL_FILE
from .events import EVENTS_FOLDER
from .files import naming_errors, remove_temporaries
from .lock import Lock, locked
from .logs import LOG_FILE, TIMES_FILE
from .settings import RECIPE_FILE, RUN_MARK, Settings, save_recipe
from .tokenizer import TOKENIZER_FILE

Opened = TypeVar("Opened")

# What is written before training begins.
_PREPARED = (TRAIN_FILE, VAL_FILE, TOKENIZER_FILE, Path(TOKENIZER_FILE).with_suffix(".json").name)
_NAMES = (*_PREPARED, RECIPE_FILE, LOG_FILE, TIMES_FILE, EVENTS_FOLDER, PICTURE_FILE)
_OWN_FILE = re.compile("|".join([*map(re.escape, _NAMES), FILE_NAME.pattern]), re.ASCII)
# How the name of a folder begins in which prepare.py makes the tokens of a text once more, to compare them.
TEXT_AGAIN = ".text-"
_LOCK_FILE = ".lock"
_PROGRAM = "pyllmc.train"
# What the lock file of a run begins with: the first member of its JSON.
_LOCK_MARK = f'{{"program": "{_PROGRAM}"'


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


def find_model(named: Path) -> Path:
    """The model file that is named; of the folder of a run its newest whole one; the folder of a Hugging Face GPT-2,
    fetched if it is one of HUB_NAMES. ValueError if there is none."""
    if named.is_dir() and not huggingface.is_folder(named):
        if latest := find_latest(named, with_state=False):
            return latest.model_path
        raise ValueError(f"{named}: no checkpoint in this folder; name the folder of a run, or a model file")
    if named.suffix == ".safetensors":
        raise ValueError(f"{named}: name its folder instead, which has {huggingface.CONFIG_FILE} too")
    if named.exists():
        return named
    if str(named) in huggingface.HUB_NAMES:
        return huggingface.find_folder(named)
    raise ValueError(f"{named}: there is no such model file; name one, or the folder of a run or of Hugging Face")


def opened(find_and_open: Callable[[], Opened]) -> Opened:
    """find_and_open() of a model; where a file is gone in between, once more, until the same one is missing twice: a
    run that goes on removes its older checkpoints when a newer one is whole."""
    gone = None
    while True:
        try:
            return find_and_open()
        except FileNotFoundError as error:
            if error.filename == gone:
                raise
            gone = error.filename


class Claim:
    """A folder in which this process alone trains. `moved` is where the run is now that was there before, if there was
    one; `has_begun` says that training began here, so that nothing is deleted whatever happens."""

    def __init__(self, folder: Path, lock: Lock, moved: Path | None):
        self.folder, self.moved, self.has_begun = folder, moved, has_run(folder)
        self._lock = lock

    def begin(self, settings: Settings) -> None:
        """Everything is ready, and training begins: writes recipe.toml."""
        save_recipe(settings, self.folder / RECIPE_FILE)
        self.has_begun = self._lock.stays = True

    @property
    def holder(self) -> str:
        """What the lock file says of this process."""
        return self._lock.read(4096).decode()

    def check(self) -> None:
        """ValueError if the folder was moved, deleted or replaced: what has its name now may be another run's."""
        if not self._lock.is_current():
            raise ValueError(
                f"{self.folder}: was moved, deleted or replaced while the run went on, so it ends here, and saves "
                "nothing more; from what it had saved it goes on where that is now, with --out and --resume"
            )


def begin_beside(folder: Path, holder: str, settings: Settings) -> None:
    """Training begins, for a process that does not claim the folder, which `holder` has claimed: if it is on another
    disk under the same name, it is made, and has the settings too, to go on from. OSError if nothing can be written
    there, which would else be noticed at the first checkpoint."""
    lock = folder / _LOCK_FILE
    folder.mkdir(parents=True, exist_ok=True)
    with naming_errors(folder, "cannot write in this folder"), tempfile.TemporaryFile(dir=folder):
        pass
    if not lock.is_file() or lock.read_bytes() != holder.encode():
        save_recipe(settings, folder / RECIPE_FILE)


@contextlib.contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[Claim]:
    """The block in which this process alone writes to `folder`, which is made if it is not there.

    For a new run what an earlier one left moves out of the way, as a whole, to FOLDER.1 (.2, ...). ValueError or
    OSError, and nothing changed, if that cannot be done safely, if another process trains there, if the files there are
    not a run's, if there is no run to resume, or if nothing can be written there. What a run that was killed had begun
    to write is deleted.

    If the block fails before training begins (Claim.begin), what it wrote, and nothing else, is deleted again.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another folder with --out")
    if file := next((parent for parent in folder.absolute().parents if parent.is_file()), None):
        raise ValueError(f"{folder}: {file} is a file; choose another folder with --out")
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
        with _locked(folder) as lock:
            if not lock.is_locked:
                print(f"{folder}: no locks on this file system: let no other process train there", file=sys.stderr)
            before = run_files(folder)
            if before and not resume:
                raise ValueError(f"{folder}: another process wrote {before[0]} there just now; choose another --out")
            if resume:
                # It was there a moment ago; since then another process may have moved it away.
                if not has_run(folder) and not list_steps(folder):
                    raise ValueError(f"{folder}: the run to resume is gone; name its folder with --out")
                _remove_leftovers(folder)
            claim = Claim(folder, lock, moved)
            try:
                yield claim
            except BaseException:
                if not claim.has_begun:
                    for name in set(_PREPARED).difference(before):
                        (folder / name).unlink(missing_ok=True)
                raise
    finally:
        # Only those that are still empty can go.
        with contextlib.suppress(OSError):
            for parent in new_folders:
                parent.rmdir()
        if moved is not None and not folder.exists():
            moved.rename(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Lock]:
    """Holds the folder's lock file, which stays if it was there before, or belongs to a run. ValueError if it is
    another program's, or another process has it."""
    with locked(folder / _LOCK_FILE, "training", "--out") as lock:
        lock.stays = not lock.is_new or has_run(folder)
        content = lock.read(len(_LOCK_MARK))
        if content and content != _LOCK_MARK.encode() and not has_run(folder):
            raise ValueError(f"{lock.path}: is not from a training run; choose another --out")
        # An empty lock file that was there is not marked as a run's: what lies beside it may be another program's.
        if lock.is_new or content or has_run(folder) or not run_files(folder):
            lock.write_holder(_PROGRAM)
        yield lock


def _remove_leftovers(folder: Path) -> None:
    """Deletes what a run that was killed had begun to write in its folder, which is locked."""
    remove_temporaries(folder, _OWN_FILE)
    for name in os.listdir(folder):
        if name.startswith(TEXT_AGAIN):
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
    with naming_errors(folder, f"cannot move this earlier run to {aside.name}, so choose another --out"):
        folder.rename(aside)
    return aside
