"""What training did to general ability: every state of a study on benchmarks that it was never trained on.

A state is the base, the models after stage 1, or those after stage 2 under one arm. Each is set against the base, and those after stage 2
against the stage-1 model that they began from, on the same items.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from metrics.statistics import compare_items
from metrics.summary import summarise_benchmark
from study.folder import read_jsonl
from study.logging import format_table
from study.plan import Run, arm_label
from study.plots import COLOURS, _clean, _save


@dataclass(frozen=True)
class Scored:
    """One model on one column: 1 or 0 for each item (or a score), in the items' order."""

    seed: int
    run: Run | None  # None: the base
    correct: np.ndarray  # (items,)
    rows: list[dict]


def read_column(trees: list[tuple[Path, int, list[Run]]], column: str) -> list[Scored]:
    """What was scored on a column, of every (tree, seed, its finished runs)."""
    found = []
    for tree, seed, runs in trees:
        for run in (None, *runs):
            items = read_jsonl(tree / (run.folder if run else "base") / "eval" / f"{column}.jsonl")
            if items:
                correct = np.array([np.nan if item["correct"] is None else float(item["correct"]) for item in items])
                found.append(Scored(seed, run, correct, summarise_benchmark(items)))
    return found


def result_rows(scored: list[Scored], column: str) -> list[dict]:
    """Rows as in eval_results_mask.json's results: {run, arm, stage, first, second, task, metric, value, low, high, n, unparsed, seed}."""
    rows = []
    for one in scored:
        run = one.run
        who = {"run": run.folder if run else "base", "arm": run.arm if run else "base", "stage": run.stage if run else 0,
               "first": run.first if run else None, "second": run.second if run else None}  # fmt: skip
        rows += [{**who, "task": column, **row, "seed": one.seed} for row in one.rows]
    return rows


@dataclass(frozen=True)
class State:
    """Some runs together. accuracy, macro, nll: means over them; from_base, from_parent: as of compare_items, or None."""

    label: str
    runs: int
    accuracy: float
    macro: float | None
    nll: float | None
    from_base: dict | None
    from_parent: dict | None
    each: list[float]  # accuracy of every run


def states_of(scored: list[Scored]) -> list[State]:
    """The base, then stage 1, then every arm. A state of several runs is their mean, item by item."""
    known = {(one.seed, one.run.folder if one.run else None): one for one in scored}
    groups: dict[str, list[Scored]] = {}
    for one in scored:
        groups.setdefault(_label(one.run), []).append(one)
    order = sorted(groups, key=lambda label: (min(one.run.stage if one.run else 0 for one in groups[label]), list(groups).index(label)))
    return [_state(label, groups[label], known) for label in order]


def _label(run: Run | None) -> str:
    if run is None:
        return "base"
    if run.order:
        return f"{run.arm}, stage {run.stage}"
    if run.changes:  # optimizers have their own stage 1
        return f"{run.arm}, stage {run.stage}"
    return "after stage 1" if run.stage == 1 else arm_label(run.arm)


def _state(label: str, members: list[Scored], known: dict) -> State:
    rows = [{row["metric"]: row["value"] for row in one.rows} for one in members]

    def mean(metric: str) -> float | None:
        values = [row[metric] for row in rows if metric in row]
        return float(np.mean(values)) if values else None

    bases = [(known.get((one.seed, None)), one) for one in members if one.run]
    parents = [(known.get((one.seed, one.run.parent)), one) for one in members if one.run and one.run.parent]
    return State(
        label, len(members), mean("accuracy"), mean("accuracy_macro"), mean("answer_nll"), _change(bases), _change(parents),
        [row["accuracy"] for row in rows],
    )  # fmt: skip


def _change(pairs: list[tuple[Scored | None, Scored]]) -> dict | None:
    """compare_items over the pairs, those of one seed averaged first: runs of a seed share the items and the stage before."""
    pairs = [(before, after) for before, after in pairs if before is not None and before.correct.shape == after.correct.shape]
    if not pairs:
        return None
    sides = []
    for side in (0, 1):
        by_seed: dict[int, list[np.ndarray]] = {}
        for pair in pairs:
            by_seed.setdefault(pair[1].seed, []).append(pair[side].correct)
        sides.append(np.array([np.mean(found, axis=0) for found in by_seed.values()]))  # (seeds, items)
    kept = ~np.isnan(sides[0] + sides[1]).any(axis=0)
    if not kept.any():
        return None
    found = compare_items(sides[0][:, kept], sides[1][:, kept])
    low, high = (np.fmin(found["low"], found["seed_low"]), np.fmax(found["high"], found["seed_high"]))  # the wider; one seed has none
    return {**found, "low": float(low), "high": float(high)}


def told(change: dict | None) -> str:
    """ "-3.7 (-5.0 to -2.5)", in points."""
    if change is None:
        return "-"
    return f"{100 * change['difference']:+.1f} ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"


def general_table(scored: list[Scored], column: str) -> str:
    """The states in text, one a row."""
    states = states_of(scored)
    items, seeds = max(len(one.correct) for one in scored), len({one.seed for one in scored})
    subjects = sum(row["metric"].startswith("accuracy/") for row in scored[0].rows)
    missed = sum(row["unparsed"] for one in scored for row in one.rows if row["metric"] == "accuracy")
    table = [
        [state.label, f"{100 * state.accuracy:.1f}", "-" if state.macro is None else f"{100 * state.macro:.1f}", told(state.from_base),
         told(state.from_parent), "-" if state.nll is None else f"{state.nll:.3f}", state.runs,
         f"{100 * min(state.each):.1f}" if state.runs > 1 else "-"]
        for state in states
    ]  # fmt: skip
    headers = ["state", "accuracy", "macro", "change from base", "change by last stage", "answer nll", "models", "lowest of them"]
    used = [i for i in range(len(headers)) if any(row[i] != "-" for row in table)]
    about = f"{items} items" + (f" in {subjects} subjects" if subjects else "")
    title = f"General ability: {column}, {about}, in %; changes on the same items, 95 % over items" + (" and seeds" if seeds > 1 else "")
    lines = [title, format_table([[row[i] for i in used] for row in table], [headers[i] for i in used])]
    if missed:
        lines.append(f"{missed} outputs gave no answer that could be read; they count as wrong")
    return "\n".join(lines)


def general_figure(scored: list[Scored], column: str) -> Figure:
    """Every state's accuracy with its models as points, and how far it is from the base."""
    states = states_of(scored)
    figure = Figure(figsize=(8.2, 1.5 + 0.42 * len(states)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(states))[::-1]
    base = next((state for state in states if state.label == "base"), None)
    if base:
        axes.axvline(100 * base.accuracy, color="#999999", linewidth=1, linestyle="--", zorder=1)
    for number, (place, state) in enumerate(zip(places, states, strict=True)):
        colour = "#555555" if state.label == "base" else COLOURS[(number - 1) % len(COLOURS)]
        if state.runs > 1:
            axes.plot([100 * value for value in state.each], [place] * len(state.each), "o", color=colour, alpha=0.35, markersize=5)
        axes.plot(100 * state.accuracy, place, "D", color=colour, markersize=7, zorder=4)
        if state.from_base and base:
            ends = [100 * min(max(base.accuracy + state.from_base[end], 0.0), 1.0) for end in ("low", "high")]  # an accuracy
            axes.plot(ends, [place, place], color=colour, linewidth=2.5, zorder=3, solid_capstyle="butt")
            axes.annotate(f"{100 * state.from_base['difference']:+.1f}", (1.01, place), xycoords=("axes fraction", "data"),
                          va="center", fontsize=9, color=colour)  # fmt: skip
    axes.set_yticks(places, [f"{state.label} ({state.runs})" if state.runs > 1 else state.label for state in states])
    axes.set_ylim(-0.6, len(states) - 0.4)
    bars = "bars: 95 % of the change from the base on the same items; right: that change in points"
    axes.set_xlabel(f"accuracy in %; pale: every model\n{bars}")
    axes.set_title(f"{column}: general ability before and after", fontsize=11, loc="left")
    _clean(axes)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.grid(axis="y", visible=False)
    return figure


def draw_general(scored: list[Scored], column: str, folder: Path) -> Path:
    return _save(general_figure(scored, column), folder / f"general_{column}.png")
