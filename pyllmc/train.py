"""`python -m pyllmc.train`: text in, a trained model out. Without arguments a small character GPT on Shakespeare.

Puts the pieces together: settings (settings.py), the run's folder (runs.py), text to tokens (datasets), model, AdamW,
and the loop, whose order is llm.c's: for step = 0 .. N validate, sample, save, train; the last round does all but the
last. Checkpoint number S has S updates behind it, and `--resume` goes on from it bit for bit.

Exit codes, for scripts that start a run again until it is done:

    0              the run is complete
    1, 2           an error, of the input or of the command line, which a new start would meet again
    129, 130, 143  stopped by SIGHUP, Ctrl-C or SIGTERM after finishing the step and saving: --resume goes on
    141            the same, because whoever read the output went away
"""

import contextlib
import filecmp
import math
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import cli, hardware, runs
from .backends import backend
from .checkpoint import (
    Checkpoint,
    find_latest,
    list_steps,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from .config import GPT2Config
from .dataloader import DataLoader
from .datasets import SHAKESPEARE, prepare_text
from .datasets.common import TRAIN_FILE, VAL_FILE
from .generate import stream_text
from .logs import Console, MainLog, Pace, aligned, format_bytes, format_count, format_duration, format_share
from .model import GPT2
from .optimizer import AdamW, clip_scale, grad_norm
from .plot import LOG_FILE, PICTURE_FILE, plot_losses
from .schedules import learning_rate
from .settings import (
    DEFAULT_RECIPE,
    RECIPE_FILE,
    Settings,
    add_options,
    check_resumable,
    default_settings,
    load_recipe,
    run_name,
    save_recipe,
)
from .tokenizer import TOKENIZER_FILE, Tokenizer

# A step whose loss or gradient is not a number is left out; after this many in a row the run is beyond help.
MAX_SKIPPED_IN_A_ROW = 10

SAMPLE_TEMPERATURE = 0.8


class Stop:
    """While the block runs, SIGINT, SIGTERM and SIGHUP only ask to stop, once; a second one acts as usual."""

    def __init__(self):
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        # Only the main thread gets signals; what the parent process had ignored (nohup) stays ignored.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame) -> None:
        self.signal = number
        # Not through sys.stderr, in the middle of whose work the signal may have come.
        with contextlib.suppress(OSError):
            os.write(2, b"\nfinishing this step, then saving; the same again stops at once\n")
        self.__exit__()

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @property
    def exit_code(self) -> int:
        return 128 + self.signal


@dataclass
class Run:
    """Everything that one training run works with. `peak` is the machine's in GFLOP/s, `free_memory` what was free in
    bytes, where known, before the run took its share."""

    settings: Settings
    folder: Path
    tokenizer: Tokenizer
    train_loader: DataLoader
    val_loader: DataLoader
    model: GPT2
    optimizer: AdamW
    console: Console
    pace: Pace
    peak: float
    free_memory: int | None
    start: int
    skipped_in_a_row: int = 0
    validation_loss: float = math.nan


# ---- getting ready --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What the command line asks for: settings (those of a resumed run come from its folder), where, whether to go on,
    and the text that it names, if it names one."""

    settings: Settings
    folder: Path
    resume: bool
    text: Path | None


def _read_request(argv: Sequence[str] | None) -> Request:
    parser = cli.ArgumentParser(
        prog="python -m pyllmc.train",
        description="Train a GPT on text. Without arguments: a small one on Shakespeare, in about two minutes. "
        "The run's folder gets its checkpoint, its tokenizer, main.log and loss.png; an earlier run that is there "
        "moves to FOLDER.1. Ctrl-C saves a checkpoint and stops.",
        epilog="Exit codes: 0 the run is complete; 1 or 2 an error; 130, 143 or 129 stopped by Ctrl-C, SIGTERM or "
        "SIGHUP, after the step was finished and saved: the same with --resume goes on.",
    )
    parser.add_argument("--recipe", metavar="NAME|FILE.toml", help="settings to start from; options override them")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder, from its checkpoint")
    base = default_settings()
    add_options(parser, base)
    options = vars(parser.parse_args(argv))
    recipe, resume = options.pop("recipe"), options.pop("resume")
    given = {name: value for name, value in options.items() if value is not None}
    asked = (load_recipe(recipe) if recipe else {}) | given
    folder = Path(asked.get("out") or Path("out", run_name(recipe or DEFAULT_RECIPE, given.get("text"))))
    if resume:
        if not runs.has_run(folder):
            raise ValueError(f"{folder}: no run is there to resume; name its folder with --out, or leave out --resume")
        base |= load_recipe(str(folder / RECIPE_FILE))
        check_resumable(base, asked, folder)
    text = Path(asked["text"]) if asked.get("text") else None
    return Request(Settings(**base | asked), folder, resume, text)


def _check_needs(settings: Settings, vocab_size: int, folder: Path, text_bytes: int = 0) -> GPT2Config:
    """The model's geometry, if it is one, and if memory and disk hold what training it takes; else ValueError."""
    config = GPT2Config(settings.layers, settings.heads, settings.channels, vocab_size, settings.context)
    needed, free = config.training_bytes(settings.batch_size, settings.context), hardware.free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"training this model needs {format_bytes(needed)} of memory, {format_bytes(free)} is free; reduce "
            "--layers, --channels, --context or --batch-size"
        )
    # Parameters, m and v in each checkpoint; a new one is complete before an old one goes.
    copies = settings.keep_checkpoints + 1
    if not settings.keep_checkpoints:
        copies = 1 + (settings.max_steps // settings.checkpoint_every if settings.checkpoint_every else 0)
    needed, free = copies * 12 * config.num_parameters_padded + 2 * text_bytes, hardware.free_disk(folder)
    if free is not None and needed > free:
        raise ValueError(
            f"{folder}: the run needs {format_bytes(needed)} of disk, {format_bytes(free)} is free; choose another "
            "--out, a smaller model or fewer --keep-checkpoints"
        )
    return config


def _check_same_text(text: Path, folder: Path, min_tokens: int) -> None:
    """ValueError if `text` is not what the run in `folder` was trained on."""
    with tempfile.TemporaryDirectory(prefix=".text-", dir=folder) as again:
        prepare_text(text, again, min_tokens=min_tokens)
        names = (TOKENIZER_FILE, TRAIN_FILE, VAL_FILE)
        if not all(filecmp.cmp(Path(again, name), folder / name, shallow=False) for name in names):
            raise ValueError(
                f"{folder}: this run has another text than {text} is now; resume it without --text, or start another "
                "run with another --out"
            )


def _prepare(request: Request, console: Console) -> Run:
    """Tokens, model and optimizer: new, or from the newest checkpoint. The folder is claimed."""
    settings, folder = request.settings, request.folder
    B, T = settings.batch_size, settings.context
    min_tokens = B * T + 1
    if not request.resume:
        prepare_text(request.text or SHAKESPEARE, folder, min_tokens=min_tokens)
    elif request.text:
        _check_same_text(request.text, folder, min_tokens)
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    free_memory = hardware.free_memory()
    config = _check_needs(settings, tokenizer.vocab_size, folder)
    checkpoint = find_latest(folder) if request.resume else None
    if checkpoint is None:
        if request.resume and list_steps(folder):
            raise ValueError(
                f"{folder}: no checkpoint is whole; put one back from a copy, or start anew without --resume"
            )
        model = GPT2(config, settings.seed)
    else:
        model = GPT2.from_checkpoint(checkpoint.model_path)
        if model.config != config:
            raise ValueError(f"{checkpoint.model_path}: is a {model.config}, the settings beside it say {config}")
    optimizer = AdamW(model, settings.learning_rate, settings.beta1, settings.beta2, weight_decay=settings.weight_decay)
    train_loader = DataLoader(
        folder / TRAIN_FILE, B, T, shuffle=True, scatter_rows=True, seed=settings.seed, vocab_size=config.vocab_size
    )
    val_loader = DataLoader(folder / VAL_FILE, B, T, vocab_size=config.vocab_size)
    if checkpoint is not None:
        load_checkpoint(checkpoint, optimizer, train_loader)
        if checkpoint.step > settings.max_steps:
            raise ValueError(f"{checkpoint.model_path}: is beyond the run's last step, {settings.max_steps}")
    # Another process may take its share for a moment: of two measurements the better one is the machine's.
    peak = hardware.peak_gflops(0.1)
    pace = _measure_pace(settings, model, val_loader)
    peak = max(peak, hardware.peak_gflops(0.1))
    return Run(
        settings, folder, tokenizer, train_loader, val_loader, model, optimizer, console, pace, peak, free_memory,
        start=checkpoint.step if checkpoint else 0,
    )  # fmt: skip


def _measure_pace(settings: Settings, model: GPT2, val_loader: DataLoader) -> Pace:
    """The pace to expect, from a forward and backward on held-out text, which leave no trace in the run."""
    batch = val_loader.next_batch()
    times = []
    # The first time also allocates; a large model's step takes long enough to be the measure itself.
    while len(times) < 5 and sum(times) < 3.0:
        begin = time.perf_counter()
        float(model.forward_backward(*batch))
        model.zero_grad()
        times.append(time.perf_counter() - begin)
    B, T = settings.batch_size, settings.context
    pace = Pace(settings.max_steps, B * T, model.config.flops_per_token(T), min(times))
    # Validation is all forward, a third of a step.
    pace.pause("validation", settings.val_every, _num_val_batches(settings, val_loader) * min(times) / 3)
    return pace


def _num_val_batches(settings: Settings, val_loader: DataLoader) -> int:
    """Batches in one validation: those asked for, at most all there are."""
    return min(settings.val_batches or val_loader.num_batches, val_loader.num_batches)


def _print_plan(run: Run) -> None:
    """What will be done, on what, and how long it will take."""
    settings, config, pace = run.settings, run.model.config, run.pace
    ops, B, T, N = backend("cpu"), settings.batch_size, settings.context, settings.max_steps
    tokens, held_out, different = run.train_loader.num_tokens, run.val_loader.num_tokens, config.vocab_size - 1
    free, threads = run.free_memory, ops.get_num_threads()
    rows = {
        "text": f"{settings.text or 'nine plays of Shakespeare, built in'}: {tokens:,} characters to train on, "
        f"{held_out:,} held out, {different} different ones",
        "model": f"{config.num_parameters:,} parameters (layers {config.num_layers}, heads {config.num_heads}, "
        f"channels {config.channels}, context {T})",
        "steps": f"{N:,} of {B} x {T} characters, {N * B * T / tokens:.2g} times the text; "
        f"learning rate {settings.learning_rate:g}, {settings.schedule}; seed {settings.seed}",
        "machine": f"{hardware.cpu_name()}, {threads} thread{'s' * (threads > 1)}, {ops.NAME}, "
        f"peak {run.peak:.0f} GFLOP/s (float32, measured)",
        "memory": f"{format_bytes(config.training_bytes(B, T))} needed"
        + (f" of {format_bytes(free)} free" if free is not None else ""),
        "speed": f"about {format_count(pace.tokens_per_second)} characters/s, {format_share(pace.gflops / run.peak)} "
        f"of the peak (6 N + 6 L C T = {pace.flops_per_token / 1e6:.2f} MFLOP for each)",
        "time": f"about {format_duration(pace.seconds_left(run.start))}",
        "folder": str(run.folder),
    }
    if run.start:
        rows["resumed"] = f"{run.start:,} steps are done"
    run.console.line(cli.printable(aligned(list(rows.items())), keep="\n"))
    run.console.line()


# ---- the loop -------------------------------------------------------------------------------------------------------


def _due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and after the last one, happens before update `step`."""
    return step == last or (every > 0 and step % every == 0)


def _loop(run: Run, log: MainLog, stop: Stop) -> int:
    """Trains to the end, or to the step in which it is asked to stop; returns how many updates are done, and saved."""
    settings, console, last = run.settings, run.console, run.settings.max_steps
    step, saved = run.start, run.start or None

    def stopping() -> bool:
        return stop.signal is not None or console.lost is not None

    while True:
        if _due(step, settings.val_every, last) and not stopping():
            _validate(run, step, log, stopping)
        if settings.sample_every and _due(step, settings.sample_every, last) and not stopping():
            _show_sample(run, step, stopping)
        ends = step == last or stopping()
        # After a skipped update the parameters are suspect: the checkpoint from before it stays the newest for now.
        due = step > 0 and _due(step, settings.checkpoint_every, last) and not run.skipped_in_a_row
        if step == last and not stopping():
            _check_end(run)
        if step != saved and (due or ends):
            _save(run, step)
            saved = step
        if ends:
            return step
        _update(run, step, log)
        step += 1


def _validate(run: Run, step: int, log: MainLog, stopping: Callable[[], bool]) -> None:
    """The mean loss over the held-out batches; nothing if the run is asked to stop meanwhile."""
    begin = time.perf_counter()
    run.val_loader.reset()
    losses = []
    for _ in range(_num_val_batches(run.settings, run.val_loader)):
        if stopping():
            return
        losses.append(float(run.model.loss(*run.val_loader.next_batch())))
    run.validation_loss = math.fsum(losses) / len(losses)
    log.validation(step, run.validation_loss)
    run.pace.pause("validation", run.settings.val_every, time.perf_counter() - begin)
    run.console.line(f"{run.console.label(step)} | validation loss {run.validation_loss:.4f}")


def _show_sample(run: Run, step: int, stopping: Callable[[], bool]) -> None:
    """Text from the model as it is now, as it comes; with the same coins each time, so that only the model differs."""
    begin = time.perf_counter()
    pieces = stream_text(
        run.model, run.tokenizer, max_new_tokens=run.settings.sample_length, temperature=SAMPLE_TEMPERATURE
    )
    with run.console.open_text():
        run.console.write(f"{run.console.label(step)} | sample\n\n")
        for piece in pieces:
            if stopping():
                break
            run.console.write(piece)
        run.console.write("\n\n")
    run.pace.pause("sample", run.settings.sample_every, time.perf_counter() - begin)


def _check_end(run: Run) -> None:
    """ValueError if what the last update left is no trained model; before it is saved."""
    problem = None
    if run.skipped_in_a_row:
        problem = "the loss or gradient of the last update was not finite"
    elif not math.isfinite(run.validation_loss):
        problem = f"the validation loss is {run.validation_loss:g}"
    if problem:
        raise ValueError(f"training diverged: {problem}; {_what_is_left(run)}")


def _what_is_left(run: Run) -> str:
    return f"what {run.folder} holds is from before; start again with a lower --learning-rate"


def _save(run: Run, step: int) -> None:
    """A checkpoint, if the parameters are finite; else ValueError, and the older ones stay."""
    begin = time.perf_counter()
    norm = float(run.model.ops.global_norm(run.model.flat_params))
    if not math.isfinite(norm):
        raise ValueError(
            f"step {step}: training diverged: the norm of the parameters is {norm:g}; {_what_is_left(run)}"
        )
    if step in list_steps(run.folder):
        # The checkpoint that the run came from is what would be saved now. Any other was damaged, see below.
        if step == run.start:
            return
        Checkpoint(run.folder, step).remove()
    checkpoint = save_checkpoint(run.folder, step, run.model, run.optimizer, run.train_loader)
    # A later one was damaged, or the run would have gone on from it.
    for later in list_steps(run.folder):
        if later > step:
            Checkpoint(run.folder, later).remove()
    if not run.skipped_in_a_row:
        remove_old_checkpoints(run.folder, run.settings.keep_checkpoints)
    run.pace.pause("checkpoint", run.settings.checkpoint_every, time.perf_counter() - begin)
    run.console.line(f"{run.console.label(step)} | checkpoint {checkpoint.model_path}")


def _update(run: Run, step: int, log: MainLog) -> None:
    """Update number `step`: one batch, its gradients, their norm, AdamW. A loss or norm that is not finite leaves the
    parameters as they are; ValueError after too many of them in a row."""
    settings, console = run.settings, run.console
    begin = time.perf_counter()
    run.model.zero_grad()
    loss = float(run.model.forward_backward(*run.train_loader.next_batch()))
    norm = grad_norm(run.model)
    rate = learning_rate(
        settings.schedule,
        step,
        peak=settings.learning_rate,
        warmup=settings.warmup,
        total=settings.max_steps,
        final_fraction=settings.final_lr_fraction,
    )
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        run.optimizer.step(rate, grad_scale=clip_scale(norm, settings.grad_clip) if settings.grad_clip else 1.0)
    else:
        # AdamW's time goes on, as in llm.c: it is that of the step, not of the updates made.
        run.optimizer.step_count += 1
    seconds = time.perf_counter() - begin
    run.skipped_in_a_row = 0 if finite else run.skipped_in_a_row + 1
    log.train(step, loss, rate, norm)
    run.pace.step(seconds)
    console.step(step + 1, loss, norm, rate, seconds, run.pace, run.peak)
    if not finite:
        console.line(f"{console.label(step + 1)} | update skipped: loss {loss:g}, gradient norm {norm:g}")
    if run.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
        raise ValueError(
            f"step {step + 1}: loss or gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, so training "
            f"stops; {_what_is_left(run)}"
        )


# ---- the program ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    request = _read_request(argv)
    settings, folder = request.settings, request.folder
    hardware.set_threads(settings.threads)
    text_bytes = 0 if request.resume else (request.text or SHAKESPEARE).stat().st_size
    # Before the text is read its vocabulary is not known, but what cannot fit even with the smallest never will.
    _check_needs(settings, 1, folder, text_bytes)
    console = Console(settings.max_steps, settings.log_every)
    with runs.claimed(folder, request.resume) as moved:
        if moved:
            console.line(f"the run that was in {folder} is now in {os.path.relpath(moved)}\n")
        run = _prepare(request, console)
        _print_plan(run)
        if not request.resume:
            save_recipe(settings, folder / RECIPE_FILE)
        return _train(run, request.resume)


def _train(run: Run, resume: bool) -> int:
    """The loop with its log, its bar and its signals, and what is said and drawn at the end; returns the exit code."""
    console, folder = run.console, run.folder
    begin = time.perf_counter()
    with Stop() as stop, contextlib.closing(MainLog(folder / LOG_FILE, run.start if resume else None)) as log:
        console.start(run.start)
        with contextlib.closing(console):
            done = _loop(run, log, stop)
    if console.lost is not None and stop.signal is None:
        raise console.lost
    if stop.signal is not None:
        console.line(f"\nstopped after step {done}; to go on:  {_command('train', '--out', folder, '--resume')}")
        return stop.exit_code
    seconds = format_duration(time.perf_counter() - begin)
    console.line(f"done in {seconds}: validation loss {run.validation_loss:.4f} nats per character")
    try:
        plot_losses(folder)
    except ImportError as error:
        console.line(f"no {PICTURE_FILE}: {error}; after pip install matplotlib:  {_command('plot', folder)}")
    console.line(f"{folder}: {', '.join(runs.run_files(folder))}")
    console.line(f"to continue text with this model:  {_command('generate', '--checkpoint', folder)}")
    return 0


def _command(program: str, *arguments) -> str:
    """The line a user types for one of pyllmc's programs."""
    return shlex.join(["python", "-m", f"pyllmc.{program}", *map(str, arguments)])


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
