"""Pictures of runs: what is drawn, where it goes, and the table where matplotlib is missing."""

import math
import os
import struct
import sys
from pathlib import Path

import pytest

from pyllmc import cli, plot
from pyllmc.config import GPT2Config
from pyllmc.logs import MainLog

PNG = b"\x89PNG\r\n\x1a\n"


def make_run(folder: Path, steps: int = 100, last: float = 1.5, hellaswag: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    log = MainLog(folder / "main.log")
    for step in range(steps + 1):
        loss = last + 2.5 * math.exp(-8 * step / steps)
        if step % 20 == 0:
            log.validation(step, loss + 0.1)
            if hellaswag and step:
                log.evaluation(step, 0.25 + step / 1000)
        if step < steps:
            log.train(step, loss, 1e-3, 0.5)
    log.close()
    return folder


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def run(*arguments) -> int:
    return cli.run_main(plot.main, [str(argument) for argument in arguments])


def test_smoothed():
    assert plot.smoothed([3.0, 3.0, 3.0], 0.9) == pytest.approx([3, 3, 3])
    assert plot.smoothed([1.0, 2.0], 0.5) == pytest.approx([1, (0.25 + 1) / 0.75])
    assert plot.smoothed([1.0, math.nan, 1.0], 0.9) == pytest.approx([1, 1, 1])
    assert plot.smoothed([5.0, 1.0], 0.0) == [5, 1]


def test_picture_of_one_run(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    assert run(folder) == 0
    assert capsys.readouterr().out.strip() == str(folder / "loss.png")
    assert (folder / "loss.png").read_bytes().startswith(PNG)
    assert sorted(os.listdir(folder)) == ["loss.png", "main.log"]


def test_picture_of_several_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [make_run(tmp_path / name, last=last) for name, last in (("a", 1.5), ("b", 1.8), ("b/a", 2.0))]
    assert run(*folders) == 0
    assert Path("loss.png").read_bytes().startswith(PNG)
    assert list(plot.read_runs(folders)) == ["a", "b", str(tmp_path / "b/a")]


def test_what_is_drawn(tmp_path):
    (axes,) = plot._draw(plot.read_runs([make_run(tmp_path / "run")]), {}).axes
    faint, train, validation = axes.lines
    assert len(faint.get_xdata()) == len(train.get_xdata()) == 100
    assert list(validation.get_xdata()) == [0, 20, 40, 60, 80, 100]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[0].startswith("training (last 1.5") and labels[1] == "validation (last 1.601, best 1.601)"
    assert axes.get_ylabel() == "loss (nats per token)" and axes.get_yscale() == "log"


def labels_of(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_accuracy_has_a_panel_of_its_own(tmp_path):
    runs = plot.read_runs([make_run(tmp_path / "a", hellaswag=True)])
    losses, accuracy = plot._draw(runs, {"GPT-2 124M": 0.294463, "GPT-3 125M": 0.337}).axes
    assert len(losses.lines) == 3 and losses.get_ylabel() == "loss (nats per token)"
    curve, *dashes = accuracy.lines
    assert list(curve.get_xdata()) == [20, 40, 60, 80, 100] and curve.get_ydata()[-1] == 0.35
    assert [line.get_ydata()[0] for line in dashes] == [0.294463, 0.337]
    assert labels_of(accuracy) == ["this run (last 0.3500, best 0.3500)", "GPT-2 124M (0.2945)", "GPT-3 125M (0.3370)"]
    assert losses.get_xlabel() == "" and accuracy.get_xlabel() == "step"
    assert plot.plot_losses(tmp_path / "a").read_bytes().startswith(PNG)


def test_runs_with_and_without_accuracy_in_one_picture(tmp_path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", hellaswag=True)]
    _, accuracy = plot._draw(plot.read_runs(folders), {}).axes
    assert labels_of(accuracy) == ["b (last 0.3500, best 0.3500)"]


def test_accuracy_is_in_the_table(tmp_path):
    lines = plot.loss_table(plot.read_runs([make_run(tmp_path / "a", hellaswag=True)])).splitlines()
    assert lines[1].split() == ["step", "training", "validation", "HellaSwag"]
    assert lines[-1].split()[-1] == "0.3500" and len(lines[2].split()) == 3


def test_what_others_reach_is_that_of_the_runs_size(tmp_path):
    for name, config in (("small", GPT2Config(1, 1, 4, 50, 8)), ("deep", GPT2Config(12, 12, 768, 5, 8))):
        folder = make_run(tmp_path / name, hellaswag=True)
        header = [20240326, 3, config.max_seq_len, config.vocab_size, config.num_layers, config.num_heads]
        size = 4 * config.num_parameters_padded
        with open(folder / "model_00000100.bin", "wb") as file:
            file.write(struct.pack("<256i", *header, config.channels, config.padded_vocab_size, *[0] * 248))
            file.truncate(1024 + size)
        for rest in ("state_00000100_00000.bin", "DONE_00000100"):
            (folder / rest).touch()
    assert plot.reached([tmp_path / "small"]) == plot.reached([tmp_path]) == {}
    gpt2 = {"GPT-2 124M": 0.294463, "GPT-3 125M": 0.337}
    assert plot.reached([tmp_path / "deep", tmp_path / "small"]) == plot.reached([tmp_path / "deep/main.log"]) == gpt2


@pytest.mark.parametrize("name, start", [("p.svg", b"<?xml"), ("p.PDF", b"%PDF"), ("p.png", PNG)])
def test_formats(name, start, tmp_path):
    assert run(make_run(tmp_path / "run"), "--out", tmp_path / name) == 0
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    "lines", ["s:0 trl:4.2 lr:0.1 norm:1.0\n", "s:0 tel:4.2\n", "s:0 trl:nan lr:0.1 norm:nan\ns:1 trl:3\n"]
)
def test_run_that_has_just_begun(lines, tmp_path):
    (tmp_path / "main.log").write_text(lines)
    assert run(tmp_path) == 0
    plot.loss_table(plot.read_runs([tmp_path]))


def test_table_without_matplotlib(tmp_path, capsys, no_matplotlib):
    assert run(make_run(tmp_path / "run")) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "run"
    assert lines[1].split() == ["step", "training", "validation"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "20", "40", "60", "80", "100"]
    assert len(lines[-1].split()) == 3
    assert "pip install matplotlib" in err
    assert not (tmp_path / "run/loss.png").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["none"], "none/main.log: No such file"),
        (["empty"], "no losses"),
        (["run", "--out", "p.bmp"], "must end in .png"),
    ],
)
def test_bad_input(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/main.log").write_text("nothing\n")
    assert run(*arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["x^{$", "$a$", "line\nbreak", "o\udcff"])
def test_any_folder_name_may_stand_in_the_picture(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "main.log").write_text("s:0 trl:3.0 lr:0.1 norm:1\ns:1 trl:2.0 lr:0.1 norm:1\n")
    assert plot.plot_losses(folder).exists()
