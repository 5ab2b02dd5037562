"""The pictures of a study, from the rows of eval_results_mask.json (see study/results.py)."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study.folder import write_bytes
from study.plan import arm_label
from study.results import WORDS, Cell, arms_of, collect, scale_of, stage_of, tasks_of

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5539", "#333333")  # Okabe and Ito
MARKS = "osD^vPX<>*hd"


def _typical(cells: Iterable[Cell], scale: float) -> str:
    cells = list(cells)
    halves = [cell.half * scale for cell in cells if cell.half == cell.half]
    if not cells:
        return ""
    counts = sorted({cell.n for cell in cells})
    seeds = max(cell.seeds for cell in cells)
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    around = f", typical 95 % interval ±{numpy.median(halves):.1f}" if halves else ""
    return f"{n} items a cell{around}" + (f"; mean over {seeds} seeds" if seeds > 1 else "")


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format="png",
        dpi=150,
        facecolor="white",
        bbox_inches="tight",
        pad_inches=0.15,
        metadata={"Software": None},
    )
    write_bytes(path, buffer.getvalue())
    return path


def _wrap(name: str, width: int = 14) -> str:
    """Break a long task name after an underscore, for axis labels."""
    lines, line = [], ""
    for part in name.replace("_", "_\n").split("\n"):
        if line and len(line + part) > width:
            lines, line = [*lines, line], ""
        line += part
    return "\n".join([*lines, line])


def _clean(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def bar_figure(rows: list[dict], metric: str = "exact_match") -> Figure:
    """Base and stage 1, a pair of bars a task, with 95 % intervals."""
    cells, scale = collect(rows, metric), scale_of(metric)
    tasks = [t for t in tasks_of(rows) if (0, None, None, None, t) in cells or (1, None, t, None, t) in cells]
    figure = Figure(figsize=(max(5.2, 1.5 + 1.5 * len(tasks)), 4.2))
    axes = figure.add_subplot()
    series = [
        ("base model", "#B8BEC6", [(0, None, None, None, t) for t in tasks]),
        ("after stage 1 on this task", COLOURS[0], [(1, None, t, None, t) for t in tasks]),
    ]
    for k, (label, colour, keys) in enumerate(series):
        for j, key in enumerate(keys):
            cell, x = cells.get(key), j + (k - 0.5) * 0.38
            if cell is None:
                axes.text(x, 0, "not\nscored", ha="center", va="bottom", fontsize=7.5, color="#888888")
                continue
            value = cell.value * scale
            error = None
            top = value
            if cell.half == cell.half:
                error = [[max(0.0, value - cell.low * scale)], [max(0.0, cell.high * scale - value)]]
                top = max(value, cell.high * scale)
            axes.bar(
                x,
                value,
                0.36,
                color=colour,
                yerr=error,
                capsize=3,
                ecolor="#444444",
                error_kw={"elinewidth": 1},
                label=label if j == 0 else None,
            )
            axes.annotate(f"{value:.1f}", (x, top), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(tasks)), [_wrap(t, 16) for t in tasks])
    axes.set_xlim(-0.6, len(tasks) - 0.4)
    if scale == 100:
        axes.set_ylim(0, 108)
        axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel(f"{WORDS.get(metric, metric)}" + (" (%)" if scale == 100 else ""))
    axes.set_title("What stage 1 taught: each task before and after", fontsize=12, loc="left", pad=28)
    axes.legend(
        handles=[Line2D([], [], marker="s", linestyle="", markersize=9, color=c, label=w) for w, c, _ in series],
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        frameon=False,
        ncols=2,
        fontsize=9,
        handletextpad=0.3,
    )
    _clean(axes)
    _caption(axes, _typical([cells[k] for *_, keys in series for k in keys if k in cells], scale))
    return figure


def _caption(axes, text: str, below: float = 44) -> None:
    """Grey words under the axes, `below` points beneath the lowest tick label's usual place."""
    axes.annotate(
        text,
        (0, 0),
        xycoords="axes fraction",
        xytext=(0, -below),
        textcoords="offset points",
        fontsize=8.5,
        color="#555555",
        va="top",
        ha="left",
        annotation_clip=False,
    )


def heatmap_figure(rows: list[dict], arm: str, metric: str = "exact_match", which: str = "first") -> Figure:
    """Rows: first task, columns: second task; the score on the `which` task after both; diagonal: stage 1 alone.

    The small figure in a cell is its distance from stage 1 on the same task.
    """
    cells, scale, tasks = collect(rows, metric), scale_of(metric), tasks_of(rows)
    size = len(tasks)
    grid = numpy.full((size, size), numpy.nan)
    shown: dict[tuple[int, int], Cell] = {}
    for i, a in enumerate(tasks):
        for j, b in enumerate(tasks):
            task = a if which == "first" else b
            cell = cells.get((1, None, task, None, task) if i == j else (2, arm, a, b, task))
            if cell is not None:
                grid[i, j], shown[i, j] = cell.value * scale, cell
    figure = Figure(figsize=(2.6 + 1.15 * max(size, 3), 1.9 + 0.92 * max(size, 3)))
    axes = figure.add_subplot()
    limits = (0, 100) if scale == 100 else (0, max(1.0, numpy.nanmax(grid)) if shown else 1.0)
    colours = "YlGnBu" if scale == 100 else "YlGnBu_r"
    axes.set_facecolor("#f2f2f2")
    picture = axes.imshow(grid, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    for i in range(size):
        for j in range(size):
            if (i, j) not in shown:
                axes.text(j, i, "no score", ha="center", va="center", fontsize=8.5, color="#999999")
                continue
            red, green, blue, _ = picture.cmap(picture.norm(grid[i, j]))
            ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#1a1a1a"
            own = shown.get((i, i) if which == "first" else (j, j))
            digits = ".1f" if scale == 100 else ".2f"
            if i == j or own is None:
                axes.text(
                    j,
                    i,
                    f"{grid[i, j]:{digits}}",
                    ha="center",
                    va="center",
                    color=ink,
                    fontsize=12,
                    fontweight="bold" if i == j else "normal",
                )
            else:
                axes.text(j, i - 0.1, f"{grid[i, j]:{digits}}", ha="center", va="center", color=ink, fontsize=12)
                axes.text(
                    j,
                    i + 0.24,
                    f"{grid[i, j] - own.value * scale:+{digits}}",
                    ha="center",
                    va="center",
                    color=ink,
                    fontsize=8.5,
                )
    axes.set_xticks(range(size), [_wrap(t, 15) for t in tasks], fontsize=9.5)
    axes.set_yticks(range(size), [_wrap(t, 16) for t in tasks], fontsize=9.5)
    axes.set_xlabel("second task trained", labelpad=8)
    axes.set_ylabel("first task trained", labelpad=8)
    axes.set_xticks(numpy.arange(size - 1) + 0.5, minor=True)
    axes.set_yticks(numpy.arange(size - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(length=0)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(picture, ax=axes, fraction=0.045, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8.5)
    unit = " (%)" if scale == 100 else ""
    axes.set_title(
        f"{arm_label(arm)}: {WORDS.get(metric, metric)}{unit}\non the {which} task after both stages",
        fontsize=12,
        loc="left",
        pad=10,
    )
    words = "Diagonal: stage 1 alone on that task. Small: distance from it."
    _caption(axes, f"{words}\n{_typical(shown.values(), scale)}", below=62)
    return figure


def scatter_figure(rows: list[dict], metric: str = "exact_match") -> Figure:
    """x: score on the second task, y: score on the first, both after stage 2; a colour an arm, a mark a first task.

    Large marks are the arms' means over their pairs; lines are the means of the base and of stage 1 alone.
    """
    cells, scale, tasks, arms = collect(rows, metric), scale_of(metric), tasks_of(rows), arms_of(rows)
    figure = Figure(figsize=(8.2, 5.4))
    axes = figure.add_subplot()
    firsts, everything = [], []
    for order, (colour, arm) in enumerate(zip(_cycle(COLOURS), arms, strict=False)):
        shrink = 1 - 0.45 * order / max(1, len(arms) - 1)  # later arms are drawn smaller: where points coincide, as rings
        points = []
        for i, a in enumerate(tasks):
            for b in tasks:
                kept, learned = cells.get((2, arm, a, b, a)), cells.get((2, arm, a, b, b))
                if kept is None or learned is None:
                    continue
                point = (learned.value * scale, kept.value * scale)
                points.append(point)
                everything += [kept, learned]
                if a not in firsts:
                    firsts.append(a)
                axes.plot(
                    *point,
                    marker=MARKS[i % len(MARKS)],
                    color=colour,
                    alpha=0.75,
                    markersize=8.5 * shrink,
                    linestyle="",
                    markeredgecolor="white",
                    markeredgewidth=0.6,
                    clip_on=False,
                    zorder=3,
                )
        if points:
            axes.plot(
                *numpy.mean(points, axis=0),
                marker="o",
                markersize=19 * shrink,
                markerfacecolor=colour,
                alpha=0.95,
                markeredgecolor="black",
                markeredgewidth=1.4,
                linestyle="",
                clip_on=False,
                zorder=4,
            )
    lines = []
    for words, style, keys in (
        ("base", ":", [(0, None, None, None, t) for t in tasks]),
        ("stage 1 alone", "--", [(1, None, t, None, t) for t in tasks]),
    ):
        values = [cells[key].value * scale for key in keys if key in cells]
        if values:
            mean = float(numpy.mean(values))
            axes.axhline(mean, color="#888888", linestyle=style, linewidth=1.1, zorder=1)
            axes.axvline(mean, color="#888888", linestyle=style, linewidth=1.1, zorder=1)
            lines.append(Line2D([], [], color="#888888", linestyle=style, label=f"{words}, mean {mean:.1f}"))
    name = WORDS.get(metric, metric) + (" (%)" if scale == 100 else "")
    axes.set_xlabel(f"second task learned: {name}")
    axes.set_ylabel(f"first task kept: {name}")
    if scale == 100:
        axes.set_xlim(-3, 103)
        axes.set_ylim(-3, 103)
    axes.set_title("Learning the second task against keeping the first", fontsize=12, loc="left", pad=10)
    handles = [
        Line2D([], [], marker="o", color=c, linestyle="", markersize=10, markeredgecolor="black", label=arm_label(a))
        for c, a in zip(_cycle(COLOURS), arms, strict=False)
    ]
    first = axes.legend(
        handles=handles,
        title="arm (large: mean over pairs)",
        loc="upper left",
        bbox_to_anchor=(1.02, 1.0),
        frameon=False,
        fontsize=9,
        title_fontsize=9,
        alignment="left",
    )
    axes.add_artist(first)
    marks = [
        Line2D([], [], marker=MARKS[tasks.index(t) % len(MARKS)], color="#777777", linestyle="", label=t)
        for t in firsts
    ]
    axes.legend(
        handles=marks + lines,
        title="first task of the pair",
        loc="lower left",
        bbox_to_anchor=(1.02, 0.0),
        frameon=False,
        fontsize=9,
        title_fontsize=9,
        alignment="left",
    )
    _clean(axes)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    _caption(axes, f"One point a pair, up and to the right is better. {_typical(everything, scale)}")
    return figure


def _cycle(values: tuple) -> Iterable:
    while True:
        yield from values


def all_figures(rows: list[dict]) -> dict[str, Figure]:
    """Every picture that the rows allow, under the name of its file."""
    found = {}
    scored = {(row.get("metric"), stage_of(row) == 2) for row in rows}
    if ("exact_match", False) in scored:
        found["bar_base_lora_exact_match"] = bar_figure(rows)
    arms = arms_of(rows)
    for arm in arms:
        mine = [row for row in rows if stage_of(row) < 2 or row["arm"] == arm]
        for metric in ("exact_match", "rougeL"):
            if any(row["metric"] == metric and stage_of(row) == 2 for row in mine):
                found[f"heatmap_{metric}_{arm_label(arm)}"] = heatmap_figure(rows, arm, metric)
        if any(row["metric"] == "exact_match" and stage_of(row) == 2 for row in mine):
            found[f"heatmap_second_exact_match_{arm_label(arm)}"] = heatmap_figure(rows, arm, which="second")
    if ("exact_match", True) in scored:
        found["learning_vs_retention"] = scatter_figure(rows)
    return found


def draw_all(rows: list[dict], folder: str | Path) -> list[Path]:
    """Draws all_figures into `folder` (performance_matrices_mask/); returns the files."""
    return [_save(figure, Path(folder) / f"{name}.png") for name, figure in all_figures(rows).items()]
