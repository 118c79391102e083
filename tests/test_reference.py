"""The float64 reference against finite differences, against itself (fused = plain), and against values by hand."""

import math

import numpy as np
import pytest
import reference

RTOL, ATOL = 5e-6, 1e-9
STEP = 1e-3  # of the differences: their error is about STEP**4 / 30 of the fifth derivative


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def assert_gradient(function, x, gradient):
    """gradient is that of the scalar function() with respect to x, which is changed in place and restored."""
    numeric = np.empty(x.shape)
    for index in np.ndindex(x.shape):
        saved = x[index]
        values = {}
        for k in (-2, -1, 1, 2):
            x[index] = saved + k * STEP
            values[k] = function()
        x[index] = saved
        numeric[index] = (values[-2] - 8.0 * values[-1] + 8.0 * values[1] - values[2]) / (12.0 * STEP)
    np.testing.assert_allclose(gradient, numeric, rtol=RTOL, atol=ATOL)


# ---- each backward against finite differences of its forward ---------------------------------------------------------


def test_encoder_gradients():
    tokens = np.array([[0, 2, 2, 4], [4, 2, 0, 0]], np.int32)
    wte, wpe, dout = normal(5, 3), normal(6, 3), normal(2, 4, 3)
    dwte, dwpe = reference.encoder_backward(dout, tokens, wte, wpe)

    def function():
        return (dout * reference.encoder_forward(tokens, wte, wpe)).sum()

    assert_gradient(function, wte, dwte)
    assert_gradient(function, wpe, dwpe)
    assert (dwpe[4:] == 0).all()


@pytest.mark.parametrize("C", [1, 2, 7])
def test_layernorm_gradients(C):
    inp, residual, weight, bias, dout, daround = (normal(2, 3, C, seed=i) for i in range(6))
    weight, bias = weight[0, 0].copy(), bias[0, 0].copy()

    def function():
        out, _, _, x = reference.layernorm_forward(inp, weight, bias, residual=residual)
        return (dout * out).sum() + (daround * x).sum()

    _, mean, rstd, x = reference.layernorm_forward(inp, weight, bias, residual=residual)
    dx, dweight, dbias = reference.layernorm_backward(dout, x, weight, mean, rstd, dresidual=daround)
    assert_gradient(function, weight, dweight)
    assert_gradient(function, bias, dbias)
    if C == 1:
        assert (dx == daround).all() and (dweight == 0).all()
    else:
        assert_gradient(function, inp, dx)
        assert_gradient(function, residual, dx)


@pytest.mark.parametrize("bias", [True, False])
def test_matmul_gradients(bias):
    inp, weight, dout = normal(2, 3, 4), normal(5, 4), normal(2, 3, 5)
    offset = normal(5) if bias else None

    def function():
        return (dout * reference.matmul_forward(inp, weight, offset)).sum()

    dinp, dweight, dbias = reference.matmul_backward(dout, inp, weight, bias=bias)
    assert_gradient(function, inp, dinp)
    assert_gradient(function, weight, dweight)
    if bias:
        assert_gradient(function, offset, dbias)
    else:
        assert dbias is None


def test_matmul_gradient_through_gelu():
    pre_gelu, weight, dout = 2.0 * normal(2, 3, 4), normal(5, 4), normal(2, 3, 5)

    def function():
        return (dout * reference.matmul_forward(reference.gelu_forward(pre_gelu), weight)).sum()

    inp = reference.gelu_forward(pre_gelu)
    dpre_gelu, dweight, _ = reference.matmul_backward(dout, inp, weight, pre_gelu=pre_gelu)
    assert_gradient(function, pre_gelu, dpre_gelu)
    assert_gradient(function, weight, dweight)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("num_heads", [1, 2])
def test_attention_gradients(T, num_heads):
    qkv, dout = normal(2, T, 18), normal(2, T, 6)
    out, lse = reference.attention_forward(qkv, num_heads)

    def function():
        return (dout * reference.attention_forward(qkv, num_heads)[0]).sum()

    assert_gradient(function, qkv, reference.attention_backward(dout, qkv, out, lse))


def test_gelu_gradient():
    inp, dout = np.linspace(-6.0, 6.0, 49), normal(49)
    assert_gradient(lambda: (dout * reference.gelu_forward(inp)).sum(), inp, reference.gelu_backward(dout, inp))


def test_residual_gradients():
    inp1, inp2, dout = normal(2, 3), normal(2, 3, seed=1), normal(2, 3, seed=2)
    dinp1, dinp2 = reference.residual_backward(dout)
    for x, gradient in ((inp1, dinp1), (inp2, dinp2)):
        assert_gradient(lambda: (dout * reference.residual_forward(inp1, inp2)).sum(), x, gradient)


@pytest.mark.parametrize("vocab_size", [None, 5, 1])
def test_softmax_gradient(vocab_size):
    inp, dout = normal(3, 7), normal(3, 7, seed=1)
    out = reference.softmax_forward(inp, vocab_size=vocab_size)

    def function():
        return (dout * reference.softmax_forward(inp, vocab_size=vocab_size)).sum()

    assert_gradient(function, inp, reference.softmax_backward(dout, out, vocab_size=vocab_size))


@pytest.mark.parametrize("vocab_size", [None, 5])
def test_crossentropy_gradient(vocab_size):
    logits, dlosses = normal(2, 3, 7), normal(2, 3)
    targets = np.array([[0, -1, 4], [2, 2, -1]], np.int32)
    _, lse = reference.crossentropy_forward(logits, targets, vocab_size=vocab_size)

    def function():
        return (dlosses * reference.crossentropy_forward(logits, targets, vocab_size=vocab_size)[0]).sum()

    dlogits = reference.crossentropy_backward(dlosses, logits, targets, lse, vocab_size=vocab_size)
    assert_gradient(function, logits, dlogits)
    assert (dlogits[..., (vocab_size or 7) :] == 0).all() and (dlogits[targets == -1] == 0).all()


@pytest.mark.parametrize("vocab_size", [None, 5])
def test_classifier_gradients(vocab_size):
    inp, weight = normal(2, 3, 4), normal(7, 4)
    targets = np.array([[0, -1, 4], [2, 2, -1]], np.int32)

    def function():
        losses = reference.classifier_forward(inp, weight, targets, vocab_size=vocab_size)
        return 0.25 * float(reference.mean_loss(losses, targets))

    losses, dinp, dweight = reference.classifier_forward_backward(
        inp, weight, targets, vocab_size=vocab_size, loss_scale=0.25
    )
    assert_gradient(function, inp, dinp)
    assert_gradient(function, weight, dweight)
    np.testing.assert_array_equal(losses, reference.classifier_forward(inp, weight, targets, vocab_size=vocab_size))


def test_classifier_without_targets_has_no_gradient():
    inp, weight, targets = normal(3, 4), normal(5, 4), np.full(3, -1, np.int32)
    for result in reference.classifier_forward_backward(inp, weight, targets):
        assert (result == 0).all()
    assert reference.mean_loss(np.ones(3), targets) == 0


# ---- fused ops are the plain ops -------------------------------------------------------------------------------------


def test_layernorm_with_residual_is_residual_then_layernorm():
    inp, residual, weight, bias = normal(2, 3, 4), normal(2, 3, 4, seed=1), normal(4), normal(4, seed=1)
    x = reference.residual_forward(inp, residual)
    plain = (*reference.layernorm_forward(x, weight, bias), x)
    for a, b in zip(reference.layernorm_forward(inp, weight, bias, residual=residual), plain, strict=True):
        np.testing.assert_array_equal(a, b)


def test_matmul_epilogues_are_gelu_and_residual():
    inp, weight, bias, residual = normal(3, 4), normal(5, 4), normal(5), normal(3, 5)
    plain = reference.matmul_forward(inp, weight, bias)
    out, pre_gelu = reference.matmul_forward(inp, weight, bias, residual=residual, gelu=True)
    np.testing.assert_array_equal(pre_gelu, plain)
    np.testing.assert_array_equal(out, reference.gelu_forward(plain) + residual)
    np.testing.assert_array_equal(reference.matmul_forward(inp, weight, bias, residual=residual), plain + residual)


def test_matmul_backward_with_pre_gelu_is_gelu_backward():
    pre_gelu, weight, dout = normal(3, 4), normal(5, 4), normal(3, 5)
    inp = reference.gelu_forward(pre_gelu)
    plain, *plain_parameters = reference.matmul_backward(dout, inp, weight)
    fused, *parameters = reference.matmul_backward(dout, inp, weight, pre_gelu=pre_gelu)
    np.testing.assert_allclose(fused, reference.gelu_backward(plain, pre_gelu), rtol=1e-14)
    for a, b in zip(parameters, plain_parameters, strict=True):
        np.testing.assert_array_equal(a, b)


def test_crossentropy_is_log_of_softmax():
    logits, targets = normal(3, 7), np.array([0, 4, 2], np.int32)
    losses, lse = reference.crossentropy_forward(logits, targets, vocab_size=5)
    probabilities = reference.softmax_forward(logits, vocab_size=5)
    np.testing.assert_allclose(losses, -np.log(probabilities[np.arange(3), targets]), rtol=1e-14)
    dlosses = normal(3)
    dlogits = reference.crossentropy_backward(dlosses, logits, targets, lse, vocab_size=5)
    dprobabilities = np.zeros(logits.shape)
    dprobabilities[np.arange(3), targets] = -dlosses / probabilities[np.arange(3), targets]
    plain = reference.softmax_backward(dprobabilities, probabilities, vocab_size=5)
    np.testing.assert_allclose(dlogits, plain, rtol=1e-12, atol=1e-15)


def test_classifier_is_matmul_and_crossentropy():
    inp, weight, targets = normal(3, 4), normal(7, 4), np.array([0, -1, 4], np.int32)
    logits = reference.matmul_forward(inp, weight)
    losses, _ = reference.crossentropy_forward(logits, targets, vocab_size=5)
    np.testing.assert_array_equal(reference.classifier_forward(inp, weight, targets, vocab_size=5), losses)


def test_decode_in_pieces_is_attention():
    qkv = normal(2, 7, 24)
    whole, _ = reference.attention_forward(qkv, 2)
    caches = np.zeros((2, 2, 8, 4)), np.zeros((2, 2, 8, 4))
    pieces = [reference.attention_decode(qkv[:, i:j], *caches, i) for i, j in ((0, 3), (3, 4), (4, 7))]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=1e-13)
    assert (caches[0][:, :, 7:] == 0).all()


# ---- values by hand --------------------------------------------------------------------------------------------------


def test_layernorm_by_hand():
    out, mean, rstd = reference.layernorm_forward(np.array([[1.0, 3.0]]), np.array([2.0, 10.0]), np.ones(2), eps=3.0)
    np.testing.assert_array_equal((mean, rstd), ([2.0], [0.5]))  # variance 1
    np.testing.assert_array_equal(out, [[2.0 * -0.5 + 1.0, 10.0 * 0.5 + 1.0]])


def test_attention_by_hand():
    # One head of size 1: the second query, 1, sees the keys 0 and ln 3, that is weights 1/4 and 3/4.
    out, lse = reference.attention_forward(np.array([[[5.0, 0.0, 8.0], [1.0, math.log(3.0), 4.0]]]), 1)
    np.testing.assert_allclose(out[0, :, 0], [8.0, 0.25 * 8.0 + 0.75 * 4.0], rtol=1e-15)
    np.testing.assert_allclose(lse[0, 0], [0.0, math.log(4.0)], rtol=1e-15)


def test_gelu_by_hand():
    np.testing.assert_array_equal(reference.gelu_forward(np.array([0.0, 40.0, -40.0])), [0.0, 40.0, 0.0])
    assert reference.gelu_forward(np.array(1.0)) == pytest.approx(0.841192, abs=1e-6)
    assert reference.gelu_backward(np.array(3.0), np.array(0.0)) == 1.5


def test_crossentropy_by_hand():
    logits = np.log([[1.0, 2.0, 5.0, 100.0]])
    losses, lse = reference.crossentropy_forward(logits, np.array([2], np.int32), vocab_size=3)
    assert losses[0] == pytest.approx(math.log(8.0 / 5.0)) and lse[0] == pytest.approx(math.log(8.0))
    np.testing.assert_allclose(reference.softmax_forward(logits, vocab_size=3), [[0.125, 0.25, 0.625, 0.0]])


def test_large_values_do_not_overflow():
    logits, targets = np.array([[1000.0, 0.0], [-1000.0, -1000.0]]), np.array([0, 1], np.int32)
    losses, _ = reference.crossentropy_forward(logits, targets)
    np.testing.assert_allclose(losses, [0.0, math.log(2.0)], atol=1e-12)
    np.testing.assert_allclose(reference.softmax_forward(logits), [[1.0, 0.0], [0.5, 0.5]], atol=1e-12)


def test_adamw_by_hand():
    # In the first step both corrected moments are those of the gradient: the step is learning_rate * sign(grad).
    param, m, v = np.array([1.0, 1.0]), np.zeros(2), np.zeros(2)
    reference.adamw_update(
        param, np.array([4.0, -6.0]), m, v,
        learning_rate=0.1, beta1=0.9, beta2=0.75, eps=0.0, weight_decay=0.5, step=1, grad_scale=0.5,
    )  # fmt: skip
    np.testing.assert_allclose(m, [0.2, -0.3], rtol=1e-15)
    np.testing.assert_allclose(v, [1.0, 2.25], rtol=1e-15)
    np.testing.assert_allclose(param, [1.0 - 0.1 * (1.0 + 0.5), 1.0 - 0.1 * (-1.0 + 0.5)], rtol=1e-15)


def test_norm_and_mean_by_hand():
    assert reference.global_norm(np.array([[3.0], [4.0]])) == 5.0
    assert reference.mean_loss(np.array([1.0, 9.0, 3.0]), np.array([4, -1, 0], np.int32)) == 2.0


# ---- the write rule, ranges ------------------------------------------------------------------------------------------


def test_outputs_are_overwritten_or_added_to():
    dout, inp, weight = normal(3, 5), normal(3, 4), normal(5, 4)
    fresh = reference.matmul_backward(dout, inp, weight)
    given = np.ones((3, 4)), np.ones((5, 4)), np.ones(5)
    names = ("dinp", "dweight", "dbias")
    returned = reference.matmul_backward(dout, inp, weight, **dict(zip(names, given, strict=True)), accumulate=True)
    for name, array, result, value in zip(names, given, returned, fresh, strict=True):
        assert result is array
        np.testing.assert_array_equal(array, value if name == "dinp" else value + 1.0)


@pytest.mark.parametrize("accumulate", [False, True])
def test_tied_embedding_gradient_is_added(accumulate):
    tokens, dout = np.array([[1, 1]], np.int32), np.ones((1, 2, 3))
    dwte, dwpe = np.full((2, 3), 10.0), np.full((2, 3), 10.0)
    reference.encoder_backward(dout, tokens, dwte, dwpe, dwte=dwte, dwpe=dwpe, accumulate=accumulate, tied=True)
    np.testing.assert_array_equal(dwte[:, 0], [10.0, 12.0])
    np.testing.assert_array_equal(dwpe[:, 0], [11.0, 11.0] if accumulate else [1.0, 1.0])


def test_indices_out_of_range_are_errors():
    wte, wpe, logits = normal(5, 3), normal(6, 3), normal(1, 2, 5)
    with pytest.raises(ValueError, match=r"encoder_forward: tokens\[0, 1\] is 5, outside \[0, 5\)"):
        reference.encoder_forward(np.array([[0, 5]], np.int32), wte, wpe)
    with pytest.raises(ValueError, match=r"crossentropy_forward: targets\[0, 1\] is 4"):
        reference.crossentropy_forward(logits, np.array([[-1, 4]], np.int32), vocab_size=4)
    with pytest.raises(ValueError, match=r"from_host: array\[0\] is -1"):
        reference.from_host([-1, 2], limit=3)
    np.testing.assert_array_equal(reference.from_host([-1, 2], limit=3, allow_ignored=True), [-1, 2])
