"""Sequences of tasks: which runs they have, and what R, the score on every task after every stage, says of each arm.

Stage 1 is lora_base/{task}, the same for all arms and orders; stage k goes on from stage k - 1 in
sequence/{arm}/{order}/{k}_{task}/, where order is the tasks with commas between. An arm is a way to keep what earlier stages taught:

    none                nothing is done
    random, kmeans      real rows of every earlier task, drawn at random or near the centres of clusters
    replay              the 1 % of every earlier task that data.prepare keeps for it
    self_output         as random, with answers written by the model that had just learned the task
    ssr, ssr_random     as kmeans and random, of rows that the base has invented, with such answers (arXiv 2403.01244)
    l2, ewc             no rows: parameters are held near where the stage before left them (EWC: arXiv 1612.00796)
    mtl                 all tasks at once, from the base: what no sequence can be expected to beat
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metrics.continual import continual_metrics
from metrics.statistics import seed_interval
from metrics.summary import summarise
from study.errors import LetheError
from study.folder import read_json, read_jsonl
from study.logging import format_table
from study.plan import Run, nearest

ARMS = ("none", "random", "kmeans", "replay", "self_output", "ssr", "ssr_random", "l2", "ewc", "mtl")
WITH_ROWS = ("random", "kmeans", "replay", "self_output", "ssr", "ssr_random", "mtl")
WRITTEN = ("self_output", "ssr", "ssr_random")  # whose answers the stage's own model writes
SYNTHETIC = ("ssr", "ssr_random")
ANCHORED = ("l2", "ewc")
LONGEST = 180  # letters of an order: file systems take 255 for a name, and TensorBoard's hold arm and task too
# A task that comes again: BWT and forgetting ask of every task what is lost since it was trained last.
METRICS = {"AR": "average after the last stage", "BWT": "change of earlier tasks since they were learned", "forgetting": "from their best",
           "FWT": "on a task before it is trained, less the base", "learning": "on a task when it is trained, less the base",
           "revisit": "of tasks that come again: the score just before that, less the one when it was first trained",
           "relearned": "the same, just after it was trained again"}  # fmt: skip
REVISITS = ("revisit", "relearned")


def parse_orders(text: str, tasks: Iterable[str]) -> list[list[str]]:
    """--sequence "a,b,c" or several, "a,b,c;c,a,b" -> orders; tasks may come again. LetheError for unknown ones, and for one alone."""
    tasks, orders = list(tasks), []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        order = [name.strip() for name in part.split(",") if name.strip()]
        for name in order:
            if name not in tasks:
                raise LetheError(f"--sequence: {name!r} is not among the tasks of this study{nearest(name, tasks)}")
        if len(set(order)) < 2 or any(a == b for a, b in zip(order, order[1:], strict=False)):
            raise LetheError(f"--sequence {part}: name two tasks or more, none twice in a row")
        if order not in orders:
            orders.append(order)
    if not orders:
        raise LetheError("--sequence names no task; write first,second,third")
    return orders


def parse_rehearsal(text: str | None) -> list[str]:
    """--rehearsal "none,ssr" -> arms, each once; None or all: every one."""
    if text in (None, "all"):
        return list(ARMS)
    arms = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for arm in arms:
        if arm not in ARMS:
            raise LetheError(f"--rehearsal: unknown arm {arm!r}{nearest(arm, ARMS)}")
    if not arms:
        raise LetheError(f"--rehearsal names no arm; known are {', '.join(ARMS)}")
    return arms


def order_name(order: list[str]) -> str:
    """What an order is called, also on disk: its tasks, as --sequence has them. So no other order is ever taken for it."""
    return ",".join(order)


def plan_sequences(orders: list[list[str]], arms: list[str], mask: str) -> list[Run]:
    """All runs, parents before children: stage 1 of every order's first task, then each order under each arm."""
    firsts = dict.fromkeys(order[0] for order in orders)
    runs = [Run(1, "none", task, None, f"lora_base/{task}", None, policy=mask) for task in firsts]
    for order in orders:
        name = order_name(order)
        if len(name) > LONGEST:
            raise LetheError(
                f"--sequence: {name[:60]}… is {len(name)} letters long, and folders take {LONGEST}; give the tasks shorter names"
            )
        for arm in arms:
            parent = f"lora_base/{order[0]}"
            for k, task in enumerate(order[1:], 2):
                if arm == "mtl" and k < len(order):
                    continue
                folder = f"sequence/{arm}/{name}/{k}_{'joint' if arm == 'mtl' else task}"
                past = tuple(order[: k - 1])
                runs.append(Run(k, arm, task, None, folder, None if arm == "mtl" else parent, order=name, past=past, policy=mask))
                parent = folder
    return runs


# ----------------------------------------------------------------------------------------------------------------------
# Results


@dataclass(frozen=True)
class Sequence:
    """One arm over one order in one seed. R (S, T): rows stages, columns its tasks; half: half widths of its intervals.

    stages: the task of each. mtl has its last row alone. base (T,): the untrained model.
    """

    arm: str
    order: str
    stages: list[str]
    seed: int
    R: np.ndarray
    half: np.ndarray
    base: np.ndarray
    rows: dict[str, dict]  # what each stage rehearsed: {"2_b": {"a": 40}}

    @property
    def tasks(self) -> list[str]:
        """Each once, in the order of their first stage: the columns of R."""
        return list(dict.fromkeys(self.stages))

    @property
    def trained(self) -> list[int]:
        """Which column each stage trains."""
        return [self.tasks.index(task) for task in self.stages]

    def metrics(self) -> dict[str, float]:
        """continual_metrics; of mtl what its one row says."""
        if self.arm == "mtl":
            return {"AR": float(self.R[-1].mean()), "learning": float((self.R[-1] - self.base).mean())}
        return continual_metrics(self.R, self.base, trained=self.trained)

    def half_of(self, metric: str) -> float:
        """Half a 95 % interval of a metric over test items: the cells' added in squares, since they are of other items or models."""
        size, last = len(self.tasks), self.half[-1]
        if metric == "AR":
            return float(np.sqrt((last**2).sum()) / size)
        if self.arm == "mtl":
            return float(np.sqrt((last**2).sum()) / size) if metric == "learning" else math.nan
        first, again = ({j: k for k, j in stages} for stages in (reversed([*enumerate(self.trained)]), enumerate(self.trained)))
        pairs = {
            "BWT": [(len(self.half) - 1, k, j) for j, k in again.items() if k < len(self.half) - 1],
            "learning": [(k, None, j) for j, k in first.items()],
            "revisit": [(again[j] - 1, k, j) for j, k in first.items() if again[j] > k],
            "relearned": [(again[j], k, j) for j, k in first.items() if again[j] > k],
        }
        found = pairs.get("BWT" if metric == "forgetting" else metric)
        if not found:
            return math.nan
        squares = sum(self.half[k, j] ** 2 for *rows, j in found for k in rows if k is not None)
        return float(np.sqrt(squares) / len(found))


def headline(rows: list[dict], kind: str) -> dict:
    """The score that R holds: ROUGE-L of free text, else exact match."""
    return next(row for row in rows if row["metric"] == ("rougeL" if kind == "text" else "exact_match"))


def read_sequences(tree: Path, seed: int, runs: list[Run], kinds: dict[str, str]) -> list[Sequence]:
    """Every sequence of a study whose cells are all there. runs: the finished ones; kinds: of the tasks' answers."""
    chains: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.order:
            chains.setdefault((run.order, run.arm), []).append(run)
    found = []
    for (order, arm), chain in chains.items():
        chain = sorted(chain, key=lambda run: run.stage)
        stages = order.split(",")
        tasks = list(dict.fromkeys(stages))
        if len(chain) != (1 if arm == "mtl" else len(stages) - 1):
            continue
        folders = [f"lora_base/{stages[0]}", *(run.folder for run in chain)] if arm != "mtl" else [chain[0].folder]
        cells = [[_cell(tree / folder / "eval" / f"{task}.jsonl", kinds[task]) for task in tasks] for folder in folders]
        base = [_cell(tree / "base" / "eval" / f"{task}.jsonl", kinds[task]) for task in tasks]
        if any(cell is None for row in [*cells, base] for cell in row):
            continue
        values, halves = (np.array([[cell[i] for cell in row] for row in cells]) for i in (0, 1))
        told = {Path(run.folder).name: _rehearsed(tree, run) for run in chain}
        found.append(Sequence(arm, order, stages, seed, values, halves, np.array([cell[0] for cell in base]), told))
    return found


def _rehearsed(tree: Path, run: Run) -> dict:
    return read_json(tree / run.folder / "run.json", {}).get("rehearsal", {})


def _cell(file: Path, kind: str) -> tuple[float, float] | None:
    items = read_jsonl(file)
    if not items:
        return None
    row = headline(summarise(items, corpus=False), kind)
    return row["value"], max(row["high"] - row["value"], row["value"] - row["low"])


def matrix_record(found: list[Sequence]) -> dict:
    """matrix.json: every R with its metrics, and the metrics of each arm over orders and seeds."""
    return {
        "about": {"R": "rows: after stage 1, 2, …; columns: the tasks; exact match, or ROUGE-L of free text", **METRICS},
        "sequences": [
            {"arm": one.arm, "order": one.order, "stages": one.stages, "tasks": one.tasks, "seed": one.seed,
             "R": one.R.tolist(), "base": one.base.tolist(), "metrics": one.metrics(), "rehearsal": one.rows}
            for one in found
        ],
        "arms": {arm: {metric: dict(zip(("mean", "half"), over(members, metric), strict=True)) for metric in METRICS}
                 for arm, members in by_arm(found).items()},
    }  # fmt: skip


def by_arm(found: list[Sequence]) -> dict[str, list[Sequence]]:
    arms: dict[str, list[Sequence]] = {arm: [] for arm in ARMS}
    for one in found:
        arms[one.arm].append(one)
    return {arm: members for arm, members in arms.items() if members}


def over(members: list[Sequence], metric: str) -> tuple[float, float]:
    """(mean, half a 95 % interval) over orders and seeds: the wider of Student's over them and what the test items allow."""
    values = [one.metrics().get(metric, math.nan) for one in members]
    mean, _, high = seed_interval(values)
    items = float(np.sqrt(np.mean([one.half_of(metric) ** 2 for one in members])))  # sequences share items: their mean is no surer
    return mean, float(np.fmax(high - mean, items))


def sequence_table(found: list[Sequence]) -> str:
    """One row an arm: metrics in % over orders and seeds, the last stage's score on each task, the rows rehearsed."""
    rows, metrics = [], [metric for metric in METRICS if metric not in REVISITS or any(metric in one.metrics() for one in found)]
    for arm, members in by_arm(found).items():
        told = []
        for metric in metrics:
            mean, half = over(members, metric)
            told.append("-" if mean != mean else f"{100 * mean:.1f}" + (f" ±{100 * half:.1f}" if half == half else ""))
        seen = [sum(stage.values()) for one in members for stage in one.rows.values()]
        rows.append([arm, *told, f"{np.mean(seen):.0f}" if seen and any(seen) else "0", len(members)])
    several = len({(one.order, one.seed) for one in found})
    means = f"; means over {several} orders and seeds" if several > 1 else ""
    lengths = " or ".join(map(str, sorted({len(one.stages) for one in found})))
    title = f"Sequences of {lengths} stages, in %, 95 % intervals{means}"
    notes = [f"{metric}: {METRICS[metric]}" for metric in metrics if metric in REVISITS]
    return "\n".join([title, format_table(rows, ["arm", *metrics, "rehearsed rows a stage", "sequences"]), *notes])
