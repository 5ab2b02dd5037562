"""Pictures and tables of a study, from the rows of eval_results_mask.json.

A row: {run, arm, first, second, task, metric, value, low, high, n, unparsed, seed, stage}; stage 0 is the base,
stage 1 has no second task.  Values of exact_match and rougeL are shares, shown in percent.  With
several seeds every cell is the mean over seeds.
"""

import io
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from study.folder import write_bytes
from study.logging import format_table
from study.plan import MASKS, arm_label

WORDS = {
    "exact_match": "Exact match",
    "rougeL": "ROUGE-L",
    "flexible_match": "Flexible match",
    "string_match": "String match",
    "answer_nll": "Answer NLL",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5539", "#333333")  # Okabe and Ito
MARKS = "osD^vPX<>*hd"


@dataclass(frozen=True)
class Cell:
    """One score in its own unit: mean over seeds, 95 % interval (NaN where unknown), items, seeds."""

    value: float
    low: float
    high: float
    n: int
    seeds: int
    key: tuple = ()

    @property
    def half(self) -> float:
        """The longer side of the interval (a share's interval is not symmetric)."""
        return max(self.high - self.value, self.value - self.low)


def _stage(row: dict) -> int:
    if row.get("stage") is not None:
        return int(row["stage"])
    return 0 if row.get("arm") == "base" or not row.get("first") else 2 if row.get("second") else 1


def collect(rows: Iterable[dict], metric: str) -> dict[tuple, Cell]:
    """(stage, arm, first, second, task) -> Cell, over seeds; base and stage 1 under arm None."""
    from metrics.statistics import seed_interval

    groups: dict[tuple, dict[Any, dict]] = {}
    for row in rows:
        if row.get("metric") != metric or row.get("value") is None:
            continue
        stage = _stage(row)
        key = (
            stage,
            row["arm"] if stage == 2 else None,
            row.get("first") if stage else None,
            row.get("second") if stage == 2 else None,
            row["task"],
        )
        groups.setdefault(key, {})[row.get("seed")] = row
    cells = {}
    for key, by_seed in groups.items():
        found = list(by_seed.values())
        if len(found) == 1:
            row = found[0]
            low, high = (math.nan if row.get(k) is None else row[k] for k in ("low", "high"))
            cells[key] = Cell(row["value"], low, high, row.get("n") or 0, 1, key)
        else:
            mean, low, high = seed_interval([row["value"] for row in found])
            cells[key] = Cell(mean, low, high, sum(row.get("n") or 0 for row in found), len(found), key)
    return cells


def tasks_of(rows: Iterable[dict]) -> list[str]:
    """The tasks in the order in which the rows name them."""
    return list(dict.fromkeys(row["task"] for row in rows))


def arms_of(rows: Iterable[dict]) -> list[str]:
    """The stage-2 arms, the known ones in their usual order."""
    arms = dict.fromkeys(row["arm"] for row in rows if _stage(row) == 2)
    return [arm for arm in MASKS if arm in arms] + [arm for arm in arms if arm not in MASKS]


def _scale(metric: str) -> float:
    return 1.0 if metric == "answer_nll" else 100.0


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
    cells, scale = collect(rows, metric), _scale(metric)
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
    cells, scale, tasks = collect(rows, metric), _scale(metric), tasks_of(rows)
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
    cells, scale, tasks, arms = collect(rows, metric), _scale(metric), tasks_of(rows), arms_of(rows)
    figure = Figure(figsize=(8.2, 5.4))
    axes = figure.add_subplot()
    firsts, everything = [], []
    for colour, arm in zip(_cycle(COLOURS), arms, strict=False):
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
                    alpha=0.55,
                    markersize=6.5,
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
                markersize=15,
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


def figures(rows: list[dict]) -> dict[str, Figure]:
    """Every picture that the rows allow, by file name without its ending."""
    found = {}
    scored = {(row.get("metric"), _stage(row) == 2) for row in rows}
    if ("exact_match", False) in scored:
        found["bar_base_lora_exact_match"] = bar_figure(rows)
    arms = arms_of(rows)
    for arm in arms:
        mine = [row for row in rows if _stage(row) < 2 or row["arm"] == arm]
        for metric in ("exact_match", "rougeL"):
            if any(row["metric"] == metric and _stage(row) == 2 for row in mine):
                found[f"heatmap_{metric}_{arm_label(arm)}"] = heatmap_figure(rows, arm, metric)
        if any(row["metric"] == "exact_match" and _stage(row) == 2 for row in mine):
            found[f"heatmap_second_exact_match_{arm_label(arm)}"] = heatmap_figure(rows, arm, which="second")
    if ("exact_match", True) in scored:
        found["learning_vs_retention"] = scatter_figure(rows)
    return found


def draw_all(rows: list[dict], folder: str | Path) -> list[Path]:
    """Draws every picture that the rows allow into `folder` (performance_matrices_mask/); returns the files."""
    return [_save(figure, Path(folder) / f"{name}.png") for name, figure in figures(rows).items()]


def summary_table(
    rows: list[dict], dropped: dict[str, float] | None = None, metric: str = "exact_match", per_pair: bool = True
) -> str:
    """The study in text: one row an arm (means over its pairs, 95 %), then one row a pair.

    `dropped` is the share of completion tokens that each run dropped, by run folder.  Intervals of means take
    those of the cells as independent.
    """
    cells, scale, arms = collect(rows, metric), _scale(metric), arms_of(rows)
    shares: dict[tuple, list[float]] = {}
    for row in rows:
        share = (dropped or {}).get(row.get("run"))
        if _stage(row) == 2 and share is not None:
            shares.setdefault((row["arm"], row["first"], row["second"]), []).append(share)
    tasks = tasks_of(rows)
    name = WORDS.get(metric, metric) + (" in %" if scale == 100 else "")
    digits = ".1f" if scale == 100 else ".3f"

    def tell(found: list[Cell | None]) -> str:
        known = [cell for cell in found if cell is not None]
        if not known:
            return "-"
        counts = Counter(known)  # one stage-1 score serves several pairs: it is one measurement, of more weight
        half = math.sqrt(sum((count * cell.half) ** 2 for cell, count in counts.items())) / len(known) * scale
        around = f" ±{half:{digits}}" if half == half else ""
        return f"{numpy.mean([cell.value for cell in known]) * scale:{digits}}{around}"

    def share_of(keys: list[tuple]) -> str:
        known = [numpy.mean(shares[key]) for key in keys if key in shares]
        return f"{100 * numpy.mean(known):.1f}" if known else "-"

    parts = []
    single = [[t, tell([cells.get((0, None, None, None, t))]), tell([cells.get((1, None, t, None, t))])] for t in tasks]
    if any(row[1:] != ["-", "-"] for row in single):
        parts.append(f"{name}, 95 % intervals\n" + format_table(single, ["task", "base", "after stage 1"]))
    pairs = {arm: [key[2:4] for key in cells if key[:2] == (2, arm) and key[4] == key[2]] for arm in arms}
    if any(pairs.values()):
        table = []
        for arm in arms:
            mine = pairs[arm]
            table.append(
                [
                    arm_label(arm),
                    tell([cells.get((1, None, a, None, a)) for a, _ in mine]),
                    tell([cells.get((2, arm, a, b, a)) for a, b in mine]),
                    tell([cells.get((2, arm, a, b, b)) for a, b in mine]),
                    share_of([(arm, a, b) for a, b in mine]),
                    str(len(mine)),
                ]
            )
        headers = ["arm", "first after stage 1", "first kept", "second learned", "dropped %", "pairs"]
        parts.append(f"After both stages, mean over pairs ({name})\n" + format_table(table, headers))
        if per_pair:
            table = []
            for a, b in dict.fromkeys(pair for arm in arms for pair in pairs[arm]):
                for arm in arms:
                    if (a, b) in pairs[arm]:
                        table.append(
                            [
                                f"{a} > {b}",
                                arm_label(arm),
                                tell([cells.get((1, None, a, None, a))]),
                                tell([cells.get((2, arm, a, b, a))]),
                                tell([cells.get((2, arm, a, b, b))]),
                                share_of([(arm, a, b)]),
                            ]
                        )
            headers = ["pair", "arm", "first after stage 1", "first kept", "second learned", "dropped %"]
            parts.append(f"Every pair ({name})\n" + format_table(table, headers))
    return "\n\n".join(parts) if parts else "nothing has been scored yet"
