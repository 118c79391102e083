"""pyllmc/checkpoint.py: runs that go on bit for bit, and folders in which something is damaged."""

import json
import resource
import struct

import numpy as np
import pytest
from small_run import CONFIG, Run, write_tokens

from pyllmc import checkpoint, modelfile, statefile
from pyllmc.config import GPT2Config
from pyllmc.model import GPT2
from pyllmc.optimizer import AdamW


@pytest.fixture
def token_file(tmp_path):
    return write_tokens(tmp_path / "tokens.bin")


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("saved_at", [1, 31, 32, 40])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, token_file, shuffle, saved_at):
    """31 batches are an epoch: the position before, at and after its end."""
    with Run(token_file, shuffle=shuffle) as straight:
        straight.train(saved_at)
        straight.save(tmp_path / "run", coins=1337)
        expected = straight.train(18)

    found = checkpoint.find_latest(tmp_path / "run")
    with Run(token_file, shuffle=shuffle, model=GPT2.from_checkpoint(found.model_path)) as resumed:
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
    assert manifest["files"][names[1]]["bytes"] == 1024 + 4 * CONFIG.num_parameters_padded
    assert struct.unpack("<11i", saved.state_path().read_bytes()[:44]) == (20240527, 1, 1, 0, 0, 1, 0, 0, 0, 0, 2)


def test_a_folder_that_is_gone_is_not_made_again(tmp_path, token_file):
    with Run(token_file) as run, pytest.raises(OSError, match="cannot write this file: No such file"):
        checkpoint.save_checkpoint(tmp_path / "gone", 1, run.model, run.optimizer)
    assert not (tmp_path / "gone").exists()


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


@pytest.mark.parametrize("name", ["model_00000003.bin", "state_00000003_00000.bin", "DONE_00000003"])
@pytest.mark.parametrize("reached", [2, 3])
def test_damaged_checkpoints_of_this_step_and_later_ones_give_way(three_checkpoints, token_file, name, reached):
    """Else the next --resume would begin before what has just been saved, or keep the wrong ones."""
    whole = {path.name: path.read_bytes() for path in three_checkpoints.iterdir()}
    flip_a_bit(three_checkpoints / name)
    checkpoint.Checkpoint(three_checkpoints, 2).remove()
    with Run(token_file) as run:
        run.train(reached)
        run.save(three_checkpoints)
    assert latest(three_checkpoints) == (reached, [])
    assert checkpoint.list_steps(three_checkpoints) == [1, reached]
    assert all(path.read_bytes() == whole[path.name] for path in three_checkpoints.iterdir())


def test_whole_checkpoints_of_later_steps_stay(three_checkpoints, token_file):
    checkpoint.Checkpoint(three_checkpoints, 2).remove()
    with Run(token_file) as run:
        run.train(2)
        run.save(three_checkpoints)
    assert checkpoint.list_steps(three_checkpoints) == [1, 2, 3]


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


@pytest.mark.parametrize("with_state", [True, False])
def test_what_a_run_removes_meanwhile_is_not_damaged(three_checkpoints, monkeypatch, with_state):
    """A run that goes on makes newer ones first: the newest is looked for again."""
    aside = three_checkpoints.with_name("aside")
    aside.mkdir()
    for path in [*three_checkpoints.glob("*3*"), *three_checkpoints.glob("*2*")]:
        path.rename(aside / path.name)
    read = checkpoint._read_manifest

    def removed_meanwhile(folder, step, *others):
        if step == 1:
            for path in aside.iterdir():
                path.rename(folder / path.name)
            checkpoint.Checkpoint(folder, 1).remove()
        return read(folder, step, *others)

    monkeypatch.setattr(checkpoint, "_read_manifest", removed_meanwhile)
    assert latest(three_checkpoints, with_state=with_state) == (3, [])

    def all_removed(folder, step, *others):
        checkpoint.Checkpoint(folder, step).remove()
        return read(folder, step, *others)

    monkeypatch.setattr(checkpoint, "_read_manifest", all_removed)
    assert latest(three_checkpoints, with_state=with_state) == (None, [])


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
    other = AdamW(GPT2(GPT2Config(2, 2, 16, 50, 8)))
    with pytest.raises(ValueError, match="state_00000003_00000.bin: .* expected"):
        checkpoint.load_checkpoint(found, other)


def test_states_of_other_steps_and_of_several_processes(three_checkpoints):
    found = checkpoint.find_latest(three_checkpoints)
    optimizer = AdamW(GPT2.from_checkpoint(found.model_path))
    data = found.state_path().read_bytes()
    for slot, value, message in (
        (10, 4, "is of step 4, not 3"),
        (2, 8, "is rank 0.s of 8 processes, not"),
    ):
        changed = bytearray(data)
        struct.pack_into("<i", changed, 4 * slot, value)
        found.state_path().write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            checkpoint.load_checkpoint(found, optimizer)


def test_a_run_goes_on_from_the_masters_of_its_bfloat16_weights(three_checkpoints, token_file):
    """A checkpoint that llm.c wrote in bfloat16 has float32 masters, which are what it trains."""
    found = checkpoint.find_latest(three_checkpoints)
    _, exact = modelfile.read_model(found.model_path)
    state = statefile.read_state([found.state_path()], CONFIG)
    state.masters = exact
    statefile.write_state(found.state_path(), state)
    modelfile.write_model(found.model_path, CONFIG, exact, "bfloat16")
    found.done_path.write_bytes(b"")
    assert latest(three_checkpoints) == (3, [])
    with Run(token_file, model=GPT2.from_checkpoint(found.model_path)) as run:
        assert not np.array_equal(run.model.flat_params, exact)
        checkpoint.load_checkpoint(found, run.optimizer, run.loader)
        assert np.array_equal(run.model.flat_params, exact)
        params, m, v = (array.copy() for array in (exact, state.m, state.v))
        run.train(1)
    with Run(token_file, model=GPT2(CONFIG, params=params)) as other:
        other.loader.load_state_dict(state.loader)
        other.optimizer.load_state(3, m, v)
        other.train(1)
    assert np.array_equal(run.model.flat_params, other.model.flat_params)


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


def test_what_is_unfinished_goes_but_not_what_the_run_has_yet_to_reach(three_checkpoints):
    (three_checkpoints / "DONE_00000001").unlink()
    (three_checkpoints / "model_00000001.bin").unlink()
    (three_checkpoints / "DONE_00000003").unlink()
    (three_checkpoints / "model_1.bin").touch()
    others = {"DONE_00000002", "model_00000002.bin", "state_00000002_00000.bin", "model_1.bin"}
    others |= {"model_00000003.bin", "state_00000003_00000.bin"}
    checkpoint.remove_old_checkpoints(three_checkpoints, keep=0)
    assert {path.name for path in three_checkpoints.iterdir()} == others
    (three_checkpoints / "DONE_00000002").unlink()
    checkpoint.remove_unfinished(three_checkpoints)
    assert {path.name for path in three_checkpoints.iterdir()} == others - {"DONE_00000002"}


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, token_file):
    folder = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Run(token_file) as run:
        run.train(1)
        run.save(folder)
        run.train(1)
        # The model still fits, the state does not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024 + 4 * CONFIG.num_parameters_padded, limits[1]))
        try:
            with pytest.raises(OSError, match="cannot write this file: .*state_00000002_00000.bin"):
                run.save(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    assert latest(folder) == (1, [])
