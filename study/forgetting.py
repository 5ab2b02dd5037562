"""FG of a study (metrics.forgetting): what every sequence of stages took from the model's general ability, by benchmark and by group.

    rows = fg_rows({"boolq_0shot": [[base_items, items_after_1, items_after_2]]})     # column: of each seed, the items of every state
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from metrics.forgetting import forgetting_general, mean_forgetting
from study.benchmark_groups import GROUPS, measure_of
from study.folder import read_jsonl
from study.logging import format_table
from study.plan import Run

ABOUT = {
    "fg": "(R0 - Rm) / R0 in percent: what share of the base's score stage m took; below 0 it gave. form chance: (R0 - Rm) / (R0 - chance)",
    "stage": "m from 1; mean: over all stages, seed 002's FG; last: the last one again",
    "column": "empty in the rows of a group, which are means over its columns; columns: over how many of them",
}


def scores_of(items: list[dict], column: str) -> np.ndarray:
    """(items,): what each item of a column scored by its group's metric, else `correct`; NaN where it has none."""
    measure = measure_of(column)

    def score(item: dict) -> float:
        value = item.get("correct")
        if measure and measure.metric == "likeliest" and "loglikelihoods" in item:
            options = item["loglikelihoods"]
            value = options.index(max(options)) == int(item["gold"])
        elif measure and measure.metric in item.get("metrics", {}):
            value = item["metrics"][measure.metric]
        return math.nan if value is None else float(value)

    return np.array([score(item) for item in items])


def chance_of(items: list[dict], column: str) -> float | None:
    """What guessing scores: of the groups as they say, else the mean of 1 / options; None where items have no options."""
    if measure := measure_of(column):
        return measure.chance
    counts = [len(item.get("options") or item.get("loglikelihoods") or ()) for item in items]
    return float(np.mean([1 / count for count in counts])) if counts and min(counts) > 1 else None


def fg_rows(columns: dict[str, list[list[list[dict]]]]) -> list[dict]:
    """Rows {column, group, form, stage, value, low, high, n, seeds, base, score, chance, better, reason} of one sequence.

    columns: of every column the items of each seed, of each state: the base, then after every stage. form: plain, chance;
    stage: 1, 2, …, "mean", "last". value, low, high in percent, NaN with a reason where there is none. Behind the columns' rows
    those of each group, the plain mean over its columns.
    """
    rows, groups = [], {}
    for column, seeds in columns.items():
        measure = measure_of(column)
        better, chance = measure.better if measure else "higher", chance_of(seeds[0][0], column)
        states = [np.array([scores_of(stages[m], column) for stages in seeds]) for m in range(len(seeds[0]))]
        found = forgetting_general(states[0], states[1:], better=better, chance=chance)
        if measure:
            groups.setdefault(measure.group, []).append(found)
        about = {"column": column, "group": measure.group if measure else "", "n": found["n"], "seeds": found["seeds"],
                 "base": found["base"], "chance": chance, "better": better}  # fmt: skip
        for form in ("plain", "adjusted"):
            reason = found["reason"] if math.isnan(found[form]["mean"][0]) else ""
            rows += _rows(found[form], form, {**about, "reason": reason}, found["scores"])
    for group in (name for name in GROUPS if name in groups):
        for form in ("plain", "adjusted"):
            found = mean_forgetting(groups[group], form)
            reason = "" if found["columns"] else "none of its columns has one"
            about = {"column": "", "group": group, "columns": found["columns"], "n": sum(one["n"] for one in groups[group]),
                     "seeds": groups[group][0]["seeds"], "reason": reason}  # fmt: skip
            rows += _rows(found, form, about, None)
    return rows


def _rows(found: dict, form: str, about: dict, scores: list[float] | None) -> list[dict]:
    each = [*enumerate(found["stages"], 1), ("mean", found["mean"]), ("last", found["last"])]
    if scores is not None:
        scores = [*scores, float(np.mean(scores)), scores[-1]]
    named = "plain" if form == "plain" else "chance"
    return [
        {**about, "form": named, "stage": stage, "value": value, "low": low, "high": high, **({"score": scores[k]} if scores else {})}
        for k, (stage, (value, low, high)) in enumerate(each)
    ]


def study_rows(trees: list[tuple[Path, int, list[Run]]], columns: list[str]) -> list[dict]:
    """fg_rows of every sequence of a study that has more than one stage, with its arm and order. trees: (tree, seed, finished runs)."""
    chains: dict[tuple[str, str], list[list[Path]]] = {}
    for tree, _, runs in trees:
        for arm, order in dict.fromkeys((run.arm, run.order) for run in runs if run.order):
            stages = sorted((run for run in runs if (run.arm, run.order) == (arm, order)), key=lambda run: run.stage)
            folders = ["base", *([stages[0].parent] if stages[0].parent else []), *(run.folder for run in stages)]
            if len(folders) > 2 and len(folders) == len(order.split(",")) + 1:  # all stages of several: not all tasks at once
                chains.setdefault((arm, order), []).append([tree / folder / "eval" for folder in folders])
    rows = []
    for (arm, order), seeds in chains.items():
        items = {column: [[read_jsonl(folder / f"{column}.jsonl") for folder in states] for states in seeds] for column in columns}
        whole = {}
        for column, found in items.items():
            found = [states for states in found if all(states) and len({len(one) for one in states}) == 1]
            found = [states for states in found if len(states[0]) == len(found[0][0])]
            if found:
                whole[column] = found
        rows += [{"arm": arm, "order": order, **row} for row in fg_rows(whole)]
    return rows


def fg_table(rows: list[dict]) -> str:
    """The sequences in text, a row an arm, column and group; stages apart where they are four or fewer. rows: study_rows' or fg_rows'."""
    parts, reasons = [], {}
    for order in dict.fromkeys(row.get("order", "") for row in rows):
        mine = [row for row in rows if row.get("order", "") == order]
        count = max(row["stage"] for row in mine if isinstance(row["stage"], int))
        stages = [*range(1, count + 1)] if count <= 4 else []
        table, named = [], any(row.get("arm") for row in mine)
        for arm, column, group in dict.fromkeys((row.get("arm", ""), row["column"], row["group"]) for row in mine):
            own = [row for row in mine if (row.get("arm", ""), row["column"], row["group"]) == (arm, column, group)]
            cells = {(row["form"], row["stage"]): row for row in own}
            mean = cells["plain", "mean"]
            shown = [("plain", stage) for stage in [*stages, "mean", *([] if stages else ["last"])]]
            told = [_told(cells[key]) for key in [*shown, ("chance", "mean"), ("chance", "last")]]
            base = f"{100 * mean['base']:.1f}" if column else "-"
            table.append([*([arm] if named else []), column or f"{group}, mean of {mean['columns']}", base, *told])
            if cells["chance", "mean"]["reason"] and column:
                reasons[column] = cells["chance", "mean"]["reason"]
        labels = [f"stage {stage}" for stage in stages] + ["mean", *([] if stages else ["last"])]
        headers = [*(["arm"] if named else []), "benchmark", "base", *labels, "mean, over chance", "last, over chance"]
        parts.append((f"{order.replace(',', ' > ')}\n" if order else "") + format_table(table, headers))
    if not parts:
        return ""
    head = "General forgetting FG: % of the base's score that was lost (below 0: gained), 95 % intervals"
    return "\n".join([head, *parts, *(f"{column}: no FG over chance, {reason}" for column, reason in reasons.items())])


def _told(row: dict) -> str:
    if row["value"] is None or math.isnan(row["value"]):  # a file has null where there was NaN
        return "-"
    half = max(row["high"] - row["value"], row["value"] - row["low"])
    return f"{row['value']:.1f}" + (f" ±{half:.1f}" if half == half else "")
