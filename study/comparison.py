"""The optimizer comparison: which runs it has, and what they show once they are scored."""

from __future__ import annotations

import re

from study.errors import LetheError
from study.plan import Run, parse_pairs


def plan_comparison(tasks: list[str], comparison: dict[str, list[float]], pairs: str | None = None) -> list[Run]:
    """All runs in the order of execution, parents before children, the optimizers of one stage side by side.

    comparison: learning rates by optimizer.  pairs: "a:b,c:d"; None: the first task, then the second.  Every optimizer
    and rate has a tree of its own, optimizer/{name}_lr{rate}/{a} and .../{a}_to_{b}: stage 2 goes on with the optimizer
    and rate of its stage 1.  Raises LetheError for fewer than two tasks, unknown ones, and rates that share a folder.
    """
    tasks = list(dict.fromkeys(tasks))
    if len(tasks) < 2 and pairs is None:
        raise LetheError(f"an optimizer comparison needs two tasks, a first and a second; name two with --datasets, not {tasks}")
    for task in tasks:
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", task):
            raise LetheError(f"task name '{task}' cannot be a folder; use letters, digits, '_', '-', '.'")
    chosen = parse_pairs(f"{tasks[0]}:{tasks[1]}" if pairs is None else pairs, tasks)
    settings: dict[str, dict] = {}  # arm -> what its runs change
    for name, rates in comparison.items():
        for rate in dict.fromkeys(rates):
            arm = f"{name}_lr{rate:g}"
            if arm in settings:
                raise LetheError(
                    f"comparison: {name}'s learning rates {rates} are not told apart in the folder name {arm}; use fewer digits"
                )
            settings[arm] = {"optimizer.name": name, "learning_rate": rate}
    if not settings:
        raise LetheError("comparison: no learning rate; write comparison: {adamw: [0.001], muon: [0.001]}")
    runs = []
    for first in dict.fromkeys(a for a, _ in chosen):
        runs += [Run(1, arm, first, None, f"optimizer/{arm}/{first}", None, changes=dict(more)) for arm, more in settings.items()]
    for a, b in chosen:
        runs += [Run(2, arm, a, b, f"optimizer/{arm}/{a}_to_{b}", f"optimizer/{arm}/{a}", changes=dict(more))
                 for arm, more in settings.items()]  # fmt: skip
    owners: dict[str, Run] = {}
    for run in runs:
        other = owners.setdefault(run.folder.lower(), run)  # lower: some file systems do not tell A from a
        if other is not run:
            raise LetheError(f"two runs want the folder {run.folder}: {other.task} and {run.task}; rename a task")
    return runs
