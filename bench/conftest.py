"""Options and context of the benchmarks: `python -m pytest bench` runs them, with tests/ for the case table."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def pytest_addoption(parser):
    parser.addoption("--batch", type=int, default=4, help="sequences in a batch (default: 4)")
    parser.addoption("--context", type=int, default=64, help="tokens in a sequence (default: 64)")
    parser.addoption("--model", default="124M", choices=("124M", "tiny"), help="sizes to time (default: 124M)")
    parser.addoption("--suite", default="gpt2", help="what to time, see bench/suite.py (default: gpt2)")
    parser.addoption("--only", default="", help="groups of the suite, by commas (default: all)")
    parser.addoption("--contestants", default="", help="who takes part, by commas (default: all that are installed)")
    parser.addoption("--bench-threads", type=int, default=0, help="threads (default: pyllmc's choice)")
    parser.addoption("--seat", default="", help="READ,WRITE: play in turns, see bench/turns.py")


def entries(config):
    """The benchmarks that the options ask for."""
    import suite

    option = config.getoption
    found = suite.benchmarks(option("--suite"), option("--batch"), option("--context"), option("--model") == "tiny")
    only = [name for name in option("--only").split(",") if name]
    return [entry for entry in found if not only or entry.group in only]


def pytest_generate_tests(metafunc):
    if "entry" not in metafunc.fixturenames:
        return
    import contestants

    wanted = [name for name in metafunc.config.getoption("--contestants").split(",") if name]
    names = [name for name in contestants.installed() if not wanted or name in wanted]
    found = entries(metafunc.config)
    pairs = [(entry, name) for entry in found for name in names if contestants.takes_part(name, entry)]
    metafunc.parametrize("entry, contestant", pairs, ids=[f"{entry.name}-{name}" for entry, name in pairs])


@pytest.fixture(scope="session")
def threads(request):
    """The number of threads for every contestant that has no number of its own."""
    from pyllmc import backend

    return request.config.getoption("--bench-threads") or backend("cpu").get_num_threads()


@pytest.fixture(scope="session")
def seat(request):
    """This process's place among players that take turns, or None where it plays alone."""
    import turns

    descriptors = request.config.getoption("--seat")
    if not descriptors:
        yield None
        return
    seat = turns.Seat(descriptors)
    played = [item.callspec.params["entry"].name for item in request.session.items if hasattr(item, "callspec")]
    seat.say(names=played)
    yield seat
    seat.wait("finish")


def pytest_benchmark_update_machine_info(config, machine_info):
    """What every figure must be read with: the roofs of this machine now, its instruction set, threads, compiler."""
    import probes

    machine_info["pyllmc"] = probes.machine(config.getoption("--bench-threads") or None)
