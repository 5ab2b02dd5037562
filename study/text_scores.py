"""The scores of generated text beside each other: ROUGE, SARI and BLEU of every state of a study, and what their values are values of."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from metrics.statistics import seed_interval
from study.logging import format_table
from study.plan import arm_label
from study.results import WORDS, stage_of

METRICS = ("rouge1", "rouge2", "rougeL", "sari", "sari_easse", "bleu")


def text_table(cells: Iterable[tuple[str, str, list[dict]]]) -> str:
    """One row a task and state, in % with 95 %; "" where nothing is free text.

    cells: (task, state, rows of metrics.summary.summarise). Those of the same task and state (runs, seeds) are averaged, and the
    interval is then the wider of Student's over them and what the test items allow, as everywhere.
    """
    found: dict[tuple[str, str], list[dict[str, dict]]] = {}
    for task, state, rows in cells:
        own = {row["metric"]: row for row in rows}
        if "rouge1" in own:
            found.setdefault((task, state), []).append(own)
    if not found:
        return ""
    table = []
    for (task, state), members in found.items():
        told = [_told([one[metric] for one in members if metric in one]) for metric in METRICS]
        table.append([task, state, *told, max(one["rouge1"]["n"] for one in members)])
    headers = ["task", "state", *(WORDS[metric] for metric in METRICS), "n"]
    used = [i for i in range(len(headers)) if any(row[i] != "-" for row in table)]
    return "Generated text, in %, 95 % intervals\n" + format_table([[row[i] for i in used] for row in table], [headers[i] for i in used])


def _told(rows: list[dict]) -> str:
    if not rows:
        return "-"
    mean, _, high = seed_interval([row["value"] for row in rows])
    items = float(np.mean([max(row["high"] - row["value"], row["value"] - row["low"]) for row in rows]))
    return f"{100 * mean:.1f} ±{100 * float(np.fmax(high - mean, items)):.1f}"


def text_cells(rows: list[dict]) -> list[tuple[str, str, list[dict]]]:
    """Cells for text_table of a study's results: the base, stage 1 on its own task, and stage 2 on both of its tasks."""
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        stage, task = stage_of(row), row["task"]
        second = stage == 2 and task != row["first"]
        if stage == 2:
            state = f"{arm_label(row['arm'])}, {'second learned' if second else 'first kept'}"
        elif stage == 1 and task != row["first"]:
            continue
        else:
            state = "after stage 1" if stage else "base"
        cells.setdefault((task, stage, second, state, row.get("run"), row.get("seed")), []).append(row)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return [(key[0], key[3], own) for key, own in sorted(cells.items(), key=lambda cell: (tasks.index(cell[0][0]), *cell[0][1:3]))]


def signature_lines(rows: Iterable[dict]) -> list[str]:
    """What SARI and BLEU of some rows are values of, a line each; [] where there are none."""
    signed = dict.fromkeys((row["metric"], row["signature"]) for row in rows if row.get("signature"))
    return [f"{WORDS[metric]:10s} {signature}" for metric, signature in signed]
