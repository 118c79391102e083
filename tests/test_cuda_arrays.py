"""DeviceArray, and what the op set of a device promises beside its numbers: signatures, errors, memory."""

import inspect
import re
from types import SimpleNamespace

import cases
import numpy as np
import pytest
import reference
from on_device import OnDevice

from pyllmc import _ops
from pyllmc.config import GPT2Config
from pyllmc.tensors import views


def signature(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", [*_ops.OPS, *_ops.MEMORY])
def test_signatures_are_those_of_every_backend(device, name):
    assert signature(getattr(device, name)) == signature(getattr(reference, name))


@pytest.mark.parametrize("name", _ops.OPS)
def test_docstrings_state_equation_types_errors_and_source(device, name):
    doc = inspect.getdoc(getattr(device, name))
    assert "=" in doc.split("\n\n")[0]
    for word in ("float32", "bfloat16", "ValueError", "Source"):
        assert word in doc or (name == "mean_loss" and word == "bfloat16"), f"{name}: its docstring lacks {word}"


# ---- arrays ----------------------------------------------------------------------------------------------------------


def test_values_come_back_as_they_went(device):
    for host in (np.arange(12, dtype=np.float32).reshape(3, 4), np.int32(7), np.zeros((0, 3), np.float32)):
        array = device.from_host(host)
        assert array.shape == np.shape(host) and array.dtype == np.asarray(host).dtype.name
        np.testing.assert_array_equal(device.to_host(array), host)
    strided = np.arange(12.0).reshape(3, 4).T
    np.testing.assert_array_equal(device.to_host(device.from_host(strided)), strided)
    large = np.random.default_rng(0).standard_normal(600_001, dtype=np.float32)  # more than one pinned slot
    np.testing.assert_array_equal(device.to_host(device.from_host(large)), large)
    huge = (np.arange(5_000_001) % 251).astype(np.float32)  # more than is cast at a time
    for dtype in ("float32", "bfloat16"):
        np.testing.assert_array_equal(device.to_host(device.from_host(huge, dtype=dtype)), huge)
    many = [device.from_host(np.full(1000, i, np.float32)) for i in range(20)]  # more than there are slots
    assert [float(array[999]) for array in many] == list(range(20))


def test_bfloat16_is_rounded_to_nearest_even(device):
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0xFF800000, 0x00008000], np.uint32)
    expected = np.array([0x3F80, 0x3F82, 0x3F81, 0x3F80, 0x7F80, 0xFF80, 0x0000], np.uint32) << 16
    array = device.from_host(bits.view(np.float32), dtype="bfloat16")
    assert array.dtype == "bfloat16" and array.nbytes == 14
    np.testing.assert_array_equal(device.to_host(array).view(np.uint32), expected)
    assert np.isnan(device.to_host(device.from_host([np.nan], dtype="bfloat16"))).all()


def test_slices_and_shapes_share_memory(device):
    array = device.from_host(np.arange(24, dtype=np.float32).reshape(4, 6))
    host = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view, expected in [
        (array[1], host[1]), (array[-1], host[-1]), (array[1:3], host[1:3]), (array[2:2], host[2:2]),
        (array[:2], host[:2]), (array[1:].reshape(-1), host[1:].reshape(-1)), (array[1][2], host[1][2]),
        (array.reshape((2, 2, 6))[1], host[2:]), (array.reshape(24)[5:9], host.reshape(24)[5:9]),
        (array[np.int64(-3)], host[1]), (array.reshape(np.int64(24)), host.reshape(24)),
    ]:  # fmt: skip
        assert view.shape == expected.shape
        np.testing.assert_array_equal(device.to_host(view), expected)
    device.from_host(np.zeros(6, np.float32), out=array[2])
    host[2] = 0
    np.testing.assert_array_equal(device.to_host(array), host)
    array *= 3
    np.testing.assert_array_equal(device.to_host(array), 3 * host)
    assert len(array) == 4 and array.size == 24 and array.ndim == 2 and float(array[0][1]) == 3.0
    for wrong in (lambda: array[4], lambda: array[::2], lambda: array[0, 1], lambda: array[0][0][0]):
        with pytest.raises(IndexError):
            wrong()
    with pytest.raises(ValueError, match=r"shape \(4, 6\) cannot be reshaped to \(5, 5\)"):
        array.reshape(5, 5)
    with pytest.raises(TypeError, match="to_host"):
        np.asarray(array)


def test_a_model_s_parameters_are_cut_from_one_array(device):
    config = GPT2Config(num_layers=2, num_heads=2, channels=8, vocab_size=11, max_seq_len=5)
    flat = np.arange(config.num_parameters_padded, dtype=np.float32)
    on_device, on_host = views(device.from_host(flat), config), views(flat, config)
    for name, array in on_host.items():
        np.testing.assert_array_equal(device.to_host(on_device[name]), array)


def test_from_host_checks_values_before_the_copy(device):
    for wrong in (5, -1, -2):
        with pytest.raises(ValueError, match=rf"^from_host: (?=.*\[0, 1\]).* {wrong} "):
            device.from_host([[0, wrong]], limit=5)
    tokens = device.from_host([[0, 6], [1, 2]])
    with pytest.raises(ValueError, match=r"^from_host: value 6 at \[0, 1\]"):
        device.from_host(tokens, limit=5)
    assert device.from_host(tokens, limit=7) is tokens
    with pytest.raises(ValueError, match="from_host: values from .* do not fit int32"):
        device.from_host([2**31])
    with pytest.raises(ValueError, match="float32, bfloat16 or int32"):
        device.from_host([1.0], dtype="float16")


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_out_of_memory_says_how_much_and_leaves_the_rest_usable(device):
    kept = device.from_host(np.arange(5, dtype=np.float32))
    text = r"out of GPU memory: [\d.]+ MiB were asked for, [\d.]+ MiB of [\d.]+ MiB are free"
    with pytest.raises(MemoryError, match=text):
        device.empty((1 << 45,))
    with pytest.raises(MemoryError):
        device.empty((1 << 62, 1 << 62))
    np.testing.assert_array_equal(device.to_host(kept), np.arange(5))
    assert device.zeros((3,)).shape == (3,)


def test_freed_memory_is_used_again(device):
    device.empty((1 << 20,))
    before = device.device()
    for _ in range(10):
        device.empty((1 << 20,))
    assert device.device()["free"] == before["free"] and before["cached"] >= 4 << 20
    device.release_cache()
    after = device.device()
    assert after["cached"] == 0 and after["free"] >= before["free"] + (4 << 20)


def test_host_arrays_are_refused(device):
    host = np.zeros((2, 3), np.float32)
    for op, arguments in (("gelu_forward", [host]), ("residual_forward", [device.from_host(host), host])):
        with pytest.raises(ValueError, match=rf"^{op}: .* must be a DeviceArray.*, got ndarray"):
            getattr(device, op)(*arguments)


def arguments_of(device, op):
    """The arguments of an op's smallest case of several rows, on the device, with outputs."""
    several = (call for call in map(cases.make, cases.CASES[op]) if all(a.size > 1 for a in call.arrays.values()))
    call = next(several)
    adapter = OnDevice(device)
    outputs = {name: np.full(shape, np.nan, np.float32) for name, shape in call.outputs.items()}
    arguments = call.inputs | outputs
    for name, value in arguments.items():
        if isinstance(value, np.ndarray):
            arguments[name] = device.from_host(value, dtype=adapter.element_type(op, name, value))
    return call, arguments


SHAPE_ONLY = {("encoder_backward", "wte"), ("encoder_backward", "wpe")}


@pytest.mark.parametrize("op", _ops.OPS)
def test_wrong_arrays_are_named_and_nothing_is_written(device, op):
    call, good = arguments_of(device, op)
    for name in [*call.arrays, *call.outputs]:
        array = good[name]
        shape = array.shape
        wrong = [device.empty((0, *shape[1:]), array.dtype), np.zeros(shape, np.float32)]
        if (op, name) not in SHAPE_ONLY:
            wrong.append(device.zeros(shape, "int32" if array.dtype == "float32" else "float32"))
            wrong += [device.zeros((*shape, 2), array.dtype)] if op != "global_norm" or name == "out" else []
        for value in wrong:
            arguments = good | {name: value}
            before = {n: device.to_host(a).tobytes() for n, a in arguments.items() if type(a) is type(array)}
            with pytest.raises(ValueError, match=rf"^{op}: ") as caught:
                getattr(device, op)(**arguments)
            assert "\n" not in str(caught.value)
            for n, bits in before.items():
                assert device.to_host(arguments[n]).tobytes() == bits, f"{op} wrote {n} before it raised"


@pytest.mark.parametrize("op", _ops.OPS)
def test_overlap_is_refused(device, op):
    call, good = arguments_of(device, op)
    for output in [*call.outputs, *call.in_place]:
        for other in good.keys() - {output}:
            a, b = good[other], good[output]
            if isinstance(a, (int, float, bool)) or a.dtype != b.dtype or (op, other) in SHAPE_ONLY:
                continue
            buffer = device.zeros((a.size + b.size,), a.dtype)
            later = buffer[a.size - 1 : a.size - 1 + b.size]
            shared = {other: buffer[: a.size].reshape(a.shape), output: later.reshape(b.shape)}
            with pytest.raises(ValueError, match=rf"^{op}: \w+ overlaps \w+ in memory"):
                getattr(device, op)(**good | shared)


def test_tokens_out_of_range(device):
    wte, wpe = device.zeros((5, 8)), device.zeros((4, 8))
    with pytest.raises(ValueError, match=re.escape("encoder_forward: tokens[1, 2] is 5, but must lie in 0..4")):
        device.encoder_forward(device.from_host([[0, 1, 2], [3, 4, 5]]), wte, wpe)
    unseen = device.from_host([[0, 1, 2, 7], [3, 4, -9, 1]])[0:2]  # a slice: nobody knows its values
    out = device.to_host(device.encoder_forward(unseen, wte, wpe))
    assert np.isnan(out[0, 3]).all() and np.isnan(out[1, 2]).all() and np.isfinite(out[0, :3]).all()
    dwte, _ = device.encoder_backward(device.from_host(np.ones((2, 4, 8), np.float32)), unseen, wte, wpe)
    np.testing.assert_array_equal(device.to_host(dwte)[:, 0], [1, 2, 1, 1, 1])


# ---- other libraries -------------------------------------------------------------------------------------------------


def test_dlpack_shares_memory_both_ways(device):
    torch = pytest.importorskip("torch")
    for dtype in ("float32", "bfloat16", "int32"):
        array = device.from_host(np.arange(6).reshape(2, 3), dtype=dtype)
        if array.__dlpack_device__()[0] == 2 and not torch.cuda.is_available():
            pytest.skip("arrays of CUDA's, and PyTorch without CUDA")
        tensor = torch.from_dlpack(array)
        assert tuple(tensor.shape) == (2, 3) and str(tensor.dtype) == f"torch.{dtype}"
        tensor[1, 2] = 9
        if tensor.is_cuda:  # on PyTorch's stream, for which the backend's does not wait
            torch.cuda.synchronize()
        assert float(array[1][2]) == 9
        del array
        assert float(tensor[0, 1]) == 1
        again, where = device.from_dlpack(tensor), tensor.device
        del tensor
        assert again.dtype == dtype and again.shape == (2, 3) and float(again[1][2]) == 9
    with pytest.raises(ValueError, match="from_dlpack: "):
        device.from_dlpack(torch.zeros(2, 2, dtype=torch.float64, device=where))
    with pytest.raises(ValueError, match="C order"):
        device.from_dlpack(torch.zeros(2, 3, device=where).T)


def test_dlpack_of_another_device_is_refused(device):
    kind, number = device.zeros(1).__dlpack_device__()
    for where, told in (((kind, number + 1), f"on GPU {number + 1}, "), ((kind + 9, 0), "is not on the GPU")):
        other = SimpleNamespace(__dlpack_device__=lambda where=where: where, __dlpack__=None)
        with pytest.raises(ValueError, match=f"from_dlpack: .*{told}"):
            device.from_dlpack(other)


def test_cuda_array_interface(device):
    array = device.zeros((2, 3))
    interface = array[1].__cuda_array_interface__
    assert interface["shape"] == (3,) and interface["typestr"] == "<f4" and interface["version"] == 3
    assert interface["data"][0] == array.__cuda_array_interface__["data"][0] + 12
    with pytest.raises(AttributeError, match="DLPack"):
        _ = device.zeros((2,), "bfloat16").__cuda_array_interface__
