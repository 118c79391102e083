"""Pictures of training runs: `python -m pyllmc.plot FOLDER...`.

Draws training and validation loss, and below them, where a run has it, HellaSwag's accuracy, learning rate, gradient
norm and speed, over steps, tokens or time, of one run or of several. What changes from step to step is faint, with a
smoothed line over it; dashes are what GPT-2 and GPT-3 of that size reach. Works while a run goes on. Without matplotlib
(`pip install 'pyllmc[plot]'`) the same curves are a table in text.

Called by train.py at the end of a run, and from the command line; calls curves.py for what is drawn, and extras.py.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from .cli import ArgumentParser, printable, run_main
from .curves import AXES, PANELS, PICTURE_FILE, RunCurves, baselines, panels_of, read_runs, smoothed
from .extras import needed
from .figures import format_count
from .files import atomic_write

FORMATS = (".png", ".svg", ".pdf")
# What is larger has no place on an axis that matplotlib can lay out.
LARGEST = 1e30

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#666666"

HEIGHTS = {"loss": 3.6, "hellaswag": 1.9, "lr": 1.15, "norm": 1.15, "speed": 1.15}  # inches
Y_LABELS = {
    "loss": "loss (nats per token)", "hellaswag": "HellaSwag accuracy", "lr": "learning rate",
    "norm": "gradient norm", "speed": "tok/s",
}  # fmt: skip
UNITS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}


def plot_runs(runs: Sequence[RunCurves], path: str | Path | None = None, show: Sequence[str] = ()) -> Path:
    """Draws one run or several, and returns the picture's path: `loss.png` in the run's folder (of several, in the
    current one) unless given. `show` are some of PANELS, or all that the runs have. ImportError without matplotlib;
    OSError, ValueError for runs that cannot be drawn so."""
    panels = choose_panels(runs, show)
    path = Path(path) if path else Path(runs[0].folder if len(runs) == 1 else ".", PICTURE_FILE)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a picture's name must end in {', '.join(FORMATS)}")
    with needed("plot", path):
        import matplotlib  # noqa: F401
    figure = _draw(runs, panels)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower())
    return path


def choose_panels(runs: Sequence[RunCurves], show: Sequence[str] = ()) -> list[str]:
    """The panels to show, in the order of PANELS; ValueError for one of `show` that none of the runs can fill."""
    there = panels_of(runs)
    for panel in show:
        if panel not in there:
            raise ValueError(f"--show {panel}: not measured in {', '.join(str(run.folder) for run in runs)}")
    return [panel for panel in there if panel in show or not show]


# ---- the picture ----------------------------------------------------------------------------------------------------


def _draw(runs: Sequence[RunCurves], panels: Sequence[str]):
    """The figure. Without pyplot: no window system is touched, and no state stays behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = [_drawable(run) for run in runs]
    heights = [HEIGHTS[panel] for panel in panels]
    figure = Figure(figsize=(8, sum(heights) + 0.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(panels), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    axis, unit = _axis(runs)
    dashes = baselines(runs)
    for panel, axes in zip(panels, all_axes, strict=True):
        for index, run in enumerate(runs):
            # Of several runs each has a colour; of one the training and the validation have one each.
            colours = (COLOURS[0], COLOURS[1]) if len(runs) == 1 else (COLOURS[index % len(COLOURS)],) * 2
            # Which colour is whose is said once, in the first panel, and where there are figures to tell.
            named = len(runs) > 1 and panel == panels[0]
            _draw_run(axes, panel, run, unit, colours, _label(run.name) if len(runs) > 1 else "", named)
        for name, value in dashes.get(panel, {}).items():
            style = ":" if name.startswith("GPT-3") else "--"
            label = f"{name} on FineWeb ({value:.3f})" if panel == "loss" else f"{name} ({value:.4f})"
            axes.axhline(value, color=GREY, linestyle=style, linewidth=1, label=label)
        _scale(axes, panel, [*_values(runs, panel), *dashes.get(panel, {}).values()])
        axes.set_ylabel(Y_LABELS[panel])
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="upper right" if panel == "loss" else "best")
    _scale_x(all_axes[-1], runs[0].over)
    all_axes[-1].set_xlabel(axis)
    title = _printable(runs[0].name) if len(runs) == 1 else f"{len(runs)} runs"
    all_axes[0].set_title(title, loc="left", weight="bold")
    figure.align_ylabels()
    return figure


def _drawable(run: RunCurves) -> RunCurves:
    """The run with nan, which leaves a gap, for what cannot be drawn: infinite and absurd values."""
    curves = {
        kind: {step: value if abs(value) <= LARGEST else math.nan for step, value in curve.items()}
        for kind, curve in run.curves.items()
    }
    return dataclasses.replace(run, curves=curves)


def _printable(name: str) -> str:
    """A folder's name may hold anything, also what a picture's text takes for a formula."""
    return printable(name).replace("$", r"\$")


def _label(name: str) -> str:
    """The name of a run in a legend, which leaves out what begins with an underscore."""
    return (" " if name.startswith("_") else "") + _printable(name)


def _axis(runs: Sequence[RunCurves]) -> tuple[str, float]:
    """The name of the horizontal axis, which is the same for all, and how much of it is one unit there: time is told in
    what suits the longest."""
    if (over := runs[0].over) != "time":
        return {"steps": "step", "tokens": "tokens trained on"}[over], 1
    longest = max(run.end for run in runs)
    unit = max((name for name in UNITS if longest >= 3 * UNITS[name]), key=UNITS.get, default="seconds")
    return f"training time ({unit})", UNITS[unit]


def _values(runs: Sequence[RunCurves], panel: str) -> list[float]:
    return [value for run in runs for kind in PANELS[panel] for value in run.curve(kind).values()]


def _draw_run(axes, panel: str, run: RunCurves, unit: float, colours: tuple[str, str], name: str, named: bool) -> None:
    """The curves of one run in one panel. `name` is empty for the only run; `named` asks for a label in any case."""
    for kind in PANELS[panel]:
        if curve := run.curve(kind):
            xs, values = [run.position(step) / unit for step in curve], list(curve.values())
            if kind in ("tel", "eval"):
                _draw_dots(axes, kind, xs, values, colours[1], name)
            else:
                _draw_line(axes, kind, xs, values, colours[0], name, named)


def _draw_dots(axes, kind: str, xs: list[float], values: list[float], colour: str, name: str) -> None:
    """What is measured now and then: validation loss, accuracy."""
    decimals, choose = (3, min) if kind == "tel" else (4, max)
    best = choose((value for value in values if not math.isnan(value)), default=math.nan)
    what = {"tel": "validation"}.get(kind, "" if name else "this run")
    label = f"{', '.join(filter(None, (name, what)))} (last {values[-1]:.{decimals}f}, best {best:.{decimals}f})"
    axes.plot(xs, values, "o-", color=colour, linewidth=1.6, markersize=4.5, markeredgecolor="white", label=label)
    # Beside the last point; those of several runs would lie on one another.
    if not name and not math.isnan(values[-1]):
        axes.annotate(
            f"{values[-1]:.{decimals}f}", (xs[-1], values[-1]), xytext=(6, 0), textcoords="offset points", va="center",
            color=colour, weight="bold", annotation_clip=False,
        )  # fmt: skip


def _draw_line(axes, kind: str, xs: list[float], values: list[float], colour: str, name: str, named: bool) -> None:
    """What every step has: faint as it is, smoothed over it; the learning rate is smooth."""
    line = values
    if kind != "lr":
        axes.plot(xs, values, color=colour, alpha=0.2, linewidth=0.7)
        line = smoothed(values)
    label = name if named else None
    if kind == "trl":
        label = f"{', '.join(filter(None, (name, 'training')))} (last {line[-1]:.3f})"
    axes.plot(xs, line, color=colour, linewidth=1.6, label=label)


def _scale(axes, panel: str, values: Sequence[float]) -> None:
    """Shows the fall of the loss after the first steps, not the cliff at the start, and norms of any size: logarithmic
    axes with plain numbers where the values span enough. A speed is seen from 0 on."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:g}")
    values = [value for value in values if value > 0]
    if panel not in ("loss", "hellaswag"):
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    if panel == "lr":
        axes.yaxis.set_major_formatter(plain)
    if panel == "speed":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if panel == "loss" and values and max(values) / min(values) > 1.5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]))
        axes.set_ylim(min(values) * 0.95, max(values) * 1.03)
    if panel == "norm" and values and max(values) / min(values) > 20:
        axes.set_yscale("log")
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()


def _scale_x(axes, over: str) -> None:
    """Steps are whole, tokens are counted in k, M and G."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=over != "time"))
    if over == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


# ---- the table ------------------------------------------------------------------------------------------------------

_COLUMNS = {
    "trl": ("training", "{:.4f}".format), "tel": ("validation", "{:.4f}".format),
    "eval": ("HellaSwag", "{:.4f}".format), "lr": ("lr", "{:.2e}".format), "norm": ("norm", "{:.4f}".format),
    "speed": ("tok/s", format_count),
}  # fmt: skip
_SMOOTHED = ("trl", "norm", "speed")


def table(runs: Sequence[RunCurves], panels: Sequence[str], rows: int = 12) -> str:
    """The same curves as text: about `rows` lines a run, from the first step to the last."""
    axis, unit = _axis(runs)
    lines = []
    for run in runs:
        kinds = [kind for panel in panels for kind in PANELS[panel] if panel == "loss" or run.curve(kind)]
        curves = {kind: run.curve(kind) for kind in kinds}
        for kind in set(_SMOOTHED).intersection(curves):
            curves[kind] = dict(zip(curves[kind], smoothed(list(curves[kind].values())), strict=True))
        # Validations are the points of interest where there are enough of them; otherwise evenly spaced steps.
        steps = sorted(run.curve("tel"))
        steps = steps if len(steps) > 2 else sorted({step for curve in curves.values() for step in curve})
        names = [*(["step"] if run.over == "steps" else ["step", axis]), *(_COLUMNS[kind][0] for kind in curves)]
        cells = [names]
        for step in sorted({*steps[:: max(1, round(len(steps) / rows))], *steps[-1:]}):
            place = run.position(step) / unit
            along = {"steps": [], "tokens": [format_count(place)], "time": [f"{place:.2f}"]}[run.over]
            cells.append([str(step), *along, *(_cell(kind, curve, step) for kind, curve in curves.items())])
        widths = [10, *(max(12, len(name) + 2) for name in names[1:])]
        lines.append(printable(run.name))
        lines += ["".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(lines)


def _cell(kind: str, curve: dict[int, float], step: int) -> str:
    """A figure of the table. The last validation comes after the last training step."""
    value = curve.get(step, None if kind in ("tel", "eval") else curve.get(step - 1))
    return "" if value is None else _COLUMNS[kind][1](value)


# ---- the program ----------------------------------------------------------------------------------------------------


def _panels(text: str) -> list[str]:
    """The panels in a list with commas between them."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PANELS:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(PANELS)}, got {name!r}")
    return names


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m pyllmc.plot", description="Draw training runs, also while they go on.")
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="folder of a run, with its main.log")
    parser.add_argument("--over", choices=AXES, default="steps", help="the horizontal axis")
    parser.add_argument(
        "--show", type=_panels, metavar="PANELS",
        help=f"some of {','.join(PANELS)}; by default all that the runs have",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="the picture, .png .svg or .pdf; by default FOLDER/loss.png")
    options = parser.parse_args(argv)
    runs, show = read_runs(options.folders, options.over), options.show or ()
    try:
        print(plot_runs(runs, options.out, show))
    except ImportError as error:
        print(table(runs, choose_panels(runs, show)))
        print(f"\nno picture: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_main(main))
