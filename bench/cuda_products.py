"""python bench/cuda_products.py: the matrix products of a training step on the GPU, each for itself.

A line for each linear layer of the model and for its head: microseconds with the library's first algorithm and with
the fastest of those that were timed, and the rate of the latter. What the library does besides the product stands
beside the product without it, and the head is there with chunks of several sizes: these decide the rules in matmul.cu
and classifier.cu. Calls pyllmc's CUDA backend.
"""

import argparse
import json
import time

import numpy as np

from pyllmc import backend
from pyllmc.config import GPT2Config

MIB = 1 << 20


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="d12", help="a descriptor such as d12 or d48 (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="sequences (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each measurement (default: %(default)s)")
    parser.add_argument("--json", help="a file for the results")
    return parser.parse_args()


def linear_layers(ops, rows, C, new):
    """(name, floating-point operations, the call) of each product of a block, as the model makes them."""
    for name, channels, outputs in (("qkv", C, 3 * C), ("attproj", C, C), ("fc", C, 4 * C), ("fcproj", 4 * C, C)):
        flops = 2 * rows * channels * outputs
        inp, dout, out = new(rows, channels), new(rows, outputs), ops.empty((rows, outputs))
        weight, bias = new(outputs, channels), new(outputs)
        if name == "fc":
            pre_gelu = ops.empty((rows, outputs))

            def in_kernels(inp=inp, weight=weight, bias=bias, out=out, pre_gelu=pre_gelu):
                ops.matmul_forward(inp, weight, bias, out=pre_gelu)
                ops.gelu_forward(pre_gelu, out=out)

            options = {"gelu": True, "pre_gelu": pre_gelu, "out": out}
            yield "fc forward, GELU", flops, lambda a=(inp, weight, bias), o=options: ops.matmul_forward(*a, **o)
            yield "fc forward, then a kernel for GELU", flops, in_kernels
        else:
            options = {"out": out} if name == "qkv" else {"out": out, "residual": dout}
            yield f"{name} forward", flops, lambda a=(inp, weight, bias), o=options: ops.matmul_forward(*a, **o)
        gradients = {"dinp": ops.empty((rows, channels)), "dweight": ops.empty((outputs, channels))}
        dbias = {"dbias": ops.empty((outputs,))}
        given = (dout, inp, weight)
        if name == "fcproj":
            gradients["pre_gelu"] = inp
        with_bias = gradients | dbias
        yield f"{name} backward", 2 * flops, lambda a=given, o=with_bias: ops.matmul_backward(*a, **o)
        adding = with_bias | {"accumulate": True}
        yield f"{name} backward, adding", 2 * flops, lambda a=given, o=adding: ops.matmul_backward(*a, **o)
        without = gradients | {"bias": False}
        yield f"{name} backward, no bias", 2 * flops, lambda a=given, o=without: ops.matmul_backward(*a, **o)


def head(ops, rows, C, V, Vp, new):
    """The classifier, for chunks of several sizes."""
    inp, weight = new(rows, C), new(Vp, C)
    targets = ops.from_host(np.arange(rows, dtype=np.int32) % V)
    outputs = {"losses": ops.empty((rows,), "float32"), "dinp": ops.empty((rows, C)), "dweight": ops.empty((Vp, C))}
    for mebibytes in (128, 256, 512, 1024):

        def call(logits_bytes=mebibytes * MIB):
            ops.product_options(logits_bytes=logits_bytes)
            ops.classifier_forward_backward(inp, weight, targets, vocab_size=V, **outputs)

        yield f"head, {mebibytes} MiB of logits", 6 * rows * C * Vp, call


def microseconds(ops, call, seconds):
    """Of one call; the best of three rounds."""
    call()
    ops.synchronize()
    best, runs = float("inf"), 1
    for _ in range(3):
        while True:
            start = time.perf_counter()
            for _ in range(runs):
                call()
            ops.synchronize()
            elapsed = time.perf_counter() - start
            if elapsed >= seconds / 3:
                break
            runs = max(runs + 1, int(runs * seconds / 2 / max(elapsed, 1e-6)))
        best = min(best, elapsed / runs)
    return 1e6 * best


def measure(ops, config, batch, context, seconds):
    """[{"name", "first", "fastest", "tflops"}], printed as they come."""
    numbers = np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32)

    def new(*shape):
        return ops.from_host(0.1 * np.resize(numbers, shape))

    rows, results = batch * context, []
    before = ops.product_options()
    print(f"{'':36}{'first':>12}{'fastest':>12}  TFLOP/s")
    parts = (
        linear_layers(ops, rows, config.channels, new),
        head(ops, rows, config.channels, config.vocab_size, config.padded_vocab_size, new),
    )
    for part in parts:
        for name, flops, call in part:
            times = []
            for autotune in (False, True):
                ops.use_algorithms(None)
                ops.product_options(autotune=autotune)
                times.append(microseconds(ops, call, seconds))
            results.append({"name": name, "first": times[0], "fastest": times[1], "tflops": flops / times[1] / 1e6})
            print(f"{name:36}{times[0]:9.1f} us{times[1]:9.1f} us{results[-1]['tflops']:9.1f}", flush=True)
    ops.product_options(**before)
    ops.use_algorithms(None)
    return results


def main():
    options = arguments()
    ops = backend("cuda")
    config = GPT2Config.from_descriptor(options.model)
    results = measure(ops, config, options.batch, options.context, options.seconds)
    if options.json:
        report = {"device": ops.device()["name"], "model": options.model, "rows": options.batch * options.context}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report | {"products": results}, file, indent=1)


if __name__ == "__main__":
    main()
