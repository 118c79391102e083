"""recorder(): what a function enqueues is recorded once and replayed: the same bits as without, no memory of others
touched, and each call made as ever where nothing can be recorded."""

import gc
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import repeated
import shim

from pyllmc import AdamW, GPT2Config
from pyllmc.model import GPT2
from pyllmc.optimizer import grad_norm

CONFIG = GPT2Config(num_layers=2, num_heads=2, channels=32, vocab_size=61, max_seq_len=24)


@pytest.fixture
def made_gpu(device):
    """The GPU of the shim, whose driver and memory tests may change."""
    if not device.why_unavailable() and device.device()["name"].startswith("no GPU"):
        gpu = shim.Gpu(shim.backend_of(device))
        yield gpu
        gpu.reset()
    else:
        pytest.skip("only the shim's GPU can be changed")


class Doubling:
    """A function for a recorder: doubles its input through scratch memory, and counts how often it is called."""

    def __init__(self, device, shape=(3, 5)):
        self.ops, self.calls = device, 0
        self.weight = device.from_host(2 * np.eye(shape[1], dtype=np.float32))
        self.out = device.zeros(shape)

    def __call__(self, array, factor=1.0):
        self.calls += 1
        self.ops.matmul_forward(array, self.weight, residual=None, out=self.out)
        if factor != 1.0:
            self.out *= factor

    def check(self, run, value, expected_calls, **options):
        host = np.full(self.out.shape, value, np.float32)
        run(self, self.ops.from_host(host), **options)
        np.testing.assert_array_equal(self.ops.to_host(self.out), 2 * host * options.get("factor", 1.0))
        assert self.calls == expected_calls


def test_from_the_third_call_on_the_function_is_not_called(device):
    run, double = device.recorder(), Doubling(device)
    for value, calls in ((1, 1), (2, 2), (3, 2), (4, 2)):
        double.check(run, value, calls)
    # Another option, another size: again twice.
    for value, calls in ((5, 3), (6, 4), (7, 4)):
        double.check(run, value, calls, factor=3.0)
    double.check(run, 8, 4)
    double.out = device.zeros((4, 5))
    for value, calls in ((5, 5), (6, 6), (7, 6)):
        double.check(run, value, calls)


def test_what_decides_how_products_are_computed_is_recorded_anew(device):
    before = device.product_options()
    run, double = device.recorder(), Doubling(device)
    for calls in (1, 2, 2):
        double.check(run, calls, calls)
    device.product_options(tf32=not before["tf32"])
    for calls in (3, 4, 4):
        double.check(run, calls, calls)
    device.product_options(**before)
    double.check(run, 9, 4)
    device.use_algorithms(None)
    for calls in (5, 6, 6):
        double.check(run, calls, calls)


def test_arrays_that_come_later_do_not_lie_in_a_graph_s_memory(device):
    """Nor do those that are made while it is recorded."""
    run = device.recorder()
    inp, out = device.zeros((40, 64)), device.zeros((2, 20, 64))
    weights = [
        device.from_host(np.full((4096, 64), 1e-3, np.float32)),
        device.from_host(np.ones((64, 4096), np.float32)),
    ]

    def function(array):
        wide = device.matmul_forward(array, weights[0])
        device.matmul_forward(wide, weights[1], out=out.reshape(40, 64))

    for _ in range(2):
        run(function, inp)
    others = [device.from_host(np.full(40 * 4096 // n, n, np.float32)) for n in range(1, 9) for _ in range(4)]
    run(function, device.from_host(np.ones((40, 64), np.float32)))
    np.testing.assert_allclose(device.to_host(out), 4096 * 64 * 1e-3, rtol=1e-3)  # a sum of one sign, in any order
    for array in others:
        values = device.to_host(array)
        np.testing.assert_array_equal(values, values[0])


def test_after_its_memory_was_given_up_a_graph_is_recorded_again(device):
    run, double = device.recorder(), Doubling(device)
    for calls in (1, 2, 2):
        double.check(run, calls, calls)
    device.release_cache()
    for calls in (3, 4, 4):
        double.check(run, calls, calls)


def test_memory_that_graphs_hold_is_used_before_there_is_an_error(device, made_gpu):
    device.release_cache()
    run, calls = device.recorder(), []
    inp, weight = device.zeros((600, 8)), device.zeros((1024, 8))
    losses = device.zeros((600,))

    def function(targets):
        calls.append(1)
        device.classifier_forward(inp, weight, targets, losses=losses)  # 2.3 MiB of logits for a moment

    targets = device.from_host(np.zeros(600, np.int32))
    for _ in range(3):
        run(function, targets)
    assert len(calls) == 2
    made_gpu.has_free(0)
    array = device.empty((1 << 20,))  # 4 MiB, which are there if the graph goes
    with pytest.raises(MemoryError, match="out of GPU memory"):
        run(function, targets)
    assert len(calls) == 3
    del array
    for expected in (4, 5, 5):
        run(function, targets)
        assert len(calls) == expected
    np.testing.assert_allclose(device.to_host(losses), np.log(1024), rtol=1e-6)


@pytest.mark.parametrize("where", ["the driver has no graphs", "the function waits", "the function copies"])
def test_what_cannot_be_recorded_is_called_each_time(device, request, where):
    run, double = device.recorder(), Doubling(device)
    if where == "the driver has no graphs":
        gpu = request.getfixturevalue("made_gpu")
        gpu.has_graphs(False)

    def function(array):
        double(array)
        if where == "the function waits":
            device.synchronize()
        elif where == "the function copies":
            device.from_host(np.zeros(3, np.float32))

    calls = []
    for value in range(5):
        host = np.full(double.out.shape, value, np.float32)
        run(function, device.from_host(host))
        np.testing.assert_array_equal(device.to_host(double.out), 2 * host)
        calls.append(double.calls)
    assert np.diff(calls)[2:].tolist() == [1, 1], "recording is tried once"


def test_a_product_that_is_new_while_it_is_recorded_is_called_each_time(device):
    """The library tells no algorithms then."""
    run, double = device.recorder(), Doubling(device)

    def function(array):
        double(array)
        if double.calls > 1:
            device.matmul_forward(array, device.zeros((7, 5)))

    for value in range(5):
        host = np.full(double.out.shape, value, np.float32)
        run(function, device.from_host(host))
        np.testing.assert_array_equal(device.to_host(double.out), 2 * host)
    assert double.calls in (2, 6), "recorded, or tried once"


def test_an_error_of_the_function_is_raised_and_nothing_stays_recorded(device):
    run, double = device.recorder(), Doubling(device)

    def function(array):
        double(array)
        if double.calls > 1:
            raise KeyError("its own")

    run(function, device.zeros((3, 5)))
    for _ in range(2):
        with pytest.raises(KeyError, match="its own"):
            run(function, device.zeros((3, 5)))
    double.check(device.recorder(), 3, double.calls + 1)


def test_no_op_of_another_thread_gets_into_a_graph(device):
    run, double, told = device.recorder(), Doubling(device), []
    array = device.zeros((3, 5))

    def of_another_thread():
        for call in (device.gelu_forward, device.to_host, lambda array: device.from_host(np.ones((3, 5)), out=array)):
            try:
                call(array)
            except RuntimeError as error:
                told.append(str(error))

    def function(given):
        double(given)
        if double.calls == 2:
            thread = threading.Thread(target=of_another_thread)
            thread.start()
            thread.join()

    for value in range(4):
        host = np.full((3, 5), value, np.float32)
        run(function, device.from_host(host))
        np.testing.assert_array_equal(device.to_host(double.out), 2 * host)
    assert double.calls == 2 and len(told) == 3 and all("another thread is recording" in text for text in told)
    assert (device.to_host(array) == 0).all()


def batch(seed, B=3, T=17):
    inputs, targets = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (2, B, T), dtype=np.int32)
    targets[0, : seed + 1] = -1
    return inputs, targets


@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_trains_to_the_same_bits_with_graphs_and_without(device, monkeypatch, dtype, recompute):
    ops = device.op_set(dtype)
    results = []
    for recorded in (True, False):
        if not recorded:
            monkeypatch.setattr(
                ops, "recorder", lambda: lambda function, *arrays, **options: function(*arrays, **options)
            )
        model, losses = GPT2(CONFIG, ops=ops, recompute=recompute), []
        optimizer = AdamW(model, learning_rate=1e-3)
        for step in range(4):
            model.zero_grad()
            for i in range(3):
                losses.append(model.forward_backward(*batch(3 * step + i), loss_scale=1 / 3))
            if step == 1:  # a batch of another shape, and the evaluation of one of the same, do no harm
                model.loss(*batch(99, T=5))
                model.loss(*batch(99))
            optimizer.step()
        results.append([ops.to_host(model.flat_params).tobytes(), *map(float, losses)])
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "tf32", "float32"])
def test_a_training_step_is_recorded(device, monkeypatch, dtype):
    """Else it would only take longer, which nobody is told."""
    before = device.product_options()
    device.product_options(tf32=dtype == "tf32")
    ops, calls = device.op_set("bfloat16" if dtype == "bfloat16" else "float32"), []
    whole = ops.encoder_forward
    monkeypatch.setattr(ops, "encoder_forward", lambda *arrays, **named: calls.append(1) or whole(*arrays, **named))
    model = GPT2(GPT2Config(num_layers=1, num_heads=2, channels=128, vocab_size=61, max_seq_len=24), ops=ops)
    for seed in range(4):
        model.zero_grad()
        model.forward_backward(*batch(seed))
    device.product_options(**before)
    assert len(calls) == 2


def test_a_graph_goes_with_the_model(device):
    """No circle of references keeps a model's memory until Python looks for such. What the driver takes for kernels at
    their first launch, and for the first graph, stays."""
    gc.collect()  # what others left would go in between
    free = []
    for _ in range(3):
        model = GPT2(CONFIG, ops=device.op_set("bfloat16"))
        for seed in range(3):
            model.forward_backward(*batch(seed))
        del model
        device.release_cache()
        free.append(device.device()["free"])
    assert free[1] == free[2]


def test_a_training_step_waits_for_the_gpu_once(device, made_gpu):
    """For the norm; then the losses are there. What the host hands over, batches too, is enqueued."""
    model = GPT2(CONFIG, ops=device.op_set("bfloat16"))
    optimizer = AdamW(model, learning_rate=1e-3)
    for step in range(4):
        model.zero_grad()
        made_gpu.waits()
        for i in range(5):
            model.forward_backward(*batch(5 * step + i), loss_scale=0.2)
        assert step == 0 or made_gpu.waits() == 0
        norm = grad_norm(model)
        assert made_gpu.waits() == 1 or step == 0
        optimizer.step(grad_scale=1 / norm)
        assert made_gpu.waits() == 0


def test_what_is_repeated_on_a_gpu_runs(gpu, monkeypatch, capsys):
    sizes = {"B": 1, "T": 70, "num_heads": 2, "head_size": 16}
    settings = {"SIZES": [sizes], "TIMES": {"bfloat16": 2, "float32": 3}, "STEPS": 3, "CONFIG": CONFIG}
    for name, value in settings.items():
        monkeypatch.setattr(repeated, name, value)
    repeated.main()
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"2 times attention's backward in bfloat16, {sizes}" and told[1] == "3 training steps in bfloat16"
    assert told[4].startswith("the same bits: 5 times attention's backward in 1 sizes, 6 steps, on ")


def test_bits_that_differ_are_told(device):
    with pytest.raises(AssertionError, match="gradients differ the 2. time"):
        ops = device.op_set("float32")
        noisy = {"to_host": lambda array: ops.to_host(array) + np.random.default_rng().random(dtype=np.float32)}
        repeated.steps_again(SimpleNamespace(**vars(ops) | noisy), 2, CONFIG, B=1)
