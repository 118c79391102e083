"""The vector exp and log that every op is built on: at most so many units in the last place off, over all
of float32."""

import numpy as np
import pytest

# Units in the last place.
EXP_ULP, LOG_ULP = 1.1, 2.0


def every_exponent(samples=64):
    """Positive finite floats, denormals included: `samples` mantissas (the ends among them) for each exponent."""
    rng = np.random.default_rng(0)
    mantissas = np.concatenate([[0, 1, 2**22, 2**23 - 2, 2**23 - 1], rng.integers(0, 2**23, samples)])
    bits = (np.arange(255)[:, None] << 23) | mantissas[None, :]
    return bits.astype(np.uint32).view(np.float32).reshape(-1)


def ulp_error(actual, exact):
    """|actual - exact| in units of the last place of a float32 of that size; exact is float64 and finite."""
    smallest = np.finfo(np.float32).smallest_subnormal
    spacing = np.maximum(np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64), float(smallest))
    return np.abs(actual.astype(np.float64) - exact) / spacing


def assert_ulp(function, exact_function, max_ulp, inp):
    """Within max_ulp where the exact result is a finite float32, infinite where it is beyond, never NaN."""
    actual = function(inp)
    exact = exact_function(inp.astype(np.float64))
    with np.errstate(over="ignore"):
        finite = np.isfinite(exact.astype(np.float32))
    np.testing.assert_array_equal(actual[~finite], exact[~finite].astype(np.float32))
    error = ulp_error(actual[finite], exact[finite])
    worst = np.argmax(error)
    assert error[worst] <= max_ulp, f"{error[worst]:.2f} ulp off at {inp[finite][worst]!r}"


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_exp_over_all_exponents(cpu):
    x = every_exponent()
    assert_ulp(cpu._vector_exp, np.exp, EXP_ULP, np.concatenate([x, -x]))


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_exp_where_it_is_finite(cpu):
    assert_ulp(cpu._vector_exp, np.exp, EXP_ULP, np.linspace(-110.0, 95.0, 200_001, dtype=np.float32))


def test_exp_overflows_to_infinity_and_underflows_to_zero(cpu):
    largest = np.float32(88.72283)  # the largest float whose exp is finite
    x = np.array([largest, np.nextafter(largest, np.float32(100.0)), 89.0, 1e30, np.inf], np.float32)
    np.testing.assert_array_equal(np.isinf(cpu._vector_exp(x)), [False, True, True, True, True])
    x = np.array([-103.0, -104.0, -105.0, -1e30, -np.inf], np.float32)
    smallest = np.finfo(np.float32).smallest_subnormal
    np.testing.assert_array_equal(cpu._vector_exp(x), [smallest, 0.0, 0.0, 0.0, 0.0])
    denormal = cpu._vector_exp(np.array([-90.0], np.float32))[0]
    assert 0 < denormal < np.finfo(np.float32).tiny


def test_exp_is_exact_at_zero_and_keeps_nan(cpu):
    result = cpu._vector_exp(np.array([0.0, -0.0, np.nan, -np.nan], np.float32))
    np.testing.assert_array_equal(result, [1.0, 1.0, np.nan, np.nan])


def test_log_over_all_exponents(cpu):
    x = every_exponent()
    assert_ulp(cpu._vector_log, np.log, LOG_ULP, x[x > 0])


def test_log_around_one(cpu):
    # Where the result goes through zero, and where m = sqrt(1/2) splits the polynomial's range.
    for centre in (1.0, 0.5**0.5, 2.0**0.5):
        start = np.array(centre, np.float32).view(np.int32)
        x = np.arange(start - 20_000, start + 20_000, dtype=np.int32).view(np.float32)
        assert_ulp(cpu._vector_log, np.log, LOG_ULP, x)


def test_log_of_special_values(cpu):
    inp = np.array([0.0, -0.0, 1.0, np.inf, np.nan, -1.0, -np.inf, -1e-40], np.float32)
    expected = [-np.inf, -np.inf, 0.0, np.inf, np.nan, np.nan, np.nan, np.nan]
    np.testing.assert_array_equal(cpu._vector_log(inp), expected)


@pytest.mark.parametrize("name", ["_vector_exp", "_vector_log"])
def test_every_lane_and_tail_gives_the_same_bits(cpu, name):
    function = getattr(cpu, name)
    x = np.linspace(0.1, 7.0, 67, dtype=np.float32)
    whole = function(x)
    for size in (1, 3, 4, 7, 8, 15, 16, 17, 33):
        for start in (0, 1, 5):
            np.testing.assert_array_equal(function(x[start : start + size].copy()), whole[start : start + size])
    out = np.full(67, np.nan, np.float32)
    assert function(x, out=out) is out
    np.testing.assert_array_equal(out, whole)
