"""Fixtures that several test files share.

`cpu` is each ISA module of the CPU backend in turn: one that was built but that this processor cannot run shows up as
a skipped test with the reason, never as a silent pass.
"""

import importlib

import pytest


def pytest_generate_tests(metafunc):
    if "cpu" not in metafunc.fixturenames:
        return
    # Imported here, so that the tests which need no extension module also run where none was built.
    isa = importlib.import_module("pyllmc._ops.isa")
    parameters = []
    for name in isa.BUILT:
        marks = () if name in isa.AVAILABLE else pytest.mark.skip(reason=f"this processor cannot run {name}")
        parameters.append(pytest.param(name, marks=marks))
    metafunc.parametrize("cpu", parameters, indirect=True, scope="session")


@pytest.fixture(scope="session")
def cpu(request):
    """The op module of one ISA."""
    return importlib.import_module("pyllmc._ops.isa").load(request.param)
