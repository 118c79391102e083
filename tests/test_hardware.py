"""What hardware.py reads from the system's files, on made-up systems and on this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyllmc import hardware


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """The root of a made-up Linux: proc/ and cgroup/ in it are what hardware.py reads."""
    monkeypatch.setattr(hardware, "PROC", tmp_path / "proc")
    monkeypatch.setattr(hardware, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(hardware, "_ulimit_free", lambda: None)
    return tmp_path


MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"


def test_this_machine():
    assert hardware.cpu_name()
    assert hardware.usable_cpus() >= 1
    assert hardware.free_memory() is None or hardware.free_memory() > 1_000_000
    assert hardware.free_disk("some/folder/that/is/not/there") > 0
    assert hardware.peak_gflops(0.01) > 0.1


def test_cpu_name(system):
    write(system, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Some  CPU @ 3 GHz\nflags\t: x\n"})
    assert hardware.cpu_name() == "Some CPU @ 3 GHz"


def test_cpu_name_where_the_system_tells_none(system):
    assert hardware.cpu_name()


def test_memory_without_limits(system):
    write(system, {"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"})
    assert hardware.free_memory() == 8000000 * 1024


def test_memory_unknown(system, monkeypatch):
    monkeypatch.setattr(hardware.platform, "system", lambda: "Plan 9")
    assert hardware.free_memory() is None


@pytest.mark.parametrize("limit, left", [("max", 8000000 * 1024), ("5000000", 5000000 - 3000000 + 500000)])
def test_memory_with_a_cgroup_v2_limit(system, limit, left):
    """What the cache of files takes is given back on demand."""
    group = "cgroup/user/job/"
    write(system, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/user/job\n", group + "memory.max": limit + "\n",
        group + "memory.current": "3000000\n", group + "memory.stat": "anon 7\ninactive_file 500000\n",
    })  # fmt: skip
    assert hardware.free_memory() == left


def test_memory_limit_of_a_parent_group(system):
    write(system, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/user/job\n",
        "cgroup/user/job/memory.max": "9000000\n", "cgroup/user/job/memory.current": "1000000\n",
        "cgroup/user/memory.max": "4000000\n", "cgroup/user/memory.current": "1500000\n",
    })  # fmt: skip
    assert hardware.free_memory() == 2500000


def test_memory_limit_in_a_container_that_sees_the_hosts_path(system):
    write(system, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/system.slice/docker-0123.scope\n",
        "cgroup/memory.max": "2000000\n", "cgroup/memory.current": "500000\n",
    })  # fmt: skip
    assert hardware.free_memory() == 1500000


def test_memory_with_a_cgroup_v1_limit(system):
    group = "cgroup/memory/job/"
    write(system, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n",
        group + "memory.limit_in_bytes": "6000000\n", group + "memory.usage_in_bytes": "2000000\n",
        group + "memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
    })  # fmt: skip
    assert hardware.free_memory() == 4000100


def test_memory_over_the_limit_is_none_left(system):
    write(system, {
        "proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n",
        "cgroup/memory.max": "1000\n", "cgroup/memory.current": "5000\n",
    })  # fmt: skip
    assert hardware.free_memory() == 0


def test_memory_of_macos():
    report = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:                  100.\n"
        "Pages active:                900.\nPages inactive:               20.\nPages speculative:             3.\n"
    )
    assert hardware._free_pages_of_macos(report) == 16384 * 123
    assert hardware._free_pages_of_macos(None) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces ulimit -v")
def test_memory_under_ulimit():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); "
        "from pyllmc import hardware; print(hardware.free_memory())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert 0 < int(done.stdout) < 2**31


def test_more_memory_than_there_is(monkeypatch):
    hardware.require_memory(1000, "a small array")
    with pytest.raises(MemoryError, match=r"^a model of giants needs 1125\.9 TB, \S+ \w+ is free$"):
        hardware.require_memory(2**50, "a model of giants")
    monkeypatch.setattr(hardware, "free_memory", lambda: 2 * 10**9)
    smaller = {"one of dwarfs": 2 * 10**9, "one of humans": 2 * 10**9 + 1}
    with pytest.raises(MemoryError, match=r"^this needs 3\.0 GB, 2\.0 GB is free; one of dwarfs needs 2\.0 GB$"):
        hardware.require_memory(3 * 10**9, "this", smaller)


def test_set_threads():
    cpu = hardware.backend("cpu")
    before = cpu.get_num_threads()
    try:
        hardware.set_threads(1)
        assert cpu.get_num_threads() == 1
        hardware.set_threads(0)
        assert cpu.get_num_threads() == 1
        for threads in (99_999, 3_000_000_000, 10**30):
            with pytest.raises(ValueError, match=rf"^--threads {threads}: more than \d+ make no sense on \d+ proc"):
                hardware.set_threads(threads)
        assert cpu.get_num_threads() == 1
    finally:
        cpu.set_num_threads(before)


def test_threads_source(monkeypatch):
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(hardware, "usable_cpus", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if not hardware.backend("cpu").OPENMP:
        assert hardware.threads_source(1) == "built without OpenMP"
        return
    assert hardware.threads_source(8) == "one for each processor"
    assert hardware.threads_source(2) == "this container's share of 8 processors"
    monkeypatch.setattr(hardware, "usable_cpus", lambda: 4)
    assert hardware.threads_source(4) == "4 of 8 processors are this process's"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert hardware.threads_source(3) == "OMP_NUM_THREADS=3"
