"""pyllmc trains GPT-2-class language models with NumPy, Cython and OpenMP, in llm.c's formats and from llm.c's seeds.

    from pyllmc import GPT2, GPT2Config, AdamW

    model = GPT2(GPT2Config(num_layers=4, num_heads=4, channels=128, vocab_size=65, max_seq_len=64))
    optimizer = AdamW(model, learning_rate=1e-3)
    model.zero_grad()
    loss = model.forward_backward(inputs, targets)  # int32 (B,T) each
    optimizer.step()

The names below are imported when they are first used, so that `import pyllmc` is quick and needs no compiled module.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import ops
    from ._ops import get_num_threads, set_num_threads
    from .backends import backend
    from .config import GPT2Config
    from .dataloader import DataLoader
    from .model import GPT2
    from .optimizer import AdamW, clip_grad_norm
    from .tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "GPT2",
    "GPT2Config",
    "AdamW",
    "clip_grad_norm",
    "DataLoader",
    "Tokenizer",
    "ops",
    "backend",
    "set_num_threads",
    "get_num_threads",
    "__version__",
]

_HOME = {
    "GPT2": "model",
    "GPT2Config": "config",
    "AdamW": "optimizer",
    "clip_grad_norm": "optimizer",
    "DataLoader": "dataloader",
    "Tokenizer": "tokenizer",
    "backend": "backends",
}


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name == "ops":
        value = importlib.import_module(f"{__name__}.ops")
    elif name in ("get_num_threads", "set_num_threads"):
        value = getattr(importlib.import_module(f"{__name__}.backends").backend("cpu"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
