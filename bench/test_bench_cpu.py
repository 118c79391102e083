"""pytest-benchmark of each op of a training step, and of the whole step, on the CPU backend.

    python -m pytest bench --benchmark-json=now.json        GPT-2 124M, B=4 T=64
    python -m pytest bench --batch 1 --context 1024

Each result carries GFLOP/s and GB/s of its best round in extra_info. Figures mean something only beside the peak in
the JSON's machine_info, on a machine where nothing else runs.
"""

import cases
import numpy as np
import pytest

from pyllmc import GPT2, AdamW, GPT2Config, backend


def test_op(benchmark, case):
    """One call with its outputs given, as the model makes it."""
    cpu = backend("cpu")
    call = cases.make(case)
    op = getattr(cpu, call.op)
    outputs = {name: cpu.empty(shape) for name, shape in call.outputs.items()}
    benchmark.group = call.op
    benchmark(op, **call.inputs, **outputs)
    report(benchmark, call.flops, call.bytes)


@pytest.mark.parametrize("what", ["forward_backward", "step"])
def test_model(benchmark, what, request):
    """The whole model: forward and backward, and with AdamW. FLOPs are 6N + 6LCT for each token."""
    B, T = request.config.getoption("--batch"), request.config.getoption("--context")
    tiny = request.config.getoption("--model") == "tiny"
    config = GPT2Config(2, 4, 64, 97, 64) if tiny else GPT2Config.from_descriptor("d12")
    model = GPT2(config)
    optimizer = AdamW(model)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (B, T + 1), dtype=np.int32)
    inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])

    def step():
        loss = model.forward_backward(inputs, targets)
        if what == "step":
            optimizer.step()
        model.zero_grad()
        return float(loss)

    benchmark.group = "model"
    benchmark(step)
    report(benchmark, B * T * config.flops_per_token(T))


def report(benchmark, flops, num_bytes=None):
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.min
    benchmark.extra_info["gflops"] = flops / seconds / 1e9
    if num_bytes is not None:
        benchmark.extra_info["gbytes_per_second"] = num_bytes / seconds / 1e9
