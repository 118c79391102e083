"""The machine that runs the kernels' PTX (cuda_ptx) notices what is wrong, and counts what is done.

That the kernels themselves are right on it: `python -m pytest --device cuda_ptx`, and test_cuda_kernels.py.
"""

import ctypes
import re

import numpy as np
import ptx_counts
import pytest
import shim
from on_device import OnDevice

STEP = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
ORDER = "with nothing that orders them"
# The kernels of cuda_ptx/faults.cu, and what has to be said of them.
FAULTS = {
    "outside": r"faults\.cu:13: outside: address 0x\w+ is outside of all memory of the device; block [01] 0, warp 1, ",
    "misaligned": r"address 0x\w+ is no multiple of 16; .*: st\.global\.v4\.f32",
    "outside_shared": "shared address 256 is outside the block's 256 bytes",
    "unwritten": "nobody wrote what is read at shared address 0",
    "between_warps": "nobody wrote what is read",
    "within_a_warp": f"a write and a read {ORDER}: shared address",
    "overwritten": f"a write and a read {ORDER}: shared address",
    "same_memory": f"two writes {ORDER}: address",
    "between_blocks": rf"a write and a read {ORDER}: address 0x\w+, thread \d+ of block [01] and",
    "read_by_another_block": f"(reads of several blocks|a read) and a write {ORDER}: address",
    "flag": "^$",
    "flag_before_the_barrier": f"a write and a read {ORDER}: address",
    "flag_without_a_barrier": f"(a write and a read|two writes) {ORDER}: address",
    "copy_not_waited_for": r"an asynchronous copy to shared address \d+ was not waited for",
    "copy_of_another_thread": f"a write and a read {ORDER}: shared address",
    "copy_left_behind": "a thread ends with copies that it did not wait for",
    "odd_rows": r"mma\.cuh:\d+, called from faults\.cu:\d+: odd_rows: shared address 18 is no multiple of 16",
    "lanes_missing": "not every lane of a warp comes here",
    "condition_of_a_barrier": "a condition that not all lanes share",
    "threads_missing": "not every thread of a block comes to a barrier",
    "for_ever": "for_ever: waits for ever",
    "few_threads": "few_threads: more threads than its __launch_bounds__",
    "too_many_threads": "invalid configuration argument",
    "too_much_shared": "more dynamic shared memory than the kernel was allowed",
}


@pytest.fixture(scope="module")
def machine():
    """The module of ops whose kernels are PTX."""
    if reason := shim.missing("cuda_ptx"):
        pytest.skip(reason)
    return shim.load("cuda_ptx")


@pytest.fixture
def barriers(machine):
    control = shim.Barriers("cuda_ptx")
    control.met()
    yield control
    control.skip()
    control.reverse(False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told(machine, barriers, name, reverse):
    library, text = ctypes.CDLL(machine.__file__), ctypes.create_string_buffer(1000)
    barriers.reverse(reverse)
    assert library.faults_run(name.encode(), text, len(text)) == 0
    assert re.search(FAULTS[name], text.value.decode()), text.value.decode()


def test_no_fault_is_left_untried():
    table = re.findall(r'^    {"(\w+)", ', (shim.MACHINE / "faults.cu").read_text(), re.MULTILINE)
    assert table == list(FAULTS)


def test_an_op_tells_the_kernel_and_the_line(machine, barriers):
    losses = machine.from_host(np.ones(5000, np.float32)), machine.from_host(np.zeros(5000, np.int32))
    machine.mean_loss(*losses)
    (file, line), *_ = barriers.met()
    barriers.skip(file, line)
    with pytest.raises(RuntimeError, match=rf"kernel launch: {file}:\d+.*mean_kernel: .* block 0 0, warp \d+, PTX"):
        machine.mean_loss(*losses)
    barriers.skip()
    assert machine.to_host(machine.mean_loss(*losses)) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_has_the_same_bits_in_vectors_and_alone(machine, dtype):
    """Parts of an array start anywhere, and another kernel may not be compiled to another sum."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.random(20_000, np.float32) for name in ("param", "grad", "m", "v")}
    if dtype == "bfloat16":
        arrays["master"] = arrays["param"].copy()
    results = []
    for shift in (0, 1):
        these = {name: array.copy() for name, array in arrays.items()}
        OnDevice(machine, dtype, shift).adamw_update(**these, **STEP)
        results.append({name: array.tobytes() for name, array in these.items()})
    assert results[0] == results[1] and results[0]["v"] != arrays["v"].tobytes()


# ---- what is counted -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def count(machine):
    return ptx_counts.count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_counts_are_those_of_the_arrays(count, dtype):
    """GELU reads and writes each element once, sixteen bytes a lane."""
    (kernel,), (rows,) = zip(*count("gelu_forward", dtype).items(), strict=True)
    elements, width = 64 * 768, 4 if dtype == "float32" else 2
    assert kernel.unique * 1024 == 2 * elements * width
    assert kernel.asked == kernel.again == 1
    moves = [row for row in rows if row.sectors]
    assert [row.instruction[:3] for row in moves] == ["ld.", "st."]
    assert all(row.lanes * 16 == row.bytes == elements * width for row in moves)


@pytest.mark.parametrize("op", ["encoder_forward", "layernorm_forward", "gelu_backward", "softmax_backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_moved_sixteen_bytes_at_a_time(count, op, dtype):
    """However nvcc compiles a vector."""
    for rows in count(op, dtype).values():
        narrow = [row for row in rows if ".v4" not in row.instruction]
        assert sum(row.sectors for row in narrow) < sum(row.sectors for row in rows) / 20, narrow


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_moves_whole_sectors(count, dtype):
    """In bfloat16 too, where m, v and the masters are twice as wide as the parameters."""
    (kernel,) = count("adamw_update", dtype)
    assert kernel.asked >= 1


@pytest.mark.parametrize("op, most", [("softmax_forward", 55), ("crossentropy_forward", 44), ("gelu_backward", 30)])
def test_an_element_takes_few_instructions(count, op, most):
    """An H200 has time for 7 of them while its memory moves a byte. Of rows as long as GPT-2's vocabulary softmax takes
    less than half of these; here the sums over a block weigh more."""
    (kernel,) = count(op, "bfloat16")
    elements = 64 * 768 if op == "gelu_backward" else 2 * 128 * 1000
    assert kernel.warps * 32 / elements < most


def test_attention_does_no_more_than_it_has_to(count):
    """Tensor cores skip the tiles above the diagonal, rows of a tile lie in different banks."""
    forward = next(kernel for kernel in count("attention_forward", "bfloat16") if kernel.mma)
    backward = next(kernel for kernel in count("attention_backward", "bfloat16") if kernel.mma)
    assert forward.conflicts == 1 and backward.conflicts < 1.01
    heads, T, HS = 2 * 12, 128, 64
    square = T * T * HS // (16 * 8 * 16) * heads  # of one product of all rows and columns
    assert square < forward.mma <= 2 * square and 2.5 * square < backward.mma <= 5 * square


def test_the_table_is_printed(machine, capsys):
    ptx_counts.main(["softmax_forward"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("op, kernel") and len([line for line in lines if line.startswith("softmax_forward")]) == 2


def test_nothing_is_counted_unless_asked(machine):
    counts = ptx_counts.Counts()
    OnDevice(machine).gelu_forward(np.ones(100, np.float32))
    assert counts.rows() == []
