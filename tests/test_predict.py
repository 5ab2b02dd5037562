"""features/predict.py: families stay together, intervals hold what they say, leaks are flagged, and nothing is extrapolated unasked."""

import csv
import json
import math
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from features.judge import flags, judge, pose
from features.outcomes import load, read_table
from features.predict import Predictor, fit, main, table_of, verdict
from features.regression import (
    RIDGE,
    beyond,
    conformal_rank,
    conformal_width,
    divide,
    fit_ridge,
    fit_trees,
    inner_sizes,
    intervals,
    least_calibration,
    near_copies,
    ranges,
    scores,
)
from study.errors import LetheError, run_command

FEATURES = ["dataset_num_items", "initial_loss", "forgetting", "noise"]


def rows_of(n=60, seed=0, families=12):
    """Rows of a table in which accuracy falls with forgetting and size, with an error of one point."""
    generator, rows = np.random.default_rng(seed), []
    for k in range(n):
        size, loss = float(round(math.exp(generator.normal(7, 1)))), float(generator.normal(2, 0.5))
        forgetting = float(generator.gamma(2, 0.05))
        accuracy = 0.6 - 0.3 * forgetting - 0.03 * math.log(size / 1000) + float(generator.normal(0, 0.01))
        rows.append({
            "dataset_name": f"family{'abcdefghijklmnopqrst'[k % families]}_{k}", "overall_accuracy": accuracy, "dataset_num_items": size,
            "initial_loss": loss, "forgetting": forgetting, "noise": math.nan if k % 7 == 0 else float(generator.random()),
        })  # fmt: skip
    return rows


def write(path, rows):
    path.write_text(table_of([list(row.values()) for row in rows], list(rows[0])))
    return str(path)


def problem_of(tmp_path, rows, group=None, drop=()):
    return pose(load(write(tmp_path / "table.csv", rows), None, "overall_accuracy"), group, list(drop))


def test_conformal_rank_is_the_finite_sample_one():
    assert conformal_rank(42, 0.86) == 37 and conformal_rank(49, 0.86) == 43  # 50 x 0.86 = 43 exactly
    residuals = np.random.default_rng(0).permutation(np.arange(1, 43.0)) * np.tile([1, -1], 21)
    assert conformal_width(residuals, 0.86) == 37
    assert conformal_width(np.arange(7.0), 0.86) == 6 and conformal_width(np.arange(6.0), 0.86) == math.inf
    for coverage in (0.5, 0.8, 0.86, 0.9, 0.95):
        n = least_calibration(coverage)
        assert conformal_rank(n, coverage) <= n and conformal_rank(n - 1, coverage) > n - 1


def test_intervals_hold_as_often_as_asked_over_many_splits():
    """The mean coverage lies in [c, c + 1 / (n + 1)] where rows are exchangeable (arXiv:1905.02928, theorem 1 and its converse)."""
    generator, shares = np.random.default_rng(2), []
    for _ in range(600):
        x = generator.normal(size=(90, 1))
        y = x[:, 0] + generator.standard_t(3, size=90)
        train, calibration, test = divide([str(k) for k in range(90)], [30, 20, 40], generator)
        predict = fit_ridge(x, y, train)
        width = conformal_width(y[calibration] - predict(x[calibration]), 0.8)
        shares.append((np.abs(y[test] - predict(x[test])) <= width).mean())
    error = np.std(shares) / math.sqrt(len(shares))
    assert 0.8 - 3 * error <= np.mean(shares) <= 0.8 + 1 / 21 + 3 * error and error < 0.005


def test_no_group_is_in_two_parts():
    generator = np.random.default_rng(0)
    for trial in range(50):
        groups = [f"g{k}" for k in generator.integers(0, 3 + trial, 100)]
        parts = divide(groups, [60, 20, 20], generator)
        assert sorted(np.concatenate(parts).tolist()) == list(range(100))
        held = [{groups[k] for k in part} for part in parts]
        assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])
    alone = [str(k) for k in range(100)]
    assert [len(part) for part in divide(alone, [60, 25, 15], generator)] == [60, 25, 15]
    assert divide(alone, [60, 40], np.random.default_rng(1))[0].tolist() != divide(alone, [60, 40], np.random.default_rng(2))[0].tolist()


def test_sizes_of_the_inner_parts():
    assert inner_sizes(324, 0.86) == [240, 45, 39]  # 14 % and 12 %
    assert inner_sizes(48, 0.86) == [36, 0, 12]  # validation on seven rows would be noise
    assert inner_sizes(24, 0.86) == [17, 0, 7]  # the least that 86 % needs
    assert inner_sizes(24, 0.99) == [16, 0, 8]  # and never more than a third: the interval is infinite then


def test_ridge_is_the_least_squares_of_its_definition():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 3)) * [1, 100, 0.01], generator.normal(size=40)
    x[::5, 1] = math.nan
    train = np.arange(30)
    median = np.nanmedian(x[train], axis=0)
    filled = np.where(np.isnan(x), median, x)
    z = (filled - filled[train].mean(axis=0)) / filled[train].std(axis=0)
    rows = np.vstack([z[train], math.sqrt(RIDGE) * np.eye(3)])
    weights = np.linalg.lstsq(rows, np.concatenate([y[train] - y[train].mean(), np.zeros(3)]), rcond=None)[0]
    assert fit_ridge(x, y, train)(x) == pytest.approx(y[train].mean() + z @ weights, abs=1e-12)


def test_scores_by_hand():
    found = scores(np.array([0.5, 0.6, 0.7, 0.8]), np.array([0.51, 0.58, 0.75, 0.8]), 100)
    assert found["rmse"] == pytest.approx(math.sqrt((0.01**2 + 0.02**2 + 0.05**2) / 4))
    assert found["r2"] == pytest.approx(1 - 0.003 / 0.05) and found["pearson"] == pytest.approx(
        np.corrcoef([5, 6, 7, 8], [51, 58, 75, 80])[0, 1]
    )
    assert [found[f"acc{k}"] for k in (1, 2, 3)] == [0.5, 0.75, 0.75]  # at most k points, with equality
    assert math.isnan(scores(np.array([1.0, 2]), np.array([1.5, 1.5]), None)["pearson"])


def test_trees_take_empty_cells_stop_early_and_repeat(tmp_path):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(300, 2)), generator.normal(size=300)
    x[:150, 0], y[:150] = math.nan, y[:150] + 10
    part = np.split(generator.permutation(300), [200, 250])
    trees = fit_trees(x, y, ["a b", 'c"{'], part[0], part[1], 1)
    assert trees.predict(np.array([[math.nan, 0], [0, 0]])) == pytest.approx([10, 0], abs=0.5)
    noise = generator.normal(size=300)
    assert fit_trees(x, noise, ["a", "b"], part[0], part[1], 1).best_iteration < 90  # of 140, as 50 rounds brought nothing
    again = fit_trees(x, y, ["a b", 'c"{'], part[0], part[1], 1)
    assert (again.predict(x) == trees.predict(x)).all()
    few = fit_trees(x, y, ["a", "b"], part[0][:20], part[1][:0], 1)
    assert few.num_trees() == 140 and few.predict(x[:1]) > 5  # leaves of two rows, so that twenty rows are split at all


def test_prediction_beats_the_baselines_and_families_are_kept_apart(tmp_path):
    problem = problem_of(tmp_path, rows_of(150, families=20))
    judged = judge(problem, 5, 0.86, 36)
    assert sorted(judged.rows) == list(range(150)) and len(set(judged.fold)) == 5
    folds = {}
    for k, fold in zip(judged.rows, judged.fold, strict=True):
        assert folds.setdefault(problem.groups[k], fold) == fold
    truth, groups = problem.y[judged.rows], [problem.groups[k] for k in judged.rows]
    found = intervals(truth, {name: np.array(v) for name, v in judged.fits.items()}, groups, 100, 0, 300)
    assert list(found) == ["trees", "size alone", "initial loss alone", "ridge", "mean"]
    assert found["trees"]["rmse"][0] < 0.7 * found["mean"]["rmse"][0] and found["trees"]["r2"][1] > 0.4
    assert found["mean"]["rmse_less"][1] > 0 and "the trees" in verdict(found, 100, " points")
    assert found["size alone"]["r2"][0] > 0.2 > found["initial loss alone"]["r2"][0]
    assert found["trees"]["rmse"][1] < found["trees"]["rmse"][0] < found["trees"]["rmse"][2]
    inside = np.abs(truth - np.array(judged.fits["trees"])) <= np.array(judged.half[0.86])
    assert 0.76 <= inside.mean() <= 0.96
    importance = np.mean(judged.importance, axis=0)
    assert importance[problem.features.index("forgetting")] > 5 * abs(importance[problem.features.index("noise")])
    assert flags(problem, judged) == []


def test_without_a_law_the_verdict_says_so(tmp_path):
    rows, generator = rows_of(80), np.random.default_rng(3)
    for row in rows:
        row["overall_accuracy"] = float(generator.random())
    problem = problem_of(tmp_path, rows)
    judged = judge(problem, 5, 0.86, 36)
    fits = {name: np.array(v) for name, v in judged.fits.items()}
    words = verdict(intervals(problem.y[judged.rows], fits, [problem.groups[k] for k in judged.rows], 100, 0, 300), 100, " points")
    assert "cannot be told from the best baseline" in words or "is nearer than the trees" in words


def test_leaks_are_flagged(tmp_path):
    rows = rows_of(60)
    for row in rows:
        row |= {"leak": -(row["overall_accuracy"] ** 3), "dev_accuracy": row["overall_accuracy"], "steps": 7.0, "void": math.nan}
    rows += [row | {"dataset_name": f"other{k}x", "overall_accuracy": row["overall_accuracy"] + 0.01} for k, row in enumerate(rows[:3])]
    problem = problem_of(tmp_path, rows)
    assert problem.features == [*FEATURES, "leak"]
    assert problem.left_out == [
        "columns not used, like an outcome by name: overall_accuracy, dev_accuracy", "columns not used, empty: void",
        "columns not used, constant: steps",
    ]  # fmt: skip
    told = flags(problem, judge(problem, 5, 0.86, 36))
    assert "leak orders the data sets almost as overall_accuracy does (Spearman -" in told[0] and "--drop leak" in told[0]
    assert any("nearly the same features on both sides of a split: " in words and "other" in words for words in told[1:])
    both = ("familya_0", "other0x")
    contents = [row | {"content_hash": "same" if row["dataset_name"] in both else ""} for row in rows]
    problem = problem_of(tmp_path, contents, drop=["leak"])
    assert problem.features == FEATURES
    judged = judge(problem, 5, 0.86, 36)
    pairs = {frozenset(problem.joined.names[k] for k in pair) for pair in judged.copies}
    assert pairs <= {frozenset((rows[k]["dataset_name"], f"other{k}x")) for k in range(3)}
    assert frozenset(both) in pairs  # seed 36 puts them into different folds
    assert "the same content on both sides of a split: 1 pair, such as familya_0 (familya)" in flags(problem, judged)[0]


def test_near_copies():
    x = np.array([[0.0, 1, 2], [0, 1, 2.001], [0, 1, math.nan], [5, 9, 4], [1, 2, 3]])
    one, other = np.array([0]), np.array([1, 2, 3, 4])
    assert near_copies(x, one, other) == [(0, 1)] and near_copies(x[:, :2], one, other) == []


def test_ranges_name_what_was_never_seen():
    x = np.array([[1.0, 5, math.nan, 0], [2, 5, 1, 0], [3, 6, 2, 0]])
    seen = ranges(x, ["a", "b", "c", "unused"], np.array([3.0, 2, 1, 0]))
    assert beyond(np.array([1.0, 6, math.nan, 99]), seen) == []  # on the bound, empty as some were, and a column that no tree looks at
    assert beyond(np.array([3.5, math.nan, -1, 0]), seen) == ["a 3.5 is above 3", "b is empty", "c -1 is below 1"]


def test_a_predictor_is_saved_as_text_and_predicts_the_same_later(tmp_path):
    rows = [row | {"settings_hash": "s1"} for row in rows_of(80)]
    predictor = fit(problem_of(tmp_path, rows), 0.86, 36)
    predictor.save(tmp_path / "p")
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["model.json", "model.txt"]
    assert (tmp_path / "p/model.txt").read_text().startswith("tree\n")
    table = read_table(write(tmp_path / "new.csv", [row | {"dataset_name": f"new{k}"} for k, row in enumerate(rows[:10])]))
    first, again = predictor.predict(table), Predictor.load(tmp_path / "p").predict(table)
    assert again == first and not any(row["outside"] for row in first)
    for row, known in zip(first, rows, strict=False):
        assert abs(row["predicted"] - known["overall_accuracy"]) < 0.08 and row["high"] - row["low"] == pytest.approx(2 * predictor.half)
    text = (tmp_path / "p/model.txt").read_text()
    (tmp_path / "p/model.txt").write_text(text.replace("leaf_value=", "leaf_value=1", 1))
    with pytest.raises(LetheError, match="not the one that model.json was written with"):
        Predictor.load(tmp_path / "p")
    (tmp_path / "p/model.txt").unlink()
    with pytest.raises(LetheError, match="no predictor"):
        Predictor.load(tmp_path / "p")


def test_what_lies_beyond_the_training_rows_is_refused_by_name(tmp_path):
    rows = [row | {"settings_hash": "s1"} for row in rows_of(80)]
    predictor = fit(problem_of(tmp_path, rows), 0.86, 36)
    changes = [{}, {"forgetting": 9.0}, {"initial_loss": math.nan}, {"noise": math.nan}, {"settings_hash": "s2"}]
    table = read_table(write(tmp_path / "new.csv", [rows[1] | change for change in changes]))
    found = predictor.predict(table)
    words = [row["outside"].partition(" is ")[0] for row in found]
    assert words == ["", "forgetting 9", "initial_loss", "", "the features were made with other settings"]
    assert [math.isnan(row["predicted"]) for row in found] == [False, True, True, False, True]
    told = predictor.predict(table, extrapolate=True)
    assert not any(math.isnan(row["predicted"]) for row in told) and [row["outside"] for row in told] == [row["outside"] for row in found]
    assert told[1]["predicted"] < told[0]["predicted"]
    lacking = read_table(write(tmp_path / "new.csv", [{key: row[key] for key in row if key != "forgetting"} for row in rows]))
    with pytest.raises(LetheError, match="no column of numbers called forgetting, which the predictor was fitted with"):
        predictor.predict(lacking)


def test_the_command_from_a_result_file_to_new_data_sets(tmp_path, capsys):
    rows = rows_of(70)
    features = write(tmp_path / "f.csv", [{key: row[key] for key in ("dataset_name", *FEATURES)} for row in rows])
    results = []
    for row in rows:
        share = row["overall_accuracy"]
        after = {"overall_accuracy": share, "accuracy_low": share - 0.02, "accuracy_high": share + 0.02}
        results.append({"dataset": row["dataset_name"], "status": "ok", "results": {"finetuned_model": after}})
    (tmp_path / "r.json").write_text(json.dumps({"results": results}))
    new = write(tmp_path / "new.csv", [{key: row[key] for key in ("dataset_name", *FEATURES)} | {"initial_loss": 2 + 90 * (k == 1)}
                                       for k, row in enumerate(rows[:2])])  # fmt: skip
    call = ["--features", features, "--outcomes", str(tmp_path / "r.json"), "--new", new, "--seed", "3"]
    main([*call, "--out", str(tmp_path / "p")])
    said = capsys.readouterr().out
    for words in (
        "70 data sets of 12 families, 4 features; overall_accuracy: mean", "5 folds, no family on both sides: 70 test rows",
        "leave an RMSE of 1.02 points to a perfect predictor", "size alone", "initial loss alone",
            "asked to hold 86 % (",
        "refused: familyb_1: initial_loss 92 is above",
    ):  # fmt: skip
        assert words in said, words
    names = ["calibration.csv", "importance.png", "model.json", "model.txt", "predicted.png", "predictions.csv", "predictions_new.csv"]
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == names
    for name in ("importance.png", "predicted.png"):
        assert all(300 < side < 3000 for side in imread(tmp_path / "p" / name).shape[:2])
    with open(tmp_path / "p/predictions.csv", newline="") as file:
        kept = list(csv.DictReader(file))
    assert len(kept) == 70 and {row["family"] for row in kept} == {f"family{c}" for c in "abcdefghijkl"}
    errors = [float(row["predicted"]) - float(row["overall_accuracy"]) for row in kept]
    about = json.loads((tmp_path / "p/model.json").read_text())
    assert about["judgement"]["scores"]["trees"]["rmse"][0] == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    inside = sum(float(row["low"]) <= float(row["overall_accuracy"]) <= float(row["high"]) for row in kept)
    assert f"as ranks are whole): held {inside} of 70" in said
    main([*call, "--out", str(tmp_path / "again")])
    main(["--model", str(tmp_path / "p"), "--new", new, "--out", str(tmp_path / "later")])
    same = [("again", name) for name in ("predictions.csv", "model.txt", "predictions_new.csv")]
    for folder, name in (*same, ("later", "predictions_new.csv")):
        assert (tmp_path / folder / name).read_bytes() == (tmp_path / "p" / name).read_bytes()
    main(["--model", str(tmp_path / "p"), "--new", new, "--extrapolate"])
    assert "BEYOND THE TRAINING ROWS: familyb_1" in capsys.readouterr().out


def test_one_split_of_the_seeds_own_layout(tmp_path, capsys):
    """One table with overall_accuracy, learning_rate and batch_size in it, several runs of a data set, and accuracies in per cent."""
    rows = [row | {"dataset_name": f"{row['dataset_name']}.json", "overall_accuracy": 100 * row["overall_accuracy"], "learning_rate": 2e-4,
                   "batch_size": float(2 ** (k % 3))} for k, row in enumerate(rows_of(240, families=20))]  # fmt: skip
    rows[1]["dataset_name"] = rows[21]["dataset_name"]
    main(["--features", write(tmp_path / "meta.csv", rows), "--out", str(tmp_path / "p"), "--group", "dataset_name", "--coverage", "0.99"])
    said = capsys.readouterr().out
    assert "240 data sets of 239 families, 5 features" in said and "one split, no family on both sides: 67 test rows" in said
    assert "columns not used, constant: learning_rate" in said and "no finite interval: 99 % needs 99 calibration rows" in said
    table = next(line for line in said.splitlines() if line.startswith("trees")).split()
    assert 0.8 < float(table[1]) < 3  # points, not hundreds of them
    with open(tmp_path / "p/predictions.csv", newline="") as file:
        assert {row["high"] for row in csv.DictReader(file)} == {"inf"}


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    few, many = write(tmp_path / "few.csv", rows_of(29)), write(tmp_path / "many.csv", rows_of(40))
    one = write(tmp_path / "one.csv", [row | {"dataset_name": f"data_{k}", "kind": "a"} for k, row in enumerate(rows_of(40))])
    same = write(tmp_path / "same.csv", [row | {"overall_accuracy": 0.5} for row in rows_of(40)])
    far = write(tmp_path / "far.csv", [row | {"forgetting": 99.0} for row in rows_of(2)])
    for call, words in (
        ([], "which features?"),
        (["--features", few], "29 data sets with features and overall_accuracy are too few to fit a predictor"),
        (["--features", many, "--target", "overal_accuracy"], "did you mean --target overall_accuracy"),
        (["--features", one, "--group", "kind"], "calibration and test: 1; the largest, a, has 40 of 40 rows"),
        (["--features", many, "--group", "kid"], "--group kid: no such column"),
        (["--features", many, "--folds", "13"], "13 folds need as many families: "),
        (["--features", same], "overall_accuracy is 0.5 for all 40 data sets: there is nothing to predict"),
        (["--features", many, "--drop", "nois"], "did you mean 'noise'"),
        (["--features", many, "--drop", ",".join(FEATURES)], "no column of numbers that varies"),
        (["--features", many, "--coverage", "1"], "--coverage must lie between 0 and 1"),
        (["--features", many, "--out", str(tmp_path / "p"), "--new", far], "all 2 data sets of"),
        (["--model", str(tmp_path / "p")], "--model DIR predicts the data sets of --new"),
        (["--model", str(tmp_path / "none"), "--new", far], "no file"),
        (["--features", many, "--extrapolat"], "did you mean --extrapolate"),
    ):  # fmt: skip
        assert run_command(lambda call=call: main(call)) == 2, call
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    assert run_command(lambda: main(["--features", many])) == 2
    assert "pip install lightgbm" in capsys.readouterr().err
