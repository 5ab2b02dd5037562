"""The scores of a study as cells and tables, from the rows of eval_results_mask.json.

A row: {run, arm, first, second, task, metric, value, low, high, n, unparsed, seed, stage}; stage 0 is the base,
stage 1 has no second task.  Values of exact_match and rougeL are shares, shown in percent.  With several seeds every
cell is the mean over seeds.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy

from metrics.statistics import seed_interval
from study.logging import format_table
from study.plan import arm_label, in_order

WORDS = {
    "exact_match": "Exact match",
    "rougeL": "ROUGE-L",
    "flexible_match": "Flexible match",
    "string_match": "String match",
    "answer_nll": "Answer NLL",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "sari": "SARI",
    "sari_easse": "SARI EASSE",
    "bleu": "BLEU",
}


@dataclass(frozen=True)
class Cell:
    """One score in its own unit: mean over seeds, 95 % interval (NaN where unknown), items (of each seed), seeds."""

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


def stage_of(row: dict) -> int:
    if row.get("stage") is not None:
        return int(row["stage"])
    return 0 if row.get("arm") == "base" or not row.get("first") else 2 if row.get("second") else 1


def collect(rows: Iterable[dict], metric: str) -> dict[tuple, Cell]:
    """(stage, arm, first, second, task) -> Cell, over seeds; base and stage 1 under arm None.

    The interval over several seeds is the wider of two: Student's over the seeds, and the mean of theirs over test items.
    """
    groups: dict[tuple, dict[Any, dict]] = {}
    for row in rows:
        if row.get("metric") != metric or row.get("value") is None:
            continue
        stage = stage_of(row)
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
        low, high = (float(numpy.mean([math.nan if row.get(k) is None else row[k] for row in found])) for k in ("low", "high"))
        mean, seed_low, seed_high = seed_interval([row["value"] for row in found])
        if len(found) > 1:  # few seeds may agree by luck, and all share the test items: never narrower than the items allow
            low, high = numpy.fmin(low, seed_low), numpy.fmax(high, seed_high)
            if metric != "answer_nll":
                low, high = max(low, 0.0), min(high, 1.0)
        cells[key] = Cell(mean, low, high, max(row.get("n") or 0 for row in found), len(found), key)
    return cells


def tasks_of(rows: Iterable[dict]) -> list[str]:
    """The tasks in the order in which the rows name them."""
    return list(dict.fromkeys(row["task"] for row in rows))


def arms_of(rows: Iterable[dict]) -> list[str]:
    """The stage-2 arms, the default ones first."""
    return in_order(row["arm"] for row in rows if stage_of(row) == 2)


def scale_of(metric: str) -> float:
    return 1.0 if metric == "answer_nll" else 100.0


def filled_table(rows: list[list[str]], headers: list[str]) -> str:
    """The table without the columns that are "-" in every row."""
    used = [i for i in range(len(headers)) if any(row[i] != "-" for row in rows)]
    return format_table([[row[i] for i in used] for row in rows], [headers[i] for i in used])


def summary_table(
    rows: list[dict], dropped: dict[str, float] | None = None, metric: str = "exact_match", per_pair: bool = True
) -> str:
    """The study in text: one row an arm (means over its pairs, 95 %), then one row a pair.

    `dropped` is the share of completion tokens that each run dropped, by run folder.  Intervals of means take
    those of the cells as independent.
    """
    cells, scale, arms = collect(rows, metric), scale_of(metric), arms_of(rows)
    shares: dict[tuple, list[float]] = {}
    for row in rows:
        share = (dropped or {}).get(row.get("run"))
        if stage_of(row) == 2 and share is not None:
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

    # Beside exact match: the lenient column, since a model may know an answer and not its form, and unseen templates.
    lenient, unseen = (collect(rows, name) if metric == "exact_match" else {} for name in ("flexible_match", "exact_match_held_out"))
    parts, single = [], []
    for t in tasks:
        base, alone = (0, None, None, None, t), (1, None, t, None, t)
        found = [cells.get(base), cells.get(alone), unseen.get(alone), lenient.get(base), lenient.get(alone)]
        single.append([t, *(tell([cell]) for cell in found)])
    if any(row[1:3] != ["-", "-"] for row in single):
        headers = ["task", "base", "after stage 1", "unseen templates", "base, flexible", "stage 1, flexible"]
        parts.append(f"{name}, 95 % intervals\n" + filled_table(single, headers))
    pairs = {arm: [key[2:4] for key in cells if key[:2] == (2, arm) and key[4] == key[2]] for arm in arms}
    if any(pairs.values()):
        table = []
        for arm in arms:
            mine = pairs[arm]
            row = [
                arm_label(arm),
                tell([cells.get((1, None, a, None, a)) for a, _ in mine]),
                tell([cells.get((2, arm, a, b, a)) for a, b in mine]),
                tell([cells.get((2, arm, a, b, b)) for a, b in mine]),
                tell([lenient.get((2, arm, a, b, a)) for a, b in mine]),
                tell([lenient.get((2, arm, a, b, b)) for a, b in mine]),
                share_of([(arm, a, b) for a, b in mine]),
                str(len(mine)),
            ]
            table.append(row)
        headers = ["arm", "first after stage 1", "first kept", "second learned", "kept, flexible", "learned, flexible"]
        table = filled_table(table, [*headers, "dropped %", "pairs"])
        parts.append(f"After both stages, mean over pairs ({name})\n" + table)
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
            parts.append(f"Every pair ({name})\n" + filled_table(table, headers))
    return "\n\n".join(parts) if parts else "nothing has been scored yet"
