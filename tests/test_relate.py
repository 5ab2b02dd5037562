"""features/outcomes.py, ranks.py and relate.py: tables are joined as they should be, and rank correlations are scipy's."""

import csv
import itertools
import json
import math

import numpy as np
import pytest
from matplotlib.image import imread
from scipy import stats

from features.outcomes import Outcome, family, join, load, read_outcomes, read_table
from features.ranks import Relation, correlation, holm, kendall, order, relate, spearman
from features.relate import main
from study import batch_result as batch
from study.errors import LetheError, run_command

HEAD = ["dataset_name", "forgetting", "initial_loss", "note", "status", "reason", "content_hash", "settings_hash"]


def write_csv(path, rows, head=HEAD):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])
    return path


def result_row(name, change, status="ok", **more):
    after = {"overall_accuracy": 0.5 + change, "accuracy_low": 0.45 + change, "accuracy_high": 0.55 + change, "answer_nll": 1.0 - change}
    return {
        "dataset": name,
        "status": status,
        "file_name": f"{name}.json",
        "folder_name": "chunk_001",
        "results": {"base_model": {"overall_accuracy": 0.5, "answer_nll": 0.75}, "finetuned_model": None if status == "failed" else after},
        "change": None if status == "failed" else {"difference": change, "low": change - 0.03, "high": change + 0.02, "p": 0.1},
    } | more


def write_study(folder, n=24, seed=0):
    """n data sets whose forgetting orders their change but for noise, one without forgetting, one failed, one unreadable."""
    generator, rows, results = np.random.default_rng(seed), [], []
    for k in range(n):
        forgetting = float(generator.gamma(2, 0.05))
        rows.append([f"set{k // 8}_{k}", "" if k == 3 else repr(forgetting), repr(float(generator.random())), "", "ok", "", f"h{k}", "s"])
        results.append(result_row(f"set{k // 8}_{k}", -forgetting + float(generator.normal(0, 0.02)), content_hash=f"h{k}"))
    rows.append(["cut", "", "", "", "error", "cut off at byte 7", "", "s"])
    results.append(result_row("cut", 0.0, "failed"))
    path = folder / "results.json"
    path.write_text(json.dumps({"folder_name": "x", "results": results}))
    return str(write_csv(folder / "features.csv", rows)), str(path)


@pytest.mark.parametrize("values", [8, 1000])  # many ties, and hardly any
def test_rank_correlations_are_those_of_scipy(values):
    generator = np.random.default_rng(values)
    for n in (5, 12, 60):
        x = generator.integers(0, values, n).astype(float)
        y = x + generator.integers(0, values, n)
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
    assert math.isnan(spearman(np.ones(5), np.arange(5.0))) and math.isnan(kendall(np.ones(5), np.arange(5.0)))


def test_a_bootstrap_draw_is_the_correlation_of_the_drawn_rows():
    generator = np.random.default_rng(1)
    x, y = generator.integers(0, 6, 15).astype(float), generator.normal(size=15)
    counts = generator.multinomial(15, np.full(15, 1 / 15), 40)
    found = correlation(counts @ order(x).T, counts @ order(y).T, counts)
    for many, rho in zip(counts, found, strict=True):
        assert rho == pytest.approx(stats.spearmanr(np.repeat(x, many), np.repeat(y, many)).statistic, abs=1e-12)


def test_p_is_the_share_of_all_orders():
    x, y = np.arange(6.0), np.array([2.0, 1.0, 3.0, 3.0, 6.0, 5.0])
    seen = abs(stats.spearmanr(x, y).statistic)
    every = [abs(stats.spearmanr(x, y[list(p)]).statistic) >= seen - 1e-12 for p in itertools.permutations(range(6))]
    found = relate("f", x, y)
    assert found.p == pytest.approx(np.mean(every), abs=0.008)  # 10 000 draws: four standard errors
    assert found.rho == pytest.approx(seen) and found.tau == pytest.approx(stats.kendalltau(x, y).statistic)
    assert found.low < seen < found.high <= 1 and found == relate("f", x, y) != relate("f", x, y, seed=1)


def test_intervals_hold_the_true_correlation_about_as_often_as_they_say():
    generator, true, inside = np.random.default_rng(5), 6 / math.pi * math.asin(0.6 / 2), 0  # of a normal pair with r = 0.6
    for _ in range(150):
        x = generator.normal(size=40)
        found = relate("f", x, 0.6 * x + 0.8 * generator.normal(size=40), rounds=500)
        inside += found.low <= true <= found.high
    assert 0.88 <= inside / 150 <= 0.99


def test_empty_cells_leave_the_pair_out():
    x, y = np.array([1.0, math.nan, 2, 3, 4, 5, math.nan, 7]), np.arange(8.0)
    kept = ~np.isnan(x)
    assert relate("f", x, y)[1:] == relate("f", x[kept], y[kept])._replace(empty=2)[1:]
    assert math.isnan(relate("f", x[:5], y[:5]).rho)  # three pairs are too few


def test_holm():
    found = [Relation(name, 9, 0, 0.1, 0, 1, p, 0) for name, p in zip("abcd", (0.04, 0.01, 0.03, math.nan), strict=True)]
    assert [one.holm for one in holm(found)][:3] == pytest.approx([0.06, 0.03, 0.06]) and math.isnan(holm(found)[3].holm)


@pytest.mark.parametrize(
    "name, of",
    [
        ("dolly_chunk_001_500", "dolly"), ("gsm8k", "gsm8k"), ("gsm8k_500_seed3.json", "gsm8k"), ("mini_svamp", "mini_svamp"),
        ("alpaca-gpt4", "alpaca-gpt"), ("dataset12", "dataset12"), ("chunk_001/law12.jsonl", "law"), ("svamp/train.json", "svamp"),
        ("aqua/chunk_003/part_7", "aqua"), ("train_x", "train_x"), ("7", "7"), ("oasst v2", "oasst"), ("partial_order", "partial_order"),
    ],
)  # fmt: skip
def test_family_of_a_name(name, of):
    assert family(name) == of


def test_outcomes_are_read_with_their_intervals(tmp_path):
    _, results = write_study(tmp_path, 6)
    (first, *rest), notes = read_outcomes(results, "change")
    change = json.loads((tmp_path / "results.json").read_text())["results"][0]["change"]["difference"]
    also = ("chunk_001/set0_0.json", "chunk_001/set0_0", "set0_0.json")
    assert first == Outcome("set0_0", change, change - 0.03, change + 0.02, "h0", also) and len(rest) == 5
    assert notes == ["1 run of results.json that failed"]
    (accuracy, *_), _ = read_outcomes(results, "overall_accuracy")
    assert accuracy == Outcome("set0_0", 0.5 + change, 0.45 + change, 0.55 + change, "h0", also)
    (nll, *_), _ = read_outcomes(results, "answer_nll_change")
    assert nll.value == pytest.approx(0.25 - change) and math.isnan(nll.low)
    with pytest.raises(LetheError, match="no macro in it; there is answer_nll, answer_nll_change, change, overall_accuracy"):
        read_outcomes(results, "macro")
    table = write_csv(tmp_path / "o.csv", [["a", "0.5", "0.4", "0.6"], ["b", "", "", ""]], ["dataset_name", "q", "q_low", "q_high"])
    assert read_outcomes(table, "q") == ([Outcome("a", 0.5, 0.4, 0.6)], ["1 row of o.csv without q"])


def test_the_result_file_of_a_batch_is_understood(tmp_path):
    """What study/batch.py writes, from the items of twenty questions before and after."""
    before = [{"subject": "x", "gold": "A", "correct": k < 12, "extracted": "A", "answer_nll": 1.0} for k in range(20)]
    after = [item | {"correct": k < 7, "answer_nll": 1.5} for k, item in enumerate(before)]
    row = {"dataset": "a-1f", "status": "ok", "file_name": "a.json", "folder_name": "chunk_001", "change": batch.change(before, after)}
    training = {"training_info": {"training_metrics": {"examples": 3}}}
    rows = [row | training | {"results": {"base_model": batch.scores(before), "finetuned_model": batch.scores(after)}}]
    lost = {"status": "failed", "reason": "r", "results": {"base_model": None, "finetuned_model": None}, "change": None}
    rows.append({"dataset": "b"} | lost)
    batch.save(tmp_path / "r.json", {"folder_name": "x", "timestamp": "t", "total_files": 2, "max_samples": None}, rows)
    for target, value, known in (
        ("overall_accuracy", 0.35, True), ("change", -0.25, True), ("answer_nll", 1.5, False), ("answer_nll_change", 0.5, False),
        ("overall_accuracy_change", -0.25, False), ("macro_accuracy", 0.35, False),
    ):  # fmt: skip
        (one,), notes = read_outcomes(tmp_path / "r.json", target)
        assert one.value == pytest.approx(value) and (one.low <= value <= one.high) == known and notes == ["1 run of r.json that failed"]
        assert join(features_of(tmp_path, ("chunk_001/a", "")), [one], target, []).names == ["chunk_001/a"]


def features_of(tmp_path, *rows):
    return read_table(write_csv(tmp_path / "f.csv", [[name, "1", "2", "", "ok", "", content, "s"] for name, content in rows]))


def test_joined_by_content_and_by_name(tmp_path):
    table = features_of(tmp_path, ("chunk_001/a b", ""), ("x", "hash"), ("y", "old"), ("z", ""))
    outcomes = [
        Outcome("A_b.json", 0.1, 0.0, 0.2), Outcome("renamed", 0.2, content="hash"), Outcome("y", 0.3, content="new"),
        Outcome("A_b", 0.3, 0.2, 0.4), Outcome("nobody", 0.4),
    ]  # fmt: skip
    joined = join(table, outcomes, "change", [])
    assert joined.names == ["chunk_001/a b", "x"] and joined.truth.tolist() == pytest.approx([0.2, 0.2])
    assert joined.low[0] == pytest.approx(0.2 - 12.7062 * 0.1) and math.isnan(joined.low[1])  # Student's over two runs
    assert joined.notes == [
        "2 data sets with features but without an outcome", "1 outcome without features",
        "1 outcome of another content than the features of that name", "1 data set with several outcomes: their mean is taken",
    ]  # fmt: skip
    with pytest.raises(LetheError, match="could be 1/a or 2/a"):
        join(features_of(tmp_path, ("1/a", ""), ("2/a", "")), [Outcome("a", 0.1)], "change", [])
    assert join(features_of(tmp_path, ("1/a", ""), ("2/a", "")), [Outcome("2/a", 0.1)], "change", []).names == ["2/a"]
    filed = Outcome("a-5f3b21", 0.1, also=("2/a.json", "2/a", "a.json"))  # a file that shares its stem with another of its chunk
    assert join(features_of(tmp_path, ("1/a", ""), ("2/a", "")), [filed], "change", []).names == ["2/a"]
    assert join(features_of(tmp_path, ("a.json", ""), ("a.jsonl", "")), [filed], "change", []).names == ["a.json"]
    assert join(features_of(tmp_path, ("p", "same"), ("q", "same")), [Outcome("q", 0.1, content="same")], "change", []).names == ["q"]
    with pytest.raises(LetheError, match="no data set of .* has an outcome"):
        join(table, [Outcome("nobody", 0.4)], "change", [])
    with pytest.raises(LetheError, match="f.csv:3: a stands already in line 2"):
        join(features_of(tmp_path, ("a", ""), ("a", "")), [Outcome("a", 0.1)], "change", [])


def test_what_is_wrong_with_a_table_is_named(tmp_path):
    with pytest.raises(LetheError, match="no file .*python -m features makes"):
        read_table(tmp_path / "none.csv")
    for rows, head, words in (
        ([["a", "1"]], ["dataset_name", "x", "y"], ":2: 2 cells where the first line has 3"),
        ([["a", "1"]], ["name", "x"], "no column dataset_name"),
        ([["a", "1", "2"]], ["dataset_name", "x", "x"], "two columns are called x"),
        ([["a", "1", "error"]], ["dataset_name", "x", "status"], "no row with features"),
    ):
        with pytest.raises(LetheError, match=words):
            read_table(write_csv(tmp_path / "bad.csv", rows, head))
    table = read_table(write_csv(tmp_path / "odd.csv", [["a", "1", "nan", "n/a"], ["b", "inf", "2", "3"]], ["dataset_name", "x", "y", "z"]))
    assert table.notes == ["columns without numbers: z ('n/a')"] and np.isnan(table.numbers["x"][1]) and np.isnan(table.numbers["y"][0])
    (tmp_path / "results.json").write_text('{"results": 3}')
    with pytest.raises(LetheError, match='no list "results"'):
        read_outcomes(tmp_path / "results.json", "change")


def test_the_command_prints_rho_and_draws(tmp_path, capsys):
    features, outcomes = write_study(tmp_path)
    main(["--features", features, "--outcomes", outcomes, "--out", str(tmp_path / "p.png")])
    said = capsys.readouterr().out
    table = load(features, [outcomes], "change")
    x, y = table.table.numbers["forgetting"], table.truth
    rho = stats.spearmanr(x[~np.isnan(x)], y[~np.isnan(x)]).statistic
    line = next(line for line in said.splitlines() if line.startswith("forgetting"))
    assert line.split()[1:4] == ["23", "1", f"{rho:.3f}"] and rho < -0.5
    assert "data sets with more forgetting came out lower in change" in said and "1 row of features.csv without features" in said
    assert all(300 < side < 3000 for side in imread(tmp_path / "p.png").shape[:2])
    kept = json.loads((tmp_path / "p.json").read_text())
    assert kept["relations"][0]["rho"] == pytest.approx(rho) and kept["relations"][0]["n"] == 23
    main(["--features", features, "--outcomes", outcomes, "--feature", "initial_loss", "--seed", "4"])
    assert "the interval holds 0" in capsys.readouterr().out


def test_all_features_with_the_number_of_them(tmp_path, capsys):
    features, outcomes = write_study(tmp_path)
    main(["--features", features, "--outcomes", outcomes, "--feature", "all", "--out", str(tmp_path / "all.png")])
    said = capsys.readouterr().out
    assert "2 features were tested" in said and "Holm's p below 0.05: forgetting" in said.splitlines()[-2]
    rows = [line.split() for line in said.splitlines() if line.startswith(("forgetting", "initial_loss"))]
    assert [row[0] for row in rows] == ["forgetting", "initial_loss"]  # the strongest first
    assert float(rows[0][8]) == pytest.approx(2 * float(rows[0][7]))
    assert all(200 < side < 3000 for side in imread(tmp_path / "all.png").shape[:2])


def test_mistakes_are_one_line(tmp_path, capsys):
    features, outcomes = write_study(tmp_path, 4)
    base = ["--features", features, "--outcomes", outcomes]
    for more, words in (
        (["--feature", "forgeting"], "did you mean 'forgetting'"),
        (["--target", "chang"], "no chang in it; there is answer_nll, answer_nll_change, change"),
        ([], "no rank correlation: 4 data sets"),
        (["--out", "p.pdf"], "the picture is a PNG; call it p.png"),
        (["--featur", "x"], "unknown --featur; did you mean --feature"),
    ):
        assert run_command(lambda more=more: main([*base, *more])) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
