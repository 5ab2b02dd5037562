"""Multiple-choice benchmarks: questions that a model answers by the likelihood it gives to each option, and is never trained on here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """One question as raw text. A model reads header + shots + question, and each option is what may follow."""

    subject: str
    question: str  # ends where the answer begins, without a space: "…\nAnswer:"
    options: tuple[str, ...]  # with the space before them: " A", " B", …
    gold: int
    header: str = ""
    shots: tuple[str, ...] = ()  # solved examples; the first ones are left out where all together are too long
    source: str = ""  # "file:row"


@dataclass(frozen=True)
class Benchmark:
    """A column of general ability: name, its items, and what finds it again. fingerprint: sha256 of its content."""

    name: str
    items: list[Item]
    fingerprint: str
    spec: dict
    suite: Any = field(default=None, repr=False)  # of lm-evaluation-harness (model.harness), which then has the items
