"""Pictures of training runs from their main.log: `python -m pyllmc.plot LOGDIR...`.

Draws training loss (every step faint, a smoothed line over it) and validation loss over steps, several runs in one
picture. Works while a run goes on. Without matplotlib (`pip install matplotlib`) the curves are a table in text.
Called by train.py at the end of a run, and from the command line; calls logs.py for the file.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from .cli import ArgumentParser, printable, run_main
from .files import atomic_write
from .logs import read_main_log

LOG_FILE = "main.log"
PICTURE_FILE = "loss.png"
FORMATS = (".png", ".svg", ".pdf")

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


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
    figure = _draw(runs)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower())
    return path


def _draw(runs: dict[str, dict]):
    """The figure. Without pyplot: no window system is touched, and no state stays behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # A folder's name may hold anything, also what a picture's text takes for a formula.
    runs = {printable(name).replace("$", r"\$"): curves for name, curves in runs.items()}
    for index, (name, curves) in enumerate(runs.items()):
        _draw_run(axes, curves, *_labels_and_colours(name, index, len(runs)))
    _scale(axes, runs)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(next(iter(runs)) if len(runs) == 1 else "Training and validation loss", loc="left", weight="bold")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
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
        train, validation = curves.get("trl", {}), curves.get("tel", {})
        average = dict(zip(train, smoothed(list(train.values()), 1 - min(1.0, 100 / max(1, len(train)))), strict=True))
        # Validations are the points of interest where there are enough of them; otherwise evenly spaced steps.
        steps = sorted(validation) if len(validation) > 2 else sorted({*train, *validation})
        stride = max(1, round(len(steps) / rows))
        chosen = sorted({*steps[::stride], steps[-1]})
        lines += [name, f"{'step':>10}{'training':>12}{'validation':>12}"]
        for step in chosen:
            # The last validation comes after the last training step.
            loss = average.get(step, average.get(step - 1))
            cells = (f"{value:.4f}" if value is not None else "" for value in (loss, validation.get(step)))
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
