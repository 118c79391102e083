"""pyllmc/modelfile.py: model files and debug states against literal bytes, and what is told of wrong ones.

test_fuzz.py goes through every number and every length of such files.
"""

import dataclasses
import struct

import numpy as np
import pytest
from hostile import patched

from pyllmc import modelfile
from pyllmc.config import GPT2Config
from pyllmc.floats import to_bfloat16
from pyllmc.model import GPT2

CONFIG = GPT2Config(num_layers=2, num_heads=2, channels=4, vocab_size=5, max_seq_len=3)
# wte 128 x 4, wpe 3 x 4, 2 layers of 12 C^2 + 13 C, lnf 2 C
NUM_PARAMETERS = 512 + 12 + 2 * (192 + 52) + 8


@pytest.fixture
def flat():
    """Parameters (or gradients) of CONFIG that are all different, zero in the padding."""
    values = np.arange(1, NUM_PARAMETERS + 1, dtype=np.float32) / 7
    values[5 * 4 : 128 * 4] = 0
    return values


@pytest.fixture
def model_file(tmp_path, flat):
    path = tmp_path / "model.bin"
    modelfile.write_model(path, CONFIG, flat)
    return path


def slots_of(path):
    return list(struct.unpack("<256i", path.read_bytes()[:1024]))


# ---- model files -----------------------------------------------------------------------------------------------------


def test_model_file_byte_for_byte(model_file, flat):
    data = model_file.read_bytes()
    assert data[:32] == bytes.fromhex("c6d73401 03000000 03000000 05000000 02000000 02000000 04000000 80000000")
    assert data[32:1024] == bytes(992)
    assert data[1024:] == flat.astype("<f4").tobytes()
    assert len(data) == 1024 + 4 * NUM_PARAMETERS


def test_bfloat16_model_file(tmp_path, flat):
    path = tmp_path / "model.bin"
    modelfile.write_model(path, CONFIG, flat, "bfloat16")
    data = path.read_bytes()
    assert slots_of(path)[:8] == [20240326, 5, 3, 5, 2, 2, 4, 128] and len(data) == 1024 + 2 * NUM_PARAMETERS
    assert np.array_equal(np.frombuffer(data, "<u2", offset=1024), to_bfloat16(flat))
    config, back = modelfile.read_model(path)
    assert config == CONFIG and np.allclose(back, flat, rtol=2**-8, atol=0)
    # What has been rounded once is not changed by another round trip.
    modelfile.write_model(tmp_path / "again.bin", CONFIG, back, "bfloat16")
    assert (tmp_path / "again.bin").read_bytes() == data


def test_bfloat16_rounding():
    cases = {
        0x3F800000: 0x3F80,  # 1
        0x3F808000: 0x3F80,  # a tie goes to the even one
        0x3F818000: 0x3F82,
        0x3F808001: 0x3F81,
        0x3F807FFF: 0x3F80,
        0x7F7FFFFF: 0x7F80,  # the largest float32 becomes infinity
        0xFF800000: 0xFF80,
        0x7F800001: 0x7FC0,  # a NaN stays one
        0xFFFFFFFF: 0xFFFF,
        0x80000000: 0x8000,
        0x00000001: 0x0000,
    }
    bits = np.array(list(cases), np.uint32).view(np.float32)
    assert [hex(value) for value in to_bfloat16(bits)] == [hex(value) for value in cases.values()]


def test_sizes_of_gpt2():
    """497,904,640 bytes as float32 and 248,952,832 as bfloat16, as llm.c's files."""
    config = GPT2Config.from_descriptor("d12")
    assert 1024 + 4 * config.num_parameters_padded == 497_904_640
    assert 1024 + 2 * config.num_parameters_padded == 248_952_832


def test_round_trip(model_file, flat):
    config, back = modelfile.read_model(model_file)
    assert config == CONFIG and back.dtype == np.float32 and np.array_equal(back, flat)
    header = modelfile.read_header(model_file)
    assert (header.version, header.config, header.rows, header.dtype) == (3, CONFIG, 128, "float32")


def test_version_1_has_no_padding(tmp_path, flat):
    path = tmp_path / "model.bin"
    # Slot 7 was not in use: whatever it holds is not read.
    header = struct.pack("<8i", 20240326, 1, 3, 5, 2, 2, 4, 99).ljust(1024, b"\0")
    path.write_bytes(header + flat[:20].tobytes() + flat[512:].tobytes())
    config, back = modelfile.read_model(path)
    assert config == CONFIG and np.array_equal(back, flat)


@pytest.mark.parametrize("rows", [5, 6, 64, 1000])
def test_another_padding_is_read(tmp_path, flat, rows):
    path = tmp_path / "model.bin"
    header = struct.pack("<8i", 20240326, 3, 3, 5, 2, 2, 4, rows).ljust(1024, b"\0")
    path.write_bytes(
        header + flat[:20].tobytes() + np.ones(4 * (rows - 5), np.float32).tobytes() + flat[512:].tobytes()
    )
    config, back = modelfile.read_model(path)
    assert config == CONFIG and np.array_equal(back, flat)


def test_padding_is_written_as_zeros(tmp_path, flat):
    dirty = flat.copy()
    dirty[20:512] = 3.0
    for dtype in ("float32", "bfloat16"):
        modelfile.write_model(tmp_path / "clean.bin", CONFIG, flat, dtype)
        modelfile.write_model(tmp_path / "dirty.bin", CONFIG, dirty, dtype)
        assert (tmp_path / "clean.bin").read_bytes() == (tmp_path / "dirty.bin").read_bytes()


@pytest.mark.parametrize(
    ("slot", "value", "told"),
    [
        (1, 2, "version 2 of the model format cannot be read, only 1, 3 and 5"),
        (1, 6, "version 6 of the model format cannot be read, only 1, 3 and 5"),
        (2, 0, "not a model: "),
        (4, 1, f"{1024 + 4 * NUM_PARAMETERS} bytes found, .* the file is damaged or of another kind"),
        (4, 3, f"{1024 + 4 * NUM_PARAMETERS} bytes found, .* the file is truncated"),
        (6, -4, "not a model: "),
        (7, 4, "not a model: 5 tokens in a table of 4 rows"),
    ],
)
def test_wrong_numbers_of_the_header_are_told(model_file, slot, value, told):
    path = patched(model_file, slot, value)
    for read in (modelfile.read_model, modelfile.read_header):
        with pytest.raises(ValueError, match=f"patched.bin: {told}"):
            read(path)


def test_header_numbers_that_cancel_out_are_still_one_model(tmp_path):
    """Huge products are computed without overflow: this header's size is 0 modulo 2^32."""
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<8i", 20240326, 3, 2**16, 2**16, 2**10, 1, 2**16, 2**16).ljust(1024, b"\0"))
    with pytest.raises(
        ValueError, match="1024 bytes found, .* expected for a model of .* parameters; the file is truncated"
    ):
        modelfile.read_model(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [(-1, "the file is truncated"), (1, "the file is damaged or of another kind"), (-8000, "ends inside the header")],
)
def test_wrong_sizes_are_told(model_file, change, problem):
    data = model_file.read_bytes()
    model_file.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(ValueError, match=problem):
        modelfile.read_model(model_file)


def test_other_kinds_are_named(model_file):
    with pytest.raises(ValueError, match="not a model but a token file"):
        modelfile.read_model(patched(model_file, 0, 20240520))
    with pytest.raises(ValueError, match="not a model: magic is 1, expected 20240326"):
        modelfile.read_model(patched(model_file, 0, 1))


def test_missing_and_impossible_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        modelfile.read_model(tmp_path / "missing.bin")
    with pytest.raises(ValueError, match="not a regular file"):
        modelfile.read_model(tmp_path)


def test_wrong_arguments(tmp_path, flat):
    with pytest.raises(ValueError, match="must be one of float32, bfloat16, got 'float16'"):
        modelfile.write_model(tmp_path / "x.bin", CONFIG, flat, "float16")
    for wrong in (flat[:-1], flat.astype(np.float64), flat.reshape(2, -1), np.repeat(flat, 2)[::2]):
        with pytest.raises(ValueError, match="must be a flat float32 array of 1020"):
            modelfile.write_model(tmp_path / "x.bin", CONFIG, wrong)
    assert not list(tmp_path.iterdir())


def test_model_saves_and_loads(tmp_path):
    model = GPT2(CONFIG)
    model.save(tmp_path / "model.bin")
    back = GPT2.from_checkpoint(tmp_path / "model.bin")
    assert back.config == CONFIG and np.array_equal(back.flat_params, model.flat_params)
    back.params["wte"][0] = 1
    model.save(tmp_path / "rounded.bin", dtype="bfloat16")
    rounded = GPT2.from_checkpoint(tmp_path / "rounded.bin")
    assert np.allclose(rounded.flat_params, model.flat_params, rtol=2**-8)


# ---- debug states ----------------------------------------------------------------------------------------------------


def debug_state(grads, steps=0):
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, 5, (2, 2, 3), dtype=np.int32)
    targets[1, 1] = -1  # not counted
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    losses, norms = rng.normal(size=(2, steps)).astype(np.float32)
    return modelfile.DebugState(inputs, targets, logits, 1.625, grads, losses, norms)


def assert_same_state(found, expected):
    for name in ("inputs", "targets", "logits", "grads", "losses", "norms"):
        array = getattr(found, name)
        assert array.dtype == getattr(expected, name).dtype and np.array_equal(array, getattr(expected, name)), name
    assert found.loss == expected.loss


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_debug_state_byte_for_byte(tmp_path, flat, steps):
    """Without steps it is llm.c's file."""
    path, state = tmp_path / "debug.bin", debug_state(flat, steps)
    modelfile.write_debug_state(path, CONFIG, state)
    header = struct.pack("<5i", 20240327, 2, 2, 3, steps).ljust(1024, b"\0")
    parts = (state.inputs, state.targets, state.logits, np.float32(1.625), flat, state.losses, state.norms)
    assert path.read_bytes() == header + b"".join(part.tobytes() for part in parts)
    assert_same_state(modelfile.read_debug_state(path, CONFIG), state)


@pytest.mark.parametrize("steps", [0, 3])
def test_debug_state_version_1(tmp_path, flat, steps):
    path, state = tmp_path / "debug.bin", debug_state(flat, steps)
    header = struct.pack("<5i", 20240327, 1, 2, 3, steps).ljust(1024, b"\0")
    parts = (state.inputs, state.targets, state.logits, np.float32(1.625), flat[:20], flat[512:])
    path.write_bytes(header + b"".join(part.tobytes() for part in (*parts, state.losses, state.norms)))
    assert_same_state(modelfile.read_debug_state(path, CONFIG), state)


def test_size_of_gpt2s_debug_state():
    config = GPT2Config.from_descriptor("d12")
    assert 1024 + 4 * (2 * 256 + 256 * 50257 + 1 + config.num_parameters_padded) == 549_369_860


@pytest.mark.parametrize(
    ("slot", "value", "told"),
    [
        (0, 20240326, "not a debug state but a model"),
        (1, 3, "version 3 of the debug state cannot be read, only 1 and 2"),
        (2, 0, "a batch of 0 x 3 tokens does not fit a model of 3"),
        (3, 4, "a batch of 2 x 4 tokens does not fit a model of 3"),
        (4, 10_001, "losses of 10001 steps, expected 0 to 10000"),
        (4, 1, ".* bytes found, .* expected for 2 x 3 tokens, 1 steps"),
    ],
)
def test_wrong_numbers_of_a_debug_state_are_told(tmp_path, flat, slot, value, told):
    path = tmp_path / "debug.bin"
    modelfile.write_debug_state(path, CONFIG, debug_state(flat, steps=2))
    with pytest.raises(ValueError, match=f"patched.bin: {told}"):
        modelfile.read_debug_state(patched(path, slot, value), CONFIG)


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
    modelfile.write_debug_state(path, CONFIG, debug_state(flat))
    with pytest.raises(ValueError, match=f"patched.bin: {told}.* do not fit a vocabulary of 5"):
        modelfile.read_debug_state(patched(path, 256 + place, value), CONFIG)


def test_debug_state_of_another_model(tmp_path, flat):
    path = tmp_path / "debug.bin"
    modelfile.write_debug_state(path, CONFIG, debug_state(flat))
    other = GPT2Config(2, 2, 8, 5, 3)
    with pytest.raises(ValueError, match=r"expected for 2 x 3 tokens, 0 steps and GPT2Config\(.* of another model"):
        modelfile.read_debug_state(path, other)


def test_wrong_debug_states_are_not_written(tmp_path, flat):
    for changes in ({"norms": np.zeros(1, np.float32)}, {"losses": np.zeros(10_001), "norms": np.zeros(10_001)}):
        with pytest.raises(ValueError):
            modelfile.write_debug_state(tmp_path / "x.bin", CONFIG, dataclasses.replace(debug_state(flat), **changes))
    assert not list(tmp_path.iterdir())
