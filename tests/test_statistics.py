"""metrics/statistics.py and metrics/continual.py against worked examples."""

import itertools
import math

import numpy
import pytest

from metrics.continual import chance_centred, continual_metrics, sample_forgetting, stm_metrics, two_stage_metrics
from metrics.statistics import (
    compare_items,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    seed_interval,
    sign_flip,
    t_quantile,
    wilson_interval,
)

GOLDEN = [[50, 10, 5], [40, 60, 8], [45, 55, 70]]


def test_continual_golden_vector():
    R = numpy.array(GOLDEN, dtype=float)
    before = R.copy()
    found = continual_metrics(R, [0, 0, 0], [52, 66, 71])
    assert found["AR"] == found["ACC"] == pytest.approx(56.6667, abs=1e-4)
    assert (found["FWT"], found["BWT"], found["forgetting"], found["learning"]) == (9.0, -5.0, 5.0, 60.0)
    assert found["BWT_T"] == pytest.approx(-10 / 3) and found["intransigence"] == pytest.approx(3.0)
    assert found["retention"] == pytest.approx((45 / 50 + 55 / 60) / 2)
    assert (R == before).all()
    assert continual_metrics(GOLDEN, [1, 2, 3])["FWT"] == 6.5
    assert continual_metrics([[50, 10], [70, 60]], [0, 0])["BWT"] == 20  # a gain is no forgetting
    assert continual_metrics([[50, 10], [70, 60]], [0, 0])["forgetting"] == -20


def test_continual_metrics_where_tasks_come_again():
    """Against a reading of the definitions task by task, on random orders; the plain case is the identity of stages and tasks."""
    rng = numpy.random.default_rng(0)
    for _ in range(50):
        tasks = int(rng.integers(2, 5))
        trained = [*rng.permutation(tasks), *rng.integers(0, tasks, int(rng.integers(0, 4)))]
        R, base = rng.random((len(trained), tasks)), rng.random(tasks)
        found = continual_metrics(R, base, trained=trained)
        firsts = [min(k for k, task in enumerate(trained) if task == j) for j in range(tasks)]
        lasts = [max(k for k, task in enumerate(trained) if task == j) for j in range(tasks)]
        lost = [R[lasts[j]][j] - R[-1][j] for j in range(tasks) if lasts[j] != len(trained) - 1]
        again = [j for j in range(tasks) if lasts[j] != firsts[j]]
        assert found["BWT"] == pytest.approx(-sum(lost) / len(lost))
        assert found["learning"] == pytest.approx(sum(R[firsts[j]][j] - base[j] for j in range(tasks)) / tasks)
        assert found["FWT"] == pytest.approx(numpy.mean([R[firsts[j] - 1][j] - base[j] for j in range(tasks) if firsts[j] > 0]))
        assert ("revisit" in found) == bool(again)
        if again:
            assert found["revisit"] == pytest.approx(numpy.mean([R[lasts[j] - 1][j] - R[firsts[j]][j] for j in again]))
            assert found["relearned"] == pytest.approx(numpy.mean([R[lasts[j]][j] - R[firsts[j]][j] for j in again]))
    assert continual_metrics(GOLDEN, trained=[0, 1, 2]) == pytest.approx(continual_metrics(GOLDEN), nan_ok=True)
    for trained in ([0, 1], [0, 1, 1], [0, 1, 3]):
        with pytest.raises(ValueError, match="trained"):
            continual_metrics(GOLDEN, trained=trained)


def test_continual_edges():
    alone = continual_metrics([[0.5]], [0.1])
    assert alone["ACC"] == 0.5 and alone["learning"] == pytest.approx(0.4) and math.isnan(alone["BWT"])
    gap = continual_metrics([[50, None], [40, 60]], [0, 0])
    assert gap["BWT"] == -10 and math.isnan(gap["FWT"]) and math.isnan(continual_metrics(GOLDEN)["FWT"])
    for bad in ([[1, 2]], [], [1, 2]):
        with pytest.raises(ValueError):
            continual_metrics(bad, [0, 0])
    with pytest.raises(ValueError, match="base"):
        continual_metrics(GOLDEN, [0, 0])


def test_stm_golden_vector():
    found = stm_metrics((0.5106, 0.2810, 0.7474, 0.5845, 0.1389), (0.3995, 0.2290, 0.7159, 0.1926, 0.0514), 0)
    assert found["TI"] == pytest.approx(-21.76, abs=0.005) and found["BWT"] == pytest.approx(-38.19, abs=0.005)
    assert math.isnan(stm_metrics((0, 1), (1, 1), 0)["TI"])


def test_chance():
    assert chance_centred(0.25, 4) == 0 and chance_centred(1, 4) == 1
    raw = sample_forgetting([1, 1, 0, 0], [1, 0, 1, 1])
    assert raw == {"F": 0.25, "B": 0.5}
    generator = numpy.random.default_rng(0)  # know-or-guess: 8 % forgotten, 5 % gained, k = 4
    u = generator.random(400_000)
    known_before, known_after = u < 0.45, (u >= 0.08) & (u < 0.50)
    before = known_before | (generator.random(u.size) < 0.25)
    after = known_after | (generator.random(u.size) < 0.25)
    found = sample_forgetting(before, after, options=4)
    assert found["F_true"] == pytest.approx(0.08, abs=0.004) and found["B_true"] == pytest.approx(0.05, abs=0.004)


def test_intervals():
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == 1 and wilson_interval(0, 0) == (0, 1)
    mean, low, high = mean_interval([1, 2, 3, 4])
    assert mean == 2.5 and high - mean == pytest.approx(1.96 * math.sqrt(5 / 3) / 2, rel=1e-3) and low < mean
    assert mean_interval([3.0]) == (3, 3, 3) and math.isnan(mean_interval([])[0])
    mean, low, high = seed_interval([1, 2, 3])
    assert mean == 2 and high - 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert math.isnan(seed_interval([1])[1]) and t_quantile(31) == pytest.approx(2.0395, abs=2e-4)
    with pytest.raises(ValueError):
        wilson_interval(3, 2)


def test_paired_tests():
    assert mcnemar(1, 9) == pytest.approx(0.021484375) and mcnemar(0, 0) == 1 and mcnemar(5, 5) == 1
    a, b = [0, 0, 1, 0] * 20, [1, 1, 1, 0] * 20
    found = paired_bootstrap(a, b, seed=3)
    assert found == paired_bootstrap(a, b, seed=3) and found["difference"] == 0.5
    assert found["low"] < 0.5 < found["high"] and found["p"] < 0.01 and paired_bootstrap(a, a)["p"] == 1
    with pytest.raises(ValueError):
        paired_bootstrap([], [])


def test_two_stages():
    found = two_stage_metrics((0.1, 0.8, 0.3), (0.2, 0.25, 0.7))
    expected = {"F_abs": 0.5, "F_rel": 0.625, "F_base": -0.2, "L_A": 0.7, "L_B": 0.5, "forward_transfer": 0.05,
                "performance_gap": 0.4, "average_performance": 0.5, "performance_balance": 0.6}  # fmt: skip
    assert found == pytest.approx(expected)
    never = two_stage_metrics((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))  # what was never there cannot be lost, and is in balance
    assert never["F_rel"] is None and never["F_abs"] == 0 and never["performance_balance"] == 1
    gap = two_stage_metrics((math.nan, 0.8, 0.3), (0.2, math.nan, 0.7))
    assert gap["F_abs"] == 0.5 and math.isnan(gap["F_base"]) and math.isnan(gap["forward_transfer"])
    with pytest.raises(ValueError):
        two_stage_metrics((1, 2), (1, 2, 3))


def test_sign_flip_is_mcnemar_for_one_seed_and_exact_for_several():
    for b, c in ((1, 9), (0, 0), (5, 5), (0, 6), (40, 61)):
        assert sign_flip([-1] * b + [0] * 7 + [1] * c) == pytest.approx(mcnemar(b, c), rel=1e-12)
    differences = [2, -1, 0, 1, 3, -2, 1]
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in itertools.product((-1, 1), repeat=7)]
    assert sign_flip(differences) == pytest.approx(sum(total >= 4 for total in sums) / 2**7)
    assert sign_flip([3] * 5) == sign_flip([1] * 5)  # three seeds that agree on five items are five pieces of evidence
    with pytest.raises(ValueError):
        sign_flip([0.5])


def test_items_of_several_seeds_are_clusters():
    a, b = [0, 0, 1, 0] * 20, [1, 1, 1, 0] * 20
    one, three = compare_items(a, b), compare_items([a] * 3, [b] * 3)
    assert (one["low"], one["high"], one["p"]) == (three["low"], three["high"], three["p"])  # the same items again tell nothing new
    assert (one["only_a"], one["only_b"], three["only_b"]) == (0, 40, 120) and one["p"] == pytest.approx(mcnemar(0, 40))
    assert math.isnan(one["seed_low"]) and (three["seed_low"], three["seed_high"]) == (0.5, 0.5)
    apart = compare_items([a, a], [b, a])
    assert apart["difference"] == 0.25 and apart["by_seed"] == [0.5, 0.0] and apart["seed_low"] < 0 < apart["seed_high"]
    losses = compare_items([0.5, 1.0, 2.0], [0.25, 0.5, 1.75])
    assert math.isnan(losses["p"]) and losses["difference"] == pytest.approx(-1 / 3) and losses["p_bootstrap"] < 0.01
    never = compare_items([[1, 0] * 10] * 2, [[1, 0] * 10] * 2)  # no item changed: that is not certainty
    assert (never["difference"], never["p"]) == (0, 1) and never["high"] == wilson_interval(0, 20)[1] == -never["low"] > 0.1
    with pytest.raises(ValueError, match="same seeds and items"):
        compare_items([a], [b, b])
