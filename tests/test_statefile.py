"""pyllmc/statefile.py: training states against literal bytes, and what is told of wrong ones.

test_fuzz.py goes through every number and every length of such files.
"""

import struct

import numpy as np
import pytest
from hostile import patched

from pyllmc import statefile


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
    return statefile.TrainingState(77, m, -m, loader, rounding=(13371337, 2**63 + 1), masters=masters)


@pytest.mark.parametrize("masters", [None, np.full(6, 0.5, np.float32)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_training_state_byte_for_byte(tmp_path, shuffle, masters):
    path, state = tmp_path / "state.bin", training_state(shuffle, masters)
    statefile.write_state(path, state)
    header = struct.pack("<6i", 20240527, 1, 1, 0, masters is not None, shuffle).ljust(40, b"\0")
    header = (header + struct.pack("<i", 77)).ljust(80, b"\0") + struct.pack("<QQ", 13371337, 2**63 + 1)
    header = (header.ljust(120, b"\0") + struct.pack("<QQ", 1, 2**33 + 5)).ljust(1024, b"\0")
    body = state.m.tobytes() + state.v.tobytes() + (b"" if masters is None else masters.tobytes())
    if shuffle:
        body += struct.pack("<Qii", 2, 1, 0) + struct.pack("<Qiii", 3, 2, 0, 1) + bytes(range(252)) * 10
    assert path.read_bytes() == header + body

    back = statefile.read_state(path, 6)
    assert (back.step, back.num_processes, back.rank, back.rounding) == (77, 1, 0, (13371337, 2**63 + 1))
    assert np.array_equal(back.m, state.m) and np.array_equal(back.v, state.v)
    assert back.masters is None if masters is None else np.array_equal(back.masters, masters)
    assert back.loader["shuffle"] is shuffle and (back.loader["shard"], back.loader["sample"]) == (1, 2**33 + 5)
    if shuffle:
        assert back.loader["shard_order"].tolist() == [1, 0] and back.loader["sample_order"].tolist() == [2, 0, 1]
        assert back.loader["generator"] == state.loader["generator"]


def test_arrays_of_a_state_begin_at_cache_lines(tmp_path):
    """The optimizer goes on with these very arrays, as fast as with its own."""
    path = tmp_path / "state.bin"
    statefile.write_state(path, training_state(masters=np.ones(6, np.float32)))
    back = statefile.read_state(path, 6)
    assert [array.ctypes.data % 64 for array in (back.m, back.v, back.masters)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("slot", "value", "told"),
    [
        (0, 20240326, "not a training state but a model"),
        (1, 2, "version 2 of the training state cannot be read, only 1"),
        (2, 0, "not a training state: rank 0 of 0 processes"),
        (3, 1, "not a training state: rank 1 of 1 processes"),
        (4, -1, "not a training state: slots 4, 5, 10 hold -1, 1, 77"),
        (4, 1, ".* bytes found, more than .* of another model"),
        (5, 2, "not a training state: slots 4, 5, 10 hold 0, 2, 77"),
        (5, 0, ".* bytes found, .* expected for the training state of a model of 6 parameters"),
        (10, -1, "not a training state: slots 4, 5, 10 hold 0, 1, -1"),
    ],
)
def test_wrong_numbers_of_the_header_are_told(tmp_path, slot, value, told):
    path = tmp_path / "state.bin"
    statefile.write_state(path, training_state())
    for read in (statefile.read_state, statefile.check_state):
        with pytest.raises(ValueError, match=f"patched.bin: {told}"):
            read(patched(path, slot, value), 6)


@pytest.mark.parametrize("count", [2**63, 2**40, 10**6])
def test_a_permutation_longer_than_the_file(tmp_path, count):
    path = tmp_path / "state.bin"
    statefile.write_state(path, training_state())
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, 1024 + 4 * 12, count)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"an order of {count} samples or shards in the last"):
        statefile.read_state(path, 6)


def test_training_state_of_another_model(tmp_path):
    path = tmp_path / "state.bin"
    for shuffle in (True, False):
        statefile.write_state(path, training_state(shuffle))
        for n in (5, 7, 10**6):
            with pytest.raises(ValueError, match="state.bin: "):
                statefile.read_state(path, n)
