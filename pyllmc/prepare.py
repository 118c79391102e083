"""Getting a training run ready: from its settings to data, tokenizer, model and optimizer, checked together; the plan.

    settings                    where the tokens come from                 where the model comes from
    text, or nothing            made in the run's folder by datasets       new (layers, heads, channels, context)
    train_data, val_data        the files that the patterns match          init = a size: new; else that model

The tokenizer is the one beside the data or beside the model file, else GPT-2's; a new model on a text gets characters.

Called by train.py, whose loop works on the `Run` that comes out, and for its types by llmc.py; calls the modules of
the run's parts, datasets, devices.py and hardware.py.
"""

import filecmp
import math
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from . import devices, hardware, provenance
from .checkpoint import Checkpoint, find_latest, list_steps, load_checkpoint, remove_unfinished
from .cli import printable
from .config import GPT2Config
from .console import Console, Pace
from .dataloader import DataLoader, matching_files
from .datasets import SHAKESPEARE, prepare_text
from .datasets.common import TRAIN_FILE, VAL_FILE
from .events import require_tensorboard
from .figures import aligned, format_bytes, format_count, format_duration, format_share
from .hellaswag import HellaSwag
from .huggingface import HUB_NAMES, find_folder
from .model import GPT2, model_folder, model_format
from .optimizer import AdamW
from .outliers import WINDOW, Guard
from .runs import TEXT_AGAIN
from .settings import GEOMETRY, PATTERNS, Settings, flag, is_path
from .tensors import FLOAT_BYTES, MOST_RECOMPUTE
from .tokenizer import TOKENIZER_FILE, CharTokenizer, TokenIds, Tokenizer, find_tokenizer

# Started by one of these, a process has its number of processes in the environment: Open MPI, MPICH and its kin, SLURM
# (srun, not sbatch, whose script is one process), torchrun.
PROCESS_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE")


@dataclass(frozen=True)
class Request:
    """What a command line asks for: settings (those of a resumed run come from its folder), where, and whether to go
    on. `given` names the settings that it, or its recipe, gave; the rest are what they are by default; `moved` those
    whose path is not what it was when the resumed run began. A `temporary` folder goes away with the run."""

    settings: Settings
    folder: Path
    resume: bool
    given: frozenset[str]
    moved: frozenset[str] = frozenset()
    temporary: bool = False


@dataclass(kw_only=True)
class Run:
    """Everything that one training run works with. `free_memory` is what was free in bytes, where known, before the
    run took its share; `start` of the `num_steps` steps are done; what the checkpoints keep of it is `provenance`
    (provenance.py) and the state of `guard`."""

    settings: Settings
    folder: Path
    tokenizer: Tokenizer
    train_loader: DataLoader
    val_loader: DataLoader | None
    hellaswag: HellaSwag | None
    model: GPT2
    optimizer: AdamW
    guard: Guard
    batches_per_step: int
    num_steps: int
    start: int
    console: Console
    pace: Pace
    free_memory: int | None
    provenance: dict
    validation_loss: float = math.nan

    @property
    def num_val_batches(self) -> int:
        """Batches in one validation."""
        return _num_val_batches(self.settings, self.val_loader)

    @property
    def extra(self) -> dict:
        """What a checkpoint keeps beside model and training state: for a run that goes on, bit for bit."""
        return provenance.with_products(self.provenance, self.model.ops) | {"detector": self.guard.state_dict()}


# ---- checks before anything is read or written ----------------------------------------------------------------------


def refuse_several_processes(environment) -> None:
    """ValueError if this process is one of several that a launcher started: each would train the whole model alone."""
    for name in PROCESS_COUNTS:
        if (count := environment.get(name, "")).isdigit() and int(count) > 1:
            raise ValueError(
                f"started as one of {count} processes ({name}={count}), but training runs in one process; start it "
                "once, with --threads for the number of threads"
            )


def check_settings(request: Request) -> None:
    """ValueError for settings that contradict one another, ImportError for one whose package is missing."""
    settings = request.settings
    if settings.tensorboard:
        require_tensorboard()
    if settings.text and settings.train_data:
        raise ValueError("--text and --train-data both name what to train on; give one of them")
    if settings.val_data and not settings.train_data:
        raise ValueError("--val-data goes with --train-data; a text's own last tenth is held out")
    if settings.tokenizer and settings.train_data:
        raise ValueError("--tokenizer is for a text; token files have theirs, tokenizer.bin beside them")
    if settings.init and (useless := [name for name in GEOMETRY if name in request.given]):
        raise ValueError(f"{flag(useless[0])} is for a new model of your own; --init {settings.init} has its geometry")


def existing_config(settings: Settings, checkpoint: Checkpoint | None = None) -> GPT2Config | None:
    """The geometry of the model that `init` names, a resumed run's from its checkpoint; None for a model of the
    settings' own geometry. ValueError if there is no such model."""
    if not settings.init:
        return None
    if checkpoint is not None:
        return model_format(checkpoint.model_path).read_header(checkpoint.model_path).config
    path = _path_of_init(settings)
    if path is None:
        return GPT2Config.from_descriptor(settings.init)
    return model_format(path).read_header(path).config


def _path_of_init(settings: Settings) -> Path | None:
    """The model file or folder that `init` names, fetched if it is one of HUB_NAMES; None for new weights. ValueError
    if there is none."""
    if settings.init in HUB_NAMES:
        return find_folder(settings.init)
    if not is_path("init", settings.init):
        return None
    if not Path(settings.init).exists():
        raise ValueError(
            f"{settings.init}: there is no such model file or folder; name one, {', '.join(HUB_NAMES)}, or a size such "
            "as d12, with --init"
        )
    return Path(settings.init)


def new_config(settings: Settings, vocab_size: int) -> GPT2Config:
    """The geometry in the settings; ValueError if there is no such model."""
    return GPT2Config(settings.layers, settings.heads, settings.channels, vocab_size, settings.context)


def _batch_shape(settings: Settings, config: GPT2Config) -> tuple[int, int, int]:
    """B, T, and the batches in a step; ValueError if they do not fit the model or one another."""
    B, T = settings.batch_size, settings.seq_len or config.max_seq_len
    if T > config.max_seq_len:
        raise ValueError(f"--seq-len {T} is more than the model's context of {config.max_seq_len}")
    total = settings.total_batch_size or B * T
    if total % (B * T):
        raise ValueError(
            f"--total-batch-size {total} is no multiple of a batch of {B} x {T} = {B * T} tokens; change it, "
            "--batch-size or --seq-len"
        )
    return B, T, total // (B * T)


def op_set(settings: Settings) -> ModuleType:
    """What the settings let compute. ValueError, with the reason, if it cannot."""
    return devices.choose(settings.device, settings.dtype, autotune=True)


def _needed_memory(settings: Settings, config: GPT2Config) -> int:
    """Bytes that training takes where it computes, and HellaSwag, whose batches have other shapes."""
    B, T = settings.batch_size, settings.seq_len or config.max_seq_len
    number = devices.float_bytes(op_set(settings))
    needed = config.training_bytes(B, T, settings.recompute, number)
    return needed + (config.activation_bytes(B, T, training=False, float_bytes=number) if settings.hellaswag else 0)


def _fitting_batch(settings: Settings, config: GPT2Config, free: int) -> int:
    """The largest --batch-size below that of the settings with which training fits in `free` bytes; 1 if none does."""
    one, two = (_needed_memory(replace(settings, batch_size=B), config) for B in (1, 2))
    B = min(settings.batch_size - 1, 1 + (free - one) // (two - one))
    sequences = (settings.total_batch_size or 0) // (settings.seq_len or config.max_seq_len)
    while B > 1 and sequences % B:
        B -= 1
    return max(B, 1)


def _checkpoints_to_come(settings: Settings, folder: Path, start: int) -> int:
    """How many more checkpoints than now will be in the folder at most, of a run that has done `start` steps; a new one
    is complete before an old one goes."""
    every, last = settings.checkpoint_every, settings.max_steps
    if every < 0 or 0 < last <= start:
        return 0
    if settings.keep_checkpoints:
        # What an earlier run left moves out of the way, and stays.
        there = len(list_steps(folder)) if start else 0
        return max(1, settings.keep_checkpoints + 1 - there)
    return 1 + (max(0, last // every - start // every) if every else 0)


def check_needs(request: Request, config: GPT2Config, text_bytes: int = 0, start: int = 0) -> None:
    """ValueError if memory or disk cannot hold what training this model takes after `start` steps, or the batch does
    not fit the model."""
    settings, folder = request.settings, request.folder
    _batch_shape(settings, config)
    ops = op_set(settings)
    needed, free = _needed_memory(settings, config), devices.free_memory(ops)
    if free is not None and needed > free:
        smaller = "choose a smaller --init" if settings.init else "reduce --layers, --channels or --context"
        ways = []
        for name, value in (("recompute", MOST_RECOMPUTE), ("batch_size", _fitting_batch(settings, config, free))):
            then = _needed_memory(replace(settings, **{name: value}), config)
            if then <= free:
                ways.append(f"{flag(name)} {value} needs {format_bytes(then)}; or ")
        raise ValueError(
            f"training this model needs {format_bytes(needed)} of memory, {format_bytes(free)} is free"
            f"{' on the GPU' if devices.is_gpu(ops) else ''}; "
            f"{''.join(ways)}reduce --seq-len, or {smaller}"
        )
    # Parameters, m and v in each checkpoint, perhaps masters.
    needed = _checkpoints_to_come(settings, folder, start) * _checkpoint_bytes(ops, config) + 2 * text_bytes
    free = hardware.free_disk(folder)
    if free is not None and needed > free:
        raise ValueError(
            f"{folder}: the run needs {format_bytes(needed)} of disk, {format_bytes(free)} is free; choose another "
            "--out, a smaller model or fewer --keep-checkpoints"
        )


def _checkpoint_bytes(ops: ModuleType, config: GPT2Config) -> int:
    """Bytes of the parameters, m and v, and of masters where the parameters have less than float32."""
    number = devices.float_bytes(ops)
    return (number + (2 if number >= FLOAT_BYTES else 3) * FLOAT_BYTES) * config.num_parameters_padded


# ---- the parts of a run ---------------------------------------------------------------------------------------------


def _check_same_text(text: Path, folder: Path, tokenizer: str | Tokenizer, min_tokens: int) -> None:
    """ValueError if `text` is not what the run in `folder` was trained on."""
    with tempfile.TemporaryDirectory(prefix=TEXT_AGAIN, dir=folder) as again:
        prepare_text(text, again, tokenizer, min_tokens=min_tokens)
        names = (TOKENIZER_FILE, TRAIN_FILE, VAL_FILE)
        if not all(filecmp.cmp(Path(again, name), folder / name, shallow=False) for name in names):
            raise ValueError(
                f"{folder}: this run has another text than {text} is now; resume it without --text, or start another "
                "run with another --out"
            )


def _tokens_of_text(request: Request, config: GPT2Config | None) -> Tokenizer:
    """Makes the token files of the text in the run's folder, or checks those that are there; returns their tokenizer.
    `config` is the model's if it is there already, and has a vocabulary."""
    settings, folder = request.settings, request.folder
    tokenizer = settings.tokenizer or "char"
    if config is not None:
        folders = [folder] if request.resume else _folder_of_init(settings)
        tokenizer = find_tokenizer(folders, config.vocab_size)
        if settings.tokenizer not in ("", tokenizer.kind):
            raise ValueError(f"--tokenizer {settings.tokenizer}: the tokens of {settings.init} are {tokenizer.kind}")
    T = settings.seq_len or (config.max_seq_len if config else settings.context)
    min_tokens = settings.batch_size * T + 1
    if not request.resume:
        prepare_text(Path(settings.text or SHAKESPEARE), folder, tokenizer, min_tokens=min_tokens)
    elif "text" in request.given:
        _check_same_text(Path(settings.text), folder, tokenizer, min_tokens)
    return Tokenizer.load(folder / TOKENIZER_FILE)


def _folder_of_init(settings: Settings) -> list[Path]:
    """Where a tokenizer may lie beside the model, if `init` names a file or folder."""
    return [model_folder(settings.init)] if is_path("init", settings.init) else []


def _tokenizer_of_files(request: Request, config: GPT2Config | None) -> Tokenizer:
    """The tokenizer of token files: from the run's folder, beside the files, or beside the model file; else GPT-2's."""
    settings, folder = request.settings, request.folder
    folders = [folder, Path(matching_files(settings.train_data)[0]).parent, *_folder_of_init(settings)]
    tokenizer = find_tokenizer(folders, config.vocab_size if config else None)
    if not (folder / TOKENIZER_FILE).exists() and not isinstance(tokenizer, TokenIds):
        tokenizer.save(folder / TOKENIZER_FILE)
    return tokenizer


def _loaders(request: Request, config: GPT2Config, T: int) -> tuple[DataLoader, DataLoader | None]:
    """The batches to train on, and those to validate on if there are any."""
    settings, B = request.settings, request.settings.batch_size
    train, val = settings.train_data, settings.val_data
    if not train:
        train, val = request.folder / TRAIN_FILE, request.folder / VAL_FILE
    train_loader = DataLoader(
        train, B, T, shuffle=settings.shuffle and not settings.overfit, scatter_rows=settings.scatter_rows,
        seed=settings.seed, vocab_size=config.vocab_size,
    )  # fmt: skip
    return train_loader, DataLoader(val, B, T, vocab_size=config.vocab_size) if val else None


def _newest_checkpoint(request: Request) -> Checkpoint | None:
    """Where the run in the folder goes on; None if it has saved nothing yet. ValueError if all it saved is damaged, if
    it saves nothing, or if nothing tells that the files it has elsewhere now are those it began with."""
    settings, folder = request.settings, request.folder
    remove_unfinished(folder)
    checkpoint = find_latest(folder)
    if checkpoint is None and list_steps(folder):
        raise ValueError(
            f"{folder}: no checkpoint is whole; put one back from a copy, or start anew without --resume (with "
            "--keep-checkpoints 2 there is one more to go back to)"
        )
    if checkpoint is None and settings.checkpoint_every < 0:
        raise ValueError(
            f"{folder}: this run saves no checkpoints, so there is none to go on from; start anew without --resume"
        )
    for name in sorted(request.moved):
        # Of the model to start from nothing is needed any more; of the data provenance.py knows.
        if checkpoint is None or (name == "train_data" and "data" not in checkpoint.extra):
            raise ValueError(
                f"{folder}: this run began with another path than {flag(name)} {getattr(settings, name)}, and has no "
                "checkpoint that tells whether the same is there; put the files back where they were, or start another "
                "run with another --out"
            )
    if checkpoint is None:
        print(f"{folder}: no checkpoint yet: from the start", file=sys.stderr)
    return checkpoint


def _check_data_is_there(settings: Settings) -> None:
    """FileNotFoundError if the token files of a resumed run are not where they were."""
    for name in PATTERNS:
        if pattern := getattr(settings, name):
            try:
                matching_files(pattern)
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{pattern}: no such token file any more; if it was moved, say with {flag(name)} where it is now"
                ) from None


def _load_model(checkpoint: Checkpoint, config: GPT2Config, recompute: int, ops: ModuleType) -> GPT2:
    model = GPT2.from_checkpoint(checkpoint.model_path, recompute=recompute, ops=ops)
    if model.config != config:
        raise ValueError(f"{checkpoint.model_path}: is a {model.config}, the settings beside it say {config}")
    return model


def _load_extra(checkpoint: Checkpoint, extra: dict, guard: Guard) -> None:
    """Takes up what Run.extra keeps of a guard, where the checkpoint has it: llm.c's have nothing of the kind."""
    if "detector" in extra:
        try:
            guard.load_state_dict(extra["detector"])
        except ValueError as error:
            raise ValueError(f"{checkpoint.done_path}: detector: {error}") from None


def prepare(request: Request) -> Run:
    """Data, model and optimizer: new, or from the newest checkpoint in the folder, which the caller has claimed."""
    settings, folder = request.settings, request.folder
    checkpoint = None
    if request.resume:
        checkpoint = _newest_checkpoint(request)
        _check_data_is_there(settings)
    start = checkpoint.step if checkpoint else 0
    config = existing_config(settings, checkpoint)
    tokenizer = _tokenizer_of_files(request, config) if settings.train_data else _tokens_of_text(request, config)
    config = config or new_config(settings, tokenizer.vocab_size)
    ops = op_set(settings)
    free_memory = devices.free_memory(ops)
    check_needs(request, config, start=start)
    B, T, batches_per_step = _batch_shape(settings, config)
    train_loader, val_loader = _loaders(request, config, T)
    hellaswag = HellaSwag(settings.hellaswag, B, T, config.vocab_size) if settings.hellaswag else None
    num_steps = settings.max_steps or train_loader.num_tokens // (batches_per_step * B * T)
    if num_steps < 1:
        raise ValueError(
            f"{settings.train_data or folder}: {train_loader.num_tokens:,} tokens are fewer than one step's "
            f"{batches_per_step * B * T:,}; reduce --total-batch-size"
        )
    made_of = provenance.describe(train_loader.shards, val_loader.shards if val_loader else [], ops)
    if checkpoint is not None:
        provenance.compare(checkpoint.extra, made_of, str(checkpoint.done_path))
        provenance.use_products(checkpoint.extra, ops, str(checkpoint.done_path))
        model = _load_model(checkpoint, config, settings.recompute, ops)
    elif path := _path_of_init(settings):
        model = GPT2.from_checkpoint(path, recompute=settings.recompute, ops=ops)
    else:
        model = GPT2(config, settings.seed, recompute=settings.recompute, ops=ops)
    optimizer = AdamW(
        model, settings.learning_rate, settings.beta1, settings.beta2, settings.eps, settings.weight_decay,
        settings.decay, settings.seed,
    )  # fmt: skip
    guard = Guard(settings.skip_loss_z, settings.skip_norm_z)
    if checkpoint is not None:
        _load_extra(checkpoint, load_checkpoint(checkpoint, optimizer, train_loader), guard)
        if checkpoint.step > num_steps:
            raise ValueError(f"{checkpoint.model_path}: is beyond the run's last step, {num_steps}")
    return Run(
        settings=settings,
        folder=folder,
        tokenizer=tokenizer,
        train_loader=train_loader,
        val_loader=val_loader,
        hellaswag=hellaswag,
        model=model,
        optimizer=optimizer,
        guard=guard,
        batches_per_step=batches_per_step,
        num_steps=num_steps,
        start=start,
        console=Console(num_steps, settings.log_every),
        pace=_measure_pace(settings, model, train_loader, val_loader, hellaswag, batches_per_step, num_steps),
        free_memory=free_memory,
        provenance=made_of,
    )


def _num_val_batches(settings: Settings, val_loader: DataLoader | None) -> int:
    if val_loader is None:
        return 0
    # As with llm.c, more than there are go round.
    return settings.val_batches or val_loader.num_batches


def _measure_pace(
    settings: Settings,
    model: GPT2,
    train_loader: DataLoader,
    val_loader: DataLoader | None,
    hellaswag: HellaSwag | None,
    batches_per_step: int,
    num_steps: int,
) -> Pace:
    """The pace to expect, from a forward and backward on the first batch, which leave no trace in the run."""
    position = train_loader.state_dict()
    batch = train_loader.next_batch()
    train_loader.load_state_dict(position)
    # Another process may take its share for a moment: of two measurements the better one is the machine's.
    peak, times = devices.peak_gflops(model.ops), []
    # The first time also allocates; a large model's step takes long enough to be the measure itself.
    while len(times) < 5 and sum(times) < 3.0:
        begin = time.perf_counter()
        float(model.forward_backward(*batch))
        model.zero_grad()
        times.append(time.perf_counter() - begin)
    if peak is not None:
        peak = max(peak, devices.peak_gflops(model.ops))
    B, T = batch[0].shape
    tokens = batches_per_step * B * T
    pace = Pace(num_steps, tokens, model.config.flops_per_token(T), batches_per_step * min(times), peak)
    # Validation and HellaSwag are all forward, a third of a step.
    pace.pause("validation", settings.val_every, _num_val_batches(settings, val_loader) * min(times) / 3)
    if hellaswag is not None:
        pace.pause("HellaSwag", settings.val_every, hellaswag.num_tokens / (B * T) * min(times) / 3)
    return pace


# ---- the plan -------------------------------------------------------------------------------------------------------


def print_plan(run: Run) -> None:
    """What will be done, on what, and how long it will take."""
    settings, config, pace = run.settings, run.model.config, run.pace
    ops, N = run.model.ops, run.num_steps
    B, T = run.train_loader.B, run.train_loader.T
    tokens = run.train_loader.num_tokens
    held_out = f"{run.val_loader.num_tokens:,} held out" if run.val_loader else "none held out"
    free = run.free_memory
    if settings.train_data:
        data = {"data": f"{settings.train_data}: {tokens:,} tokens to train on, {held_out}"}
    else:
        characters = isinstance(run.tokenizer, CharTokenizer)
        kind = f"; a token is a character, one of {config.vocab_size - 1}" if characters else ""
        source = settings.text or "nine plays of Shakespeare, built in"
        data = {"text": f"{source}: {tokens:,} tokens to train on, {held_out}{kind}"}
    if run.hellaswag:
        data["HellaSwag"] = f"{settings.hellaswag}: {run.hellaswag.num_examples:,} examples"
    accumulated = f"{run.batches_per_step} x " if run.batches_per_step > 1 else ""
    rows = data | {
        "model": (f"{settings.init}: " if settings.init else "")
        + f"{config.num_parameters:,} parameters (layers {config.num_layers}, heads {config.num_heads}, "
        f"channels {config.channels}, context {config.max_seq_len})",
        "steps": f"{N:,} of {accumulated}{B} x {T} tokens, {N * pace.tokens_per_step / tokens:.2g} times the data; "
        f"{_describe_rate(settings, N)}; seed {settings.seed}",
        "machine": f"{devices.describe(ops)}, {devices.describe_peak(ops, pace.peak)}",
        "memory": f"{format_bytes(_needed_memory(settings, config))} needed"
        + (f" of {format_bytes(free)} free" if free is not None else ""),
        "speed": f"about {format_count(pace.tokens_per_second)} tok/s, {format_share(pace.share_of_peak)} of the peak "
        f"(6 N + 6 L C T = {pace.flops_per_token / 1e6:.2f} MFLOP for each token)",
        "time": f"about {format_duration(pace.seconds_left(run.start))}",
        "folder": str(run.folder),
    }
    if run.start:
        rows["resumed"] = f"{run.start:,} steps are done"
        if run.guard.blind:
            first = run.start + WINDOW + 1
            rows["resumed"] += f"; their losses are not known, so there are no z-scores before step {first:,}"
    run.console.line(printable(aligned(list(rows.items())), keep="\n"))
    run.console.line()


def _describe_rate(settings: Settings, num_steps: int) -> str:
    """The learning rate in words. The constant schedule has no warm-up; with one of all the steps only the last has the
    peak."""
    warmup = 0 if settings.schedule == "constant" else settings.warmup
    when = ""
    if warmup > num_steps:
        when = f", never reached in a warm-up of {warmup:,} steps"
    elif warmup:
        when = f" after {warmup:,} steps of warm-up"
    return f"learning rate {settings.learning_rate:g}{when}, {settings.schedule}"
