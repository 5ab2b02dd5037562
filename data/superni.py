"""A task as instruction tuning sees it: one definition before every input, a few demonstrations, perhaps classes.

The form of Super-NaturalInstructions, whose files data/tasks/superni.py reads; the built-in and the prepared tasks have it too.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from itertools import islice

from data.records import Record

_ROWS = 256  # that tell what all prompts of a task share
_MOST_LABELS = 10


def definition_of(task) -> str:
    """What every prompt of a task (data.folder.Task) begins with, its closing line breaks included; "" where there is nothing.

    The longest beginning that the last user turns of the first training rows share, cut after its last line break. So
    definition_of(task) + input_of(record, definition_of(task)) is the whole prompt, whichever separator the task has.
    """
    prompts = {_asked(record) for record in islice(task.train(), _ROWS)}
    if len(prompts) < 2:
        return ""
    shared = os.path.commonprefix(list(prompts))
    return shared[: shared.rfind("\n") + 1]


def input_of(record: Record, definition: str) -> str:
    """The input of a record: its last user turn without the definition before it."""
    return _asked(record).removeprefix(definition)


def _asked(record: Record) -> str:
    return record.prompt[-1][1]


def demonstrations(task, count: int = 20, seed: int = 0) -> list[Record]:
    """As many records to show a model: those kept for rehearsal first (SuperNI: the project's 20), then seeded others of train.

    Fewer than count where the task has fewer. Not one is a test item.
    """
    draw = random.Random(seed)
    kept = list(task.replay()) if task.replay else []
    if len(kept) >= count:
        return kept if len(kept) == count else draw.sample(kept, count)
    have = {(record.prompt, record.answer) for record in kept}
    rest = [record for record in task.train() if (record.prompt, record.answer) not in have]
    return kept + draw.sample(rest, min(count - len(kept), len(rest)))


def labels_of(records: Iterable[Record]) -> list[str] | None:
    """The answers as class labels, one per record; None where they are no classes.

    Classes: at most ten different answers, each given three times on average.
    """
    answers = [record.answer.strip() for record in records]
    different = len(set(answers))
    return answers if 1 < different <= _MOST_LABELS and different * 3 <= len(answers) else None
