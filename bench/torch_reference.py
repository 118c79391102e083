"""A compact GPT-2 in PyTorch: what pyllmc is compared with, in numbers and in time.

    python bench/torch_reference.py                                  trains a small model on the packaged Shakespeare
    python bench/torch_reference.py --init d12 --same-batch          times ten steps of GPT-2 124M on one batch
    python bench/torch_reference.py --init d12 --output out/torch    and writes the files that pyllmc and llm.c read

It starts from pyllmc's initial weights (or a model .bin), steps with torch's AdamW, and writes the model before
training as float32 and bfloat16, the debug state of the first batch (inputs, targets, logits, loss, gradients, and the
losses and norms of ten steps on it, see data/README.md) and the tokenizer. The debug state is computed in
float64: from initial weights, ten steps let PyTorch's float32 drift 7e-6 in the loss and 1.3e-5 in the norm, more than
pyllmc's, and `python -m pyllmc.verify`, which compares a build of pyllmc with these files, would measure PyTorch's.
Needs torch, and nothing else that pyllmc does not need. The parity tests import it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pyllmc import cli, modelfile
from pyllmc.config import GPT2Config
from pyllmc.model import initial_parameters
from pyllmc.tensors import TENSORS, views
from pyllmc.tokenfile import read_shard
from pyllmc.tokenizer import TOKENIZER_FILE, CharTokenizer, TokenIds, Tokenizer, find_tokenizer

# What train_gpt2.py of llm.c calls the sizes of GPT-2 where it writes trained weights.
SIZE_NAMES = {"d12": "124M", "d24": "355M", "d36": "774M", "d48": "1558M"}
DEBUG_STEPS = 10

# ---- the model -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.c_attn = nn.Linear(config.channels, 3 * config.channels)
        self.c_proj = nn.Linear(config.channels, config.channels)

    def forward(self, x):  # (B,T,C)
        B, T, C = x.shape
        query, key, value = (
            part.view(B, T, self.num_heads, C // self.num_heads).transpose(1, 2)  # (B,NH,T,HS)
            for part in self.c_attn(x).split(C, dim=2)
        )
        y = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, four times as wide inside."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = nn.Linear(config.channels, 4 * config.channels)
        self.c_proj = nn.Linear(4 * config.channels, config.channels)

    def forward(self, x):
        return self.c_proj(functional.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each on a normalised copy of the residual stream, to which it is added."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.channels)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.channels)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TorchGPT2(nn.Module):
    """GPT-2 with the module names of Hugging Face's; wte has V rows, without padding."""

    def __init__(self, config: GPT2Config, flat: np.ndarray | None = None):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.channels),
                "wpe": nn.Embedding(config.max_seq_len, config.channels),
                "h": nn.ModuleList(Block(config) for _ in range(config.num_layers)),
                "ln_f": nn.LayerNorm(config.channels),
            }
        )
        if flat is not None:
            copy_parameters(self, config, flat)

    def forward(self, inputs, targets=None):
        """inputs (B,T) -> logits (B,T,V), and the mean loss of targets (B,T), of which -1 do not count, or None."""
        positions = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.transformer.wte(inputs) + self.transformer.wpe(positions)
        for block in self.transformer.h:
            x = block(x)
        logits = self.transformer.ln_f(x) @ self.transformer.wte.weight.T
        if targets is None:
            return logits, None
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None):
        """tokens (B,T) continued to (B, T + max_new_tokens); each step reads the last max_seq_len tokens again."""
        for _ in range(max_new_tokens):
            logits = self(tokens[:, -self.config.max_seq_len :])[0][:, -1] / temperature
            if top_k is not None:
                smallest = torch.topk(logits, min(top_k, logits.shape[1])).values[:, -1:]
                logits = logits.masked_fill(logits < smallest, -math.inf)
            tokens = torch.cat((tokens, torch.multinomial(logits.softmax(dim=-1), 1)), dim=1)
        return tokens


# ---- to and from pyllmc's flat buffers -------------------------------------------------------------------------------


def _pairs(model: nn.Module, config: GPT2Config, flat: np.ndarray, transposed: bool):
    """(parameter of the PyTorch model, the part of the flat buffer that belongs to it), one by one.

    transposed: the model stores matrices as (inputs, outputs), as transformers' GPT-2 does.
    """
    parameters = dict(model.named_parameters())
    for tensor, view in zip(TENSORS, views(flat, config).values()):
        if tensor.name == "wte":
            view = view[: config.vocab_size]
        per_layer = "{layer}" in tensor.hf_name
        for layer in range(config.num_layers if per_layer else 1):
            part = view[layer] if per_layer else view
            if transposed and tensor.kind == "matrix":
                part = part.T
            yield parameters[tensor.hf_name.format(layer=layer)], part


@torch.no_grad()
def copy_parameters(model: nn.Module, config: GPT2Config, flat: np.ndarray, transposed: bool = False) -> None:
    """Sets the PyTorch model's parameters from pyllmc's flat buffer."""
    for parameter, part in _pairs(model, config, flat, transposed):
        parameter.copy_(torch.from_numpy(part))


def flat_gradients(model: nn.Module, config: GPT2Config, transposed: bool = False) -> np.ndarray:
    """The PyTorch model's gradients as pyllmc's flat buffer."""
    flat = np.zeros(config.num_parameters_padded, np.float32)
    for parameter, part in _pairs(model, config, flat, transposed):
        part[...] = parameter.grad.numpy()
    return flat


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
):
    """torch's AdamW; matrices and embeddings are decayed."""
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() >= 2) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=eps)


# ---- the program -----------------------------------------------------------------------------------------------------


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = cli.ArgumentParser(prog="bench/torch_reference.py", description=__doc__.partition("\n")[0])
    model = parser.add_argument_group("model")
    model.add_argument("--init", metavar="d12|FILE.bin", help="a named size or a model file; otherwise the four below")
    model.add_argument("--layers", type=cli.positive_int, default=4, metavar="N")
    model.add_argument("--heads", type=cli.positive_int, default=4, metavar="N")
    model.add_argument("--channels", type=cli.positive_int, default=128, metavar="N")
    model.add_argument("--context", type=cli.positive_int, default=64, metavar="N")
    data = parser.add_argument_group("data")
    data.add_argument("--text", type=Path, metavar="FILE", help="plain text, by characters (default: Shakespeare)")
    data.add_argument("--tokens", type=Path, metavar="FILE", help="a token .bin instead")
    data.add_argument("--tokenizer", type=Path, metavar="FILE", help="the tokenizer.bin of --tokens")
    data.add_argument("--batch-size", type=cli.positive_int, default=4, metavar="N")
    data.add_argument("--seq-len", type=cli.positive_int, default=64, metavar="N")
    data.add_argument("--same-batch", action="store_true", help="every step on the first batch")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=cli.non_negative_int, default=10, metavar="N")
    training.add_argument("--learning-rate", type=cli.positive_float, default=1e-4, metavar="X")
    training.add_argument("--beta2", type=cli.fraction, default=0.95, metavar="X")
    training.add_argument("--weight-decay", type=cli.non_negative_float, default=0.0, metavar="X")
    training.add_argument("--clip", type=cli.non_negative_float, default=0.0, metavar="X", help="gradient norm; 0: off")
    training.add_argument("--seed", type=cli.seed, default=42, metavar="N")
    training.add_argument("--threads", type=cli.non_negative_int, default=0, metavar="N", help="0: torch's choice")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, metavar="FOLDER", help="write model, debug state and tokenizer here")
    output.add_argument("--generate", type=cli.non_negative_int, default=0, metavar="N", help="N tokens afterwards")
    output.add_argument("--prompt", default="", metavar="TEXT", help="what they continue (default: the first token)")
    return parser.parse_args(argv)


def load_init(init: str) -> tuple[GPT2Config, np.ndarray | None, Tokenizer]:
    """What --init names: the configuration, the flat parameters of a file, and the tokenizer."""
    if init.endswith(".bin"):
        config, flat = modelfile.read_model(init)
        return config, flat, find_tokenizer([Path(init).parent], config.vocab_size)
    config = GPT2Config.from_descriptor(init)
    return config, None, find_tokenizer([], config.vocab_size)


def load_tokens(args: argparse.Namespace, tokenizer: Tokenizer | None) -> tuple[np.ndarray, Tokenizer | None]:
    """All tokens, and the tokenizer they are of, if it is known; text without one becomes characters."""
    if args.tokens:
        tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else tokenizer
        shard = read_shard(args.tokens)
        with shard.open() as file:
            (tokens,) = shard.read(file, [0], shard.num_tokens, tokenizer.vocab_size if tokenizer else None)
        return tokens.astype(np.int32), tokenizer
    if args.text:
        text = args.text.read_text(encoding="utf-8")
    else:
        text = resources.files("pyllmc").joinpath("assets/shakespeare.txt").read_text(encoding="utf-8")
    tokenizer = tokenizer or CharTokenizer.from_text(text)
    return tokenizer.encode(text).astype(np.int32), tokenizer


def load(args: argparse.Namespace) -> tuple[GPT2Config, np.ndarray, np.ndarray, Tokenizer | None]:
    """The configuration, the flat parameters, the tokens and their tokenizer that the arguments ask for."""
    config, flat, tokenizer = load_init(args.init) if args.init else (None, None, None)
    tokens, tokenizer = load_tokens(args, tokenizer)
    if config is None:
        vocab_size = tokenizer.vocab_size if tokenizer else int(tokens.max()) + 1
        config = GPT2Config(args.layers, args.heads, args.channels, vocab_size, args.context)
    if flat is None:
        flat = initial_parameters(config, args.seed)
    return config, flat, tokens, tokenizer


def batches(tokens: np.ndarray, B: int, T: int, same: bool):
    """Inputs and targets (B,T), one batch after the other, from the start again when the text ends."""
    count = B * T
    start = 0
    while True:
        if start + count + 1 > len(tokens):
            start = 0
        piece = torch.from_numpy(tokens[start : start + count + 1]).long()
        yield piece[:-1].view(B, T), piece[1:].view(B, T)
        start += 0 if same else count


def stem(init: str | None, config: GPT2Config) -> str:
    """How the names of the files begin: gpt2_d12 starts and gpt2_124M is trained, as train_gpt2.py of llm.c has it, and
    what has none of its sizes is a model."""
    if init and not init.endswith(".bin"):
        return f"gpt2_{init.rpartition(':')[2]}"
    for descriptor, size in SIZE_NAMES.items():
        if init and config == GPT2Config.from_descriptor(descriptor):
            return f"gpt2_{size}"
    return "model"


def debug_state(config: GPT2Config, flat: np.ndarray, inputs, targets) -> modelfile.DebugState:
    """What float64 makes of one batch: logits, loss, gradients, and the losses and norms of DEBUG_STEPS steps."""
    model = TorchGPT2(config, flat).double()
    optimizer = make_optimizer(model, **modelfile.DEBUG_ADAMW)
    losses, norms = [], []
    for step in range(DEBUG_STEPS):
        optimizer.zero_grad()
        logits, loss = model(inputs, targets)
        loss.backward()
        if step == 0:
            first = logits.detach().float().numpy(), loss.item(), flat_gradients(model, config)
        # Not torch's clip_grad_norm_, which adds 1e-6 to the norm.
        norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
        if norm > modelfile.DEBUG_MAX_NORM:
            for parameter in model.parameters():
                parameter.grad *= modelfile.DEBUG_MAX_NORM / norm
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    return modelfile.DebugState(
        inputs.numpy(), targets.numpy(), *first, np.array(losses, np.float32), np.array(norms, np.float32)
    )


def write_files(args, config: GPT2Config, flat: np.ndarray, tokenizer: Tokenizer | None, inputs, targets) -> None:
    """The files that another program needs to do the same first steps."""
    args.output.mkdir(parents=True, exist_ok=True)
    if args.init and Path(args.init).exists() and args.output.samefile(Path(args.init).parent):
        raise ValueError(f"--output {args.output}: {args.init} is in it and may be written over; take another folder")
    name = stem(args.init, config)
    modelfile.write_model(args.output / f"{name}.bin", config, flat, "float32")
    modelfile.write_model(args.output / f"{name}_bf16.bin", config, flat, "bfloat16")
    state = debug_state(config, flat, inputs, targets)
    modelfile.write_debug_state(args.output / f"{name}_debug_state.bin", config, state)
    print(f"wrote {name}.bin, {name}_bf16.bin and {name}_debug_state.bin in {args.output}")
    known = tokenizer is not None and not isinstance(tokenizer, TokenIds)
    if known and tokenizer.vocab_size == config.vocab_size:
        file = "gpt2_tokenizer.bin" if tokenizer.kind == "gpt2" else TOKENIZER_FILE
        tokenizer.save(args.output / file)
        print(f"wrote {file}")


def main(argv=None) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    config, flat, tokens, tokenizer = load(args)
    B, T = args.batch_size, args.seq_len
    if T > config.max_seq_len:
        raise ValueError(f"--seq-len {T} is more than the model's context of {config.max_seq_len}")
    if len(tokens) < B * T + 1:
        raise ValueError(f"a batch of {B} x {T} tokens needs {B * T + 1}, the data has {len(tokens)}")
    if tokens.max() >= config.vocab_size:
        raise ValueError(f"the data has token {tokens.max()}, the model's vocabulary is {config.vocab_size}")
    source = batches(tokens, B, T, args.same_batch)
    threads = torch.get_num_threads()
    print(f"{config}: {config.num_parameters:,} parameters, {threads} threads, torch {torch.__version__}")
    if args.output:
        write_files(args, config, flat, tokenizer, *next(batches(tokens, B, T, same=True)))

    model = TorchGPT2(config, flat)
    optimizer = make_optimizer(model, args.learning_rate, beta2=args.beta2, weight_decay=args.weight_decay)
    norm_limit = args.clip or math.inf
    times = []
    for step in range(1, args.steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        _, loss = model(*next(source))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), norm_limit)
        optimizer.step()
        seconds = time.perf_counter() - start
        # The first step also allocates.
        times += [seconds] if step > 1 else []
        print(
            f"step {step}/{args.steps} | loss {loss.item():.6f} | norm {norm.item():.4f} | "
            f"{1000 * seconds:.1f} ms | {B * T / seconds:,.0f} tok/s",
            flush=True,
        )
    if times:
        mean = sum(times) / len(times)
        print(f"mean of the last {len(times)} steps: {1000 * mean:.1f} ms, {B * T / mean:,.0f} tok/s")
    if args.generate:
        prompt = tokenizer.encode(args.prompt) if tokenizer and args.prompt else tokens[:1]
        out = model.generate(torch.from_numpy(prompt.astype(np.int64))[None], args.generate)[0].tolist()
        print(cli.printable(tokenizer.decode(out), "\n\t") if tokenizer else out)


if __name__ == "__main__":
    sys.exit(cli.run_main(main))
