"""Taking turns: contestants in processes of their own, of which one at a time works and all others sleep.

Two libraries' idle threads in one process cut each other's speed in half, and a shared machine drifts, so contestants
alternate round by round, A B A B, each in a run of pytest that sleeps on a pipe between its turns and times itself.
`Seat` is the contestant's end, `Player` the coordinator's. Messages are lines of JSON:

    player: {"names": [...]}            the benchmarks of this process, in order        then for each that is played
    coordinator: {"prepare": name}      player: {"ready": seconds of a round}
    coordinator: {"rounds": n}
    coordinator: {"go": true}           player: {"took": seconds}                       n times
    coordinator: {"end": true}          player: {"record": what pytest-benchmark would write to its JSON}
    coordinator: {"finish": true}       once; the process ends

In place of any answer a player may say {"failed": why}; it then waits for the next "prepare". Whatever a player does,
making inputs and freeing them too, it does between a message and its answer, so never in another's turn; and it answers
when its idle threads have stopped to spin.
"""

import gc
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BENCH = Path(__file__).resolve().parent


class Failed(Exception):
    """A contestant could not do this benchmark, but goes on to the next."""


class Gone(Exception):
    """A contestant's process died, or does not answer."""


# ---- the contestant's end --------------------------------------------------------------------------------------------


class Seat:
    """What a run of pytest plays with: two ends of pipes, as "read,write"."""

    def __init__(self, descriptors):
        gc.collect()
        gc.freeze()  # what was imported need not be gone through after every benchmark
        read, write = map(int, descriptors.split(","))
        self.reader, self.writer, self.asked = os.fdopen(read), os.fdopen(write, "w"), None

    def say(self, **message):
        self.writer.write(json.dumps(message) + "\n")
        self.writer.flush()

    def wait(self, key):
        """Sleeps until the coordinator says `key`; its value. The match may end early, and the coordinator die."""
        line = self.reader.readline()
        message = json.loads(line or '{"finish": true}')
        if key != "finish" and "finish" in message:
            os._exit(0)
        if key not in message:
            raise RuntimeError(f"expected {key!r} from the coordinator, got {message}")
        return message[key]

    def play(self, benchmark, name, make_work, report, release):
        """Times the work with benchmark.pedantic, a round for each turn; report(work, figures) fills extra_info, and
        release() is called when the work is no more.

        Does nothing while another benchmark, further on in this process's list, is asked for.
        """
        self.asked = self.asked or self.wait("prepare")
        if self.asked != name:
            return
        self.asked = None
        try:
            record = self._play(benchmark, make_work(), report)
            gc.collect()
            release()
            fall_asleep()
            self.say(record=record)
        except Exception as error:
            # The traceback holds the arrays of the work.
            message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            error.__traceback__ = None
            gc.collect()
            release()
            self.say(failed=message)
            raise

    def _play(self, benchmark, work, report):
        work.run()
        seconds, loops = _calibrate(work)
        figures = []
        fall_asleep()
        self.say(ready=seconds * loops)

        def take_turn():
            # pedantic knows no setup with several iterations, so the loop is in run; its statistics are told.
            benchmark.stats.iterations = loops
            self.wait("go")
            stop = time.perf_counter() + work.wake_seconds(seconds)
            while work.unit is None and time.perf_counter() < stop:
                work.run()

        def run():
            result = work.run(loops)
            if work.unit is not None:
                figures.append(result)

        def tell():
            fall_asleep()
            self.say(took=benchmark.stats.stats.data[-1] * loops)

        benchmark.pedantic(run, setup=take_turn, teardown=tell, rounds=self.wait("rounds"))
        self.wait("end")
        report(work, figures)
        record = benchmark.stats.as_dict(include_data=True)
        return record | {"params": {name: str(value) for name, value in record["params"].items()}}


def fall_asleep(step=0.0005, at_most=0.3):
    """Waits until no thread of this process works or spins."""
    stop = time.monotonic() + at_most
    while time.monotonic() < stop:
        before = time.process_time()
        time.sleep(step)
        if time.process_time() - before < step / 5:
            return


def _calibrate(work):
    """(seconds of a call, calls in a round), the best of three after a warm call."""
    loops, taken = 1, 0.0
    if work.unit is not None:
        start = time.perf_counter()
        work.run()
        return time.perf_counter() - start, 1
    while True:
        best = None
        for _ in range(3):
            start = time.perf_counter()
            work.run(loops)
            taken = time.perf_counter() - start
            best = taken if best is None else min(best, taken)
            if taken > work.round_seconds:
                break
        if best > work.round_seconds / 10:
            return best / loops, max(1, round(loops * work.round_seconds / best))
        loops *= 8


# ---- the coordinator's end -------------------------------------------------------------------------------------------


class Player:
    """A contestant's process: `python -m pytest bench --seat ...` with these arguments and environment."""

    def __init__(self, name, arguments, environment, timeout=900.0):
        self.name, self.timeout, self.buffer = name, timeout, b""
        self.log = tempfile.TemporaryFile()
        to_read, self.to_player = os.pipe()
        self.from_player, to_write = os.pipe()
        command = [sys.executable, "-m", "pytest", str(BENCH / "test_bench.py"), "-q"]
        command += ["-p", "no:cacheprovider", "--benchmark-disable-gc", "--contestants", name]
        command += ["--seat", f"{to_read},{to_write}", *arguments]
        self.process = subprocess.Popen(
            command, cwd=BENCH.parent, env=environment, pass_fds=(to_read, to_write), stdin=subprocess.DEVNULL,
            stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)

    def start(self):
        """The names of its benchmarks."""
        self.names = self._answer("names")
        return self.names

    def prepare(self, name):
        """Seconds that a round of this benchmark will take."""
        return self._ask("ready", prepare=name)

    def begin(self, rounds):
        self._say(rounds=rounds)

    def turn(self):
        return self._ask("took", go=True)

    def end(self):
        """pytest-benchmark's record of the benchmark."""
        return self._ask("record", end=True)

    def finish(self):
        """Lets the process end; kills it where it does not."""
        try:
            self._say(finish=True)
            self.process.wait(timeout=60)
        except (Gone, subprocess.TimeoutExpired):
            self.kill()
        self._close()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def _close(self):
        for descriptor in (self.to_player, self.from_player):
            os.close(descriptor)
        self.log.close()

    def _ask(self, key, **message):
        self._say(**message)
        return self._answer(key)

    def _say(self, **message):
        try:
            os.write(self.to_player, (json.dumps(message) + "\n").encode())
        except BrokenPipeError:
            raise Gone(self._last_words()) from None

    def _answer(self, key):
        stop = time.monotonic() + self.timeout
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.from_player], [], [], max(0.0, stop - time.monotonic()))
            if not ready:
                self.kill()
                raise Gone(f"no answer within {self.timeout:.0f} s; stopped")
            piece = os.read(self.from_player, 1 << 20)
            if not piece:
                raise Gone(self._last_words())
            self.buffer += piece
        line, self.buffer = self.buffer.split(b"\n", 1)
        message = json.loads(line)
        if "failed" in message:
            raise Failed(message["failed"])
        if key not in message:
            self.kill()
            raise Gone(f"expected {key!r}, got {sorted(message)}")
        return message[key]

    def _last_words(self):
        """Why the process is no more: its exit code, and the last line it wrote."""
        code = self.process.wait()
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with {code}: {lines[-1] if lines else 'without a word'}"
