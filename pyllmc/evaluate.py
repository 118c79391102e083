"""`python -m pyllmc.evaluate MODEL`: how good is a model? Loss over token files, accuracy on HellaSwag and MMLU.

Loss and accuracy are what a training run reports: the loss is that of its validations with the same files, batch and
context, and the accuracy that of its HellaSwag lines. The loss is a mean over predictions, each in nats; perplexity is
its exponential, the number of equally likely tokens that would be as hard to guess among.

Calls runs.py to find the model, model.py, dataloader.py, questions.py, devices.py, hardware.py, and
datasets/progress.py for the bar.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cli, devices, hardware
from .dataloader import DataLoader
from .datasets.progress import Progress
from .model import GPT2
from .questions import Questions
from .runs import find_model, opened

# The option of each set of questions, and what it is called.
QUESTIONS = {"hellaswag": "HellaSwag", "mmlu": "MMLU"}


def validation_loss(model: GPT2, loader: DataLoader, num_batches: int) -> float:
    """The mean loss of the next batches, in nats per token. ValueError if it is not finite."""
    losses = []
    with Progress("validation", num_batches * loader.B * loader.T, "tokens") as progress:
        for _ in range(num_batches):
            losses.append(model.loss(*loader.next_batch()))
            progress.advance(loader.B * loader.T)
    # Only here, so that a GPU has the next batch before it is done with the last.
    loss = math.fsum(map(float, losses)) / len(losses)
    if not math.isfinite(loss):
        raise ValueError(f"the validation loss is {loss:g}: the model's training diverged, or its file is damaged")
    return loss


def describe_validation(model: GPT2, pattern: str, B: int, T: int, max_batches: int) -> str:
    """The line of the validation loss over the files that `pattern` names."""
    loader = DataLoader(pattern, B, T, vocab_size=model.config.vocab_size)
    num_batches = min(max_batches or loader.num_batches, loader.num_batches)
    loss = validation_loss(model, loader, num_batches)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return (
        f"validation loss {loss:.4f} nats per token, perplexity {perplexity:.2f}: {num_batches * B * T:,} of the "
        f"{loader.num_tokens:,} tokens of {pattern}, {num_batches:,} batches of {B} x {T}"
    )


def describe_accuracy(model: GPT2, questions: Questions) -> str:
    """The line of the accuracy on these questions."""
    right, total = 0, questions.num_examples
    with Progress(questions.name, total, "examples") as progress:
        for answered, right_ones in questions.answer(model):
            right += right_ones
            progress.advance(answered)
    return f"{questions.name} {right}/{total} = {right / total:.4f}: {questions.path}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.ArgumentParser(
        prog="python -m pyllmc.evaluate",
        description="Measure a model: its loss on token files, its answers to HellaSwag and MMLU.",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="model file, folder of a run or of a Hugging Face GPT-2, or gpt2"
    )
    parser.add_argument("--val", metavar="GLOB", help="token files to measure the loss on: a path or a pattern")
    for option, name in QUESTIONS.items():
        parser.add_argument(
            f"--{option}", type=Path, metavar="FILE", help=f"{name}'s file, which pyllmc.datasets {option} makes"
        )
    parser.add_argument("--batch-size", type=cli.positive_int, default=4, metavar="N", help="sequences in one batch")
    parser.add_argument(
        "--seq-len", type=cli.non_negative_int, default=0, metavar="N",
        help="tokens of a sequence; 0 means the model's whole context",
    )  # fmt: skip
    parser.add_argument(
        "--max-batches", type=cli.non_negative_int, default=0, metavar="N",
        help="batches of --val, from the beginning; 0 means all",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=cli.non_negative_int, default=0, metavar="N", help="CPU threads; 0 takes all there are"
    )
    devices.add_options(parser)
    args = parser.parse_args(argv)
    if not args.val and not asked_for(args):
        parser.error("there is nothing to measure with: give --val, --hellaswag or --mmlu, or several of them")
    return args


def asked_for(args: argparse.Namespace) -> dict[str, Path]:
    """The files of questions by the names of these."""
    return {name: path for option, name in QUESTIONS.items() if (path := getattr(args, option))}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    hardware.set_threads(args.threads)

    def open_model() -> tuple[Path, GPT2]:
        path = find_model(args.model)
        return path, GPT2.from_checkpoint(path, ops=devices.choose(args.device, args.dtype))

    path, model = opened(open_model)
    config = model.config
    T = args.seq_len or config.max_seq_len
    if T > config.max_seq_len:
        raise ValueError(f"--seq-len {T} is more than the model's context of {config.max_seq_len}")
    # What is wrong with these files is told before the loss is computed, which takes its time.
    asked = [Questions(name, path, args.batch_size, T, config.vocab_size) for name, path in asked_for(args).items()]
    print(f"{path}: {config.num_parameters:,} parameters", flush=True)
    if args.val:
        print(describe_validation(model, args.val, args.batch_size, T, args.max_batches), flush=True)
    for questions in asked:
        print(describe_accuracy(model, questions), flush=True)


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
