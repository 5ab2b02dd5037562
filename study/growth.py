"""Several models after the same sequence of tasks, one grown and one from scratch among them: what pretraining cost, what each forgets.

growth.json names the models; each has a study of sequences of its own in {root}/{name}, and, pretrained here, its folder in {root}/models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metrics.statistics import seed_interval
from metrics.summary import summarise
from study.folder import read_json, read_jsonl, seed_folders, write_json
from study.forgetting import study_rows
from study.logging import format_table
from study.plan import Run
from study.sequence import METRICS, REVISITS, Sequence, matrix_record, over, read_sequences
from study.text_scores import signature_lines, text_table

PRETRAINED = {"source": "the small one", "grown": "after growth", "naive": "from scratch"}


@dataclass(frozen=True)
class Curve:
    """Held-out loss of one pretraining: FLOPs since the very beginning, a source's included, and nats a token."""

    name: str
    record: dict  # pretraining.json
    flops: list[float]
    nll: list[float]


@dataclass(frozen=True)
class Grown:
    """One model of the comparison."""

    name: str
    folder: str
    found: list[Sequence]  # of every arm, order and seed
    fg: list[dict]  # rows of study.forgetting
    texts: list[tuple[str, str, list[dict]]]  # cells of study.text_scores


def read_curves(root: Path) -> dict[str, Curve]:
    """Of those that were pretrained here, in the order of PRETRAINED."""
    curves = {}
    for name in PRETRAINED:
        folder = root / "models" / name
        record = read_json(folder / "pretraining.json", None)
        if record is None:
            continue
        lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "eval/nll" in line]
        step = record["tokens_per_step"] * record["flops_per_token"]
        flops = [record["flops_before"] + line["step"] * step for line in lines]
        curves[name] = Curve(name, record, flops, [line["eval/nll"] for line in lines])
    return curves


def flops_at(curve: Curve, nll: float) -> float:
    """FLOPs at which a curve first comes down to a loss, between its points in a straight line; NaN where it never does."""
    for k, value in enumerate(curve.nll):
        if value <= nll:
            if k == 0:
                return curve.flops[0]
            share = (curve.nll[k - 1] - nll) / (curve.nll[k - 1] - value)
            return curve.flops[k - 1] + share * (curve.flops[k] - curve.flops[k - 1])
    return math.nan


def speed_up(slow: Curve, fast: Curve) -> dict[str, float]:
    """How much sooner `fast` reaches the last loss of `slow`: C_slow / C_fast - 1, as arXiv 2405.15319 defines it.

    flops: all that `fast` has cost, its source included. own: after growth alone, as the paper counts tokens.
    """
    reached = flops_at(fast, slow.nll[-1])
    own = reached - fast.record["flops_before"]
    return {"flops": slow.flops[-1] / reached - 1, "own": slow.flops[-1] / own - 1 if own > 0 else math.nan}


def read_grown(root: Path, name: str, folder: str, runs_of) -> Grown:
    """What the study of one model says. runs_of(tree): its finished runs."""
    found, studied, texts = [], [], []
    columns: dict = {}
    for tree in seed_folders(root / name):
        record = read_json(tree / "study.json")
        runs, seed = runs_of(tree), record["identity"]["settings"]["seed"]
        found += read_sequences(tree, seed, runs, record["kinds"])
        studied.append((tree, seed, runs))
        columns |= record.get("columns", {})
        texts += _text_cells(tree, runs, record["kinds"], name)
    return Grown(name, folder, found, study_rows(studied, list(columns)), texts)


def _text_cells(tree: Path, runs: list[Run], kinds: dict[str, str], name: str) -> list[tuple[str, str, list[dict]]]:
    """Of every task of free text, after every stage."""
    several = len({run.arm for run in runs if run.order}) > 1
    cells = []
    for task in (task for task, kind in kinds.items() if kind == "text"):
        for run in (None, *sorted(runs, key=lambda run: run.stage)):
            items = read_jsonl(tree / (run.folder if run else "base") / "eval" / f"{task}.jsonl")
            if items:
                arm = f"{run.arm}, " if run and run.order and several else ""
                cells.append((task, f"{name}, {arm}stage {run.stage}: {run.task}" if run else f"{name}, base", summarise(items)))
    return cells


def curve_table(curves: dict[str, Curve]) -> str:
    """What pretraining cost, and what came of it; and the speed-up in words."""
    rows = []
    for name, curve in curves.items():
        r = curve.record
        sizes = (f"{r[what] / 1e6:.2f} M" for what in ("parameters", "tokens"))
        rows.append([name, PRETRAINED[name], r["layers"], *sizes, f"{r['flops']:.3g}", f"{r['held_out_nll']:.3f}", f"{r['seconds']:.0f}"])
    lines = ["Pretraining", format_table(rows, ["model", "", "layers", "parameters", "tokens", "FLOPs in all", "held-out nll", "seconds"])]
    if {"grown", "naive"} <= set(curves):
        found = speed_up(curves["naive"], curves["grown"])
        if math.isnan(found["flops"]):
            lines.append("speed-up   none: the grown model never comes down to the naive one's last loss")
        else:
            own = f"; without the source's FLOPs {100 * found['own']:+.1f} %" if found["own"] == found["own"] else ""
            lines.append(f"speed-up   {100 * found['flops']:+.1f} % to the naive model's last loss, C_naive / C_grown - 1{own}")
    return "\n".join(lines)


def sequence_rows(models: list[Grown]) -> str:
    """One row a model and arm: AR, BWT and the others, over orders and seeds."""
    known = [one for model in models for one in model.found]
    metrics = [metric for metric in METRICS if metric not in REVISITS or any(metric in one.metrics() for one in known)]
    rows = []
    for model in models:
        for arm in dict.fromkeys(one.arm for one in model.found):
            members = [one for one in model.found if one.arm == arm]
            told = [_told(*over(members, metric)) for metric in metrics]
            rows.append([model.name, arm, *told, len(members)])
    stages = known[0].stages if known else []
    title = f"Tasks: {' > '.join(stages)}, in %, 95 % intervals"
    notes = [f"{metric}: {METRICS[metric]}" for metric in metrics if metric in REVISITS]
    return "\n".join([title, format_table(rows, ["model", "arm", *metrics, "sequences"]), *notes])


def _told(mean: float, half: float) -> str:
    return "-" if mean != mean else f"{100 * mean:.1f}" + (f" ±{100 * half:.1f}" if half == half else "")


def fg_of(model: Grown, column: str, form: str, stage: int | str) -> dict | None:
    """The row of one model, of its first arm and order."""
    rows = [row for row in model.fg if (row["column"] or row["group"], row["form"], row["stage"]) == (column, form, stage)]
    return rows[0] if rows else None


def fg_comparison(models: list[Grown]) -> str:
    """FG of every column (and group) and model, and what the first model has less or more than the second."""
    names = list(dict.fromkeys(row["column"] or row["group"] for model in models for row in model.fg))
    rows = []
    for column in names:
        for form, stage in (("plain", "mean"), ("plain", "last"), ("chance", "mean"), ("chance", "last")):
            found = [fg_of(model, column, form, stage) for model in models]
            if any(row is None for row in found):
                continue
            told = []
            for row in found:
                half = max(row["high"] - row["value"], row["value"] - row["low"])
                told.append("-" if row["value"] != row["value"] else f"{row['value']:.1f} ±{half:.1f}")
            halves = [max(row["high"] - row["value"], row["value"] - row["low"]) for row in found[:2]]
            difference = found[0]["value"] - found[1]["value"]
            against = "-" if difference != difference else f"{difference:+.1f} ±{math.hypot(*halves):.1f}"
            words = {"mean": "mean of stages", "last": "last stage"}[stage]
            rows.append([column, words + (", over chance" if form == "chance" else ""), *told, against])
    if not rows:
        return ""
    head = "General forgetting FG: % of a model's own base score that was lost (below 0: gained), 95 % intervals"
    headers = ["benchmark", "FG", *(model.name for model in models), f"{models[0].name} - {models[1].name}"]
    bases = []
    for column in dict.fromkeys(row["column"] for row in models[0].fg if row["column"]):
        told = ", ".join(f"{model.name} {100 * row['base']:.1f} %" for model in models if (row := fg_of(model, column, "plain", "mean")))
        bases.append(f"{column}: base scores {told}")
    return "\n".join([head, format_table(rows, headers), *bases])


def read_models(root: Path, runs_of) -> tuple[dict[str, Curve], list[Grown]]:
    """What tables and pictures of the comparison show. runs_of(tree): a tree's finished runs."""
    named = read_json(root / "growth.json")["models"]
    return read_curves(root), [read_grown(root, name, folder, runs_of) for name, folder in named.items()]


def models_table(curves: dict[str, Curve], models: list[Grown]) -> str:
    """The comparison in text."""
    texts = [cell for model in models for cell in model.texts]
    tasks = list(dict.fromkeys(task for task, _, _ in texts))
    texts = sorted(texts, key=lambda cell: tasks.index(cell[0]))  # stable: models and stages stay as they are
    parts = [curve_table(curves) if curves else "", sequence_rows(models), fg_comparison(models), text_table(texts)]
    lines = signature_lines(row for _, _, rows in texts for row in rows)
    return "\n".join(["\n\n".join(filter(None, parts)), *lines])


def report_models(root: Path, runs_of) -> tuple[dict[str, Curve], list[Grown]]:
    """Prints the comparison and writes growth_results.json; returns what pictures show. runs_of(tree): a tree's finished runs."""
    curves, models = read_models(root, runs_of)
    print("\n" + models_table(curves, models), flush=True)
    drawn = {name: {**curve.record, "curve": {"flops": curve.flops, "held_out_nll": curve.nll}} for name, curve in curves.items()}
    write_json(root / "growth_results.json", {
        "pretraining": drawn,
        "speed_up": speed_up(curves["naive"], curves["grown"]) if {"grown", "naive"} <= set(curves) else None,
        "models": {
            model.name: {
                "folder": model.folder, **matrix_record(model.found), "fg": model.fg,
                "text": [{"task": task, "state": state, **row} for task, state, rows in model.texts for row in rows],
            } for model in models
        },
    })  # fmt: skip
    return curves, models


def stage_scores(models: list[Grown], task: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{model: (its score on a task at the base and after every stage, half widths)}, means over seeds of its first arm.

    The half widths are the wider of Student's over the seeds and what the test items allow.
    """
    found = {}
    for model in models:
        members = [one for one in model.found if one.arm == model.found[0].arm and one.order == model.found[0].order]
        j = members[0].tasks.index(task)
        values = np.array([[one.base[j], *one.R[:, j]] for one in members])
        halves = np.array([[math.nan, *one.half[:, j]] for one in members])
        over_seeds = np.array([seed_interval(column.tolist())[2] for column in values.T]) - values.mean(axis=0)
        over_seeds[0] = math.nan  # the base is the same for all
        found[model.name] = values.mean(axis=0), np.fmax(over_seeds, np.sqrt((halves**2).mean(axis=0)))
    return found
