"""Fixtures that several test files share.

`cpu` is each ISA module of the CPU backend in turn: one that was built but that this processor cannot run shows up as
a skipped test with the reason, never as a silent pass.
`op_set` is all of these and the device backends behind NumPy arrays (on_device.py), for what every backend has to do.
`device` is each device backend: the CUDA kernels compiled as plain C++ (shim.py), and on a GPU.
"""

import importlib

import pytest
import shim
from on_device import OnDevice

DEVICES = ("cuda_shim", "cuda")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES, indirect=True, scope="session")
    for fixture, devices in (("cpu", ()), ("op_set", DEVICES)):
        if fixture not in metafunc.fixturenames:
            continue
        # Imported here, so that the tests which need no extension module also run where none was built.
        isa = importlib.import_module("pyllmc._ops.isa")
        parameters = []
        for name in isa.BUILT:
            marks = () if name in isa.AVAILABLE else pytest.mark.skip(reason=f"this processor cannot run {name}")
            parameters.append(pytest.param(name, marks=marks))
        metafunc.parametrize(fixture, [*parameters, *devices], indirect=True, scope="session")


@pytest.fixture(scope="session")
def cpu(request):
    """The op module of one ISA."""
    return importlib.import_module("pyllmc._ops.isa").load(request.param)


def device_ops(name):
    """The module of ops of a device backend; the test is skipped, with the reason, where it cannot run."""
    if name == "cuda_shim":
        if shim.compiler() is None:
            pytest.skip("no C++ compiler")
        return shim.load()
    cuda = importlib.import_module("pyllmc._cuda")
    if not cuda.AVAILABLE:
        pytest.skip(cuda.REASON)
    return cuda.module


@pytest.fixture(scope="session")
def device(request):
    """The op module of a device: its arrays are DeviceArrays."""
    return device_ops(request.param)


@pytest.fixture(scope="session")
def op_set(request):
    """The op set of a backend for float32 NumPy arrays."""
    if request.param in DEVICES:
        return OnDevice(device_ops(request.param))
    return importlib.import_module("pyllmc._ops.isa").load(request.param)
