"""What a training run tells: lines and a live bar on the console, `main.log` in llm.c's grammar, and `times.csv`.

    s:250 tel:2.0312                               validation loss before update 250
    s:250 eval:0.2955                              accuracy on HellaSwag before update 250
    s:250 trl:2.0731 lr:0.002912 norm:0.61         loss, learning rate and gradient norm of update 250

    step,tokens,seconds                            what main.log has no place for, as llm.c's tools read it too:
    250,4096,0.015312                              how many tokens update 250 saw, and how long it took

`Console` is made by prepare.py and written to by train.py; record.py writes to `MainLog` and `Times`; `read_main_log`
and `read_times` are for curves.py. Figures are written the same way everywhere by the `format_` functions. Calls
files.py, and tqdm for the bar.
"""

import contextlib
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from .files import atomic_write

# ---- figures --------------------------------------------------------------------------------------------------------


def format_bytes(count: float) -> str:
    """`31.2 MB`, `1.5 GB`: powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit in ("bytes", "kB") else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_count(count: float) -> str:
    """`812`, `14.7k`, `124M`: three digits."""
    if count < 999.5:
        return f"{count:.0f}"
    for unit in ("k", "M", "G"):
        count /= 1000
        if count < 999.5:
            return f"{count:.0f}{unit}" if count >= 99.95 else f"{count:.1f}{unit}"
    return f"{count / 1000:.1f}T"


def format_duration(seconds: float) -> str:
    """`0.4 s`, `52 s`, `1 min 52 s`, `3 h 05 min`, `2 d 4 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def format_share(share: float | None) -> str:
    """`41%`, `0.3%`, or `n/a` for None."""
    if share is None:
        return "n/a"
    return f"{share:.0%}" if share >= 0.0095 else f"{share:.1%}"


def _z(z: float) -> str:
    """A z-score behind its number, if it has one."""
    return "" if math.isnan(z) else f" (z {z:+.2f})"


def aligned(rows: list[tuple[str, str]]) -> str:
    """Lines of `name  value`, the values under one another; further lines of a value are indented like its first."""
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}" + value.replace("\n", "\n" + " " * width) for name, value in rows)


# ---- main.log and times.csv -----------------------------------------------------------------------------------------

LOG_FILE = "main.log"
TIMES_FILE = "times.csv"


class _Lines:
    """A text file of one run, each line in it as soon as it is written, and on the disk after `sync`.

    With `resume_step` the lines before that step are kept, so that a resumed run's file has the steps of an
    uninterrupted one, each once; without it the file starts with its header alone.
    """

    LINE: re.Pattern  # the first group is the step
    HEADER = ""

    def __init__(self, path: str | os.PathLike, resume_step: int | None = None):
        kept = [self.HEADER] if self.HEADER else []
        if resume_step is not None and Path(path).exists():
            kept += [match[0] + "\n" for match in _whole_lines(path, self.LINE) if int(match[1]) < resume_step]
        with atomic_write(path) as file:
            file.write("".join(kept).encode("ascii"))
        self._path = os.fspath(path)
        self._file = open(path, "a", encoding="ascii", buffering=1)

    def _write(self, line: str) -> None:
        with self._naming_errors():
            self._file.write(line + "\n")

    def sync(self) -> None:
        """Flushes the lines to the disk: before a checkpoint is saved, from which a resumed run would not write them
        again."""
        with self._naming_errors():
            self._file.flush()
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"cannot write this file: {error.strerror}", self._path) from None

    def close(self) -> None:
        # What could not be written has been told.
        with contextlib.suppress(OSError):
            self._file.close()


class MainLog(_Lines):
    """main.log: equal, byte for byte, for a resumed and an uninterrupted run."""

    LINE = re.compile(r"s:(\d{1,18})((?: [a-z]+:\S+)+)")

    def validation(self, step: int, loss: float) -> None:
        """The validation loss before update `step`."""
        self._write(f"s:{step} tel:{loss:.4f}")

    def evaluation(self, step: int, accuracy: float) -> None:
        """The accuracy on HellaSwag before update `step`."""
        self._write(f"s:{step} eval:{accuracy:.4f}")

    def train(self, step: int, loss: float, learning_rate: float, norm: float) -> None:
        """The figures of update `step`."""
        self._write(f"s:{step} trl:{loss:.4f} lr:{learning_rate:.6f} norm:{norm:.2f}")


class Times(_Lines):
    """times.csv: the size of each update, and its duration, without the validations and checkpoints between them."""

    LINE = re.compile(r"(\d{1,18}),(\d{1,18}),(\d{1,12}\.\d{6})")
    HEADER = "step,tokens,seconds\n"

    def train(self, step: int, tokens: int, seconds: float) -> None:
        """Update `step` saw so many tokens and took so long."""
        self._write(f"{step},{tokens},{seconds:.6f}")


def read_main_log(path: str | os.PathLike) -> dict[str, dict[int, float]]:
    """The curves in a main.log: {"trl": {step: loss}, "tel": ..., "eval": ..., "lr": ..., "norm": ...}, in the order of
    the steps. A later line for a step replaces an earlier one; lines of no known form are passed over."""
    curves: dict[str, dict[int, float]] = {}
    for match in _whole_lines(path, MainLog.LINE):
        for pair in match[2].split():
            name, _, value = pair.partition(":")
            with contextlib.suppress(ValueError):
                curves.setdefault(name, {})[int(match[1])] = float(value)
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def _whole_lines(path: str | os.PathLike, pattern: re.Pattern) -> Iterator[re.Match]:
    """The lines of a file as matches of the pattern. One without its end is the last of a run that was killed or had no
    more room, and what its last figure would have been is not known: it is none."""
    with open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            if line.endswith("\n") and (match := pattern.fullmatch(line.strip())):
                yield match


def read_times(path: str | os.PathLike) -> dict[int, tuple[int, float]]:
    """{step: (tokens, seconds)} of a times.csv, in the order of the steps, by the rules of read_main_log."""
    times = {int(match[1]): (int(match[2]), float(match[3])) for match in _whole_lines(path, Times.LINE)}
    return dict(sorted(times.items()))


# ---- time -----------------------------------------------------------------------------------------------------------


class Pace:
    """How fast a run goes, and from that the time it has left.

    The time per step is an exponential average (0.95, corrected for its start as Adam's moments are), without the first
    step, which also makes room for what later ones use; until the second it is what was expected. Validations, samples
    and checkpoints are `pauses`: as long as the last of their kind.
    """

    SMOOTHING = 0.95

    def __init__(self, total: int, tokens_per_step: int, flops_per_token: int, expected_seconds: float):
        self.total = total
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self._expected = expected_seconds
        self._sum = 0.0
        self._steps = 0
        self._count = 0
        self._pauses: dict[str, tuple[int, float]] = {}

    def step(self, seconds: float) -> None:
        """One more step took `seconds`."""
        self._steps += 1
        if self._steps == 1:
            return
        self._count += 1
        self._sum = self.SMOOTHING * self._sum + (1 - self.SMOOTHING) * seconds

    def pause(self, kind: str, every: int, seconds: float) -> None:
        """A pause that comes `every` steps (0: never) and after the last one took, or shall take, `seconds`."""
        self._pauses[kind] = (every, seconds)

    @property
    def seconds_per_step(self) -> float:
        return self._sum / (1 - self.SMOOTHING**self._count) if self._count else self._expected

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.seconds_per_step

    @property
    def gflops(self) -> float:
        """What the model needs by its formula, per second, in GFLOP/s."""
        return self.flops_per_token * self.tokens_per_second / 1e9

    def seconds_left(self, done: int) -> float:
        """The time that the steps after `done`, and their pauses, will take."""
        left = (self.total - done) * self.seconds_per_step
        for every, seconds in self._pauses.values():
            times = self.total // every - done // every + (self.total % every != 0) if every else 1
            left += times * seconds
        return left


# ---- console --------------------------------------------------------------------------------------------------------


class Console:
    """Lines on stdout; on a terminal also one live bar below them, which shows every step; elsewhere a line for every
    `log_every`-th step.

    When the output goes away (a closed pipe, a closed terminal) `lost` becomes the error and the rest is silent, so
    that the training loop can still save what it has.
    """

    BAR = "{percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt}  {desc}"
    NARROW, NARROW_BAR = 80, "{percentage:3.0f}%  {desc}"  # on fewer columns than these the words come first

    def __init__(self, total: int, log_every: int = 0):
        self.total = total
        self.log_every = log_every or max(1, total // 40)
        self.lost: OSError | None = None
        self._bar: tqdm | None = None

    def line(self, text: str = "") -> None:
        """A line that stays; above the bar if there is one. Not for text from a model: see `open_text`."""
        with self.open_text():
            self.write(text + "\n")

    def write(self, text: str) -> None:
        """Text as it is, at once."""
        # A process that was started without an output has None for it.
        if sys.stdout is not None:
            self._guarded(sys.stdout.write, text)
            self._guarded(sys.stdout.flush)

    @contextlib.contextmanager
    def open_text(self) -> Iterator[None]:
        """Hides the bar while the block writes whole lines to stdout, and shows it again below them."""
        if self._bar is not None:
            self._guarded(self._bar.clear)
        yield
        if self._bar is not None:
            self._guarded(self._bar.refresh)

    def start(self, done: int) -> None:
        """The steps begin, the first `done` of them are there already."""
        if sys.stdout is not None and sys.stdout.isatty():
            # tqdm's monitor is a thread that only helps loops which do not report; this one reports every step.
            tqdm.monitor_interval = 0
            size = shutil.get_terminal_size()
            self._bar = tqdm(
                total=self.total, initial=done, file=sys.stdout, bar_format=self._format(size.columns), leave=False,
                ncols=size.columns, nrows=size.lines,
            )  # fmt: skip

    def _format(self, columns: int) -> str:
        return self.BAR if columns >= self.NARROW else self.NARROW_BAR

    def step(
        self, done: int, loss: float, norm: float, learning_rate: float, seconds: float, pace: Pace,
        peak: float | None, loss_z: float = math.nan, norm_z: float = math.nan,
    ) -> None:  # fmt: skip
        """Step number `done`, counted from 1, gave these figures. `peak` is the machine's in GFLOP/s, if it is known;
        z-scores that are nan are not shown."""
        speed = f"{format_count(pace.tokens_per_second)} tok/s"
        left = f"{format_duration(pace.seconds_left(done))} left"
        share = format_share(pace.gflops / peak if peak else None)
        if self._bar is not None:
            self._bar.set_description_str(f"loss {loss:.3f}  {speed}  {left}", refresh=False)
            self._bar.ncols = shutil.get_terminal_size().columns
            self._bar.bar_format = self._format(self._bar.ncols)
            self._guarded(self._bar.update)
        elif done % self.log_every == 0 or done in (1, self.total):
            self.line(
                f"{self.label(done)} | loss {loss:.4f}{_z(loss_z)} | norm {norm:7.4f}{_z(norm_z)} | "
                f"lr {learning_rate:.2e} | {seconds * 1000:.1f} ms | {speed} | {share} of peak | {left}"
            )

    def activity(self, text: str) -> None:
        """What is done between two steps: in the bar until the next one, and nowhere if there is no bar."""
        if self._bar is not None:
            self._guarded(self._bar.set_description_str, text)

    def label(self, step: int) -> str:
        """`step  250/2000`, as wide for every step."""
        return f"step {step:>{len(str(self.total))}}/{self.total}"

    def close(self) -> None:
        """The bar goes, the lines stay."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            self._guarded(bar.close)

    def _guarded(self, action: Callable, *arguments) -> None:
        if self.lost is None:
            try:
                action(*arguments)
            except OSError as error:
                self.lost = OSError(error.errno, error.strerror, "standard output")
