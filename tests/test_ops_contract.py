"""One op set: each backend module, the reference and pyllmc.ops have the same functions with the same signatures."""

import importlib
import inspect

import cases
import pytest
import reference

from pyllmc import _ops


def signature(function):
    """Names, kinds and defaults of the parameters; annotations are free."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def public_functions(module):
    return {
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and not inspect.isclass(value)
    }


OP_SET = [*_ops.OPS, *_ops.MEMORY]


@pytest.mark.parametrize("name", OP_SET)
def test_signatures_of_isa_modules(cpu, name):
    assert signature(getattr(cpu, name)) == signature(getattr(reference, name))


@pytest.mark.parametrize("name", OP_SET)
@pytest.mark.parametrize("module", ["pyllmc._ops", "pyllmc.ops"])
def test_signatures_of_packages(module, name):
    assert signature(getattr(importlib.import_module(module), name)) == signature(getattr(reference, name))


@pytest.mark.parametrize("name", _ops.OPS)
def test_outputs_are_optional_and_keyword_only(name):
    for parameter in inspect.signature(getattr(_ops, name)).parameters.values():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            assert parameter.default is parameter.empty or (name, parameter.name) == ("matmul_forward", "bias")
        else:
            assert parameter.kind is parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", _ops.OPS)
def test_docstrings_state_the_equation(cpu, name):
    for module in (cpu, reference):
        doc = inspect.getdoc(getattr(module, name))
        assert doc and "=" in doc.split("\n\n")[0], f"{module.__name__}.{name} has no equation in its first paragraph"


@pytest.mark.parametrize("name", _ops.OPS)
def test_docstrings_state_types_errors_and_source(cpu, name):
    doc = inspect.getdoc(getattr(cpu, name))
    for word in ("float32", "ValueError", "Source"):
        assert word in doc, f"{name}: its docstring lacks {word}"


def test_the_op_set_is_one_list(cpu):
    threads_and_probes = set(_ops.CPU_ONLY) | {"limit_threads"}
    assert len(set(OP_SET)) == len(OP_SET)
    assert public_functions(reference) == set(OP_SET)
    assert public_functions(cpu) - threads_and_probes == set(OP_SET)
    assert set(cases.CASES) == set(cases.BUILDERS) == set(_ops.OPS)
    assert importlib.import_module("pyllmc.ops").__all__ == OP_SET


def test_every_case_gives_the_outputs_of_the_reference():
    for case in cases.ALL_CASES:
        call = cases.make(case)
        known = inspect.signature(getattr(reference, case.op)).parameters
        assert set(call.inputs) | set(call.outputs) <= set(known), str(case)
        assert call.flops >= 0 and call.num_bytes() > 0


@pytest.mark.parametrize(
    ("op", "sizes", "expected", "in_bfloat16"),
    [
        ("gelu_backward", {"shape": (10,)}, 3 * 40, 3 * 20),
        ("layernorm_forward", {"leading": (2,), "C": 8}, 2 * 64 + 2 * 32 + 2 * 8, 2 * 32 + 2 * 16 + 2 * 8),
        # Of the tables, only the rows that are looked up are read; all of the gradient is written.
        ("encoder_forward", {"B": 2, "T": 3, "C": 8, "V": 99, "maxT": 9}, 24 + 4 * (48 + 24 + 48), 24 + 2 * (120)),
        ("encoder_backward", {"B": 2, "T": 3, "C": 8, "V": 99, "maxT": 9}, 24 + 4 * (48 + 792 + 72), 24 + 2 * (912)),
        ("adamw_update", {"shape": (10,)}, 7 * 40, 3 * 20 + 4 * 40),
        ("adamw_update", {"shape": (10,), "master": True}, 8 * 40, 2 * 20 + 6 * 40),
    ],
    ids=str,
)
def test_what_must_be_moved_is_counted_once(op, sizes, expected, in_bfloat16):
    call = cases.make(cases.Case(op, tuple(sizes.items())))
    assert (call.num_bytes(), call.num_bytes(2)) == (expected, in_bfloat16)
