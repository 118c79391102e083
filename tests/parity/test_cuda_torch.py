"""The CUDA backend's bfloat16 attention against PyTorch's: at most twice as far from the exact result.

PyTorch's is the textbook computation, every intermediate in bfloat16. The rule is that of the FlashAttention
repository's own tests. Needs torch; runs on the kernels as plain C++ and, with a GPU, on the real ones.
"""

import numpy as np
import pytest
import reference
from on_device import OnDevice
from test_cuda_ops import bf16

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
