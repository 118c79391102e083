"""Pictures of training runs from their main.log: `python -m pyllmc.plot LOGDIR...`.

Draws training loss (every step faint, a smoothed line over it) and validation loss over steps, several runs in one
picture. Below them, where a run has it, the accuracy on HellaSwag, with what GPT-2 and GPT-3 of that size reach. Works
while a run goes on. Without matplotlib (`pip install matplotlib`) the curves are a table in text.

Called by train.py at the end of a run, and from the command line; calls logs.py for the file, and checkpoint.py and
modelfile.py for the size of a model.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from .checkpoint import Checkpoint, list_steps
from .cli import ArgumentParser, printable, run_main
from .config import GPT2Config
from .files import atomic_write
from .logs import read_main_log
from .modelfile import read_header

LOG_FILE = "main.log"
PICTURE_FILE = "loss.png"
FORMATS = (".png", ".svg", ".pdf")

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

# HellaSwag's accuracy of finished models, by the size of GPT-2 that is as large: GPT-2's own as llm.c measures it,
# GPT-3's from its paper (Brown et al. 2020), as llm.c's own pictures have them.
REACHED = {
    "d12": {"GPT-2 124M": 0.294463, "GPT-3 125M": 0.337},
    "d24": {"GPT-2 350M": 0.375224, "GPT-3 350M": 0.436},
    "d36": {"GPT-2 774M": 0.431986, "GPT-3 760M": 0.510},
    "d48": {"GPT-2 1558M": 0.488946, "GPT-3 1.3B": 0.547},
}


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """The exponential average of `values`, corrected for its start; `weight` is what remains of the past at each."""
    result, total, norm = [], 0.0, 0.0
    for value in values:
        if value == value:  # a skipped step logs nan, which would stay in the average for ever
            total = weight * total + (1 - weight) * value
            norm = weight * norm + (1 - weight)
        result.append(total / norm if norm else value)
    return result


def read_runs(folders: Sequence[str | Path]) -> dict[str, dict]:
    """The curves of each folder's main.log, by the folder's name. ValueError for one without any loss."""
    runs = {}
    for folder in folders:
        path = Path(folder)
        path = path if path.is_file() else path / LOG_FILE
        curves = read_main_log(path)
        if not curves.get("trl") and not curves.get("tel"):
            raise ValueError(f"{path}: no losses in it yet")
        name = path.absolute().parent.name
        runs[name if name not in runs else str(path.parent)] = curves
    return runs


def reached(folders: Sequence[str | Path]) -> dict[str, float]:
    """The accuracies to compare with: of the sizes of GPT-2 that the newest models in these folders have."""
    sizes = {}
    for name in REACHED:
        config = GPT2Config.from_descriptor(name)
        sizes[config.num_layers, config.channels] = REACHED[name]
    found: dict[str, float] = {}
    for folder in (Path(folder) for folder in folders):
        folder = folder.parent if folder.is_file() else folder
        # A run that goes on may just have taken its checkpoint away; the picture does without.
        with contextlib.suppress(OSError, ValueError):
            steps = list_steps(folder)
            config = read_header(Checkpoint(folder, max(steps)).model_path).config
            found |= sizes.get((config.num_layers, config.channels), {})
    return found


def plot_losses(folders: str | Path | Sequence[str | Path], path: str | Path | None = None) -> Path:
    """Draws the losses of one run's folder or of several, and returns the picture's path: `loss.png` in the folder (of
    several, in the current one) unless given. ImportError without matplotlib; OSError, ValueError for a bad log."""
    folders = [folders] if isinstance(folders, (str, Path)) else list(folders)
    runs = read_runs(folders)
    path = (
        Path(path)
        if path
        else Path(folders[0] if len(folders) == 1 and Path(folders[0]).is_dir() else ".", PICTURE_FILE)
    )
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a picture's name must end in {', '.join(FORMATS)}")
    figure = _draw(runs, reached(folders))
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower())
    return path


def _draw(runs: dict[str, dict], reached: dict[str, float]):
    """The figure. Without pyplot: no window system is touched, and no state stays behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = any(curves.get("eval") for curves in runs.values())
    figure = Figure(figsize=(8, 7 if measured else 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, sharex=True, height_ratios=(5, 2)) if measured else [figure.add_subplot()]
    axes = panels[0]
    # A folder's name may hold anything, also what a picture's text takes for a formula.
    runs = {printable(name).replace("$", r"\$"): curves for name, curves in runs.items()}
    for index, (name, curves) in enumerate(runs.items()):
        _draw_run(axes, curves, *_labels_and_colours(name, index, len(runs)))
    if measured:
        _draw_accuracy(panels[1], runs, reached)
    _scale(axes, runs)
    panels[-1].set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(next(iter(runs)) if len(runs) == 1 else "Training and validation loss", loc="left", weight="bold")
    for panel in panels:
        panel.grid(axis="y", color="#dddddd", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    return figure


def _labels_and_colours(name: str, index: int, count: int) -> tuple[str, str, str, str]:
    """Labels and colours of the training and the validation curve: one run has two colours, several have one each."""
    if count == 1:
        return "training", "validation", COLOURS[0], COLOURS[1]
    colour = COLOURS[index % len(COLOURS)]
    return f"{name}, training", f"{name}, validation", colour, colour


def _draw_run(axes, curves: dict, train_label: str, validation_label: str, train_colour: str, colour: str) -> None:
    train, validation = curves.get("trl", {}), curves.get("tel", {})
    if train:
        steps, losses = list(train), list(train.values())
        axes.plot(steps, losses, color=train_colour, alpha=0.2, linewidth=0.7)
        # Each point averages about the last hundredth of the run.
        line = smoothed(losses, 1 - min(1.0, 100 / len(losses)))
        axes.plot(steps, line, color=train_colour, linewidth=1.6, label=f"{train_label} (last {line[-1]:.3f})")
    if validation:
        steps, losses = list(validation), list(validation.values())
        label = f"{validation_label} (last {losses[-1]:.3f}, best {min(losses):.3f})"
        axes.plot(
            steps, losses, "o-", color=colour, linewidth=1.6, markersize=4.5, markeredgecolor="white", label=label
        )
        axes.annotate(
            f"{losses[-1]:.3f}", (steps[-1], losses[-1]), xytext=(6, 0), textcoords="offset points", va="center",
            color=colour, weight="bold", annotation_clip=False,
        )  # fmt: skip


def _draw_accuracy(axes, runs: dict[str, dict], reached: dict[str, float]) -> None:
    """The panel of HellaSwag: a line for each run that has measured it, dashes for what others reach."""
    for index, (name, curves) in enumerate(runs.items()):
        if accuracy := curves.get("eval"):
            steps, shares = list(accuracy), list(accuracy.values())
            label = f"{name if len(runs) > 1 else 'this run'} (last {shares[-1]:.4f}, best {max(shares):.4f})"
            colour = _labels_and_colours(name, index, len(runs))[3]
            axes.plot(steps, shares, "o-", color=colour, linewidth=1.6, markersize=4.5, markeredgecolor="white",
                      label=label)  # fmt: skip
    for name, share in reached.items():
        style = ":" if name.startswith("GPT-3") else "--"
        axes.axhline(share, color="#777777", linestyle=style, linewidth=1, label=f"{name} ({share:.4f})")
    axes.set_ylabel("HellaSwag accuracy")


def _scale(axes, runs: dict[str, dict]) -> None:
    """Shows the fall after the first steps, not the cliff at the start: a logarithmic loss axis with plain numbers.
    Steps are whole."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    losses = [loss for curves in runs.values() for name in ("trl", "tel") for loss in curves.get(name, {}).values()]
    losses = [loss for loss in losses if 0 < loss < float("inf")]
    if losses and max(losses) / min(losses) > 1.5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
        axes.set_ylim(min(losses) * 0.95, max(losses) * 1.03)


def loss_table(runs: dict[str, dict], rows: int = 12) -> str:
    """The same curves as text: about `rows` lines a run, from the first step to the last."""
    lines = []
    for name, curves in runs.items():
        train, validation, accuracy = (curves.get(kind, {}) for kind in ("trl", "tel", "eval"))
        average = dict(zip(train, smoothed(list(train.values()), 1 - min(1.0, 100 / max(1, len(train)))), strict=True))
        # Validations are the points of interest where there are enough of them; otherwise evenly spaced steps.
        steps = sorted(validation) if len(validation) > 2 else sorted({*train, *validation})
        stride = max(1, round(len(steps) / rows))
        chosen = sorted({*steps[::stride], steps[-1]})
        lines += [name, f"{'step':>10}{'training':>12}{'validation':>12}" + f"{'HellaSwag':>12}" * bool(accuracy)]
        for step in chosen:
            # The last validation comes after the last training step.
            loss = average.get(step, average.get(step - 1))
            values = [loss, validation.get(step), *([accuracy.get(step)] if accuracy else [])]
            cells = (f"{value:.4f}" if value is not None else "" for value in values)
            lines.append(f"{step:>10}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m pyllmc.plot", description="Draw the losses of training runs.")
    parser.add_argument("folders", metavar="LOGDIR", nargs="+", help="folder of a run, with its main.log")
    parser.add_argument("--out", metavar="FILE", help="the picture, .png .svg or .pdf; by default LOGDIR/loss.png")
    options = parser.parse_args(argv)
    try:
        print(plot_losses(options.folders, options.out))
    except ImportError as error:
        print(loss_table(read_runs(options.folders)))
        print(f"\nNo picture: {error}; pip install matplotlib draws one.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_main(main))
