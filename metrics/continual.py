"""What training on one task after another keeps, loses and gains.

R[i][j] is the score on task j after stage i (0-based, stage i trains task i), base[j] the untouched model's on it.
  Scores may be shares or percent; the results have the same unit.  NaN marks a cell that was not measured, and a
metric that needs it is NaN.  No function changes its input.
"""

import math
from collections.abc import Sequence

import numpy


def continual_metrics(R, base=None, single=None, trained=None) -> dict[str, float]:
    """R (T, T), base (T,), single (T,) = scores of one run per task alone -> the usual metrics; t is the last stage.

    trained (S,): the task of each of S stages, where tasks come again and R is (S, T). Learning and forward transfer then ask of a
    task's first stage, backward transfer, forgetting and retention of its last, before t. Two more, means over the tasks that come again:
    revisit, R just before that less R at the first time; relearned, R just after it less R at the first time.

    ACC, AR       mean over j of R[t][j]                                 (Lopez-Paz & Ranzato, arXiv:1706.08840)
    BWT           mean over j < t of R[t][j] - R[j][j]      (same; BWT_T divides by T, as in TRACE, arXiv:2310.06762)
    FWT           mean over j > 0 of R[j-1][j] - base[j]    (same, with the untouched base for the random one)
    forgetting    mean over j < t of max over l < t of R[l][j], less R[t][j]    (Chaudhry et al., arXiv:1801.10112)
    intransigence mean over j of single[j] - R[j][j]                     (same)
    learning      mean over j of R[j][j] - base[j]
    retention     mean over j < t of R[t][j] / R[j][j], where R[j][j] > 0
    FWT and learning are NaN without `base`, intransigence without `single`, those over j < t for a single task.
    """
    R = numpy.array(R, dtype=numpy.float64)  # a copy
    if R.ndim != 2 or R.size == 0 or trained is None and R.shape[0] != R.shape[1]:
        raise ValueError(f"R must be a square matrix (stages x tasks), not of shape {R.shape}")
    stages, tasks = R.shape
    trained = list(range(tasks)) if trained is None else list(trained)
    if len(trained) != stages or set(trained) != set(range(tasks)):
        raise ValueError(f"trained must name a task of {tasks} for each of {stages} stages, and each task at least once")
    first = {j: trained.index(j) for j in range(tasks)}
    again = {j: stages - 1 - trained[::-1].index(j) for j in range(tasks)}  # the last time
    base = _vector(base, tasks, "base")
    single = _vector(single, tasks, "single")
    last, learned = R[-1], numpy.array([R[first[j], j] for j in range(tasks)])
    earlier = [j for j in range(tasks) if again[j] < stages - 1]
    twice = [j for j in range(tasks) if again[j] > first[j]]
    before = {j: R[again[j], j] for j in earlier}
    backward = numpy.array([last[j] - before[j] for j in earlier])
    average = float(last.mean())
    found = {
        "ACC": average,
        "AR": average,
        "BWT": _mean(backward),
        "BWT_T": float(backward.sum() / tasks),
        "FWT": _mean([R[first[j] - 1, j] - base[j] for j in range(tasks) if first[j]]),
        "forgetting": _mean([R[:-1, j].max() - last[j] for j in earlier]),
        "intransigence": _mean(single - learned),
        "learning": _mean(learned - base),
        "retention": _mean([last[j] / before[j] for j in earlier if not before[j] <= 0]),
    }
    if twice:
        found["revisit"] = _mean([R[again[j] - 1, j] - learned[j] for j in twice])
        found["relearned"] = _mean([R[again[j], j] - learned[j] for j in twice])
    return found


def _vector(values, tasks: int, name: str) -> numpy.ndarray:
    array = numpy.full(tasks, numpy.nan) if values is None else numpy.array(values, dtype=numpy.float64)
    if array.shape != (tasks,):
        raise ValueError(f"{name} must hold one score for each of the {tasks} tasks, not shape {array.shape}")
    return array


def _mean(values) -> float:
    return float(numpy.mean(values)) if len(values) else math.nan


def stm_metrics(base: Sequence[float], after: Sequence[float], target: int) -> dict[str, float]:
    """TI and BWT in percent, relative to the base, as in STM (arXiv:2501.14315); `target` indexes the trained task.

    TI = (after - base) / base on the target, BWT = the mean of the same over all other tasks.  A base of 0 gives NaN.
    """
    if len(base) != len(after) or not 0 <= target < len(base):
        raise ValueError(f"base and after need the same tasks, {target} among them")
    change = [100 * (y - x) / x if x else math.nan for x, y in zip(base, after, strict=True)]
    others = [c for i, c in enumerate(change) if i != target]
    return {"TI": change[target], "BWT": _mean(others)}


def two_stage_metrics(first: Sequence[float], second: Sequence[float]) -> dict[str, float | None]:
    """Scores (base, after stage 1, after stage 2) on the first task A and on the second B -> what the two stages did.

    F_abs             A(1) - A(2): what stage 2 took from the first task; below 0 it gave
    F_rel             F_abs / A(1); None where A(1) is 0
    F_base            A(0) - A(2): the loss against the untouched base, which may be negative though much was forgotten
    L_A, L_B          A(1) - A(0) and B(2) - B(0): what each stage learned of its own task
    forward_transfer  B(1) - B(0): what stage 1 did to the task that comes next
    Under the names of seed 001, after stage 2, for comparison with its files:
    performance_gap      |A(2) - B(2)|
    average_performance  (A(2) + B(2)) / 2
    performance_balance  1 - performance_gap
    Gap and balance compare two tasks of other difficulty and chance level, and no earlier state enters them: a model that
    has lost both tasks alike is in perfect balance.  They say nothing about forgetting; F_abs does.
    """
    if len(first) != 3 or len(second) != 3:
        raise ValueError("each task needs three scores: base, after stage 1, after stage 2")
    (a0, a1, a2), (b0, b1, b2) = (map(float, scores) for scores in (first, second))
    return {
        "F_abs": a1 - a2,
        "F_rel": None if a1 == 0 else (a1 - a2) / a1,
        "F_base": a0 - a2,
        "L_A": a1 - a0,
        "L_B": b2 - b0,
        "forward_transfer": b1 - b0,
        "performance_gap": abs(a2 - b2),
        "average_performance": (a2 + b2) / 2,
        "performance_balance": 1 - abs(a2 - b2),
    }


def chance_centred(accuracy: float, options: int) -> float:
    """(accuracy - 1/k) / (1 - 1/k): 0 is guessing among k options, 1 is perfect."""
    if options < 2:
        raise ValueError("chance needs at least two options")
    return (accuracy - 1 / options) / (1 - 1 / options)


def sample_forgetting(before: Sequence[bool], after: Sequence[bool], options: int | None = None) -> dict[str, float]:
    """Per-item churn (arXiv:2510.17776): F = share right before and wrong after, B = wrong before and right after.

    With `options` k also what remains once lucky guesses are taken out, under a know-or-guess model of independent
    guesses (it over-corrects when guesses are shared): F_true = (k/(k-1))² (F - (1 - acc_after)/k), B_true likewise
    with acc_before.
    """
    first, second = numpy.array(before, dtype=bool), numpy.array(after, dtype=bool)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise ValueError("before and after must be the same items, at least one")
    lost, gained = float((first & ~second).mean()), float((~first & second).mean())
    result = {"F": lost, "B": gained}
    if options is not None:
        if options < 2:
            raise ValueError("chance needs at least two options")
        scale = (options / (options - 1)) ** 2
        result["F_true"] = scale * (lost - (1 - float(second.mean())) / options)
        result["B_true"] = scale * (gained - (1 - float(first.mean())) / options)
    return result
