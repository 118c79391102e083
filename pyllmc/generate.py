"""`python -m pyllmc.generate`: continue text with a trained model. `generate` and `stream_text` do it for train.py too.

Tokens are drawn one at a time from the model's distribution: the coin is llm.c's xorshift64*, and the token is the
first, in the order of the ids, at which the cumulative probability exceeds it. The keys and values of earlier tokens
are kept (model.decode), so a token costs one position. When the context is full, the last half of it is read again and
the text goes on from there.

Several samples are decoded together, up to GROUP at a time: the weights, which are most of what a token reads, are then
read once for all. Each sample has coins of its own, and the same text in any company.

Called by train.py; calls model.py, tokenizer.py, rng.py, devices.py, hardware.py; the program also runs.py and
checkpoint.py for the model.
"""

from __future__ import annotations

import codecs
import collections
import itertools
import operator
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from . import cli, devices, hardware
from .checkpoint import find_latest
from .config import GPT2Config
from .model import GPT2, DecodeCache, model_folder, model_format
from .rng import Xorshift64Star
from .runs import find_model, opened
from .tokenizer import TokenIds, Tokenizer, find_tokenizer

OUT = Path("out")
# Samples decoded together. Products of up to so many rows (FEW_ROWS in _ops/gemm.pxi) are computed row by row, so that
# a sample's logits have the same bits alone and among others; with more rows they differ in the last place, as they may
# on a GPU.
GROUP = 8
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
        probs = _likeliest(probs, top_k, top_p)
    cumulative = np.cumsum(probs)
    token = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    # The product may round up to the whole sum.
    return min(token, int(np.flatnonzero(probs)[-1]))


def _likeliest(probs: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """probs (V,), which need not sum to 1, with zeros for what top_k and top_p leave out."""
    by_count = 0 < top_k < len(probs)
    total = probs.sum()
    # Sorting a whole vocabulary takes longer than decoding a token. What is below `lowest` cannot be among the
    # likeliest: all tokens of less than (1 - top_p) / V together do not have the share that may be left out.
    lowest = np.partition(probs, -top_k)[-top_k] if by_count else (1 - top_p) * total / len(probs)
    order = np.flatnonzero(probs >= lowest)
    order = order[np.argsort(-probs[order], kind="stable")]
    if by_count:
        order = order[:top_k]
        total = probs[order].sum()
    if top_p < 1:
        order = order[: np.searchsorted(np.cumsum(probs[order]), top_p * total) + 1]
    kept = np.zeros_like(probs)
    kept[order] = probs[order]
    return kept


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
    seed 1337. Of a prompt longer than max_seq_len the model reads the end. ValueError, at once, for a wrong argument;
    MemoryError if the keys and values do not fit.
    """
    rngs = [rng or Xorshift64Star()]
    drawn = generate_batch(
        model, tokens, max_new_tokens, rngs, temperature=temperature, top_k=top_k, top_p=top_p
    )  # fmt: skip
    return map(operator.itemgetter(0), drawn)


def generate_batch(
    model: GPT2,
    tokens: Sequence[int],
    max_new_tokens: int,
    rngs: Sequence[Xorshift64Star],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[list[int]]:
    """As `generate`, for several continuations of `tokens` through one cache: each time, an id for each of `rngs`.

    On the CPU up to GROUP of them get the same ids as each would alone.
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
    length = _cache_length(model.config, len(tokens), max_new_tokens)
    cache = model.new_cache(len(rngs), length)
    reader = model.new_cache(1, length) if len(rngs) > 1 else cache
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return _generate(model, cache, reader, tokens, max_new_tokens, rngs, options)


def _generate(
    model: GPT2,
    cache: DecodeCache,
    reader: DecodeCache,
    tokens: list[int],
    max_new_tokens: int,
    rngs: Sequence[Xorshift64Star],
    options: dict,
) -> Iterator[list[int]]:
    window = model.config.max_seq_len
    contexts = [collections.deque(tokens, maxlen=window) for _ in rngs]
    drawn: list[int] = []
    for _ in range(max_new_tokens):
        if not drawn:
            logits = _read(model, cache, reader, [list(context) for context in contexts])
        elif cache.position == window:
            logits = _read(model, cache, reader, [list(context)[-max(1, window // 2) :] for context in contexts])
        else:
            logits = model.ops.to_host(model.decode(np.array(drawn, np.int32)[:, None], cache))
        drawn = [sample(row, rng, **options) for row, rng in zip(logits, rngs)]
        yield drawn
        for context, token in zip(contexts, drawn):
            context.append(token)


def _read(model: GPT2, cache: DecodeCache, reader: DecodeCache, sequences: list[list[int]]) -> np.ndarray:
    """Fills the cache with sequences of one length, and returns the logits (B,V) after them.

    One after the other, through a cache of one sequence: as the prompt is the same for all it is read once, and a
    sequence that is read again has the same bits in any company.
    """
    rows: list[np.ndarray] = []
    for b, tokens in enumerate(sequences):
        if b == 0 or tokens != sequences[b - 1]:
            reader.position = 0
            row = model.ops.to_host(model.decode([tokens], reader))[0]
        rows.append(row)
        if reader is not cache:
            for mine, read in zip(cache.keys + cache.values, reader.keys + reader.values):
                model.ops.from_host(read[0], out=mine[b])
    cache.position = reader.position
    return np.stack(rows)


def _cache_length(config: GPT2Config, prompt: int, max_new_tokens: int) -> int:
    return min(config.max_seq_len, prompt + max(max_new_tokens, 0))


def _group_size(model: GPT2, length: int, num_samples: int) -> int:
    """How many of num_samples to decode together with caches of `length` tokens: what fits in memory, at most GROUP."""
    group, config, number = min(GROUP, num_samples), model.config, devices.float_bytes(model.ops)
    cache = 2 * number * config.num_layers * length * config.channels
    reader = cache + config.activation_bytes(1, length, training=False, float_bytes=number)
    free = devices.free_memory(model.ops)
    while group > 1 and free is not None and group * cache + reader > free:
        group -= 1
    return group


def sample_rng(seed: int, number: int) -> Xorshift64Star:
    """The coins of sample `number` of a seed: those of llm.c for sample 0, then streams of their own.

    The states of the others are splitmix64's outputs (Steele, Lea and Flood, 2014), which have nothing to do with each
    other or with those of the next seed; xorshift's own streams from neighbouring seeds begin alike.
    """
    if number == 0:
        return Xorshift64Star(seed)
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    state = (seed + number * gamma) & mask
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
    # 0 comes of 0 only, and is the one state that xorshift cannot have.
    return Xorshift64Star((state ^ state >> 31) or gamma)


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
    tokens = generate(
        model, _start(model, tokenizer, prompt), max_new_tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, rng=rng,
    )  # fmt: skip
    return _text_pieces(tokenizer, prompt, tokens)


def stream_texts(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str = "",
    max_new_tokens: int = 256,
    *,
    num_samples: int,
    seed: int = 1337,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[Iterator[str]]:
    """What `stream_text` gives, for each of num_samples texts; their coins are those of `sample_rng`.

    They are made in groups. The first text of a group comes piece by piece, as it is written; the others, which are
    written along with it, are there at once when it is complete.
    """
    start = _start(model, tokenizer, prompt)
    length = _cache_length(model.config, len(start), max_new_tokens)
    group = _group_size(model, length, num_samples)

    def texts(numbers: range) -> Iterator[Iterator[str]]:
        drawn = generate_batch(
            model, start, max_new_tokens, [sample_rng(seed, number) for number in numbers],
            temperature=temperature, top_k=top_k, top_p=top_p,
        )  # fmt: skip
        for b, copy in enumerate(itertools.tee(drawn, len(numbers))):
            yield _text_pieces(tokenizer, prompt, map(operator.itemgetter(b), copy))

    groups = (range(first, min(first + group, num_samples)) for first in range(0, num_samples, group))
    return itertools.chain.from_iterable(map(texts, groups))


def _start(model: GPT2, tokenizer: Tokenizer, prompt: str) -> Sequence[int]:
    """The tokens to continue."""
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}: they do not belong "
            "together"
        )
    return tokenizer.encode(prompt) if prompt else [tokenizer.start]


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


def newest_model() -> Path:
    """The newest whole model file in all of out/."""
    done = sorted(OUT.rglob("DONE_*"), key=lambda path: path.stat().st_mtime_ns)
    newest = {path.parent: path.stat().st_mtime_ns for path in done}
    for folder in sorted(newest, key=newest.get, reverse=True):
        if latest := find_latest(folder, with_state=False):
            return latest.model_path
    raise ValueError(f"no checkpoint under {OUT}/; python -m pyllmc.train makes one, or name one with --checkpoint")


def parse_arguments(argv: Sequence[str] | None):
    parser = cli.ArgumentParser(
        prog="python -m pyllmc.generate", description="Continue text with a model that pyllmc or llm.c has trained."
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH",
        help="model file, folder of a run or of a Hugging Face GPT-2, or gpt2 (default: the newest under out/)",
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
        "--top-p", type=cli.positive_fraction, default=1.0, metavar="X",
        help="choose among the fewest that have this share of the probability",
    )  # fmt: skip
    parser.add_argument("--seed", type=cli.seed_of_coins, default=1337, metavar="N", help="same seed, same text")
    parser.add_argument("--num-samples", type=cli.positive_int, default=1, metavar="N", help="how many texts")
    parser.add_argument(
        "--threads", type=cli.non_negative_int, default=0, metavar="N", help="CPU threads; 0 takes all there are"
    )
    devices.add_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    hardware.set_threads(args.threads)

    def open_model() -> tuple[Path, Tokenizer, GPT2]:
        path = find_model(args.checkpoint) if args.checkpoint else newest_model()
        config = model_format(path).read_header(path).config  # so that a wrong file is told before what is beside it
        try:
            tokenizer = find_tokenizer([model_folder(path)], config.vocab_size)
        except ValueError as error:
            raise ValueError(f"{error} (the model is {path})") from None
        return path, tokenizer, GPT2.from_checkpoint(path, ops=devices.choose(args.device, args.dtype))

    path, tokenizer, model = opened(open_model)
    print(f"{path}: {model.config.num_parameters:,} parameters", file=sys.stderr)
    if isinstance(tokenizer, TokenIds):
        print("no tokenizer.bin beside it, and not GPT-2's tokens: these are the token ids", file=sys.stderr)
    texts = stream_texts(
        model, tokenizer, args.prompt, args.max_new_tokens, num_samples=args.num_samples, seed=args.seed,
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
    )  # fmt: skip
    for number, pieces in enumerate(texts, 1):
        if args.num_samples > 1:
            print(f"--- {number} of {args.num_samples} ---")
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
