"""Processes on GPUs: sums and copies through NCCL's stand-in, ranks that are missing, late or wrong, and training."""

import importlib.util
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import ranks
import shim
from threads_group import Pretended

from pyllmc import nccl, sharding
from pyllmc.modelfile import read_model

CONNECT = """
import os
import numpy as np
from pyllmc.distributed import connect
from pyllmc.rendezvous import Rendezvous
place = None
if folder := os.environ.get("FOLDER"):
    place = Rendezvous(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), folder=folder)
group = connect("cuda", float(os.environ.get("TIMEOUT", "20")), os.environ, place)
"""
SIZES = (1, 2, 3, 7, 1000, 4099)


@pytest.fixture
def device_name(device, request):
    """cuda_shim, and cuda where there is a GPU."""
    return request.node.callspec.params["device"]


def rounded(values, dtype):
    """float32 values as bfloat16 has them."""
    if dtype == "float32":
        return values
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def values(rank, n, dtype):
    return rounded(np.random.default_rng([rank, n]).standard_normal(n, np.float32), dtype)


SUMS = """
from test_nccl import SIZES, values
out = {}
for dtype in ("float32", "bfloat16"):
    for again in (0, 1):
        blocks = [ops.from_host(values(group.rank, n, dtype), dtype=dtype) for n in SIZES]
        group.reduce_scatter(blocks)
        group.wait()
        out |= {f"sum {dtype} {n} {again}": ops.to_host(block) for n, block in zip(SIZES, blocks)}
    group.all_gather(blocks)
    group.wait()
    out |= {f"all {dtype} {n}": ops.to_host(block) for n, block in zip(SIZES, blocks)}
    for n in SIZES:
        array = ops.from_host(values(group.rank, n, dtype), dtype=dtype)
        group.broadcast(array)
        out[f"first {dtype} {n}"] = ops.to_host(array)
np.savez(f"{sys.argv[1]}/{group.rank}.npz", **out)
print(group.gather([group.rank, group.local_rank, group.local_size]))
group.close()
"""


def check_sums(tmp_path, size, **how):
    done = ranks.run(size, CONNECT + SUMS, tmp_path, **how)
    here = [[rank, rank, size] for rank in range(size)]
    assert all(code == 0 and str(here) in out for code, out, _ in done), done
    found = [np.load(tmp_path / f"{rank}.npz") for rank in range(size)]
    for dtype in ("float32", "bfloat16"):
        for n in SIZES:
            total = values(0, n, dtype)
            for rank in range(1, size):
                total = rounded(total + values(rank, n, dtype), dtype)
            for rank in range(size):
                own = sharding.part(n, rank, size)
                for again in (0, 1):
                    assert np.array_equal(found[rank][f"sum {dtype} {n} {again}"][own], total[own])
                assert np.array_equal(found[rank][f"all {dtype} {n}"], total)
                assert np.array_equal(found[rank][f"first {dtype} {n}"], values(0, n, dtype))


@pytest.mark.parametrize(("size", "launcher"), [(3, "torchrun"), pytest.param(3, "mpiexec", marks=ranks.needs_mpi)])
def test_sums_and_copies_are_those_of_numpy(tmp_path, size, launcher):
    check_sums(tmp_path, size, launcher=launcher)


def test_sums_of_ranks_that_meet_in_a_folder(tmp_path):
    check_sums(tmp_path, 2, FOLDER=str(tmp_path / "meet"))


def test_sums_of_two_ranks_are_those_of_numpy(tmp_path, device_name):
    """Of two numbers there is one sum, whatever the order: NCCL's own too."""
    check_sums(tmp_path, 2, device=device_name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rank_alone_keeps_what_it_has(device, dtype):
    """What can be asked of the library where there is one GPU."""
    try:
        alone = device.Communicator(device.nccl_id(), 0, 1)
    except OSError as error:
        pytest.skip(str(error))
    assert alone.launched(60) and alone.wait(60)
    host = values(0, 1000, dtype)
    array = device.from_host(host, dtype=dtype)
    for start in (
        lambda: alone.broadcast(array),
        lambda: alone.reduce_scatter([array]),
        lambda: alone.all_gather([array]),
    ):
        start()
        assert alone.launched(60) and alone.wait(60)
        np.testing.assert_array_equal(device.to_host(array), host)
    alone.close()


def test_ops_go_on_beside_a_collective_and_see_it_after_wait():
    script = """
    library.shim_nccl_hold(1)
    array = ops.from_host(np.full(8, 1.0 + group.rank, np.float32))
    other = ops.from_host(np.full(8, 5.0, np.float32))
    group.reduce_scatter([array])
    before, beside = float(array[0]), float(other[0])
    library.shim_nccl_hold(0)
    group.wait()
    own = ops.to_host(array)[4 * group.rank]
    print([before, beside, float(own)])
    group.close()
    """
    done = ranks.run(2, CONNECT + textwrap.dedent(script))
    assert [out.strip() for _, out, _ in done] == ["[1.0, 5.0, 3.0]", "[2.0, 5.0, 3.0]"], done


# ---- ranks that do not come -----------------------------------------------------------------------------------------

COLLECTIVE = """
from pyllmc.group import PeerError
array = ops.from_host(np.ones(10, np.float32))
def collective(kind="reduce_scatter", group=group, array=array):
    group.doing = "the gradients of step 12"
    try:
        getattr(group, kind)([array])
        group.wait()
        print("done")
    except OSError as error:
        print(f"{type(error).__name__}: {error}; tells: {group.fail(error)}")
    except PeerError as error:
        print(f"PeerError: {error}")
"""


def outcome(size, script, *arguments, **options):
    done = ranks.run(size, CONNECT + COLLECTIVE + textwrap.dedent(script), *arguments, **options)
    return [(code, re.sub(r"host [^)]*\)", "host)", out).strip()) for code, out, _ in done]


def test_a_rank_that_does_not_come_is_named(tmp_path):
    first, second, third = outcome(
        3,
        """
        import pathlib, time
        folder = pathlib.Path(sys.argv[1])
        if group.rank < 2:
            collective()
            (folder / str(group.rank)).touch()
        else:
            while len(os.listdir(folder)) < 2:
                time.sleep(0.01)
        group.close()
        """,
        tmp_path,
        TIMEOUT="0.7",
    )
    text = "rank 2 (host): not there for the gradients of step 12 after 0.7 seconds"
    assert text in first[1] and first[1].startswith("TimeoutError") and first[1].endswith("tells: True")
    assert second[1].startswith(f"PeerError: rank 0 (host): {text}")
    assert third == (0, "")


def test_ranks_that_wait_for_different_things_are_told_so():
    first, second = outcome(
        2,
        """
        collective() if group.rank == 0 else group.gather(1)
        """,
        TIMEOUT="0.7",
    )
    text = "the ranks wait for different things, for 0.7 seconds: rank 0 (host) for the gradients of step 12; "
    assert text in first[1]


def test_a_killed_rank_is_noticed_at_once():
    first, second, third = outcome(
        3,
        """
        if group.rank == 1:
            os.kill(os.getpid(), 9)
        collective()
        group.close()
        """,
        seconds=15,
    )
    assert second[0] == -9
    assert first[1].startswith("ConnectionError: rank 1 (host): its connection was closed")
    assert third[1].startswith("PeerError: rank 0 (host): rank 1 (host): its connection was closed")


def test_an_error_of_one_rank_ends_the_collective_of_the_others():
    first, second = outcome(
        2,
        """
        if group.rank == 1:
            print(group.fail(ValueError("no more tokens")))
        else:
            collective()
        group.close()
        """,
        seconds=15,
    )
    assert (first[1], second[1]) == ("PeerError: rank 1 (host): no more tokens", "True")


def test_ranks_that_ask_for_different_sums_fail():
    done = outcome(2, 'collective("reduce_scatter" if group.rank else "all_gather")', TIMEOUT="2")
    assert any("nccl.cu" in text and "the ranks do not ask for the same" in text for _, text in done), done


def test_after_an_abort_nothing_can_be_started():
    script = """
    alone = ops.Communicator(ops.nccl_id(), 0, 2)
    print(alone.launched(0.05), alone.wait(0.05))
    alone.abort()
    alone.close()
    try:
        alone.broadcast(ops.zeros(3))
    except RuntimeError as error:
        print(error)
    """
    ((code, out, err),) = ranks.run(1, script)
    assert out.splitlines() == ["False False", "nccl.cu: the communicator was closed or aborted"], err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("c.reduce_scatter([ops.zeros((2, 2))])", "one-dimensional arrays of float32 or bfloat16"),
        ('c.reduce_scatter([ops.zeros(3, "int32")])', "one-dimensional arrays of float32 or bfloat16"),
        ("c.broadcast([1.0])", "a DeviceArray is needed, got list"),
        ('ops.Communicator(b"short", 0, 1)', "an id of 128 bytes"),
        ("ops.Communicator(ops.nccl_id(), 2, 2)", "a rank below the size"),
    ],
)
def test_arguments_are_checked(call, message):
    if shim.compiler() is None:
        pytest.skip("no C++ compiler")
    ops = shim.load()
    c = ops.Communicator(ops.nccl_id(), 0, 1)
    assert c.launched(5)
    with pytest.raises(ValueError, match=re.escape(message)):
        eval(call)
    c.close()


# ---- which GPU ------------------------------------------------------------------------------------------------------


def choose_gpu(monkeypatch, rank, hosts, seen):
    """What this rank chooses where each rank sees these GPUs."""
    monkeypatch.setattr(nccl, "gpus", lambda: seen[rank])
    return nccl.choose_gpu(Pretended(rank, *seen[:rank], *seen[rank + 1 :], hosts=hosts))


@pytest.mark.parametrize(
    ("hosts", "seen", "chosen"),
    [
        ("aabb", [["1", "2"]] * 4, [0, 1, 0, 1]),
        ("abab", [["1", "2"]] * 4, [0, 0, 1, 1]),
        ("aa", [["1"], ["2"]], [0, 0]),  # each process sees its own only
        ("aa", [["1", "2"], ["2", "1"]], [0, 0]),
    ],
)
def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch, hosts, seen, chosen):
    assert [choose_gpu(monkeypatch, rank, hosts, seen) for rank in range(len(hosts))] == chosen


def test_too_few_gpus_are_an_error(monkeypatch):
    text = "each of the 2 processes there needs a GPU of its own, but this one sees "
    done = ranks.run(2, CONNECT, gpus=1)
    assert all(code == 1 for code, _, _ in done)
    assert sorted(text in err for _, _, err in done) == [False, True] and "" in [err for _, _, err in done]
    with pytest.raises(ValueError, match=text + "none"):
        choose_gpu(monkeypatch, 0, "aa", [["1"], []])


def test_a_gpu_is_chosen_before_it_is_used():
    script = """
    ops.set_device(1)
    ops.zeros(1)
    for index in (1, 0, 7):
        try:
            ops.set_device(index)
            print(index)
        except ValueError as error:
            print(error)
    print(ops.gpus())
    """
    ((_, out, err),) = ranks.run(1, script, gpus=2)
    assert out.splitlines() == [
        "1",
        "GPU 1 is in use already, so it cannot be GPU 0",
        "there is no GPU 7: this process sees 2",
        "['0000:01:00.0', '0000:02:00.0']",
    ], err


# ---- the library ----------------------------------------------------------------------------------------------------


def test_the_functions_are_those_of_nvidias_library():
    spec = importlib.util.find_spec("nvidia")
    files = [Path(place, "nccl", "lib", "libnccl.so.2") for place in (spec.submodule_search_locations if spec else [])]
    if not any(file.exists() for file in files):
        pytest.skip("no wheel of NCCL")
    script = """
    from pyllmc._cuda import libraries
    ops._find_nccl = libraries.nccl
    print(ops.nccl_version())
    """
    ((_, out, err),) = ranks.run(1, script)
    assert re.fullmatch(r"2\.\d+\.\d+\n", out), err


def test_a_missing_or_old_library_is_an_error_that_names_its_package():
    script = """
    found = ops._find_nccl()
    library.shim_nccl_version(21701)
    for paths in (["/nowhere/libnccl.so.2"], found):
        ops._find_nccl = lambda: paths
        try:
            ops.nccl_id()
        except OSError as error:
            print(error)
    """
    ((_, out, err),) = ranks.run(1, script)
    first, second = out.splitlines()
    assert first.startswith("NCCL 2.18 or newer was not found in ") and "/nowhere/libnccl.so.2: cannot open" in first
    assert first.endswith("pip install nvidia-nccl-cu13 (nvidia-nccl-cu12 for drivers before 580)")
    assert "is version 2.17.1, too old" in second


# ---- training -------------------------------------------------------------------------------------------------------

SETTINGS = (
    "--layers 1 --heads 1 --channels 16 --context 16 --batch-size 2 --max-steps 3 --warmup 0 --val-batches 2 "
    "--sample-every 0 --no-shuffle --device cuda --dtype float32"
).split()


def losses_and_norms(folder):
    """Of the gradients: AdamW does not show whether they are sums or means."""
    return list(map(float, re.findall(r"(?:trl|norm):(\S+)", Path(folder, "main.log").read_text())))


def test_two_ranks_train_as_one_with_two_batches_in_a_step(in_folder_with_text, device_name):
    more = ["--text", "notes.txt", *SETTINGS]
    first, second = ranks.run(2, ranks.TRAIN, *more, "--out", "two", device=device_name)
    assert (first[0], second[0], second[1], second[2]) == (0, 0, "", ""), (first, second)
    ((code, _, err),) = ranks.run(1, ranks.TRAIN, *more, "--out", "one", "--total-batch-size", 64, device=device_name)
    assert code == 0, err
    two, one = map(losses_and_norms, ("two", "one"))
    assert len(two) == 6 and two == pytest.approx(one, abs=0.0101)  # norms have two digits in the log
    (_, two), (_, one) = (read_model(f"{folder}/model_00000003.bin") for folder in ("two", "one"))
    np.testing.assert_allclose(two, one, atol=2e-5)
