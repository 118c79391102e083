"""main.log and times.csv: what is written, read again, cut off, and kept when a run goes on."""

import errno
import os

import pytest

from pyllmc import logs

UPDATE = logs.Update(loss=2.0, learning_rate=1e-3, norm=0.5, tokens=1000, seconds=0.01)


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
        log.train(step, UPDATE._replace(loss=3 - step / 10, norm=0.126))
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
        times.train(step, UPDATE._replace(tokens=64, seconds=0.25 + step))
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


def test_a_log_that_became_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "main.log")
    for resume_step in (None, 3):
        with pytest.raises(ValueError, match="main.log: .*not a regular file"):
            logs.MainLog(tmp_path / "main.log", resume_step)
