"""pyllmc/datasets/documents.py: plain text, JSON lines and Parquet to documents, and what is wrong with a file."""

import json
import random
import re
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllmc import cli
from pyllmc.datasets import __main__, documents
from pyllmc.datasets.common import Batch, batches, cut_documents
from pyllmc.datasets.documents import Piece, read_documents, split_documents
from pyllmc.tokenizer import Tokenizer

GPT2 = Tokenizer.gpt2()


def texts_of(pieces):
    found = []
    for text, begins in pieces:
        assert text, "a piece without text"
        if begins:
            found.append(text)
        else:
            found[-1] += text
    return found


def texts_in(path, field="text"):
    counts = []
    texts = texts_of(read_documents(path, field, counts.append))
    assert sum(counts) == path.stat().st_size
    return texts


# ---- plain text ------------------------------------------------------------------------------------------------------


def test_lines_that_are_end_of_text_separate_documents(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(
        b"\xef\xbb\xbfone\n<|endoftext|>\ntwo\r\nlines\r\n<|endoftext|>\r\n\n<|endoftext|>\nfour<|endoftext|>\n"
    )
    assert texts_in(path) == ["one\n", "two\nlines\n", "\n", "four<|endoftext|>\n"]
    path.write_bytes(b"<|endoftext|>\n<|endoftext|>\none\n <|endoftext|>\n<|endoftext|> \n<|endoftext|>")
    assert texts_in(path) == ["one\n <|endoftext|>\n<|endoftext|> \n"]


LINES = st.lists(st.sampled_from(["<|endoftext|>", "<|endof", "text|>", "a", "", "<", "\n"]), max_size=12)


@given(LINES, st.booleans(), st.lists(st.integers(1, 20)))
def test_documents_do_not_depend_on_the_pieces(lines, ends, lengths):
    text = "\n".join(lines) + "\n" * ends
    documents_of_text = re.split(r"(?m)^<\|endoftext\|>(?:\n|\Z)", text)
    pieces = []
    for length in [*lengths, len(text)]:
        pieces.append(text[:length])
        text = text[length:]
    assert texts_of(split_documents(pieces)) == [document for document in documents_of_text if document]


# ---- JSON lines ------------------------------------------------------------------------------------------------------


def test_json_lines(tmp_path):
    path = tmp_path / "t.JSONL"
    objects = [{"text": "one\r\n"}, {"text": "", "id": 2}, {"id": 3, "text": "<|endoftext|>\nñ 🎈"}]
    path.write_text("\n\n".join(json.dumps(found) for found in objects) + "\r\n \n", encoding="utf-8")
    assert texts_in(path) == ["one\r\n", "<|endoftext|>\nñ 🎈"]
    path.write_text('{"body": "b"}')
    assert texts_in(path, "body") == ["b"]


BAD_JSON = {
    "no JSON": (b'{"text": "a"}\n{"text": "b"\n', r"line 2: is no JSON: Expecting ',' delimiter, column \d+"),
    "an array of all": (b'[\n{"text": "a"}\n]', "line 1: is no JSON"),
    "plain text": (b"Once upon a time\n", "line 1: is no JSON"),
    "no object": (b'\n["text"]', "line 2: expected an object with the field 'text', found a list"),
    "another field": (b'{"story": "a", "id": 1}', "line 1: there is no field 'text'; the fields are 'story', 'id'"),
    "no field": (b"{}", "line 1: there is no field 'text'; the fields are none"),
    "no text": (b'{"text": null}', "line 1: the field 'text' must be text, found null"),
    "a number": (b'{"text": 1.5}', "line 1: the field 'text' must be text, found a number"),
    "not UTF-8": (b'{"text": "a"}\n{"text": "\xff"}', "line 2: byte 10 is not UTF-8"),
    "without end": (b"[" * 100_000, "line 1: is JSON that cannot be read"),
    "a huge number": (b'{"text": ' + b"1" * 10_000 + b"}", "line 1: is JSON that cannot be read"),
    "empty": (b"", "is empty"),
    "only empty texts": (b'{"text": ""}\n' * 30, "is empty"),
    "half a pair": (b'{"text": "\\ud800"}' * 1, "half of a surrogate pair"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_one_line_with_its_number(tmp_path, capsys, case):
    data, told = BAD_JSON[case]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(data)
    words = ["text", str(path), "--output", str(tmp_path / "out"), "--tokenizer", "char"]
    assert cli.run_main(__main__.main, words) == cli.EXIT_ERROR
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(told, err), err
    assert case == "half a pair" or f"{path}: " in err
    assert not (tmp_path / "out").exists()


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 100)
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + b"a" * 200)
    with pytest.raises(ValueError, match=r"t.jsonl: line 2 has more than 100 bytes"):
        texts_in(tmp_path / "t.jsonl")


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def write_parquet(path, row_group_size=300, **columns):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow (pip install 'pyllmc[parquet]')")
    import pyarrow

    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return pyarrow


def test_parquet(tmp_path):
    path = tmp_path / "t.parquet"
    texts = [f"text {i}\r\n" for i in range(1000)]
    pyarrow = write_parquet(path, id=list(range(1002)), text=[*texts, None, ""])
    assert texts_in(path) == texts
    write_parquet(path, body=pyarrow.array(["ñ"], pyarrow.large_string()))
    assert texts_in(path, "body") == ["ñ"]


@pytest.mark.parametrize("group", [100, 10_000])
def test_parquet_is_not_read_whole(tmp_path, monkeypatch, group):
    monkeypatch.setattr(documents, "PIECE_BYTES", 10_000)
    path = tmp_path / "t.parquet"
    rng = random.Random(1)
    write_parquet(path, row_group_size=group, text=[rng.randbytes(1000).hex() for _ in range(4000)])
    tracemalloc.start()
    try:
        assert sum(len(text) for text, _ in read_documents(path, "text", lambda count: None)) == 4000 * 2000
        assert tracemalloc.get_traced_memory()[1] < 3_500_000 < path.stat().st_size / 2
    finally:
        tracemalloc.stop()


def test_bad_parquet(tmp_path, capsys):
    path = tmp_path / "t.parquet"
    write_parquet(path, id=[1], story=["a"])
    with pytest.raises(ValueError, match=r"t.parquet: there is no column 'text'; the columns are id, story"):
        texts_in(path)
    with pytest.raises(ValueError, match=r"t.parquet: the column 'id' must be text, found int64"):
        texts_in(path, "id")
    for data in (b"", b"<html>", path.read_bytes()[:-20]):
        path.write_bytes(data)
        assert cli.run_main(__main__.main, ["text", str(path), "--output", str(tmp_path / "out")]) == cli.EXIT_ERROR
        err = capsys.readouterr().err
        assert err.startswith(f"error: {path}: cannot be read as Parquet: ") and err.count("\n") == 1


def test_without_pyarrow_it_is_told_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"t.parquet: needs pyarrow; pip install 'pyllmc\[parquet\]'"):
        texts_in(tmp_path / "t.parquet")


# ---- pieces and batches ----------------------------------------------------------------------------------------------

PIECES = st.lists(st.builds(Piece, st.text(st.sampled_from(list("ab \n'")), min_size=1, max_size=8), st.booleans()))


@given(PIECES, st.integers(1, 30))
def test_batches_hold_the_documents(pieces, size):
    if pieces:
        pieces[0] = Piece(pieces[0].text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyllmc.datasets.common.BATCH_CHARACTERS", size)
        found = list(batches(iter(pieces)))
    regained = [Piece(text, i > 0 or not batch.continued) for batch in found for i, text in enumerate(batch.texts)]
    assert texts_of(regained) == texts_of(pieces)
    # Only the last may be smaller, and none has more than one piece beyond the size.
    assert all(size <= sum(map(len, batch.texts)) < size + 8 for batch in found[:-1])
    assert list(batches([])) == [] and list(batches([Piece("")])) == [Batch([""])]


@given(PIECES)
def test_cut_documents_are_the_same_documents(pieces):
    if pieces:
        pieces[0] = Piece(pieces[0].text)
    cut = list(cut_documents(pieces, GPT2))
    assert texts_of(cut) == texts_of(pieces)
    ids = [i for text, begins in cut for i in GPT2.encode_documents([text], not begins).tolist()]
    assert ids == (GPT2.encode_documents(texts_of(pieces)).tolist() if pieces else [])
