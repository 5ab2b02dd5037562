"""Calibration scores: small cases by hand, planted miscalibration, intervals that hold what they claim, and what is refused."""

import math

import numpy
import pytest

from metrics.calibration import METRICS, calibration, calibration_change, uncertainty


def planted(n: int, d: float, seed: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Two options; confidence c uniform in (0.6, 1), right with probability c - d."""
    generator = numpy.random.default_rng(seed)
    c = generator.uniform(0.6, 1, n)
    return numpy.stack([c, 1 - c], 1), (generator.random(n) >= c - d).astype(int)


def test_by_hand():
    p = [[0.9, 0.1, 0.0], [0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.2, 0.2, 0.6]]
    gold = [0, 1, 1, 0]
    found = calibration(p, gold, bins=5)
    # (0.8, 1]: 0.9 right; (0.6, 0.8]: 0.8 wrong; (0.4, 0.6]: 0.6 right, 0.6 wrong. An edge belongs to the bin below it.
    assert found["accuracy"] == 0.5 and found["confidence"] == pytest.approx(0.725)
    assert found["ece"] == pytest.approx((0.1 + 0.8 + 2 * abs(0.5 - 0.6)) / 4)
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.1) + math.log(0.6) + math.log(0.2)) / 4)
    brier = (0.01 + 0.01) + (0.64 + 0.81 + 0.01) + (0.09 + 0.16 + 0.01) + (0.64 + 0.04 + 0.36)
    assert found["brier"] == pytest.approx(brier / 4)
    assert [one["n"] for one in found["bins"]] == [0, 0, 2, 1, 1]
    assert found["bins"][2] == {"low": 0.4, "high": 0.6, "n": 2, "confidence": pytest.approx(0.6), "accuracy": 0.5}
    assert found["bins"][0]["accuracy"] is None
    # Two bins of two items each: 0.6 and 0.6, then 0.8 and 0.9.
    assert calibration(p, gold, bins=2)["ece_adaptive"] == pytest.approx((abs(1 - 1.2) + abs(1 - 1.7)) / 4)


@pytest.mark.parametrize("d", [0.0, 0.1, 0.3])
def test_a_planted_error_is_found(d):
    found = calibration(*planted(100_000, d, seed=1), rounds=20)
    assert found["ece"] == pytest.approx(d, abs=0.008) and found["ece_adaptive"] == pytest.approx(d, abs=0.008)
    assert found["accuracy"] == pytest.approx(0.8 - d, abs=0.005) and found["confidence"] == pytest.approx(0.8, abs=0.005)
    for one in found["bins"]:
        if one["n"] > 1000:
            assert one["accuracy"] == pytest.approx(one["confidence"] - d, abs=0.03)


def test_what_a_calibrated_model_shows_in_few_items():
    measured = [calibration(*planted(200, 0.0, seed), rounds=2) for seed in range(60)]
    seen, told = (numpy.mean([one[key] for one in measured]) for key in ("ece", "ece_if_calibrated"))
    assert seen > 0.03 and told == pytest.approx(seen, abs=0.006)


def test_intervals_hold_the_truth():
    truth = {"accuracy": 0.7, "ece": 0.1, "confidence": 0.8}
    held = {metric: 0 for metric in truth}
    for seed in range(100):
        found = calibration(*planted(400, 0.1, seed), rounds=200)
        for metric, value in truth.items():
            low, high = found["intervals"][metric]
            held[metric] += low <= value <= high
    assert min(held["accuracy"], held["confidence"]) >= 88 and held["ece"] >= 80, held


def test_many_resamples_at_a_time_or_few(monkeypatch):
    import metrics.calibration as module

    data = planted(50, 0.1, 0)
    whole = calibration(*data, rounds=100)
    monkeypatch.setattr(module, "BLOCK", 50)  # one resample at a time
    again = calibration(*data, rounds=100)
    assert all(again["intervals"][metric] == pytest.approx(whole["intervals"][metric], abs=1e-12) for metric in METRICS)


def test_several_models_are_averaged_and_compared_on_the_same_items():
    one, gold = planted(300, 0.2, 0)
    other = 0.5 * one + 0.25
    both = calibration(numpy.stack([one, other]), gold)
    each = [calibration(p, gold) for p in (one, other)]
    for metric in METRICS:
        assert both[metric] == pytest.approx(numpy.mean([found[metric] for found in each]))
        assert both["each"][metric] == pytest.approx([found[metric] for found in each])
    assert sum(b["n"] for b in both["bins"]) == 600
    change = calibration_change(one, other, gold)
    for metric, (value, low, high) in change.items():
        assert value == pytest.approx(each[1][metric] - each[0][metric]) and low <= value <= high or metric.startswith("ece")
    assert change["confidence"][0] < 0 and change["confidence"][2] < 0
    assert change["accuracy"] == (0.0, 0.0, 0.0)  # the likeliest option is the same
    assert calibration_change(one, one, gold)["ece"] == (0.0, 0.0, 0.0)


def test_options_that_an_item_has_not_do_not_count():
    p, gold = planted(100, 0.1, 3)
    wide = numpy.concatenate([p, numpy.zeros((100, 3))], 1)
    assert {m: calibration(wide, gold)[m] for m in METRICS} == pytest.approx({m: calibration(p, gold)[m] for m in METRICS})


def test_a_sure_and_wrong_model_has_a_finite_loss():
    found = calibration([[1.0, 0.0]], [1])
    assert 700 < found["nll"] < 710 and found["brier"] == 2 and found["ece"] == 1
    assert calibration([[1.0, 0.0]] * 5, [0] * 5)["intervals"]["accuracy"][0] < 1  # five of five are no certainty


def test_uncertainty_by_hand():
    found = uncertainty([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert found == pytest.approx({"entropy": math.log(2), "mutual_information": math.log(2), "disagreement": 1.0})
    same = uncertainty([[[0.7, 0.3]]] * 3)
    assert same["mutual_information"] == pytest.approx(0, abs=1e-12) and same["disagreement"] == 0 and same["entropy"] > 0.6
    three = uncertainty([[[0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.6, 0.4]], [[0.6, 0.4], [0.3, 0.7]]])
    assert three["disagreement"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("p", "gold", "words"),
    [
        ([[0.5, 0.6]], [0], "sum to 1"),
        ([[1.5, -0.5]], [0], "sum to 1"),
        ([[0.5, float("nan")]], [0], "sum to 1"),
        ([[0.5, 0.5]], [2], "from 0 to 1"),
        ([[0.5, 0.5]], [0.0], "whole numbers"),
        ([[0.5, 0.5]], [0, 1], "one gold an item"),
        ([0.5, 0.5], [0, 1], "one gold an item"),
        (numpy.zeros((0, 2)), [], "one gold an item"),
    ],
)
def test_refused(p, gold, words):
    with pytest.raises(ValueError, match=words):
        calibration(p, gold)
