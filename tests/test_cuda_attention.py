"""Attention on tensor cores: matrices in registers, every tail and head size, extreme scores, the same bits.

tests/test_cuda_ops.py and tests/test_cuda_kernels.py hold what it shares with other ops: the float64 reference, any
address, and that every barrier and every wait for a copy is needed. Against PyTorch: tests/parity/test_cuda_torch.py.
"""

import ctypes

import cases
import numpy as np
import pytest
import reference
import shim
from on_device import OnDevice
from test_cuda_ops import bf16, check

BF16 = "bfloat16"
ULP = 2.0**-8


# ---- mma.cuh, as plain C++ and as PTX, against the figures of the PTX ISA --------------------------------------------


@pytest.fixture(params=shim.BACKENDS, scope="module")
def fragments(request):
    """The functions of tests/cuda_shim/fragments.cu."""
    if reason := shim.missing(request.param):
        pytest.skip(reason)
    library = ctypes.CDLL(shim.load(request.param).__file__)
    library.sees_copies_early = request.param == "cuda_shim"  # of its PTX that is an error
    return library


def call(function, *arguments):
    function(*[x.ctypes.data_as(ctypes.c_void_p) if isinstance(x, np.ndarray) else x for x in arguments])


def bits(array):
    """The upper halves of float32 numbers: bfloat16."""
    return np.ascontiguousarray((array.view(np.uint32) >> 16).astype(np.uint16))


def test_a_product_is_spread_over_the_lanes_as_documented(fragments):
    rng = np.random.default_rng(0)
    a, b = bf16(rng.standard_normal((16, 16))), bf16(rng.standard_normal((16, 8)))
    before = rng.standard_normal((16, 8)).astype(np.float32)
    after = before.copy()
    call(fragments.fragments_multiply, bits(a), bits(b), after)
    np.testing.assert_allclose(after, before + a @ b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_into_the_lanes_as_documented(fragments, transposed):
    matrices = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    registers = np.zeros((32, 4, 2), np.uint16)
    call(fragments.fragments_load, matrices, registers, int(transposed))
    source = matrices.swapaxes(1, 2) if transposed else matrices
    # lane l of matrix i: row l / 4, elements 2 (l % 4) and the next
    np.testing.assert_array_equal(registers, source.reshape(4, 32, 2).swapaxes(0, 1))


def test_a_copy_ahead_is_there_when_it_was_waited_for_and_not_before(fragments):
    source, seen, arrived = np.arange(128, dtype=np.int32).reshape(32, 4), *np.zeros((2, 32, 4), np.int32)
    valid = np.arange(32, dtype=np.int32) % 3
    call(fragments.fragments_copy, source, valid, seen, arrived, int(fragments.sees_copies_early))
    assert (seen == (-1 if fragments.sees_copies_early else 0)).all()  # NaN
    np.testing.assert_array_equal(arrived, source * (valid[:, None] > 0))


# ---- shapes ----------------------------------------------------------------------------------------------------------


def case_of(op, **sizes):
    return cases.Case(op, tuple(sizes.items()))


@pytest.mark.parametrize("T", [1, 7, 63, 64, 65, 127, 129, 200])
@pytest.mark.parametrize("op", ["attention_forward", "attention_backward"])
def test_any_number_of_positions(device, op, T):
    check(OnDevice(device, BF16), case_of(op, B=1, T=T, NH=2, HS=64), seed=T)


@pytest.mark.parametrize("HS", [8, 16, 24, 32, 40, 48, 56, 72, 80, 96, 104, 120, 128, 136])
@pytest.mark.parametrize("op", ["attention_forward", "attention_backward"])
def test_any_head_size(device, op, HS):
    check(OnDevice(device, BF16), case_of(op, B=1, T=70, NH=2, HS=HS), seed=HS)


@pytest.mark.parametrize("dtype", ["float32", BF16])
@pytest.mark.parametrize("op", ["attention_forward", "attention_backward"])
def test_a_head_that_is_larger_than_a_tile(device, op, dtype):
    check(OnDevice(device, dtype), case_of(op, B=1, T=35, NH=1, HS=300))


@pytest.mark.parametrize("dtype", ["float32", BF16])
@pytest.mark.parametrize("n", [1, 9])
def test_a_cache_that_is_longer_than_what_is_scored_at_once(device, dtype, n):
    check(OnDevice(device, dtype), case_of("attention_decode", B=1, n=n, position=1500, maxT=1600, NH=1, HS=8))


@pytest.mark.parametrize("dtype", ["float32", BF16])
def test_decoding_one_by_one_gives_what_forward_gives(device, dtype):
    on = OnDevice(device, dtype)
    B, T, NH, HS = 2, 7, 2, 16
    qkv = bf16(np.random.default_rng(0).standard_normal((B, T, 3 * NH * HS)))
    out, _ = on.attention_forward(qkv, NH)
    keys, values = np.zeros((2, B, NH, T, HS), np.float32)
    steps = [on.attention_decode(qkv[:, t : t + 1].copy(), keys, values, t) for t in range(T)]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), out, rtol=0, atol=1e-5 if dtype == "float32" else 2e-2)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", BF16])
def test_extreme_scores_stay_finite_and_right(device, dtype):
    """Scores of +-60,000: all weight on one key for most queries, and a maximum that jumps from tile to tile."""
    B, T, NH, HS = 1, 150, 1, 16
    C = NH * HS
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((B, T, 3 * C)).astype(np.float32)
    qkv[..., : 2 * C] *= np.where(rng.random((B, T, 1)) < 0.5, 100.0, 0.01)
    qkv = bf16(qkv)
    on = OnDevice(device, dtype)
    out, lse = on.attention_forward(qkv, NH)
    expected, expected_lse = reference.attention_forward(qkv.astype(np.float64), NH)
    assert np.abs(expected_lse).max() > 1e4
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-6, atol=2e-5)
    tolerance = 2e-3 if dtype == "float32" else 2 * ULP  # a score of 1e4 is right to 1e-3, and so is its probability
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance * np.abs(qkv[..., 2 * C :]).max())
    dout = bf16(rng.standard_normal((B, T, C)))
    assert np.isfinite(on.attention_backward(dout, qkv, out, lse)).all()


def test_equal_scores_average_the_values(device):
    B, T, NH, HS = 1, 130, 1, 64
    qkv = np.zeros((B, T, 3 * HS), np.float32)
    qkv[..., 2 * HS :] = np.arange(T)[:, None]
    out, lse = OnDevice(device, BF16).attention_forward(qkv, NH)
    np.testing.assert_allclose(out[0, :, 0], np.arange(T) / 2, rtol=2 * ULP)
    np.testing.assert_allclose(lse[0, 0], np.log1p(np.arange(T)), rtol=1e-6, atol=1e-6)


def test_what_comes_later_changes_no_bit(device):
    B, T, NH, HS = 1, 140, 2, 64
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((B, T, 3 * NH * HS)).astype(np.float32)
    other = qkv.copy()
    other[:, 100:] = 30 * rng.standard_normal(other[:, 100:].shape)
    on = OnDevice(device, BF16)
    for now, then in zip(on.attention_forward(qkv, NH), on.attention_forward(other, NH), strict=True):
        axis = 1 if now.ndim == 3 and now.shape[1] == T else 2
        assert now.take(range(100), axis).tobytes() == then.take(range(100), axis).tobytes()


def test_the_same_call_gives_the_same_bits(device):
    """Several blocks of keys add to the gradient of one query: always in the same order."""
    call = cases.make(case_of("attention_backward", B=2, T=300, NH=2, HS=64))
    on = OnDevice(device, BF16)
    assert len({on.attention_backward(**call.inputs).tobytes() for _ in range(3)}) == 1
