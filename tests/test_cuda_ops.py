"""The kernels of the CUDA backend against the float64 reference, in float32 and bfloat16, wherever arrays start.

`device` is each device backend that this machine can run (conftest.py): the kernels compiled as plain C++ and, with a
GPU, the real ones. What they share with the CPU's, tests/test_ops.py holds.
"""

import cases
import compare
import numpy as np
import pytest
import reference
from on_device import OnDevice

from pyllmc import _cuda

HALF_ULP = 2.0**-8  # of bfloat16, relative: an output is rounded once


def of_normalised_sum(expected, inputs):
    """The sum with the residual stream is stored, so it is rounded before it is normalised."""
    if inputs.get("residual") is None:
        return 0.0
    x = inputs["inp"] + inputs["residual"]
    spread = np.abs(x).max(axis=-1, keepdims=True) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    return HALF_ULP * spread * (1 + np.abs(inputs["weight"]))


def stochastic(expected, inputs):
    """Rounded up or down, so by up to a whole unit in the last place."""
    return HALF_ULP * np.abs(expected)


def of_rounded_pre_gelu(expected, inputs):
    """GELU, whose slope is at most 1.13, is taken of what is stored."""
    if not inputs.get("gelu"):
        return 0.0
    pre_gelu = inputs["inp"] @ inputs["weight"].T + (0.0 if inputs.get("bias") is None else inputs["bias"])
    return 1.13 * HALF_ULP * np.abs(pre_gelu)


def of_rounded_product(expected, inputs):
    """Where the slope of GELU is not the library's, it multiplies what is stored; the library's may take the GPU's own
    tanh, which is right to 2^-11, and then errs by up to 0.0032."""
    if inputs.get("pre_gelu") is None:
        return 0.0
    return HALF_ULP * (np.abs(expected) + np.abs(inputs["dout"] @ inputs["weight"]))


def of_rounded_sums(expected, inputs):
    """The library's sums of dout are rounded before they are added to those of before."""
    return HALF_ULP * np.abs(inputs["dout"].reshape(-1, inputs["dout"].shape[-1]).sum(axis=0))


def of_rounded_logits(expected, inputs):
    """A loss moves at most twice as far as the logits."""
    return 2 * HALF_ULP * np.abs(inputs["inp"] @ inputs["weight"].T).max(axis=-1)


def of_rounded_dlogits(expected, inputs):
    """The logits are rounded, which moves their gradient by a part of it, and that is rounded too."""
    logits = np.abs(inputs["inp"] @ inputs["weight"].T).max()
    return 2 * HALF_ULP * (1 + 2 * logits) * np.abs(expected).max()


def of_rounded_probabilities(expected, inputs):
    """The tensor cores take the probabilities rounded: every term of a sum may be off."""
    values = np.abs(inputs["qkv"][..., -expected.shape[-1] :])
    qkv = np.concatenate([inputs["qkv"][..., : -expected.shape[-1]], values], axis=-1)
    if "position" in inputs:
        caches = inputs["key_cache"].copy(), np.abs(inputs["value_cache"])
        return HALF_ULP * reference.attention_decode(qkv, *caches, inputs["position"])
    return HALF_ULP * reference.attention_forward(qkv, inputs["num_heads"])[0]


def of_rounded_scores(expected, inputs):
    """So it is with the probabilities for dV, and with dS for dQ and dK."""
    B, T, C = inputs["dout"].shape
    NH = inputs["lse"].shape[1]
    dout, out, *qkv = (
        x.astype(np.float64).reshape(B, T, NH, -1).transpose(0, 2, 1, 3)
        for x in (inputs["dout"], inputs["out"], *np.split(inputs["qkv"], 3, axis=-1))
    )
    query, key, value = qkv
    scale = query.shape[-1] ** -0.5
    att = np.tril(np.exp(np.tril(query @ key.swapaxes(-1, -2)) * scale - inputs["lse"][..., None]))
    dscores = np.abs(att * (dout @ value.swapaxes(-1, -2) - (dout * out).sum(axis=-1, keepdims=True))) * scale
    terms = dscores @ np.abs(key), dscores.swapaxes(-1, -2) @ np.abs(query), att.swapaxes(-1, -2) @ np.abs(dout)
    return HALF_ULP * np.concatenate([x.transpose(0, 2, 1, 3).reshape(B, T, C) for x in terms], axis=-1)


# Where more than the output is rounded to bfloat16: (op, output) -> the further error allowed, per element.
MORE = {
    ("layernorm_forward", "out"): of_normalised_sum,
    ("layernorm_forward", "mean"): lambda expected, inputs: HALF_ULP * np.abs(inputs["inp"]).max(),
    ("layernorm_forward", "rstd"): lambda expected, inputs: HALF_ULP * np.abs(expected),
    ("attention_forward", "out"): of_rounded_probabilities,
    ("attention_backward", "dqkv"): of_rounded_scores,
    ("attention_decode", "out"): of_rounded_probabilities,
    ("adamw_update", "param"): stochastic,
    ("matmul_forward", "out"): of_rounded_pre_gelu,
    ("matmul_backward", "dinp"): of_rounded_product,
    ("matmul_backward", "dbias"): of_rounded_sums,
    ("classifier_forward", "losses"): of_rounded_logits,
    ("classifier_forward_backward", "losses"): of_rounded_logits,
    ("classifier_forward_backward", "dinp"): of_rounded_dlogits,
    ("classifier_forward_backward", "dweight"): of_rounded_dlogits,
}


def some(op, count=4):
    table = cases.CASES[op]
    return table[:: max(1, len(table) // count)] + table[-1:]


def bf16(array):
    """float32 rounded to the nearest bfloat16."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32).reshape(np.shape(array))


def check(device, case, seed=0, accumulate=False):
    """As compare.check, for a device: what the device rounds on the way in, the reference gets rounded."""
    call = cases.make(case, seed)
    low = device.dtype == "bfloat16"
    for name, value in call.arrays.items():
        if low and device.element_type(case.op, name, value) == "bfloat16":
            call.inputs[name] = bf16(value)
    gradients = cases.PARAMETER_GRADIENTS & call.outputs.keys() if accumulate else ()
    rng = np.random.default_rng(seed)
    prior = {name: np.asarray(rng.standard_normal(call.outputs[name]), np.float32) for name in sorted(gradients)}
    if low:
        prior = {name: bf16(value) for name, value in prior.items()}
    expected, bounds = compare.expected_results(call, prior if accumulate else None)
    outputs = {n: prior[n].copy() if n in prior else np.full(s, np.nan, np.float32) for n, s in call.outputs.items()}
    options = {"accumulate": True} if accumulate else {}
    results = compare.run(device, call, **outputs, **options)
    for name, value in expected.items():
        bound, nmse = bounds[name], compare.MAX_NMSE
        array = results[name]
        if low and device.element_type(case.op, name, array) == "bfloat16":
            bound, nmse = 1.01 * bound + 1.01 * HALF_ULP * np.abs(value), HALF_ULP**2
        if low and (case.op, name) in MORE:
            bound, nmse = bound + MORE[case.op, name](value, call.inputs), 4 * HALF_ULP**2
        compare.assert_close(f"{case}: {name}", array, value, bound, nmse)


def parametrize(pick, ops=cases.CASES):
    return pytest.mark.parametrize("case", [case for op in ops for case in pick(op)], ids=str)


@pytest.fixture
def on_device(device):
    return lambda *arguments: OnDevice(device, *arguments)


def test_a_gpu_is_among_the_devices():
    """That there is none is told here, once, and not of every case."""
    if not _cuda.AVAILABLE:
        pytest.skip(_cuda.REASON)


@parametrize(cases.CASES.get)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matches_reference(on_device, case, dtype):
    check(on_device(dtype), case)


@parametrize(some)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matches_reference_at_any_address(on_device, case, dtype):
    check(on_device(dtype, 1), case, seed=1)


@parametrize(some, [op for op in cases.CASES if compare.takes_accumulate(op)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_accumulates(on_device, case, dtype):
    check(on_device(dtype), case, seed=1, accumulate=True)


# ---- sizes that only a GPU has ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 3, "T": 1500, "C": 8, "V": 70_001, "maxT": 1500},  # three digits of the sort, several of its tiles
        {"B": 5, "T": 1000, "C": 16, "V": 3, "maxT": 1001},  # tokens whose rows go over very many pieces
    ],
    ids=["many tokens", "few tokens"],
)
def test_embedding_gradient_of_many_rows(device, dtype, sizes):
    check(OnDevice(device, dtype), cases.Case("encoder_backward", tuple(sizes.items())))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [{"leading": (2300,), "C": 8}, {"leading": (3,), "C": 8192}], ids=str)
def test_layernorm_backward_of_many_rows_and_of_long_ones(device, dtype, sizes):
    check(OnDevice(device, dtype), cases.Case("layernorm_backward", tuple(sizes.items())))
    check(OnDevice(device, dtype), cases.Case("layernorm_forward", tuple(sizes.items())))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("V", [1, 13])
def test_logits_that_are_all_infinite_have_no_loss(device, dtype, V):
    """What fills the last vector of a row is none of them."""
    inp, weight = np.full((2, 8), 10, np.float32), np.full((16, 8), -1e38, np.float32)
    losses = np.zeros(2, np.float32)
    OnDevice(device, dtype).classifier_forward(inp, weight, np.zeros(2, np.int32), vocab_size=V, losses=losses)
    assert np.isnan(losses).all()


# ---- stochastic rounding ---------------------------------------------------------------------------------------------

STILL = {"learning_rate": 0.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "step": 1}


def rounded(device, values, seed, shift=0):
    """What an update that changes nothing leaves in bfloat16 parameters whose masters are `values`."""
    array = OnDevice(device, "bfloat16", shift)
    param, zero = np.zeros_like(values), np.zeros_like(values)
    array.adamw_update(param, zero, zero.copy(), zero.copy(), master=values.copy(), seed=seed, **STILL)
    return param


def test_rounding_is_up_or_down_and_right_on_average(device):
    step = 2.0**-7
    for fraction in (0.0, 0.1, 0.5, 0.9):
        values = np.full(40_000, 1 + fraction * step, np.float32)
        result = rounded(device, values, seed=7)
        assert set(np.unique(result)) <= {1.0, 1 + step}
        assert abs((result > 1).mean() - fraction) < 0.01
        assert abs((rounded(device, -values, seed=8) < -1).mean() - fraction) < 0.01


def test_the_noise_belongs_to_seed_and_element(device):
    values = np.random.default_rng(0).standard_normal(5003, dtype=np.float32)
    first = rounded(device, values, seed=1)
    np.testing.assert_array_equal(first, rounded(device, values, seed=1, shift=1))  # another kernel, the same bits
    np.testing.assert_array_equal(first[:100], rounded(device, values[:100], seed=1))
    for other in (2, 1 << 40, -1):
        differing = (first != rounded(device, values, seed=other)).mean()
        assert 0.2 < differing < 0.5  # 1/3 where both are random
    same = rounded(device, np.full(4096, 1 + 2.0**-8, np.float32), seed=3) > 1
    for lag in (1, 2, 8, 256):
        assert abs((same[lag:] == same[:-lag]).mean() - 0.5) < 0.04, f"elements {lag} apart are rounded alike"


def test_zero_and_nan_stay_so(device):
    values = np.array([np.nan, 0.0, -0.0, 1.0], np.float32)
    np.testing.assert_array_equal(rounded(device, values, seed=5), values)
