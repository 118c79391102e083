"""pyllmc/huggingface.py and safetensors.py: folders against literal bytes and names, and what is told of wrong ones.

test_fuzz.py goes through every number and every length of such files; parity/test_transformers.py holds them against
transformers and the safetensors package.
"""

import functools
import json
import struct
import sys
import tracemalloc
import types

import numpy as np
import pytest

from pyllmc import huggingface, modelfile
from pyllmc.config import GPT2Config
from pyllmc.floats import DTYPES, to_bfloat16
from pyllmc.model import GPT2
from pyllmc.rng import TorchGenerator
from pyllmc.tensors import views
from pyllmc.tokenizer import CharTokenizer, GPT2Tokenizer

CONFIG = GPT2Config(num_layers=2, num_heads=3, channels=12, vocab_size=97, max_seq_len=5)
GEOMETRIES = [
    CONFIG,
    GPT2Config(num_layers=1, num_heads=1, channels=1, vocab_size=1, max_seq_len=1),
    GPT2Config(num_layers=3, num_heads=5, channels=15, vocab_size=128, max_seq_len=7),
    GPT2Config(num_layers=1, num_heads=2, channels=2, vocab_size=257, max_seq_len=2),
]
KINDS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8, "I64": np.int64}


def parameters(config=CONFIG, dtype="float32"):
    """Parameters that are all different, of this dtype's precision, zero in the padding."""
    flat = TorchGenerator(3).normal(config.num_parameters_padded)
    views(flat, config)["wte"][config.vocab_size :] = 0
    if dtype == "float16":
        return flat.astype(np.float16).astype(np.float32)
    return (to_bfloat16(flat).astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else flat


def write_tensors(path, tensors):
    """A safetensors file written without pyllmc: name -> array or (dtype, array)."""
    header, data = {}, b""
    for name, array in tensors.items():
        dtype, array = array if isinstance(array, tuple) else ("F32", array)
        content = np.ascontiguousarray(array, KINDS[dtype]).tobytes()
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensors_of(path):
    """name -> array of a safetensors file read without pyllmc; those of 16 bits as bits."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"} and (8 + length) % 8 == 0
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[entry["dtype"]]
        found[name] = np.frombuffer(data[8 + length + begin : 8 + length + end], kind).reshape(entry["shape"])
    return found


def their_tensors(config=CONFIG, flat=None, prefix="transformer."):
    """The tensors of transformers' GPT2LMHeadModel, written down here once more."""
    p = views(parameters(config) if flat is None else flat, config)
    found = {"wte.weight": p["wte"][: config.vocab_size], "wpe.weight": p["wpe"]}
    for layer in range(config.num_layers):
        for ours, theirs in (("ln1", "ln_1"), ("ln2", "ln_2")):
            found[f"h.{layer}.{theirs}.weight"] = p[f"{ours}w"][layer]
            found[f"h.{layer}.{theirs}.bias"] = p[f"{ours}b"][layer]
        for ours, theirs in (("qkv", "attn.c_attn"), ("attproj", "attn.c_proj"), ("fc", "mlp.c_fc"),
                             ("fcproj", "mlp.c_proj")):  # fmt: skip
            found[f"h.{layer}.{theirs}.weight"] = p[f"{ours}w"][layer].T
            found[f"h.{layer}.{theirs}.bias"] = p[f"{ours}b"][layer]
    found |= {"ln_f.weight": p["lnfw"], "ln_f.bias": p["lnfb"]}
    return {prefix + name: array for name, array in found.items()}


def their_config(config=CONFIG, **changes):
    """A config.json as the first ones were, which leave out what is as usual."""
    fields = {
        "model_type": "gpt2", "n_layer": config.num_layers, "n_head": config.num_heads, "n_embd": config.channels,
        "vocab_size": config.vocab_size, "n_positions": config.max_seq_len, "n_ctx": config.max_seq_len,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "initializer_range": 0.02,
    }  # fmt: skip
    return {name: value for name, value in (fields | changes).items() if value != "left out"}


@pytest.fixture
def folder(tmp_path):
    """A folder that was written without pyllmc."""
    path = tmp_path / "theirs"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(their_config()))
    write_tensors(path / "model.safetensors", their_tensors())
    return path


def assert_refused(folder, *words):
    """Reading the folder is a ValueError of one line with all of these words in it."""
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        huggingface.read_model(folder)
    text = str(error.value)
    assert str(folder) in text and "\n" not in text and len(text) < 600
    for word in words:
        assert word in text, text


# ---- both ways -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", GEOMETRIES, ids=str)
def test_round_trip_bit_for_bit(config, dtype, tmp_path):
    flat = parameters(config, dtype)
    huggingface.write_model(tmp_path / "hf", config, flat, dtype)
    header = huggingface.read_header(tmp_path / "hf")
    found, back = huggingface.read_model(tmp_path / "hf")
    assert header.config == found == config and header.dtype == dtype
    assert back.dtype == np.float32 and np.array_equal(back.view(np.uint32), flat.view(np.uint32))


def test_what_is_written_is_what_transformers_has(tmp_path):
    huggingface.write_model(tmp_path / "hf", CONFIG, parameters())
    found, expected = tensors_of(tmp_path / "hf" / "model.safetensors"), their_tensors()
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape and np.array_equal(found[name], array), name
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert content.items() >= their_config(n_ctx="left out", initializer_range="left out").items()
    assert content["tie_word_embeddings"] is True and content["eos_token_id"] is None
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == ["config.json", "model.safetensors"]


def test_padding_is_not_written(tmp_path):
    flat = parameters()
    views(flat, CONFIG)["wte"][CONFIG.vocab_size :] = 9
    huggingface.write_model(tmp_path / "hf", CONFIG, flat)
    assert np.array_equal(huggingface.read_model(tmp_path / "hf")[1], parameters())


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_both_prefixes_and_all_dtypes_are_read(folder, prefix, kind):
    flat = parameters(dtype={"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[kind])
    tensors = their_tensors(flat=flat, prefix=prefix)
    if kind == "BF16":
        tensors = {name: to_bfloat16(array) for name, array in tensors.items()}
    write_tensors(folder / "model.safetensors", {name: (kind, array) for name, array in tensors.items()})
    config, back = huggingface.read_model(folder)
    assert config == CONFIG and np.array_equal(back, flat)


def test_what_belongs_to_no_parameter_is_left_out(folder):
    """The masks of older models, and a head that is wte."""
    mask = ("U8", np.tril(np.ones((1, 1, 5, 5))))
    tensors = {"lm_head.weight": their_tensors()["transformer.wte.weight"]} | their_tensors()
    for layer in range(2):
        tensors[f"transformer.h.{layer}.attn.bias"] = mask
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = np.array(-1e4)
    write_tensors(folder / "model.safetensors", tensors)
    assert np.array_equal(huggingface.read_model(folder)[1], parameters())


def test_files_of_several_dtypes_are_float32(folder):
    tensors = their_tensors(flat=parameters(dtype="float16"))
    tensors["transformer.wpe.weight"] = ("F16", tensors["transformer.wpe.weight"])
    write_tensors(folder / "model.safetensors", tensors)
    assert huggingface.read_header(folder).dtype == "float32"
    assert np.array_equal(huggingface.read_model(folder)[1], parameters(dtype="float16"))


def test_several_files(tmp_path):
    """Small tensors share a file, one that is larger than the limit has its own; the index names all."""
    hf = tmp_path / "hf"
    huggingface.write_model(hf, CONFIG, parameters(), max_shard_bytes=2000)
    files = sorted(path.name for path in hf.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * CONFIG.num_parameters}
    found = {name: (file, array) for file in files for name, array in tensors_of(hf / file).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert found.keys() == their_tensors().keys() and len(files) < len(found)
    for file in files:
        sizes = [array.nbytes for name, (its_file, array) in found.items() if its_file == file]
        assert sum(sizes) <= 2000 or len(sizes) == 1
    config, back = huggingface.read_model(hf)
    assert config == CONFIG and np.array_equal(back, parameters())


def test_n_ctx_is_another_name_of_n_positions(folder):
    (folder / "config.json").write_text(json.dumps(their_config(n_positions="left out")))
    assert huggingface.read_config(folder) == CONFIG


def test_memory_is_that_of_the_parameters_and_one_tensor(tmp_path):
    config = GPT2Config(num_layers=8, num_heads=2, channels=128, vocab_size=300, max_seq_len=16)
    flat = parameters(config)
    one = 4 * 4 * 128 * 128
    for dtype in DTYPES:
        tracemalloc.start()
        huggingface.write_model(tmp_path / dtype, config, flat, dtype)
        assert tracemalloc.get_traced_memory()[1] < 4 * one + 2**17
        tracemalloc.stop()
        tracemalloc.start()
        huggingface.read_model(tmp_path / dtype)
        assert tracemalloc.get_traced_memory()[1] < flat.nbytes + 4 * one + 2**17
        tracemalloc.stop()


# ---- the model's methods ---------------------------------------------------------------------------------------------


def test_the_model_reads_and_writes_folders(tmp_path):
    model = GPT2(CONFIG, params=parameters())
    model.save_pretrained(tmp_path / "hf")
    for load in (GPT2.from_pretrained, GPT2.from_checkpoint):
        back = load(tmp_path / "hf")
        assert back.config == CONFIG and np.array_equal(back.flat_params, model.flat_params)
    tokens = np.arange(5)[None]
    assert np.array_equal(back.logits(tokens), model.logits(tokens))


def fake_hub(monkeypatch, answer):
    """huggingface_hub with a snapshot_download that calls `answer`, and nothing fetched before."""
    monkeypatch.setattr(huggingface, "_fetch", functools.cache(huggingface._fetch.__wrapped__))
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=answer))


def test_names_are_fetched(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def answer(name, allow_patterns):
        asked.append(name)
        assert not any(pattern.startswith("pytorch") for pattern in allow_patterns)
        return str(folder)

    fake_hub(monkeypatch, answer)
    for name in ("gpt2", "gpt2-xl", "someone/some-gpt2", "gpt2"):
        assert GPT2.from_pretrained(name).config == CONFIG
    assert asked == ["openai-community/gpt2", "openai-community/gpt2-xl", "someone/some-gpt2"]
    huggingface.write_model(tmp_path / "gpt2", GEOMETRIES[1], parameters(GEOMETRIES[1]))
    assert GPT2.from_pretrained("gpt2").config == GEOMETRIES[1], "a folder of this name comes first"


def test_a_name_that_cannot_be_fetched_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def no_network(name, allow_patterns):
        raise RuntimeError("no route\nand a page of advice")

    fake_hub(monkeypatch, no_network)
    with pytest.raises(OSError, match=r"openai-community/gpt2: .*\(no route\); try .*name a folder") as error:
        GPT2.from_pretrained("gpt2")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'pyllmc\[hub\]', or name a folder"):
        GPT2.from_pretrained("gpt2")
    for name in ("no/such/folder", "../folder", "a b", "", "a\0b"):
        with pytest.raises(ValueError, match="there is no such folder"):
            GPT2.from_pretrained(name)


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def test_gpt2s_tokenizer_comes_with_gpt2s_vocabulary(tmp_path):
    config = GPT2Config(num_layers=1, num_heads=1, channels=2, vocab_size=50257, max_seq_len=9)
    flat = np.zeros(config.num_parameters_padded, np.float32)
    huggingface.write_model(tmp_path / "hf", config, flat)
    vocabulary = json.loads((tmp_path / "hf" / "vocab.json").read_text())
    assert vocabulary["\u0120the"] == 262 and vocabulary["<|endoftext|>"] == 50256 and len(vocabulary) == 50257
    merges = (tmp_path / "hf" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert merges[:2] == ["#version: 0.2", "\u0120 t"] and len(merges) == 1 + 50257 - 257
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "hf" / name).read_text())
        assert content["eos_token_id"] == content["bos_token_id"] == 50256
    # Where the tokens are known to be others, they are not called GPT-2's.
    other = CharTokenizer.from_characters(map(chr, range(1, 50257)))
    huggingface.write_model(tmp_path / "other", config, flat, tokenizer=other)
    assert not (tmp_path / "other" / "vocab.json").exists()


def test_merges_of_other_byte_pairs():
    single = [bytes([byte]) for byte in range(256)]
    tokens = [*single, b"ab", b"abc", b"cab", b"<|endoftext|>"]
    files = huggingface.tokenizer_files(GPT2Tokenizer(tokens, len(tokens) - 1), 8)
    assert files["merges.txt"].decode().splitlines() == ["#version: 0.2", "a b", "ab c", "c ab"]
    broken = GPT2Tokenizer([*single, b"abc", b"<|endoftext|>"], 257)
    with pytest.raises(ValueError, match="token 256 of the tokenizer, b'abc', is not made of two earlier ones"):
        huggingface.tokenizer_files(broken, 8)


# ---- what cannot be computed, or read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "left out"), ("model_type", "llama"), ("n_layer", "left out"), ("n_layer", "2"),
        ("n_head", True), ("n_embd", 12.0), ("vocab_size", None), ("n_positions", [5]), ("n_layer", 0),
        ("n_head", -3), ("n_head", 5), ("vocab_size", 10**30), ("activation_function", "gelu"),
        ("activation_function", ["gelu_new"]), ("layer_norm_epsilon", 1e-6), ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True), ("reorder_and_upcast_attn", True), ("add_cross_attention", True),
        ("tie_word_embeddings", False), ("n_inner", 47), ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"bits": 8}),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_computed_names_its_field(folder, field, value):
    (folder / "config.json").write_text(json.dumps(their_config(**{field: value})))
    ours = {"n_layer": "num_layers", "n_head": "num_heads", "vocab_size": "vocab_size"}
    with pytest.raises(ValueError, match=f"config.json: .*({field}|{ours.get(field, field)})"):
        huggingface.read_config(folder)
    assert_refused(folder)


@pytest.mark.parametrize("field", [{"n_inner": 48}, {"n_inner": None}, {"activation_function": "gelu_pytorch_tanh"},
                                   {"activation_function": "left out"}, {"attn_pdrop": 0.5}])  # fmt: skip
def test_a_config_that_says_the_same_in_other_words(folder, field):
    (folder / "config.json").write_text(json.dumps(their_config(**field)))
    assert np.array_equal(huggingface.read_model(folder)[1], parameters())


@pytest.mark.parametrize("field", ["n_layer", "n_embd", "vocab_size", "n_positions"])
@pytest.mark.parametrize("more", [-1, 1, 10**5])
def test_tensors_that_do_not_fit_the_config(folder, field, more):
    value = their_config()[field] + more * (3 if field == "n_embd" else 1)
    (folder / "config.json").write_text(json.dumps(their_config(**{field: min(value, 9999)})))
    assert_refused(folder, "tensor")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('{"n_layer": 1, "n_layer": 2}', "comes twice"), ('{"n_layer": NaN}', "NaN is no number"), ("[]", "object"),
        ("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ('"\ud800"', "not valid JSON"), ("", "not valid"),
        ("9" * 5000, "not valid JSON"), (" " * (32 * 2**20 + 1), "at most 33554432"),
    ],
)  # fmt: skip
def test_json_that_is_none(folder, content, word):
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert_refused(folder, "config.json", word)


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_refused(folder, "pytorch_model.bin is a pickle", "safe_serialization=True")
    (folder / "pytorch_model.bin").unlink()
    assert_refused(folder, "model.safetensors", "no such file")
    (folder / "config.json").unlink()
    assert_refused(folder, "config.json", "not the folder of a Hugging Face model")


def one_tensor(**entry):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"", "not valid JSON"), (b"null", "expected a JSON object"), (b"{}x", "not valid JSON"),
        (b'{"a": NaN}', "NaN is no number"), (b"\xff{}", "not valid JSON"), (b"{" * 10000, "not valid JSON"),
        (b'{"a": ' * 10000, "not valid JSON"), (b'{"a": 1, "a": 2}', "'a' comes twice"),
        ({"a": None}, "tensor 'a': expected dtype"), ({"a": one_tensor(more=1)}, "tensor 'a': expected dtype"),
        ({"__metadata__": {"a": 1}}, "must hold strings"), ({"__metadata__": "a"}, "must hold strings"),
        ({"a": one_tensor(dtype="F4")}, "tensor 'a': dtype is 'F4'"), ({"a": one_tensor(dtype=[])}, "dtype is []"),
        ({"a": one_tensor(shape=2)}, "shape must be"), ({"a": one_tensor(shape=[-2])}, "shape must be"),
        ({"a": one_tensor(shape=[True, 2])}, "shape must be"), ({"a": one_tensor(shape=[2.0])}, "shape must be"),
        ({"a": one_tensor(shape=[1] * 9)}, "shape must be"), ({"a": one_tensor(shape=[2**63])}, "shape must be"),
        ({"a": one_tensor(shape=[2**62, 2**62])}, "8 bytes, expected"), ({"a": one_tensor(shape=[3])}, "8 bytes"),
        ({"a": one_tensor(data_offsets=[8, 0])}, "data_offsets"), ({"a": one_tensor(data_offsets=[0])}, "data_offsets"),
        ({"a": one_tensor(data_offsets=[-8, 0])}, "data_offsets"), ({"a": one_tensor(data_offsets=8)}, "data_offsets"),
        ({"a": one_tensor(data_offsets=[2**62, 2**62 + 8])}, "data_offsets"),
        ({"a": one_tensor(data_offsets=[1, 9])}, "data_offsets"), ({}, "the last tensor ends"),
        ({"a": one_tensor(dtype="U8", data_offsets=[0, 2])}, "the last tensor ends"),
        ({"a": one_tensor(dtype="F16", data_offsets=[4, 8])}, "tensor 'a' has a hole"),
        ({"a": one_tensor(), "b": one_tensor()}, "tensor 'b' overlaps"),
        ({"a": one_tensor(dtype="F16", data_offsets=[0, 4]), "b": one_tensor(dtype="U8", data_offsets=[6, 8])}, "hole"),
        ({"a\n\u202eb" * 1000: None}, "'a\\n"),
    ],
)  # fmt: skip
def test_headers_that_are_wrong(folder, header, word):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert_refused(folder, "model.safetensors", word)


@pytest.mark.parametrize("length", [2**63 - 1, 2**64 - 1, 10**8, 33 * 2**20, 3])
def test_the_length_of_a_header_allocates_nothing(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    tracemalloc.start()
    assert_refused(folder, "model.safetensors")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("transformer.h.1.ln_1.bias"), ("tensor h.1.ln_1.bias", "do not have")),
        (lambda tensors: tensors.update({"score.weight": np.ones(2)}), ("'score.weight' is none of a GPT-2",)),
        (lambda tensors: tensors.update({"h.2.ln_1.bias": np.ones(12)}), ("'h.2.ln_1.bias' is none of",)),
        (lambda tensors: tensors.update({"wte.weight": np.ones(2)}), ("'wte.weight' is there twice",)),
        (lambda tensors: tensors.update({"transformer.wpe.weight": ("I64", np.ones((5, 12)))}),
         ("tensor wpe.weight: dtype is I64",)),
        (lambda tensors: tensors.update({"transformer.h.0.mlp.c_fc.weight": np.ones((48, 12))}),
         ("h.0.mlp.c_fc.weight: shape is (48, 12), expected (12, 48)",)),
        (lambda tensors: tensors.update({"lm_head.weight": np.ones((97, 12))}), ("lm_head.weight differs",)),
        (lambda tensors: tensors.update({"lm_head.weight": np.ones((12, 97))}), ("tensor lm_head.weight: shape",)),
    ],
)  # fmt: skip
def test_tensors_that_are_wrong(folder, change, words):
    tensors = their_tensors()
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors)
    assert_refused(folder, *words)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda index: index.pop("weight_map"), "weight_map must name"),
        (lambda index: index.update(weight_map={}), "weight_map must name"),
        (lambda index: index.update(weight_map=["a"]), "weight_map must name"),
        (lambda index: index["weight_map"].update({"a": "../model.safetensors"}), "is no file of this folder"),
        (lambda index: index["weight_map"].update({"a": "/etc/x.safetensors"}), "is no file of this folder"),
        (lambda index: index["weight_map"].update({"a": "pytorch_model.bin"}), "is no file of this folder"),
        (lambda index: index["weight_map"].update({"a": "a\0.safetensors"}), "is no file of this folder"),
        (lambda index: index["weight_map"].update({"a": 3}), "3 is no file of this folder"),
        (lambda index: index["weight_map"].update({"a": "none.safetensors"}), "none.safetensors"),
        (lambda index: index["weight_map"].pop("transformer.wpe.weight"), "'transformer.wpe.weight' should be nowhere"),
        (lambda index: index["weight_map"].update({"a": min(index["weight_map"].values())}), "'a' should be in model-"),
    ],
)
def test_an_index_that_is_wrong(tmp_path, change, word):
    huggingface.write_model(tmp_path / "hf", CONFIG, parameters(), max_shard_bytes=2000)
    path = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    assert_refused(tmp_path / "hf", word)


# ---- what is not written ---------------------------------------------------------------------------------------------


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "hf").mkdir()
    huggingface.write_model(tmp_path / "hf", CONFIG, parameters())  # an empty one will do
    before = {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    with pytest.raises(ValueError, match="hf: is there already, and is not empty"):
        huggingface.write_model(tmp_path / "hf", CONFIG, 2 * parameters())
    assert before == {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    with pytest.raises(ValueError, match="config.json: is there already, and is no folder"):
        huggingface.write_model(tmp_path / "hf" / "config.json", CONFIG, parameters())


def test_what_float16_cannot_hold_leaves_nothing(tmp_path):
    flat = parameters()
    views(flat, CONFIG)["fcw"][1, 2, 3] = -65520
    with pytest.raises(ValueError, match=r"h.1.mlp.c_fc.weight: -65520 is too large for float16; take bfloat16"):
        huggingface.write_model(tmp_path / "hf", CONFIG, flat, "float16")
    assert not list(tmp_path.iterdir())
    views(flat, CONFIG)["fcw"][1, 2, 3] = np.inf  # was before
    huggingface.write_model(tmp_path / "hf", CONFIG, flat, "float16")


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="must be one of float32, bfloat16, float16, got 'int8'"):
        huggingface.write_model(tmp_path / "hf", CONFIG, parameters(), "int8")
    with pytest.raises(ValueError, match="must be a flat float32 array"):
        huggingface.write_model(tmp_path / "hf", CONFIG, parameters()[1:])
    assert not list(tmp_path.iterdir())


def test_a_model_file_is_no_folder_and_the_other_way_round(folder, tmp_path):
    modelfile.write_model(tmp_path / "model.bin", CONFIG, parameters())
    with pytest.raises(OSError):
        huggingface.read_model(tmp_path / "model.bin")
    assert GPT2.from_checkpoint(folder).config == GPT2.from_checkpoint(tmp_path / "model.bin").config
    with pytest.raises(FileNotFoundError, match="config.json"):
        GPT2.from_checkpoint(tmp_path)
