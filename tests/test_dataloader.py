"""pyllmc/dataloader.py: llm.c's order with and without shuffling, exact positions, and files that are wrong."""

import os
import struct

import numpy as np
import pytest

from pyllmc.dataloader import DataLoader
from pyllmc.datasets import write_tokens
from pyllmc.rng import TorchGenerator


def shards(folder, *sizes):
    """Token files a.bin, b.bin, ...: consecutive numbers, so that every token tells where it stood."""
    start = 0
    for name, size in zip("abcdefgh", sizes):
        write_tokens(folder / f"{name}.bin", np.arange(start, start + size) % 65536)
        start += size
    return folder / "*.bin"


def first_tokens(loader, n):
    return [int(loader.next_batch()[0][0, 0]) for _ in range(n)]


def llmc_order(samples_per_shard, seed, epochs):
    """(shard, sample) in llm.c's order, written down once more and slowly: one word per swap."""
    generator = TorchGenerator(seed)

    def permute(values):
        for i in range(len(values) - 1, 0, -1):
            j = int(generator.uint32(1)[0]) % (i + 1)
            values[i], values[j] = values[j], values[i]

    order = list(range(len(samples_per_shard)))
    for _ in range(epochs):
        permute(order)
        for shard in order:
            samples = list(range(samples_per_shard[shard]))
            permute(samples)
            yield from ((shard, sample) for sample in samples)


# ---- order -----------------------------------------------------------------------------------------------------------


def test_batch_is_the_next_tokens_and_the_ones_after_them(tmp_path):
    loader = DataLoader(shards(tmp_path, 40), 2, 4)
    inputs, targets = loader.next_batch()
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert targets.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert loader.next_batch()[0][0, 0] == 8
    assert (loader.num_tokens, loader.num_batches) == (40, 4)


def test_batches_are_fresh_arrays(tmp_path):
    loader = DataLoader(shards(tmp_path, 40), 2, 4)
    inputs, targets = loader.next_batch()
    targets[:] = -1
    assert inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    loader.next_batch()
    assert inputs[0, 0] == 0
    assert inputs.flags.c_contiguous and targets.flags.c_contiguous


def test_in_order_shard_after_shard_and_the_tail_left_out(tmp_path):
    # 20 tokens: two samples of 8; 17: two; 16: one, since the target of the last token is not there.
    loader = DataLoader(shards(tmp_path, 20, 17, 16), 2, 4)
    epoch = [0, 8, 20, 28, 37]
    assert first_tokens(loader, 10) == epoch + epoch
    first_tokens(loader, 3)
    loader.reset()
    assert first_tokens(loader, 2) == [0, 8]


def test_shuffled_samples_of_one_shard_are_llmc_s(tmp_path):
    """tiny_shakespeare_train has 305,260 tokens; B=4, T=64 makes 1192 samples."""
    write_tokens(tmp_path / "train.bin", np.arange(305260) // 256 % 65536)
    loader = DataLoader(tmp_path / "train.bin", 4, 64, shuffle=True, seed=42)
    assert loader.num_batches == 1192
    assert first_tokens(loader, 8) == [408, 791, 914, 1057, 81, 450, 299, 907]


def test_shuffled_permutation_of_ten(tmp_path):
    write_tokens(tmp_path / "a.bin", np.arange(11))
    loader = DataLoader(tmp_path / "a.bin", 1, 1, shuffle=True, seed=42)
    assert first_tokens(loader, 10) == [1, 3, 9, 7, 6, 0, 8, 4, 5, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_shuffled_shards_over_epochs(tmp_path, rank):
    sizes = (41, 25, 60, 33, 17)
    loader = DataLoader(shards(tmp_path, *sizes), 2, 4, shuffle=True, seed=7, rank=rank, world_size=2)
    starts = np.cumsum([0, *sizes])
    samples = [(size - 1) // 16 for size in sizes]
    expected = [int(starts[shard]) + sample * 16 + rank * 8 for shard, sample in llmc_order(samples, 7 + rank, 4)]
    assert loader.num_batches * 4 == len(expected)
    assert first_tokens(loader, len(expected)) == expected


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_usable_token_once_in_each_epoch(tmp_path, shuffle):
    """llm.c's own test: four shards of 140 tokens, B=4, T=8, two processes, four epochs."""
    pattern = shards(tmp_path, 140, 140, 140, 140)
    loaders = [DataLoader(pattern, 4, 8, shuffle=shuffle, rank=rank, world_size=2) for rank in range(2)]
    usable = sorted(140 * shard + i for shard in range(4) for i in range(128))
    for _ in range(4):
        seen = [loader.next_batch()[0].ravel() for loader in loaders for _ in range(loader.num_batches)]
        assert np.sort(np.concatenate(seen)).tolist() == usable


# ---- position --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("done", [0, 1, 3, 5, 7, 12])
def test_state_goes_on_exactly(tmp_path, shuffle, done):
    pattern = shards(tmp_path, 41, 25, 33)
    loader = DataLoader(pattern, 2, 4, shuffle=shuffle, seed=3)
    first_tokens(loader, done)
    state = loader.state_dict()
    other = DataLoader(pattern, 2, 4, shuffle=shuffle, seed=99)
    first_tokens(other, 2)
    other.load_state_dict(state)
    assert first_tokens(other, 40) == first_tokens(loader, 40)


def test_state_is_a_copy(tmp_path):
    loader = DataLoader(shards(tmp_path, 41, 25, 33), 2, 4, shuffle=True)
    state = loader.state_dict()
    kept = {key: np.array(value) for key, value in state.items()}
    first_tokens(loader, 20)
    assert all(np.array_equal(state[key], kept[key]) for key in kept)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shuffle": False}, "shuffle=False"),
        ({"shard": 3}, "shard 3"),
        ({"shard": -1}, "shard -1"),
        ({"sample": 1000}, "sample 1000"),
        ({"sample": -1}, "sample -1"),
        ({"shard_order": [0, 1]}, "shard order"),
        ({"shard_order": [0, 1, 2**40]}, "shard order"),
        ({"sample_order": [0, 0, 1, 2, 3]}, "sample order"),
        ({"sample_order": np.arange(1000)}, "sample order"),
        ({"generator": b"short"}, "generator"),
    ],
)
def test_state_that_does_not_fit(tmp_path, change, told):
    loader = DataLoader(shards(tmp_path, 41, 25, 33), 2, 4, shuffle=True)
    twin = DataLoader(tmp_path / "*.bin", 2, 4, shuffle=True)
    with pytest.raises(ValueError, match=told):
        loader.load_state_dict({**loader.state_dict(), **change})
    assert first_tokens(loader, 20) == first_tokens(twin, 20)


# ---- wrong files and arguments ---------------------------------------------------------------------------------------


def write_raw(path, magic=20240520, version=1, count=40, size=None):
    path.write_bytes(struct.pack("<3i", magic, version, count).ljust(1024, b"\0") + bytes(80 if size is None else size))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"magic": 20240801}, "magic is 20240801, expected 20240520"),
        ({"magic": -1}, "magic is -1"),
        ({"version": 2}, "version is 2, expected 1"),
        ({"count": 41}, "number of tokens is 41, expected 40"),
        ({"count": 39}, "number of tokens is 39, expected 40"),
        ({"count": -1}, "number of tokens is -1"),
        ({"count": 2**31 - 1}, "number of tokens is 2147483647"),
        ({"size": 79}, "expected 39.5"),
        ({"count": 0, "size": 0}, "0 tokens are too few"),
        ({"count": 8, "size": 16}, "8 tokens are too few: a batch of 2 x 4 tokens needs at least 9"),
    ],
)
def test_wrong_header(tmp_path, fields, told):
    path = tmp_path / "t.bin"
    write_raw(path, **fields)
    with pytest.raises(ValueError, match=told) as info:
        DataLoader(path, 2, 4)
    assert str(path) in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\0" * 1023])
def test_no_room_for_a_header(tmp_path, data):
    (tmp_path / "t.bin").write_bytes(data)
    with pytest.raises(ValueError, match="too few for a token file"):
        DataLoader(tmp_path / "t.bin", 2, 4)


def test_nothing_matches(tmp_path):
    for pattern in ("none.bin", "*.bin"):
        with pytest.raises(FileNotFoundError, match="no such token file"):
            DataLoader(tmp_path / pattern, 2, 4)
    with pytest.raises(ValueError, match="not a regular file"):
        DataLoader(tmp_path, 2, 4)


def test_scattered_rows_are_the_batches_of_one_row(tmp_path):
    path = shards(tmp_path, 300)
    single = DataLoader(path, 1, 4, shuffle=True, seed=7)
    scattered = DataLoader(path, 3, 4, shuffle=True, scatter_rows=True, seed=7)
    assert scattered.num_batches == single.num_batches // 3
    for _ in range(2 * scattered.num_batches + 1):  # batches also run across the end of an epoch
        rows = [single.next_batch() for _ in range(3)]
        inputs, targets = scattered.next_batch()
        assert np.array_equal(inputs, np.concatenate([row[0] for row in rows]))
        assert np.array_equal(targets, np.concatenate([row[1] for row in rows]))
    resumed = DataLoader(path, 3, 4, shuffle=True, scatter_rows=True, seed=1)
    resumed.load_state_dict(scattered.state_dict())
    assert np.array_equal(resumed.next_batch()[0], scattered.next_batch()[0])


def test_too_short_for_all_processes_says_so(tmp_path):
    with pytest.raises(ValueError, match="in 8 processes needs at least 65"):
        DataLoader(shards(tmp_path, 40), 2, 4, world_size=8)


def test_a_name_with_brackets_is_meant_literally(tmp_path):
    write_tokens(tmp_path / "a[1].bin", range(20))
    assert DataLoader(tmp_path / "a[1].bin", 2, 4).num_tokens == 20


def test_token_outside_the_vocabulary_is_named(tmp_path):
    write_tokens(tmp_path / "t.bin", [1] * 12 + [50] + [1] * 12)
    loader = DataLoader(tmp_path / "t.bin", 1, 8, vocab_size=50)
    loader.next_batch()
    with pytest.raises(ValueError, match=r"t.bin: token 12 is 50, expected less than the vocabulary's 50"):
        loader.next_batch()
    assert DataLoader(tmp_path / "t.bin", 1, 8, vocab_size=51).num_tokens == 25


def test_file_that_shrinks_is_an_error(tmp_path):
    path = tmp_path / "t.bin"
    write_tokens(path, range(1000))
    loader = DataLoader(path, 2, 4)
    os.truncate(path, 1024 + 30)
    loader.next_batch()
    with pytest.raises(ValueError, match="changed while in use"):
        loader.next_batch()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"B": 0}, "B must be at least 1"),
        ({"T": -1}, "T must be at least 1"),
        ({"world_size": 0}, "world_size must be at least 1"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\)"),
        ({"rank": -1}, "rank must be at least 0"),
        ({"B": 2**40, "T": 2**40}, "too few"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, told):
    with pytest.raises(ValueError, match=told):
        DataLoader(shards(tmp_path, 40), **{"B": 2, "T": 4, **arguments})


def test_beyond_two_gigabytes(tmp_path):
    """Offsets have 64 bits: a sparse file of 3 GB, whose last tokens are not zero."""
    path, count = tmp_path / "large.bin", 1_500_000_001
    with open(path, "wb") as file:
        file.write(struct.pack("<3i", 20240520, 1, count).ljust(1024, b"\0"))
        file.seek(1024 + 2 * (count - 9))
        file.write(np.arange(1, 10, dtype="<u2").tobytes())
    loader = DataLoader(path, 1, 8)
    state = loader.state_dict()
    loader.load_state_dict({**state, "sample": loader.num_batches - 1})
    inputs, targets = loader.next_batch()
    assert inputs.tolist() == [list(range(1, 9))] and targets[0, -1] == 9
