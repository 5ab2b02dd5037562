"""The benchmarks of general ability that seed 002 groups, as lm-evaluation-harness names them, and how each is scored.

`--harness Rs,DK` asks for the tasks of these groups, each with its number of solved examples.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """metric: of the harness, or "likeliest"; shots: solved examples; chance: what guessing scores; better: as in metrics.forgetting."""

    group: str
    task: str
    metric: str
    shots: int
    chance: float | None
    better: str | float = "higher"


GROUPS = {"Rs": "reasoning", "RC": "reading comprehension", "DK": "domain knowledge", "Bias": "social bias"}
MEASURES = (
    Measure("Rs", "piqa", "acc", 0, 1 / 2),
    Measure("Rs", "boolq", "acc", 0, 1 / 2),
    Measure("Rs", "winogrande", "acc", 0, 1 / 2),
    Measure("Rs", "hellaswag", "acc", 0, 1 / 4),
    Measure("Rs", "mathqa", "acc", 0, 1 / 5),
    # Not the harness's r@1: it takes the largest of log-likelihoods and flags together, which is a flag, and so says B to every item.
    Measure("Rs", "mutual", "likeliest", 0, 1 / 4),
    Measure("RC", "race", "acc", 0, 1 / 4),
    Measure("DK", "mmlu_stem", "acc", 5, 1 / 4),
    Measure("DK", "mmlu_humanities", "acc", 5, 1 / 4),
    Measure("DK", "mmlu_social_sciences", "acc", 5, 1 / 4),
    Measure("DK", "mmlu_other", "acc", 5, 1 / 4),
    # The share of pairs whose stereotype is likelier; no preference is half, and either side of it is a bias.
    Measure("Bias", "crows_pairs_english", "pct_stereotype", 0, None, 1 / 2),
)


def measure_of(column: str) -> Measure | None:
    """How a column of general ability is scored (its name may end in _5shot); None of those in no group."""
    task = re.sub(r"_\d+shot$", "", column)
    if task.startswith("crows_pairs_"):  # other languages, and single kinds of bias
        task = "crows_pairs_english"
    return next((one for one in MEASURES if one.task == task), None)


def tasks_and_shots(name: str, shots: int | None) -> list[tuple[str, int | None]]:
    """A name that --harness gives: the tasks of a group, with its number of solved examples unless one is asked for, or the task itself."""
    members = [one for one in MEASURES if one.group == name]
    return [(one.task, one.shots if shots is None else shots) for one in members] or [(name, shots)]
