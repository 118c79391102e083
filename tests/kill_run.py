"""Kills training runs wherever they touch the disk, resumes them, and compares what they leave with a run that nothing
happened to: every file must be the same, byte for byte.

    python tests/kill_run.py                                          a tiny model, in a minute or two
    python tests/kill_run.py --init d6 --text FILE                    six layers, in a quarter of an hour

A first run counts the points: each file opened, written, flushed, renamed, cut or removed, each folder made. Then, for
each of them, a run ends there with os._exit, as after SIGKILL: in the midst of a write (half of it is done), before
anything else. Or the disk is full from there on. All these runs are forked from this process, which has imported the
program and computed nothing; others are processes of their own, killed at random times by SIGKILL. Options that are
not listed below go to pyllmc.train. tests/test_kills.py calls this program; it exits with 1 if anything was lost.
"""

import argparse
import builtins
import contextlib
import errno
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pyllmc import cli, hardware, runs, train
from pyllmc.backends import backend
from pyllmc.files import sha256_of
from pyllmc.logs import TIMES_FILE

TINY = ["--layers", "1", "--heads", "2", "--channels", "16", "--context", "16", "--seq-len", "16"]
LARGER = [
    "--batch-size", "1", "--seq-len", "64", "--tokenizer", "gpt2", "--max-steps", "4", "--keep-checkpoints", "1",
]  # fmt: skip
COMMON = [
    "--max-steps", "6", "--checkpoint-every", "2", "--keep-checkpoints", "2", "--val-every", "3", "--val-batches", "1",
    "--sample-every", "0", "--learning-rate", "1e-3", "--warmup", "0",
]  # fmt: skip
TEXT = "".join(f"{number} bottles of ale are on the wall,\n" for number in range(60))

KILLED = 9
# What fails on a full disk. Removing and renaming do not.
NEEDS_ROOM = ("open", "write", "pwrite", "fsync", "mkdir")
FULL = errno.ENOSPC


# ---- inside the run that something happens to -----------------------------------------------------------------------


class Disk:
    """Numbers what this process does to the disk. At the point `at` the process ends, or the disk is full from there.
    `points` are the kinds of operation and the names of the files."""

    def __init__(self, at: int | None = None, full: bool = False):
        self.at, self.full = at, full
        self.points: list[tuple[str, str]] = []

    def reach(self, kind: str, path, tear: Callable[[], object] = lambda: None) -> bool:
        """The process gets here before it does this; True if it may do only half of it. `tear` does half."""
        name = os.path.basename(path if isinstance(path, (str, os.PathLike)) else name_of(path))
        # The random part of a temporary file's name is no part of the point.
        self.points.append((kind, re.sub(r"\.[0-9a-f]{8}\.tmp$", ".tmp", name)))
        number = len(self.points) - 1
        if number == self.at and not self.full:
            tear()
            os._exit(KILLED)
        if self.at is None or number < self.at or kind not in NEEDS_ROOM:
            return False
        if number == self.at and kind == "write":
            return True
        raise OSError(FULL, os.strerror(FULL), *([path] if isinstance(path, (str, os.PathLike)) else []))

    def install(self) -> None:
        """Puts itself between this process and the disk, for good."""
        disk = self

        class Written(io.FileIO):
            def write(self, data):
                half = memoryview(data)[: len(data) // 2]
                if disk.reach("write", self.name, tear=lambda: io.FileIO.write(self, half)):
                    return super().write(half)
                return super().write(data)

        opened, descriptor_opened = builtins.open, os.open

        def open_file(file, mode="r", buffering=-1, encoding=None, **options):
            if not set(mode) & set("wxa+"):
                return opened(file, mode, buffering, encoding, **options)
            disk.reach("open", file)
            buffered = io.BufferedWriter(Written(os.fspath(file), mode.replace("b", "")))
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, encoding, line_buffering=buffering == 1, **options)

        def open_descriptor(path, flags, *rest, **options):
            if flags & os.O_CREAT and not os.path.exists(path):
                disk.reach("open", path)
            return descriptor_opened(path, flags, *rest, **options)

        builtins.open, os.open = open_file, open_descriptor
        # What a killed process has written the system has all the same; only a power cut needs more.
        os.fsync = lambda descriptor: None
        for kind in ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync", "ftruncate", "pwrite"):
            setattr(os, kind, self._watched(kind, getattr(os, kind)))

    def _watched(self, kind: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def watched(target, *arguments, **options):
            self.reach(kind, target)
            return function(target, *arguments, **options)

        return watched


def name_of(descriptor: int) -> str:
    """The path of an open file, where the system tells."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return "?"


# ---- runs -----------------------------------------------------------------------------------------------------------


def in_fork(function: Callable[[], int], output: Path) -> int:
    """The exit code of `function` in a forked process, what it prints in two files."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            for number, suffix in ((1, ".out"), (2, ".err")):
                os.dup2(os.open(f"{output}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            code = function()
        except SystemExit as end:
            code = end.code
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@dataclass
class Outcome:
    """What became of one run: what happened to it, whether it had to begin again, and what is wrong with the end."""

    what: str
    point: str
    began_again: bool = False
    problem: str = ""


class Scene:
    """The run that nothing happens to, and the folders in which others are tried."""

    def __init__(self, folder: Path, options: list[str]):
        self.folder, self.options = folder, options
        self.whole = folder / "whole"
        self.files: dict[str, str] = {}
        self.last_step = 0

    def arguments(self, out: Path) -> list[str]:
        """The command line that begins a run, or goes on with the one that is there."""
        return ["--out", str(out)] + (["--resume"] if runs.has_run(out) else self.options)

    def forked(self, out: Path, disk: Disk | None = None, points: Path | None = None) -> int:
        def run() -> int:
            # Measuring the machine takes longer than the run.
            hardware.peak_gflops = lambda seconds=0.2: 100.0
            sys.modules["matplotlib"] = None
            arguments = self.arguments(out)
            (disk or Disk()).install()
            code = cli.run_main(train.main, arguments)
            if points is not None:
                points.write_text(json.dumps(disk.points))
            return code

        return in_fork(run, out.with_name(out.name + "-says"))

    def process(self, out: Path, **options) -> subprocess.Popen:
        """The same as a process of its own."""
        log = open(out.with_name(out.name + "-says.err"), "wb")
        with log:
            return subprocess.Popen(
                [sys.executable, "-m", "pyllmc.train", *self.arguments(out)], stdout=log, stderr=log,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, **options,
            )  # fmt: skip

    def begin(self) -> list[tuple[str, str]]:
        """Makes the whole run; the points in it."""
        points = self.folder / "points.json"
        backend("cpu")  # imported once for all that are forked
        if self.forked(self.whole, Disk(), points):
            raise SystemExit(f"the run that nothing happens to failed:\n{self.says(self.whole)}")
        self.files = contents(self.whole)
        lines = (self.whole / "main.log").read_text().splitlines()
        steps = [int(match[1]) for line in lines if (match := re.match(r"s:(\d+) trl:", line))]
        self.last_step = len(steps)
        assert steps == list(range(len(steps))), "main.log has not each step once"
        assert any(" tel:" in line for line in lines) and f"DONE_{self.last_step:08d}" in self.files
        return [tuple(point) for point in json.loads(points.read_text())]

    def says(self, out: Path, suffix: str = ".err") -> str:
        return out.with_name(out.name + f"-says{suffix}").read_text(errors="replace")

    @contextlib.contextmanager
    def place(self, name: str) -> Iterator[Path]:
        """A folder for a run, which goes away with everything beside it."""
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=self.folder) as place:
            yield Path(place, "run")

    def finish(self, out: Path, outcome: Outcome, again: Callable[[Path], int] | None = None) -> Outcome:
        """Goes on with the run to its end, and compares."""
        outcome.began_again = not runs.has_run(out)
        code = (again or self.forked)(out)
        if code:
            outcome.problem = f"going on failed with {code}: {self.says(out).strip()[-300:]}"
        else:
            outcome.problem = self.difference(out)
        return outcome

    def difference(self, out: Path) -> str:
        found = contents(out)
        # A checkpoint that was about to be removed stays until the next one is saved, which is no loss.
        older = {f"DONE_{step:08d}" for step in train.list_steps(out)} - self.files.keys()
        names = {name for name in found.keys() | self.files.keys() if f"DONE_{name[6:14]}" not in older} - older
        wrong = sorted(name for name in names if found.get(name) != self.files.get(name))
        return f"differs: {', '.join(wrong)}" if wrong else ""


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file that the same run leaves the same: all but the picture and the lock; of the times all but
    the seconds."""
    names = set(os.listdir(folder)) - {"loss.png", runs._LOCK_FILE, TIMES_FILE}
    times = re.sub(r",[0-9.]+$", "", (folder / TIMES_FILE).read_text(), flags=re.M)
    return {name: sha256_of(folder / name) for name in sorted(names)} | {TIMES_FILE: times}


# ---- what can happen to a run ---------------------------------------------------------------------------------------


def kill_at(scene: Scene, number: int, point: tuple[str, str]) -> Outcome:
    outcome = Outcome(f"killed at {point[0]}", f"{number}: {' '.join(point)}")
    with scene.place("kill") as out:
        code = scene.forked(out, Disk(number))
        if code != KILLED:
            outcome.problem = f"was not killed but ended with {code}: {scene.says(out).strip()[-300:]}"
            return outcome
        return scene.finish(out, outcome)


def kill_twice(scene: Scene, number: int, point: tuple[str, str], later: float) -> Outcome:
    """Killed, and the run that goes on is killed too, after the share `later` of its points, if it has so many."""
    outcome = Outcome("killed twice", f"{number}: {' '.join(point)}, and again {later:.0%} later")
    with scene.place("twice") as out:
        scene.forked(out, Disk(number))
        scene.forked(out, Disk(int(later * number)))
        return scene.finish(out, outcome)


def fill_at(scene: Scene, number: int, point: tuple[str, str]) -> Outcome:
    """The disk is full from a point on; then there is room again."""
    outcome = Outcome(f"disk full at {point[0]}", f"{number}: {' '.join(point)}")
    with scene.place("full") as out:
        code, said = scene.forked(out, Disk(number, full=True)), scene.says(out)
        named = said.startswith(f"error: {out.parent}")
        if code not in (0, 1) or code and (not named or said.count("\n") != 1 or os.strerror(FULL) not in said):
            outcome.problem = f"ended with {code} and {said.strip()[-300:]!r}"
            return outcome
        return scene.finish(out, outcome)


def kill_at_random(scene: Scene, number: int, seed: int, seconds: float) -> Outcome:
    """A process of its own, killed by SIGKILL: one of five at any time from its start, the others after training began,
    which then takes `seconds`."""
    chance = random.Random(f"{seed} {number}")
    outcome = Outcome("SIGKILL at random", f"{number}")
    while True:
        with scene.place("random") as out, scene.process(out) as process:
            if number % 5:
                while process.poll() is None and not (out / "main.log").exists():
                    time.sleep(0.002)
            time.sleep(seconds * chance.random())
            process.kill()
            if process.wait() == -signal.SIGKILL:
                return scene.finish(out, outcome, lambda out: scene.process(out).wait())


def time_of_training(scene: Scene, outcomes: list[Outcome]) -> float:
    """The seconds from the first line of main.log to the end, in a process of its own, which must leave the same."""
    with scene.place("alone") as out, scene.process(out) as process:
        while process.poll() is None and not (out / "main.log").exists():
            time.sleep(0.002)
        begin = time.perf_counter()
        code = process.wait()
        seconds = time.perf_counter() - begin
        problem = f"ended with {code}: {scene.says(out).strip()[-300:]}" if code else scene.difference(out)
        outcomes.append(Outcome("not killed", "", problem=problem))
    return seconds


# ---- the program ----------------------------------------------------------------------------------------------------


def spread(tasks: list[Callable[[], Outcome]], jobs: int, folder: Path) -> list[Outcome]:
    """The tasks in `jobs` forked processes; what they find."""
    pids = []
    for job in range(jobs):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                found = [asdict(task()) for task in tasks[job::jobs]]
                (folder / f"found-{job}.json").write_text(json.dumps(found))
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    if any(statuses):
        raise SystemExit("a process of this program failed")
    files = [folder / f"found-{job}.json" for job in range(jobs)]
    return [Outcome(**outcome) for file in files for outcome in json.loads(file.read_text())]


def chosen(points: list[tuple[str, str]], which: str, kinds: tuple[str, ...] | None = None) -> list[int]:
    """The numbers of all points, or of one in the middle of those of each operation on each kind of file."""
    numbers = [number for number, (kind, _) in enumerate(points) if kinds is None or kind in kinds]
    if which == "all":
        return numbers
    groups: dict[tuple[str, str], list[int]] = {}
    for number in numbers if which == "kinds" else []:
        kind, name = points[number]
        groups.setdefault((kind, re.sub(r"\d+", "", name)), []).append(number)
    return sorted(group[len(group) // 2] for group in groups.values())


def table(outcomes: list[Outcome]) -> str:
    rows = [("what happened", "runs", "resumed", "begun again", "the same bytes")]
    for what in dict.fromkeys(outcome.what for outcome in sorted(outcomes, key=lambda outcome: outcome.what)):
        group = [outcome for outcome in outcomes if outcome.what == what]
        again = sum(outcome.began_again for outcome in group)
        same = sum(not outcome.problem for outcome in group)
        rows.append((what, *map(str, (len(group), len(group) - again, again, same))))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:<{width}}" + "".join(f"  {cell:>14}" for cell in row[1:]) for row in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = {"choices": ("all", "kinds", "none"), "metavar": "WHICH"}
    parser.add_argument("--points", default="all", help="to kill at: all; kinds, one of each kind; none", **which)
    parser.add_argument("--full", default="kinds", help="where the disk gets full: all, kinds, none", **which)
    parser.add_argument("--twice", type=int, default=0, metavar="N", help="runs killed twice, at random points")
    parser.add_argument("--sigkills", type=int, default=20, metavar="N", help="processes killed at random times")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    parser.add_argument("--jobs", type=int, default=hardware.usable_cpus(), help="runs at the same time")
    parser.add_argument("--work", type=Path, help="folder for all the runs, by default a temporary one")
    asked, options = parser.parse_known_args(argv)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="kill_run-", dir=asked.work) as work:
        text = Path(work, "text.txt")
        text.write_text(TEXT)
        options = [*COMMON, "--text", str(text), *(LARGER if "--init" in options else TINY), *options]
        scene = Scene(Path(work), options)
        points = scene.begin()
        print(f"{len(points)} points; a run of {scene.last_step} steps: {' '.join(options)}", flush=True)
        chance = random.Random(asked.seed)
        tasks = [functools.partial(kill_at, scene, n, points[n]) for n in chosen(points, asked.points)]
        tasks += [functools.partial(fill_at, scene, n, points[n]) for n in chosen(points, asked.full, NEEDS_ROOM)]
        for n in [chance.randrange(len(points)) for _ in range(asked.twice)]:
            tasks.append(functools.partial(kill_twice, scene, n, points[n], chance.random()))
        # Points that take longer are not all of one job.
        chance.shuffle(tasks)
        outcomes = spread(tasks, max(1, min(asked.jobs, len(tasks))), Path(work))
        if asked.sigkills:
            seconds = time_of_training(scene, outcomes)
            # One after another: a random time is to be one of this run, not of the machine's load.
            outcomes += [kill_at_random(scene, n, asked.seed, seconds) for n in range(asked.sigkills)]
        shutil.rmtree(scene.whole)
    lost = [outcome for outcome in outcomes if outcome.problem]
    print(f"\n{table(outcomes)}\n")
    for outcome in lost:
        print(f"{outcome.what}, {outcome.point}: {outcome.problem}")
    print(f"{len(outcomes)} runs, {len(lost)} with something lost, {time.perf_counter() - begin:.0f} s")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
