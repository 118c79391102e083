"""The model and the optimizer against PyTorch, twice: Hugging Face's GPT-2 and this project's own in bench/.

The same weights and the same batch: logits, loss, all 16 gradients, then ten steps of AdamW. Needs torch, and for half
of it transformers; nothing is downloaded.
"""

import functools
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import pyllmc
from pyllmc import cli, modelfile, verify
from pyllmc.config import GPT2Config
from pyllmc.floats import to_bfloat16
from pyllmc.model import GPT2, initial_parameters
from pyllmc.optimizer import AdamW
from pyllmc.rng import TorchGenerator
from pyllmc.tensors import TENSORS, views
from pyllmc.tokenfile import write_tokens

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parents[2]


def load_bench(name):
    """A module of bench/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


torch_reference = load_bench("torch_reference")

# name: configuration, B, T
GEOMETRIES = {
    "d12": (GPT2Config.from_descriptor("d12"), 4, 64),
    "odd": (GPT2Config(num_layers=3, num_heads=5, channels=95, vocab_size=211, max_seq_len=33), 4, 33),
    "tiny": (GPT2Config(num_layers=1, num_heads=1, channels=7, vocab_size=128, max_seq_len=1), 1, 1),
}
STEPS = 10
SETTINGS = {"learning_rate": 1e-4, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}


def start(name):
    """The parameters that all models start from, and the batch (inputs, targets) that they all see.

    Matrices and embeddings are twice as wide as GPT-2's initial ones. From those, the first steps of 1e-4 change so
    much that rounding grows from step to step: after ten, PyTorch's own two ways of attention differ by 2e-5 in the
    loss.
    """
    config, B, T = GEOMETRIES[name]
    flat = initial_parameters(config, seed=42)
    params = views(flat, config)
    for tensor in TENSORS:
        if tensor.kind in ("matrix", "embedding"):
            params[tensor.name] *= 2
    inputs, targets = np.random.default_rng(1).integers(0, config.vocab_size, (2, B, T))
    return flat, inputs, targets


@functools.lru_cache(maxsize=1)
def run_pyllmc(name):
    """Logits, gradients and the losses before each step and after the last."""
    flat, inputs, targets = start(name)
    model = GPT2(GEOMETRIES[name][0], ops=pyllmc.backend("cpu"), params=flat)
    optimizer = AdamW(model, decay="matrices", **SETTINGS)
    logits = model.logits(inputs)
    losses = [float(model.forward_backward(inputs, targets))]
    grads = model.flat_grads.copy()
    for _ in range(STEPS):
        optimizer.step()
        model.zero_grad()
        losses.append(float(model.forward_backward(inputs, targets)))
    return logits, grads, losses


@pytest.fixture(scope="module", autouse=True)
def torch_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


def hugging_face(config, flat):
    """transformers' GPT2LMHeadModel with these weights, without dropout."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=config.num_layers, n_head=config.num_heads, n_embd=config.channels, vocab_size=config.vocab_size,
            n_positions=config.max_seq_len, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    torch_reference.copy_parameters(model, config, flat, transposed=True)

    def logits_and_loss(inputs, targets):
        logits = model(inputs).logits
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return model, logits_and_loss, True


def own(config, flat):
    """The model of bench/torch_reference.py."""
    model = torch_reference.TorchGPT2(config, flat)
    return model, model, False


@pytest.mark.parametrize("make", [hugging_face, own])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_model_and_training(name, make):
    config = GEOMETRIES[name][0]
    flat, inputs, targets = start(name)
    logits, grads, losses = run_pyllmc(name)
    model, logits_and_loss, transposed = make(config, flat)
    batch = torch.from_numpy(inputs), torch.from_numpy(targets)

    their_logits, loss = logits_and_loss(*batch)
    expected = their_logits.detach().numpy()
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()

    loss.backward()
    expected = views(torch_reference.flat_gradients(model, config, transposed), config)
    for tensor, gradient in views(grads, config).items():
        # Keys and queries of a single position have no gradient; what PyTorch leaves there is rounding.
        limit = 1e-5 * np.linalg.norm(expected[tensor]) + 1e-9
        assert np.linalg.norm(gradient - expected[tensor]) <= limit, tensor

    their_losses = [loss.item()]
    optimizer = torch_reference.make_optimizer(model, **SETTINGS)
    for _ in range(STEPS):
        optimizer.step()
        optimizer.zero_grad()
        _, loss = logits_and_loss(*batch)
        loss.backward()
        their_losses.append(loss.item())
    assert losses == pytest.approx(their_losses, abs=1e-5, rel=0)
    assert losses[-1] < losses[0]


def test_initial_weights_are_torchs():
    config = GPT2Config(num_layers=2, num_heads=2, channels=78, vocab_size=1013, max_seq_len=50)
    params = views(initial_parameters(config, seed=42), config)
    generator = torch.Generator().manual_seed(42)

    def assert_drawn(weight, std):
        drawn = torch.empty(weight.shape).normal_(0, std, generator=generator).numpy()
        assert np.abs(weight.astype(np.float64) - drawn).max() <= 2e-6 * std

    assert_drawn(params["wte"][:1013], 0.02)
    assert_drawn(params["wpe"], 0.02)
    for layer in range(2):
        for name, std in (("qkvw", 0.02), ("attprojw", 0.01), ("fcw", 0.02), ("fcprojw", 0.01)):
            assert_drawn(params[name][layer], std)


def test_normals_of_every_size():
    ours, theirs = TorchGenerator(3), torch.Generator().manual_seed(3)
    for n in [*range(1, 50), 1, 100_003, 3, 1 << 17]:
        drawn = torch.empty(n).normal_(generator=theirs).numpy()
        assert np.abs(ours.normal(n).astype(np.float64) - drawn).max() <= 2e-6, n


def test_clipping_is_torchs_but_for_its_epsilon():
    config, B, T = GEOMETRIES["odd"]
    flat = initial_parameters(config, seed=1)
    inputs, targets = np.random.default_rng(1).integers(0, config.vocab_size, (2, B, T))
    model, theirs = GPT2(config, params=flat.copy()), torch_reference.TorchGPT2(config, flat)
    model.forward_backward(inputs, targets)
    theirs(torch.from_numpy(inputs), torch.from_numpy(targets))[1].backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1).item()
    assert pyllmc.clip_grad_norm(model, 0.1) == pytest.approx(norm, rel=1e-5)
    expected = torch_reference.flat_gradients(theirs, config)
    assert np.linalg.norm(model.flat_grads - expected) <= 2e-5 * np.linalg.norm(expected)


def test_greedy_text_is_torchs():
    config = GEOMETRIES["odd"][0]
    flat = 5 * initial_parameters(config, seed=2)
    model, theirs = GPT2(config, params=flat), torch_reference.TorchGPT2(config, flat)
    cache, tokens = model.new_cache(), [[7, 8, 9]]
    expected = theirs.generate(torch.tensor(tokens), 20, top_k=1)[0].tolist()
    drawn = []
    for _ in range(20):
        tokens = [[int(model.decode(tokens, cache).argmax())]]
        drawn += tokens[0]
    assert drawn == expected[3:] and len(set(drawn)) > 3


def test_torch_bfloat16_rounding():
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bfloat16(values), expected)


GEOMETRY = ["--layers=2", "--heads=2", "--channels=16", "--context=12", "--batch-size=2", "--seq-len=12"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question. " * 30)
    return path


def test_the_program_writes_what_pyllmc_reads(tmp_path, text, capsys):
    torch_reference.main([*GEOMETRY, f"--text={text}", "--steps=3", f"--output={tmp_path}", "--generate=5", "--clip=1"])
    printed = capsys.readouterr().out
    model = GPT2.from_checkpoint(tmp_path / "model.bin")
    state = modelfile.read_debug_state(tmp_path / "model_debug_state.bin", model.config)
    assert np.array_equal(model.flat_params, initial_parameters(model.config, seed=42))
    assert float(model.forward_backward(state.inputs, state.targets)) == pytest.approx(state.loss, abs=1e-5)
    assert np.abs(model.logits(state.inputs) - state.logits).max() <= 1e-5 * np.abs(state.logits).max()
    assert np.linalg.norm(model.flat_grads - state.grads) <= 1e-5 * np.linalg.norm(state.grads)
    first = re.search(r"step 1/3 \| loss (\S+) \| norm (\S+) ", printed)
    assert float(first[1]) == pytest.approx(state.losses[0], abs=2e-6)
    assert float(first[2]) == pytest.approx(state.norms[0], abs=2e-4)
    assert len(state.losses) == len(state.norms) == 10 and "mean of the last 2 steps" in printed
    assert modelfile.read_header(tmp_path / "model_bf16.bin").version == 5
    tokenizer = pyllmc.Tokenizer.load(tmp_path / "tokenizer.bin")
    assert tokenizer.decode(state.inputs[0]) == "To be, or no"


def verdict(capsys, folder, model, debug):
    code = cli.run_main(verify.main, [str(folder / model), str(folder / debug)])
    return code, capsys.readouterr().out.splitlines()[-1]


def test_verify_is_right_with_what_the_program_writes(tmp_path, text, capsys):
    torch_reference.main([*GEOMETRY, f"--text={text}", "--steps=0", f"--output={tmp_path}"])
    capsys.readouterr()
    assert verdict(capsys, tmp_path, "model.bin", "model_debug_state.bin") == (0, "right: all 38 agree")
    # The rounded weights are another model, and have another debug state.
    assert verdict(capsys, tmp_path, "model_bf16.bin", "model_debug_state.bin")[0] == 1
    rounded = tmp_path / "rounded"
    init = [f"--init={tmp_path / 'model_bf16.bin'}", "--batch-size=2", "--seq-len=12", f"--text={text}", "--steps=0"]
    torch_reference.main([*init, f"--output={rounded}"])
    capsys.readouterr()
    assert verdict(capsys, tmp_path, "model_bf16.bin", "rounded/model_debug_state.bin") == (0, "right: all 38 agree")
    with pytest.raises(ValueError, match="model_bf16.bin is in it and may be written over"):
        torch_reference.main([*init, f"--output={tmp_path}"])


def test_steps_of_the_debug_state_are_torchs(tmp_path):
    """Those of torch's own optimizer and clipping in float32, to the rounding that a few steps make of it."""
    config, _, _ = GEOMETRIES["odd"]
    flat, inputs, targets = start("odd")
    batch = torch.from_numpy(inputs), torch.from_numpy(targets)
    state = torch_reference.debug_state(config, flat, *batch)
    model = torch_reference.TorchGPT2(config, flat)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for loss, norm in zip(state.losses, state.norms, strict=True):
        optimizer.zero_grad()
        _, found = model(*batch)
        found.backward()
        assert found.item() == pytest.approx(loss, abs=1e-5)
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item() == pytest.approx(norm, rel=1e-4)
        optimizer.step()
    assert state.norms.max() > 1 and state.losses[-1] < state.losses[0] - 0.01


def test_names_of_the_files():
    """As llm.c's train_gpt2.py has them, but for sizes that it does not have."""
    d12, d48 = GPT2Config.from_descriptor("d12"), GPT2Config.from_descriptor("d48")
    small = GPT2Config(1, 1, 4, 50257, 1024)
    stems = [("d12", d12), ("gpt2:d48", d48), ("weights.bin", d12), ("weights.bin", d48), ("weights.bin", small)]
    names = [torch_reference.stem(init, config) for init, config in stems]
    assert names == ["gpt2_d12", "gpt2_d48", "gpt2_124M", "gpt2_1558M", "model"]
    assert torch_reference.stem(None, small) == "model"


def test_text_becomes_the_tokens_of_the_model(text, capsys):
    """GPT-2's for a model of its size, and those of a token file as they are."""
    args = torch_reference.parse_arguments(["--init=d6", f"--text={text}"])
    tokenizer = torch_reference.load_init(args.init)[2]
    tokens, _ = torch_reference.load_tokens(args, tokenizer)
    assert tokens[:4].tolist() == [2514, 307, 11, 393] and tokens.dtype == np.int32
    write_tokens(text.with_suffix(".bin"), tokens)
    args = torch_reference.parse_arguments([f"--tokens={text.with_suffix('.bin')}", *GEOMETRY])
    config, _, found, none = torch_reference.load(args)
    assert np.array_equal(found, tokens) and none is None and config.vocab_size == tokens.max() + 1
