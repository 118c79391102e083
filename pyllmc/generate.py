"""`python -m pyllmc.generate`: continue text with a trained model. `generate` and `stream_text` do it for train.py too.

Tokens are drawn one at a time from the model's distribution: the coin is llm.c's xorshift64*, and the token is the
first, in the order of the ids, at which the cumulative probability exceeds it. The keys and values of earlier tokens
are kept (model.decode), so a token costs one position. When the context is full, the last half of it is read again and
the text goes on from there.

Calls model.py, tokenizer.py, rng.py; the program also checkpoint.py and hardware.py.
"""

from __future__ import annotations

import codecs
import collections
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from . import checkpoint, cli, hardware
from .model import GPT2
from .rng import Xorshift64Star
from .tokenizer import TOKENIZER_FILE, Tokenizer

OUT = Path("out")
TOKENIZER_NAMES = (TOKENIZER_FILE, "gpt2_tokenizer.bin")
# The control characters that text is made of; the model's others must not reach the terminal.
KEPT_CONTROLS = "\n\t"


def sample(
    logits: np.ndarray, rng: Xorshift64Star, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> int:
    """Draw a token from softmax(logits / temperature), logits (V,) of any float type; computed in float64.

    top_k > 0 leaves only the k likeliest tokens, then top_p < 1 only the fewest likeliest that reach this share of the
    probability; of equally likely tokens the lower id goes first. Temperature 0 is the likeliest token and draws no
    coin. ValueError if a logit is not finite.
    """
    logits = np.asarray(logits, np.float64)
    if not np.isfinite(logits).all():
        raise ValueError("the model's logits are not finite: its training diverged, or the checkpoint is damaged")
    if temperature == 0:
        return int(np.argmax(logits))
    with np.errstate(over="ignore"):  # a tiny temperature: everything but the maximum goes to -inf
        probs = np.exp((logits - logits.max()) / temperature)
    if 0 < top_k < len(probs) or top_p < 1:
        order = np.argsort(-probs, kind="stable")[: top_k or None]
        cumulative = np.cumsum(probs[order])
        count = np.searchsorted(cumulative, top_p * cumulative[-1]) + 1 if top_p < 1 else len(order)
        kept = np.zeros_like(probs)
        kept[order[:count]] = probs[order[:count]]
        probs = kept
    cumulative = np.cumsum(probs)
    token = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    # The product may round up to the whole sum.
    return min(token, int(np.flatnonzero(probs)[-1]))


def generate(
    model: GPT2,
    tokens: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rng: Xorshift64Star | None = None,
) -> Iterator[int]:
    """Continue `tokens` (at least one id below V) by max_new_tokens ids, one after the other.

    temperature >= 0, top_k >= 0 (0: all), 0 < top_p <= 1: see `sample`. rng: the coins, by default those of llm.c's
    seed 1337. Of a prompt longer than max_seq_len the model reads the end. ValueError, at once, for a wrong argument.
    """
    if not temperature >= 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    tokens = [int(token) for token in tokens]
    if not tokens:
        raise ValueError("generate needs at least one token to start from")
    for token in tokens:
        if not 0 <= token < model.config.vocab_size:
            raise ValueError(f"token {token} is outside the model's vocabulary [0, {model.config.vocab_size})")
    rng = rng or Xorshift64Star()
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return _generate(model, tokens, max_new_tokens, rng, options)


def _generate(model: GPT2, tokens: list[int], max_new_tokens: int, rng: Xorshift64Star, options: dict) -> Iterator[int]:
    window = model.config.max_seq_len
    cache = model.new_cache(1, min(window, len(tokens) + max(max_new_tokens, 0)))
    context = collections.deque(tokens, maxlen=window)
    pending = list(context)
    for _ in range(max_new_tokens):
        if cache.position + len(pending) > window:
            cache.position = 0
            pending = list(context)[-max(1, window // 2) :]
        logits = model.decode(np.array([pending], np.int32), cache)
        token = sample(model.ops.to_host(logits)[0], rng, **options)
        yield token
        context.append(token)
        pending = [token]


def stream_text(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str = "",
    max_new_tokens: int = 256,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    rng: Xorshift64Star | None = None,
) -> Iterator[str]:
    """The prompt, then its continuation in pieces, as soon as there are whole characters; safe to print.

    Without a prompt the text starts after `tokenizer.start`. Bytes that are not UTF-8, and control characters other
    than line feed and tab, become U+FFFD. Arguments as in `generate`; ValueError, at once, if the prompt has a
    character that the vocabulary lacks, or if tokenizer and model do not belong together.
    """
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}: they do not belong "
            "together"
        )
    start = tokenizer.encode(prompt) if prompt else [tokenizer.start]
    tokens = generate(
        model, start, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, rng=rng
    )  # fmt: skip
    return _text_pieces(tokenizer, prompt, tokens)


def _text_pieces(tokenizer: Tokenizer, prompt: str, tokens: Iterator[int]) -> Iterator[str]:
    # A token may end inside a character, which the decoder keeps until the rest of it comes.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    if prompt:
        yield cli.printable(prompt, KEPT_CONTROLS)
    for token in tokens:
        if text := decoder.decode(tokenizer.decode_bytes([token])):
            yield cli.printable(text, KEPT_CONTROLS)
    if text := decoder.decode(b"", final=True):
        yield cli.printable(text, KEPT_CONTROLS)


def find_model(named: Path | None) -> Path:
    """The model file that was named, or the newest whole one in the folder that was named, or in all of out/."""
    if named is not None and not named.is_dir():
        return named
    root = named or OUT
    done = list(root.glob("DONE_*") if named else root.rglob("DONE_*"))
    newest = {path.parent: path.stat().st_mtime_ns for path in sorted(done, key=lambda path: path.stat().st_mtime_ns)}
    for folder in sorted(newest, key=newest.get, reverse=True):
        if latest := checkpoint.find_latest(folder, with_state=False):
            return latest.model_path
    if named:
        raise ValueError(f"{named}: no checkpoint in this folder; name the folder of a run, or a model file")
    raise ValueError(f"no checkpoint under {OUT}/; python -m pyllmc.train makes one, or name one with --checkpoint")


def find_tokenizer(model_path: Path) -> Path:
    """The tokenizer file beside a model file; ValueError if there is none."""
    for name in TOKENIZER_NAMES:
        if (path := model_path.parent / name).exists():
            return path
    raise ValueError(f"{model_path.parent}: there is no {TOKENIZER_NAMES[0]} beside the checkpoint; put it there")


def parse_arguments(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(
        prog="python -m pyllmc.generate", description="Continue text with a model that pyllmc or llm.c has trained."
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH",
        help="model file, or folder of a run (default: the newest under out/)",
    )  # fmt: skip
    parser.add_argument("--prompt", default="", metavar="TEXT", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=cli.positive_int, default=500, metavar="N", help="how much to write")
    parser.add_argument(
        "--temperature", type=cli.non_negative_float, default=0.8, metavar="X",
        help="below 1 keeps to what is likely, above 1 ventures; 0 always takes the likeliest token",
    )  # fmt: skip
    parser.add_argument(
        "--top-k", type=cli.non_negative_int, default=0, metavar="N", help="choose among the N likeliest; 0 means all"
    )
    parser.add_argument(
        "--top-p", type=cli.fraction, default=1.0, metavar="X",
        help="choose among the fewest that have this share of the probability",
    )  # fmt: skip
    parser.add_argument("--seed", type=cli.positive_int, default=1337, metavar="N", help="same seed, same text")
    parser.add_argument("--num-samples", type=cli.positive_int, default=1, metavar="N", help="how many texts")
    parser.add_argument(
        "--threads", type=cli.non_negative_int, default=0, metavar="N", help="CPU threads; 0 takes all there are"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    path = find_model(args.checkpoint)
    checkpoint.read_header(path)  # so that a wrong file is told before what is missing beside it
    tokenizer = Tokenizer.load(find_tokenizer(path))
    hardware.set_threads(args.threads)
    model = GPT2.from_checkpoint(path)
    # One stream of coins for all samples, so that they differ.
    rng = Xorshift64Star(args.seed)
    print(f"{path}: {model.config.num_parameters:,} parameters", file=sys.stderr)
    for number in range(1, args.num_samples + 1):
        if args.num_samples > 1:
            print(f"--- {number} of {args.num_samples} ---")
        pieces = stream_text(
            model, tokenizer, args.prompt, args.max_new_tokens,
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, rng=rng,
        )  # fmt: skip
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
