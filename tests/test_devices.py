"""What computes: chosen, described, its memory; programs on a GPU, whose runs go on bit for bit."""

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
import shim

import pyllmc
from pyllmc import AdamW, checkpoint, cli, devices, evaluate, generate, needs, sharding, train, verify
from pyllmc.config import GPT2Config
from pyllmc.model import GPT2
from pyllmc.modelfile import DebugState, read_header, write_debug_state
from pyllmc.statefile import read_state
from pyllmc.tensors import ACTIVATION_GRADIENTS, ACTIVATIONS, ARENA_STEP

CONFIG = GPT2Config(num_layers=3, num_heads=2, channels=32, vocab_size=61, max_seq_len=24)
STEPS = 6
SMALL = [
    "--text", "notes.txt", "--layers", "2", "--heads", "2", "--channels", "16", "--context", "16", "--batch-size", "2",
    "--total-batch-size", "64", "--max-steps", str(STEPS), "--learning-rate", "1e-2", "--warmup", "2", "--val-every",
    "3", "--val-batches", "2", "--sample-every", "4", "--sample-length", "8", "--checkpoint-every", "3",
    "--keep-checkpoints", "0", "--threads", "1",
]  # fmt: skip
KEPT = ("main.log", f"DONE_{STEPS:08d}", f"model_{STEPS:08d}.bin", f"state_{STEPS:08d}_00000.bin")


def batch(seed=0, B=3, T=17):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (2, B, T), dtype=np.int32)


def run(out, *arguments):
    return cli.run_main(train.main, [*SMALL, "--out", out, "--device", "cuda", *arguments])


def forget(out, *steps):
    """As if the run had been killed before these checkpoints."""
    for step in steps:
        checkpoint.Checkpoint(Path(out), step).remove()


def content(out):
    return {name: Path(out, name).read_bytes() for name in KEPT}


# ---- what computes ---------------------------------------------------------------------------------------------------


def test_the_cpu_computes_in_float32_whatever_is_asked_for():
    for dtype in devices.DTYPES:
        assert devices.choose("cpu", dtype) is pyllmc.backend("cpu")
    cpu = pyllmc.backend("cpu")
    assert devices.arithmetic(cpu) == cpu.NAME and devices.float_bytes(cpu) == 4 and not devices.is_gpu(cpu)
    assert re.search(rf", \d+ threads?, {cpu.NAME}$", devices.describe(cpu))


def test_a_gpu_is_described_by_its_name_and_numbers(gpu):
    name = gpu.device()["name"]
    for dtype, size in (("bfloat16", 2), ("tf32", 4), ("float32", 4)):
        ops = devices.choose("cuda", dtype)
        assert devices.describe(ops) == f"{name}, {dtype}" and devices.arithmetic(ops) == f"cuda {dtype}"
        assert devices.float_bytes(ops) == size and devices.is_gpu(ops)
        assert gpu.product_options()["tf32"] is (dtype == "tf32") and not gpu.product_options()["autotune"]
    devices.choose("cuda", "bfloat16", autotune=True)
    assert gpu.product_options()["autotune"]


class Named:
    """An op set of a GPU with this name."""

    def __init__(self, name, dtype="bfloat16", tf32=False):
        self.DTYPE, self.name, self.tf32 = dtype, name, tf32

    def device(self):
        return {"name": self.name}

    def product_options(self):
        return {"tf32": self.tf32}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 5090", 209.5), ("NVIDIA B200", 2250), ("NVIDIA GB200", None), ("NVIDIA L40", None),
        ("Another GPU", None),
    ],
)  # fmt: skip
def test_peaks_are_those_of_the_data_sheets(name, tflops):
    peak = devices.peak_gflops(Named(name))
    assert peak == (None if tflops is None else 1000 * tflops)
    told = devices.describe_peak(Named(name), peak)
    assert told == (
        "peak n/a (not in the table)" if peak is None else f"peak {tflops:.0f} TFLOP/s (bfloat16, data sheet)"
    )


def test_each_kind_of_number_has_its_peak():
    assert devices.peak_gflops(Named("NVIDIA H200", "float32", tf32=True)) == 494_000
    assert devices.peak_gflops(Named("NVIDIA H200", "float32")) == 67_000


# ---- no GPU ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine():
    """The machine that the stand-in's driver tells of."""
    if shim.compiler() is None:
        pytest.skip("no C++ compiler")
    machine = shim.Gpu()
    yield machine
    machine.reset()


@pytest.mark.parametrize(
    ("like", "reason"),
    [
        ({"driver": 0, "count": 0}, "no NVIDIA driver was found"),
        ({"driver": 12020}, "the NVIDIA driver is too old: it serves CUDA 12.2, this build needs 13.0"),
        ({"count": 0}, "the NVIDIA driver sees no GPU"),
        ({"capability": 7}, "no GPU: its kernels as plain C++ (compute capability 7.0) has no bfloat16: compute "
         "capability 8.0 or newer is needed"),
    ],
    ids=["no driver", "old driver", "no GPU", "old GPU"],
)  # fmt: skip
def test_a_gpu_that_cannot_compute_is_told_in_one_line(machine, in_folder_with_text, monkeypatch, capsys, like, reason):
    from pyllmc import _cuda

    machine.is_like(**like)
    monkeypatch.setattr(_cuda, "REASON", shim.load().why_unavailable())
    monkeypatch.setattr(_cuda, "AVAILABLE", not _cuda.REASON)
    GPT2(CONFIG).save("m.bin")
    Path("d.bin").touch()
    for program, arguments in (
        (train, SMALL), (generate, ["--checkpoint", "m.bin"]), (evaluate, ["m.bin", "--val", "m.bin"]),
        (verify, ["m.bin", "d.bin"]),
    ):  # fmt: skip
        assert cli.run_main(program.main, [*arguments, "--device", "cuda"]) == 1
        assert capsys.readouterr().err == f"error: the CUDA backend is not available: {reason}\n"
    assert not Path("out").exists()


# ---- programs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", devices.DTYPES)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(gpu, in_folder_with_text, dtype, capsys):
    assert run("whole", "--dtype", dtype) == 0
    plan, _, lines = capsys.readouterr().out.partition("\n\n")
    assert f"machine  {gpu.device()['name']}, {dtype}, peak" in plan and "resumed" not in plan
    assert "validation loss" in lines
    assert run("halted", "--dtype", dtype) == 0
    forget("halted", STEPS)
    gpu.use_algorithms(None)
    capsys.readouterr()
    assert cli.run_main(train.main, ["--out", "halted", "--resume"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"resumed +3 steps are done", out) and err == ""
    assert content("halted") == content("whole")


def test_a_run_in_bfloat16_keeps_masters(gpu, in_folder_with_text):
    assert run("notes") == 0
    saved = checkpoint.Checkpoint(Path("notes"), STEPS)
    header = read_header(saved.model_path)
    state = read_state([saved.state_path()], header.config)
    assert (header.version, header.dtype) == (5, "bfloat16")
    params = GPT2.from_checkpoint(saved.model_path).flat_params
    error = np.abs(params - state.masters)
    assert error.any() and (error <= 2.0**-7 * np.abs(state.masters)).all()
    assert run("exact", "--dtype", "float32") == 0
    saved = checkpoint.Checkpoint(Path("exact"), STEPS)
    assert read_header(saved.model_path).version == 3
    assert read_state([saved.state_path()], header.config).masters is None


def test_algorithms_are_recorded_and_used_again(in_folder_with_text, gpu, monkeypatch):
    """On a machine that would choose others now."""
    if not hasattr(ctypes.CDLL(gpu.__file__), "shim_cublaslt_slow"):
        pytest.skip("only the stand-in can be made slow")
    slow = ctypes.CDLL(gpu.__file__).shim_cublaslt_slow
    # One sum of many terms, so that algorithms differ in their bits.
    wide = [
        "--channels",
        "64",
        "--max-steps",
        "2",
        "--checkpoint-every",
        "1",
        "--sample-every",
        "0",
        "--dtype",
        "float32",
    ]
    try:
        slow(0b0111)
        assert run("whole", *wide) == 0 and run("halted", *wide) == 0
        products = checkpoint.find_latest("whole").extra["algorithms"]["products"]
        assert {digits[32:48] for digits in products.values()} == {f"{3:016x}"}
        for again in (True, False):
            forget("halted", 2)
            gpu.use_algorithms(None)
            slow(0b1000)
            if not again:
                monkeypatch.setattr("pyllmc.provenance.use_products", lambda *arguments: None)
            assert cli.run_main(train.main, ["--out", "halted", "--resume"]) == 0
            same = [Path(out, "model_00000002.bin").read_bytes() for out in ("whole", "halted")]
            assert (same[0] == same[1]) is again
    finally:
        slow(0)


@pytest.mark.parametrize(("first", "then"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_may_go_on_on_another_device(gpu, in_folder_with_text, capsys, first, then):
    assert run("notes", "--device", first) == 0
    forget("notes", STEPS)
    before = Path("notes/main.log").read_text()
    capsys.readouterr()
    assert cli.run_main(train.main, ["--out", "notes", "--resume", "--device", then]) == 0
    assert re.fullmatch(
        r"notes/DONE_00000003: was computed with isa [\w ]+, now [\w ]+: what follows may differ from it in rounding\n",
        capsys.readouterr().err,
    )
    after = Path("notes/main.log").read_text()
    losses = [[float(loss) for loss in re.findall(r"trl:(\S+)", text)] for text in (before, after)]
    np.testing.assert_allclose(*losses, atol=0.03)
    assert read_header("notes/model_00000006.bin").dtype == ("float32" if then == "cpu" else "bfloat16")


def test_other_algorithms_are_told(gpu, in_folder_with_text, capsys):
    assert run("notes") == 0
    forget("notes", STEPS)
    done = Path("notes/DONE_00000003")
    done.write_text(done.read_text().replace(gpu.algorithms()["library"], "cuBLASLt 12.4.0"))
    capsys.readouterr()
    assert cli.run_main(train.main, ["--out", "notes", "--resume"]) == 0
    told = r"notes/DONE_00000003: what follows may differ in rounding: use_algorithms: .* library cuBLASLt 12.4.0, .*\n"
    assert re.fullmatch(told, capsys.readouterr().err)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_generate_and_evaluate(gpu, in_folder_with_text, capsys, dtype):
    assert run("notes", "--dtype", dtype) == 0
    capsys.readouterr()
    texts, losses = [], []
    for device in ("cuda", "cpu"):
        where = ["--device", device, "--dtype", dtype]
        options = ["--checkpoint", "notes", "--max-new-tokens", "20", "--prompt", "1", "--num-samples", "2"]
        assert cli.run_main(generate.main, [*options, "--temperature", "0", *where]) == 0
        texts.append(capsys.readouterr().out)
        assert cli.run_main(evaluate.main, ["notes", "--val", "notes/val.bin", *where]) == 0
        losses.append(float(re.search(r"validation loss (\S+)", capsys.readouterr().out)[1]))
    assert min(map(len, texts)) > 40
    assert losses[0] == pytest.approx(losses[1], abs=0.01 if dtype == "bfloat16" else 1e-4)


def test_verify_holds_float32_against_a_reference(gpu, tmp_path, capsys):
    model, (inputs, targets) = GPT2(CONFIG, seed=5), batch(B=2, T=16)
    model.save(tmp_path / "model.bin")
    logits, loss = model.logits(inputs), float(model.forward_backward(inputs, targets))
    state = DebugState(inputs, targets, np.ascontiguousarray(logits), loss, model.flat_grads.copy())
    write_debug_state(tmp_path / "debug.bin", CONFIG, state)
    paths = [str(tmp_path / "model.bin"), str(tmp_path / "debug.bin")]
    assert cli.run_main(verify.main, [*paths, "--device", "cuda"]) == 0
    out = capsys.readouterr().out
    assert f"computed on {gpu.device()['name']}, float32" in out and "right: all 18 agree" in out


# ---- the model -------------------------------------------------------------------------------------------------------


def test_models_are_made_for_a_device(gpu, tmp_path):
    model = GPT2(CONFIG, device="cuda")
    assert model.flat_params.dtype == "bfloat16"
    model.save(tmp_path / "model.bin")
    assert GPT2.from_checkpoint(tmp_path / "model.bin", device="cuda").flat_params.dtype == "bfloat16"
    assert GPT2.from_checkpoint(tmp_path / "model.bin", device="cpu").flat_params.dtype == np.float32
    assert GPT2(CONFIG, ops=pyllmc.backend("cuda", "float32")).flat_params.dtype == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_levels_of_recompute_give_the_same_bits(gpu, dtype):
    ops, results = devices.choose("cuda", dtype), []
    for level in (0, 1, 2):
        model = GPT2(CONFIG, recompute=level, ops=ops)
        optimizer = AdamW(model, weight_decay=0.1)
        losses = []
        for step in range(2):
            model.zero_grad()
            losses += [float(model.forward_backward(*batch(2 * step + i), loss_scale=0.5)) for i in range(2)]
            grads = ops.to_host(model.flat_grads).tobytes()
            optimizer.step(learning_rate=1e-2)
        results.append((losses, grads, ops.to_host(model.flat_params).tobytes()))
    assert results[1] == results[0] and results[2] == results[0]


def test_rounding_depends_on_the_seed_and_the_step_alone(gpu):
    def trained(seed, restore):
        model = GPT2(CONFIG, ops=devices.choose("cuda", "bfloat16"))
        optimizer = AdamW(model, learning_rate=1e-3, seed=seed)
        for step in range(2):
            model.zero_grad()
            model.forward_backward(*batch(step))
            optimizer.step()
            if restore:
                state = [gpu.to_host(x) for x in (optimizer.m, optimizer.v, optimizer.master)]
                optimizer = AdamW(model, learning_rate=1e-3, seed=seed)
                optimizer.load_state(step + 1, *state)
        return gpu.to_host(model.flat_params).tobytes(), gpu.to_host(optimizer.master).tobytes()

    assert trained(1, False) == trained(1, True)
    assert trained(1, False)[0] != trained(2, False)[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_parts_of_all_ranks_make_one_update(gpu, dtype):
    """The rounding to bfloat16 too, with what an optimizer holds that took over the state of one before."""

    def trained(shard):
        model = GPT2(CONFIG, ops=devices.choose("cuda", dtype))
        told = []
        model.forward_backward(*batch(), ready=told.extend)
        assert sum(block.size for block in told) == CONFIG.num_parameters_padded
        state = []
        for step in range(2):
            optimizer = AdamW(model, learning_rate=1e-2, weight_decay=0.1, shard=shard)
            if state:
                optimizer.load_state(step, *state)
            optimizer.step()
            state = [gpu.to_host(x) for x in (optimizer.m, optimizer.v, optimizer.master) if x is not None]
        return gpu.to_host(model.flat_params), state

    params, state = trained(sharding.EVERYTHING)
    before = gpu.to_host(GPT2(CONFIG, ops=devices.choose("cuda", dtype)).flat_params)
    assert len(state) == (3 if dtype == "bfloat16" else 2)
    for rank in range(3):
        rows = sharding.parts_table(CONFIG, rank, 3).tolist()
        own = np.concatenate([np.arange(start, stop) for start, stop, *_ in rows])
        expected = before.copy()
        expected[own] = params[own]
        found, parts = trained((rank, 3))
        assert np.array_equal(found, expected)
        for part, whole in zip(parts, state, strict=True):
            assert np.array_equal(part, whole[own])


def test_bytes_are_what_is_allocated(gpu, monkeypatch):
    for dtype, level in (("bfloat16", 0), ("bfloat16", 2), ("float32", 1)):
        ops = devices.choose("cuda", dtype)
        model = GPT2(CONFIG, recompute=level, ops=ops)
        expected = CONFIG.activation_bytes(3, 17, recompute=level, float_bytes=devices.float_bytes(ops))
        sizes = []

        def empty(shape, kind=None, make=ops.empty, sizes=sizes):
            sizes.append(make(shape, kind).nbytes)
            return make(shape, kind)

        with monkeypatch.context() as patch:
            patch.setattr(ops, "empty", empty)
            model.forward_backward(*batch())
        # Arrays of such odd sizes have gaps between them.
        assert 0 <= sum(sizes) - expected < len(ACTIVATIONS | ACTIVATION_GRADIENTS) * 4 * ARENA_STEP
        optimizer = AdamW(model)
        arrays = [model.flat_params, model.flat_grads, optimizer.m, optimizer.v, optimizer.master]
        held = sum(array.nbytes for array in arrays if array is not None)
        assert CONFIG.training_bytes(3, 17, level, devices.float_bytes(ops)) == held + expected


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(gpu, monkeypatch, request):
    """The stand-in, whose free memory can be set; where there is a GPU it need not be compiled."""
    if not hasattr(ctypes.CDLL(gpu.__file__), "shim_free_memory"):
        pytest.skip("only the stand-in's memory can be set")
    machine = request.getfixturevalue("machine")
    monkeypatch.setattr("pyllmc.hardware.SMALL_BYTES", 0)
    monkeypatch.setattr(devices, "scratch_bytes", lambda *sizes: 0)
    return machine


def free(gpu):
    """Bytes that the next arrays can take, with what the backend keeps for them."""
    return gpu.device()["free"] + gpu.device()["cached"]


@pytest.mark.parametrize("channels", [32, 36])
def test_a_step_takes_no_more_scratch_than_is_said(gpu, monkeypatch, channels):
    """Of the gpu's cache all is scratch, but for the batch, after a step of a new model."""
    config = GPT2Config(num_layers=2, num_heads=2, channels=channels, vocab_size=61, max_seq_len=150)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 3, 150), dtype=np.int32)
    for dtype in ("bfloat16", "float32"):
        ops = devices.choose("cuda", dtype)
        monkeypatch.setattr(devices, "_ROUNDING_BYTES", 64 << 10)
        for logits_bytes in (20 * 128 * 4, 450 * 128 * 4):  # the head in pieces, and all at once
            ops.product_options(logits_bytes=logits_bytes)
            gpu.release_cache()
            model = GPT2(config, ops=ops)
            gpu.release_cache()
            model.forward_backward(*tokens)
            held = gpu.device()["cached"]
            assert 0 < held < devices.scratch_bytes(ops, config, 3, 150), (dtype, logits_bytes)
            del model


def test_too_large_a_batch_is_told_before_anything_is_allocated(stand_in, gpu):
    model = GPT2(CONFIG, device="cuda")
    model.forward_backward(*batch(B=2))
    model._training = None
    stand_in.has_free(1 << 20)
    size = CONFIG.activation_bytes(1, 17, float_bytes=2)
    there = free(gpu)
    B = 2 * (there // size) + 2
    told = rf"training on a batch of {B} x 17 tokens needs \S+ \wB, \S+ \wB is free on the GPU; a batch of (\d+) x 17 "
    with pytest.raises(MemoryError, match=told) as caught:
        model.forward_backward(*batch(B=B))
    fitting = int(re.search(told, str(caught.value))[1])
    assert 0.9 * there < fitting * size <= there and model._training is None
    model.zero_grad()
    assert np.isfinite(float(model.forward_backward(*batch(B=2))))


def test_too_little_in_the_midst_of_a_step_is_told_too(stand_in, gpu, monkeypatch):
    """As where another process takes what was free: training goes on with a smaller batch."""
    model = GPT2(CONFIG, device="cuda")
    backward = GPT2._backward

    def failing(self, tokens, *others):
        if tokens.shape[0] == 3:
            gpu.empty((1 << 50,))
        backward(self, tokens, *others)

    monkeypatch.setattr(GPT2, "_backward", failing)
    told = r"out of GPU memory: \S+ MiB were asked for, \S+ MiB of \S+ MiB are free; a batch of 2 x 17 would fit"
    with pytest.raises(MemoryError, match=told):
        model.forward_backward(*batch(B=3))
    assert model._training is None
    assert np.isfinite(float(model.forward_backward(*batch(B=2))))


def test_a_run_that_does_not_fit_is_refused_with_the_batch_that_does(stand_in, in_folder_with_text, gpu, capsys):
    stand_in.has_free(1 << 20)
    config, there = GPT2Config(2, 2, 16, 2, 16), free(gpu)
    B = 2 * (there // config.activation_bytes(1, 16, recompute=1, float_bytes=2))
    assert run("notes", "--batch-size", str(B), "--total-batch-size", "0") == 1
    told = r"error: training this model needs \S+ \wB of memory, \S+ \wB is free on the GPU; .*--batch-size (\d+) .*\n"
    fitting = int(re.fullmatch(told, capsys.readouterr().err)[1])
    assert 0.75 * there < config.training_bytes(fitting, 16, 1, 2) <= (1 - needs.MARGIN) * there
    assert not Path("notes").exists()
