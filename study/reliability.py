"""Calibration of the arms of probabilistic fine-tuning: rows, table, and reliability diagrams before and after a further task."""

from __future__ import annotations

from pathlib import Path

import numpy
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metrics.calibration import METRICS, calibration, calibration_change, uncertainty
from study.folder import write_json
from study.logging import format_table
from study.plan import Run, title_of
from study.plots import COLOURS, _clean, _save

ARMS = ("deterministic", "ensemble", "mc_dropout")
COLOUR = dict(zip(ARMS, (COLOURS[7], COLOURS[0], COLOURS[1]), strict=True))
MARK = dict(zip(ARMS, "osD", strict=True))
WORDS = dict(zip(ARMS, ("single adapters (mean of their scores)", "ensemble of the adapters", "LoRA dropout left on"), strict=True))


def cell_rows(
    run: Run | None, task: str, arms: dict[str, numpy.ndarray], spread: dict[str, numpy.ndarray], gold: numpy.ndarray
) -> list[dict]:
    """Rows {arm, run, stage, first, second, task, metric, value, low, high, n} of one run on one task, its bins under metric "bins".

    arms: {arm: probabilities (m, n, k)}, scores of m rows averaged, with lowest and highest of them. spread: {arm: (g, m, n, k)},
    the m predictions that an arm averages, in g groups. Metrics "ece_minus_deterministic" … are differences on the same items.
    """
    who = {"run": run.folder if run else "base", "stage": run.stage if run else 0, "trained": run.arm if run else "base",
           "first": run.first if run else None, "second": run.second if run else None, "task": task}  # fmt: skip
    rows = []
    for arm, p in arms.items():
        found, one = calibration(p, gold), {"arm": arm, **who}
        for metric in METRICS:
            low, high = found["intervals"][metric]
            row = {**one, "metric": metric, "value": found[metric], "low": low, "high": high, "n": found["n"]}
            if found["models"] > 1:
                row |= {"lowest": min(found["each"][metric]), "highest": max(found["each"][metric])}
            rows.append(row)
        rows.append({**one, "metric": "ece_if_calibrated", "value": found["ece_if_calibrated"], "low": None, "high": None, "n": found["n"]})
        if arm != "deterministic":
            for metric, (value, low, high) in calibration_change(arms["deterministic"], p, gold).items():
                rows.append({**one, "metric": f"{metric}_minus_deterministic", "value": value, "low": low, "high": high, "n": found["n"]})
        apart = [uncertainty(group) for group in spread.get(arm, ())]
        for metric in apart[0] if apart else ():
            value = float(numpy.mean([group[metric] for group in apart]))
            rows.append({**one, "metric": metric, "value": value, "low": None, "high": None, "n": found["n"]})
        rows.append({**one, "metric": "bins", "value": None, "low": None, "high": None, "n": found["n"], "bins": found["bins"]})
    return rows


def reliability_table(rows: list[dict]) -> str:
    """One line a run, task and arm."""
    cells: dict[tuple, dict] = {}
    for row in rows:
        cells.setdefault((row["task"], row["run"], row["arm"]), {})[row["metric"]] = row

    def told(row: dict | None, scale: float = 1.0, digits: int = 3, sign: str = "") -> str:
        if row is None:
            return "-"
        ends = f" ({scale * row['low']:{sign}.{digits}f} to {scale * row['high']:{sign}.{digits}f})" if row["low"] is not None else ""
        return f"{scale * row['value']:{sign}.{digits}f}{ends}"

    lines, tasks = [], list(dict.fromkeys(task for task, _, _ in cells))
    for (task, run, arm), found in sorted(cells.items(), key=lambda cell: tasks.index(cell[0][0])):
        lines.append([
            task, run, arm, told(found["accuracy"], 100, 1), told(found["nll"]), told(found["ece"]), told(found["ece_if_calibrated"]),
            told(found["brier"]), told(found.get("nll_minus_deterministic"), sign="+"),
            told(found.get("ece_minus_deterministic"), sign="+"), told(found.get("disagreement"), 100, 1),
            told(found.get("mutual_information")), found["accuracy"]["n"],
        ])  # fmt: skip
    headers = ["task", "run", "arm", "accuracy %", "nll", "ece", "(calibrated)", "brier", "nll - single's", "ece - single's", "disagree %",
               "mutual inf.", "n"]  # fmt: skip
    return format_table(lines, headers)


def reliability_figure(rows: list[dict], before: str, run: Run, tasks: list[str]) -> Figure:
    """A row a task; left as it was after the stage before, right after this run: share right against confidence, a colour an arm.

    Marks are bins, their area the bin's share of items; above the diagonal a model is more often right than it says.
    """
    cells = {(row["run"], row["task"], row["arm"], row["metric"]): row for row in rows}
    arms = [arm for arm in ARMS if any(row["arm"] == arm and row["run"] == run.folder for row in rows)]
    figure = Figure(figsize=(9.6, 0.7 + 4.5 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False, sharex=True, sharey=True)
    for line, task in zip(panels, tasks, strict=True):
        for axes, folder, when in zip(line, (before, run.folder), ("before", "after"), strict=True):
            axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--", zorder=1)
            for place, arm in enumerate(arms):
                bins = [one for one in cells[folder, task, arm, "bins"]["bins"] if one["n"]]
                total = sum(one["n"] for one in bins)
                x, y = ([one[key] for one in bins] for key in ("confidence", "accuracy"))
                axes.plot(x, y, color=COLOUR[arm], linewidth=1, alpha=0.45, zorder=2)
                axes.scatter(x, y, s=[8 + 420 * one["n"] / total for one in bins], color=COLOUR[arm], marker=MARK[arm], alpha=0.7,
                             edgecolors="white", linewidths=0.6, zorder=3, clip_on=False)  # fmt: skip
                accuracy, nll, ece = (cells[folder, task, arm, metric]["value"] for metric in ("accuracy", "nll", "ece"))
                told = f"{arm:13s} {100 * accuracy:5.1f} % right   nll {nll:.3f}   ece {ece:.3f}"
                axes.annotate(told, (0, 1), xycoords="axes fraction", xytext=(0, 8 + 12 * (len(arms) - 1 - place)),
                              textcoords="offset points", fontsize=8, color=COLOUR[arm], family="monospace")  # fmt: skip
            axes.set_title(f"{task}, {when} {run.task}", fontsize=11, loc="left", pad=12 + 12 * len(arms))
            _clean(axes)
            axes.grid(axis="x", color="#dddddd", linewidth=0.8)
        line[0].set_ylabel("share right")
    panels[0][0].set_xlim(-0.01, 1.01)
    panels[0][0].set_ylim(0, 1.02)
    figure.get_layout_engine().set(wspace=0.05, hspace=0.03)
    for axes in panels[-1]:
        axes.set_xlabel("confidence: probability of the likeliest option")
    handles = [Line2D([], [], color=COLOUR[arm], marker=MARK[arm], markersize=7, linewidth=1.2, label=WORDS[arm]) for arm in arms]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(arms), frameon=False, fontsize=9, alignment="left",
                  title=f"Reliability before and after the last task: {title_of(run)}", title_fontsize=12)  # fmt: skip
    return figure


def reliability_figures(rows: list[dict], runs: list[Run]) -> dict[str, Figure]:
    """Of each run that has one before it, both scored on the same tasks."""
    scored: dict[str, list[str]] = {}
    for row in rows:
        if row["task"] not in scored.setdefault(row["run"], []):
            scored[row["run"]].append(row["task"])
    found = {}
    for run in runs:
        both = [task for task in scored.get(run.folder, []) if task in scored.get(run.parent, [])]
        if both:
            found[f"reliability_{run.folder.replace('/', '_')}"] = reliability_figure(rows, run.parent, run, both)
    return found


def report_reliability(root: Path, rows: list[dict], runs: list[Run]) -> None:
    """Prints the table, writes {root}/probabilistic_results.json, and draws in {root}/probabilistic/ each run that has one before it."""
    print("\nAccuracy and calibration over the options, with 95 % intervals over the items; single adapters: mean of their scores")
    print(reliability_table(rows), flush=True)
    pictures = [_save(figure, root / "probabilistic" / f"{name}.png") for name, figure in reliability_figures(rows, runs).items()]
    write_json(root / "probabilistic_results.json", {"results": rows})
    print(f"\nresults    {root / 'probabilistic_results.json'}\npictures   {root / 'probabilistic'}/ ({len(pictures)})")
