"""Whole models, as pyllmc, PyTorch and transformers run them: a training step, generation, the reading of a prompt.

`make(what, sizes, contestant, on)` gives a function without arguments; all of them start from pyllmc's initial
weights, so that losses and generated tokens can be compared. `flops` and `num_bytes` say what the work takes.
"""

import contextlib
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

MODELS = ("step", "generate", "prefill", "import")


def config_of(sizes):
    from pyllmc.config import GPT2Config

    return GPT2Config(sizes["L"], sizes["NH"], sizes["C"], sizes["V"], sizes["maxT"])


def flops(what, sizes):
    """Operations of one call. A step: 6 N + 6 L C T for each token, as llm.c counts them."""
    if what == "import":
        return 0
    config = config_of(sizes)
    if what == "step":
        return sizes["B"] * sizes["T"] * config.flops_per_token(sizes["T"])
    L, C, V = sizes["L"], sizes["C"], sizes["V"]
    if what == "prefill":  # products of the blocks, causal attention, one row of logits
        T = sizes["T"]
        return 24 * L * C * C * T + 2 * L * C * T * (T + 1) + 2 * C * V
    return sizes["new"] * (24 * L * C * C + 2 * C * V + 4 * L * C * sizes["T"])


def num_bytes(what, sizes):
    """What must come from memory in one call: AdamW's seven streams of a step; every weight for each token."""
    if what == "import":
        return 0
    config = config_of(sizes)
    if what == "step":
        return 7 * 4 * config.num_parameters_padded
    weights = 4 * (config.num_parameters - sizes["maxT"] * sizes["C"])
    return weights * sizes.get("new", 1)


def make(what, sizes, contestant, on=None):
    """contestant: "pyllmc" on its backend module; "torch", "torch-compile", "torch-graphs" on a device, with a step in
    mixed precision, or None for float32 on the CPU; "transformers", "numpy"."""
    return _MAKERS[what, contestant](sizes, on)


def _weights(sizes, on_gpu=False):
    """On a GPU models have copies, so those of the last one serve the next: for the largest they take half a minute."""
    config = config_of(sizes)
    return config, (_kept_weights if on_gpu else _new_weights)(config)


def _new_weights(config):
    from pyllmc.model import initial_parameters

    return initial_parameters(config)


_kept_weights = lru_cache(maxsize=1)(_new_weights)


def _tokens(sizes):
    shape = sizes.get("B", 1), sizes["T"] + 1
    return np.random.default_rng(0).integers(0, sizes["V"], shape, dtype=np.int32)


# ---- training --------------------------------------------------------------------------------------------------------


def _pyllmc_step(sizes, ops):
    from pyllmc import backend
    from pyllmc.model import GPT2
    from pyllmc.optimizer import AdamW

    config, flat = _weights(sizes, on_gpu=ops is not backend("cpu"))
    model = GPT2(config, ops=ops, params=flat, recompute=sizes.get("recompute", 0))
    optimizer = AdamW(model, learning_rate=1e-4, weight_decay=0.1)
    tokens = _tokens(sizes)
    inputs, targets = (ops.from_host(np.ascontiguousarray(part)) for part in (tokens[:, :-1], tokens[:, 1:]))

    def step():
        loss = model.forward_backward(inputs, targets)
        optimizer.step()
        model.zero_grad()
        return loss  # fetched, it would stop a GPU

    return step


def _torch_step(sizes, device, options=None):
    """`options` are torch.compile's; None does not compile. On a device it is PyTorch at its fastest: the vocabulary
    padded, products and attention in bfloat16, the rest in float32, with TF32."""
    import torch
    import torch_reference

    config, flat = _weights(sizes, on_gpu=device is not None)
    if device is not None:
        config = replace(config, vocab_size=config.padded_vocab_size)
        torch.set_float32_matmul_precision("high")
    model = torch_reference.TorchGPT2(config, flat).to(device or "cpu")
    del flat
    optimizer = torch_reference.make_optimizer(model, 1e-4, weight_decay=0.1)
    for group in optimizer.param_groups:  # its fastest: one pass over all streams
        group["fused"] = True

    def loss_of(inputs, targets):  # without the logits, which a compiled function would have to keep for its caller
        return model(inputs, targets)[1]

    # Without `dynamic=False` the second shape of a process would be compiled for all shapes.
    forward = loss_of if options is None else torch.compile(loss_of, dynamic=False, **options)
    tokens = torch.from_numpy(_tokens(sizes)).long().to(device or "cpu")
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step():
        if options:
            torch.compiler.cudagraph_mark_step_begin()  # the last loss may be written over
        with contextlib.nullcontext() if device is None else torch.autocast(device, dtype=torch.bfloat16):
            loss = forward(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# ---- generation ------------------------------------------------------------------------------------------------------


def _pyllmc_decoder(sizes, ops):
    from pyllmc.model import GPT2

    config, flat = _weights(sizes)
    model = GPT2(config, ops=ops, params=flat)
    return model, model.new_cache(1, sizes["T"] + sizes.get("new", 0)), _tokens(sizes)[:, :-1]


def _pyllmc_generate(sizes, ops):
    """The likeliest `new` tokens after a prompt of T, whose keys and values are there already."""
    model, cache, prompt = _pyllmc_decoder(sizes, ops)
    first = ops.to_host(model.decode(prompt, cache)).argmax(axis=1)[:, None]

    def generate():
        cache.position, token, made = sizes["T"], first, []
        for _ in range(sizes["new"]):
            token = ops.to_host(model.decode(token, cache)).argmax(axis=1)[:, None]
            made.append(int(token[0, 0]))
        return made

    return generate


def _pyllmc_prefill(sizes, ops):
    model, cache, prompt = _pyllmc_decoder(sizes, ops)

    def prefill():
        cache.position = 0
        return int(ops.to_host(model.decode(prompt, cache)).argmax())

    return prefill


def _transformers_model(sizes):
    import torch
    import torch_reference
    from transformers import GPT2Config, GPT2LMHeadModel

    config, flat = _weights(sizes)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.max_seq_len, n_embd=config.channels,
            n_layer=config.num_layers, n_head=config.num_heads, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    torch_reference.copy_parameters(model, config, flat, transposed=True)
    return model, torch.from_numpy(_tokens(sizes)[:, :-1]).long()


def _transformers_generate(sizes, ops):
    import torch

    model, prompt = _transformers_model(sizes)
    with torch.inference_mode():
        result = model(prompt, use_cache=True)
    cache, first = result.past_key_values, result.logits[:, -1:].argmax(dim=2)

    @torch.inference_mode()
    def generate():
        if (more := cache.get_seq_length() - sizes["T"]) > 0:
            cache.crop(-more)
        token, made = first, []
        for _ in range(sizes["new"]):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=2)
            made.append(int(token[0, 0]))
        return made

    return generate


def _transformers_prefill(sizes, ops):
    import torch

    model, prompt = _transformers_model(sizes)

    @torch.inference_mode()
    def prefill():
        return int(model(prompt, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

    return prefill


# ---- importing -------------------------------------------------------------------------------------------------------


def _importing(code):
    return lambda: subprocess.run([sys.executable, "-c", code], check=True).returncode


# `import pyllmc` alone imports next to nothing: the names are fetched when they are used, so they are used here.
_PYLLMC_IMPORT = "import numpy, pyllmc; pyllmc.GPT2, pyllmc.AdamW, pyllmc.ops, pyllmc.backend('cpu')"

_MAKERS = {
    ("step", "pyllmc"): _pyllmc_step,
    ("step", "torch"): _torch_step,
    ("step", "torch-compile"): partial(_torch_step, options={}),
    ("step", "torch-graphs"): partial(_torch_step, options={"mode": "reduce-overhead"}),
    ("generate", "pyllmc"): _pyllmc_generate,
    ("generate", "transformers"): _transformers_generate,
    ("prefill", "pyllmc"): _pyllmc_prefill,
    ("prefill", "transformers"): _transformers_prefill,
    ("import", "pyllmc"): lambda sizes, ops: _importing(_PYLLMC_IMPORT),
    ("import", "numpy"): lambda sizes, ops: _importing("import numpy"),
}
