"""llm.c's CPU program as a player: it is stopped between its turns, and each turn is one of the steps that it prints.

The program must be able to run where it lies: its model file, tokenizer and data as it names them, below its folder or
the one above.
"""

import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

from turns import Failed, Gone

STEP = re.compile(r"^step \d+:? .*\(took [\d.]+ ms\)")
WARM_STEPS = 2


class Program:
    """As turns.Player, for a program that knows nothing of turns."""

    def __init__(self, name, path, names, environment, timeout=900.0):
        self.name, self.path, self.names, self.timeout = name, Path(path).resolve(), names, timeout
        self.environment, self.process, self.terminal, self.buffer, self.times = environment, None, None, b"", []

    def start(self):
        if not os.access(self.path, os.X_OK):
            raise Gone(f"{self.path} is not a program")
        return self.names

    def prepare(self, benchmark):
        self.benchmark = benchmark
        self._launch()
        return min(self._step() for _ in range(WARM_STEPS))

    def begin(self, rounds):
        self.times = []

    def turn(self):
        try:
            self.times.append(self._step())
        except Gone:
            # It makes a fixed number of steps; then another run goes on.
            self._kill()
            self._launch()
            self.times.append(min(self._step() for _ in range(WARM_STEPS)))
        return self.times[-1]

    def end(self):
        self._kill()
        if not self.times:
            raise Failed("no step was seen")
        times = sorted(self.times)
        middle = (times[len(times) // 2] + times[(len(times) - 1) // 2]) / 2
        stats = {"min": times[0], "max": times[-1], "mean": sum(times) / len(times), "median": middle}
        stats |= {"rounds": len(times), "iterations": 1, "data": self.times}
        info = {"contestant": self.name, "benchmark": self.benchmark, "flops": 0, "bytes": 0, "sizes": {}}
        info |= {"group": self.benchmark.partition(":")[0], "what": "step"}
        return {"group": self.benchmark, "name": f"{self.benchmark}-{self.name}", "extra_info": info, "stats": stats}

    def finish(self):
        self._kill()

    def _launch(self):
        # A terminal of its own, so that it writes each line when it is complete.
        self.terminal, other = pty.openpty()
        folder = self.path.parent
        if not list(folder.glob("gpt2_124M.bin")) and list(folder.parent.glob("gpt2_124M.bin")):
            folder = folder.parent
        self.process = subprocess.Popen(
            [str(self.path)], cwd=folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=other, stderr=other
        )
        os.close(other)
        self.buffer, self.after_step = b"", False
        self.process.send_signal(signal.SIGSTOP)

    def _kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            os.close(self.terminal)
            self.process = None

    def _step(self):
        """Lets it work until a step follows upon a step, with no validation or sample between; the seconds of it."""
        self.process.send_signal(signal.SIGCONT)
        start, stop = time.perf_counter(), time.monotonic() + self.timeout
        while True:
            line = self._line(stop)
            now = time.perf_counter()
            if STEP.match(line):
                if self.after_step:
                    self.process.send_signal(signal.SIGSTOP)
                    return now - start
                start, self.after_step = now, True
            elif line:
                self.after_step = False

    def _line(self, stop):
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.terminal], [], [], max(0.0, stop - time.monotonic()))
            try:
                piece = os.read(self.terminal, 1 << 16) if ready else b""
            except OSError:  # the other end of a terminal is closed
                piece = b""
            if not piece:
                raise Gone("it ended, or does not answer")
            self.buffer += piece
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line.decode(errors="replace").strip()
