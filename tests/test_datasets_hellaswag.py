"""pyllmc/datasets/hellaswag.py: questions written here, as the source has its own, become llm.c's evaluation file."""

import json
import os
import re

import numpy as np
import pytest

from pyllmc import cli
from pyllmc.datasets import __main__, hellaswag
from pyllmc.evalfile import read_examples
from pyllmc.tokenizer import Tokenizer

GPT2 = Tokenizer.gpt2()
QUESTIONS = [
    (
        "A cat looks at a closed door. It",
        ["waits.", "opens an account.", "is made of 7 doors.", "reads it aloud."],
        0,
    ),
    ("[header] How to boil an egg [title] Begin.", ["Sing.", "Swim to it.", "Wait, then wait.", "Heat the water."], 3),
    ("Naïve <|endoftext|> café\n\n", [" two spaces", "", "\u2028", "’tis\tdone"], 2),
]


def line(context, endings, label, **other):
    return json.dumps({"ind": 7, "ctx_a": "x", "ctx": context, "endings": endings, "label": label, **other}) + "\n"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(line(*question, split="val") for question in QUESTIONS), encoding="utf-8")
    return path


def run(*words):
    return cli.run_main(__main__.main, ["hellaswag", *(str(word) for word in words)])


def expected_bytes(questions):
    """As llm.c's script has it: the header, then each example with its lengths, endings after a space."""
    stream, longest = [], 0
    for index, (context, endings, label) in enumerate(questions):
        numbers = [65535, 0, index, label, len(endings)]
        for text in (context, *(" " + ending for ending in endings)):
            ids = GPT2.encode(text).tolist()
            numbers += [len(ids), *ids]
        numbers[1] = 2 * len(numbers)
        longest = max(longest, numbers[1])
        stream += numbers
    header = np.zeros(256, np.int32)
    header[:4] = 20240522, 1, len(questions), longest
    return header.astype("<i4").tobytes() + np.array(stream, "<u2").tobytes()


def test_the_file_is_what_llmcs_script_makes(tmp_path, source, capsys):
    assert run("--input", source, "--output", tmp_path / "out") == 0
    out, err = capsys.readouterr()
    longest = max(len(GPT2.encode(text)) + max(len(GPT2.encode(" " + e)) for e in ends) for text, ends, _ in QUESTIONS)
    assert out.splitlines() == [
        f"{tmp_path / 'out' / 'hellaswag_val.bin'}: 3 examples of up to {longest} tokens",
        "note: these are not all of HellaSwag's 10,042 examples of this split",
    ]
    assert err == "" and os.listdir(tmp_path / "out") == ["hellaswag_val.bin"]
    assert (tmp_path / "out" / "hellaswag_val.bin").read_bytes() == expected_bytes(QUESTIONS)


def test_tokens_are_gpt2s_with_a_space_before_each_ending(tmp_path, source):
    assert run("--input", source, "--output", tmp_path) == 0
    first = read_examples(tmp_path / "hellaswag_val.bin")[0]
    assert (first.label, first.context.tolist()) == (0, [32, 3797, 3073, 379, 257, 4838, 3420, 13, 632])
    assert [GPT2.decode(ids) for ids in first.completions] == [" " + ending for ending in QUESTIONS[0][1]]


def test_the_same_bytes_again_in_the_place_of_the_old_ones(tmp_path, source):
    for _ in range(2):
        assert run("--input", source, "--output", tmp_path / "out") == 0
        assert (tmp_path / "out" / "hellaswag_val.bin").read_bytes() == expected_bytes(QUESTIONS)


def test_splits(tmp_path, source, capsys):
    assert run("--input", source, "--output", tmp_path / "out", "--split", "train") == 0
    assert "39,905" in capsys.readouterr().out
    assert os.listdir(tmp_path / "out") == ["hellaswag_train.bin"]
    with pytest.raises(SystemExit):
        run("--input", source, "--split", "test")
    assert "invalid choice: 'test'" in capsys.readouterr().err


def test_downloaded_files_are_held_to_size_and_hash(tmp_path, monkeypatch):
    asked = []

    def fetch(address, path, **known):
        asked.append((address, path.name, known))
        raise OSError("no network")

    monkeypatch.setattr(hellaswag, "fetch", fetch)
    for split, size in (("val", 12_246_618), ("train", 47_496_131)):
        assert run("--output", tmp_path / "out", "--split", split) == cli.EXIT_ERROR
        address, name, known = asked.pop()
        assert address == f"https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_{split}.jsonl"
        assert name == f"hellaswag_{split}.jsonl"
        assert known["size"] == size and re.fullmatch("[0-9a-f]{64}", known["sha256"])
    assert os.listdir(tmp_path) == []


GOOD = line(*QUESTIONS[0])
FOUR = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        (GOOD + "{", "line 2: is no JSON"),
        (GOOD + "[]", "line 2: expected an object with the field 'ctx', found a list"),
        (GOOD + '{"text": "a"}', "line 2: there is no field 'ctx'; the fields are 'text'"),
        (line("", FOUR, 0), "line 1: the field 'ctx' is empty"),
        (line(None, FOUR, 0), "line 1: the field 'ctx' must be text, found null"),
        (line("a", FOUR[:3], 0), "line 1: the field 'endings' must be a list of 4 texts, found 3 of them"),
        (line("a", "abcd", 0), "line 1: the field 'endings' must be a list of 4 texts, found text"),
        (line("a", ["a", "b", 3, "d"], 0), "line 1: each of the 'endings' must be text, found a number"),
        (line("a", FOUR, 4), "line 1: the field 'label' must be a number from 0 to 3, found 4"),
        (line("a", FOUR, -1), "found -1"),
        (line("a", FOUR, "1"), "line 1: the field 'label' must be a number from 0 to 3, found text"),
        (line("a", FOUR, True), "found true or false"),
        (line("a", FOUR, 1.0), "found a number"),
        (
            json.dumps({"ctx": "a", "endings": FOUR}),
            "line 1: the field 'label' must be a number from 0 to 3, f",
        ),
        (line("a b" * 40_000, FOUR, 0), "example 0 takes"),
        ("<!DOCTYPE html>", "is a web page, not the data"),
    ],
)
def test_bad_source_is_one_line_and_leaves_nothing(tmp_path, capsys, text, told):
    path = tmp_path / "q.jsonl"
    path.write_text(text)
    assert run("--input", path, "--output", tmp_path / "out") == cli.EXIT_ERROR
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and told in err, err
    assert os.listdir(tmp_path) == ["q.jsonl"]


def test_too_many_examples(tmp_path, capsys, monkeypatch, source):
    monkeypatch.setattr(hellaswag, "MAX_EXAMPLES", 2)
    assert run("--input", source, "--output", tmp_path) == cli.EXIT_ERROR
    assert "has more than 2 examples" in capsys.readouterr().err


def test_other_files_are_not_replaced(tmp_path, source, capsys):
    target = tmp_path / "hellaswag_val.bin"
    target.write_bytes(b"precious")
    assert run("--input", source, "--output", tmp_path) == cli.EXIT_ERROR
    assert "this file is not replaced" in capsys.readouterr().err and target.read_bytes() == b"precious"
    target.unlink()
    source.rename(target)
    assert run("--input", target, "--output", tmp_path) == cli.EXIT_ERROR
    assert "is what the tokens are to be made of" in capsys.readouterr().err
