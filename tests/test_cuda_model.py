"""A whole model on a device: the training step of the CPU backend, to float32's rounding, and generation."""

import inspect

import numpy as np
import pytest

import pyllmc
from pyllmc import AdamW, GPT2Config
from pyllmc.model import GPT2
from pyllmc.optimizer import clip_grad_norm, grad_norm

CONFIG = GPT2Config(num_layers=2, num_heads=2, channels=32, vocab_size=61, max_seq_len=24)


@pytest.fixture
def device_ops(device):
    return device.op_set("float32")


def batch(seed=0, B=3, T=17):
    inputs, targets = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (2, B, T), dtype=np.int32)
    targets[0, :3] = -1
    return inputs, targets


def test_the_first_steps_of_training_are_those_of_the_cpu(device_ops):
    models = [GPT2(CONFIG, ops=ops) for ops in (device_ops, pyllmc.backend("cpu"))]
    optimizers = [AdamW(model, learning_rate=1e-3, weight_decay=0.1) for model in models]
    for step in range(3):
        losses = []
        for model, optimizer in zip(models, optimizers):
            model.zero_grad()
            loss = [model.forward_backward(*batch(2 * step + i), loss_scale=0.5) for i in range(2)]
            losses += [float(each) for each in loss]
            norm = clip_grad_norm(model, 0.5)
            assert norm > 0.5 and grad_norm(model) == pytest.approx(0.5, rel=1e-5)
            optimizer.step()
        np.testing.assert_allclose(losses[:2], losses[2:], rtol=1e-5)
    params, expected = (model.ops.to_host(model.flat_params) for model in models)
    assert np.abs(params - expected).max() <= 1e-4 * np.abs(expected).max()


def test_gradients_are_those_of_the_cpu(device_ops):
    models = [GPT2(CONFIG, ops=ops) for ops in (device_ops, pyllmc.backend("cpu"))]
    for model in models:
        model.forward_backward(*batch())
    for name, gradient in models[1].grads.items():
        error = np.linalg.norm(models[0].ops.to_host(models[0].grads[name]) - gradient) / np.linalg.norm(gradient)
        assert error < 1e-5, name


def test_repeated_training_gives_the_same_bits(device_ops):
    results = []
    for _ in range(2):
        model = GPT2(CONFIG, ops=device_ops)
        optimizer = AdamW(model, learning_rate=1e-3)
        for step in range(2):
            model.zero_grad()
            model.forward_backward(*batch(step))
            optimizer.step()
        results.append(device_ops.to_host(model.flat_params).tobytes())
    assert results[0] == results[1]


def test_decoding_in_pieces_gives_the_logits(device_ops):
    model, (tokens, _) = GPT2(CONFIG, ops=device_ops), batch()
    logits = device_ops.to_host(model.logits(tokens))
    cache = model.new_cache(tokens.shape[0])
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, 17)):
        last = device_ops.to_host(model.decode(tokens[:, start:stop], cache))
        np.testing.assert_allclose(last, logits[:, stop - 1], atol=1e-5 * np.abs(logits).max())


def test_a_model_goes_to_a_file_and_back(device_ops, tmp_path):
    model = GPT2(CONFIG, ops=device_ops, seed=3)
    model.save(tmp_path / "model.bin")
    again = GPT2.from_checkpoint(tmp_path / "model.bin", ops=device_ops)
    np.testing.assert_array_equal(*(device_ops.to_host(m.flat_params) for m in (model, again)))


# ---- bfloat16 --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bf16_ops(device):
    return device.op_set("bfloat16")


def test_the_op_set_decides_the_float_of_new_arrays(device):
    for dtype in ("bfloat16", "float32"):
        ops = device.op_set(dtype)
        assert ops.empty((2,)).dtype == ops.zeros((2,)).dtype == ops.from_host([1.5]).dtype == dtype
        assert ops.zeros((2,), "wide").dtype == ops.from_host(ops.zeros((2,)), dtype="wide").dtype == "float32"
        assert ops.from_host([1]).dtype == ops.zeros((2,), "int32").dtype == "int32"
        assert ops.gelu_forward(ops.zeros((2,))).dtype == dtype
        assert inspect.signature(ops.from_host) == inspect.signature(device.from_host)
    with pytest.raises(ValueError, match="bfloat16 or float32, not 'float16'"):
        device.op_set("float16")


def test_training_in_bfloat16_follows_float32(bf16_ops, device_ops):
    curves = []
    for ops in (bf16_ops, device_ops):
        model = GPT2(CONFIG, ops=ops)
        optimizer = AdamW(model, learning_rate=3e-3, weight_decay=0.1)
        curve = []
        for _ in range(10):
            model.zero_grad()
            curve.append(float(model.forward_backward(*batch())))
            optimizer.step()
        curves.append(curve)
    assert curves[0][-1] < curves[0][0] - 0.5
    np.testing.assert_allclose(*curves, atol=0.02)


def test_bfloat16_parameters_are_their_masters_rounded(bf16_ops):
    model = GPT2(CONFIG, ops=bf16_ops)
    optimizer = AdamW(model, learning_rate=1e-5)  # below half a unit in the last place of most weights
    assert model.flat_params.dtype == "bfloat16" and optimizer.master.dtype == optimizer.m.dtype == "float32"
    before = bf16_ops.to_host(optimizer.master)
    for step in range(3):
        model.zero_grad()
        model.forward_backward(*batch(step))
        optimizer.step()
    params, master = bf16_ops.to_host(model.flat_params), bf16_ops.to_host(optimizer.master)
    moved = master != before
    assert moved.mean() > 0.8, "small updates are lost"
    error = params - master
    assert (np.abs(error) <= 2.0**-7 * np.abs(master)).all()
    assert (params[moved] != before[moved]).any() and abs(error[moved].mean()) < 0.05 * np.abs(error[moved]).mean()
