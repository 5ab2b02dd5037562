"""metrics/statistics.py and metrics/continual.py against worked examples."""

import math

import numpy
import pytest

from metrics.continual import chance_centred, continual_metrics, sample_forgetting, stm_metrics
from metrics.statistics import mcnemar, mean_interval, paired_bootstrap, seed_interval, t_quantile, wilson_interval

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
