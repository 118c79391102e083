"""The largest resident memory of one contestant at one benchmark: `peak_memory.py CONTESTANT BENCHMARK SUITE THREADS`.

compare.py runs it in a process of its own and reads the last line, bytes.
"""

import resource
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import contestants  # noqa: E402
import suite  # noqa: E402


def main(name, benchmark, suite_name, threads):
    (entry,) = [entry for entry in suite.benchmarks(suite_name) if entry.name == benchmark]
    work = contestants.prepare(name, entry, int(threads))
    for _ in range(2):
        work.run()
    # Kibibytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


if __name__ == "__main__":
    main(*sys.argv[1:])
