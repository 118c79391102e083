"""Whole models, as pyllmc, PyTorch and transformers run them: a training step, generation, the reading of a prompt.

`make(what, sizes, contestant, ops)` gives a function without arguments; all of them start from pyllmc's initial
weights, so that losses and generated tokens can be compared. `flops` and `num_bytes` say what the work takes.
"""

import subprocess
import sys

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


def make(what, sizes, contestant, ops=None):
    """contestant: "pyllmc" with its backend module, "torch", "torch-compile", "transformers", "numpy"."""
    return _MAKERS[what, contestant](sizes, ops)


def _weights(sizes):
    from pyllmc.model import initial_parameters

    config = config_of(sizes)
    return config, initial_parameters(config)


def _tokens(sizes):
    shape = sizes.get("B", 1), sizes["T"] + 1
    return np.random.default_rng(0).integers(0, sizes["V"], shape, dtype=np.int32)


# ---- training --------------------------------------------------------------------------------------------------------


def _pyllmc_step(sizes, ops):
    from pyllmc.model import GPT2
    from pyllmc.optimizer import AdamW

    config, flat = _weights(sizes)
    model = GPT2(config, ops=ops, params=flat)
    optimizer = AdamW(model, learning_rate=1e-4, weight_decay=0.1)
    tokens = _tokens(sizes)
    inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])

    def step():
        loss = model.forward_backward(inputs, targets)
        optimizer.step()
        model.zero_grad()
        return float(loss)

    return step


def _torch_step(sizes, ops, compiled=False):
    import torch
    import torch_reference

    config, flat = _weights(sizes)
    model = torch_reference.TorchGPT2(config, flat)
    del flat
    optimizer = torch_reference.make_optimizer(model, 1e-4, weight_decay=0.1)
    for group in optimizer.param_groups:  # its fastest: one pass over all streams
        group["fused"] = True
    forward = torch.compile(model) if compiled else model
    tokens = torch.from_numpy(_tokens(sizes)).long()
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step():
        _, loss = forward(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _torch_compiled_step(sizes, ops):
    return _torch_step(sizes, ops, compiled=True)


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
    ("step", "torch-compile"): _torch_compiled_step,
    ("generate", "pyllmc"): _pyllmc_generate,
    ("generate", "transformers"): _transformers_generate,
    ("prefill", "pyllmc"): _pyllmc_prefill,
    ("prefill", "transformers"): _transformers_prefill,
    ("import", "pyllmc"): lambda sizes, ops: _importing(_PYLLMC_IMPORT),
    ("import", "numpy"): lambda sizes, ops: _importing("import numpy"),
}
