"""Hostile files of every binary format: each number of the header, each length, other kinds. hostile.py has the formats
and says what a reader owes; test_fuzz_slow.py does this at random, and much more of it."""

import os
import random
import struct
import tracemalloc

import pytest
from hostile import KINDS, outcome

# GPT-2's own table is too large to be read thousands of times; test_fuzz_slow.py reads some.
SMALL = sorted(KINDS.keys() - {"tokenizer-v1"})
JSON = {"tokenizer-json", "manifest", "folder-config", "folder-index"}
BINARY = sorted(KINDS.keys() - {"tokenizer-v1"} - JSON)
WITH_HEADER = sorted(set(BINARY) - {"tokens-int32"})
VALUES = (-1, 0, 1, 2**16, 2**31 - 1)

# A reader may hold its file and what it makes of it, bfloat16 becoming float32 being the most; nothing that a number in
# the file asks for.
FACTOR, SLACK = 6, 160 * 1024


@pytest.fixture
def files(tmp_path):
    """make(name) -> the kind, its folder, the path of the file to damage, its bytes."""

    def make(name):
        kind = KINDS[name]
        kind.make(tmp_path)
        path = tmp_path / kind.target
        assert outcome(kind, tmp_path) is None
        return kind, tmp_path, path, path.read_bytes()

    return make


def with_slots(data, slots, value):
    data = bytearray(data)
    for slot in slots:
        if 4 * slot + 4 <= len(data):
            struct.pack_into("<i", data, 4 * slot, value)
    return bytes(data)


@pytest.mark.parametrize("name", KINDS)
def test_whole_files_are_read(files, name):
    files(name)


@pytest.mark.parametrize("name", BINARY)
def test_every_slot_of_the_header(files, name):
    """Those that mean something one by one, the rest, which nothing reads, all at once."""
    kind, folder, path, data = files(name)
    rng = random.Random(name)
    tracemalloc.start()
    try:
        for slots in [*((slot,) for slot in range(34)), range(34, 256)]:
            for value in (*VALUES, rng.randrange(-(2**31), 2**31)):
                path.write_bytes(with_slots(data, slots, value))
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                outcome(kind, folder)
                peak = tracemalloc.get_traced_memory()[1] - before
                assert peak <= FACTOR * len(data) + SLACK, f"slots {slots} = {value}: {peak} bytes for {len(data)}"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", SMALL)
def test_every_length(files, name):
    kind, folder, path, data = files(name)
    readable = []
    for size in reversed(range(len(data))):
        os.truncate(path, size)
        if outcome(kind, folder) is None:
            readable.append(size)
    if name == "manifest":
        # llm.c's is empty; of this one the last line end may be missing.
        assert readable == [len(data) - 1, 0]
    elif name in JSON:
        assert readable == [len(data) - 1]  # without its line end
    elif name == "tokens-int32":
        assert readable == list(range(len(data) - 4, 32, -4))
    else:
        assert readable == []


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("extra", [b"\0", b"\0\0", b"\0\0\0", b"\0\0\0\0", b"\1" * 1000, bytes(10**6)])
def test_extra_bytes(files, name, extra):
    kind, folder, path, data = files(name)
    path.write_bytes(data + extra)
    if name == "tokens-int32" and len(extra) == 4:
        assert outcome(kind, folder) is None  # one more token
    else:
        assert isinstance(outcome(kind, folder), ValueError)


@pytest.mark.parametrize("name", WITH_HEADER)
@pytest.mark.parametrize("slot", [0, 1])
def test_another_magic_or_version(files, name, slot):
    kind, folder, path, data = files(name)
    (right,) = struct.unpack_from("<i", data, 4 * slot)
    others = [struct.unpack("<3i", b"GGUF\x89PNGPK\3\4"), range(8)][slot]
    for value in {*others, right - 1, right + 1, -right, right + 2**16} - {right}:
        path.write_bytes(with_slots(data, [slot], value))
        assert isinstance(outcome(kind, folder), ValueError)


@pytest.mark.parametrize("name", SMALL)
def test_every_other_kind_in_its_place(files, name, tmp_path_factory):
    kind, folder, path, _ = files(name)
    elsewhere = tmp_path_factory.mktemp("others")
    for other in (KINDS[other] for other in SMALL):
        other.make(elsewhere)
        content = (elsewhere / other.target).read_bytes()
        path.write_bytes(content)
        if other.read != kind.read:
            assert isinstance(outcome(kind, folder), ValueError), f"{other.target} of {other.make}"
        else:
            outcome(kind, folder)


@pytest.mark.parametrize("name", SMALL)
def test_what_is_no_file_at_all(files, name):
    kind, folder, path, _ = files(name)
    path.unlink()
    if name not in ("tokenizer-json", "manifest"):  # a character tokenizer is known without, a checkpoint is none
        assert isinstance(outcome(kind, folder), FileNotFoundError)
    path.mkdir()
    assert isinstance(outcome(kind, folder), (ValueError, OSError))
    path.rmdir()
    path.symlink_to(path.name)  # which has no end
    assert isinstance(outcome(kind, folder), (ValueError, OSError))
