"""`python -m pyllmc.train`: text in, a trained model out. Without arguments a small character GPT on Shakespeare.

Puts the pieces together: settings (settings.py), the run's folder (runs.py), data and model (prepare.py), and the loop,
whose order is llm.c's: for step = 0 .. N validate, measure HellaSwag, sample, save, train; the last round does all but
the last. Checkpoint number S has S updates behind it, and `--resume` goes on from it bit for bit.

The exit codes are those of cli.py; a run that is stopped by a signal, or whose reader goes away, has saved before it
ends. docs/long_runs.md is about runs that are stopped, killed and gone on with.
"""

import contextlib
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import cli, hardware, runs
from .checkpoint import list_steps, remove_old_checkpoints, save_checkpoint
from .curves import read_runs
from .datasets import SHAKESPEARE
from .figures import format_duration
from .generate import stream_text
from .logs import Update
from .optimizer import clip_scale, grad_norm
from .plot import plot_runs
from .prepare import (
    Request,
    Run,
    check_needs,
    check_settings,
    existing_config,
    new_config,
    prepare,
    print_plan,
    refuse_several_processes,
)
from .record import Record
from .schedules import learning_rate
from .settings import (
    RECIPE_FILE,
    Settings,
    add_options,
    base_settings,
    check_resumable,
    load_recipe,
    run_name,
)


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


# ---- what is asked for ----------------------------------------------------------------------------------------------


def _read_request(argv: Sequence[str] | None) -> Request:
    parser = cli.ArgumentParser(
        prog="python -m pyllmc.train",
        description="Train a GPT on text. Without arguments: a small one on Shakespeare, in about two minutes. "
        "The run's folder gets its checkpoint, its tokenizer, main.log and loss.png; an earlier run that is there "
        "moves to FOLDER.1. Ctrl-C saves a checkpoint and stops. The defaults shown are those of such a run; with "
        "--init or --train-data they are llm.c's.",
        epilog="Exit codes: 0 the run is complete; 1 or 2 an error (on a full disk the last checkpoint stays); 130, "
        "143 or 129 stopped by Ctrl-C, SIGTERM or SIGHUP, 141 the reader of the output went away, all after the step "
        "was finished and saved. Then, and after the process was killed (137), the same with --resume goes on.",
    )
    parser.add_argument("--recipe", metavar="NAME|FILE.toml", help="settings to start from; options override them")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder, from its checkpoint")
    add_options(parser, base_settings({}))
    options = vars(parser.parse_args(argv))
    recipe, resume = options.pop("recipe"), options.pop("resume")
    given = {name: value for name, value in options.items() if value is not None}
    asked = (load_recipe(recipe) if recipe else {}) | given
    folder = Path(asked.get("out") or Path("out", run_name(recipe, asked if not recipe else given)))
    base = base_settings(asked)
    moved = frozenset()
    if resume:
        if not runs.has_run(folder):
            raise ValueError(f"{folder}: no run is there to resume; name its folder with --out, or leave out --resume")
        recorded = load_recipe(str(folder / RECIPE_FILE))
        base = base_settings(recorded) | recorded
        moved = check_resumable(base, asked, folder)
    return Request(Settings(**base | asked), folder, resume, frozenset(asked), moved)


# ---- the loop -------------------------------------------------------------------------------------------------------


def _due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and after the last one, happens before update `step`."""
    return step == last or (every > 0 and step % every == 0)


def _loop(run: Run, record: Record, stop: Stop, claim: runs.Claim) -> int:
    """Trains to the end, or to the step in which it is asked to stop; returns how many updates are done, and saved."""
    settings, console, last = run.settings, run.console, run.num_steps
    step, saved = run.start, run.start if run.start in list_steps(run.folder) else None

    def stopping() -> bool:
        return stop.signal is not None or console.lost is not None

    while True:
        if run.val_loader and _due(step, settings.val_every, last) and not stopping():
            _validate(run, step, record, stopping)
        # As with llm.c not before the first update, unlike validation.
        if run.hellaswag and step > 0 and _due(step, settings.val_every, last) and not stopping():
            _measure_hellaswag(run, step, record, stopping)
        if settings.sample_every and _due(step, settings.sample_every, last) and not stopping():
            _show_sample(run, step, stopping)
        ends = step == last or stopping()
        # After a skipped update the parameters are suspect: the checkpoint from before it stays the newest for now.
        due = step > 0 and _due(step, settings.checkpoint_every, last) and not run.guard.in_a_row
        if step == last and not stopping():
            _check_end(run)
        if step != saved and (due or ends) and settings.checkpoint_every >= 0:
            record.sync()
            _save(run, step, claim)
            saved = step
        if ends:
            return step
        _update(run, step, record)
        step += 1


def _validate(run: Run, step: int, record: Record, stopping: Callable[[], bool]) -> None:
    """The mean loss over the held-out batches; nothing if the run is asked to stop meanwhile."""
    begin = time.perf_counter()
    run.val_loader.reset()
    losses = []
    for _ in range(run.num_val_batches):
        if stopping():
            return
        losses.append(run.model.loss(*run.val_loader.next_batch()))
    run.validation_loss = math.fsum(map(float, losses)) / len(losses)
    record.validation(step, run.validation_loss)
    run.pace.pause("validation", run.settings.val_every, time.perf_counter() - begin)
    run.console.line(f"{run.console.label(step)} | validation loss {run.validation_loss:.4f}")


def _measure_hellaswag(run: Run, step: int, record: Record, stopping: Callable[[], bool]) -> None:
    """The share of HellaSwag that the model gets right; nothing if the run is asked to stop meanwhile."""
    begin = time.perf_counter()
    done, right, total = 0, 0, run.hellaswag.num_examples
    for answered, right_ones in run.hellaswag.answer(run.model):
        if stopping():
            return
        done, right = done + answered, right + right_ones
        run.console.activity(f"HellaSwag {done}/{total}")
    record.evaluation(step, right / total)
    run.pace.pause("HellaSwag", run.settings.val_every, time.perf_counter() - begin)
    run.console.line(f"{run.console.label(step)} | HellaSwag {right}/{total} = {right / total:.4f}")


def _show_sample(run: Run, step: int, stopping: Callable[[], bool]) -> None:
    """Text from the model as it is now, as it comes; with the same coins each time, so that only the model differs."""
    begin = time.perf_counter()
    pieces = stream_text(
        run.model,
        run.tokenizer,
        max_new_tokens=run.settings.sample_length,
        temperature=run.settings.sample_temperature,
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
    if run.guard.diverged:
        problem = "the loss or gradient of the last update was not finite"
    elif run.val_loader and not math.isfinite(run.validation_loss):
        problem = f"the validation loss is {run.validation_loss:g}"
    if problem:
        raise ValueError(f"training diverged: {problem}; {_what_is_left(run)}")


def _what_is_left(run: Run) -> str:
    return f"what {run.folder} holds is from before; start again with a lower --learning-rate"


def _save(run: Run, step: int, claim: runs.Claim) -> None:
    """A checkpoint, if the parameters are finite and the folder is still the run's; else ValueError, and the older ones
    stay."""
    begin = time.perf_counter()
    norm = float(run.model.ops.global_norm(run.model.flat_params))
    if not math.isfinite(norm):
        raise ValueError(
            f"step {step}: training diverged: the norm of the parameters is {norm:g}; {_what_is_left(run)}"
        )
    claim.check()
    checkpoint = save_checkpoint(run.folder, step, run.model, run.optimizer, run.train_loader, run.extra)
    if not run.guard.in_a_row:
        # A large model takes its time to write.
        claim.check()
        remove_old_checkpoints(run.folder, run.settings.keep_checkpoints, run.settings.keep_every)
    run.pace.pause("checkpoint", run.settings.checkpoint_every, time.perf_counter() - begin)
    run.console.line(f"{run.console.label(step)} | checkpoint {checkpoint.model_path}")


def _update(run: Run, step: int, record: Record) -> None:
    """Update number `step`: its batches, their gradients, the norm, AdamW. It is skipped, and the parameters stay as
    they are, for a loss or norm that is not finite or stands out; ValueError after too many of these in a row."""
    settings, console = run.settings, run.console
    begin = time.perf_counter()
    if settings.overfit:
        run.train_loader.reset()
    run.model.zero_grad()
    share = 1.0 / run.batches_per_step
    losses = [
        run.model.forward_backward(*run.train_loader.next_batch(), loss_scale=share)
        for _ in range(run.batches_per_step)
    ]
    # The norm is what a GPU is waited for, once in a step; the losses are there then.
    norm = grad_norm(run.model)
    loss = math.fsum(map(float, losses)) * share
    rate = learning_rate(
        settings.schedule,
        step,
        peak=settings.learning_rate,
        warmup=settings.warmup,
        total=run.num_steps,
        final_fraction=settings.final_lr_fraction,
    )
    verdict = run.guard.judge(loss, norm)
    if verdict.reason:
        # AdamW's time goes on, as in llm.c: it is that of the step, not of the updates made.
        run.optimizer.step_count += 1
    else:
        run.optimizer.step(rate, grad_scale=clip_scale(norm, settings.grad_clip) if settings.grad_clip else 1.0)
    update = Update(loss, rate, norm, run.pace.tokens_per_step, time.perf_counter() - begin)
    record.train(step, update)
    run.pace.step(update.seconds)
    console.step(step + 1, update, run.pace, verdict.loss_z, verdict.norm_z)
    if verdict.reason:
        console.line(f"{console.label(step + 1)} | update skipped: {verdict.reason}")
    if run.guard.in_a_row >= settings.max_skipped:
        raise ValueError(
            f"step {step + 1}: the updates of {run.guard.in_a_row} steps in a row were skipped (this one: "
            f"{verdict.reason}), so training stops; {_what_is_left(run)}"
        )


# ---- the program ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    return train(_read_request(argv))


def train(request: Request) -> int:
    """The whole run that is asked for; returns the exit code."""
    refuse_several_processes(os.environ)
    check_settings(request)
    settings, folder = request.settings, request.folder
    hardware.set_threads(settings.threads)
    if not request.resume:
        # Before the text is read its vocabulary is not known, but what cannot fit even with the smallest never will.
        text_bytes = 0 if settings.train_data else Path(settings.text or SHAKESPEARE).stat().st_size
        check_needs(request, existing_config(settings) or new_config(settings, 1), text_bytes)
    with runs.claimed(folder, request.resume) as claim:
        if claim.moved:
            print(f"the run that was in {folder} is now in {os.path.relpath(claim.moved)}\n", flush=True)
        ready = prepare(request)
        print_plan(ready)
        claim.begin(settings)
        try:
            return _train(ready, request, claim)
        except OSError as error:
            # What is not there any more cannot be written either.
            claim.check()
            if error.errno and settings.checkpoint_every >= 0:
                raise _with_what_is_kept(error, folder) from error
            raise


def _with_what_is_kept(error: OSError, folder: Path) -> OSError:
    """The error, a full disk for example, with what there is to go on from once its cause is gone."""
    steps = list_steps(folder)
    kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint was saved yet"
    to_go_on = _command("train", "--out", folder, "--resume")
    return OSError(error.errno, f"{error.strerror}; {kept}; when this is mended:  {to_go_on}", error.filename)


def _train(run: Run, request: Request, claim: runs.Claim) -> int:
    """The loop with its record, its bar and its signals, and what is said and drawn at its end; the exit code."""
    console, folder = run.console, run.folder
    begin = time.perf_counter()
    resume_step = run.start if request.resume else None
    with Stop() as stop, contextlib.closing(Record(folder, resume_step, run.settings.tensorboard)) as record:
        console.start(run.start)
        with contextlib.closing(console):
            done = _loop(run, record, stop, claim)
    if console.lost is not None and stop.signal is None:
        raise console.lost
    keeps, skipped = run.settings.checkpoint_every >= 0, run.guard.skipped
    skips = f"; {skipped:,} update{'s' * (skipped > 1)} skipped" if skipped else ""
    if stop.signal is not None:
        to_go_on = f"to go on:  {_command('train', '--out', folder, '--resume')}" if keeps else "nothing was saved"
        console.line(f"\nstopped after step {done}{skips}; {to_go_on}")
        return stop.exit_code
    seconds = format_duration(time.perf_counter() - begin)
    losses = f": validation loss {run.validation_loss:.4f} nats per token" if run.val_loader else ""
    console.line(f"done in {seconds}{losses}{skips}")
    if request.temporary:
        return 0
    claim.check()
    try:
        plot_runs(read_runs([folder]))
    except ImportError as error:
        console.line(f"no picture: {error}; after that:  {_command('plot', folder)}")
    console.line(f"{folder}: {', '.join(runs.run_files(folder))}")
    if keeps:
        console.line(f"to continue text with this model:  {_command('generate', '--checkpoint', folder)}")
    return 0


def _command(program: str, *arguments) -> str:
    """The line a user types for one of pyllmc's programs."""
    return shlex.join(["python", "-m", f"pyllmc.{program}", *map(str, arguments)])


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
