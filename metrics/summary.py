"""The items of one scored cell as rows of numbers with 95 % intervals."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from functools import cache

import numpy as np

from metrics.classification import weighted_scores
from metrics.generation import corpus_bleu
from metrics.sari import SIGNATURE, sari_counts, sari_of_counts
from metrics.statistics import Z, mean_interval, resampled_sums, wilson_interval


def summarise(items: list[dict], corpus: bool = True) -> list[dict]:
    """Rows {metric, value, low, high, n, unparsed} of one cell (items as metrics.answers scores them), Wilson's for shares.

    Free text has rows of generation too: rouge1, rouge2, and sari, sari_easse, bleu with what they are in a field "signature"; the
    last two, of the corpus, take about a second for three thousand references. corpus: False leaves them out.
    """
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
    return rows + [{**row, "unparsed": unparsed} for row in _generation([item for item in items if "rouge1" in item], corpus)]


def _generation(items: list[dict], corpus: bool) -> list[dict]:
    """Rows {metric, value, low, high, n} of free text, of the items that carry such scores: means over items, and scores of all together.

    sari: the mean over sentences, by the paper; sari_easse, bleu: of the corpus, with intervals by resampling items.
    """
    rewritten, rows = [item for item in items if "sari" in item], []

    def add(metric: str, found: tuple, n: int, signature: str = "") -> None:
        row = {"metric": metric, **dict(zip(("value", "low", "high"), found, strict=True)), "n": n}
        rows.append({**row, "signature": signature} if signature else row)

    if items:
        for metric in ("rouge1", "rouge2"):
            add(metric, mean_interval([item[metric] for item in items]), len(items))
    if rewritten:
        add("sari", mean_interval([item["sari"] for item in rewritten]), len(rewritten), f"{SIGNATURE}paper|mean over sentences")
    if rewritten and corpus:
        counts = sari_counts(rewritten)
        low, high = np.quantile(sari_of_counts(resampled_sums(counts)).mean(axis=0), (0.025, 0.975))
        value = float(sari_of_counts(counts.sum(axis=0)).mean())
        add("sari_easse", (value, float(low), float(high)), len(rewritten), f"{SIGNATURE}easse|corpus")
    if items and corpus and _has_sacrebleu():
        bleu = corpus_bleu([item["output"] for item in items], [item.get("references") or (item["reference"],) for item in items])
        add("bleu", (bleu.value, *bleu.interval()), len(items), bleu.signature)
    return rows


@cache
def _has_sacrebleu() -> bool:
    """Whether there is BLEU; without it one line says so."""
    if importlib.util.find_spec("sacrebleu"):
        return True
    print("BLEU       left out, for it needs sacrebleu: pip install sacrebleu", file=sys.stderr)
    return False


def summarise_benchmark(items: list[dict]) -> list[dict]:
    """Rows {metric, value, low, high, n, unparsed} of a column of general ability, items {subject, correct, extracted, answer_nll, …}.

    accuracy        of all items alike ("micro"), the unparsed wrong
    accuracy_macro  the mean over subjects; its interval from each subject's p (1 - p) / n, with p after Agresti and Coull, so that
                    a subject without an error has a spread too
    accuracy/{subject}   where there are several
    answer_nll      of the right answer, where items have it
    Shares have Wilson's intervals; where `correct` is no share (F1, say), mean ± z s/√n.
    """
    by_subject: dict[str, list[float]] = {}
    for item in items:
        if item["correct"] is not None:
            by_subject.setdefault(item["subject"], []).append(float(item["correct"]))
    values = [value for found in by_subject.values() for value in found]
    unparsed = sum("extracted" in item and item["extracted"] is None for item in items)  # a choice by likelihood has none to read
    rows = [_accuracy("accuracy", values, unparsed)]
    if len(by_subject) > 1:
        means = [sum(found) / len(found) for found in by_subject.values()]
        variance = 0.0
        for found in by_subject.values():
            share = (sum(found) + 2) / (len(found) + 4)
            variance += share * (1 - share) / len(found)
        half = Z * math.sqrt(variance) / len(means)
        middle = sum(means) / len(means)
        rows.append({"metric": "accuracy_macro", "value": middle, "low": max(0.0, middle - half), "high": min(1.0, middle + half),
                     "n": len(values), "unparsed": unparsed})  # fmt: skip
        for subject, found in sorted(by_subject.items()):
            missed = sum(item["subject"] == subject and "extracted" in item and item["extracted"] is None for item in items)
            rows.append(_accuracy(f"accuracy/{subject}", found, missed))
    losses = [item["answer_nll"] for item in items if item.get("answer_nll") is not None]
    if losses:
        value, low, high = mean_interval(losses)
        rows.append({"metric": "answer_nll", "value": value, "low": low, "high": high, "n": len(losses), "unparsed": unparsed})
    scored = [item["metrics"] for item in items if item.get("metrics")]  # of lm-evaluation-harness: its other metrics
    for metric in dict.fromkeys(name for own in scored for name in own):
        found = [own[metric] for own in scored if isinstance(own.get(metric), bool | int | float)]
        if found:
            rows.append(_accuracy(metric, [float(value) for value in found], 0))
    return rows


def _accuracy(metric: str, values: list[float], unparsed: int) -> dict:
    n, total = len(values), sum(values)
    if all(value in (0.0, 1.0) for value in values):
        (low, high), mean = wilson_interval(total, n), total / n if n else math.nan
    else:
        mean, low, high = mean_interval(values)
    return {"metric": metric, "value": mean, "low": low, "high": high, "n": n, "unparsed": unparsed}


def letter_scores(items: list[dict]) -> dict[str, float]:
    """{"precision", "recall", "f1"}, weighted over the letters, where every right answer is a letter A to E; else {}."""
    if not items or not all(re.fullmatch("[A-E]", item["gold"] or "") for item in items):
        return {}
    found = weighted_scores([item["extracted"] for item in items], [item["gold"] for item in items])
    return {name: found[name] for name in ("precision", "recall", "f1")}
