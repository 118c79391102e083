"""Evaluation files: every byte of the format, there and back, and what is no such file. More: test_fuzz.py."""

import re
import struct

import numpy as np
import pytest

from pyllmc.evalfile import MAX_EXAMPLES, Example, read_examples, write_examples

# Two examples of 4 + 5 and 1 + 2 tokens at most.
EXAMPLES = [
    Example(2, [10, 11, 12, 13], ([1], [2, 3], [4, 5, 6, 7, 8], [9])),
    Example(0, [65534], ([0], [1], [2, 3], [4])),
]
FIRST = [65535, 48, 0, 2, 4, 4, 10, 11, 12, 13, 1, 1, 2, 2, 3, 5, 4, 5, 6, 7, 8, 1, 9]
FIRST[1] = 2 * len(FIRST)
SECOND = [65535, 32, 1, 0, 4, 1, 65534, 1, 0, 1, 1, 2, 2, 3, 1, 4]


def content(*numbers, count=2, longest=46, magic=20240522, version=1):
    return struct.pack("<256i", magic, version, count, longest, *[0] * 252) + struct.pack(f"<{len(numbers)}H", *numbers)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "e.bin"


def test_every_byte(path):
    write_examples(path, EXAMPLES)
    assert path.read_bytes() == content(*FIRST, *SECOND)


def as_lists(examples):
    return [(label, list(context), [list(ids) for ids in completions]) for label, context, completions in examples]


def test_there_and_back(path):
    rng = np.random.default_rng(1)
    examples = [
        Example(int(rng.integers(4)), *(lambda ids: (ids[0], tuple(ids[1:])))(
            [rng.integers(0, 65535, rng.integers(1, 90), dtype=np.uint16) for _ in range(5)]
        ))
        for _ in range(50)
    ]  # fmt: skip
    write_examples(path, examples)
    found = read_examples(path)
    assert as_lists(found) == as_lists(examples)
    assert all(ids.dtype == np.uint16 for example in found for ids in (example.context, *example.completions))
    assert [example.num_tokens for example in found] == [
        len(example.context) + max(len(ids) for ids in example.completions) for example in examples
    ]


def test_the_largest_example_that_fits(path):
    fixed = 6 + 4 + 3  # numbers beside the context and the first completion
    largest = Example(1, np.zeros(32767 - fixed - 1, np.uint16), ([7], [7], [7], [7]))
    write_examples(path, [largest])
    assert as_lists(read_examples(path)) == as_lists([largest])
    with pytest.raises(ValueError, match=r"e.bin: example 0 takes 65536 bytes, more than the 65534"):
        write_examples(path, [largest._replace(completions=([7, 7], [7], [7], [7]))])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"label": 4}, "example 1 has the label 4, expected 0 to 3"),
        ({"label": -1}, "example 1 has the label -1"),
        ({"context": []}, "without any token"),
        ({"completions": ([1], [2], [3])}, "has 3 completions, expected 4"),
        ({"completions": ([1], [2], [3], [])}, "without any token"),
        ({"context": [65535]}, "has the token 65535, expected 0 to 65534"),
        ({"completions": ([1], [2], [3], [-1])}, "has the token -1"),
    ],
)
def test_what_the_format_has_no_room_for_is_not_written(path, changes, told):
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=f"e.bin: .*{told}"):
        write_examples(path, [EXAMPLES[0], EXAMPLES[1]._replace(**changes)])
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("count", [0, MAX_EXAMPLES + 1])
def test_number_of_examples_to_write(path, count):
    with pytest.raises(ValueError, match=f"holds 1 to 65535 examples, got {count}"):
        write_examples(path, [EXAMPLES[0]] * count)


def changed(place, value, numbers=(*FIRST, *SECOND)):
    return content(*numbers[:place], value, *numbers[place + 1 :])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (content(*FIRST, *SECOND, magic=20240520), "not an evaluation file but a token file"),
        (content(*FIRST, *SECOND, magic=7), "not an evaluation file: magic is 7, expected 20240522"),
        (content(*FIRST, *SECOND, version=2), "version is 2, expected 1"),
        (content(count=0), "number of examples is 0, expected 1 to 65535"),
        (content(count=-1), "number of examples is -1"),
        (content(*FIRST, *SECOND, count=65536), "number of examples is 65536"),
        (content(*FIRST, *SECOND, count=65535), "78 bytes after the header do not hold 65535 examples of 30 to 46"),
        (content(*FIRST, *SECOND, count=1), "78 bytes after the header do not hold 1 examples"),
        (content(*FIRST, *SECOND, count=1, longest=100), "has bytes after the last of 1 examples"),
        (content(*FIRST, *SECOND, longest=29), "the longest example has 29 bytes, expected 30 to 65534"),
        (content(*FIRST, *SECOND, longest=65536), "the longest example has 65536 bytes"),
        (content(*FIRST, *SECOND, longest=44), "example 0 has 46 bytes, expected 30 to 44"),
        (content(*FIRST, *SECOND[:-1]), "example 1: 26 bytes needed, 24 found; the file is truncated"),
        (changed(0, 65534), "example 0 begins with 65534, expected 65535"),
        (changed(1, 47), "example 0 has 47 bytes, expected 30 to 46, an even number"),
        (changed(1, 6), "example 0 has 6 bytes"),
        (changed(1, 44), "example 0 has a completion 3 of 1 tokens, expected 1 to 0"),
        (changed(2, 1), "example 0 has the index 1"),
        (changed(3, 4), "example 0 has the label 4, expected less than 4"),
        (changed(4, 5), "example 0 has 5 completions, expected 4"),
        (changed(5, 0), "example 0 has a context of 0 tokens, expected 1 to 17"),
        (changed(5, 18), "example 0 has a context of 18 tokens, expected 1 to 17"),
        (changed(5, 17), "example 0 has a completion 0 of 0 tokens, expected 1 to 0"),
        (changed(7, 65535), "example 0 has a context with the token 65535, which is none"),
        (changed(12, 11), "example 0 has a completion 1 of 11 tokens, expected 1 to 10"),
        (changed(len(FIRST) - 1, 65535), "example 0 has a completion 3 with the token 65535"),
        (changed(len(FIRST) + 11, 1), "example 1 has a completion 3 of 3 tokens, expected 1 to 2"),
        (changed(len(FIRST) + 5, 3, (*FIRST, *SECOND)), "example 1 has"),
        (content(*FIRST, *SECOND)[:1023], "ends inside the header"),
        (b"", "ends inside the header"),
    ],
)
def test_damaged_files_are_told_in_one_line(path, data, told):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        read_examples(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_numbers_behind_the_last_completion(path):
    numbers = [65535, 36, 0, 0, 4, 1, 5, 1, 5, 1, 5, 1, 5, 1, 5, 9, 9, 9]
    path.write_bytes(content(*numbers, count=1))
    with pytest.raises(ValueError, match="e.bin: example 0 has 3 numbers after its last completion"):
        read_examples(path)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_examples(tmp_path / "none")
    with pytest.raises(ValueError, match="not a regular file"):
        read_examples(tmp_path)
