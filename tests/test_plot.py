"""Pictures of runs: what is drawn, along which axis, where it goes, and the table where matplotlib is missing."""

import math
import os
import re
import signal
import struct
import sys
from pathlib import Path

import pytest

from pyllmc import cli, curves, plot, train
from pyllmc.config import GPT2Config
from pyllmc.logs import MainLog, Times, Update

PNG = b"\x89PNG\r\n\x1a\n"


def make_run(folder: Path, steps: int = 100, last: float = 1.5, hellaswag: bool = False, seconds: float = 0.0) -> Path:
    """A run of 50 tokens a step; with `seconds`, which each of its steps took, in times.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    log = MainLog(folder / "main.log")
    if seconds:
        times = Times(folder / "times.csv")
        for step in range(steps):
            times.train(step, Update(3.0, 1e-3, 0.5, 50, seconds))
        times.close()
    for step in range(steps + 1):
        loss = last + 2.5 * math.exp(-8 * step / steps)
        if step % 20 == 0:
            log.validation(step, loss + 0.1)
            if hellaswag and step:
                log.evaluation(step, 0.25 + step / 1000)
        if step < steps:
            log.train(step, Update(loss, 1e-3, 0.5, 50, seconds))
    log.close()
    return folder


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def run(*arguments) -> int:
    return cli.run_main(plot.main, [str(argument) for argument in arguments])


def draw(folders, *show: str, over: str = "steps") -> dict:
    """The panels of the picture, by name, as matplotlib's axes."""
    runs = curves.read_runs(folders, over)
    panels = plot.choose_panels(runs, show)
    return dict(zip(panels, plot._draw(runs, panels).axes, strict=True))


def labels_of(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []


def test_smoothed():
    assert curves.smoothed([3.0, 3.0, 3.0], 0.9) == pytest.approx([3, 3, 3])
    assert curves.smoothed([1.0, 2.0], 0.5) == pytest.approx([1, (0.25 + 1) / 0.75])
    assert curves.smoothed([1.0, math.nan, 1.0], 0.9) == pytest.approx([1, 1, 1])
    assert curves.smoothed([1.0, math.inf, 1.0], 0.9) == pytest.approx([1, 1, 1])
    assert curves.smoothed([5.0, 1.0], 0.0) == curves.smoothed([5.0, 1.0]) == [5, 1]


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
    assert [run.name for run in curves.read_runs(folders)] == ["a", "b", str(tmp_path / "b/a")]


def test_what_is_drawn(tmp_path):
    axes = draw([make_run(tmp_path / "run")])["loss"]
    faint, train, validation = axes.lines
    assert len(faint.get_xdata()) == len(train.get_xdata()) == 100
    assert list(validation.get_xdata()) == [0, 20, 40, 60, 80, 100]
    labels = labels_of(axes)
    assert labels[0].startswith("training (last 1.5") and labels[1] == "validation (last 1.601, best 1.601)"
    assert axes.get_ylabel() == "loss (nats per token)" and axes.get_yscale() == "log"
    # The last figure stands beside its point, and the title is the run's.
    assert [text.get_text() for text in axes.texts] == ["1.601"] and axes.get_title(loc="left") == "run"


def test_a_panel_for_everything_that_a_run_has(tmp_path):
    panels = draw([make_run(tmp_path / "a", hellaswag=True, seconds=0.25)])
    assert {name: axes.get_ylabel() for name, axes in panels.items()} == {
        "loss": "loss (nats per token)", "hellaswag": "HellaSwag accuracy", "lr": "learning rate",
        "norm": "gradient norm", "speed": "tok/s",
    }  # fmt: skip
    assert [axes.get_xlabel() for axes in panels.values()] == [""] * 4 + ["step"]
    (rate,) = panels["lr"].lines
    assert len(rate.get_xdata()) == 100 and set(rate.get_ydata()) == {0.001}
    for name, value in (("norm", 0.5), ("speed", 200)):
        for line in panels[name].lines:
            assert list(line.get_ydata()) == pytest.approx([value] * 100)
    assert panels["speed"].get_ylim()[0] == 0
    assert [labels_of(axes) for axes in panels.values()][2:] == [[], [], []]
    assert plot.plot_runs(curves.read_runs([tmp_path / "a"])).read_bytes().startswith(PNG)


def test_only_the_panels_asked_for_in_their_order(tmp_path):
    folder = make_run(tmp_path / "a", hellaswag=True, seconds=0.25)
    assert list(draw([folder], "speed", "hellaswag")) == ["hellaswag", "speed"]
    assert list(draw([make_run(tmp_path / "b")])) == ["loss", "lr", "norm"]
    assert run(folder, "--show", "norm,lr", "--out", tmp_path / "p.png") == 0


def test_norms_of_every_size_are_seen(tmp_path):
    norms = [30.0, math.nan, math.inf, 0.0, 0.5]
    (tmp_path / "main.log").write_text("".join(f"s:{i} trl:3 lr:0.1 norm:{n}\n" for i, n in enumerate(norms)))
    panels = draw([tmp_path])
    assert panels["norm"].get_yscale() == "log" and panels["loss"].get_yscale() == "linear"


def test_accuracy_and_what_others_reach(tmp_path, monkeypatch):
    others = {"loss": {"GPT-2 124M": 3.424958}, "hellaswag": {"GPT-2 124M": 0.294463, "GPT-3 125M": 0.337}}
    monkeypatch.setattr(plot, "baselines", lambda runs: others)
    panels = draw([make_run(tmp_path / "a", hellaswag=True)])
    curve, *dashes = panels["hellaswag"].lines
    assert list(curve.get_xdata()) == [20, 40, 60, 80, 100] and curve.get_ydata()[-1] == 0.35
    assert [line.get_ydata()[0] for line in dashes] == [0.294463, 0.337]
    assert labels_of(panels["hellaswag"]) == [
        "this run (last 0.3500, best 0.3500)", "GPT-2 124M (0.2945)", "GPT-3 125M (0.3370)"
    ]  # fmt: skip
    assert panels["loss"].lines[3].get_ydata()[0] == 3.424958
    assert labels_of(panels["loss"])[2] == "GPT-2 124M on FineWeb (3.425)"


def test_a_line_to_compare_with_is_always_in_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "baselines", lambda runs: {"loss": {"GPT-2 124M": 0.9}})
    low, high = draw([make_run(tmp_path / "a")])["loss"].get_ylim()
    assert low < 0.9 < high


def test_several_runs_have_a_colour_each_and_are_named_once(tmp_path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", hellaswag=True)]
    panels = draw(folders)
    assert labels_of(panels["hellaswag"]) == ["b (last 0.3500, best 0.3500)"]
    assert [label.partition(" (")[0] for label in labels_of(panels["loss"])] == [
        "a, training", "a, validation", "b, training", "b, validation"
    ]  # fmt: skip
    colours = [line.get_color() for line in panels["loss"].lines]
    assert colours == [plot.COLOURS[0]] * 3 + [plot.COLOURS[1]] * 3
    assert not panels["loss"].texts and panels["loss"].get_title(loc="left") == "2 runs"
    assert labels_of(panels["lr"]) == [] and labels_of(draw(folders, "lr", "norm")["lr"]) == ["a", "b"]


# ---- axes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "over, seconds, label, end",
    [
        ("steps", 0.25, "step", 100),
        ("tokens", 0.25, "tokens trained on", 5000),
        ("time", 0.25, "training time (seconds)", 25),
        ("time", 12.0, "training time (minutes)", 20),
        ("time", 180.0, "training time (hours)", 5),
    ],
)
def test_axes(over, seconds, label, end, tmp_path):
    panels = draw([make_run(tmp_path / "a", seconds=seconds)], over=over)
    _, train, validation = panels["loss"].lines
    # Validations, as the batch of a step, come before its update.
    assert list(validation.get_xdata()) == pytest.approx([end * share for share in (0, 0.2, 0.4, 0.6, 0.8, 1)])
    assert train.get_xdata()[[0, -1]] == pytest.approx([0, end * 0.99])
    assert panels["speed"].get_xlabel() == label
    assert run(tmp_path / "a", "--over", over) == 0


def test_a_step_of_another_size_moves_all_after_it(tmp_path):
    make_run(tmp_path, steps=4, seconds=1.0)
    (tmp_path / "times.csv").write_text("step,tokens,seconds\n0,50,1.0\n1,50,1.000000\n0,10,3.000000\n2,50,0.500000\n")
    # The last update is missing, as in a run that was stopped between two lines: none of its figures is yet known.
    (tmp_path / "main.log").write_text("s:0 trl:3\ns:1 trl:3\ns:2 trl:3\ns:3 trl:3\n")
    assert curves.read_runs([tmp_path], "tokens")[0].positions == [0, 10, 60, 110]
    assert curves.read_runs([tmp_path], "time")[0].positions == [0, 3, 4, 4.5]


@pytest.mark.parametrize(
    "times, words", [(None, "is not there"), ("1,50,1.000000\n2,50,1.000000\n", "has no line for step 0")]
)
@pytest.mark.parametrize("over", ["tokens", "time"])
def test_a_run_that_does_not_tell_its_tokens_and_time(times, words, over, tmp_path, capsys):
    """One of llm.c's, or one that it began; also among others."""
    whole, bare = make_run(tmp_path / "whole", seconds=1.0), make_run(tmp_path / "bare")
    if times:
        (bare / "times.csv").write_text(times)
    assert run(whole, bare, "--over", over) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {bare / 'times.csv'}: {words}") and f"not over {over}" in err
    assert err.count("\n") == 1
    assert run(whole, bare, "--out", tmp_path / "p.png") == 0


# ---- what others reach ----------------------------------------------------------------------------------------------


def save_header(folder: Path, config: GPT2Config) -> None:
    """A checkpoint in its outward form, as large as it must be."""
    header = [20240326, 3, config.max_seq_len, config.vocab_size, config.num_layers, config.num_heads]
    with open(folder / "model_00000100.bin", "wb") as file:
        file.write(struct.pack("<256i", *header, config.channels, config.padded_vocab_size, *[0] * 248))
        file.truncate(1024 + 4 * config.num_parameters_padded)
    for rest in ("state_00000100_00000.bin", "DONE_00000100"):
        (folder / rest).touch()


def test_what_others_reach_is_that_of_the_runs_size(tmp_path):
    for name, config in (("small", GPT2Config(1, 1, 4, 50, 8)), ("deep", GPT2Config(12, 12, 768, 5, 8))):
        save_header(make_run(tmp_path / name), config)
    make_run(tmp_path)
    nothing = {"loss": {}, "hellaswag": {}}
    assert curves.baselines(curves.read_runs([tmp_path / "small", tmp_path])) == nothing
    gpt2 = nothing | {"hellaswag": {"GPT-2 124M": 0.294463, "GPT-3 125M": 0.337}}
    assert curves.baselines(curves.read_runs([tmp_path / "deep", tmp_path / "small"])) == gpt2
    assert curves.baselines(curves.read_runs([tmp_path / "deep/main.log"])) == gpt2


@pytest.mark.parametrize(
    "files, compares",
    [
        ("dev/data/fineweb10B/fineweb_val_*.bin", True),
        ("fineweb_val_000000.bin", True),
        ("data/fineweb/fineweb_val_*.bin", True),
        ("data/fineweb/edu_fineweb_val_*.bin", False),
        ("data/edu_fineweb10B/edu_fineweb_val_*.bin", False),
        ("fineweb/runs/data/val.bin", False),
        ("data/tiny_shakespeare_val.bin", False),
    ],
)
def test_losses_compare_only_on_the_same_text(files, compares, tmp_path):
    save_header(make_run(tmp_path), GPT2Config(24, 16, 1024, 5, 8))
    (tmp_path / "recipe.toml").write_text(f'train_data = "train.bin"\nval_data = "/{files}"\n')
    found = curves.baselines(curves.read_runs([tmp_path]))
    assert found["loss"] == ({"GPT-2 350M": 3.083089} if compares else {}) and len(found["hellaswag"]) == 2


# ---- files ----------------------------------------------------------------------------------------------------------


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
    runs = curves.read_runs([tmp_path])
    plot.table(runs, plot.choose_panels(runs))


# ---- the table ------------------------------------------------------------------------------------------------------


def test_table_without_matplotlib(tmp_path, capsys, no_matplotlib):
    assert run(make_run(tmp_path / "run")) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "run"
    assert lines[1].split() == ["step", "training", "validation", "lr", "norm"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "20", "40", "60", "80", "100"]
    # The last validation comes after the last training step, whose figures stand beside it.
    assert lines[-1].split() == ["100", "1.5009", "1.6008", "1.00e-03", "0.5000"]
    assert err == f"\nno picture: {tmp_path / 'run/loss.png'}: needs matplotlib; pip install 'pyllmc[plot]'\n"
    assert not (tmp_path / "run/loss.png").exists()


def test_table_along_an_axis_with_the_panels_asked_for(tmp_path, capsys, no_matplotlib):
    folders = [make_run(tmp_path / "a", hellaswag=True, seconds=12.0), make_run(tmp_path / "b", seconds=12.0)]
    assert run(*folders, "--over", "time", "--show", "loss,hellaswag,speed") == 0
    a, b = capsys.readouterr().out.split("\nb\n")
    names = "step training time (minutes) training validation HellaSwag tok/s".split()
    assert a.splitlines()[1].split() == names and "HellaSwag" not in b
    assert a.splitlines()[-1].split()[:2] == ["100", "20.00"] and a.splitlines()[-1].split()[-2:] == ["0.3500", "4"]
    assert run(folders[0], "--over", "tokens", "--show", "loss") == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["100", "5.0k", "1.5009", "1.6008"]


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["none"], "none/main.log: there is no such file; name the folder of a run"),
        (["empty"], "no losses"),
        (["run", "--out", "p.bmp"], "must end in .png"),
        (["run", "--show", "loss,hellaswag"], "--show hellaswag: not measured in run"),
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


@pytest.mark.parametrize("arguments", [["--show", "loss,speeds"], ["--show", ""], ["--over", "words"]])
def test_bad_command_line(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(make_run(tmp_path / "run"), *arguments)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("name", ["x^{$", "$a$", "line\nbreak", "o\udcff"])
def test_any_folder_name_may_stand_in_the_picture(name, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "main.log").write_text("s:0 trl:3.0 lr:0.1 norm:1\ns:1 trl:2.0 lr:0.1 norm:1\n")
    assert plot.plot_runs(curves.read_runs([folder])).exists()


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e31", "-1e300", "1.79e308", "1e-320"])
@pytest.mark.parametrize("where", ["everywhere", "last"])
def test_infinite_and_absurd_values_are_gaps(value, where, tmp_path, capfd, recwarn):
    folder = make_run(tmp_path / "run", 20)
    lines = (folder / "main.log").read_text().splitlines(keepends=True)
    changed = lines if where == "everywhere" else lines[-3:]
    changed = [re.sub(r"(trl|tel|lr|norm):\S+", rf"\1:{value}", line) for line in changed]
    (folder / "main.log").write_text("".join([*lines[: -len(changed)], *changed]))
    assert run(folder) == 0
    assert [str(warning.message) for warning in recwarn] == [] and capfd.readouterr().err == ""
    axes = draw([folder])["loss"]
    drawn = [value for line in axes.lines for value in line.get_ydata() if not math.isnan(value)]
    assert all(abs(value) <= 1e30 for value in drawn) and bool(drawn) == (where == "last" or value == "1e-320")


def test_runs_whose_names_begin_with_an_underscore_are_named(tmp_path):
    axes = draw([make_run(tmp_path / "_a"), make_run(tmp_path / "b")])["loss"]
    assert [label.split(",")[0] for label in labels_of(axes)] == [" _a", " _a", "b", "b"]


def test_a_log_that_is_a_pipe_is_told(tmp_path, capsys):
    """Opening it would wait for ever for one who writes to it."""
    folder = make_run(tmp_path / "run", seconds=0.1)
    for name in ("times.csv", "main.log"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert run(folder) == 1
        assert f"{folder / name}: not a regular file" in capsys.readouterr().err


# ---- of a run that is stopped ----------------------------------------------------------------------------------------


STOPPED = [
    "--text", "notes.txt", "--out", "run", "--layers", "1", "--heads", "2", "--channels", "16", "--context", "16",
    "--batch-size", "2", "--max-steps", "9", "--val-every", "3", "--threads", "1",
]  # fmt: skip


def stopped_in(monkeypatch, part: str, number: int) -> int:
    """The exit code of a run that gets this signal at its first call of a part of the loop."""
    real = getattr(train, part)

    def interrupted(*arguments):
        os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(train, part, interrupted)
    return cli.run_main(train.main, STOPPED)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_is_drawn(number, code, in_folder_with_text, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert stopped_in(monkeypatch, "_train_step", number) == code
    assert Path("run/loss.png").read_bytes().startswith(PNG)
    out, err = capsys.readouterr()
    assert out.endswith("stopped after step 1; to go on:  python -m pyllmc.train --out run --resume\n")
    assert "picture" not in out + err


def test_a_run_that_is_stopped_before_its_first_update_is_not_drawn(in_folder_with_text, monkeypatch):
    monkeypatch.setattr(train, "plot_runs", lambda *runs: pytest.fail("there is nothing to draw"))
    assert stopped_in(monkeypatch, "_validate", signal.SIGINT) == 130
    assert not Path("run/loss.png").exists()


@pytest.mark.parametrize("error", [ImportError("no matplotlib"), RuntimeError("a font"), KeyboardInterrupt()])
def test_what_a_stopped_run_says_and_its_exit_code_do_not_depend_on_the_picture(
    error, in_folder_with_text, monkeypatch, capsys
):
    def failing(runs):
        raise error

    monkeypatch.setattr(train, "plot_runs", failing)
    assert stopped_in(monkeypatch, "_train_step", signal.SIGTERM) == 143
    out, err = capsys.readouterr()
    assert out.endswith("--resume\n") and err == ""
