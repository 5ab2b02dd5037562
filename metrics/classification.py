"""Precision, recall and F1 over answers that are classes, such as the letters of a multiple choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def weighted_scores(predicted: Sequence[str | None], gold: Sequence[str]) -> dict:
    """{"accuracy", "precision", "recall", "f1", "n", "unparsed"} of answers (None: unparsed) against the right ones.

    Averages over the gold classes, weighted by how often each is right; 0 / 0 counts as 0 (scikit-learn's
    average="weighted", zero_division=0).  An unparsed answer is a prediction of a class of its own that is never right: it
    costs accuracy and recall, and no class's precision.  A prediction that is no gold class costs likewise.
    The weighted recall is the accuracy by definition, and a model that always says one letter may have a fair accuracy at
    a poor F1.  Raises ValueError for lists that do not fit or a gold answer that is None.
    """
    if len(predicted) != len(gold) or not gold:
        raise ValueError(f"{len(predicted)} predictions for {len(gold)} gold answers; both need the same items, at least one")
    if any(answer is None for answer in gold):
        raise ValueError("a gold answer is None: every item needs a right answer")
    support, said = Counter(gold), Counter(predicted)
    right = Counter(g for p, g in zip(predicted, gold, strict=True) if p == g)
    precision = recall = f1 = 0.0
    for label, count in support.items():
        share = count / len(gold)
        precision += share * (right[label] / said[label] if said[label] else 0.0)
        recall += share * right[label] / count
        f1 += share * 2 * right[label] / (count + said[label])  # 2 P R / (P + R); the count is above 0
    accuracy = sum(right.values()) / len(gold)
    return {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1, "n": len(gold), "unparsed": said[None]}
