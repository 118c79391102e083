"""pyllmc/tokenizer.py: round trips, the file format against literal bytes, GPT-2's merges, and hostile files."""

import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from pyllmc.huggingface import tokenizer_files
from pyllmc.tokenizer import (
    _WHITE,
    END_OF_TEXT,
    GPT2_TABLE,
    CharTokenizer,
    GPT2Tokenizer,
    TokenIds,
    Tokenizer,
    find_tokenizer,
)

ROOT = Path(__file__).resolve().parent.parent


def header(magic=20240328, version=2, count=3, eot=0):
    return struct.pack("<4I", magic, version, count, eot).ljust(1024, b"\0")


def records(*tokens):
    return b"".join(bytes([len(token)]) + token for token in tokens)


SINGLE_BYTES = [bytes([byte]) for byte in range(256)]
MERGES = [b"  ", b"    ", b"he", b"ll", b"hell", b" hell", b"hello", b" w", b"or", b" wor", b"ld", "é".encode()]


def byte_pair_tokenizer():
    tokens = [*SINGLE_BYTES, *MERGES, END_OF_TEXT]
    return GPT2Tokenizer(tokens, len(tokens) - 1)


# ---- characters ------------------------------------------------------------------------------------------------------


def test_char_ids_are_end_of_text_then_sorted_characters():
    tokenizer = CharTokenizer.from_text("hello wörld\n")
    assert tokenizer.tokens == [END_OF_TEXT, b"\n", b" ", b"d", b"e", b"h", b"l", b"o", b"r", b"w", "ö".encode()]
    assert (tokenizer.eot, tokenizer.vocab_size) == (0, 11)
    ids = tokenizer.encode("old\n")
    assert ids.dtype == np.uint16 and ids.tolist() == [7, 6, 3, 1]
    assert tokenizer.decode(ids) == "old\n"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_char_round_trip(text):
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_char_without_prompt_starts_at_a_line():
    assert CharTokenizer.from_text("a\nb").start == 1
    assert CharTokenizer.from_text("ab").start == 0
    assert byte_pair_tokenizer().start == 256 + len(MERGES)


def test_half_a_surrogate_pair_is_named():
    with pytest.raises(ValueError, match=r"'\\ud800', half of a surrogate pair"):
        CharTokenizer.from_text("a\ud800")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ab\naéb", r"'é' \(U\+00E9, LATIN SMALL LETTER E WITH ACUTE\), found at line 2, column 2"),
        ("\udc80", r"no \(U\+DC80\), found at line 1, column 1"),
        ("z", r"'z' \(U\+007A"),
        ("\x1b", r"no \(U\+001B\)"),
    ],
)
def test_unknown_character_is_named(text, told):
    with pytest.raises(ValueError, match=told):
        CharTokenizer.from_text("ab\n").encode(text)


def test_empty_vocabulary_and_empty_text():
    assert CharTokenizer.from_text("").encode("").tolist() == []
    with pytest.raises(ValueError, match="no character"):
        CharTokenizer.from_text("").encode("a")


def test_too_many_characters():
    with pytest.raises(ValueError, match="65536 different characters"):
        CharTokenizer.from_characters(map(chr, range(0x10000, 0x20000)))
    assert CharTokenizer.from_characters(map(chr, range(0x10000, 0x1FFFF))).vocab_size == 65536


@pytest.mark.parametrize("token", [-1, 3, 2**70])
def test_decode_rejects_ids_outside_the_vocabulary(token):
    with pytest.raises(ValueError, match=r"in \[0, 3\)"):
        CharTokenizer.from_text("ab").decode([token])


# ---- files -----------------------------------------------------------------------------------------------------------


def test_file_is_these_bytes(tmp_path):
    path = tmp_path / "tokenizer.bin"
    CharTokenizer.from_text("éa").save(path)
    assert path.read_bytes() == header() + b"\x0d<|endoftext|>" + b"\x01a" + b"\x02\xc3\xa9"
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == {"kind": "char"}


@pytest.mark.parametrize("with_json", [True, False])
@pytest.mark.parametrize("tokenizer", [CharTokenizer.from_text("to be\nor ñot"), byte_pair_tokenizer()])
def test_save_and_load(tmp_path, tokenizer, with_json):
    path = tmp_path / "tokenizer.bin"
    tokenizer.save(path)
    if not with_json:
        path.with_suffix(".json").unlink()
        if tokenizer.kind == "gpt2":
            # Only the true table's size tells the kind without the JSON file.
            with pytest.raises(ValueError, match="cannot tell what kind"):
                Tokenizer.load(path)
            return
    loaded = Tokenizer.load(path)
    assert type(loaded) is type(tokenizer)
    assert (loaded.tokens, loaded.eot) == (tokenizer.tokens, tokenizer.eot)
    assert loaded.encode("or to").tolist() == tokenizer.encode("or to").tolist()


def test_version_1_and_2_of_llmc_without_json(tmp_path):
    tokens = [*SINGLE_BYTES, *(struct.pack(">H", i) for i in range(50000)), END_OF_TEXT]
    for version, eot in ((1, 0), (2, 50256)):
        path = tmp_path / f"v{version}.bin"
        path.write_bytes(header(version=version, count=50257, eot=eot) + records(*tokens))
        tokenizer = Tokenizer.load(path)
        assert (tokenizer.kind, tokenizer.eot, tokenizer.vocab_size) == ("gpt2", 50256, 50257)


HOSTILE = {
    "empty": (b"", "1024 to"),
    "html": (b"<!DOCTYPE html>".ljust(2000), "not a tokenizer: magic is 1329865020, expected 20240328"),
    "short": (header()[:-1], "1024 to"),
    "header only": (header(), "number of tokens is 3"),
    "magic": (header(magic=20240326) + records(b"a", b"b", b"c"), "not a tokenizer but a model"),
    "version": (header(version=3) + records(b"a", b"b", b"c"), "version is 3, expected 1 or 2"),
    "version 1 count": (header(version=1) + records(b"a", b"b", b"c"), "expected 50257"),
    "no tokens": (header(count=0), "number of tokens is 0"),
    "huge count": (header(count=2**32 - 1) + records(b"a", b"b", b"c"), "number of tokens is 4294967295"),
    "count over size": (header(count=4) + records(b"a", b"b", b"c"), "number of tokens is 4"),
    "eot": (header(eot=3) + records(b"a", b"b", b"c"), "end-of-text id is 3"),
    "zero length": (header() + records(END_OF_TEXT, b"", b"bcd"), "token 1 at byte 1038 has length 0"),
    "past the end": (header() + b"\x01a\x01b\x02c", "token 2 at byte 1028 has length 2"),
    "no last token": (header() + b"\x01a\x03bcd", "token 2 at byte 1030 has length 0"),
    "extra bytes": (header() + records(END_OF_TEXT, b"a", b"b") + b"\0\0", "2 bytes too many"),
    "twice the same": (header() + records(END_OF_TEXT, b"a", b"a"), "same bytes"),
    "two characters": (header() + records(END_OF_TEXT, b"a", b"bc"), "token 2 .* must be one UTF-8 character"),
    "not UTF-8": (header() + records(END_OF_TEXT, b"a", b"\xff"), "token 2 .* must be one UTF-8 character"),
    "unknown kind": (header(eot=2) + records(b"a", b"b", b"c"), "cannot tell what kind"),
    "too large": (header() + bytes(65536 * 256 + 1), "this one has"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(tmp_path, case):
    data, told = HOSTILE[case]
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=told) as info:
        Tokenizer.load(path)
    assert str(path) in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"kind": 1}', b'{"kind": ["char"]}', b"[" * 4096, b"\xff\xfe"])
def test_hostile_kind(tmp_path, content):
    path = tmp_path / "tokenizer.bin"
    CharTokenizer.from_text("ab").save(path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r'tokenizer.json: "kind" must be one of char, gpt2'):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("tokens", "eot", "told"),
    [
        ([END_OF_TEXT, *SINGLE_BYTES], 0, "must be the last one"),
        ([*SINGLE_BYTES[:-1], b"xx", END_OF_TEXT], 256, "256 single bytes"),
        ([*SINGLE_BYTES], 255, "256 single bytes"),
        ([*SINGLE_BYTES, b"a", END_OF_TEXT], 257, "same bytes"),
    ],
)
def test_what_is_no_byte_pair_table(tokens, eot, told):
    with pytest.raises(ValueError, match=told):
        GPT2Tokenizer(tokens, eot)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "none.bin")
    with pytest.raises(ValueError, match="not a regular file"):
        Tokenizer.load(tmp_path)


# ---- byte pairs ------------------------------------------------------------------------------------------------------


def slow_encode(tokenizer, text):
    """Byte pairs as the paper tells them: merge the neighbours of lowest rank until none is left, piece by piece."""
    regex = pytest.importorskip("regex")  # comes with tiktoken
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens[:-1])}
    found = []
    for piece in regex.findall(pattern, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while len(parts) > 1:
            rank, i = min((ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
            if rank == 1 << 30:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found += [ranks[part] for part in parts]
    return found


@given(st.text(st.sampled_from(list("hello wrd  \n\t'sé1?!\u3000")), max_size=30))
def test_byte_pairs_are_merged_by_rank(text):
    tokenizer = byte_pair_tokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == slow_encode(tokenizer, text)
    assert tokenizer.decode(ids) == text


def test_byte_pairs_keep_end_of_text_as_text():
    tokenizer = byte_pair_tokenizer()
    ids = tokenizer.encode("hello<|endoftext|>")
    assert tokenizer.eot not in ids and tokenizer.decode(ids) == "hello<|endoftext|>"
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"


@pytest.mark.parametrize("white", [" ", "\n"])
def test_byte_pairs_of_a_very_long_run_of_white_space(white):
    tokenizer = byte_pair_tokenizer()
    run = white * 1_200_000
    text = "hell" + run + "or" + run
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # All of the first run but its last character is one piece.
    pieces = ["hell", run[:-1], run[-1] + "or" if white == " " else run[-1], "" if white == " " else "or", run]
    assert ids.tolist() == [i for piece in pieces for i in tokenizer._encoding.encode_ordinary(piece)]


def test_half_a_character_decodes_to_a_replacement():
    assert byte_pair_tokenizer().decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


# ---- GPT-2's table ---------------------------------------------------------------------------------------------------


@functools.cache
def whole_table():
    return Tokenizer.gpt2()


@pytest.fixture
def gpt2():
    return whole_table()


@pytest.fixture(scope="module")
def script():
    path = ROOT / "data" / "make_gpt2_tokenizer.py"
    if not path.exists():
        pytest.skip("needs a source tree")
    spec = importlib.util.spec_from_file_location("make_gpt2_tokenizer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gpt2_vectors(gpt2):
    assert (gpt2.vocab_size, gpt2.eot, gpt2.tokens[gpt2.eot]) == (50257, 50256, END_OF_TEXT)
    assert gpt2.encode("Hello, world!").tolist() == [15496, 11, 995, 0]
    ids = gpt2.encode("Alan Turing theorized that computers would one day become")
    assert ids.tolist() == [36235, 39141, 18765, 1143, 326, 9061, 561, 530, 1110, 1716]
    assert gpt2.decode(ids) == "Alan Turing theorized that computers would one day become"


def test_gpt2_tokens_of_tiny_shakespeare(gpt2):
    path = os.environ.get("PYLLMC_TINYSHAKESPEARE")
    if not path:
        pytest.skip("PYLLMC_TINYSHAKESPEARE does not name the text of Tiny Shakespeare")
    assert len(gpt2.encode(Path(path).read_text(encoding="utf-8"))) == 338_025


def test_table_is_the_file_that_its_readme_describes():
    data = GPT2_TABLE.read_bytes()
    readme = (GPT2_TABLE.parent / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(data).hexdigest() in readme and f"{len(data):,} bytes" in readme


def test_table_and_published_files_make_one_another(gpt2, script, tmp_path, capsys):
    """encoder.json and vocab.bpe are what transformers calls vocab.json and merges.txt."""
    exported = tokenizer_files(gpt2, 1024)
    files = {"encoder.json": exported["vocab.json"], "vocab.bpe": exported["merges.txt"]}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == script.SOURCES
    (tmp_path / "data").mkdir()
    for name, data in files.items():
        (tmp_path / "data" / name).write_bytes(data)
    script.main([str(tmp_path), "--output", str(tmp_path / "again.bin")])
    assert (tmp_path / "again.bin").read_bytes() == GPT2_TABLE.read_bytes()
    assert "sha256 6f3abc21" in capsys.readouterr().out


def test_script_refuses_other_files(script, tmp_path):
    (tmp_path / "data").mkdir()
    for name in script.SOURCES:
        (tmp_path / "data" / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"encoder.json: sha256 is .*, expected 196139668be6"):
        script.main([str(tmp_path), "--output", str(tmp_path / "out.bin")])
    assert not (tmp_path / "out.bin").exists()


TEXTS = st.one_of(
    # Not those that Python's Unicode does not know: newer tables may have made letters of them.
    st.text(st.characters(exclude_categories=["Cs", "Cn"])),
    st.text(st.sampled_from(list("aZé中१5²'\"!-_ \t\n\r\x1c\x85\xa0\u1680\u2003\u2028\u3000\u200b\u180e\ufeff"))),
    st.lists(st.sampled_from(["'s", "'ll", "'S", "I", " don", "'t", "  ", " 12", "x's", "\n\n", " \n"])).map("".join),
)


@given(TEXTS)
def test_gpt2_pieces_are_those_of_the_published_pattern(text):
    tokenizer = whole_table()
    assert tokenizer.encode(text).tolist() == slow_encode(tokenizer, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_white_space_is_what_the_pattern_takes_for_it():
    """The places where a text may be cut hang on this."""
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    ranks = {byte: i for i, byte in enumerate(SINGLE_BYTES)}
    white = tiktoken.Encoding("white", pat_str=r"\s", mergeable_ranks=ranks, special_tokens={})
    assert bytes(white.encode_ordinary(everything)).decode() == "".join(re.findall(f"[{_WHITE}]", everything))


# ---- long texts in pieces --------------------------------------------------------------------------------------------


@given(TEXTS, st.lists(st.integers(0, 40)))
def test_pieces_that_were_cut_have_the_ids_of_the_text(text, lengths):
    tokenizer = whole_table()
    ends = [*itertools.accumulate(lengths), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *ends])]
    cut = list(tokenizer.cut(pieces))
    assert "".join(cut) == text
    ids = [i for piece in cut for i in tokenizer.encode(piece).tolist()]
    assert ids == tokenizer.encode(text).tolist()


def test_a_text_is_cut_before_white_space_only(gpt2):
    assert list(gpt2.cut(["one two th", "ree\n\n", " four", ""])) == ["one two", " three", "\n\n four"]
    assert list(gpt2.cut(["one", " two"])) == ["one", " two"]
    assert list(gpt2.cut(["no", "space", "at", "all"])) == ["nospaceatall"]
    assert list(gpt2.cut([" ", "\n", "\u3000"])) == [" \n\u3000"]
    assert list(gpt2.cut(["a", " " * 9, " " * 9, "b"])) == ["a", " " * 18 + "b"]
    assert list(gpt2.cut([])) == []
    assert list(CharTokenizer.from_text("ab ").cut(["a b", "a"])) == ["a b", "a"]


@given(st.lists(TEXTS, min_size=1, max_size=5), st.booleans())
def test_documents_begin_with_end_of_text(texts, continued):
    for tokenizer in (whole_table(), CharTokenizer.from_text("".join(texts))):
        ids = [i for text in texts for i in (tokenizer.eot, *tokenizer.encode(text).tolist())]
        assert tokenizer.encode_documents(texts, continued).tolist() == ids[continued:]


@pytest.mark.parametrize("text", ["a<|endoftext|>b", "<|endoftext|>", "<|end", " " * 250_000, "a" + " " * 250_000])
def test_documents_with_odd_texts(gpt2, text):
    ids = gpt2.encode(text).tolist()
    assert gpt2.eot not in ids and gpt2.decode(ids) == text
    assert gpt2.encode_documents([text, text]).tolist() == [gpt2.eot, *ids, gpt2.eot, *ids]
    assert gpt2.encode_documents(["oftext|>", "x"], continued=True).tolist() == [
        *gpt2.encode("oftext|>").tolist(), gpt2.eot, *gpt2.encode("x").tolist()
    ]  # fmt: skip


def test_half_a_surrogate_pair_becomes_a_replacement(gpt2):
    assert gpt2.decode(gpt2.encode("a\ud800b")) == "a\N{REPLACEMENT CHARACTER}b"
    assert gpt2.encode_documents(["a\ud83d", "\ude00"]).tolist() == [
        gpt2.eot, *gpt2.encode("a\ufffd").tolist(), gpt2.eot, *gpt2.encode("\ufffd").tolist()
    ]  # fmt: skip


# ---- ids alone, and which tokenizer a model has ----------------------------------------------------------------------


def test_ids_alone_are_shown_as_numbers(tmp_path):
    tokenizer = TokenIds(1000)
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.start) == (1000, 999, 999)
    assert tokenizer.decode([0, 999, 5]) == " 0 999 5"
    assert TokenIds(128_256).decode([128_255]) == " 128255" and TokenIds(50_304).eot == 50_256
    for token in (-1, 1000):
        with pytest.raises(ValueError, match=r"in \[0, 1000\)"):
            tokenizer.decode([token])
    with pytest.raises(ValueError, match="text of these 1000 token ids is not known"):
        tokenizer.encode("a")
    with pytest.raises(ValueError, match=r"t.bin: cannot be written: the text of these 1000"):
        tokenizer.save(tmp_path / "t.bin")
    with pytest.raises(ValueError, match="at least 1"):
        TokenIds(0)
    assert list(tmp_path.iterdir()) == []


def test_the_first_tokenizer_file_counts(tmp_path):
    folders = [tmp_path / name for name in ("none", "a", "b")]
    for folder, name, text in ((folders[1], "gpt2_tokenizer.bin", "xy"), (folders[2], "tokenizer.bin", "xyz")):
        folder.mkdir()
        CharTokenizer.from_text(text).save(folder / name)
    assert find_tokenizer(folders).vocab_size == 3
    assert find_tokenizer(iter(folders[::-1]), 4).vocab_size == 4
    CharTokenizer.from_text("x").save(folders[1] / "tokenizer.bin")
    assert find_tokenizer(folders, 2).vocab_size == 2
    with pytest.raises(ValueError, match=r"a/tokenizer.bin: has 2 tokens, the model 4: they do not belong together"):
        find_tokenizer(folders, 4)


def test_without_a_file_it_is_gpt2s_or_ids(tmp_path):
    assert find_tokenizer([tmp_path]).kind == find_tokenizer([tmp_path], 50257).kind == "gpt2"
    other = find_tokenizer([tmp_path], 65)
    assert isinstance(other, TokenIds) and other.vocab_size == 65


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_transformers_files_tell_gpt2s_tokens_from_others(tmp_path, name, gpt2):
    """By their tokens, not by their number: many a GPT-2 of another language has 50257 too."""
    vocabulary = json.loads(tokenizer_files(gpt2, 1024)["vocab.json"])
    swapped = vocabulary | {"a": vocabulary["b"], "b": vocabulary["a"]}
    for tokens, found in ((vocabulary, GPT2Tokenizer), (swapped, TokenIds), ({}, TokenIds), ([], TokenIds)):
        content = {"model": {"vocab": tokens}} if name == "tokenizer.json" else tokens
        (tmp_path / name).write_text(json.dumps(content))
        if content == []:
            with pytest.raises(ValueError, match="vocab.json: expected a JSON object"):
                find_tokenizer([tmp_path], 50257)
            continue
        assert type(find_tokenizer([tmp_path], 50257)) is found
        assert find_tokenizer([tmp_path], 65).vocab_size == 65
    (tmp_path / name).write_text('{"kind": "gpt2"}')
    assert type(find_tokenizer([tmp_path])) is (GPT2Tokenizer if name == "tokenizer.json" else TokenIds)


def test_a_damaged_tokenizer_file_is_not_passed_over(tmp_path):
    (tmp_path / "tokenizer.bin").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"tokenizer.bin: a tokenizer file has 1024 to"):
        find_tokenizer([tmp_path], 50257)
