"""Fixtures that several test files share.

`cpu` is each ISA module of the CPU backend in turn: one that was built but that this processor cannot run shows up as
a skipped test with the reason, never as a silent pass.
`op_set` is all of these and the device backends behind NumPy arrays (on_device.py), for what every backend has to do.
`device` is each device backend: the CUDA kernels compiled as plain C++ (shim.py), and on a GPU; where it is asked for,
their PTX on the CPU. `gpu` is each of them as what `--device cuda` finds; without it the programs compute on the CPU,
whatever this machine has.
`in_folder` and `in_folder_with_text` are where training runs are tried, `serve` is a server on this machine.
pytest's own option `--device cuda`, or `cuda_ptx`, runs what one device backend has to do, and fails where that cannot
run.
"""

import contextlib
import functools
import http.server
import importlib
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import shim
from on_device import OnDevice

DEVICES = (*shim.BACKENDS, "cuda")
os.environ["PYLLMC_DEVICE"] = "cpu"
# At the end: both folders have a compare.py.
sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))


def pytest_addoption(parser):
    parser.addoption("--device", choices=DEVICES, help="only the tests of this device backend, which has to be there")


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--device", None)
    if wanted is None:
        return
    of = [getattr(item, "callspec", None) for item in items]
    fixtures = ("device", "op_set", "gpu")
    chosen = [spec is not None and wanted in map(spec.params.get, fixtures) for spec in of]
    config.hook.pytest_deselected(items=[item for item, keep in zip(items, chosen) if not keep])
    items[:] = [item for item, keep in zip(items, chosen) if keep]


def pytest_configure(config):
    # A shell has Ctrl-C ignored by what it starts in the background, and nohup SIGHUP, and so by all that this starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    wanted = config.getoption("--device", None)
    if wanted and (reason := missing(wanted)):
        raise pytest.UsageError(f"--device {wanted}: {reason}")


def missing(name):
    """Why a device backend cannot run here, or "" where it can."""
    if name in shim.BACKENDS:
        return shim.missing(name)
    cuda = importlib.import_module("pyllmc._cuda")
    return "" if cuda.AVAILABLE else cuda.REASON


def devices_here(config):
    """Those that can run here, the PTX only where it is asked for. That no GPU can is told once, by a skipped test."""
    asked = ["cuda_ptx"] if config.getoption("--device", None) == "cuda_ptx" else []
    return ["cuda_shim", *asked, *([] if missing("cuda") else ["cuda"])]


def pytest_generate_tests(metafunc):
    here = devices_here(metafunc.config)
    for fixture, scope in (("device", "session"), ("gpu", "function")):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, here, indirect=True, scope=scope)
    for fixture, devices in (("cpu", ()), ("op_set", here)):
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
    """The module of ops of a device backend; the test is skipped, with the reason, where it cannot be compiled."""
    if name == "cuda":
        return importlib.import_module("pyllmc._cuda").module
    if reason := shim.missing(name):
        pytest.skip(reason)
    return shim.load(name)


@pytest.fixture(scope="session")
def device(request):
    """The op module of a device: its arrays are DeviceArrays."""
    return device_ops(request.param)


@pytest.fixture
def gpu(request, monkeypatch):
    """The module of ops of a device that programs find with --device cuda; without algorithms from before."""
    module = device_ops(request.param)
    cuda = importlib.import_module("pyllmc._cuda")
    monkeypatch.setattr(cuda, "AVAILABLE", True)
    monkeypatch.setattr(cuda, "op_set", functools.cache(module.op_set))
    before = module.product_options()
    module.use_algorithms(None)
    if request.param != "cuda":
        shim.Gpu(request.param).reset()  # as much memory is free as in any other test
    yield module
    module.product_options(**before)
    module.use_algorithms(None)


@pytest.fixture(scope="session")
def op_set(request):
    """The op set of a backend for float32 NumPy arrays."""
    if request.param in DEVICES:
        return OnDevice(device_ops(request.param))
    return importlib.import_module("pyllmc._ops.isa").load(request.param)


# ---- training runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def text():
    """A text from which there is something to learn, long enough for the smallest models."""
    return "".join(f"{number} bottles of ale are on the wall,\n" for number in range(60))


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """The test works in a folder of its own, on a machine whose peak is known: measuring takes longer than a run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pyllmc.hardware.peak_gflops", lambda seconds=0.2: 100.0)


@pytest.fixture
def in_folder_with_text(in_folder, text):
    """The same, with notes.txt in the folder."""
    Path("notes.txt").write_text(text)


# ---- the network -----------------------------------------------------------------------------------------------------


@pytest.fixture
def serve():
    """serve(respond) is a server, at its `address` until the test ends, that hands each request to `respond`, which
    calls `answer` of what it gets."""
    with contextlib.ExitStack() as ends:

        def start(respond):
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    respond(self)

                do_HEAD = do_GET

                def answer(self, status=200, body=b"", length=None, **headers):
                    """The head, with the body's length or the one that is given, and the body if it is asked for."""
                    self.send_response(status)
                    self.send_header("Content-Length", len(body) if length is None else length)
                    for name, value in headers.items():
                        self.send_header(name.replace("_", "-"), value)
                    self.end_headers()
                    if self.command == "GET":
                        self.wfile.write(body)
                        self.wfile.flush()
                    self.close_connection = True

                def log_message(self, *args):
                    pass

            server = ends.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            server.address = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            ends.callback(thread.join)
            ends.callback(server.shutdown)
            return server

        yield start
