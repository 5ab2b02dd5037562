"""The pictures of the optimizer comparison, from the numbers of study/comparison_points.py.

Colours tell optimizers apart, depth of colour the learning rates (darker: larger); a black ring marks the chosen rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from study.comparison_points import Scored, in_order
from study.plots import COLOURS, _caption, _clean, _save

HALO = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # of words on lines
WHOLE = {"integer": True, "steps": (1, 2, 5, 10), "min_n_ticks": 1}  # ticks of optimizer steps, be there one step only
NAMES = {"adamw": "AdamW", "muon": "Muon"}


def shades(points: Iterable[tuple[str, float]]) -> dict[tuple[str, float], tuple]:
    """(optimizer, rate) -> colour: one hue an optimizer, from pale for the smallest rate to full for the largest."""
    points, found = in_order(points), {}
    for hue, name in zip(COLOURS, dict.fromkeys(name for name, _ in points), strict=False):
        rates = [rate for other, rate in points if other == name]
        for k, rate in enumerate(rates):
            depth = 1.0 if len(rates) == 1 else 0.45 + 0.55 * k / (len(rates) - 1)
            found[name, rate] = tuple(1 - depth * (1 - part) for part in to_rgb(hue))
    return found


def key_of(point: dict) -> tuple[str, float]:
    return point["optimizer"], point["learning_rate"]


def label(key: tuple[str, float]) -> str:
    return f"{NAMES.get(key[0], key[0])} {key[1]:g}"


def whisker(found: dict) -> tuple[float, float, float]:
    """(value, low, high) in percent: the wider of the intervals over items and over seeds."""
    low, high = (np.array([found[side], found[f"seed_{side}"]], dtype=np.float64) for side in ("low", "high"))  # None: NaN
    return 100 * found["difference"], 100 * float(np.nanmin(low)), 100 * float(np.nanmax(high))


def place_labels(axes: Axes, texts: list[tuple[Line2D, str, tuple]], lines: list[tuple], size: float = 8.5) -> None:
    """(dot, word, colour): words beside dots, each where it covers no dot, word or line (x, y to x, y), as far as there is room.

    Dots at one place, which would hide each other, first grow into rings around the last. The drawn limits must stand.
    """
    scale = axes.figure.dpi / 72
    dots = [axes.transData.transform(dot.get_xydata()[0]) for dot, *_ in texts]
    for k, (dot, *_) in enumerate(texts):
        dot.set_markersize(11 + 7 * sum(np.hypot(*(dots[k] - other)) < 5 * scale for other in dots[k + 1 :]))
    radii = [(dot.get_markersize() / 2 + 0.5) * scale for dot, *_ in texts]
    taken = [(px - r, py - r, px + r, py + r) for (px, py), r in zip(dots, radii, strict=True)]
    taken += [tuple(axes.transData.transform(np.reshape(line, (2, 2))).ravel()) for line in lines]
    for (px, py), (dot, text, colour) in zip(dots, texts, strict=True):
        width, height = 0.56 * size * len(text) * scale, 1.25 * size * scale
        best = None
        for reach in (7, 12, 16, 20, 24, 28, 40):
            for dx, dy in ((-1, 1), (1, -1), (1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)):  # whiskers lie across
                cx, cy = px + dx * (reach * scale + width / 2), py + dy * (reach * scale + height / 2)
                box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
                clash = sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
                if best is None or clash < best[0]:
                    best = clash, box, (cx, cy)
            if best[0] == 0:
                break
        taken.append(best[1])
        offset = (best[2][0] - px) / scale, (best[2][1] - py) / scale
        axes.annotate(
            text,
            dot.get_xydata()[0],
            xytext=offset,
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=size,
            color=colour,
            zorder=5,
            bbox=HALO,
        )


def _legend(axes: Axes, handles: list[Line2D]) -> None:
    """To the right of the axes."""
    axes.legend(handles=handles, frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.02, 1.0))


def _dot(key: tuple[str, float], colour: tuple, chosen: bool = False, **more) -> Line2D:
    edge = {"markeredgecolor": "black", "markeredgewidth": 1.6} if chosen else {"markeredgecolor": "white"}
    return Line2D([], [], **{"marker": "o", "linestyle": "", "markersize": 9, "color": colour, "label": label(key), **edge, **more})


def _chosen(points: list[dict], size: float = 9) -> list[Line2D]:
    """The legend's word on the black ring, where there is one."""
    return [_dot(("", 0), "white", True, label="chosen rate", markersize=size)] if any(point["chosen"] for point in points) else []


def _note(points: list[dict], first: str, second: str) -> str:
    seeds = max(len(point["seeds"]) for point in points)
    n = [points[0]["states"]["base"][task]["n"] for task in (first, second)]
    over = f"{seeds} seeds; whiskers: 95 % over items or over seeds, the wider" if seeds > 1 else "one seed; whiskers: 95 % over items"
    return f"{n[0]} and {n[1]} test items, {over}."


def frontier_figure(points: list[dict], first: str, second: str) -> Figure:
    """x: learning of B (L_B), y: loss of A (F_abs), a point an optimizer and rate, lines through an optimizer's rates."""
    figure = Figure(figsize=(8.2, 5.2))
    axes = figure.add_subplot()
    colours, texts, lines = shades(map(key_of, points)), [], []
    full = {name: colours[in_order(key for key in colours if key[0] == name)[-1]] for name in dict.fromkeys(n for n, _ in colours)}
    for name in dict.fromkeys(point["optimizer"] for point in points):
        mine = [point for point in points if point["optimizer"] == name]
        spots = []
        for point in mine:
            (x, *xs), (y, *ys) = (whisker(point["intervals"][what]) for what in ("L_B", "F_abs"))
            colour = colours[key_of(point)]
            around = {"xerr": [[x - xs[0]], [xs[1] - x]], "yerr": [[y - ys[0]], [ys[1] - y]]}
            axes.errorbar(x, y, **around, color=colour, elinewidth=1, capsize=2.5, zorder=2)
            edge = {"markeredgecolor": "black", "markeredgewidth": 1.8} if point["chosen"] else {"markeredgecolor": "white"}
            (dot,) = axes.plot(x, y, marker="o", color=colour, zorder=4, **edge)
            spots.append((x, y))
            lines += [(xs[0], y, xs[1], y), (x, ys[0], x, ys[1])]
            texts.append((dot, f"{point['learning_rate']:g}", full[name]))
        axes.plot(*zip(*spots, strict=True), color=full[name], linewidth=1.2, alpha=0.6, zorder=1)
    axes.axhline(0, color="#888888", linewidth=1)
    axes.set_xlabel(f"{second} learned: points above the base")
    axes.set_ylabel(f"{first} lost in stage 2: points")
    axes.margins(0.12)
    axes.set_title("What learning the second task costs on the first", fontsize=12, loc="left", pad=28)
    handles = [_dot((name, 0), colour, label=NAMES.get(name, name)) for name, colour in full.items()] + _chosen(points)
    where = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "ncols": len(handles), "handletextpad": 0.3}
    axes.legend(handles=handles, frameon=False, fontsize=9, **where)
    _clean(axes)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    words = "Down and to the right is better; a number is a learning rate; points at one place are drawn as rings."
    _caption(axes, f"{words}\n{_note(points, first, second)}")
    figure.canvas.draw()
    place_labels(axes, texts, [*lines, (axes.get_xlim()[0], 0, axes.get_xlim()[1], 0)])
    return figure


def forgetting_figure(points: list[dict], first: str, second: str) -> Figure:
    """A before and after stage 2 for every point; beside it F_abs against KL to the base and against the weights' change."""
    sides = [
        ("by the KL to the base", f"KL on {second} (nats a token)", lambda p: p["drift"]["after_stage2"].get("kl", {}).get(second)),
        (
            "by the change of weights",
            "change of the weights, % of their norm",
            lambda p: _percent(p["drift"]["after_stage2"].get("relative_frobenius")),
        ),
    ]
    sides = [side for side in sides if any(side[-1](point) is not None for point in points)]
    rows = len(points)
    figure = Figure(figsize=(4.8 + 3.4 * len(sides), max(3.4, 1.9 + 0.36 * rows)), layout="constrained")
    panels = figure.subplots(1, 1 + len(sides), squeeze=False, gridspec_kw={"width_ratios": [1.25] + [1] * len(sides)})[0]
    colours, axes = shades(map(key_of, points)), panels[0]
    for k, point in enumerate(points):
        base, one, two = (100 * point["states"][state][first]["exact_match"] for state in ("base", "after_stage1", "after_stage2"))
        colour = colours[key_of(point)]
        axes.plot([one, two], [k, k], color=colour, linewidth=2.5, alpha=0.55, zorder=1)
        axes.plot(one, k, "o", color="white", markeredgecolor=colour, markeredgewidth=2, markersize=8.5, zorder=3, clip_on=False)
        edge = {"markeredgecolor": "black", "markeredgewidth": 1.6} if point["chosen"] else {"markeredgecolor": "white"}
        axes.plot(two, k, "o", color=colour, markersize=9.5, zorder=4, clip_on=False, **edge)
        axes.plot(base, k, "|", color="#555555", markersize=11, markeredgewidth=1.8, zorder=2, clip_on=False)
    axes.set_yticks(range(rows), [label(key_of(point)) for point in points])
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_xlim(-2, 102)
    axes.set_xlabel(f"{first}: exact match (%)")
    axes.set_title("The first task before and after stage 2", fontsize=11, loc="left", pad=24)
    grey = {"marker": "o", "linestyle": "", "markersize": 8}
    axes.legend(
        handles=[
            Line2D([], [], marker="|", linestyle="", markersize=10, markeredgewidth=1.8, color="#555555", label="base"),
            Line2D([], [], color="white", markeredgecolor="#777777", markeredgewidth=2, label="after stage 1", **grey),
            Line2D([], [], color="#777777", label="after stage 2", **grey),
            *_chosen(points, 8),
        ],
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, frameon=False, fontsize=8.5, handletextpad=0.2, columnspacing=1.0,
    )  # fmt: skip
    _clean(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    for axes, (title, name, value) in zip(panels[1:], sides, strict=True):
        for point in points:
            if (x := value(point)) is None:
                continue
            y, low, high = whisker(point["intervals"]["F_abs"])
            colour = colours[key_of(point)]
            edge = {"markeredgecolor": "black", "markeredgewidth": 1.6} if point["chosen"] else {"markeredgecolor": "white"}
            axes.errorbar(x, y, yerr=[[y - low], [high - y]], color=colour, elinewidth=1, capsize=2.5, zorder=2)
            axes.plot(x, y, "o", color=colour, markersize=9, zorder=3, **edge)
        axes.axhline(0, color="#888888", linewidth=1)
        axes.margins(0.1)
        axes.set_xlim(0, 1.1 * max(value(point) or 0 for point in points) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 2.5, 5, 10)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(name)
        axes.set_title(f"Points lost, {title}", fontsize=11, loc="left", pad=24)
        _clean(axes)
    return figure


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def curves_figure(scored: list[Scored], first: str, second: str) -> Figure:
    """Training loss against optimizer steps, a panel a stage; the mean over seeds, shaded from the least to the most."""
    figure = Figure(figsize=(9.4, 4.0), layout="constrained")
    panels = figure.subplots(1, 2)
    colours = shades((one.optimizer, one.learning_rate) for one in scored if one.optimizer)
    for axes, (title, stage, pair) in zip(panels, ((first, 1, (first, None)), (second, 2, (first, second))), strict=True):
        for key, colour in colours.items():
            mine = [one for one in scored if one.run["stage"] == stage and (one.run["first"], one.run["second"]) == pair
                    and (one.optimizer, one.learning_rate) == key]  # fmt: skip
            curves = [{row["step"]: row["train/loss"] for row in one.log if row.get("train/loss") is not None} for one in mine]
            steps = sorted(set.intersection(*map(set, curves))) if curves else []
            if not steps:
                continue
            losses = np.array([[curve[step] for step in steps] for curve in curves])  # (seeds, steps)
            axes.plot(steps, losses.mean(axis=0), color=colour, linewidth=1.8, marker="o" if len(steps) == 1 else None)
            if len(losses) > 1:
                axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        if axes.dataLim.y1 >= 10 * axes.dataLim.minposy:  # within a decade a log axis has hardly a tick
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(**WHOLE))
        axes.set_title(f"Stage {stage}: {title}", fontsize=11, loc="left")
        axes.set_xlabel("optimizer step")
        _clean(axes)
    panels[0].set_ylabel("training loss (nats a token)")
    _legend(panels[1], [_dot(key, colour, marker="", linestyle="-", linewidth=2.5) for key, colour in colours.items()])
    return figure


def evaluation_figure(points: list[dict], scored: list[Scored], first: str, second: str) -> Figure:
    """Exact match on both tasks from the base over both stages: dots are all test items, the line between the first few."""
    figure = Figure(figsize=(9.4, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colours = shades(map(key_of, points))
    for point in points:
        key = key_of(point)
        runs = [one for one in scored if (one.optimizer, one.learning_rate) == key]
        ones = [one for one in runs if one.run["stage"] == 1 and one.run["first"] == first]
        twos = [one for one in runs if one.run["stage"] == 2 and (one.run["first"], one.run["second"]) == (first, second)]
        ends = [max((run.record.get("steps") or 0) for run in group) for group in (ones, twos)]
        border, end = ends[0] or 1, (ends[0] or 1) + (ends[1] or 1)
        for axes, task in zip(panels, (first, second), strict=True):
            values = [100 * point["states"][state][task]["exact_match"] for state in ("base", "after_stage1", "after_stage2")]
            tag, seen = f"eval/{task}/exact_match", {}
            for group, start in ((ones, 0), (twos, border)):
                for one in group:
                    for row in one.log:
                        if tag in row:
                            seen.setdefault(start + row["step"], []).append(100 * row[tag])
            curve = {step: float(np.mean(found)) for step, found in seen.items()} | dict(zip((0, border, end), values, strict=True))
            axes.plot(sorted(curve), [curve[step] for step in sorted(curve)], color=colours[key], linewidth=1.4, alpha=0.85, zorder=3)
            edge = {"markeredgecolor": "black", "markeredgewidth": 1.4} if point["chosen"] else {"markeredgecolor": "white"}
            axes.plot([0, border, end], values, "o", color=colours[key], markersize=7.5, zorder=4, clip_on=False, **edge)
            axes.axvline(border, color="#888888", linestyle=":", linewidth=1.1, zorder=1)
    for axes, title in zip(panels, (first, second), strict=True):
        axes.set_title(f"{title} (dotted: stage 2 begins)", fontsize=11, loc="left")
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(**WHOLE))
        axes.set_ylim(-2, 102)
        axes.set_xlim(left=0)
        _clean(axes)
    panels[0].set_ylabel("exact match (%)")
    _legend(panels[1], [_dot(key_of(point), colours[key_of(point)], point["chosen"]) for point in points] + _chosen(points))
    return figure


def comparison_figures(scored: list[Scored], pairs: list[dict]) -> dict[str, Figure]:
    """The four pictures of every pair; beyond one pair their names end in _{a}_to_{b}."""
    found = {}
    for pair in pairs:
        points, tasks = pair["points"], (pair["first"], pair["second"])
        suffix = "_{}_to_{}".format(*tasks) if len(pairs) > 1 else ""
        figures = {
            "training_curves": curves_figure(scored, *tasks),
            "evaluation_curves": evaluation_figure(points, scored, *tasks),
            "forgetting_analysis": forgetting_figure(points, *tasks),
            "frontier": frontier_figure(points, *tasks),
        }
        found |= {f"{name}{suffix}": figure for name, figure in figures.items()}
    return found


def draw_comparison(scored: list[Scored], pairs: list[dict], folder: Path) -> list[Path]:
    return [_save(figure, folder / f"{name}.png") for name, figure in comparison_figures(scored, pairs).items()]
