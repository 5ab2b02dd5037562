"""The numbers of the optimizer comparison, from a study folder on disk.

A point is one optimizer at one learning rate on one pair of tasks, first A and then B, over all its seeds; a run's arm is
"{optimizer}_lr{rate}".  Scores are shares of the test items.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metrics.continual import two_stage_metrics
from metrics.statistics import compare_items
from metrics.summary import letter_scores, summarise
from study.errors import LetheError
from study.folder import read_json, read_jsonl, seed_folders

STATES = ("base", "after_stage1", "after_stage2")
METRICS = ("exact_match", "flexible_match", "answer_nll")  # those of every state
ROUNDS = 2000  # of the bootstrap of the frontier


@dataclass(frozen=True)
class Scored:
    """One finished run of one seed, or the base: what its folder holds."""

    seed: int
    folder: str
    record: dict  # run.json; {} for the base
    items: dict[str, list[dict]]  # task -> eval/{task}.jsonl
    log: list[dict]  # metrics.jsonl
    drift: dict  # drift.json
    dev: dict[str, float]  # dev.json: mean nll on rows that are in neither train nor test

    @property
    def run(self) -> dict:
        return self.record.get("run", {"stage": 0, "arm": "base", "first": None, "second": None})

    @property
    def optimizer(self) -> str | None:
        return self.run["arm"].rpartition("_lr")[0] or None

    @property
    def learning_rate(self) -> float | None:
        return float(self.run["arm"].rpartition("_lr")[2]) if self.optimizer else None


def read_study(root: str | Path) -> list[Scored]:
    """The base and every finished run of the comparison, over the seeds' trees.

    Raises LetheError where two files hold other test items of one task: nothing could be paired then.
    """
    found, seen = [], {}
    for tree in seed_folders(root):
        study = read_json(tree / "study.json")
        seed, order = study["identity"]["settings"]["seed"], list(study["tasks"])
        records = {file.parent: read_json(file) for file in sorted(tree.glob("optimizer/*/*/run.json"))}
        done = sorted((r["run"]["stage"], folder) for folder, r in records.items() if r.get("status") == "done")
        for folder in [tree / "base", *(folder for _, folder in done)]:
            files = [folder / "eval" / f"{task}.jsonl" for task in order]
            items = {file.stem: read_jsonl(file) for file in files if file.is_file()}
            for task, mine in items.items():
                prompts = [item["prompt"] for item in mine]
                place, others = seen.setdefault(task, (folder, prompts))
                if prompts != others:
                    raise LetheError(f"{folder}/eval/{task}.jsonl holds other test items than {place}'s; delete it and score again")
            more = read_json(folder / "drift.json", {}), read_json(folder / "dev.json", {})
            where, record, log = folder.relative_to(tree).as_posix(), records.get(folder, {}), read_jsonl(folder / "metrics.jsonl")
            found.append(Scored(seed, where, record, items, log, *more))
    return found


def result_rows(scored: Iterable[Scored]) -> list[dict]:
    """Rows as in eval_results_mask.json, with optimizer and learning_rate; letters also have precision, recall and f1."""
    rows = []
    for one in scored:
        who = {"run": one.folder, **{name: one.run[name] for name in ("arm", "stage", "first", "second")},
               "optimizer": one.optimizer, "learning_rate": one.learning_rate}  # fmt: skip
        for task, items in one.items.items():
            found = summarise(items)
            plain = {**found[0], "low": None, "high": None}
            found += [{**plain, "metric": name, "value": value} for name, value in letter_scores(items).items()]
            rows += [{**who, "task": task, **row, "seed": one.seed} for row in found]
    return rows


def pairs_of(scored: list[Scored]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((one.run["first"], one.run["second"]) for one in scored if one.run["stage"] == 2))


def in_order(arms: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """(optimizer, rate) pairs, each once: AdamW first, then by name; rates ascending."""
    return sorted(set(arms), key=lambda arm: (arm[0] != "adamw", *arm))


@dataclass(frozen=True)
class Point:
    """One optimizer and rate on a pair of tasks, where all three states are scored on both."""

    optimizer: str
    learning_rate: float
    first: str
    second: str
    states: dict[int, tuple[Scored, Scored, Scored]]  # seed -> base, after stage 1, after stage 2

    def scores(self, task: str, state: int, metric: str = "exact_match", seeds: Iterable[int] | None = None) -> np.ndarray:
        """(seeds, items) float64"""
        chosen = self.states if seeds is None else seeds
        return np.array([[item[metric] for item in self.states[seed][state].items[task]] for seed in chosen], dtype=np.float64)

    def lost(self, seeds: Iterable[int] | None = None) -> np.ndarray:
        """(seeds, items of A): right after stage 1 less right after stage 2."""
        return self.scores(self.first, 1, seeds=seeds) - self.scores(self.first, 2, seeds=seeds)

    def learned(self, seeds: Iterable[int] | None = None) -> np.ndarray:
        """(seeds, items of B): right after stage 2 less right in the base."""
        return self.scores(self.second, 2, seeds=seeds) - self.scores(self.second, 0, seeds=seeds)

    @property
    def dev_nll(self) -> float:
        """How well each stage learned its own task: nats a token, A after stage 1 + B after stage 2. NaN where unknown."""
        nan = math.nan
        return float(np.mean([one.dev.get(self.first, nan) + two.dev.get(self.second, nan) for _, one, two in self.states.values()]))


def points_of(scored: list[Scored], first: str, second: str) -> list[Point]:
    """The points of a pair that are whole, in order; a seed that lacks a state of a point is left out of it."""
    by_folder = {(one.seed, one.folder): one for one in scored}
    last = [one for one in scored if one.run["stage"] == 2 and (one.run["first"], one.run["second"]) == (first, second)]
    states: dict[tuple[str, float], dict] = {}
    for two in last:
        chain = by_folder[two.seed, "base"], by_folder.get((two.seed, two.run["parent"])), two
        if all(one is not None and first in one.items and second in one.items for one in chain):
            states.setdefault((two.optimizer, two.learning_rate), {})[two.seed] = chain
    return [Point(*arm, first, second, states[arm]) for arm in in_order(states)]


def chosen_of(points: list[Point]) -> dict[str, Point]:
    """optimizer -> the point whose rate learned best by dev nll; an optimizer without dev.json has one only if it has one rate."""
    found = {}
    for name in dict.fromkeys(point.optimizer for point in points):
        mine = [point for point in points if point.optimizer == name]
        known = [point for point in mine if math.isfinite(point.dev_nll)]
        if known or len(mine) == 1:
            found[name] = min(known or mine, key=lambda point: point.dev_nll)
    return found


def describe(point: Point, chosen: bool) -> dict:
    """A point as plain numbers: the states, the measures with the intervals of F_abs and L_B, and how far the weights went."""
    states = {}
    for k, state in enumerate(STATES):
        states[state] = {}
        for task in (point.first, point.second):
            cell = {metric: float(point.scores(task, k, metric).mean()) for metric in METRICS}
            letters = [letter_scores(chain[k].items[task]) for chain in point.states.values()]
            cell |= {name: float(np.mean([found[name] for found in letters])) for name in letters[0]}
            items = [chain[k].items[task] for chain in point.states.values()]
            unparsed = float(np.mean([[item["extracted"] is None for item in mine] for mine in items]))
            states[state][task] = {**cell, "unparsed": unparsed, "n": len(items[0])}
    first, second = ([states[state][task]["exact_match"] for state in STATES] for task in (point.first, point.second))
    zero_a, zero_b = np.zeros_like(point.lost()), np.zeros_like(point.learned())
    drifts = [[chain[k].drift for chain in point.states.values()] for k in (1, 2)]
    return {
        "optimizer": point.optimizer,
        "learning_rate": point.learning_rate,
        "seeds": list(point.states),
        "chosen": chosen,
        "dev_nll": point.dev_nll,
        "states": states,
        **two_stage_metrics(first, second),
        "nll_rise": states["after_stage2"][point.first]["answer_nll"] - states["after_stage1"][point.first]["answer_nll"],
        "intervals": {"F_abs": compare_items(zero_a, point.lost()), "L_B": compare_items(zero_b, point.learned())},
        "drift": {state: _mean_drift(found) for state, found in zip(STATES[1:], drifts, strict=True)},
    }


def _mean_drift(found: list[dict]) -> dict:
    """Means over seeds of drift.json; {} where a seed has none."""
    if not all(found):
        return {}
    sizes = {name: float(np.mean([one[name] for one in found])) for name in ("frobenius", "spectral", "relative_frobenius")
             if all(one.get(name) is not None for one in found)}  # fmt: skip
    tasks = [task for task in found[0].get("kl", {}) if all(task in one.get("kl", {}) for one in found)]
    return sizes | {"kl": {task: float(np.mean([one["kl"][task]["mean"] for one in found])) for task in tasks}}


def contrast(one: Point, other: Point) -> dict:
    """one - other on the same items and seeds, for each quantity: see metrics.statistics.compare_items."""
    seeds = [seed for seed in one.states if seed in other.states]
    if not seeds:
        return {}

    def pair(task: str, state: int, metric: str = "exact_match") -> dict:
        return compare_items(other.scores(task, state, metric, seeds), one.scores(task, state, metric, seeds))

    return {
        "A after stage 1": pair(one.first, 1),
        "A kept after stage 2": pair(one.first, 2),
        "B learned after stage 2": pair(one.second, 2),
        "F_abs": compare_items(other.lost(seeds), one.lost(seeds)),
        "A kept, flexible": pair(one.first, 2, "flexible_match"),
        "A kept, answer nll": pair(one.first, 2, "answer_nll"),
    }


def matched(points: list[Point], one: str, other: str) -> dict | None:
    """Forgetting of two optimizers where they learned B equally well, with a bootstrap interval over items; None: nowhere,
    or nothing was learned.

    The level is the most learning that both reach.  An optimizer's forgetting at a level is the least F_abs on the line
    through its rates in order, straight between neighbours.  Each round draws the items of both test sets anew and takes
    the same ways; `resolved` is the share of rounds in which both lines met the level.
    """
    mine = {name: [point for point in points if point.optimizer == name] for name in (one, other)}
    seeds = [seed for seed in points[0].states if all(seed in point.states for group in mine.values() for point in group)] if points else []
    if not seeds or not all(mine.values()):
        return None
    generator = np.random.default_rng(0)

    def means(values: list[np.ndarray], draws: np.ndarray) -> np.ndarray:
        """(points, items), (rounds, items) -> (rounds, points)"""
        return draws @ np.array(values).T

    def draws_of(items: int) -> np.ndarray:
        even = np.full((1, items), 1 / items)
        return np.concatenate([even, generator.multinomial(items, even[0], ROUNDS) / items])  # the data as they are come first

    on_a, on_b = (draws_of(points[0].scores(task, 0).shape[1]) for task in (points[0].first, points[0].second))
    lost = {name: means([point.lost(seeds).mean(axis=0) for point in group], on_a) for name, group in mine.items()}
    learned = {name: means([point.learned(seeds).mean(axis=0) for point in group], on_b) for name, group in mine.items()}
    level = np.minimum(learned[one].max(axis=1), learned[other].max(axis=1))  # (1 + rounds,)
    at = {name: least_forgetting(level, learned[name], lost[name]) for name in mine}
    difference = at[one] - at[other]
    if math.isnan(difference[0]) or level[0] <= 0:  # without learning there is no price of it
        return None
    resolved = difference[1:][~np.isnan(difference[1:])]
    low, high = np.quantile(resolved, (0.025, 0.975)) if len(resolved) else (math.nan, math.nan)
    return {"learning": float(level[0]), one: float(at[one][0]), other: float(at[other][0]), "difference": float(difference[0]),
            "low": float(low), "high": float(high), "resolved": len(resolved) / ROUNDS}  # fmt: skip


def least_forgetting(level: np.ndarray, learned: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """level (R,), learned and lost (R, K) -> (R,): the least loss on each row's line of K points where learning is the level."""
    candidates = [np.where(learned == level[:, None], lost, np.inf)]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (level[:, None] - learned[:, :-1]) / np.diff(learned, axis=1)  # (R, K - 1)
        between = lost[:, :-1] + share * np.diff(lost, axis=1)
    candidates.append(np.where((share >= 0) & (share <= 1), between, np.inf))
    least = np.concatenate(candidates, axis=1).min(axis=1)
    return np.where(np.isinf(least), np.nan, least)
