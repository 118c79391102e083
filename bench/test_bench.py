"""pytest-benchmark of pyllmc and its peers, side by side: each op of a training step, and the whole step.

    python -m pytest bench --benchmark-json=now.json        GPT-2 124M, B=4 T=64
    python -m pytest bench --batch 1 --context 1024

Each result carries GFLOP/s and GB/s of its best round and the share of the peak in extra_info. The contestants work
one after the other in this process; figures to rely on come from bench/compare.py, where they take turns.
"""

import functools

import contestants
import pytest

# What a peer has to warn of is its own affair.
pytestmark = pytest.mark.filterwarnings("default")


@functools.cache
def peak_gflops():
    from pyllmc import backend

    return backend("cpu").fma_peak(0.3)


def test_benchmark(benchmark, entry, contestant, threads, seat):
    benchmark.group = entry.name

    def make_work():
        return contestants.prepare(contestant, entry, threads)

    def describe(work, figures):
        benchmark.extra_info.update(
            contestant=contestant, benchmark=entry.name, group=entry.group, what=entry.what, sizes=dict(entry.sizes),
            flops=work.flops, bytes=work.bytes,
        )  # fmt: skip
        if work.device_bytes is not None:
            benchmark.extra_info["device_bytes"] = work.device_bytes
        if work.unit is not None:
            benchmark.extra_info.update(unit=work.unit, figures=figures)
        elif benchmark.stats is not None:  # not with --benchmark-disable
            seconds = benchmark.stats.stats.min
            benchmark.extra_info["gflops"] = work.flops / seconds / 1e9
            benchmark.extra_info["gbytes_per_second"] = work.bytes / seconds / 1e9

    if seat is not None:
        seat.play(benchmark, entry.name, make_work, describe, functools.partial(contestants.release, contestant))
        return
    work = make_work()
    benchmark(work.run)
    describe(work, [])
    if "gflops" in benchmark.extra_info and contestant not in contestants.CUDA_WAYS:
        benchmark.extra_info["share_of_peak"] = benchmark.extra_info["gflops"] / peak_gflops()
