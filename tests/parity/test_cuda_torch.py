"""The CUDA backend's bfloat16 attention against PyTorch's, at most twice as far from the exact result; and ten steps.

PyTorch's attention is the textbook computation, every intermediate in bfloat16. The rule is that of the FlashAttention
repository's own tests. The steps are those of bench/parity.py, of a small model. Needs torch; runs on the kernels as
plain C++ and, with a GPU, on the real ones.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import reference
from on_device import OnDevice
from test_cuda_ops import bf16

from pyllmc import GPT2Config
from pyllmc.model import initial_parameters

torch = pytest.importorskip("torch")


def textbook(qkv, dout, num_heads):
    """(out, dqkv) by PyTorch in bfloat16."""
    x = torch.tensor(qkv, dtype=torch.bfloat16, requires_grad=True)
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    query, key, value = (part.view(B, T, num_heads, -1).transpose(1, 2) for part in x.split(C, dim=-1))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    out = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ value
    out = out.transpose(1, 2).reshape(B, T, C)
    out.backward(torch.tensor(dout, dtype=torch.bfloat16))
    return out.detach().float().numpy(), x.grad.float().numpy()


@pytest.mark.parametrize(("T", "HS", "spread"), [(130, 64, 1.0), (130, 64, 4.0), (200, 32, 1.0), (96, 128, 2.0)])
def test_error_is_at_most_twice_that_of_the_textbook(device, T, HS, spread):
    B, NH = 1, 2
    rng = np.random.default_rng(T)
    qkv = bf16(spread * rng.standard_normal((B, T, 3 * NH * HS)))
    dout = bf16(rng.standard_normal((B, T, NH * HS)))
    exact, exact_lse = reference.attention_forward(qkv.astype(np.float64), NH)
    gradients = reference.attention_backward(dout.astype(np.float64), qkv.astype(np.float64), exact, exact_lse)

    on = OnDevice(device, "bfloat16")
    out, lse = on.attention_forward(qkv, NH)
    ours = out, *np.split(on.attention_backward(dout, qkv, out, lse), 3, axis=-1)
    theirs_out, theirs_dqkv = textbook(qkv, dout, NH)
    theirs = theirs_out, *np.split(theirs_dqkv, 3, axis=-1)
    expected = exact, *np.split(gradients, 3, axis=-1)
    for name, mine, other, right in zip(("out", "dq", "dk", "dv"), ours, theirs, expected, strict=True):
        error, allowed = np.abs(mine - right).max(), 2 * np.abs(other - right).max()
        assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"
        assert np.square(mine - right).mean() <= 4 * np.square(other - right).mean(), name


def test_ten_steps_are_those_of_pytorch(device, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    monkeypatch.delitem(sys.modules, "parity", raising=False)
    import parity

    config = GPT2Config(num_layers=2, num_heads=2, channels=32, vocab_size=61, max_seq_len=24)
    inputs, targets = np.random.default_rng(0).integers(0, config.vocab_size, (2, 3, 17), dtype=np.int32)
    before = device.product_options()["tf32"]
    losses = parity.measure(device, config, initial_parameters(config), inputs, targets, "cpu")
    lines, differs, within = parity.report(losses)
    assert within and 0 < differs["float32"] < 1e-5 < differs["bfloat16"] and len(lines) == parity.STEPS + 2
    assert losses["torch"][0] > losses["torch"][-1] and before == device.product_options()["tf32"]
    for wrong in (losses["float32"][3] + 2 * parity.FLOAT32_BOUND, float("nan")):
        other = {**losses, "float32": [*losses["float32"][:3], wrong, *losses["float32"][4:]]}
        assert not parity.report(other)[2]
