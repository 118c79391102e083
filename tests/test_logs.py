"""main.log, the time estimate, and the console on terminals, elsewhere, and when its reader goes away."""

import contextlib
import errno
import io
import math
import os
import pty
import sys

import pytest

from pyllmc import logs


def test_figures():
    sizes = [0, 999, 1000, 31_200_000, 1.5e9, 2e12]
    assert [logs.format_bytes(n) for n in sizes] == ["0 bytes", "999 bytes", "1 kB", "31.2 MB", "1.5 GB", "2.0 TB"]
    counts = [7, 999, 999.6, 14_700, 124e6, 1.5e9, 3e12]
    assert [logs.format_count(n) for n in counts] == ["7", "999", "1.0k", "14.7k", "124M", "1.5G", "3.0T"]
    times = [0.04, 9.94, 9.96, 59.4, 59.6, 112, 3599.9, 11100, 187200]
    assert [logs.format_duration(t) for t in times] == [
        "0.0 s", "9.9 s", "10 s", "59 s", "1 min 00 s", "1 min 52 s", "1 h 00 min", "3 h 05 min", "2 d 4 h"
    ]  # fmt: skip
    assert [logs.format_share(x) for x in (0.003, 0.41, 1.0, None)] == ["0.3%", "41%", "100%", "n/a"]
    assert logs.aligned([("a", "1"), ("long", "2\n3")]) == "a     1\nlong  2\n      3"


# ---- main.log -------------------------------------------------------------------------------------------------------


def test_accuracy(tmp_path):
    log = logs.MainLog(tmp_path / "main.log")
    log.evaluation(250, 2967 / 10042)
    log.close()
    assert (tmp_path / "main.log").read_text() == "s:250 eval:0.2955\n"


def write_log(path, steps, **options) -> None:
    log = logs.MainLog(path, **options)
    for step in steps:
        if step % 2 == 0:
            log.validation(step, 2 + step / 10)
        log.train(step, 3 - step / 10, 1e-3, 0.126)
    log.close()


def test_grammar(tmp_path):
    write_log(tmp_path / "main.log", range(2))
    assert (tmp_path / "main.log").read_text() == (
        "s:0 tel:2.0000\ns:0 trl:3.0000 lr:0.001000 norm:0.13\ns:1 trl:2.9000 lr:0.001000 norm:0.13\n"
    )


def test_read(tmp_path):
    write_log(tmp_path / "main.log", range(3))
    assert logs.read_main_log(tmp_path / "main.log") == {
        "tel": {0: 2.0, 2: 2.2},
        "trl": {0: 3.0, 1: 2.9, 2: 2.8},
        "lr": {0: 0.001, 1: 0.001, 2: 0.001},
        "norm": {0: 0.13, 1: 0.13, 2: 0.13},
    }


def test_read_what_others_write(tmp_path):
    """llm.c's lines, a run that wrote a step twice, and a last line that was cut off."""
    (tmp_path / "main.log").write_text(
        "s:0 tel:11.0\ns:1 eval:0.2952\ns:5 trl:3.5\nnonsense\ns:5 trl:3.25 lr:0.1 norm:nan\ns:4 trl:4.0\ns:6 tr"
    )
    curves = logs.read_main_log(tmp_path / "main.log")
    assert curves["trl"] == {4: 4.0, 5: 3.25} and list(curves["trl"]) == [4, 5]
    assert curves["eval"] == {1: 0.2952}
    assert curves["norm"][5] != curves["norm"][5]


def test_resumed_log_equals_whole_log(tmp_path):
    write_log(tmp_path / "whole.log", range(10))
    # The run wrote steps up to 6, was killed in the middle of a line, and goes on from its checkpoint 4.
    write_log(tmp_path / "parts.log", range(7))
    with open(tmp_path / "parts.log", "a") as file:
        file.write("s:7 trl:2.")
    write_log(tmp_path / "parts.log", range(4, 10), resume_step=4)
    assert (tmp_path / "parts.log").read_bytes() == (tmp_path / "whole.log").read_bytes()


def test_a_last_line_that_was_cut_off_is_none(tmp_path):
    """Also where it looks whole: 2.31 may have been 2.3145."""
    path = tmp_path / "main.log"
    path.write_text("s:1 trl:2.5 lr:0.1 norm:1.00\ns:2 trl:2.31")
    assert logs.read_main_log(path)["trl"] == {1: 2.5}
    write_log(path, [3], resume_step=3)
    assert path.read_text() == "s:1 trl:2.5 lr:0.1 norm:1.00\ns:3 trl:2.7000 lr:0.001000 norm:0.13\n"
    # After a power cut a file may end in what was never written.
    path.write_bytes(b"s:1 trl:2.5 lr:0.1 norm:1.00\n" + bytes(40) + b"\ns:2 trl:2.0\n" + bytes(40))
    assert logs.read_main_log(path)["trl"] == {1: 2.5, 2: 2.0}


def test_sync_brings_the_lines_to_the_disk_and_names_the_file(tmp_path, monkeypatch):
    log = logs.MainLog(tmp_path / "main.log")
    log.validation(0, 2.5)
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    log.sync()
    assert synced == [len("s:0 tel:2.5000\n")]

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot write this file: No space") as error:
        log.sync()
    assert error.value.filename == str(tmp_path / "main.log")
    log.close()


def test_a_step_without_end_is_no_step(tmp_path):
    (tmp_path / "main.log").write_text(f"s:1 trl:2.0\ns:{'9' * 5000} trl:1.0\n")
    assert logs.read_main_log(tmp_path / "main.log") == {"trl": {1: 2.0}}
    write_log(tmp_path / "main.log", [], resume_step=2)
    assert (tmp_path / "main.log").read_text() == "s:1 trl:2.0\n"


def write_times(path, steps, **options) -> None:
    times = logs.Times(path, **options)
    for step in steps:
        times.train(step, 64, 0.25 + step)
    times.close()


def test_times(tmp_path):
    write_times(tmp_path / "times.csv", range(2))
    assert (tmp_path / "times.csv").read_text() == "step,tokens,seconds\n0,64,0.250000\n1,64,1.250000\n"
    with open(tmp_path / "times.csv", "a") as file:
        file.write("nonsense\n1,32,0.500000\n-1,1,1.000000\n3,1,nan\n2,64,0.2")
    assert logs.read_times(tmp_path / "times.csv") == {0: (64, 0.25), 1: (32, 0.5)}


def test_resumed_times_have_each_step_once(tmp_path):
    write_times(tmp_path / "whole.csv", range(10))
    write_times(tmp_path / "parts.csv", range(7))
    with open(tmp_path / "parts.csv", "a") as file:
        file.write("7,64,7.")
    write_times(tmp_path / "parts.csv", range(4, 10), resume_step=4)
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    # Those of a run that another program began, which wrote none, begin where it goes on.
    write_times(tmp_path / "late.csv", [4], resume_step=4)
    assert (tmp_path / "late.csv").read_text() == "step,tokens,seconds\n4,64,4.250000\n"


def test_new_log_replaces_an_old_one(tmp_path):
    write_log(tmp_path / "main.log", range(5))
    write_log(tmp_path / "main.log", range(1))
    assert len((tmp_path / "main.log").read_text().splitlines()) == 2


# ---- time -----------------------------------------------------------------------------------------------------------


def test_pace():
    pace = logs.Pace(total=100, tokens_per_step=50, flops_per_token=1_000_000, expected_seconds=0.5)
    assert pace.seconds_left(0) == pytest.approx(50)
    # The first step does more than the others.
    pace.step(9.0)
    assert pace.seconds_left(0) == pytest.approx(50)
    for _ in range(3):
        pace.step(0.1)
    assert pace.seconds_per_step == pytest.approx(0.1)
    assert pace.tokens_per_second == pytest.approx(500)
    assert pace.gflops == pytest.approx(0.5)
    assert pace.seconds_left(40) == pytest.approx(6)
    # Every 30 steps and at the end: after step 40 that is 60, 90 and 100.
    pace.pause("validation", 30, 2.0)
    assert pace.seconds_left(40) == pytest.approx(12)
    # Only at the end; and replaced by a newer figure.
    pace.pause("sample", 0, 9.0)
    pace.pause("sample", 0, 1.0)
    assert pace.seconds_left(100 - 1) == pytest.approx(0.1 + 2 + 1)


# ---- console --------------------------------------------------------------------------------------------------------


def drive(console: logs.Console, pace: logs.Pace) -> None:
    console.start(0)
    for step in range(1, 101):
        pace.step(0.01)
        console.step(step, 2.0, 0.5, 1e-3, 0.01, pace, 10.0)
        if step == 50:
            console.line("a line")
    console.close()
    console.line("the end")


@pytest.fixture
def pace() -> logs.Pace:
    return logs.Pace(100, 1000, 10_000, 0.01)


def test_lines_where_there_is_no_terminal(pace, capsys):
    drive(logs.Console(100, log_every=25), pace)
    assert capsys.readouterr().out == "".join(
        f"step {step:3}/100 | loss 2.0000 | norm  0.5000 | lr 1.00e-03 | 10.0 ms | 100k tok/s | "
        f"10% of peak | {left} left\n"
        + ("a line\n" if step == 50 else "")
        for step, left in ((1, "1.0 s"), (25, "0.7 s"), (50, "0.5 s"), (75, "0.2 s"), (100, "0.0 s"))
    ) + "the end\n"  # fmt: skip


def test_z_scores_where_there_are_any(pace, capsys):
    console = logs.Console(1)
    console.step(1, 2.0, 0.5, 1e-3, 0.01, pace, 10.0, 1.234, -11.2)
    console.step(1, 2.0, 0.5, 1e-3, 0.01, pace, 10.0, 0.0, math.nan)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/1 | loss 2.0000 (z +1.23) | norm  0.5000 (z -11.20) | lr 1.00e-03 | ")
    assert second.startswith("step 1/1 | loss 2.0000 (z +0.00) | norm  0.5000 | lr 1.00e-03 | ")


def test_about_forty_lines(capsys, pace):
    for total in (7, 40, 100, 2000):
        console = logs.Console(total)
        console.start(0)
        for step in range(1, total + 1):
            console.step(step, 2.0, 0.5, 1e-3, 0.01, pace, 10.0)
        assert min(total, 40) <= len(capsys.readouterr().out.splitlines()) <= 51


def all_that_was_shown(controller: int) -> str:
    """What went to a terminal that is closed by now; it comes in pieces."""
    data = b""
    # When all has been read, the closed terminal is an end of file on some systems and an error on others.
    with contextlib.suppress(OSError):
        while piece := os.read(controller, 100_000):
            data += piece
    os.close(controller)
    return data.decode()


def test_one_bar_on_a_terminal(pace, monkeypatch):
    """Also on a terminal that does not know its size, as those of containers."""
    controller, terminal = pty.openpty()
    with open(terminal, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setenv("COLUMNS", "90")
        monkeypatch.setattr(logs.tqdm, "__init__", patient(logs.tqdm.__init__))
        drive(logs.Console(100, log_every=25), pace)
    shown = all_that_was_shown(controller)
    assert "  2% |" in shown and "/100  loss 2.000  100k tok/s  0.5 s left" in shown
    assert " | loss" not in shown
    # What stays on the screen: everything after the last return to the start of its line.
    lines = shown.replace("\r\n", "\n").split("\n")
    assert [line.rpartition("\r")[2].rstrip() for line in lines] == ["a line", "the end", ""]


@pytest.mark.parametrize("columns", [10, 30, 60])
def test_on_a_narrow_terminal_the_words_come_before_the_bar(columns, monkeypatch):
    controller, terminal = pty.openpty()
    with open(terminal, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(logs.tqdm, "__init__", patient(logs.tqdm.__init__))
        console = logs.Console(20_000)
        console.start(0)
        console.step(400, 2.0, 0.5, 1e-3, 0.01, logs.Pace(20_000, 1000, 10_000, 0.5), 10.0)
        console.close()
    shown = all_that_was_shown(controller)
    drawn = [line for line in shown.split("\r") if line.strip()]
    assert max(map(len, drawn)) <= columns
    assert drawn[-1].rstrip() == "  0%  loss 2.000  2.0k tok/s  2 h 43 min left"[:columns].rstrip()


def test_a_peak_that_nobody_knows(pace, capsys):
    logs.Console(100).step(1, 2.0, 0.5, 1e-3, 0.01, pace, None)
    assert " | n/a of peak | " in capsys.readouterr().out


def test_activity_is_in_the_bar_only(pace, monkeypatch, capsys):
    console = logs.Console(100)
    console.activity("counting")
    assert capsys.readouterr().out == ""
    controller, terminal = pty.openpty()
    with open(terminal, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setenv("COLUMNS", "90")
        console.start(0)
        console.activity("counting 1/2")
        console.step(1, 2.0, 0.5, 1e-3, 0.01, pace, 10.0)
        console.close()
    assert "0/100  counting 1/2" in all_that_was_shown(controller)


def patient(init):
    """tqdm that draws at every step, however fast they come."""
    return lambda bar, *arguments, **options: init(bar, *arguments, **options, mininterval=0, miniters=1)


def test_reader_that_goes_away(pace, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    console = logs.Console(100)
    drive(console, pace)
    assert isinstance(console.lost, BrokenPipeError)
