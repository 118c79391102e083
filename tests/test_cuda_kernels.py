"""What a GPU would not show every time: that each barrier is needed, and the same bits in any order of threads."""

import faulthandler
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import cases
import numpy as np
import pytest
import shim
import smallest
from on_device import OnDevice
from test_cuda_ops import check, some

from pyllmc import _cuda

# A barrier whose absence no case can show, with the reason. None so far.
UNNOTICED = {}


@pytest.fixture(params=shim.BACKENDS, scope="module")
def built(request):
    """The kernels as plain C++, and as PTX."""
    if reason := shim.missing(request.param):
        pytest.skip(reason)
    return shim.load(request.param)


@pytest.fixture
def barriers(built):
    control = shim.Barriers(shim.backend_of(built))
    control.met()
    yield control
    control.skip()
    control.reverse(False)


def small(op, most=8000):
    """The larger half of the cases, as far as they are quick: several warps and several blocks take part."""
    sizes = {case: sum(array.size for array in cases.make(case).arrays.values()) for case in cases.CASES[op]}
    chosen = sorted((case for case in sizes if sizes[case] <= most), key=sizes.get)
    return chosen[len(chosen) // 2 :]


def goes_wrong(device, barriers, table):
    """Whether a case differs from the reference, for one order of threads or the other."""
    for reverse in (False, True):
        barriers.reverse(reverse)
        for case in table:
            try:
                check(device, case)
            except (AssertionError, RuntimeError):
                barriers.reverse(False)
                return True
    barriers.reverse(False)
    return False


def goes_wrong_in_a_child(*arguments):
    """The same, where a wild address ends another process than this one."""
    with warnings.catch_warnings(action="ignore"):  # Python warns of a fork in a process with threads
        child = os.fork()
    if child == 0:
        faulthandler.disable()
        os._exit(goes_wrong(*arguments))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def test_a_barrier_left_out_is_noticed(built, barriers):
    unnoticed, seen = set(), set()
    for op in cases.CASES:
        if not hasattr(built, op):
            continue
        for dtype in ("float32", "bfloat16"):
            device, table = OnDevice(built, dtype), [*cases.CASES[op][-3:], *small(op)]
            barriers.met()
            assert not goes_wrong(device, barriers, table), f"{op} fails with all barriers"
            for site in set(barriers.met()) - seen:
                barriers.skip(*site)
                noticed = goes_wrong_in_a_child(device, barriers, table)
                barriers.skip()
                (seen if noticed else unnoticed).add(site)
    assert len(seen) > 5
    assert unnoticed - seen == UNNOTICED.keys()


@pytest.mark.parametrize(("error", "told"), [(2, MemoryError), (9, RuntimeError)], ids=["out of memory", "another"])
def test_a_launch_that_fails_is_told_once_and_as_what_it_is(built, barriers, error, told):
    """A kernel's code is loaded at its first launch, which takes memory."""
    array = built.zeros((5,))
    barriers.library.shim_fail(error)
    with pytest.raises(told, match=r"(out of GPU memory: )?gelu.cu:\d+: kernel launch: "):
        built.gelu_forward(array)
    assert not built.to_host(built.gelu_forward(array)).any()


def test_memory_of_another_library_is_given_back_when_the_ops_are_done():
    """Its stream may use it for something else at once."""
    if reason := shim.missing("cuda_shim"):
        pytest.skip(reason)
    built, gpu = shim.load(), shim.Gpu()
    array = built.from_dlpack(np.ones(3, np.float32))  # which are as good as a device's there
    built.gelu_forward(array)
    gpu.waits()
    view = array[1:]
    del array
    assert gpu.waits() == 0
    del view
    assert gpu.waits() == 1


@pytest.mark.parametrize("op", cases.CASES)
def test_any_order_of_threads_gives_the_same_bits(built, barriers, op):
    device = OnDevice(built)
    for case in some(op, 2):
        results = []
        for reverse in (False, True):
            barriers.reverse(reverse)
            call = cases.make(case)
            returned = getattr(device, op)(**call.inputs)
            arrays = returned if isinstance(returned, tuple) else [returned] if returned is not None else []
            arrays = [*(a for a in arrays if a is not None), *(call.inputs[name] for name in call.in_place)]
            results.append([np.asarray(array).tobytes() for array in arrays])
        assert results[0] == results[1], str(case)


@pytest.mark.slow
def test_sanitizers_find_nothing():
    """All cases again, in a process in which AddressSanitizer and UndefinedBehaviorSanitizer watch."""
    if reason := shim.missing("cuda_shim"):
        pytest.skip(reason)
    find = [*shim.compiler(), "-print-file-name=libasan.so"], [*shim.compiler(), "-print-file-name=libubsan.so"]
    paths = [subprocess.check_output(command, text=True).strip() for command in find]
    if not all(map(os.path.isabs, paths)):
        pytest.skip("the compiler has no sanitizers")
    here = {"cwd": Path(__file__).parent, "text": True, "check": False, "stderr": subprocess.STDOUT}
    sanitize = os.environ | {"PYLLMC_SANITIZE": "address,undefined", "OMP_NUM_THREADS": "1"}
    watched = sanitize | {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}
    # The compiler itself is not to be watched, so it comes first.
    commands = [(["-c", "import shim; shim.build()"], sanitize)]
    commands += [
        (["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_cuda_ops.py", "-k", "cuda_shim"], watched)
    ]
    for words, environment in commands:
        done = subprocess.run([sys.executable, *words], **here, env=environment, stdout=subprocess.PIPE)
        assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


# ---- what bench/gpu_check.sh runs ------------------------------------------------------------------------------------


def test_the_smallest_cases_run(gpu, capsys):
    """Under compute-sanitizer on a GPU; here so that they cannot rot."""
    runpy.run_path(smallest.__file__, run_name="__main__")
    assert capsys.readouterr().out.endswith(f"{len(cases.CASES)} ops ran on {gpu.device()['name']}\n")
    for op in cases.CASES:
        few, more, *_ = (cases.make(case).num_bytes() for case in smallest.chosen(op))
        assert few < more
    sizes = [dict(case.sizes) for case in smallest.chosen("attention_backward")]
    # Blocks that wait for each other, of each of the kernels.
    assert {each["HS"] for each in sizes if each["T"] > 128} == {32, 64, 96, 128}
    assert all(dict(case.sizes).get("C", 8) % 8 == 0 for case in smallest.STEP)


def pytest_with(*options):
    environment = os.environ | {"PYTHONPATH": str(shim.ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", *options]
    files = [str(shim.ROOT / "tests" / name) for name in ("test_cuda_arrays.py", "test_ops.py")]
    return subprocess.run([*command, *files], env=environment, cwd=shim.ROOT, capture_output=True, text=True)


def test_a_device_is_tested_alone_where_it_is_asked_for():
    done = pytest_with("--device", "cuda_shim")
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert {test.partition("::")[0] for test in tests} == {"tests/test_cuda_arrays.py", "tests/test_ops.py"}
    assert all("cuda_shim" in test for test in tests)


def test_a_device_that_is_asked_for_has_to_be_there():
    if _cuda.AVAILABLE:
        pytest.skip("there is a GPU")
    done = pytest_with("--device", "cuda")
    assert done.returncode == 4 and f"ERROR: --device cuda: {_cuda.REASON}" in done.stderr


@pytest.mark.parametrize("backend", shim.BACKENDS)
def test_a_backend_that_is_asked_for_has_to_be_compiled(backend, monkeypatch):
    """Else all its tests would be skipped, and nothing fail."""
    monkeypatch.setenv("CXX", "none")
    done = pytest_with("--device", backend)
    assert done.returncode == 4 and f"ERROR: --device {backend}: no C++ compiler" in done.stderr
