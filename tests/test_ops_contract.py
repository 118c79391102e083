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
        assert call.flops >= 0 and call.bytes > 0
