"""How close is close enough, and nothing written where it should not be: the rules behind the tests of ops.

`check(module, case)` runs an op on read-only inputs with outputs that lie between guard bands and hold NaN, and holds
every result against the float64 reference on the same float32 numbers, at the tolerances of `TOLERANCES`. Called by
the tests of ops; calls cases.py and reference.py.
"""

import dataclasses
import inspect
import math

import cases
import numpy as np
import reference

GUARD = 64  # sentinel floats before and after each output
SENTINEL = np.float32(-12345.678)
MAX_NMSE = 1e-11


# ---- tolerances: (expected output, float64 inputs) -> the largest error allowed, per element -------------------------


def pointwise(expected, inputs):
    """An op on single elements: some roundings of the result itself."""
    return 1e-6 + 1e-5 * np.abs(expected)


def of_largest(expected, inputs):
    """A sum of terms that may cancel: measured against the largest element. All zeros must be exact."""
    return 1e-5 * np.abs(expected).max()


def _linear(expected, inputs):
    """inp @ weight.T + bias (+ residual): 1e-6 of the sum of the absolute terms."""
    bound = np.abs(inputs["inp"]) @ np.abs(inputs["weight"]).T
    for name in ("bias", "residual"):
        if inputs.get(name) is not None:
            bound = bound + np.abs(inputs[name])
    return 1e-6 * bound


def _linear_gelu(expected, inputs):
    """As _linear; with gelu, whose slope is at most 1.13, and its own roundings."""
    bound = _linear(expected, inputs)
    return 1.13 * bound + pointwise(expected, inputs) if inputs.get("gelu") else bound


def _matmul_dinp(expected, inputs):
    bound = 1e-6 * (np.abs(inputs["dout"]) @ np.abs(inputs["weight"]))
    if inputs.get("pre_gelu") is not None:
        bound = 1.13 * bound + pointwise(expected, inputs)
    return bound


def _matmul_dweight(expected, inputs):
    dout, inp = (np.abs(inputs[name]).reshape(-1, inputs[name].shape[-1]) for name in ("dout", "inp"))
    return 1e-6 * (dout.T @ inp)


def _matmul_dbias(expected, inputs):
    return 1e-6 * np.abs(inputs["dout"]).reshape(-1, inputs["dout"].shape[-1]).sum(axis=0)


def _classifier_losses(expected, inputs):
    """A loss moves at most twice as far as the logits, which are products."""
    logits = np.abs(inputs["inp"]) @ np.abs(inputs["weight"]).T
    return pointwise(expected, inputs) + 2e-6 * logits.max(axis=-1)


TOLERANCES = {
    "encoder_forward": {"out": pointwise},
    "encoder_backward": {"dwte": of_largest, "dwpe": of_largest},
    "layernorm_forward": {"out": of_largest, "mean": of_largest, "rstd": of_largest, "residual_out": pointwise},
    "layernorm_backward": {"dinp": of_largest, "dweight": of_largest, "dbias": of_largest},
    "matmul_forward": {"out": _linear_gelu, "pre_gelu": _linear},
    "matmul_backward": {"dinp": _matmul_dinp, "dweight": _matmul_dweight, "dbias": _matmul_dbias},
    "attention_forward": {"out": of_largest, "lse": of_largest},
    "attention_backward": {"dqkv": of_largest},
    "attention_decode": {"out": of_largest, "key_cache": pointwise, "value_cache": pointwise},
    "gelu_forward": {"out": pointwise},
    "gelu_backward": {"dinp": pointwise},
    "residual_forward": {"out": pointwise},
    "residual_backward": {"dinp1": pointwise, "dinp2": pointwise},
    "softmax_forward": {"out": pointwise},
    "softmax_backward": {"dinp": pointwise},
    "crossentropy_forward": {"losses": pointwise, "lse": pointwise},
    "crossentropy_backward": {"dlogits": pointwise},
    "classifier_forward": {"losses": _classifier_losses},
    "classifier_forward_backward": {"losses": _classifier_losses, "dinp": of_largest, "dweight": of_largest},
    "mean_loss": {"out": pointwise},
    "global_norm": {"out": pointwise},
    "adamw_update": {"param": pointwise, "m": pointwise, "v": pointwise},
}


def nmse(actual, expected):
    """Mean squared error over mean square; 0 where both are zero."""
    error, power = float(np.square(actual - expected).sum()), float(np.square(expected).sum())
    return error / power if power else (math.inf if error else 0.0)


def assert_close(label, actual, expected, bound, max_nmse=MAX_NMSE):
    """Every element within its bound, and the mean squared error small."""
    assert actual.shape == expected.shape, f"{label}: shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), f"{label}: {np.count_nonzero(~np.isfinite(actual))} elements are not finite"
    error = np.abs(actual.astype(np.float64) - expected)
    excess = error - bound
    if (excess > 0).any():
        worst = np.unravel_index(np.argmax(excess), error.shape)
        allowed = np.broadcast_to(bound, error.shape)[worst]
        raise AssertionError(
            f"{label}[{', '.join(map(str, worst))}] is {actual[worst]:.9g}, expected {expected[worst]:.9g}: "
            f"error {error[worst]:.3g} > {allowed:.3g} ({np.count_nonzero(excess > 0)} of {error.size} elements)"
        )
    measured = nmse(actual.astype(np.float64), expected)
    assert measured <= max_nmse, f"{label}: NMSE {measured:.3g} > {max_nmse:.3g}, largest error {error.max():.3g}"


def assert_same_bits(label, actual, expected):
    """Equal as bit patterns: NaN equals itself, 0.0 is not -0.0."""
    assert actual.keys() == expected.keys(), f"{label}: {list(actual)} and {list(expected)}"
    for name in actual:
        a, b = actual[name], expected[name]
        assert a.shape == b.shape, f"{label}: {name} has shape {a.shape} and {b.shape}"
        if a.tobytes() != b.tobytes():
            raise AssertionError(f"{label}: {name} differs by up to {np.abs(a - b).max():.3g}")


# ---- calls -----------------------------------------------------------------------------------------------------------


class Guarded:
    """An array between two bands of sentinels; it starts one float past them, so that no vector in it is aligned."""

    def __init__(self, shape, values=np.nan):
        start, size = GUARD + 1, math.prod(shape)
        self.buffer = np.full(2 * start + size, SENTINEL, np.float32)
        self.array = self.buffer[start : start + size].reshape(shape)
        self.array[...] = values

    def assert_intact(self, label):
        size = self.array.size
        before, after = self.buffer[: GUARD + 1], self.buffer[GUARD + 1 + size :]
        assert (before == SENTINEL).all(), f"{label}: wrote before its start"
        assert (after == SENTINEL).all(), f"{label}: wrote past its end"


def takes_accumulate(op):
    return "accumulate" in inspect.signature(getattr(reference, op)).parameters


def named(call, returned):
    """What a call gave, by name: the returned arrays in order, then the inputs that it wrote."""
    values = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
    values = [value for value in values if value is not None]
    results = dict(zip(call.outputs, values, strict=True))
    return results | {name: call.inputs[name] for name in call.in_place}


def run(module, call, **outputs_and_options):
    """Call the op on fresh copies of its inputs; returns the results by name."""
    copies = {name: value.copy() for name, value in call.arrays.items()}
    copied = dataclasses.replace(call, inputs=call.inputs | copies)
    return named(copied, getattr(module, call.op)(**copied.inputs, **outputs_and_options))


def in_float64(call):
    """The same call for the reference."""
    wide = {name: value.astype(np.float64) for name, value in call.arrays.items() if value.dtype == np.float32}
    return dataclasses.replace(call, inputs=call.inputs | wide)


def expected_results(call, prior=None):
    """(results of the reference, bounds), by name; prior: what parameter gradients are added to."""
    wide = in_float64(call)
    options = {} if prior is None else {"accumulate": True}
    given = {name: value.astype(np.float64) for name, value in (prior or {}).items()}
    results = run(reference, wide, **given, **options)
    bounds = {name: TOLERANCES[call.op][name](value, wide.inputs) for name, value in results.items()}
    for name, value in (prior or {}).items():
        bounds[name] = bounds[name] + 1e-6 * np.abs(value)
    return results, bounds


def check(module, case, seed=0, accumulate=False):
    """Outputs given, guarded and poisoned; inputs read-only: every result within its tolerance. Returns the results."""
    call = cases.make(case, seed)
    rng = np.random.default_rng(seed)
    gradients = cases.PARAMETER_GRADIENTS & call.outputs.keys() if accumulate else ()
    prior = {name: np.asarray(rng.standard_normal(call.outputs[name]), np.float32) for name in sorted(gradients)}
    guarded = {name: Guarded(shape, prior.get(name, np.nan)) for name, shape in call.outputs.items()}
    guarded_inputs = {name: Guarded(call.inputs[name].shape, call.inputs[name]) for name in call.in_place}
    inputs = dict(call.inputs)
    for name, value in call.arrays.items():
        inputs[name] = guarded_inputs[name].array if name in guarded_inputs else value.copy()
        inputs[name].setflags(write=name in call.in_place)
    guarded_call = dataclasses.replace(call, inputs=inputs)
    outputs = {name: guard.array for name, guard in guarded.items()}
    options = {"accumulate": True} if accumulate else {}
    results = named(guarded_call, getattr(module, call.op)(**inputs, **outputs, **options))

    for name, guard in (guarded | guarded_inputs).items():
        assert results[name] is guard.array, f"{call.op}: {name} was given, another array was returned"
        guard.assert_intact(f"{call.op}: {name}")
    for name, value in call.arrays.items():
        if name not in call.in_place:
            assert inputs[name].tobytes() == value.tobytes(), f"{call.op}: the input {name} was written"
    expected, bounds = expected_results(call, prior if accumulate else None)
    for name, value in expected.items():
        assert_close(f"{call.op}: {name}", results[name], value, bounds[name])
    return results
