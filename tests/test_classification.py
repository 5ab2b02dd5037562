"""metrics/classification.py and metrics/summary.py: against counting by hand and by brute force."""

import random

import pytest

from metrics.classification import weighted_scores
from metrics.summary import letter_scores, summarise


def brute(predicted, gold):
    """The definitions, class by class, from the four counts of each."""
    totals = [0.0, 0.0, 0.0]
    for label in set(gold):
        hit = sum(p == g == label for p, g in zip(predicted, gold, strict=True))
        false = sum(p == label != g for p, g in zip(predicted, gold, strict=True))
        missed = sum(g == label != p for p, g in zip(predicted, gold, strict=True))
        precision = hit / (hit + false) if hit + false else 0.0
        recall = hit / (hit + missed)
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        for k, value in enumerate((precision, recall, f1)):
            totals[k] += value * (hit + missed) / len(gold)
    return totals


def test_by_hand():
    # A: said twice, right once of two; B: said once, right, of two; C is never said; one answer is unparsed.
    found = weighted_scores(["A", "A", "B", None, "D"], ["A", "B", "B", "A", "C"])
    assert found["precision"] == pytest.approx((2 * 0.5 + 2 * 1.0 + 0) / 5)
    assert found["recall"] == pytest.approx((2 * 0.5 + 2 * 0.5 + 0) / 5) == found["accuracy"]
    assert found["f1"] == pytest.approx((2 * 0.5 + 2 * 2 / 3 + 0) / 5)
    assert (found["n"], found["unparsed"]) == (5, 1)


def test_unparsed_costs_recall_and_no_precision():
    gold = ["A", "B"] * 10
    with_gaps = weighted_scores([None if i < 4 else g for i, g in enumerate(gold)], gold)
    assert (with_gaps["precision"], with_gaps["recall"], with_gaps["accuracy"]) == (1.0, pytest.approx(0.8), 0.8)
    nothing = weighted_scores([None] * 20, gold)
    assert [nothing[name] for name in ("accuracy", "precision", "recall", "f1", "unparsed")] == [0, 0, 0, 0, 20]
    always_a = weighted_scores(["A"] * 20, gold)
    assert always_a["accuracy"] == 0.5 and always_a["f1"] == pytest.approx(1 / 3)


def test_brute_force():
    draw = random.Random(0)
    for _ in range(50):
        n = draw.randint(1, 40)
        gold = [draw.choice("ABCDE") for _ in range(n)]
        predicted = [draw.choice([*"ABCDE", None, "F"]) for _ in range(n)]
        found = weighted_scores(predicted, gold)
        assert [found["precision"], found["recall"], found["f1"]] == pytest.approx(brute(predicted, gold))
        assert found["recall"] == pytest.approx(found["accuracy"])


def test_mistakes():
    for predicted, gold in (([], []), (["A"], ["A", "B"]), (["A"], [None])):
        with pytest.raises(ValueError):
            weighted_scores(predicted, gold)


def item(extracted, gold, group=""):
    right = extracted == gold
    return {"extracted": extracted, "gold": gold, "exact_match": right, "flexible_match": True, "string_match": False,
            "rougeL": 0.5, "answer_nll": 1.0 + right, "group": group}  # fmt: skip


def test_a_cell_in_rows():
    items = [item("A", "A"), item(None, "B", "held_out"), item("C", "D"), item("E", "E", "held_out")]
    rows = {row["metric"]: row for row in summarise(items)}
    assert rows["exact_match"]["value"] == 0.5 == rows["exact_match_held_out"]["value"]
    assert rows["exact_match_held_out"]["n"] == 2 and rows["flexible_match"]["value"] == 1.0
    assert rows["answer_nll"]["value"] == 1.5 and {row["unparsed"] for row in rows.values()} == {1}
    assert rows["exact_match"]["low"] < 0.5 < rows["exact_match"]["high"]
    assert letter_scores(items) == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5})
    assert letter_scores([item("70", "70")]) == {} and letter_scores([]) == {}
