"""Options and context of the benchmarks: `python -m pytest bench` runs them, with tests/ for the case table."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def pytest_addoption(parser):
    parser.addoption("--batch", type=int, default=4, help="sequences in a batch (default: 4)")
    parser.addoption("--context", type=int, default=64, help="tokens in a sequence (default: 64)")
    parser.addoption("--model", default="124M", choices=("124M", "tiny"), help="sizes to time (default: 124M)")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        import cases

        option = metafunc.config.getoption
        sizes = {"124M": {}, "tiny": {"C": 64, "NH": 4, "V": 97, "maxT": 64}}[option("--model")]
        metafunc.parametrize("case", cases.gpt2_cases(option("--batch"), option("--context"), **sizes), ids=str)


def pytest_benchmark_update_machine_info(config, machine_info):
    """What every figure must be read with: the peak of this machine now, its instruction set and threads."""
    from pyllmc import backend

    cpu = backend("cpu")
    machine_info["pyllmc"] = {
        "isa": cpu.NAME, "threads": cpu.get_num_threads(), "openmp": cpu.OPENMP, "peak_gflops": cpu.fma_peak(1.0),
    }  # fmt: skip
