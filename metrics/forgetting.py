"""FG, the general forgetting of seed 002: what share of its score on a benchmark a model lost with every stage of training.

    FG = (1/M) sum over stages m of (R0 - Rm) / R0 x 100,   R0 the score before, Rm after stage m       (above 0: lost)

A model at chance on four options has 0.25 to lose by this formula, though it knows nothing, and its noise reads as forgetting or as
gain. So beside it: (R0 - Rm) / (R0 - chance) x 100, where the score is clearly better than chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from metrics.statistics import resampled_sums, seed_interval, wilson_interval

SURE = 2.0  # standard errors that a score must be away from chance
NOTHING = (math.nan, math.nan, math.nan)


def forgetting_general(
    base, later: Sequence, *, better: str | float = "higher", chance: float | None = None, error: float | None = None, seed: int = 0,
    rounds: int = 1000,
) -> dict:  # fmt: skip
    """FG in percent of one benchmark: after every stage, their mean (the seed's FG), and after the last stage alone.

    base    the score before; or what each item scored, (items,), or of several seeds (seeds, items)
    later   the same after each stage, of the same items in the same order. NaN: an item without a score, which is left out of all
    better  "higher"; "lower": the sign is turned; or a number, the ideal in the scores' unit, such as 0.5 for the share of
            stereotypes that crows_pairs counts: |score - ideal| then takes the score's place, and lower is better
    chance  the score of guessing, for the adjusted form
    error   standard error of base where it is one score; of items it is known

    -> {"base", "scores", "n", "seeds", "plain", "adjusted", "reason"}; plain and adjusted are {"stages": [(value, low, high), …],
    "mean", "last": (value, low, high)}. With items low and high are 95 % by resampling items, each the same before and after (an item's
    seeds together), with several seeds the wider of that and Student's over them; else NaN. Values are means over the seeds'.
    adjusted is NaN, and reason says why, where base is within 2 standard errors of chance or worse than that, and for an ideal,
    which has no chance level; within 2 standard errors of the ideal there is nothing to lose or gain, and plain is NaN too.
    Raises ValueError where the items do not match.
    """
    if not (better in ("higher", "lower") or isinstance(better, int | float)):
        raise ValueError(f"better is 'higher', 'lower' or the ideal score, not {better!r}")
    values = _values(base, later)  # (seeds, stages + 1, items)
    seeds, n = values.shape[0], values.shape[2]
    means = values.mean(axis=2)  # (seeds, stages + 1)
    if error is None and n > 1:
        error = float(values[:, 0].mean(axis=0).std(ddof=1) / math.sqrt(n))
    plain_reason, reason = _why_not(float(means[:, 0].mean()), better, chance, error)
    draws = None
    if n > 1:
        sums = resampled_sums(values.reshape(-1, n).T, seed, rounds)
        draws = (sums / n).reshape(len(sums), seeds, -1)
    forms = {}
    for form, why, level in (("plain", plain_reason, 0.0), ("adjusted", reason, chance)):
        forms[form] = _form(values, means, draws, better, level) if not why else _nothing(means.shape[1] - 1)
    found = {"base": float(means[:, 0].mean()), "scores": [float(x) for x in means[:, 1:].mean(axis=0)], "n": n, "seeds": seeds}
    return {**found, **forms, "reason": plain_reason or reason}


def mean_forgetting(columns: Sequence[dict], form: str = "plain") -> dict:
    """FG of a group of benchmarks, the plain mean over those that have one: {"stages", "mean", "last", "columns": how many}.

    columns: results of forgetting_general. Its interval adds theirs in squares, since their items are others.
    """
    known = [one[form] for one in columns if not math.isnan(one[form]["mean"][0])]
    if not known:
        return {**_nothing(len(columns[0][form]["stages"]) if columns else 0), "columns": 0}
    stages = [_mean([one["stages"][m] for one in known]) for m in range(len(known[0]["stages"]))]
    return {"stages": stages, "mean": _mean([one["mean"] for one in known]), "last": _mean([one["last"] for one in known]),
            "columns": len(known)}  # fmt: skip


def _values(base, later: Sequence) -> np.ndarray:
    states = [np.asarray(one, dtype=np.float64) for one in (base, *later)]
    if len(states) < 2 or len({one.shape for one in states}) > 1 or states[0].ndim > 2 or states[0].size == 0:
        raise ValueError("FG needs the score before and after one stage or more, of the same items (and seeds) each")
    values = np.stack([one.reshape(-1, one.shape[-1]) if one.ndim else one.reshape(1, 1) for one in states], axis=1)
    kept = ~np.isnan(values).any(axis=(0, 1))
    if not kept.any():
        raise ValueError("FG needs an item that was scored before and after every stage")
    return values[:, :, kept]


def _why_not(base: float, better: str | float, chance: float | None, error: float | None) -> tuple[str, str]:
    """Why there is no plain form, and no adjusted one; "" where there is."""
    around = SURE * (error or 0.0)
    if not isinstance(better, str):
        if abs(base - better) <= around or base == better:
            why = f"the base, {base:.4g}, is within {SURE:g} standard errors of the ideal {better:g}"
            return why, why
        return "", "an ideal has no chance level"
    plain = "" if base else "the base scores 0"
    if chance is None:
        return plain, plain or "no chance level is known"
    ahead = base - chance if better == "higher" else chance - base
    if abs(ahead) <= around or ahead == 0:
        return plain, f"the base, {base:.4g}, is within {SURE:g} standard errors of chance, {chance:g}"
    return plain, "" if ahead > 0 else f"the base, {base:.4g}, is worse than chance, {chance:g}"


def _lost(scores: np.ndarray, better: str | float, level: float) -> np.ndarray:
    """(..., stages) in percent, of scores (..., stages + 1); level: 0 for the plain form, else chance."""
    if not isinstance(better, str):
        scores = np.abs(scores - better)
    before, lost = scores[..., :1], scores[..., :1] - scores[..., 1:]
    if level == 0.0 and better != "higher":
        lost = -lost  # more of it is worse; against chance the denominator turns the sign
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * np.where(before == level, np.nan, lost / (before - level))


def _form(values: np.ndarray, means: np.ndarray, draws: np.ndarray | None, better: str | float, level: float) -> dict:
    by_seed = _lost(means, better, level)  # (seeds, stages)
    drawn = None if draws is None else _lost(draws, better, level).mean(axis=1)  # (rounds, stages)
    same = (values[:, 1:] == values[:, :1]).all(axis=(0, 2))  # (stages,)
    unseen = 0.0  # what may have changed among other items where none did here
    if drawn is not None:
        start = float(means[:, 0].mean())
        unseen = 100 * wilson_interval(0, values.shape[2])[1] / abs((start if isinstance(better, str) else start - better) - level)

    def told(of_seeds: np.ndarray, of_draws: np.ndarray | None, unchanged: bool) -> tuple[float, float, float]:
        value, seed_low, seed_high = seed_interval(of_seeds)
        if of_draws is None:
            return value, seed_low, seed_high
        low, high = (value - unseen, value + unseen) if unchanged else np.nanquantile(of_draws, (0.025, 0.975))
        return value, float(np.fmin(low, seed_low)), float(np.fmax(high, seed_high))

    stages = [told(by_seed[:, m], None if drawn is None else drawn[:, m], bool(same[m])) for m in range(by_seed.shape[1])]
    mean = told(by_seed.mean(axis=1), None if drawn is None else drawn.mean(axis=1), bool(same.all()))
    return {"stages": stages, "mean": mean, "last": stages[-1]}


def _nothing(stages: int) -> dict:
    return {"stages": [NOTHING] * stages, "mean": NOTHING, "last": NOTHING}


def _mean(triples: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    value, low, high = np.array(triples).T
    middle = float(value.mean())
    return (middle, middle - float(np.sqrt(((value - low) ** 2).sum())) / len(value),
            middle + float(np.sqrt(((high - value) ** 2).sum())) / len(value))  # fmt: skip
