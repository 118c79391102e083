"""Folders of checkpoints: saving a run, finding where it can go on, removing what is old.

A checkpoint is model_%08d.bin (modelfile.py), a state_%08d_%05d.bin of each process (statefile.py) and, written last,
DONE_%08d with their sizes and SHA-256 in JSON (llm.c's is empty). The formats: data/README.md.

Several processes do all this together: each calls the same function with its group. Their folder may be one on a disk
that they share, or each has the one of this name on a disk of its own. Rank 0 writes the model and DONE, and decides
what is there; each rank has its own state. An error of one rank is raised there, and the caller tells it to the group:
so no rank gets as far as DONE.

Called by prepare.py, needs.py, train.py, generate.py and curves.py, and by runs.py; calls
config.py, modelfile.py, sharding.py, statefile.py, files.py and group.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .config import GPT2Config
from .files import atomic_write, open_regular, sha256_of
from .group import Alone, Group
from .modelfile import read_header, read_model
from .sharding import EVERYTHING, block_views
from .statefile import TrainingState, read_state, write_state
from .statefile import read_header as read_state_header

MANIFEST_VERSION = 1

# The names of its files, each with its step in a group of its own.
FILE_NAME = re.compile(r"model_(\d{8,18})\.bin|state_(\d{8,18})_\d{5}\.bin|DONE_(\d{8,18})", re.ASCII)

_ALONE = Alone()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


class Damaged(ValueError):
    """Files of a checkpoint are not what was saved; all ranks are told the same."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint in a folder, with `step` updates done by `num_processes`; `extra` is what the run saved beside
    the formats."""

    folder: Path
    step: int
    extra: dict = field(default_factory=dict)
    num_processes: int = 1

    @property
    def model_path(self) -> Path:
        return self.folder / f"model_{self.step:08d}.bin"

    def state_path(self, rank: int = 0) -> Path:
        return self.folder / f"state_{self.step:08d}_{rank:05d}.bin"

    @property
    def done_path(self) -> Path:
        return self.folder / f"DONE_{self.step:08d}"

    def remove(self) -> None:
        """Deletes its files, the states of all processes that are in this folder. DONE goes first: a checkpoint that is
        half removed is none."""
        states = [name for name in _names(self.folder) if name.startswith(self.state_path().name[:-9])]
        for path in (self.done_path, self.model_path, *(self.folder / name for name in sorted(states))):
            path.unlink(missing_ok=True)


# ---- saving ----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder, step: int, model, optimizer, loader=None, extra: dict | None = None, group: Group = _ALONE
) -> Checkpoint:
    """Writes a checkpoint after `step` updates: model, optimizer and the position of `loader` (a DataLoader).

    `extra` takes what JSON can hold: the states of other random generators, the settings of the run. The folder is
    there already. Damaged checkpoints of this step and of later ones, which the run has not gone on from, give way.
    ValueError if the step has a whole one: a failure halfway would spoil it (Checkpoint.remove deletes).
    """
    checkpoint = Checkpoint(Path(folder), step, extra or {}, group.size)
    for other in group.gather(list_steps(folder))[0]:
        if other < step:
            continue
        try:
            _verified(Path(folder), other, group)
        except Damaged:
            _remove(Checkpoint(Path(folder), other), group)
        else:
            if other == step:
                raise ValueError(f"{checkpoint.done_path}: step {step} has a checkpoint already; remove it first")
    to_host, master, written = model.ops.to_host, optimizer.master, [checkpoint.state_path(group.rank)]
    if group.rank == 0:
        # bfloat16 loses nothing of parameters that are bfloat16.
        model.save(checkpoint.model_path, "float32" if master is None else "bfloat16")
        written.insert(0, checkpoint.model_path)
    state = TrainingState(
        step,
        to_host(optimizer.m),
        to_host(optimizer.v),
        loader=None if loader is None else loader.state_dict(),
        num_processes=group.size,
        rank=group.rank,
        masters=None if master is None else to_host(master),
    )
    write_state(checkpoint.state_path(group.rank), state)
    entries = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in written}
    # Whatever fails on a rank before this keeps the others from getting beyond it.
    files = {name: entry for entries in group.gather(entries) for name, entry in entries.items()}
    if group.rank == 0:
        manifest = {"version": MANIFEST_VERSION, "step": step, "files": files, "extra": checkpoint.extra}
        with atomic_write(checkpoint.done_path) as file:
            file.write(json.dumps(manifest, indent=1).encode() + b"\n")
    group.gather(None)
    return checkpoint


# ---- going on --------------------------------------------------------------------------------------------------------


def load_checkpoint(
    checkpoint: Checkpoint, optimizer, loader=None, group: Group = _ALONE, report: Callable[[str], None] = _to_stderr
) -> dict:
    """Restores optimizer and loader, so that the run goes on bit for bit; returns the checkpoint's `extra`.

    The model is the optimizer's, read before with GPT2.from_checkpoint(checkpoint.model_path); with several processes
    all have it. Where another number of them goes on, each takes its parts of m, v and masters from wherever they are,
    and `report` is told, in one line, what cannot stay the same.
    """
    model, own = optimizer.model, group.rank % checkpoint.num_processes
    paths = [checkpoint.state_path(old) for old in range(checkpoint.num_processes)]
    try:
        state = read_state(paths, model.config, optimizer.shard, own)
    except FileNotFoundError as error:
        missing = "is not here; where the optimizer's state is cut in another way, each rank needs that of all others"
        raise FileNotFoundError(error.errno, missing, error.filename) from None
    if state.step != checkpoint.step:
        raise ValueError(f"{paths[own]}: is of step {state.step}, not {checkpoint.step}")
    if loader is not None:
        try:
            loader.load_state_dict(state.loader, checkpoint.num_processes)
        except ValueError as error:
            raise ValueError(f"{paths[own]}: {error}") from None
    masters = state.masters
    if masters is None and optimizer.master is not None:
        # What was trained in float32 goes on in bfloat16, of which its parameters become the masters.
        masters = _exact_parameters(checkpoint, optimizer, group)
    optimizer.load_state(state.step, state.m, state.v, masters)
    if masters is not None and optimizer.master is None and optimizer.shard != EVERYTHING:
        # What was trained in bfloat16 goes on in float32 from its masters, of which each rank had its parts.
        group.all_gather(block_views(model.flat_params, model.config))
        group.wait()
    if group.rank == 0 and checkpoint.num_processes != group.size:
        order = "the data goes on in a new epoch" if state.loader["shuffle"] else "the data goes on where it was"
        report(
            f"checkpoint {checkpoint.step} in {checkpoint.folder} was saved by {_processes(checkpoint.num_processes)}, "
            f"this run has {group.size}: weights and moments stay, {order}, and sums are rounded in another way"
        )
    return checkpoint.extra


def _processes(count: int) -> str:
    return f"{count} process" + ("es" if count != 1 else "")


def _exact_parameters(checkpoint: Checkpoint, optimizer, group: Group):
    """This rank's parts of the parameters as they are in the model file, which rank 0 has."""
    ops, shape = optimizer.model.ops, optimizer.model.flat_params.shape
    if group.rank == 0:
        flat = ops.from_host(read_model(checkpoint.model_path)[1], dtype="wide")
    else:
        flat = ops.empty(shape, "wide")
    group.broadcast(flat)
    return optimizer.packed(flat)


def _names(folder) -> list[str]:
    """The names of the files of checkpoints in the folder; none if there is no such folder."""
    try:
        return [name for name in os.listdir(folder) if FILE_NAME.fullmatch(name)]
    except FileNotFoundError:
        return []


def list_steps(folder) -> list[int]:
    """The steps whose checkpoint was completed, oldest first; empty if there is no such folder."""
    return sorted(int(name.removeprefix("DONE_")) for name in _names(folder) if name.startswith("DONE_"))


def find_latest(
    folder, *, with_state: bool = True, report: Callable[[str], None] = _to_stderr, group: Group = _ALONE
) -> Checkpoint | None:
    """The newest checkpoint whose files are whole, for all ranks, or None; each newer, damaged one is told to `report`
    in one line, by rank 0.

    Without `with_state` only the model file is looked at: enough to generate, also while a run goes on in the folder.
    """
    tried: set[int] = set()
    # Listed anew each time: a run that goes on removes what was the newest when there is a newer one.
    while steps := [step for step in group.gather(list_steps(folder))[0] if step not in tried]:
        step = steps[-1]
        tried.add(step)
        try:
            return _verified(Path(folder), step, group, with_state)
        except Damaged as error:
            if group.rank == 0 and step in list_steps(folder):
                report(f"checkpoint {step} in {folder} is damaged and not used: {error}")
    return None


def _verified(folder: Path, step: int, group: Group, with_state: bool = True) -> Checkpoint:
    """The checkpoint of this step, with its `extra`, if its files are what they were when it was written; else
    Damaged, on all ranks. Rank 0 looks at the model, and the ranks share the states."""
    found: dict = {}
    if group.rank == 0:
        found = _attempt(lambda: _read_manifest(folder, step, with_state))
    found = group.gather(found, patient=True)[0]
    if "problem" in found:
        raise Damaged(found["problem"])
    checkpoint = Checkpoint(folder, step, found["extra"], found["num_processes"])
    if with_state:
        config = GPT2Config(**found["config"])
        mine = range(group.rank, checkpoint.num_processes, group.size)
        results = group.gather(_attempt(lambda: _check_states(checkpoint, config, found["files"], mine)))
        for other, result in enumerate(results):
            if "problem" in result:
                raise Damaged((f"{group.label(other)}: " if group.size > 1 else "") + result["problem"])
    return checkpoint


def _attempt(check: Callable[[], dict]) -> dict:
    """What a check of files finds, or its problem: as a value, which other ranks can be told."""
    try:
        return check()
    except (OSError, ValueError) as error:
        return {"problem": str(error)}


def _read_manifest(folder: Path, step: int, with_state: bool) -> dict:
    """What rank 0 finds out for all: `extra`, number of processes, the model's `config`, and `files`, name -> bytes and
    hash, or None where nothing tells them."""
    checkpoint = Checkpoint(folder, step)
    config = read_header(checkpoint.model_path).config
    found = {"extra": {}, "num_processes": 1, "config": dataclasses.asdict(config), "files": None}
    if with_state:
        found["num_processes"] = read_state_header(checkpoint.state_path(), config).num_processes
    with open_regular(checkpoint.done_path) as file:
        text = file.read()
    # llm.c writes an empty file: then the formats' own sizes are all there is to check.
    if not text.strip():
        return found
    problem = f"{checkpoint.done_path}: not a manifest of version {MANIFEST_VERSION}"
    try:
        manifest = json.loads(text)
        version, files, found["extra"] = manifest["version"], manifest["files"], manifest["extra"]
        found["files"] = {name: [entry["bytes"], entry["sha256"]] for name, entry in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(problem) from None
    if version != MANIFEST_VERSION or not isinstance(found["extra"], dict):
        raise ValueError(problem)
    _check_saved(checkpoint.model_path, found["files"])
    return found


def _check_saved(path: Path, files: dict | None) -> None:
    """ValueError if the file is not the one whose size and hash were saved."""
    if files is not None and files.get(path.name) != [path.stat().st_size, sha256_of(path)]:
        raise ValueError(f"{path}: is not the file that was saved")


def _check_states(checkpoint: Checkpoint, config: GPT2Config, files: dict | None, ranks: range) -> dict:
    """Nothing to tell, if the states of these ranks are whole."""
    for rank in ranks:
        path = checkpoint.state_path(rank)
        header = read_state_header(path, config)
        if (header.rank, header.num_processes) != (rank, checkpoint.num_processes):
            raise ValueError(f"{path}: is rank {header.rank}'s of {_processes(header.num_processes)}")
        _check_saved(path, files)
    return {}


# ---- removing --------------------------------------------------------------------------------------------------------


def _remove(checkpoint: Checkpoint, group: Group) -> None:
    """Deletes a checkpoint: rank 0 first, DONE before all else; the others what is left on disks of their own."""
    if group.rank == 0:
        checkpoint.remove()
    group.gather(None)
    if group.rank != 0:
        checkpoint.remove()
    # What comes next may be files of the same names.
    group.gather(None)


def remove_unfinished(folder, group: Group = _ALONE) -> None:
    """Removes the models and states of steps before the newest checkpoint that have no DONE: a process was killed while
    it wrote or removed them. Later ones stay until the run gets there and replaces them."""
    steps = group.gather(list_steps(folder))[0]
    begun = {int(match[match.lastindex]) for match in map(FILE_NAME.fullmatch, _names(folder))}
    for step in begun.difference(steps):
        if step < max(steps, default=0):
            Checkpoint(Path(folder), step).remove()


def remove_old_checkpoints(folder, keep: int, keep_every: int = 0, group: Group = _ALONE) -> None:
    """Removes all but the newest `keep` checkpoints (0 keeps all), except those at multiples of `keep_every`, and
    what is unfinished."""
    remove_unfinished(folder, group)
    if keep < 1:
        return
    for step in group.gather(list_steps(folder))[0][:-keep]:
        if keep_every and step % keep_every == 0:
            continue
        _remove(Checkpoint(Path(folder), step), group)
