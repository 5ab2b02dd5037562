"""One page of pictures of a growth study: pretraining on one axis of FLOPs, each task over the stages, general forgetting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from study.growth import Curve, Grown, fg_of, stage_scores
from study.plots import COLOURS, MARKS, _clean, _save

SOURCE = "#888888"


def draw_growth(curves: dict[str, Curve], models: list[Grown], root: Path) -> Path:
    """growth.png in the study's folder."""
    return _save(growth_figure(curves, models), root / "growth.png")


def growth_figure(curves: dict[str, Curve], models: list[Grown]) -> Figure:
    tasks = models[0].found[0].tasks
    panels = ([1] if curves else []) + [1] * len(tasks) + [1] * bool(models[0].fg)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.7 * lines + 0.5), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for spare in axes[len(panels) :]:
        spare.axis("off")
    place = iter(axes)
    colours = {model.name: COLOURS[k % len(COLOURS)] for k, model in enumerate(models)}
    if curves:
        _curves(next(place), curves, colours)
    for task in tasks:
        _stages(next(place), models, task, colours)
    if models[0].fg:
        _forgetting(next(place), models, colours)
    seeds = len({one.seed for one in models[0].found})
    over = f"; mean over {seeds} seeds of fine-tuning" if seeds > 1 else ""
    figure.suptitle(f"{' and '.join(colours)} through {' > '.join(models[0].found[0].stages)}{over}", fontsize=11)
    return figure


def _curves(axes, curves: dict[str, Curve], colours: dict[str, str]) -> None:
    for name, curve in curves.items():
        colour = colours.get(name, SOURCE)
        axes.plot(curve.flops, curve.nll, color=colour, linewidth=1.6, label=f"{name}: {curve.nll[-1]:.3f}")
    if "naive" in curves:
        axes.axhline(curves["naive"].nll[-1], color=colours.get("naive", SOURCE), linestyle=":", linewidth=1)
    everything = np.concatenate([curve.nll for curve in curves.values()])
    axes.set_ylim(everything.min() - 0.1, min(everything.max(), everything.min() + 2.5))
    axes.set_xlabel("FLOPs since the beginning, the source's included")
    axes.set_ylabel("held-out loss, nats a token")
    axes.set_title("Pretraining", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    _clean(axes)


def _stages(axes, models: list[Grown], task: str, colours: dict[str, str]) -> None:
    stages = models[0].found[0].stages
    for stage in (k for k, other in enumerate(stages, 1) if other == task):
        axes.axvline(stage, color="#bbbbbb", linestyle=":", linewidth=1)
    found = stage_scores(models, task)
    for k, (name, (values, halves)) in enumerate(found.items()):
        aside = 0.12 * (k - (len(found) - 1) / 2)
        axes.errorbar(np.arange(len(values)) + aside, 100 * values, 100 * np.nan_to_num(halves), color=colours[name], marker=MARKS[k],
                      markersize=5, linewidth=1.3, elinewidth=1, capsize=2, label=name)  # fmt: skip
    axes.set_xticks(range(len(stages) + 1), ["base", *(f"{k} {name}" for k, name in enumerate(stages, 1))], fontsize=8)
    axes.set_ylim(bottom=-2)
    axes.set_ylabel("score in %")
    axes.set_title(f"{task} after every stage (dotted: trained)", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    _clean(axes)


def _forgetting(axes, models: list[Grown], colours: dict[str, str]) -> None:
    columns = list(dict.fromkeys(row["column"] or row["group"] for model in models for row in model.fg))
    stages = [*sorted({row["stage"] for row in models[0].fg if isinstance(row["stage"], int)}), "mean"]
    labels, width = [], 0.8 / len(models)
    for k, model in enumerate(models):
        position = 0
        for column in columns:
            for stage in stages:
                row = fg_of(model, column, "plain", stage)
                if row is not None and row["value"] == row["value"]:
                    error = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
                    axes.bar(position + (k + 0.5) * width - 0.4, row["value"], width, color=colours[model.name], yerr=error, capsize=2,
                             error_kw={"elinewidth": 1}, label=model.name if position == 0 else None)  # fmt: skip
                if k == 0:
                    what = f"stage {stage}" if stage != "mean" else "mean"
                    labels.append(f"{column}\n{what}" if stage == stages[0] else what)
                position += 1
    axes.axhline(0, color="#555555", linewidth=1)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylabel("FG: % of the base's score lost")
    axes.set_title("General forgetting, 95 % intervals", fontsize=10, loc="left")
    axes.legend(fontsize=8, frameon=False)
    _clean(axes)
