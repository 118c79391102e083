"""Matrix products of the CUDA backend: what the library does and what it leaves to kernels give the same; which
algorithm is used is chosen by time, recorded and replayed; chunks of the classifier; what is said without a library.

The library is the stand-in of tests/cuda_shim, which refuses what it is told to and adds up in an order of its own for
each algorithm.
"""

import ctypes
import json
import os
import subprocess
import sys

import cases
import numpy as np
import pytest
import shim
from on_device import OnDevice
from test_cuda_ops import bf16, check

from pyllmc._cuda import libraries

BIAS, DGELU, BGRADB = 4, 64, 512  # bits of the library's epilogues
NONE = BIAS | DGELU | BGRADB
AS_INVALID, AT_THE_CALL = 1 << 31, 1 << 30  # they are refused as invalid values; after an algorithm was named
FUSED = {"C": 64, "OC": 40, "leading": (2, 24)}
AFTER = {
    "matmul_forward": [
        {"bias": bias, "residual": residual, "gelu": gelu}
        for bias in (True, False)
        for residual in (True, False)
        for gelu in (True, False)
    ],
    "matmul_backward": [{"bias": bias, "gelu": gelu} for bias in (True, False) for gelu in (True, False)],
}
COMBINATIONS = [cases.Case(op, tuple((FUSED | options).items())) for op, table in AFTER.items() for options in table]


class StandIn:
    """The controls of tests/cuda_shim/cublaslt.cpp."""

    def __init__(self, path):
        library = ctypes.CDLL(path)
        self.refuse, self.slow = library.shim_cublaslt_refuse, library.shim_cublaslt_slow
        self.version = library.shim_cublaslt_version
        self.version.argtypes = [ctypes.c_size_t]


@pytest.fixture
def cuda():
    """The kernels as plain C++, without products from before; options and controls are reset at the end."""
    if shim.compiler() is None:
        pytest.skip("no C++ compiler")
    module = shim.load()
    before = module.product_options()
    module.use_algorithms(None)
    yield module
    module.product_options(**before)
    stand_in = StandIn(module.__file__)
    stand_in.refuse(0)
    stand_in.slow(0)
    module.use_algorithms(None)


@pytest.fixture
def stand_in(cuda):
    return StandIn(cuda.__file__)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def kinds(cuda):
    return set(cuda.algorithms()["products"])


# ---- what is done after a product ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refused",
    [0, NONE, NONE | AS_INVALID, NONE | AT_THE_CALL],
    ids=["all", "none", "none is valid", "none at the call"],
)
@pytest.mark.parametrize("case", COMBINATIONS, ids=str)
def test_library_and_kernels_give_the_same(cuda, stand_in, case, refused):
    stand_in.refuse(refused)
    for dtype in ("float32", "bfloat16"):
        check(OnDevice(cuda, dtype), case)
        if case.op == "matmul_backward":
            check(OnDevice(cuda, dtype), case, accumulate=True)


@pytest.mark.parametrize(
    ("case", "after"),
    [
        (COMBINATIONS[0], ["bias"]),  # bias, residual, GELU
        (COMBINATIONS[1], ["add bias"]),  # bias, residual
        (COMBINATIONS[2], ["bias"]),  # bias, GELU
        (COMBINATIONS[6], [""]),  # GELU
        (COMBINATIONS[8], ["dgelu", "sum"]),
        (COMBINATIONS[11], ["", ""]),
    ],
    ids=str,
)
def test_bfloat16_leaves_to_the_library_what_it_can(cuda, case, after):
    check(OnDevice(cuda, "bfloat16"), case)
    assert sorted(kind.partition(" align")[0].split(" ", 5)[5:] for kind in kinds(cuda)) == sorted(
        [text] if text else [] for text in after
    )


def test_what_was_refused_at_the_call_is_not_asked_for_again(cuda, stand_in):
    stand_in.refuse(NONE | AT_THE_CALL)
    check(OnDevice(cuda, "bfloat16"), COMBINATIONS[0])
    stand_in.refuse(0)
    check(OnDevice(cuda, "bfloat16"), COMBINATIONS[0])
    assert not [kind for kind in kinds(cuda) if "bias" in kind]


def test_on_hopper_the_library_has_all_that_it_is_asked_for(gpu):
    """The real one too: what it lacks is computed by kernels, and takes longer, which nothing else would tell."""
    if gpu.device()["capability"] < 90:
        pytest.skip("before Hopper kernels do this")
    shapes = {"dout": (256, 64), "inp": (256, 128), "weight": (64, 128), "pre_gelu": (256, 128), "bias": (64,)}
    on = {name: gpu.from_host(random(*shape), dtype="bfloat16") for name, shape in shapes.items()}
    gpu.matmul_forward(on["inp"], on["weight"], on["bias"])
    gpu.matmul_backward(on["dout"], on["inp"], on["weight"], pre_gelu=on["pre_gelu"])
    after = [kind.partition(" align")[0].split()[-1] for kind in kinds(gpu)]
    assert sorted(after) == ["bias", "dgelu", "sum"]


def test_strict_float32_takes_gelu_and_sums_from_kernels(cuda):
    for case in (COMBINATIONS[2], COMBINATIONS[8]):
        check(OnDevice(cuda), case)
    assert not [kind for kind in kinds(cuda) if "gelu" in kind or "sum" in kind]


def test_gelu_s_slope_is_the_library_s_where_its_rows_are_of_eight(cuda):
    """Rows of pre_gelu have to be whole eights, in TF32 too, where four are 16 bytes."""
    cuda.product_options(tf32=True)
    for C, there in ((16, True), (12, False)):
        arrays = [cuda.from_host(random(*shape)) for shape in ((24, 8), (24, C), (8, C), (24, C))]
        cuda.use_algorithms(None)
        cuda.matmul_backward(*arrays[:3], pre_gelu=arrays[3])
        assert any(" dgelu" in kind for kind in kinds(cuda)) is there


@pytest.mark.parametrize("case", [COMBINATIONS[1], COMBINATIONS[8]], ids=str)
def test_what_is_done_after_a_product_is_done_before_it_is_rounded(cuda, stand_in, case):
    """Where k is split the library rounds first, so such algorithms are not chosen, however fast."""
    stand_in.slow(0b0101)
    cuda.product_options(autotune=True)
    check(OnDevice(cuda, "bfloat16"), case)
    split = {
        kind.partition(" align")[0].split()[-1]: int(digits[32:48], 16) % 2
        for kind, digits in cuda.algorithms()["products"].items()
    }
    assert split == ({"bias": 0} if case.op == "matmul_forward" else {"dgelu": 0, "sum": 1})


def test_bfloat16_gradients_are_rounded_once_for_each_time_they_are_added_to(cuda):
    """3 micro-steps: the third sum is what rounding to nearest makes of the second plus the product."""
    dout, inp, weight = bf16(random(16, 8)), bf16(random(16, 24, seed=1)), bf16(random(8, 24, seed=2))
    on_device = [cuda.from_host(x, dtype="bfloat16") for x in (dout, inp, weight)]
    dweight, expected = None, np.zeros((8, 24), np.float32)
    for _ in range(3):
        _, dweight, _ = cuda.matmul_backward(*on_device, bias=False, dweight=dweight, accumulate=True)
        expected = bf16((expected + dout.T.astype(np.float64) @ inp).astype(np.float32))
    np.testing.assert_array_equal(cuda.to_host(dweight), expected)


def test_tf32_is_an_option(cuda):
    inp, weight = random(32, 64), random(16, 64, seed=1)
    on_device = cuda.from_host(inp), cuda.from_host(weight)
    exact = inp.astype(np.float64) @ weight.T
    strict = np.abs(cuda.to_host(cuda.matmul_forward(*on_device)) - exact).max()
    assert cuda.product_options(tf32=True)["tf32"]
    loose = np.abs(cuda.to_host(cuda.matmul_forward(*on_device)) - exact).max()
    assert strict < 1e-5 < loose < 3e-2
    assert {kind[:4] for kind in kinds(cuda)} == {"fp32", "tf32"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("C", "OC"), [(64, 40), (24, 33), (7, 8)])
@pytest.mark.parametrize("refused", [0, BIAS])
def test_gelu_is_that_of_what_is_stored(cuda, stand_in, dtype, C, OC, refused):
    """Else recomputing it from there would give other bits."""
    stand_in.refuse(refused)
    inp, weight, bias = (cuda.from_host(random(*shape), dtype=dtype) for shape in ((48, C), (OC, C), (OC,)))
    out, pre_gelu = cuda.matmul_forward(inp, weight, bias, gelu=True)
    again = cuda.gelu_forward(pre_gelu)
    assert cuda.to_host(again).tobytes() == cuda.to_host(out).tobytes()


# ---- the classifier --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_chunks_give_what_one_gives(cuda, dtype, accumulate):
    """32 rows of 96 logits at once, of 77."""
    case = cases.Case("classifier_forward_backward", (("leading", (7, 11)), ("C", 16), ("V", 90), ("Vp", 96)))
    cuda.product_options(logits_bytes=32 * 96 * (4 if dtype == "float32" else 2))
    check(OnDevice(cuda, dtype), case, accumulate=accumulate)
    assert sum("x96x16 " in kind for kind in kinds(cuda)) == 2  # whole chunks and the last one
    check(OnDevice(cuda, dtype), cases.Case("classifier_forward", case.sizes))


def test_many_chunks_lose_no_precision_in_bfloat16(cuda):
    """dweight of 64 chunks is as near to the truth as that of one: its sums are float32."""
    inp, weight = bf16(random(1024, 8)), bf16(random(40, 8, seed=1))
    targets = np.arange(1024, dtype=np.int32) % 40
    arrays = [cuda.from_host(x, dtype="bfloat16") for x in (inp, weight)]
    results = []
    for chunk_rows in (1024, 16):
        cuda.product_options(logits_bytes=chunk_rows * 40 * 2)
        _, _, dweight = cuda.classifier_forward_backward(*arrays, cuda.from_host(targets))
        results.append(cuda.to_host(dweight))
    np.testing.assert_allclose(results[1], results[0], rtol=2**-7, atol=1e-6)
    assert (results[0] == results[1]).mean() > 0.9


def test_no_target_counts(cuda):
    arrays = [cuda.from_host(random(6, 8)), cuda.from_host(random(20, 8, seed=1))]
    targets = cuda.from_host(np.full(6, -1, np.int32))
    for result in cuda.classifier_forward_backward(*arrays, targets):
        assert not cuda.to_host(result).any()


def test_a_target_that_was_not_checked_gives_nan_and_stays_in_memory(cuda):
    """On the device nobody looks at targets: here 4096, of 20 columns."""
    arrays = [cuda.from_host(random(2, 8)), cuda.from_host(random(20, 8, seed=1))]
    targets = cuda.zeros((2,), "int32")
    cuda.from_host(cuda.from_host(np.array([4096, 3], np.int32)), out=targets)
    targets = targets[0:2]  # a view, of whose values nothing is known
    losses, dinp, _ = map(cuda.to_host, cuda.classifier_forward_backward(*arrays, targets))
    assert np.isnan(losses[0]) and np.isfinite(losses[1]) and np.isfinite(dinp).all()


@pytest.mark.parametrize("V", [24_449, 24_576])
def test_rows_that_fill_what_a_block_has_without_asking(cuda, V):
    """48 KiB of logits and, beside them, what the sums over a block take."""
    Vp = -(-V // 8) * 8
    sizes = ("leading", (2,)), ("C", 8), ("V", V), ("Vp", Vp)
    check(OnDevice(cuda, "bfloat16"), cases.Case("classifier_forward_backward", sizes))


def test_rows_too_long_for_shared_memory(cuda):
    case = cases.Case("classifier_forward_backward", (("leading", (3,)), ("C", 8), ("V", 30001), ("Vp", 30016)))
    check(OnDevice(cuda), case)  # 120 KB; in bfloat16 they fit
    check(OnDevice(cuda, "bfloat16"), case)


# ---- algorithms ------------------------------------------------------------------------------------------------------


def product(cuda, seed=0):
    inp, weight = cuda.from_host(random(48, 512, seed=seed)), cuda.from_host(random(24, 512, seed=seed + 1))
    return cuda.to_host(cuda.matmul_forward(inp, weight)).tobytes()


def number(cuda):
    """Which of the stand-in's algorithms the only product uses."""
    (digits,) = cuda.algorithms()["products"].values()
    return int(digits[32:48], 16)


def test_the_librarys_first_choice_is_the_default(cuda):
    product(cuda)
    assert number(cuda) == 0


def test_timing_finds_the_fastest(cuda, stand_in):
    first = product(cuda)
    cuda.use_algorithms(None)
    cuda.product_options(autotune=True)
    stand_in.slow(0b1011)
    assert product(cuda) != first
    assert number(cuda) == 2


def test_timing_leaves_the_results_alone(cuda):
    """What is added to is added to once, however many times the product was timed."""
    cuda.product_options(autotune=True)
    for case in COMBINATIONS:
        check(OnDevice(cuda, "bfloat16"), case)
        if case.op == "matmul_backward":
            check(OnDevice(cuda, "bfloat16"), case, accumulate=True)


def test_timing_keeps_no_memory(cuda):
    """What a trial writes is as large as a product: kept, it would be missing where a batch just fits."""
    inp, weight = cuda.zeros((4096, 8)), cuda.zeros((512, 8))
    out = cuda.empty((4096, 512))
    cuda.release_cache()
    before = cuda.device()
    cuda.product_options(autotune=True)
    cuda.matmul_forward(inp, weight, out=out)
    after = cuda.device()
    assert (after["cached"], after["free"]) == (before["cached"], before["free"])


def test_a_recorded_choice_gives_the_same_bits(cuda, stand_in):
    cuda.product_options(autotune=True)
    stand_in.slow(0b0111)
    before = product(cuda)
    table = json.loads(json.dumps(cuda.algorithms()))
    stand_in.slow(0b1000)  # now timing would choose another one
    cuda.use_algorithms(table)
    assert cuda.algorithms() == table  # before any product too, so that it can be recorded again
    assert product(cuda) == before
    assert cuda.algorithms() == table
    cuda.use_algorithms(None)
    assert product(cuda) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"library": "cuBLASLt 12.9.1"}, "recorded with library cuBLASLt 12.9.1, this is cuBLASLt 13.1.1"),
        ({"device": "NVIDIA H200"}, "recorded with device NVIDIA H200, this is no GPU"),
        ({"products": {"fp32": "12"}}, 'the algorithm of "fp32" must be 128 hexadecimal digits'),
        ({"products": {"fp32": "g" * 128}}, 'the algorithm of "fp32" must be 128 hexadecimal digits'),
        ({"products": {"fp32": 3}}, "products must map names to digits"),
        ({"products": None}, "a table as from"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(cuda, change, message):
    with pytest.raises(ValueError, match=message):
        cuda.use_algorithms(cuda.algorithms() | change)
    product(cuda)


def test_a_damaged_algorithm_is_refused_by_the_product_that_meets_it(cuda):
    product(cuda)
    table = cuda.algorithms()
    (kind,) = table["products"]
    cuda.use_algorithms(table | {"products": {kind: "0" * 128}})
    with pytest.raises(ValueError, match=f"the recorded algorithm of the product {kind} is damaged"):
        product(cuda)


# ---- the library -----------------------------------------------------------------------------------------------------


def test_a_missing_library_is_named_with_what_to_install(cuda, tmp_path):
    broken = tmp_path / "libcublasLt.so.13"
    broken.write_bytes(b"not a library")
    with pytest.raises(OSError, match="cuBLASLt 12.4 or newer was not found") as error:
        cuda._open_cublaslt([str(broken), "libcublasLt.so.99"])
    text = str(error.value)
    assert str(broken) in text and "libcublasLt.so.99" in text and "\n" not in text
    assert "to install it: pip install nvidia-cublas" in text


def test_without_the_library_there_is_no_backend():
    """In a process of its own: this one has opened it."""
    if shim.compiler() is None:
        pytest.skip("no C++ compiler")
    code = """
import shim
cuda = shim.load()
cuda._find_cublaslt = lambda: ["/nowhere/libcublasLt.so.13"]
print(cuda.why_unavailable())
try:
    cuda.matmul_forward(cuda.zeros((2, 3)), cuda.zeros((4, 3)))
except OSError as error:
    print(error)
"""
    command, path = [sys.executable, "-c", code], os.pathsep.join(sys.path)
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    first, second = done.stdout.splitlines()
    assert first == second and first.startswith("cuBLASLt 12.4 or newer was not found in "), done.stderr
    assert "/nowhere/libcublasLt.so.13: cannot open" in first


def test_an_old_library_is_refused(cuda, stand_in):
    stand_in.version(120302)
    try:
        with pytest.raises(OSError, match="is version 12.3.2, too old"):
            cuda._open_cublaslt([cuda.__file__])
    finally:
        stand_in.version(130101)


def test_a_file_that_is_no_cublaslt_is_refused(cuda):
    with pytest.raises(OSError, match="_ctypes.* has no cublasLtGetVersion"):
        cuda._open_cublaslt([__import__("_ctypes").__file__])


def test_wheels_come_before_toolkits(monkeypatch, tmp_path):
    files = [
        tmp_path / "nvidia" / "cu13" / "lib" / "libcublasLt.so.13",
        tmp_path / "cuda" / "lib64" / "libcublasLt.so.12",
    ]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    monkeypatch.setattr(libraries, "_wheel_folders", lambda: [tmp_path / "nvidia"])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    found = libraries.cublaslt()
    assert found[:2] == list(map(str, files))
    assert found[-2:] == ["libcublasLt.so.13", "libcublasLt.so.12"]


def test_wheels_are_found_where_python_imports_from(monkeypatch, tmp_path):
    (tmp_path / "nvidia" / "cublas" / "lib").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tmp_path / "nvidia" in libraries._wheel_folders()
