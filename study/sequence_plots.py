"""Pictures of sequences: R as a heat map, every task's score over the stages, and what is kept against what is learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from study.plots import COLOURS, MARKS, _clean, _save, _wrap
from study.sequence import Sequence, by_arm, over


def draw_sequences(found: list[Sequence], folder: Path) -> list[Path]:
    """matrix_{order}.png, stages_{order}.png for every order (means over seeds), and kept_learned.png."""
    paths = []
    for order in dict.fromkeys(one.order for one in found):
        mine = [one for one in found if one.order == order]
        paths.append(_save(matrix_figure(mine), folder / f"matrix_{order}.png"))
        if any(len(one.R) > 1 for one in mine):
            paths.append(_save(stages_figure(mine), folder / f"stages_{order}.png"))
    paths.append(_save(kept_figure(found), folder / "kept_learned.png"))
    return paths


def matrix_figure(found: list[Sequence]) -> Figure:
    """R of every arm of one order, in %: row a stage (its task), column a task."""
    arms = by_arm(found)
    tasks = found[0].tasks
    columns = min(4, len(arms))
    lines = -(-len(arms) // columns)
    side = 0.62 * len(tasks) + 0.5
    figure = Figure(figsize=(columns * side + 1.6, lines * (side + 0.55) + 0.5), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    image = None
    for axes in grid.flat[len(arms) :]:
        axes.axis("off")
    for axes, (arm, members) in zip(grid.flat, arms.items(), strict=False):
        values = 100 * np.mean([one.R for one in members], axis=0)
        image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="equal")
        for (i, j), value in np.ndenumerate(values):
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value < 60 else "black")
        axes.set_title(arm, fontsize=10)
        stages = [f"after {_wrap(task)}" for task in tasks] if len(values) > 1 else ["all at once"]
        left = axes in grid[:, 0] or len(values) == 1
        axes.set_yticks(range(len(values)), stages if left else [""] * len(values), fontsize=7)
        axes.set_xticks(range(len(tasks)), [_wrap(task, 10) for task in tasks], fontsize=7, rotation=90)
    figure.colorbar(image, ax=grid, shrink=0.7, label="score in %")
    figure.suptitle(f"R: row a stage, column the task scored{_seeds(found)}", fontsize=11)
    return figure


def _seeds(found: list[Sequence]) -> str:
    seeds = len({one.seed for one in found})
    return f"; mean over {seeds} seeds" if seeds > 1 else ""


def stages_figure(found: list[Sequence]) -> Figure:
    """One panel a task: its score after every stage, a line an arm; the stage that trains it is marked."""
    tasks, arms = found[0].tasks, by_arm(found)
    figure = Figure(figsize=(max(2.3 * len(tasks), 5), 3.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for j, (axes, task) in enumerate(zip(panels, tasks, strict=True)):
        axes.axvline(j + 1, color="#bbbbbb", linestyle=":", linewidth=1)
        for number, (arm, members) in enumerate(arms.items()):
            colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
            values = 100 * np.mean([one.R[:, j] for one in members], axis=0)
            if arm == "mtl":
                axes.axhline(values[-1], color=colour, linewidth=1.2, linestyle="--", label=arm)
                continue
            whole = 100 * np.concatenate(([np.mean([one.base[j] for one in members])], values / 100))
            axes.plot(range(len(whole)), whole, marker=mark, markersize=4, linewidth=1.3, color=colour, label=arm)
        axes.set_title(task, fontsize=9)
        axes.set_xticks(range(len(tasks) + 1), ["base", *map(str, range(1, len(tasks) + 1))], fontsize=8)
        axes.set_ylim(-3, 103)
        _clean(axes)
    panels[0].set_ylabel("score in %")
    figure.supxlabel("after stage (dotted: the one that trains the task)", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5), fontsize=8, frameon=False)
    return figure


def kept_figure(found: list[Sequence]) -> Figure:
    """BWT against learning, one point an arm with 95 % intervals: up and to the right is better."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="#999999", linestyle="--", linewidth=1)
    for number, (arm, members) in enumerate(by_arm(found).items()):
        if arm == "mtl":
            continue
        (x, dx), (y, dy) = over(members, "learning"), over(members, "BWT")
        axes.errorbar(100 * x, 100 * y, 100 * np.nan_to_num(dy), 100 * np.nan_to_num(dx), fmt=MARKS[number % len(MARKS)], markersize=7,
                      color=COLOURS[number % len(COLOURS)], elinewidth=1, capsize=2, label=arm)  # fmt: skip
    axes.set_xlabel("learning: a task's score when it is trained, less the base, in points")
    axes.set_ylabel("BWT: change of earlier tasks since, in points")
    axes.set_title("What is kept against what is learned, with 95 % intervals", fontsize=11, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _clean(axes)
    return figure
