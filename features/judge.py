"""How well outcomes can be predicted from features, on data sets that were not learned from; and what makes that look better than it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from features.outcomes import NAME, Joined, counted, family
from features.ranks import spearman
from features.regression import (
    TEST,
    beyond,
    conformal_rank,
    conformal_width,
    divide,
    fit_ridge,
    fit_trees,
    inner_sizes,
    near_copies,
    ranges,
)
from study.errors import LetheError
from study.plan import nearest

LEAST = 30  # data sets; with fewer neither a fit nor its judgement says anything
ALONE = {"dataset_num_items": "size alone", "initial_loss": "initial loss alone"}
LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95)  # coverages of the calibration table, beside the one asked for
SHUFFLES = 5  # of each column, for the permutation importance
STRONG = 0.9  # |Spearman| with the target above which a feature is flagged


@dataclass
class Problem:
    """x (rows, features), y (rows,), groups: the family of each row; left_out: columns that are no features, and why."""

    joined: Joined
    features: list[str]
    x: np.ndarray
    y: np.ndarray
    groups: list[str]
    left_out: list[str]


@dataclass
class Judged:
    """Of every row that was a test row once: its fold, truth, each fit's prediction, half the interval's width, what is out of range."""

    rows: list[int] = field(default_factory=list)
    fold: list[int] = field(default_factory=list)
    fits: dict[str, list[float]] = field(default_factory=dict)
    half: dict[float, list[float]] = field(default_factory=dict)  # by coverage
    due: list[float] = field(default_factory=list)  # the share that its interval holds of exchangeable rows: rank / (n + 1)
    outside: list[str] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    importance: list[np.ndarray] = field(default_factory=list)  # a fold: (features,) growth of RMSE when shuffled
    sizes: list[int] = field(default_factory=list)  # train, validation, calibration of the last fold


def pose(joined: Joined, group: str | None, drop: list[str]) -> Problem:
    """Chooses the columns; LetheError for too few rows, or a target that does not vary."""
    rows, table = len(joined.truth), joined.table
    if rows < LEAST:
        mend = f"it needs {LEAST}; python -m features.relate shows what {rows} can tell"
        raise LetheError(f"{rows} data sets with features and {joined.target} are too few to fit a predictor and to judge it: {mend}")
    if np.ptp(joined.truth) == 0:
        raise LetheError(f"{joined.target} is {joined.truth[0]:g} for all {rows} data sets: there is nothing to predict")
    for name in drop:
        if name not in table.numbers:
            raise LetheError(f"--drop {name}: no such column of numbers{nearest(name, table.numbers)}")
    if group is None:
        groups = [family(name) for name in joined.names]
    elif group in table.words:
        groups = table.words[group]
    elif group in table.numbers:
        groups = [repr(value) for value in table.numbers[group].tolist()]
    else:
        raise LetheError(f"--group {group}: no such column in {table.path}{nearest(group, [*table.words, *table.numbers])}")
    kinds: dict[str, list[str]] = {"like an outcome by name": joined.targets, "by --drop": drop}
    rest = [name for name in table.numbers if name not in joined.targets and name not in drop and name != group]
    kinds["empty"] = [name for name in rest if np.isnan(table.numbers[name]).all()]
    kinds["constant"] = [name for name in rest if name not in kinds["empty"] and constant(table.numbers[name])]
    features = [name for name in rest if name not in kinds["empty"] + kinds["constant"]]
    if not features:
        raise LetheError(f"{table.path}: no column of numbers that varies, so nothing to predict from")
    left_out = [f"columns not used, {why}: {', '.join(names)}" for why, names in kinds.items() if names]
    x = np.stack([table.numbers[name] for name in features], axis=1)
    return Problem(joined, features, x, joined.truth, groups, left_out)


def constant(values: np.ndarray) -> bool:
    """The same in every row; empty in some is a difference."""
    return not np.isnan(values).any() and np.ptp(values) == 0


def parts_of(problem: Problem, rows: np.ndarray, coverage: float, generator: np.random.Generator) -> list[np.ndarray]:
    """[train, validation, calibration] of these rows, no family in two of them; LetheError where the families do not allow it."""
    parts = divide([problem.groups[k] for k in rows], inner_sizes(len(rows), coverage), generator)
    train, validation, calibration = (rows[part] for part in parts)
    if len(train) < LEAST // 3 or not len(calibration):
        raise LetheError(few_families(problem))
    return [train, validation, calibration]


def few_families(problem: Problem) -> str:
    names = sorted(set(problem.groups), key=problem.groups.count, reverse=True)
    largest = f"the largest, {names[0]}, has {problem.groups.count(names[0])} of {len(problem.y)} rows"
    mend = f"--group names another column; --group {NAME} takes each data set by itself, if they are unrelated"
    return f"too few families to split into train, calibration and test: {len(names)}; {largest}; {mend}"


def judge(problem: Problem, folds: int, coverage: float, seed: int) -> Judged:
    """Fits and predicts `folds` times; with one, TEST of the rows are test, with more every row is once."""
    rows, judged = len(problem.y), Judged()
    generator = np.random.default_rng(seed)
    sizes = [round(TEST * rows), rows - round(TEST * rows)] if folds == 1 else [rows // folds] * folds
    if folds > len(set(problem.groups)):
        raise LetheError(f"{folds} folds need as many families: {few_families(problem)}")
    parts = divide(problem.groups, sizes, generator)
    if not all(len(part) for part in parts):
        raise LetheError(few_families(problem))
    x, y = problem.x, problem.y
    for fold, test in enumerate(parts[:1] if folds == 1 else parts):
        rest = np.setdiff1d(np.arange(rows), test)
        train, validation, calibration = parts_of(problem, rest, coverage, generator)
        judged.sizes = [len(train), len(validation), len(calibration)]
        trees = fit_trees(x, y, problem.features, train, validation, seed)
        fits = {"trees": trees.predict(x[test])}
        for name, label in ALONE.items():
            if name in problem.features:
                k = problem.features.index(name)
                fits[label] = fit_trees(x[:, [k]], y, [name], train, validation, seed).predict(x[test][:, [k]])
        fits["ridge"] = fit_ridge(x, y, train)(x[test])
        fits["mean"] = np.full(len(test), y[train].mean())
        residuals = y[calibration] - trees.predict(x[calibration])
        for level in sorted({coverage, *LEVELS}):
            judged.half.setdefault(level, []).extend([conformal_width(residuals, level)] * len(test))
        judged.due += [min(1.0, conformal_rank(len(residuals), coverage) / (len(residuals) + 1))] * len(test)
        seen = ranges(x[rest], problem.features, trees.feature_importance("gain"))
        judged.rows += test.tolist()
        judged.fold += [fold] * len(test)
        judged.outside += ["; ".join(beyond(row, seen)) for row in x[test]]
        judged.copies += near_copies(x, test, rest)
        judged.importance.append(shuffled_importance(trees, x[test], y[test], generator))
        for name, values in fits.items():
            judged.fits.setdefault(name, []).extend(values.tolist())
    return judged


def shuffled_importance(trees, x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(features,): how much the RMSE on these rows grows when one column is shuffled among them, mean over SHUFFLES."""
    whole, grown = math.sqrt(((trees.predict(x) - y) ** 2).mean()), np.zeros(x.shape[1])
    for k in np.flatnonzero(trees.feature_importance("gain") > 0):
        for _ in range(SHUFFLES):
            other = x.copy()
            other[:, k] = generator.permutation(other[:, k])
            grown[k] += (math.sqrt(((trees.predict(other) - y) ** 2).mean()) - whole) / SHUFFLES
    return grown


def flags(problem: Problem, judged: Judged) -> list[str]:
    """Signs that the score is better than it would be on new data sets, in words."""
    found = []
    for k, name in enumerate(problem.features):
        kept = ~np.isnan(problem.x[:, k])
        rho = spearman(problem.x[kept, k], problem.y[kept]) if kept.sum() > 2 else 0.0
        if abs(rho) > STRONG:
            found.append(f"{name} orders the data sets almost as {problem.joined.target} does (Spearman {rho:+.3f}): "
                         f"is it known before training? Without it: --drop {name}")  # fmt: skip
    names, contents = problem.joined.names, problem.joined.table.words.get("content_hash", [])
    copies = sorted({tuple(sorted(pair)) for pair in judged.copies})  # folds find a pair from both sides
    same = [pair for pair in copies if contents and contents[pair[0]] and contents[pair[0]] == contents[pair[1]]]
    for pairs, words in ((same, "the same content"), ([pair for pair in copies if pair not in same], "nearly the same features")):
        if pairs:
            a, b = (f"{names[k]} ({problem.groups[k]})" for k in pairs[0])
            many = counted(len(pairs), "pair")
            found.append(f"{words} on both sides of a split: {many}, such as {a} and {b}; name a --group that holds them together")
    return found
