"""Folders of checkpoints: saving a run, finding where it can go on, removing what is old.

A checkpoint is model_%08d.bin (modelfile.py), state_%08d_00000.bin (statefile.py) and, written last, DONE_%08d with
their sizes and SHA-256 in JSON (llm.c's is empty). The formats: data/README.md.

Called by prepare.py, train.py, generate.py and curves.py, and by runs.py for the names of the files; calls
modelfile.py, statefile.py and files.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .files import atomic_write, open_regular, sha256_of
from .modelfile import read_header, read_model
from .statefile import TrainingState, check_state, read_state, write_state

MANIFEST_VERSION = 1

# The names of its files, each with its step in a group of its own; llm.c's runs have a state for each process.
FILE_NAME = re.compile(r"model_(\d{8,18})\.bin|state_(\d{8,18})_\d{5}\.bin|DONE_(\d{8,18})", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint in a folder, with `step` updates done; `extra` is what the run saved beside the formats."""

    folder: Path
    step: int
    extra: dict = field(default_factory=dict)

    @property
    def model_path(self) -> Path:
        return self.folder / f"model_{self.step:08d}.bin"

    @property
    def state_path(self) -> Path:
        return self.folder / f"state_{self.step:08d}_00000.bin"

    @property
    def done_path(self) -> Path:
        return self.folder / f"DONE_{self.step:08d}"

    def remove(self) -> None:
        """Deletes its files. DONE goes first: a checkpoint that is half removed is none."""
        for path in (self.done_path, self.model_path, self.state_path):
            path.unlink(missing_ok=True)


def save_checkpoint(folder, step: int, model, optimizer, loader=None, extra: dict | None = None) -> Checkpoint:
    """Writes a checkpoint after `step` updates: model, optimizer and the position of `loader` (a DataLoader).

    `extra` takes what JSON can hold: the states of other random generators, the settings of the run. The folder is
    there already. Damaged checkpoints of this step and of later ones, which the run has not gone on from, give way.
    ValueError if the step has a whole one: a failure halfway would spoil it (Checkpoint.remove deletes).
    """
    checkpoint = Checkpoint(Path(folder), step, extra or {})
    for other in list_steps(folder):
        if other >= step and not _is_whole(Checkpoint(Path(folder), other)):
            Checkpoint(Path(folder), other).remove()
    if checkpoint.done_path.exists():
        raise ValueError(f"{checkpoint.done_path}: step {step} has a checkpoint already; remove it first")
    to_host, master = model.ops.to_host, optimizer.master
    # bfloat16 loses nothing of parameters that are bfloat16.
    model.save(checkpoint.model_path, "float32" if master is None else "bfloat16")
    state = TrainingState(
        step,
        to_host(optimizer.m),
        to_host(optimizer.v),
        loader=None if loader is None else loader.state_dict(),
        masters=None if master is None else to_host(master),
    )
    write_state(checkpoint.state_path, state)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in (checkpoint.model_path, checkpoint.state_path)
    }
    manifest = {"version": MANIFEST_VERSION, "step": step, "files": files, "extra": checkpoint.extra}
    with atomic_write(checkpoint.done_path) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    return checkpoint


def load_checkpoint(checkpoint: Checkpoint, optimizer, loader=None) -> dict:
    """Restores optimizer and loader, so that the run goes on bit for bit; returns the checkpoint's `extra`.

    The model is the optimizer's, read before with GPT2.from_checkpoint(checkpoint.model_path).
    """
    state = read_state(checkpoint.state_path, optimizer.model.config.num_parameters_padded)
    if state.step != checkpoint.step:
        raise ValueError(f"{checkpoint.state_path}: is of step {state.step}, not {checkpoint.step}")
    if state.num_processes != 1:
        raise ValueError(f"{checkpoint.state_path}: is of a run of {state.num_processes} processes, this is one")
    if loader is not None:
        try:
            loader.load_state_dict(state.loader)
        except ValueError as error:
            raise ValueError(f"{checkpoint.state_path}: {error}") from None
    model, masters = optimizer.model, state.masters
    if masters is not None and optimizer.master is None:
        # What was trained in bfloat16 goes on in float32 from its masters.
        model.ops.from_host(masters, out=model.flat_params)
    elif masters is None and optimizer.master is not None:
        # What was trained in float32 goes on in bfloat16, of which its parameters become the masters.
        _, masters = read_model(checkpoint.model_path)
    optimizer.load_state(state.step, state.m, state.v, masters)
    return checkpoint.extra


def list_steps(folder) -> list[int]:
    """The steps whose checkpoint was completed, oldest first; empty if there is no such folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(match[3]) for name in names if (match := FILE_NAME.fullmatch(name)) and match[3])


def find_latest(
    folder, *, with_state: bool = True, report: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> Checkpoint | None:
    """The newest checkpoint whose files are whole, or None; each newer, damaged one is told to `report` in one line.

    Without `with_state` only the model file is looked at: enough to generate.
    """
    for step in reversed(list_steps(folder)):
        checkpoint = Checkpoint(Path(folder), step)
        try:
            return _verified(checkpoint, with_state)
        except (OSError, ValueError) as error:
            report(f"checkpoint {step} in {folder} is damaged and not used: {error}")
    return None


def _verified(checkpoint: Checkpoint, with_state: bool) -> Checkpoint:
    """The checkpoint with its `extra`, if its files are what they were when it was written."""
    config = read_header(checkpoint.model_path).config
    if with_state:
        check_state(checkpoint.state_path, config.num_parameters_padded)
    with open_regular(checkpoint.done_path) as file:
        text = file.read()
    # llm.c writes an empty file: then the formats' own sizes are all there is to check.
    if not text.strip():
        return checkpoint
    problem = f"{checkpoint.done_path}: not a manifest of version {MANIFEST_VERSION}"
    try:
        manifest = json.loads(text)
        version, files, extra = manifest["version"], manifest["files"], manifest["extra"]
        known = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(problem) from None
    if version != MANIFEST_VERSION or not isinstance(extra, dict):
        raise ValueError(problem)
    for path in (checkpoint.model_path, checkpoint.state_path) if with_state else (checkpoint.model_path,):
        if known.get(path.name) != (path.stat().st_size, sha256_of(path)):
            raise ValueError(f"{path}: is not the file that was saved")
    return Checkpoint(checkpoint.folder, checkpoint.step, extra)


def _is_whole(checkpoint: Checkpoint) -> bool:
    try:
        _verified(checkpoint, with_state=True)
    except (OSError, ValueError):
        return False
    return True


def remove_unfinished(folder) -> None:
    """Removes the models and states of steps before the newest checkpoint that have no DONE: a process was killed while
    it wrote or removed them. Later ones stay until the run gets there and replaces them."""
    steps = list_steps(folder)
    begun = {int(match[match.lastindex]) for name in os.listdir(folder) if (match := FILE_NAME.fullmatch(name))}
    for step in begun.difference(steps):
        if step < max(steps, default=0):
            Checkpoint(Path(folder), step).remove()


def remove_old_checkpoints(folder, keep: int, keep_every: int = 0) -> None:
    """Removes all but the newest `keep` checkpoints (0 keeps all), except those at multiples of `keep_every`, and
    what is unfinished."""
    remove_unfinished(folder)
    if keep < 1:
        return
    for step in list_steps(folder)[:-keep]:
        if keep_every and step % keep_every == 0:
            continue
        Checkpoint(Path(folder), step).remove()
