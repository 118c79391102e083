"""pyllmc/checkpoint.py: the formats against literal bytes, hostile files, and runs that go on bit for bit.

Debug states have a file of their own: test_debug_state.py.
"""

import json
import resource
import struct

import numpy as np
import pytest

import pyllmc
from pyllmc import checkpoint
from pyllmc.config import GPT2Config
from pyllmc.dataloader import DataLoader
from pyllmc.model import GPT2
from pyllmc.optimizer import AdamW

CONFIG = GPT2Config(num_layers=2, num_heads=2, channels=4, vocab_size=5, max_seq_len=3)
# wte 128 x 4, wpe 3 x 4, 2 layers of 12 C^2 + 13 C, lnf 2 C
NUM_PARAMETERS = 512 + 12 + 2 * (192 + 52) + 8
EXTREMES = (-1, 0, 1, 2**16, 2**31 - 1)


@pytest.fixture
def flat():
    """Parameters of CONFIG that are all different, zero in the padding."""
    values = np.arange(1, NUM_PARAMETERS + 1, dtype=np.float32) / 7
    values[5 * 4 : 128 * 4] = 0
    return values


@pytest.fixture
def model_file(tmp_path, flat):
    path = tmp_path / "model.bin"
    checkpoint.write_model(path, CONFIG, flat)
    return path


def slots_of(path):
    return list(struct.unpack("<256i", path.read_bytes()[:1024]))


def patched(path, slot, value):
    """The same file with one int32 of the header changed."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, 4 * slot, value)
    other = path.with_name("patched.bin")
    other.write_bytes(data)
    return other


# ---- model files -----------------------------------------------------------------------------------------------------


def test_model_file_byte_for_byte(model_file, flat):
    data = model_file.read_bytes()
    assert data[:32] == bytes.fromhex("c6d73401 03000000 03000000 05000000 02000000 02000000 04000000 80000000")
    assert data[32:1024] == bytes(992)
    assert data[1024:] == flat.astype("<f4").tobytes()
    assert len(data) == 1024 + 4 * NUM_PARAMETERS


def test_bfloat16_model_file(tmp_path, flat):
    path = tmp_path / "model.bin"
    checkpoint.write_model(path, CONFIG, flat, "bfloat16")
    data = path.read_bytes()
    assert slots_of(path)[:8] == [20240326, 5, 3, 5, 2, 2, 4, 128] and len(data) == 1024 + 2 * NUM_PARAMETERS
    assert np.array_equal(np.frombuffer(data, "<u2", offset=1024), checkpoint.to_bfloat16(flat))
    config, back = checkpoint.read_model(path)
    assert config == CONFIG and np.allclose(back, flat, rtol=2**-8, atol=0)
    # What has been rounded once is not changed by another round trip.
    checkpoint.write_model(tmp_path / "again.bin", CONFIG, back, "bfloat16")
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
    assert [hex(value) for value in checkpoint.to_bfloat16(bits)] == [hex(value) for value in cases.values()]


def test_sizes_of_gpt2():
    """497,904,640 bytes as float32 and 248,952,832 as bfloat16, as llm.c's files."""
    config = GPT2Config.from_descriptor("d12")
    assert 1024 + 4 * config.num_parameters_padded == 497_904_640
    assert 1024 + 2 * config.num_parameters_padded == 248_952_832


def test_round_trip(model_file, flat):
    config, back = checkpoint.read_model(model_file)
    assert config == CONFIG and back.dtype == np.float32 and np.array_equal(back, flat)
    header = checkpoint.read_header(model_file)
    assert (header.version, header.config, header.rows, header.itemsize) == (3, CONFIG, 128, 4)


def test_version_1_has_no_padding(tmp_path, flat):
    path = tmp_path / "model.bin"
    # Slot 7 was not in use: whatever it holds is not read.
    header = struct.pack("<8i", 20240326, 1, 3, 5, 2, 2, 4, 99).ljust(1024, b"\0")
    path.write_bytes(header + flat[:20].tobytes() + flat[512:].tobytes())
    config, back = checkpoint.read_model(path)
    assert config == CONFIG and np.array_equal(back, flat)


@pytest.mark.parametrize("rows", [5, 6, 64, 1000])
def test_another_padding_is_read(tmp_path, flat, rows):
    path = tmp_path / "model.bin"
    header = struct.pack("<8i", 20240326, 3, 3, 5, 2, 2, 4, rows).ljust(1024, b"\0")
    path.write_bytes(
        header + flat[:20].tobytes() + np.ones(4 * (rows - 5), np.float32).tobytes() + flat[512:].tobytes()
    )
    config, back = checkpoint.read_model(path)
    assert config == CONFIG and np.array_equal(back, flat)


def test_padding_is_written_as_zeros(tmp_path, flat):
    dirty = flat.copy()
    dirty[20:512] = 3.0
    for dtype in ("float32", "bfloat16"):
        checkpoint.write_model(tmp_path / "clean.bin", CONFIG, flat, dtype)
        checkpoint.write_model(tmp_path / "dirty.bin", CONFIG, dirty, dtype)
        assert (tmp_path / "clean.bin").read_bytes() == (tmp_path / "dirty.bin").read_bytes()


# One token in the same padded table, or one head, makes another model of the same size.
@pytest.mark.parametrize(
    ("slot", "value"),
    [(slot, value) for slot in range(8) for value in EXTREMES if (slot, value) not in ((3, 1), (5, 1))],
)
def test_every_header_number_is_checked(model_file, slot, value):
    path = patched(model_file, slot, value)
    for read in (checkpoint.read_model, checkpoint.read_header):
        with pytest.raises(ValueError, match="patched.bin: ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_header_numbers_that_cancel_out_are_still_one_model(tmp_path):
    """Huge products are computed without overflow: this header's size is 0 modulo 2^32."""
    path = tmp_path / "model.bin"
    path.write_bytes(struct.pack("<8i", 20240326, 3, 2**16, 2**16, 2**10, 1, 2**16, 2**16).ljust(1024, b"\0"))
    with pytest.raises(
        ValueError, match="1024 bytes found, .* expected for a model of .* parameters; the file is truncated"
    ):
        checkpoint.read_model(path)


@pytest.mark.parametrize("version", [2, 4, 6])
def test_other_versions(model_file, version):
    with pytest.raises(ValueError, match=f"version {version} of the model format cannot be read, only 1, 3 and 5"):
        checkpoint.read_model(patched(model_file, 1, version))


@pytest.mark.parametrize("change", [-4000, -2000, -1024, -4, -1, 1, 4, 10_000])
def test_wrong_sizes(model_file, change):
    data = model_file.read_bytes()
    model_file.write_bytes(data[:change] if change < 0 else data + bytes(change))
    problem = "the file is truncated" if change < 0 else "the file is damaged or of another kind"
    with pytest.raises(ValueError, match=problem):
        checkpoint.read_model(model_file)


@pytest.mark.parametrize("size", [0, 1, 4, 1023, 1024])
def test_not_even_a_header(model_file, size):
    model_file.write_bytes(model_file.read_bytes()[:size])
    with pytest.raises(ValueError, match="truncated"):
        checkpoint.read_model(model_file)


def test_other_kinds_are_named(model_file):
    with pytest.raises(ValueError, match="not a model but a token file"):
        checkpoint.read_model(patched(model_file, 0, 20240520))
    with pytest.raises(
        ValueError, match=r"not a model but no file of this family \(first number 1, expected 20240326\)"
    ):
        checkpoint.read_model(patched(model_file, 0, 1))


def test_missing_and_impossible_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.read_model(tmp_path / "missing.bin")
    with pytest.raises(ValueError, match="not a regular file"):
        checkpoint.read_model(tmp_path)


def test_wrong_arguments(tmp_path, flat):
    with pytest.raises(ValueError, match="must be one of float32, bfloat16, got 'float16'"):
        checkpoint.write_model(tmp_path / "x.bin", CONFIG, flat, "float16")
    for wrong in (flat[:-1], flat.astype(np.float64), flat.reshape(2, -1), np.repeat(flat, 2)[::2]):
        with pytest.raises(ValueError, match="must be a flat float32 array of 1020"):
            checkpoint.write_model(tmp_path / "x.bin", CONFIG, wrong)
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


# ---- training states -------------------------------------------------------------------------------------------------


def training_state(shuffle=True, masters=None):
    m = np.arange(6, dtype=np.float32)
    loader = {
        "shuffle": shuffle,
        "shard": 1,
        "sample": 2**33 + 5,
        "shard_order": np.array([1, 0], np.int32),
        "sample_order": np.array([2, 0, 1], np.int32),
        "generator": bytes(range(252)) * 10,
    }
    return checkpoint.TrainingState(77, m, -m, loader, rounding=(13371337, 2**63 + 1), masters=masters)


@pytest.mark.parametrize("masters", [None, np.full(6, 0.5, np.float32)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_training_state_byte_for_byte(tmp_path, shuffle, masters):
    path, state = tmp_path / "state.bin", training_state(shuffle, masters)
    checkpoint.write_state(path, state)
    header = struct.pack("<6i", 20240527, 1, 1, 0, masters is not None, shuffle).ljust(40, b"\0")
    header = (header + struct.pack("<i", 77)).ljust(80, b"\0") + struct.pack("<QQ", 13371337, 2**63 + 1)
    header = (header.ljust(120, b"\0") + struct.pack("<QQ", 1, 2**33 + 5)).ljust(1024, b"\0")
    body = state.m.tobytes() + state.v.tobytes() + (b"" if masters is None else masters.tobytes())
    if shuffle:
        body += struct.pack("<Qii", 2, 1, 0) + struct.pack("<Qiii", 3, 2, 0, 1) + bytes(range(252)) * 10
    assert path.read_bytes() == header + body

    back = checkpoint.read_state(path, 6)
    assert (back.step, back.num_processes, back.rank, back.rounding) == (77, 1, 0, (13371337, 2**63 + 1))
    assert np.array_equal(back.m, state.m) and np.array_equal(back.v, state.v)
    assert back.masters is None if masters is None else np.array_equal(back.masters, masters)
    assert back.loader["shuffle"] is shuffle and (back.loader["shard"], back.loader["sample"]) == (1, 2**33 + 5)
    if shuffle:
        assert back.loader["shard_order"].tolist() == [1, 0] and back.loader["sample_order"].tolist() == [2, 0, 1]
        assert back.loader["generator"] == state.loader["generator"]


# Right is: version 1, any number of processes above the rank, no masters, shuffled, any step.
@pytest.mark.parametrize(
    ("slot", "wrong"),
    [
        (0, EXTREMES),
        (1, (-1, 0, 2**16, 2**31 - 1)),
        (2, (-1, 0)),
        (3, (-1, 1, 2**16, 2**31 - 1)),
        (4, (-1, 1, 2**16, 2**31 - 1)),
        (5, (-1, 0, 2**16, 2**31 - 1)),
        (10, (-1,)),
    ],
)
def test_hostile_training_states(tmp_path, slot, wrong):
    path = tmp_path / "state.bin"
    checkpoint.write_state(path, training_state())
    for value in wrong:
        with pytest.raises(ValueError, match="patched.bin: "):
            checkpoint.read_state(patched(path, slot, value), 6)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_truncation_of_a_training_state(tmp_path, shuffle):
    path = tmp_path / "state.bin"
    checkpoint.write_state(path, training_state(shuffle))
    data = path.read_bytes()
    sizes = set(range(0, len(data), 97)) | set(range(1020, 1150)) | {len(data) - 1}
    for size in sizes & set(range(len(data))):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="state.bin: "):
            checkpoint.read_state(path, 6)
    for extra in (1, 4, 4096):
        path.write_bytes(data + bytes(extra))
        with pytest.raises(ValueError, match="damaged|expected"):
            checkpoint.read_state(path, 6)


@pytest.mark.parametrize("count", [2**63, 2**40, 10**6])
def test_a_permutation_longer_than_the_file(tmp_path, count):
    path = tmp_path / "state.bin"
    checkpoint.write_state(path, training_state())
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, 1024 + 4 * 12, count)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"an order of {count} samples or shards in the last"):
        checkpoint.read_state(path, 6)


def test_training_state_of_another_model(tmp_path):
    path = tmp_path / "state.bin"
    for shuffle in (True, False):
        checkpoint.write_state(path, training_state(shuffle))
        for n in (5, 7, 10**6):
            with pytest.raises(ValueError, match="state.bin: "):
                checkpoint.read_state(path, n)


# ---- runs ------------------------------------------------------------------------------------------------------------

RUN_CONFIG = GPT2Config(num_layers=2, num_heads=2, channels=16, vocab_size=50, max_seq_len=8)


@pytest.fixture
def token_file(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50, 500, dtype=np.uint16)
    path = tmp_path / "tokens.bin"
    path.write_bytes(struct.pack("<3i", 20240520, 1, 500).ljust(1024, b"\0") + tokens.astype("<u2").tobytes())
    return path


class Run:
    """A training run in small: model, optimizer, loader. Closes its file at the end of a with block."""

    def __init__(self, token_file, shuffle=True, model=None):
        self.model = model or GPT2(RUN_CONFIG)
        self.optimizer = AdamW(self.model, 1e-2, weight_decay=0.1)
        self.loader = DataLoader(token_file, 4, 8, shuffle=shuffle)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.loader.close()

    def train(self, steps):
        losses = []
        for _ in range(steps):
            self.model.zero_grad()
            losses.append(float(self.model.forward_backward(*self.loader.next_batch())))
            pyllmc.clip_grad_norm(self.model, 1.0)
            self.optimizer.step()
        return losses

    def save(self, folder, **extra):
        step = self.optimizer.step_count
        return checkpoint.save_checkpoint(folder, step, self.model, self.optimizer, self.loader, extra)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("saved_at", [1, 15, 16, 20])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, token_file, shuffle, saved_at):
    """15 batches are an epoch: the position before, at and after its end."""
    with Run(token_file, shuffle) as straight:
        straight.train(saved_at)
        straight.save(tmp_path / "run", coins=1337)
        expected = straight.train(18)

    found = checkpoint.find_latest(tmp_path / "run")
    with Run(token_file, shuffle, GPT2.from_checkpoint(found.model_path)) as resumed:
        assert checkpoint.load_checkpoint(found, resumed.optimizer, resumed.loader) == {"coins": 1337}
        assert resumed.optimizer.step_count == saved_at
        assert resumed.train(18) == expected
    for name in ("m", "v"):
        assert np.array_equal(getattr(resumed.optimizer, name), getattr(straight.optimizer, name))
    assert np.array_equal(resumed.model.flat_params, straight.model.flat_params)


def test_files_of_a_checkpoint(tmp_path, token_file):
    with Run(token_file) as run:
        run.train(2)
        saved = run.save(tmp_path / "a" / "b")
    names = ["DONE_00000002", "model_00000002.bin", "state_00000002_00000.bin"]
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == names
    manifest = json.loads(saved.done_path.read_text())
    assert manifest["version"] == 1 and manifest["step"] == 2 and set(manifest["files"]) == set(names[1:])
    assert manifest["files"][names[1]]["bytes"] == 1024 + 4 * RUN_CONFIG.num_parameters_padded
    assert slots_of(saved.state_path)[:11] == [20240527, 1, 1, 0, 0, 1, 0, 0, 0, 0, 2]


def test_a_checkpoint_is_not_written_over(tmp_path, token_file):
    with Run(token_file) as run:
        run.train(1)
        saved = run.save(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ValueError, match="DONE_00000001: step 1 has a checkpoint already"):
            run.save(tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        saved.remove()
        run.save(tmp_path)


@pytest.fixture
def three_checkpoints(tmp_path, token_file):
    with Run(token_file) as run:
        for _ in range(3):
            run.train(1)
            run.save(tmp_path / "run")
    return tmp_path / "run"


def latest(folder, **options):
    lines = []
    found = checkpoint.find_latest(folder, report=lines.append, **options)
    assert not any("\n" in line for line in lines)
    return found and found.step, lines


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def test_the_newest_is_found(three_checkpoints):
    assert latest(three_checkpoints) == (3, [])
    assert checkpoint.list_steps(three_checkpoints) == [1, 2, 3]
    assert latest(three_checkpoints / "missing") == (None, [])


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
)
@pytest.mark.parametrize("name", ["model_00000003.bin", "state_00000003_00000.bin"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_used(three_checkpoints, name, damage):
    damage(three_checkpoints / name)
    step, lines = latest(three_checkpoints)
    assert step == 2 and len(lines) == 1
    assert lines[0].startswith(f"checkpoint 3 in {three_checkpoints} is damaged and not used: ") and name in lines[0]
    # To generate, only the model counts.
    assert latest(three_checkpoints, with_state=False)[0] == (2 if name.startswith("model") else 3)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "7",
        "{}",
        '{"version": 2, "files": {}, "extra": {}}',
        '{"version": 1, "files": [], "extra": {}}',
        '{"version": 1, "files": {"x": {}}, "extra": {}}',
        '{"version": 1, "files": {}, "extra": 1}',
        "[" * 100_000,
        "\udc80",
        '{"version": 1, "step": 3, "files": {}, "extra": {}}',
    ],
)
def test_a_damaged_manifest(three_checkpoints, text):
    (three_checkpoints / "DONE_00000003").write_text(text, errors="surrogateescape")
    step, lines = latest(three_checkpoints)
    assert step == 2 and len(lines) == 1


def test_all_damaged(three_checkpoints):
    for step in (1, 2, 3):
        (three_checkpoints / f"model_{step:08d}.bin").unlink()
    step, lines = latest(three_checkpoints)
    assert step is None and len(lines) == 3


def test_an_unfinished_checkpoint_is_none(three_checkpoints):
    (three_checkpoints / "DONE_00000003").unlink()
    assert latest(three_checkpoints) == (2, [])


def test_llmcs_empty_done_file(three_checkpoints):
    (three_checkpoints / "DONE_00000003").write_bytes(b"")
    assert latest(three_checkpoints) == (3, [])


def test_names_that_only_look_like_checkpoints(three_checkpoints):
    for name in ("DONE_", "DONE_9", "DONE_00000009.tmp", "DONE_0000000x", "XDONE_00000009", "DONE_٠٠٠٠٠٠٠٩"):
        (three_checkpoints / name).touch()
    assert checkpoint.list_steps(three_checkpoints) == [1, 2, 3]


def test_loading_into_another_run_changes_nothing(three_checkpoints, token_file):
    found = checkpoint.find_latest(three_checkpoints)
    with (
        Run(token_file, shuffle=False, model=GPT2.from_checkpoint(found.model_path)) as run,
        pytest.raises(ValueError, match="state_00000003_00000.bin: .*shuffle"),
    ):
        checkpoint.load_checkpoint(found, run.optimizer, run.loader)
    assert run.optimizer.step_count == 0 and not run.optimizer.m.any()
    other = AdamW(GPT2(CONFIG))
    with pytest.raises(ValueError, match="state_00000003_00000.bin: .* expected"):
        checkpoint.load_checkpoint(found, other)


def test_states_of_other_steps_and_of_several_processes(three_checkpoints):
    found = checkpoint.find_latest(three_checkpoints)
    optimizer = AdamW(GPT2.from_checkpoint(found.model_path))
    data = found.state_path.read_bytes()
    for slot, value, message in ((10, 4, "is of step 4, not 3"), (2, 8, "is of a run of 8 processes")):
        changed = bytearray(data)
        struct.pack_into("<i", changed, 4 * slot, value)
        found.state_path.write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            checkpoint.load_checkpoint(found, optimizer)


def test_removing_old_checkpoints(three_checkpoints):
    checkpoint.remove_old_checkpoints(three_checkpoints, keep=0)
    assert checkpoint.list_steps(three_checkpoints) == [1, 2, 3]
    checkpoint.remove_old_checkpoints(three_checkpoints, keep=1, keep_every=2)
    assert checkpoint.list_steps(three_checkpoints) == [2, 3]
    checkpoint.remove_old_checkpoints(three_checkpoints, keep=1)
    assert sorted(path.name for path in three_checkpoints.iterdir()) == [
        "DONE_00000003",
        "model_00000003.bin",
        "state_00000003_00000.bin",
    ]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, token_file):
    folder = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Run(token_file) as run:
        run.train(1)
        run.save(folder)
        run.train(1)
        # The model still fits, the state does not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 + 4 * RUN_CONFIG.num_parameters_padded, limits[1]))
        try:
            with pytest.raises(OSError, match="cannot write this file: .*state_00000002_00000.bin"):
                run.save(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    assert latest(folder) == (1, [])
