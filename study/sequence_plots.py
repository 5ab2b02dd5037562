"""Pictures of sequences: R as a heat map, every task's score over the stages, and what is kept against what is learned."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from study.plots import COLOURS, MARKS, _clean, _save
from study.sequence import ARMS, Sequence, by_arm, over

# Of each arm, whichever others are shown; the last colour is mtl's, which is no way to train a sequence.
LOOKS = {arm: (colour, mark) for arm, colour, mark in zip(ARMS, [*COLOURS, "#8A3FFC", "#888888"], MARKS, strict=False)}
PANELS = 5  # in a line


def sequence_figures(found: list[Sequence]) -> dict[str, Figure]:
    """matrix_{order}, stages_{order} for every order (means over seeds), and kept_learned."""
    figures = {}
    for order in dict.fromkeys(one.order for one in found):
        mine = [one for one in found if one.order == order]
        figures[f"matrix_{order}"] = matrix_figure(mine)
        if any(len(one.R) > 1 for one in mine):
            figures[f"stages_{order}"] = stages_figure(mine)
    if any(one.arm != "mtl" for one in found):
        figures["kept_learned"] = kept_figure(found)
    return figures


def draw_sequences(found: list[Sequence], folder: Path) -> list[Path]:
    return [_save(figure, folder / f"{name}.png") for name, figure in sequence_figures(found).items()]


def _top(found: list[Sequence]) -> int:
    """The end of the scale in %: the next ten above every score. ROUGE-L of free text seldom comes near 100."""
    return max(10, 10 * math.ceil(10 * max(max(one.R.max(), one.base.max()) for one in found) - 1e-9))


def matrix_figure(found: list[Sequence]) -> Figure:
    """R of every arm of one order, in %: row a stage (its task), column a task."""
    arms = by_arm(found)
    tasks, names = found[0].tasks, found[0].stages
    side = (0.62 if len(tasks) <= PANELS else 0.42) * len(tasks) + 0.5  # inches
    columns = max(1, min(4, len(arms), int(15 / side)))
    lines = -(-len(arms) // columns)
    figure = Figure(figsize=(columns * side + 1.6, lines * (side + 0.55) + 0.5), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    image, top = None, _top(found)
    for axes in grid.flat[len(arms) :]:
        axes.axis("off")
    for place, (axes, (arm, members)) in enumerate(zip(grid.flat, arms.items(), strict=False)):
        values = 100 * np.mean([one.R for one in members], axis=0)
        image = axes.imshow(values, vmin=0, vmax=top, cmap="viridis", aspect="equal")
        for (i, j), value in np.ndenumerate(values):
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value < 0.6 * top else "black")
        axes.set_title(arm if len(values) > 1 else f"{arm}: all at once", fontsize=10)
        stages = [f"after {task}" for task in names] if len(values) > 1 and axes in grid[:, 0] else [""] * len(values)
        axes.set_yticks(range(len(values)), stages, fontsize=8)
        lowest = place + columns >= len(arms)  # of its column
        axes.set_xticks(range(len(tasks)), tasks if lowest else [""] * len(tasks), fontsize=8, rotation=90)
    figure.colorbar(image, ax=grid, shrink=0.7, label="score in %")
    figure.suptitle(f"R: row a stage, column the task scored{_seeds(found)}", fontsize=11)
    return figure


def _seeds(found: list[Sequence]) -> str:
    seeds = len({one.seed for one in found})
    return f"; mean over {seeds} seeds" if seeds > 1 else ""


def stages_figure(found: list[Sequence]) -> Figure:
    """One panel a task: its score after every stage, a line an arm; the stage that trains it is marked."""
    tasks, arms, top = found[0].tasks, by_arm(found), _top(found)
    columns = min(PANELS, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(max(2.6 * columns, 5), 2.4 * lines + 0.8), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
    for axes in panels[len(tasks) :]:
        axes.axis("off")
    for j, (axes, task) in enumerate(zip(panels, tasks, strict=False)):
        for stage in (k for k, other in enumerate(found[0].stages, 1) if other == task):
            axes.axvline(stage, color="#bbbbbb", linestyle=":", linewidth=1)
        for number, (arm, members) in enumerate(arms.items()):
            colour, mark = LOOKS[arm]
            values = 100 * np.mean([one.R[:, j] for one in members], axis=0)
            if arm == "mtl":
                axes.axhline(values[-1], color=colour, linewidth=1.2, linestyle="--", label=arm)
                continue
            whole = 100 * np.concatenate(([np.mean([one.base[j] for one in members])], values / 100))
            aside = 0.3 * (number / max(1, len(arms) - 1) - 0.5)  # so that equal scores do not hide each other
            axes.plot(np.arange(len(whole)) + aside, whole, marker=mark, markersize=4, linewidth=1.3, color=colour, label=arm)
        axes.set_title(task, fontsize=9)
        axes.set_xticks(range(len(found[0].stages) + 1), ["base", *map(str, range(1, len(found[0].stages) + 1))], fontsize=8)
        axes.set_ylim(-0.03 * top, 1.03 * top)
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
    for arm, members in by_arm(found).items():
        if arm == "mtl":
            continue
        colour, mark = LOOKS[arm]
        (x, dx), (y, dy) = over(members, "learning"), over(members, "BWT")
        axes.errorbar(100 * x, 100 * y, 100 * np.nan_to_num(dy), 100 * np.nan_to_num(dx), fmt=mark, markersize=7,
                      color=colour, elinewidth=1, capsize=2, label=arm)  # fmt: skip
    axes.set_xlabel("learning: a task's score when it is trained, less the base, in points")
    axes.set_ylabel("BWT: change of earlier tasks since, in points")
    axes.set_title("What is kept against what is learned, with 95 % intervals", fontsize=11, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _clean(axes)
    return figure
