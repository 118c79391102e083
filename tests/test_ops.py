"""Every op of every backend and ISA module against the float64 reference, over the whole case table, at the stated
tolerances.

compare.check gives each op read-only inputs and NaN-filled outputs between guard bands; the rest of this file holds
the write rules: allocated or given, overwritten or added to, in place where that is allowed, fused or plain.
"""

import cases
import compare
import numpy as np
import pytest


def some(op, count=4):
    """A few cases of an op, the last and largest among them, for tests that do not need every size."""
    table = cases.CASES[op]
    return table[:: max(1, len(table) // count)] + table[-1:]


def parametrize(ops, pick=some):
    return pytest.mark.parametrize("case", [case for op in ops for case in pick(op)], ids=str)


ACCUMULATING = [op for op in cases.CASES if compare.takes_accumulate(op)]


@parametrize(cases.CASES, pick=cases.CASES.get)
def test_matches_reference(op_set, case):
    compare.check(op_set, case)


@parametrize(ACCUMULATING)
def test_accumulates(op_set, case):
    compare.check(op_set, case, seed=1, accumulate=True)


@parametrize(cases.CASES)
def test_allocated_outputs_have_the_bits_of_given_ones(op_set, case):
    call = cases.make(case)
    allocated = compare.run(op_set, call)
    for name in call.outputs:
        assert allocated[name].dtype == np.float32 and allocated[name].shape == call.outputs[name]
        assert allocated[name].flags.c_contiguous and allocated[name].flags.writeable
    given = {name: compare.Guarded(shape).array for name, shape in call.outputs.items()}
    compare.assert_same_bits(str(case), allocated, compare.run(op_set, call, **given))


@parametrize(ACCUMULATING, pick=lambda op: cases.CASES[op][-1:])
def test_accumulating_into_nothing_is_overwriting(op_set, case):
    call = cases.make(case)
    compare.assert_same_bits(str(case), compare.run(op_set, call, accumulate=True), compare.run(op_set, call))


@pytest.mark.parametrize("op", [op for op in cases.CASES if op != "adamw_update"])
def test_inputs_may_be_memory_maps(op_set, op, tmp_path):
    case = cases.CASES[op][2]
    call = cases.make(case)
    plain = compare.run(op_set, call)
    for name in call.arrays.keys() - set(call.in_place):
        path = tmp_path / name
        path.write_bytes(call.inputs[name].tobytes())
        array = call.inputs[name]
        call.inputs[name] = np.memmap(path, dtype=array.dtype, mode="r", shape=array.shape)
    compare.assert_same_bits(str(case), compare.named(call, getattr(op_set, op)(**call.inputs)), plain)


@pytest.mark.parametrize(
    "op, output, given",
    [(op, *pair) for op, pairs in cases.ALIASES.items() for pair in sorted(pairs)],
)
def test_allowed_aliasing_changes_no_bit(op_set, op, output, given):
    fitting = [call for call in map(cases.make, some(op, 8)) if given in call.inputs and output in call.outputs]
    assert fitting
    for call in fitting:
        separate = compare.run(op_set, call)
        shared = call.inputs[given]
        aliased = compare.named(call, getattr(op_set, op)(**call.inputs, **{output: shared}))
        assert aliased[output] is shared
        compare.assert_same_bits(op, aliased, separate)


# ---- fused ops are the plain ops -------------------------------------------------------------------------------------


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def assert_near(actual, expected, scale=1.0):
    """Equal up to the last bits, where a fused op may round in another place."""
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6 * scale)


def test_layernorm_with_residual(op_set):
    inp, residual, weight, bias = normal(5, 33), normal(5, 33, seed=1), normal(33), normal(33, seed=1)
    x = op_set.residual_forward(inp, residual)
    out, mean, rstd, residual_out = op_set.layernorm_forward(inp, weight, bias, residual=residual)
    np.testing.assert_array_equal(residual_out, x)
    for fused, plain in zip((out, mean, rstd), op_set.layernorm_forward(x, weight, bias), strict=True):
        assert_near(fused, plain)
    dout, around = normal(5, 33, seed=2), normal(5, 33, seed=3)
    plain = op_set.layernorm_backward(dout, x, weight, mean, rstd)
    fused = op_set.layernorm_backward(dout, x, weight, mean, rstd, dresidual=around)
    assert_near(fused[0], plain[0] + around)
    for a, b in zip(fused[1:], plain[1:], strict=True):
        np.testing.assert_array_equal(a, b)


def test_matmul_epilogues(op_set):
    inp, weight, bias, residual = normal(19, 70), normal(37, 70), normal(37), normal(19, 37)
    plain = op_set.matmul_forward(inp, weight, bias)
    out, pre_gelu = op_set.matmul_forward(inp, weight, bias, gelu=True)
    np.testing.assert_array_equal(pre_gelu, plain)
    assert_near(out, op_set.gelu_forward(plain))
    assert_near(op_set.matmul_forward(inp, weight, bias, residual=residual), plain + residual, 10)
    out, _ = op_set.matmul_forward(inp, weight, bias, residual=residual, gelu=True)
    assert_near(out, op_set.gelu_forward(plain) + residual, 10)


def test_matmul_backward_through_gelu(op_set):
    dout, weight, pre_gelu = normal(19, 37), normal(37, 70), normal(19, 70)
    inp = op_set.gelu_forward(pre_gelu)
    plain = op_set.matmul_backward(dout, inp, weight)
    fused = op_set.matmul_backward(dout, inp, weight, pre_gelu=pre_gelu)
    assert_near(fused[0], op_set.gelu_backward(plain[0], pre_gelu), 10)
    for a, b in zip(fused[1:], plain[1:], strict=True):
        np.testing.assert_array_equal(a, b)


def test_classifier_is_matmul_and_crossentropy(op_set):
    inp, weight = normal(21, 40), 0.3 * normal(128, 40)
    targets = np.arange(-1, 20, dtype=np.int32)
    logits = op_set.matmul_forward(inp, weight)
    losses, lse = op_set.crossentropy_forward(logits, targets, vocab_size=100)
    assert_near(op_set.classifier_forward(inp, weight, targets, vocab_size=100), losses, 10)
    dlosses = np.full(21, 0.5 / 20, np.float32)
    dlogits = op_set.crossentropy_backward(dlosses, logits, targets, lse, vocab_size=100)
    dinp, dweight, _ = op_set.matmul_backward(dlogits, inp, weight, bias=False)
    fused = op_set.classifier_forward_backward(inp, weight, targets, vocab_size=100, loss_scale=0.5)
    for a, b in zip(fused, (losses, dinp, dweight), strict=True):
        assert_near(a, b, 10)


def test_decode_in_pieces_is_attention(op_set):
    qkv = normal(2, 40, 3 * 3 * 20)
    whole, _ = op_set.attention_forward(qkv, 3)
    caches = np.zeros((2, 3, 48, 20), np.float32), np.zeros((2, 3, 48, 20), np.float32)
    pieces = [
        op_set.attention_decode(np.ascontiguousarray(qkv[:, i:j]), *caches, i)
        for i, j in ((0, 17), (17, 18), (18, 19), (19, 40))
    ]
    assert_near(np.concatenate(pieces, axis=1), whole)
    assert (caches[0][:, :, 40:] == 0).all() and (caches[1][:, :, 40:] == 0).all()


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [False, True])
def test_tied_embedding_gradient_is_added(op_set, accumulate):
    tokens = np.array([[1, 0, 1]], np.int32)
    dwte, dwpe = np.full((3, 2), 10.0, np.float32), np.full((4, 2), 10.0, np.float32)
    dout = np.ones((1, 3, 2), np.float32)
    wte, wpe = np.zeros((3, 2), np.float32), np.zeros((4, 2), np.float32)
    op_set.encoder_backward(dout, tokens, wte, wpe, dwte=dwte, dwpe=dwpe, accumulate=accumulate, tied=True)
    np.testing.assert_array_equal(dwte[:, 0], [11.0, 12.0, 10.0])
    np.testing.assert_array_equal(dwpe[:, 0], [11.0, 11.0, 11.0, 10.0] if accumulate else [1.0, 1.0, 1.0, 0.0])


def test_embedding_gradient_of_a_table_beyond_the_caches(cpu):
    """Rows that occur once or never are then written past the caches; those of a small table are not."""
    V, C = 4 * 2**20 // 64, 64
    tokens = np.array([[5, V - 1, 7, 5], [9, 5, 0, 9]], np.int32)
    dout, wpe = normal(2, 4, C), np.zeros((4, C), np.float32)
    dwte, dwpe = cpu.empty((V, C)), cpu.empty((4, C))
    dwte[...] = np.nan
    cpu.encoder_backward(dout, tokens, np.zeros((V, C), np.float32), wpe, dwte=dwte, dwpe=dwpe)
    near = np.where(tokens == V - 1, 1, tokens)
    small, small_dwpe = cpu.encoder_backward(dout, near, np.zeros((10, C), np.float32), wpe)
    occur = [0, 5, 7, 9]
    np.testing.assert_array_equal(dwte[occur], small[occur])
    np.testing.assert_array_equal(dwte[V - 1], dout[0, 1])
    np.testing.assert_array_equal(dwpe, small_dwpe)
    rest = np.delete(np.arange(V), [*occur, V - 1])
    assert not dwte[rest].any()


def test_padding_rows_of_the_classifier_get_no_gradient(op_set):
    call = cases.make(cases.Case("classifier_forward_backward", (("leading", (9,)), ("C", 8), ("V", 5), ("Vp", 8))))
    assert (compare.run(op_set, call)["dweight"][5:] == 0).all()
    dweight = np.full((8, 8), 3.0, np.float32)
    compare.run(op_set, call, dweight=dweight, accumulate=True)
    assert (dweight[5:] == 3).all()


def test_without_a_counted_target_all_is_zero(op_set):
    inp, weight, targets = normal(6, 8), normal(16, 8), np.full(6, -1, np.int32)
    for result in op_set.classifier_forward_backward(inp, weight, targets):
        assert (result == 0).all()
    assert op_set.mean_loss(np.ones(6, np.float32), targets) == 0


def test_vocab_size_none_is_all_columns(op_set):
    logits, targets = normal(5, 19), np.arange(5, dtype=np.int32)
    for op, arguments in (
        ("softmax_forward", (logits,)),
        ("softmax_backward", (logits, op_set.softmax_forward(logits))),
        ("crossentropy_forward", (logits, targets)),
        ("crossentropy_backward", (normal(5), logits, targets, normal(5))),
        ("classifier_forward", (normal(5, 8), normal(19, 8), targets)),
        ("classifier_forward_backward", (normal(5, 8), normal(19, 8), targets)),
    ):
        results = [getattr(op_set, op)(*arguments, vocab_size=size) for size in (None, 19)]
        default, stated = (result if isinstance(result, tuple) else (result,) for result in results)
        for a, b in zip(default, stated, strict=True):
            np.testing.assert_array_equal(a, b)


def test_large_logits_do_not_overflow(op_set):
    logits = np.array([[1e4, 0.0, -1e4], [-1e4, -1e4, -3e38], [88.0, 89.0, 90.0]], np.float32)
    targets = np.array([0, 1, 2], np.int32)
    losses, lse = op_set.crossentropy_forward(logits, targets)
    np.testing.assert_allclose(losses, [0.0, np.log(2.0), 0.407606], rtol=1e-3, atol=1e-6)
    assert np.isfinite(lse).all()
    np.testing.assert_allclose(op_set.softmax_forward(logits).sum(axis=-1), 1.0, rtol=1e-6)


def test_gelu_at_the_ends(op_set):
    inp = np.array([-3e38, -1e4, -20.0, -0.0, 0.0, 20.0, 1e4, 3e38], np.float32)
    np.testing.assert_array_equal(op_set.gelu_forward(inp), np.where(inp > 0, inp, 0))
    slopes = op_set.gelu_backward(np.ones_like(inp), inp)
    np.testing.assert_allclose(slopes, [0, 0, 0, 0.5, 0.5, 1, 1, 1], atol=1e-6)


def test_attention_of_large_scores(op_set):
    qkv = 100.0 * normal(1, 70, 3 * 16)
    out, lse = op_set.attention_forward(qkv, 1)
    assert np.isfinite(out).all() and np.isfinite(lse).all()
    assert np.isfinite(op_set.attention_backward(normal(1, 70, 16), qkv, out, lse)).all()


def test_nan_is_not_hidden(op_set):
    inp, targets = normal(9, 33), np.zeros(9, np.int32)
    inp[4, 20] = np.nan
    weight = normal(12, 33)
    assert np.isnan(op_set.matmul_forward(inp, weight)[4]).all()
    assert np.isnan(op_set.gelu_forward(inp)[4, 20])
    assert np.isnan(op_set.gelu_backward(inp, inp)[4, 20])
    assert np.isnan(op_set.softmax_forward(inp)[4]).all()
    assert np.isnan(op_set.crossentropy_forward(inp, targets)[0][4])
    assert np.isnan(op_set.classifier_forward(inp, weight, targets)[4])
    assert np.isnan(op_set.layernorm_forward(inp, normal(33), normal(33))[0][4]).all()
    assert np.isnan(op_set.global_norm(inp))
    assert np.isnan(op_set.attention_forward(inp.reshape(1, 9, 33), 11)[0][0, 4]).any()


def test_sums_are_kept_in_double(op_set):
    array = np.full(300_001, 1e-3, np.float32)
    array[0] = 1e4  # whose square swallows those of the others in float32
    assert op_set.global_norm(array) == pytest.approx(np.sqrt((array.astype(np.float64) ** 2).sum()), rel=1e-7)
    assert op_set.global_norm(np.full(3, 1e30, np.float32)) == pytest.approx(np.sqrt(3.0) * 1e30, rel=1e-6)


# ---- arrays ----------------------------------------------------------------------------------------------------------


def test_empty_and_zeros(cpu):
    for make in (cpu.empty, cpu.zeros):
        assert make((2, 3)).dtype == np.float32 and make((2, 3)).shape == (2, 3)
        assert make((4,), dtype="int32").dtype == np.int32
        assert make((4,), "float32").dtype == make((4,), "wide").dtype == np.float32
        assert make((2, 3)).flags.c_contiguous
    assert (cpu.zeros((3, 5)) == 0).all()


def test_from_host_converts(cpu):
    assert cpu.from_host([[1.5, 2.5]]).dtype == np.float32
    assert cpu.from_host([[1, 2]]).dtype == np.int32
    assert cpu.from_host(np.arange(3, dtype=np.uint16)).dtype == np.int32
    assert cpu.from_host(np.arange(3), dtype="float32").dtype == np.float32
    strided = np.arange(12.0).reshape(3, 4).T
    converted = cpu.from_host(strided)
    assert converted.flags.c_contiguous and converted.shape == (4, 3)
    np.testing.assert_array_equal(converted, strided)
    out = np.zeros(3, np.int32)
    assert cpu.from_host([4, 5, 6], out=out) is out
    np.testing.assert_array_equal(out, [4, 5, 6])
    np.testing.assert_array_equal(cpu.to_host(out), out)
    assert cpu.synchronize() is None


def test_from_host_checks_ranges(cpu):
    np.testing.assert_array_equal(cpu.from_host([[0, 4]], limit=5), [[0, 4]])
    np.testing.assert_array_equal(cpu.from_host([[-1, 4]], limit=5, allow_ignored=True), [[-1, 4]])
    for wrong in (5, -1, -2):
        with pytest.raises(ValueError, match=rf"^from_host: (?=.*\[0, 1\]).* {wrong} "):
            cpu.from_host([[0, wrong]], limit=5)
    with pytest.raises(ValueError, match="from_host: .*-2"):
        cpu.from_host([[0, -2]], limit=5, allow_ignored=True)
    with pytest.raises(ValueError, match="from_host: "):
        cpu.from_host([2**31])
