"""Debug states in pyllmc/checkpoint.py: the format against literal bytes, and hostile files."""

import dataclasses
import struct

import numpy as np
import pytest

from pyllmc import checkpoint
from pyllmc.config import GPT2Config

CONFIG = GPT2Config(num_layers=2, num_heads=2, channels=4, vocab_size=5, max_seq_len=3)
EXTREMES = (-1, 0, 1, 2**16, 2**31 - 1)


@pytest.fixture
def flat():
    """Gradients of CONFIG that are all different, zero in the padding of wte, which is 128 x 4."""
    values = np.arange(1, CONFIG.num_parameters_padded + 1, dtype=np.float32) / 7
    values[5 * 4 : 128 * 4] = 0
    return values


def patched(path, place, value):
    """The same file with one of its int32 changed."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, 4 * place, value)
    other = path.with_name("patched.bin")
    other.write_bytes(data)
    return other


def debug_state(grads, steps=0):
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, 5, (2, 2, 3), dtype=np.int32)
    targets[1, 1] = -1  # not counted
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    losses, norms = rng.normal(size=(2, steps)).astype(np.float32)
    return checkpoint.DebugState(inputs, targets, logits, 1.625, grads, losses, norms)


def assert_same_state(found, expected):
    for name in ("inputs", "targets", "logits", "grads", "losses", "norms"):
        array = getattr(found, name)
        assert array.dtype == getattr(expected, name).dtype and np.array_equal(array, getattr(expected, name)), name
    assert found.loss == expected.loss


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_debug_state_byte_for_byte(tmp_path, flat, steps):
    """Without steps it is llm.c's file."""
    path, state = tmp_path / "debug.bin", debug_state(flat, steps)
    checkpoint.write_debug_state(path, CONFIG, state)
    header = struct.pack("<5i", 20240327, 2, 2, 3, steps).ljust(1024, b"\0")
    parts = (state.inputs, state.targets, state.logits, np.float32(1.625), flat, state.losses, state.norms)
    assert path.read_bytes() == header + b"".join(part.tobytes() for part in parts)
    assert_same_state(checkpoint.read_debug_state(path, CONFIG), state)


@pytest.mark.parametrize("steps", [0, 3])
def test_debug_state_version_1(tmp_path, flat, steps):
    path, state = tmp_path / "debug.bin", debug_state(flat, steps)
    header = struct.pack("<5i", 20240327, 1, 2, 3, steps).ljust(1024, b"\0")
    parts = (state.inputs, state.targets, state.logits, np.float32(1.625), flat[:20], flat[512:])
    path.write_bytes(header + b"".join(part.tobytes() for part in (*parts, state.losses, state.norms)))
    assert_same_state(checkpoint.read_debug_state(path, CONFIG), state)


def test_size_of_gpt2s_debug_state():
    config = GPT2Config.from_descriptor("d12")
    assert 1024 + 4 * (2 * 256 + 256 * 50257 + 1 + config.num_parameters_padded) == 549_369_860


@pytest.mark.parametrize(("slot", "value"), [(slot, value) for slot in range(5) for value in EXTREMES])
def test_hostile_debug_states(tmp_path, flat, slot, value):
    path = tmp_path / "debug.bin"
    checkpoint.write_debug_state(path, CONFIG, debug_state(flat, steps=2))
    with pytest.raises(ValueError, match="patched.bin: "):
        checkpoint.read_debug_state(patched(path, slot, value), CONFIG)


def test_every_truncation_of_a_debug_state(tmp_path, flat):
    path = tmp_path / "debug.bin"
    checkpoint.write_debug_state(path, CONFIG, debug_state(flat, steps=2))
    data = path.read_bytes()
    for size in [*range(0, len(data), 97), *range(len(data) - 20, len(data)), len(data) + 4]:
        path.write_bytes((data + bytes(4))[:size])
        with pytest.raises(ValueError, match="debug.bin: "):
            checkpoint.read_debug_state(path, CONFIG)


# The inputs are 6 numbers from byte 1024 on, the targets follow.
@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (0, -1, "inputs from -1 to"),
        (5, 5, "inputs from 1 to 5"),
        (6, -2, "targets from -2"),
        (11, 2**31 - 1, "targets"),
    ],
)
def test_tokens_of_a_debug_state_are_checked(tmp_path, flat, place, value, told):
    path = tmp_path / "debug.bin"
    checkpoint.write_debug_state(path, CONFIG, debug_state(flat))
    with pytest.raises(ValueError, match=f"patched.bin: {told}.* do not fit a vocabulary of 5"):
        checkpoint.read_debug_state(patched(path, 256 + place, value), CONFIG)


def test_debug_state_of_another_model(tmp_path, flat):
    path = tmp_path / "debug.bin"
    checkpoint.write_debug_state(path, CONFIG, debug_state(flat))
    other = GPT2Config(2, 2, 8, 5, 3)
    with pytest.raises(ValueError, match=r"expected for 2 x 3 tokens, 0 steps and GPT2Config\(.* of another model"):
        checkpoint.read_debug_state(path, other)


def test_wrong_debug_states_are_not_written(tmp_path, flat):
    for changes in ({"norms": np.zeros(1, np.float32)}, {"losses": np.zeros(10_001), "norms": np.zeros(10_001)}):
        with pytest.raises(ValueError):
            checkpoint.write_debug_state(tmp_path / "x.bin", CONFIG, dataclasses.replace(debug_state(flat), **changes))
    assert not list(tmp_path.iterdir())
