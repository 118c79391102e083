"""Exports against transformers, offline: the same logits, the same tokens; and its own folders against the import."""

import numpy as np
import pytest

from pyllmc import huggingface
from pyllmc.config import GPT2Config
from pyllmc.floats import DTYPES
from pyllmc.model import GPT2, initial_parameters
from pyllmc.tokenizer import Tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CONFIG = GPT2Config(num_layers=3, num_heads=3, channels=48, vocab_size=97, max_seq_len=20)

TEXTS = [
    "Hello, world!",
    "Alan Turing theorized that computers would one day become",
    "  two  spaces, \t\ttabs\n\n\nand lines \r\n end   ",
    "don't we'll I'VE 'tis they're 12345 3.14 a1b2 x_y __init__()",
    "naïve café Ünïcödé \u00a0\u2003 中文字 русский עברית हिन्दी 한국어 \U0001f600\U0001f468\u200d\U0001f469",
    "".join(map(chr, range(1, 256))),
    "\ufffd\u2028\u3000x",
    "",
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def their_logits(folder, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_computes_the_same_logits(tmp_path, dtype, max_shard_bytes):
    flat = 4 * initial_parameters(CONFIG)
    huggingface.write_model(tmp_path / "hf", CONFIG, flat, dtype, max_shard_bytes=max_shard_bytes)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 20))
    ours = GPT2.from_pretrained(tmp_path / "hf").logits(tokens)
    expected = their_logits(tmp_path / "hf", tokens)
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "GPT2Model"])
def test_what_transformers_saves_is_read(tmp_path, kind, max_shard_size):
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_layer=3, n_head=3, n_embd=48, vocab_size=97, n_positions=20, eos_token_id=None,
                                     bos_token_id=None)  # fmt: skip
    theirs = getattr(transformers, kind)(config).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    ours = GPT2.from_pretrained(tmp_path / "theirs")
    assert ours.config == CONFIG
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 20))
    expected = their_logits(tmp_path / "theirs", tokens)
    assert np.abs(ours.logits(tokens) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_safetensors_package_reads_the_same(tmp_path):
    numpy_api = pytest.importorskip("safetensors.numpy")
    flat = initial_parameters(CONFIG)
    huggingface.write_model(tmp_path / "hf", CONFIG, flat)
    path = tmp_path / "hf" / "model.safetensors"
    tensors = numpy_api.load_file(path)
    assert len(tensors) == 4 + 12 * CONFIG.num_layers
    # And writes what is read, in an order of its own.
    numpy_api.save_file(tensors, path, {"format": "pt"})
    assert np.array_equal(huggingface.read_model(tmp_path / "hf")[1], flat)


def test_gpt2s_export_is_whole(tmp_path):
    """Model, tokenizer and generation, as a script of transformers uses them."""
    config = GPT2Config(num_layers=1, num_heads=1, channels=8, vocab_size=50257, max_seq_len=64)
    GPT2(config).save_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Tokenizer.gpt2()
    assert len(tokenizer) == 50257 and tokenizer.eos_token_id == tokenizer.bos_token_id == ours.eot
    assert tokenizer.model_max_length == 64
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == ours.decode(ids) == text
    ids = np.random.default_rng(0).integers(0, 50256, 2000).tolist()
    assert tokenizer.decode(ids) == ours.decode(ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert model.generation_config.eos_token_id == ours.eot
    tokens = tokenizer("To be, or not", return_tensors="pt")
    expected = model.generate(**tokens, max_new_tokens=8, do_sample=False, pad_token_id=ours.eot)[0].tolist()
    mine = GPT2.from_pretrained(tmp_path / "hf")
    cache, drawn = mine.new_cache(), []
    step = prompt = tokens["input_ids"][0].tolist()
    for _ in range(8):
        step = [int(mine.decode([step], cache).argmax())]
        drawn += step
    assert prompt + drawn == expected
