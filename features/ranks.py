"""Rank correlation of a feature with an outcome: Spearman's with an interval and a p, Kendall's, and Holm's p over many features."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

LEAST = 5  # data sets; fewer have too few orders for any of this
BLOCK = 500  # draws at a time, so that memory stays at 500 x n


class Relation(NamedTuple):
    """Of one feature with the outcome. rho: Spearman; low, high: 95 %; p: two-sided; tau: Kendall's tau-b; holm: p over all features."""

    feature: str
    n: int
    empty: int
    rho: float
    low: float
    high: float
    p: float
    tau: float
    holm: float = math.nan


def order(values: np.ndarray) -> np.ndarray:
    """(n, n): 1 where the column's value is below the row's, 1/2 where equal: counts (…, n) @ order.T + 1/2 are average ranks."""
    return (values[None, :] < values[:, None]) + 0.5 * (values[None, :] == values[:, None])


def correlation(a: np.ndarray, b: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Pearson's r along the last axis, each entry counted `counts` times; NaN where one side is constant."""
    weights = np.ones(a.shape[-1]) if counts is None else counts
    total = weights.sum(axis=-1, keepdims=True)
    a, b = (x - (weights * x).sum(axis=-1, keepdims=True) / total for x in (a, b))
    both = (weights * a * b).sum(axis=-1)
    size = np.sqrt((weights * a * a).sum(axis=-1) * (weights * b * b).sum(axis=-1))
    return np.divide(both, size, out=np.full(both.shape, math.nan), where=size > 1e-12)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation of x, y (n,), ties at their average rank; NaN where one side is constant."""
    return float(correlation(order(x).sum(axis=1), order(y).sum(axis=1)))


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """tau-b = Σ sign(Δx) sign(Δy) / √(pairs untied in x · pairs untied in y)."""
    a, b = np.sign(x[:, None] - x[None, :]), np.sign(y[:, None] - y[None, :])
    size = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return float((a * b).sum()) / size if size else math.nan


def relate(feature: str, x: np.ndarray, y: np.ndarray, seed: int = 36, rounds: int = 10_000) -> Relation:
    """x: a feature, NaN where empty: these are left out and counted; y: the outcome (n,).

    low, high: percentiles of rho over `rounds` draws of n data sets with replacement (a draw counts how often each is in it, and
    ranks are taken anew). p: (1 + permutations of y with at least this |rho|) / (1 + rounds).
    """
    kept = ~np.isnan(x)
    x, y, empty = x[kept], y[kept], int((~kept).sum())
    if len(x) < LEAST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Relation(feature, len(x), empty, *[math.nan] * 5)
    over, under, generator = order(x), order(y), np.random.default_rng(seed)
    rx, ry = over.sum(axis=1), under.sum(axis=1)
    rho, n, drawn, beyond = float(correlation(rx, ry)), len(x), [], 0
    for start in range(0, rounds, BLOCK):
        many = min(BLOCK, rounds - start)
        counts = generator.multinomial(n, np.full(n, 1 / n), many)  # (many, n)
        drawn.append(correlation(counts @ over.T, counts @ under.T, counts))
        shuffled = generator.permuted(np.tile(ry, (many, 1)), axis=1)
        beyond += int((np.abs(correlation(rx, shuffled)) >= abs(rho) - 1e-12).sum())
    low, high = np.nanquantile(np.concatenate(drawn), (0.025, 0.975))
    return Relation(feature, n, empty, rho, float(low), float(high), (1 + beyond) / (1 + rounds), kendall(x, y))


def holm(found: list[Relation]) -> list[Relation]:
    """The same with `holm`: p times the number of features not yet passed, in order of p, never falling (Holm, Scand. J. Stat. 1979)."""
    tested = sorted((k for k, one in enumerate(found) if one.p == one.p), key=lambda k: found[k].p)
    adjusted, worst = list(found), 0.0
    for passed, k in enumerate(tested):
        worst = max(worst, min(1.0, (len(tested) - passed) * found[k].p))
        adjusted[k] = found[k]._replace(holm=worst)
    return adjusted
