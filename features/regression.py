"""Fits that predict an outcome from features, and how far they can be trusted: split, trees, baselines, conformal width, scores.

Everything is numpy but the trees, which are LightGBM's (imported where used).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from study.errors import LetheError

TREES = 140
STOP_AFTER = 50  # rounds without a better validation error
RIDGE = 10.0  # on standardised columns
TEST, VALIDATION, CALIBRATION = 0.28, 0.14, 0.12  # of all rows; the other two of what is left


def lightgbm():
    """The module; LetheError with the pip command where it is not installed."""
    try:
        import lightgbm as module
    except ImportError:
        raise LetheError("the predictor needs LightGBM: pip install lightgbm") from None
    return module


def conformal_rank(n: int, coverage: float) -> int:
    """ceil((n + 1) coverage): which of n residuals, by size, is the half width (split conformal, arXiv:1905.02928 section 1)."""
    return math.ceil((n + 1) * coverage - 1e-9)


def conformal_width(residuals: np.ndarray, coverage: float) -> float:
    """Half the width of an interval that holds a new value with at least this probability; infinite where the rank exceeds n."""
    sizes, rank = np.sort(np.abs(residuals)), conformal_rank(len(residuals), coverage)
    return float(sizes[rank - 1]) if rank <= len(sizes) else math.inf


def least_calibration(coverage: float) -> int:
    """The fewest calibration rows with a finite width."""
    return math.ceil(coverage / (1 - coverage) - 1e-9)


def divide(groups: list[str], sizes: list[int], generator: np.random.Generator) -> list[np.ndarray]:
    """Row indices of len(sizes) parts, about that many rows each; no group is in two parts.

    Groups come in random order, and each goes to the part that lacks most rows, so that a large one lands in a large part.
    """
    members: dict[str, list[int]] = {}
    for k, group in enumerate(groups):
        members.setdefault(group, []).append(k)
    names, parts = list(members), [[] for _ in sizes]
    for k in generator.permutation(len(names)):
        lack = [size - len(part) for size, part in zip(sizes, parts, strict=True)]
        parts[int(np.argmax(lack))] += members[names[k]]
    return [np.array(sorted(part), dtype=np.int64) for part in parts]


def inner_sizes(rows: int, coverage: float) -> list[int]:
    """[train, validation, calibration] of the rows beside the test. Below ten rows validation would be noise: there is none."""
    validation = round(VALIDATION * rows)
    least = min(least_calibration(coverage), rows // 3)  # beyond a third the interval is infinite, and told
    calibration = max(round(CALIBRATION * rows), min(20, rows // 4), least)
    validation = validation if validation >= 10 else 0
    return [rows - validation - calibration, validation, calibration]


def fit_trees(x: np.ndarray, y: np.ndarray, names: list[str], train: np.ndarray, validation: np.ndarray, seed: int):
    """A LightGBM booster on x (rows, features; NaN is a value like any other) with the seed's settings where they are sound.

    Bagging is on; leaves hold at least 20 rows, or a tenth of few; the best of 140 rounds on the validation rows where there
    are any, else all of them.
    """
    module = lightgbm()
    settings = {
        "objective": "regression", "learning_rate": 0.05, "num_leaves": 4, "min_data_in_leaf": min(20, max(2, len(train) // 10)),
        "bagging_fraction": 0.6, "bagging_freq": 1, "feature_fraction": 0.6, "feature_pre_filter": False, "max_bin": 255,
        "min_data_in_bin": 1, "seed": seed, "deterministic": True, "force_row_wise": True, "num_threads": 1, "verbosity": -1,
    }  # fmt: skip
    names = [re.sub(r"[^\w.+-]", "_", name) for name in names]  # it takes no others
    names = names if len(set(names)) == len(names) else "auto"
    fitted = module.Dataset(x[train], y[train], feature_name=names)
    if not len(validation):
        return module.train(settings, fitted, TREES)
    held = module.Dataset(x[validation], y[validation], reference=fitted, feature_name=names)
    return module.train(settings, fitted, TREES, [held], callbacks=[module.early_stopping(STOP_AFTER, verbose=False)])


def fit_ridge(x: np.ndarray, y: np.ndarray, train: np.ndarray):
    """x -> prediction: ridge on standardised columns; an empty cell counts as the training rows' median."""
    median = np.nan_to_num(np.nanmedian(np.where(np.isnan(x[train]).all(axis=0), 0.0, x[train]), axis=0))

    def filled(part: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(part), median, part)

    own = filled(x[train])
    middle, spread, mean = own.mean(axis=0), own.std(axis=0), y[train].mean()
    spread = np.where(spread > 0, spread, 1.0)
    z = (own - middle) / spread
    weights = np.linalg.solve(z.T @ z + RIDGE * np.eye(z.shape[1]), z.T @ (y[train] - mean))
    return lambda part: mean + (filled(part) - middle) / spread @ weights


def scores(truth: np.ndarray, predicted: np.ndarray, points: float | None) -> dict[str, float]:
    """{"rmse", "r2", "pearson", "acc1", "acc2", "acc3"}: acc_k is the share within k points; points: how many are a unit of truth.

    R2 = 1 - squared error / squared distance from the mean of these same rows, so that predicting a mean gives 0 at most.
    Pearson's r of a constant prediction is NaN; points None: acc_k is NaN.
    """
    error = predicted - truth
    around = float(((truth - truth.mean()) ** 2).sum())
    flat = min(float(np.ptp(truth)), float(np.ptp(predicted))) <= 1e-12
    found = {
        "rmse": float(np.sqrt((error**2).mean())),
        "r2": 1 - float((error**2).sum()) / around if around else math.nan,
        "pearson": math.nan if flat else float(np.corrcoef(truth, predicted)[0, 1]),
    }
    for k in (1, 2, 3):
        found[f"acc{k}"] = math.nan if points is None else float((np.abs(error) * points <= k + 1e-9).mean())
    return found


def resampled(groups: list[str], rounds: int, seed: int) -> list[np.ndarray]:
    """Row indices of `rounds` bootstrap draws of whole groups."""
    members: dict[str, list[int]] = {}
    for k, group in enumerate(groups):
        members.setdefault(group, []).append(k)
    every, generator = [np.array(rows) for rows in members.values()], np.random.default_rng(seed)
    return [np.concatenate([every[k] for k in generator.integers(0, len(every), len(every))]) for _ in range(rounds)]


def intervals(truth: np.ndarray, fits: dict[str, np.ndarray], groups: list[str], points: float | None, seed: int, rounds: int = 1000):
    """{fit: {score: (value, low, high)}} with 95 % percentile intervals over groups of data sets, the same draws for all fits.

    "rmse_less": how much smaller the first fit's RMSE is than this one's.
    """
    draws, first = resampled(groups, rounds, seed), next(iter(fits))
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    errors: dict[str, np.ndarray] = {}
    for name, predicted in fits.items():
        whole, many = scores(truth, predicted, points), [scores(truth[rows], predicted[rows], points) for rows in draws]
        found[name] = {key: (value, *_quantiles([one[key] for one in many])) for key, value in whole.items()}
        errors[name] = np.array([one["rmse"] for one in many])
        less = found[name]["rmse"][0] - found[first]["rmse"][0]
        found[name]["rmse_less"] = (less, *_quantiles(errors[name] - errors[first]))
    return found


def _quantiles(values) -> tuple[float, float]:
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    return tuple(float(v) for v in np.quantile(values, (0.025, 0.975))) if len(values) else (math.nan, math.nan)


@dataclass(frozen=True)
class Range:
    """What a feature was in the rows that a predictor saw; empty: some of them had none; gain: how much the trees use it."""

    low: float
    high: float
    empty: bool
    gain: float


def ranges(x: np.ndarray, names: list[str], gains: np.ndarray) -> dict[str, Range]:
    """x (rows, features)."""
    empty = np.isnan(x)
    low, high = np.where(empty, math.inf, x).min(axis=0), np.where(empty, -math.inf, x).max(axis=0)
    every = zip(names, low.tolist(), high.tolist(), empty.any(axis=0).tolist(), gains.tolist(), strict=True)
    return {name: Range(*rest) for name, *rest in every}


def beyond(row: np.ndarray, seen: dict[str, Range]) -> list[str]:
    """Which features of a row lie where the rows in `seen` had none, in words; only features that the trees look at."""
    found = []
    for value, (name, span) in zip(row.tolist(), seen.items(), strict=True):
        if not span.gain > 0:
            continue
        if math.isnan(value):
            found += [] if span.empty else [f"{name} is empty"]
        elif not span.low <= value <= span.high:
            side, bound = ("below", span.low) if value < span.low else ("above", span.high)
            found.append(f"{name} {value:.6g} is {side} {bound:.6g}")
    return found


def near_copies(x: np.ndarray, one: np.ndarray, other: np.ndarray, within: float = 0.01) -> list[tuple[int, int]]:
    """(row of one, row of other) whose features all agree within 1 % of their standard deviation, and are empty alike.

    [] for fewer than three features: then agreement is chance.
    """
    if x.shape[1] < 3:
        return []
    spread = np.nanstd(x, axis=0)
    z = x / np.where(spread > 0, spread, 1.0)
    filled, empty, found = np.nan_to_num(z), np.isnan(z), []
    for k in one:
        same = (np.abs(filled[other] - filled[k]) <= within).all(axis=1) & (empty[other] == empty[k]).all(axis=1)
        found += [(int(k), int(j)) for j in other[same]]
    return found
