"""`python -m pyllmc.train`: text in, a trained model out. Without arguments a small character GPT on Shakespeare.

Puts the pieces together: settings (settings.py), the run's folder (runs.py), data and model (prepare.py), and the loop,
whose order is llm.c's: for step = 0 .. N validate, measure HellaSwag, sample, save, train; the last round does all but
the last. Checkpoint number S has S updates behind it, and `--resume` goes on from it bit for bit.

Several processes (group.py) are that many times more batches in a step. Rank 0 alone has the folder, prints, writes
the logs and samples; all decide from what they have gathered, so they decide the same; and of an error the rank tells
whose own it is. distributed.py finds the others.

The exit codes are those of cli.py; a run that is stopped by a signal, or whose reader goes away, has saved before it
ends. docs/long_runs.md is about runs that are stopped, killed and gone on with.
"""

import contextlib
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from . import cli, hardware, runs
from .checkpoint import list_steps, remove_old_checkpoints, save_checkpoint
from .console import Console
from .curves import read_runs
from .datasets import SHAKESPEARE
from .distributed import before_joining, check_same, connect, naming_rank, telling_others, together
from .figures import format_duration
from .generate import stream_text
from .group import Group, PeerError
from .logs import Update
from .needs import check_needs
from .optimizer import clip_scale, grad_norm
from .plan import print_plan
from .plot import plot_runs
from .prepare import (
    Request,
    Run,
    check_settings,
    describe_request,
    existing_config,
    new_config,
    prepare,
)
from .record import NoRecord, Record
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
from .sharding import block_views


class Stop:
    """While the block runs, SIGINT, SIGTERM and SIGHUP only ask to stop, once; a second one acts as usual. So does an
    output that goes away, as SIGPIPE.

    `wish` is the signal that this process got, `signal` the one that all ranks have agreed on.
    """

    # Seconds after the first signal in which others are the same: a launcher may pass on what the terminal sent too.
    ONCE = 1.0

    def __init__(self, group: Group, console: Console):
        self.signal: int | None = None
        self._group, self._console, self._got, self._since = group, console, None, 0.0
        self._before: dict[int, object] = {}

    @property
    def wish(self) -> int | None:
        return signal.SIGPIPE if self._console.lost is not None and self._got is None else self._got

    def agree(self, wishes: Sequence[int | None]) -> bool:
        """Whether to stop: if any rank wishes it, as all of them have gathered."""
        self.signal = next((wish for wish in wishes if wish is not None), None)
        return self.signal is not None

    def __enter__(self) -> "Stop":
        # Only the main thread gets signals; what the parent process had ignored (nohup) stays ignored.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame) -> None:
        if self._got is not None and time.monotonic() - self._since < self.ONCE:
            return
        if self._got is not None:
            self.__exit__()
            signal.raise_signal(number)
            return
        self._got, self._since = number, time.monotonic()
        # Not through sys.stderr, in the middle of whose work the signal may have come.
        if not self._console.silent:
            with contextlib.suppress(OSError):
                os.write(2, b"\nfinishing this step, then saving; the same again stops at once\n")
        if self._group.size == 1:
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
        "was finished and saved. Then, and after the process was killed (137), the same with --resume goes on. With "
        "several processes the output has to go to a file: a reader that goes away ends mpiexec itself.",
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


def _loop(run: Run, record: Record, stop: Stop, claim: runs.Claim | None) -> int:
    """Trains to the end, or to the step in which it is asked to stop; returns how many updates are done, and saved."""
    settings, last = run.settings, run.num_steps
    step, saved = run.start, run.start if run.resumed else None
    while True:
        if run.val_loader and _due(step, settings.val_every, last) and not stop.signal:
            _validate(run, step, record, stop)
        # As with llm.c not before the first update, unlike validation.
        if run.hellaswag and step > 0 and _due(step, settings.val_every, last) and not stop.signal:
            _measure_hellaswag(run, step, record, stop)
        if settings.sample_every and _due(step, settings.sample_every, last) and not stop.signal:
            _show_sample(run, step, stop)
        ends = step == last or stop.signal is not None
        # After a skipped update the parameters are suspect: the checkpoint from before it stays the newest for now.
        due = step > 0 and _due(step, settings.checkpoint_every, last) and not run.guard.in_a_row
        if step == last and not stop.signal:
            _check_end(run)
        if step != saved and (due or ends) and settings.checkpoint_every >= 0:
            record.sync()
            _save(run, step, claim)
            saved = step
        if ends:
            return step
        _train_step(run, step, record, stop)
        step += 1


def _validate(run: Run, step: int, record: Record, stop: Stop) -> None:
    """The mean loss over the held-out batches, which the ranks share in turn; nothing if the run is asked to stop
    meanwhile."""
    begin, group = time.perf_counter(), run.group
    group.doing = f"the validation before step {step + 1}"
    run.val_loader.reset()
    losses = []
    for first in range(0, run.num_val_batches, group.size):
        loss = None
        for number in range(first, min(first + group.size, run.num_val_batches)):
            batch = run.val_loader.next_batch()
            if number == first + group.rank:
                loss = float(run.model.loss(*batch))
        theirs, wishes = zip(*group.gather([loss, stop.wish]))
        losses += [loss for loss in theirs if loss is not None]
        if stop.agree(wishes):
            return
    run.validation_loss = math.fsum(losses) / len(losses)
    record.validation(step, run.validation_loss)
    run.pace.pause("validation", run.settings.val_every, time.perf_counter() - begin)
    run.console.line(f"{run.console.label(step)} | validation loss {run.validation_loss:.4f}")


def _measure_hellaswag(run: Run, step: int, record: Record, stop: Stop) -> None:
    """The share of HellaSwag that the model gets right; nothing if the run is asked to stop meanwhile."""
    begin, group = time.perf_counter(), run.group
    group.doing = f"HellaSwag before step {step + 1}"
    done, right, total = 0, 0, run.hellaswag.num_examples
    for answers in run.hellaswag.answer(run.model, group.rank, group.size):
        answered, right_ones, wishes = zip(*group.gather([*answers, stop.wish]))
        if stop.agree(wishes):
            return
        done, right = done + sum(answered), right + sum(right_ones)
        run.console.activity(f"HellaSwag {done}/{total}")
    record.evaluation(step, right / total)
    run.pace.pause("HellaSwag", run.settings.val_every, time.perf_counter() - begin)
    run.console.line(f"{run.console.label(step)} | HellaSwag {right}/{total} = {right / total:.4f}")


def _show_sample(run: Run, step: int, stop: Stop) -> None:
    """Text from the model as it is now, as it comes; with the same coins each time, so that only the model differs.
    The first rank writes it."""
    begin = time.perf_counter()
    run.group.doing = f"the text before step {step + 1}"
    if run.group.rank == 0:
        _write_sample(run, step, stop)
    stop.agree(run.group.gather(stop.wish, patient=True))
    run.pace.pause("sample", run.settings.sample_every, time.perf_counter() - begin)


def _write_sample(run: Run, step: int, stop: Stop) -> None:
    pieces = stream_text(
        run.model,
        run.tokenizer,
        max_new_tokens=run.settings.sample_length,
        temperature=run.settings.sample_temperature,
    )
    with run.console.open_text():
        run.console.write(f"{run.console.label(step)} | sample\n\n")
        try:
            for piece in pieces:
                if stop.wish is not None:
                    break
                run.console.write(piece)
        except ValueError as error:  # logits that are not finite: what is to be done, the check of the end will say
            run.console.write(f"no text: {error}")
        run.console.write("\n\n")


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
    steps = list_steps(run.folder)
    left = f"the checkpoint of step {steps[-1]} in {run.folder} is from before" if steps else "no checkpoint was saved"
    return f"{left}; start again with a lower --learning-rate"


def _save(run: Run, step: int, claim: runs.Claim | None) -> None:
    """A checkpoint, if the parameters are finite, the same on all ranks, and the folder is still the run's; else
    ValueError, and the older ones stay."""
    begin, group = time.perf_counter(), run.group
    group.doing = f"the checkpoint of step {step}"
    norm, *others = group.gather(float(run.model.ops.global_norm(run.model.flat_params)))
    if not math.isfinite(norm):
        raise ValueError(
            f"step {step}: training diverged: the norm of the parameters is {norm:g}; {_what_is_left(run)}"
        )
    for rank, other in enumerate(others, 1):
        if other != norm:
            raise ValueError(
                f"step {step}: the ranks have drifted apart: the norm of the parameters is {other!r} for "
                f"{group.label(rank)}, and {norm!r} for {group.label(0)}; the last checkpoint is from before"
            )
    if claim:
        claim.check()
    checkpoint = save_checkpoint(run.folder, step, run.model, run.optimizer, run.train_loader, run.extra, group)
    if not run.guard.in_a_row:
        # A large model takes its time to write.
        if claim:
            claim.check()
        remove_old_checkpoints(run.folder, run.settings.keep_checkpoints, run.settings.keep_every, group)
    run.pace.pause("checkpoint", run.settings.checkpoint_every, time.perf_counter() - begin)
    run.console.line(f"{run.console.label(step)} | checkpoint {checkpoint.model_path}")


def _train_step(run: Run, step: int, record: Record, stop: Stop) -> None:
    """Update number `step`: its batches, their gradients, the norm, AdamW. It is skipped, and the parameters stay as
    they are, for a loss or norm that is not finite or stands out; ValueError after too many of these in a row."""
    settings, console, group = run.settings, run.console, run.group
    begin = time.perf_counter()
    group.doing = f"the gradients of step {step + 1}"
    if settings.overfit:
        run.train_loader.reset()
    run.model.zero_grad()
    share = 1.0 / (run.batches_per_step * group.size)
    losses = []
    for number in range(1, run.batches_per_step + 1):
        # The ranks' gradients are added up while the last batch's are computed: each rank gets the sum of its own part.
        # One process has nobody to tell, so that a GPU can replay all that it recorded.
        ready = group.reduce_scatter if group.size > 1 and number == run.batches_per_step else None
        losses.append(run.model.forward_backward(*run.train_loader.next_batch(), loss_scale=share, ready=ready))
    group.wait()
    # The norm is what a GPU is waited for, once in a step; the losses are there then.
    own_norm = grad_norm(run.model, run.own_parts)
    sums, norms, wishes = zip(*group.gather([math.fsum(map(float, losses)), own_norm, stop.wish]))
    stop.agree(wishes)
    loss, norm = sum(sums) * share, math.hypot(*norms)
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
        scale = clip_scale(norm, settings.grad_clip) if settings.grad_clip else 1.0
        _update_parameters(run, rate, scale)
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


def _update_parameters(run: Run, learning_rate: float, grad_scale: float) -> None:
    """AdamW. Each rank updates its own parts and fetches the others'; or, without ZeRO, fetches the sums of the others'
    gradients, and updates everything."""
    group, model = run.group, run.model
    if group.size > 1 and not run.settings.zero:
        group.all_gather(block_views(model.flat_grads, model.config))
        group.wait()
    run.optimizer.step(learning_rate, grad_scale)
    if group.size > 1 and run.settings.zero:
        group.all_gather(block_views(model.flat_params, model.config))
        group.wait()


# ---- the program ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    with before_joining(os.environ):
        request = _read_request(argv)
    return train(request)


def train(request: Request) -> int:
    """The whole run that is asked for; returns the exit code."""
    group = connect(request.settings.device, request.settings.timeout, os.environ, request.place)
    try:
        with telling_others(group):
            return _train_in(group, request)
    except PeerError:
        return cli.EXIT_ERROR
    finally:
        if request.temporary:
            # Now: after the first rank that has left with an error, a launcher may kill the others.
            shutil.rmtree(request.folder.parent, ignore_errors=True)
        group.close()


def _train_in(group: Group, request: Request) -> int:
    """The run, as this rank sees it: the first one has the folder, and prepares what is in it."""
    settings, folder = request.settings, request.folder
    together(group, lambda: check_settings(request))
    asked = together(group, lambda: describe_request(request))
    together(group, lambda: check_same(group, asked))
    processors = [group.hosts[group.rank], hardware.processors()]
    sharing = group.gather(processors).count(processors)
    together(group, lambda: _check_start(group, request, sharing))
    with contextlib.ExitStack() as held:
        claim = together(group, lambda: held.enter_context(runs.claimed(folder, request.resume)), first_only=True)
        ready = prepare(request, group)
        if group.rank == 0:
            print_plan(ready)
        together(group, lambda: claim.begin(settings), first_only=True)
        if claim and claim.moved:
            print(f"the run that was in {folder} is now in {os.path.relpath(claim.moved)}\n", flush=True)
        holder = group.gather(claim and claim.holder)[0]
        together(group, lambda: claim or runs.begin_beside(folder, holder, settings))
        with naming_rank(group):
            try:
                return _train(ready, request, claim)
            except OSError as error:
                # What is not there any more cannot be written either.
                if claim:
                    claim.check()
                if error.errno and settings.checkpoint_every >= 0:
                    raise _with_what_is_kept(error, folder, claim) from error
                raise


def _check_start(group: Group, request: Request, sharing: int) -> None:
    """Sets the threads, `sharing` processes having the same processors; ValueError for what cannot work, before
    anything is made."""
    settings = request.settings
    hardware.set_threads(settings.threads, sharing)
    if not request.resume:
        # Before the text is read its vocabulary is not known, but what cannot fit even with the smallest never will.
        text_bytes = 0 if settings.train_data else Path(settings.text or SHAKESPEARE).stat().st_size
        config = existing_config(settings) or new_config(settings, 1)
        check_needs(settings, request.folder, config, group, text_bytes)


def _with_what_is_kept(error: OSError, folder: Path, claim: runs.Claim | None) -> OSError:
    """The error, a full disk for example, with what there is to go on from once its cause is gone."""
    steps = list_steps(folder)
    kept = "no checkpoint was saved yet" if claim else "the checkpoints that rank 0 has are kept"
    kept = f"the checkpoint of step {steps[-1]} is kept" if steps else kept
    to_go_on = _command("train", "--out", folder, "--resume")
    return OSError(error.errno, f"{error.strerror}; {kept}; when this is mended:  {to_go_on}", error.filename)


def _train(run: Run, request: Request, claim: runs.Claim | None) -> int:
    """The loop with its record, its bar and its signals, and what is said and drawn at its end; the exit code."""
    console, folder = run.console, run.folder
    begin = time.perf_counter()
    resume_step = run.start if request.resume else None
    record = Record(folder, resume_step, run.settings.tensorboard) if claim else NoRecord()
    with contextlib.closing(record), Stop(run.group, console) as stop:
        console.start(run.start)
        with contextlib.closing(console):
            done = _loop(run, record, stop, claim)
    if console.lost is not None and stop.signal in (None, signal.SIGPIPE):
        raise console.lost
    keeps, skipped = run.settings.checkpoint_every >= 0, run.guard.skipped
    skips = f"; {skipped:,} update{'s' * (skipped > 1)} skipped" if skipped else ""
    if stop.signal is not None:
        to_go_on = f"to go on:  {_command('train', '--out', folder, '--resume')}" if keeps else "nothing was saved"
        console.line(f"\nstopped after step {done}{skips}; {to_go_on}")
        # Of several processes a launcher ends the rest as soon as one has left.
        if claim and done and run.group.size == 1 and not request.temporary:
            _draw_what_was_done(folder, claim)
        return stop.exit_code
    seconds = format_duration(time.perf_counter() - begin)
    losses = f": validation loss {run.validation_loss:.4f} nats per token" if run.val_loader else ""
    console.line(f"done in {seconds}{losses}{skips}")
    run.group.doing = "the end of the run"
    if claim and not request.temporary:
        claim.check()
        _show_folder(run)
    run.group.gather(None, patient=True)
    return 0


def _show_folder(run: Run) -> None:
    """Draws the picture, and says what is in the folder of a run that is complete."""
    folder, console = run.folder, run.console
    try:
        plot_runs(read_runs([folder]))
    except (ImportError, OSError, ValueError) as error:  # the run is complete and saved all the same
        console.line(f"no picture: {error}; after that:  {_command('plot', folder)}")
    console.line(f"{folder}: {', '.join(runs.run_files(folder))}")
    if run.settings.checkpoint_every >= 0:
        console.line(f"to continue text with this model:  {_command('generate', '--checkpoint', folder)}")


def _draw_what_was_done(folder: Path, claim: runs.Claim) -> None:
    """The picture of a run that was stopped, if it can be had: all has been said, and the exit code is known. A second
    signal ends the drawing."""
    with contextlib.suppress(Exception, KeyboardInterrupt):
        claim.check()
        plot_runs(read_runs([folder]))


def _command(program: str, *arguments) -> str:
    """The line a user types for one of pyllmc's programs."""
    return shlex.join(["python", "-m", f"pyllmc.{program}", *map(str, arguments)])


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
