"""The items of one scored cell as rows of numbers with 95 % intervals."""

from __future__ import annotations

import re

from metrics.classification import weighted_scores
from metrics.statistics import mean_interval, wilson_interval


def summarise(items: list[dict]) -> list[dict]:
    """Rows {metric, value, low, high, n, unparsed} of one cell (items as metrics.answers scores them), Wilson's for shares."""
    n, unparsed = len(items), sum(item["extracted"] is None for item in items)
    rows = []
    shares = {metric: items for metric in ("exact_match", "flexible_match", "string_match")}
    for group in sorted({item["group"] for item in items} - {""}):  # templates that training never saw, apart
        shares[f"exact_match_{group}"] = [item for item in items if item["group"] == group]
    for metric, chosen in shares.items():
        hits = sum(item["exact_match" if metric.startswith("exact_match") else metric] for item in chosen)
        low, high = wilson_interval(hits, len(chosen))
        rows.append({"metric": metric, "value": hits / len(chosen), "low": low, "high": high, "n": len(chosen), "unparsed": unparsed})
    for metric in ("rougeL", "answer_nll"):
        value, low, high = mean_interval([item[metric] for item in items])
        rows.append({"metric": metric, "value": value, "low": low, "high": high, "n": n, "unparsed": unparsed})
    return rows


def letter_scores(items: list[dict]) -> dict[str, float]:
    """{"precision", "recall", "f1"}, weighted over the letters, where every right answer is a letter A to E; else {}."""
    if not items or not all(re.fullmatch("[A-E]", item["gold"] or "") for item in items):
        return {}
    found = weighted_scores([item["extracted"] for item in items], [item["gold"] for item in items])
    return {name: found[name] for name in ("precision", "recall", "f1")}
