"""metrics/forgetting.py and study/forgetting.py: FG against published tables, by hand, and from a study's files."""

import math

import numpy as np
import pytest

import eval as evaluation
from metrics.forgetting import forgetting_general, mean_forgetting
from metrics.statistics import wilson_interval
from study.benchmark_groups import GROUPS, MEASURES, measure_of, tasks_and_shots
from study.config import parse_eval
from study.folder import read_json, write_json, write_jsonl
from study.forgetting import chance_of, fg_rows, fg_table, scores_of, study_rows
from study.plan import Run
from study.report import report_general

# Seed 002: scores of M0, M1, M2, M3 and FG, of the model from scratch and of the stacked one.
PUBLISHED = {
    "boolq": ((0.6235, 0.4765, 0.4850, 0.5581, 18.77), (0.6514, 0.5685, 0.5755, 0.5245, 14.62)),
    "hellaswag": ((0.4796, 0.4268, 0.4310, 0.4207, 11.14), (0.5095, 0.4596, 0.4574, 0.4541, 10.29)),
    "mathqa": ((0.2335, 0.2392, 0.2278, 0.2224, 1.58), (0.2476, 0.2338, 0.2462, 0.2462, 2.21)),
    "mutual": ((0.2257, 0.2257, 0.2257, 0.2257, 0.0), (0.2257, 0.2257, 0.2257, 0.2257, 0.0)),
    "piqa": ((0.7432, 0.6964, 0.6855, 0.6834, 7.37), (0.7535, 0.7024, 0.7029, 0.7029, 6.74)),
    "winogrande": ((0.6093, 0.5604, 0.5438, 0.5328, 10.45), (0.6448, 0.5951, 0.5841, 0.5651, 9.83)),
    "race": ((0.3713, 0.3254, 0.3416, 0.3139, 11.94), (0.3675, 0.3493, 0.3416, 0.3368, 6.77)),
    "mmlu_humanities": ((0.2417, 0.2408, 0.2359, 0.2438, 0.62), (0.2410, 0.2442, 0.2478, 0.2557, -3.41)),
    "mmlu_other": ((0.2716, 0.2456, 0.2668, 0.2687, 4.15), (0.2559, 0.2810, 0.2713, 0.2704, -7.17)),
    "mmlu_social_sciences": ((0.2275, 0.2662, 0.2684, 0.2535, -15.48), (0.2301, 0.2541, 0.2980, 0.2636, -18.17)),
    "mmlu_stem": ((0.2718, 0.2620, 0.2788, 0.2781, -0.43), (0.2582, 0.2518, 0.2775, 0.2645, -2.50)),
    "crows_pairs_english": ((0.6339, 0.5647, 0.5695, 0.5581, 11.01), (0.6070, 0.6225, 0.6011, 0.6130, -0.85)),
}
CATEGORIES = {"DK": (-2.79, -7.81), "RC": (11.94, 6.77), "Rs": (8.22, 7.28)}


@pytest.mark.parametrize("model", [0, 1], ids=["scratch", "stack"])
def test_the_published_table(model):
    found = {}
    for task, rows in PUBLISHED.items():
        base, *later, published = rows[model]
        found[task] = forgetting_general(base, later)  # the share of stereotypes too is taken as "higher is better" there
        rounded = 0.005 + 100 * 0.00005 * (1 + np.mean(later) / base) / base  # of FG's two digits, and of the scores' four
        assert found[task]["plain"]["mean"][0] == pytest.approx(published, abs=rounded), task
        assert found[task]["plain"]["last"][0] == pytest.approx(100 * (base - later[-1]) / base)
        assert all(math.isnan(bound) for bound in found[task]["plain"]["mean"][1:])  # scores without items have no interval
    for group, published in CATEGORIES.items():
        members = [one.task for one in MEASURES if one.group == group]
        mean = mean_forgetting([found[task] for task in members])
        assert mean["mean"][0] == pytest.approx(published[model], abs=0.02) and mean["columns"] == len(members)


def test_golden_vector():
    for task, fg in (("boolq", 18.76), ("hellaswag", 11.14), ("race", 11.94)):
        base, *later, _ = PUBLISHED[task][0]
        assert forgetting_general(base, later)["plain"]["mean"][0] == pytest.approx(fg, abs=0.01)
    stages = forgetting_general(0.8, [0.6, 0.4])["plain"]["stages"]
    assert [stage[0] for stage in stages] == pytest.approx([25.0, 50.0])


def test_directions():
    lower = forgetting_general(2.0, [3.0, 1.5], better="lower", chance=10.0)  # a loss, say
    assert [stage[0] for stage in lower["plain"]["stages"]] == pytest.approx([50.0, -25.0])
    assert [stage[0] for stage in lower["adjusted"]["stages"]] == pytest.approx([12.5, -6.25])
    bias = forgetting_general(0.6, [0.7, 0.45, 0.5], better=0.5)  # 10 points of bias become 20, 5 on the other side, none
    assert [stage[0] for stage in bias["plain"]["stages"]] == pytest.approx([100.0, -50.0, -100.0])
    assert bias["reason"] == "an ideal has no chance level" and math.isnan(bias["adjusted"]["mean"][0])
    percent = forgetting_general(60, [70, 45, 50], better=50)
    assert percent["plain"]["mean"][0] == pytest.approx(bias["plain"]["mean"][0])
    fair = forgetting_general(0.51, [0.7], better=0.5, error=0.01)
    assert math.isnan(fair["plain"]["mean"][0]) and "of the ideal 0.5" in fair["reason"]


def test_chance():
    known = forgetting_general(0.75, [0.5, 0.25], chance=0.25)
    assert [stage[0] for stage in known["adjusted"]["stages"]] == pytest.approx([50.0, 100.0]) and known["reason"] == ""
    unsure = forgetting_general(0.2417, [0.2408], chance=0.25, error=0.0063)
    assert math.isnan(unsure["adjusted"]["last"][0]) and unsure["plain"]["last"][0] == pytest.approx(0.37, abs=0.01)
    assert unsure["reason"] == "the base, 0.2417, is within 2 standard errors of chance, 0.25"
    assert "worse than chance" in forgetting_general(0.2, [0.3], chance=0.25, error=0.01)["reason"]
    assert forgetting_general(0.5, [0.4])["reason"] == "no chance level is known"
    nothing = forgetting_general(0.0, [0.1], chance=0.0)
    assert math.isnan(nothing["plain"]["mean"][0]) and nothing["reason"] == "the base scores 0"
    items = np.repeat([1.0, 0.0], [30, 70])  # 0.30 of 100 items: 0.046 is a standard error
    assert "within 2" in forgetting_general(items, [items], chance=0.25)["reason"]
    assert forgetting_general(np.tile(items, 10), [np.tile(items, 10)], chance=0.25)["reason"] == ""  # of 1000 items it is 0.0145


def planted(generator, n: int, keep: float, base: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Items of which a share `keep` of what was right stays so, and nothing is gained."""
    before = (generator.random(n) < base).astype(float)
    return before, before * (generator.random(n) < keep)


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator, hits = np.random.default_rng(0), {"plain": 0, "adjusted": 0}
    for seed in range(150):
        before, after = planted(generator, 300, 0.7)
        found = forgetting_general(before, [after], chance=0.25, seed=seed, rounds=300)
        for form, truth in (("plain", 30.0), ("adjusted", 100 * 0.24 / 0.55)):
            value, low, high = found[form]["last"]
            assert low <= value <= high
            hits[form] += low <= truth <= high
    assert 135 <= hits["plain"] <= 150 and 135 <= hits["adjusted"] <= 150


def test_items_are_resampled_before_and_after_alike():
    generator = np.random.default_rng(1)
    before, after = planted(generator, 2000, 0.9)
    paired = forgetting_general(before, [after])["plain"]["last"]
    apart = forgetting_general(before, [generator.permutation(after)])["plain"]["last"]  # the same scores, by items of no relation
    assert paired[0] == pytest.approx(apart[0]) and paired[2] - paired[1] < 0.6 * (apart[2] - apart[1])
    assert forgetting_general(before, [after]) == forgetting_general(before, [after])
    same = forgetting_general(before, [before, after])["plain"]["stages"][0]
    half = 100 * wilson_interval(0, 2000)[1] / before.mean()
    assert same == pytest.approx((0.0, -half, half))  # no item changed: that is not certainty


def test_seeds():
    generator = np.random.default_rng(2)
    pairs = [planted(generator, 400, keep) for keep in (0.9, 0.7, 0.5)]
    before, after = (np.array(side) for side in zip(*pairs, strict=True))
    found = forgetting_general(before, [after], chance=0.25)
    each = [100 * (b.mean() - a.mean()) / b.mean() for b, a in pairs]
    value, low, high = found["plain"]["last"]
    assert value == pytest.approx(np.mean(each)) and found["seeds"] == 3 and found["n"] == 400
    assert high - value == pytest.approx(4.3027 * np.std(each, ddof=1) / math.sqrt(3), rel=1e-4)  # so far apart: Student's is the wider
    twice = forgetting_general(np.tile(before[:1], (3, 1)), [np.tile(after[:1], (3, 1))])["plain"]["last"]
    once = forgetting_general(before[0], [after[0]])["plain"]["last"]
    assert twice == pytest.approx(once)  # seeds that agree make items no surer


def test_items_without_a_score_and_mistakes():
    base, later = np.array([1.0, 1.0, 1.0, np.nan]), np.array([0.0, 1.0, np.nan, 1.0])
    found = forgetting_general(base, [later])
    assert found["n"] == 2 and found["plain"]["last"][0] == 50.0
    for before, after in ((0.5, []), ([1, 0], [[1, 0, 1]]), ([], [[]]), ([np.nan], [[1.0]])):
        with pytest.raises(ValueError):
            forgetting_general(before, after)
    with pytest.raises(ValueError, match="better"):
        forgetting_general(0.5, [0.4], better="more")


def test_mean_of_a_group():
    one = {"plain": {"stages": [(10.0, 6.0, 14.0)], "mean": (10.0, 6.0, 14.0), "last": (10.0, 6.0, 14.0)}}
    two = {"plain": {"stages": [(20.0, 17.0, 23.0)], "mean": (20.0, 17.0, 23.0), "last": (20.0, 17.0, 23.0)}}
    none = {"plain": {"stages": [(math.nan,) * 3], "mean": (math.nan,) * 3, "last": (math.nan,) * 3}}
    found = mean_forgetting([one, none, two])
    assert found["mean"] == found["last"] == found["stages"][0] == (15.0, 12.5, 17.5) and found["columns"] == 2
    assert mean_forgetting([none])["columns"] == 0 and math.isnan(mean_forgetting([none])["mean"][0])


# ----------------------------------------------------------------------------------------------------------------------
# Of a study


def test_groups():
    assert {one.group for one in MEASURES} == set(GROUPS) and len(MEASURES) == 12
    assert measure_of("mmlu_stem_5shot").group == "DK" and measure_of("piqa").task == "piqa" and measure_of("mini_mmlu") is None
    assert measure_of("crows_pairs_french_0shot").better == 0.5
    assert tasks_and_shots("RC", None) == [("race", 0)] and tasks_and_shots("arc_easy", None) == [("arc_easy", None)]
    assert [shots for _, shots in tasks_and_shots("DK", None)] == [5] * 4 and tasks_and_shots("DK", 0)[0] == ("mmlu_stem", 0)


def test_a_group_of_the_harness_asks_for_its_tasks(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "find_columns", lambda spec: asked.append(spec) or [])
    evaluation.choose_columns(parse_eval(["--model", "nano", "--harness", "DK,arc_easy,Bias", "--max_samples", "9"]))
    assert [(spec["harness"], spec["shots"]) for spec in asked] == [
        ("mmlu_stem", 5), ("mmlu_humanities", 5), ("mmlu_social_sciences", 5), ("mmlu_other", 5), ("arc_easy", None),
        ("crows_pairs_english", 0),
    ]  # fmt: skip
    assert {spec["max_items"] for spec in asked} == {9}


def test_what_an_item_scores():
    crows = {"correct": 3.2, "metrics": {"likelihood_diff": 3.2, "pct_stereotype": 1.0}}
    assert scores_of([crows], "crows_pairs_english_0shot").tolist() == [1.0] and scores_of([crows], "other").tolist() == [3.2]
    mutual = {"correct": 1.0, "metrics": {"r@1": 1.0}, "loglikelihoods": [-9.0, -8.0, -1.0, -7.0], "gold": "1"}
    assert scores_of([mutual, {**mutual, "gold": "2"}], "mutual").tolist() == [0.0, 1.0]
    assert np.isnan(scores_of([{"correct": None}], "piqa")).all()
    assert chance_of([{"options": "abcd"}, {"options": "ab"}], "mini_mmlu") == 0.375 and chance_of([{"correct": 1}], "x") is None
    assert chance_of([], "race") == 0.25 and chance_of([{"options": "ab"}], "crows_pairs_english") is None


def test_the_harness_scores_mutual_by_a_flag():
    """Why mutual is read from its log-likelihoods: the harness's own r@1 is the same whatever the model says."""
    utils = pytest.importorskip("lm_eval.tasks.mutual.utils")
    for best in range(4):
        results = [(-1.0 if k == best else -9.0, False) for k in range(4)]
        assert [int(utils.process_results({"answers": letter}, results)["r@1"]) for letter in "ABCD"] == [0, 1, 0, 0]


def benchmark(generator, n: int, keeps: list[float], **more) -> list[list[dict]]:
    """Items of the base, then after every stage."""
    states = [(generator.random(n) < 0.8).astype(float)]
    for keep in keeps:
        states.append(states[-1] * (generator.random(n) < keep))
    about = {"subject": "x", "extracted": "A", **more}
    return [[{**about, "correct": value, "metrics": {"acc": value}} for value in state] for state in states]


def test_rows_and_table_of_items():
    generator = np.random.default_rng(3)
    columns = {"piqa_0shot": [benchmark(generator, 400, [0.9, 0.9])], "boolq": [benchmark(generator, 400, [0.5, 0.9])],
               "race": [benchmark(generator, 400, [1.0, 1.0])], "mine": [benchmark(generator, 50, [0.9, 0.8])]}  # fmt: skip
    rows = fg_rows(columns)
    assert len(rows) == (4 + 2) * 2 * 4 and fg_rows({}) == [] and fg_table([]) == ""
    cell = {(row["column"], row["group"], row["form"], row["stage"]): row for row in rows}
    by_hand = [np.mean([item["correct"] for item in state]) for state in columns["boolq"][0]]
    assert cell["boolq", "Rs", "plain", 2]["value"] == pytest.approx(100 * (by_hand[0] - by_hand[2]) / by_hand[0])
    assert cell["boolq", "Rs", "chance", "last"]["value"] == pytest.approx(100 * (by_hand[0] - by_hand[2]) / (by_hand[0] - 0.5))
    assert cell["boolq", "Rs", "plain", 2]["score"] == pytest.approx(by_hand[2])
    group = [cell[name, "Rs", "plain", "mean"]["value"] for name in ("piqa_0shot", "boolq")]
    assert cell["", "Rs", "plain", "mean"]["value"] == pytest.approx(np.mean(group)) and cell["", "Rs", "plain", "mean"]["columns"] == 2
    assert cell["mine", "", "chance", "mean"]["reason"] == "no chance level is known" and ("", "", "plain", "mean") not in cell
    table = fg_table(rows).splitlines()
    assert table[1].split("  ")[0] == "benchmark" and "stage 2" in table[1] and max(map(len, table)) < 140
    assert [line.split("  ")[0] for line in table[3:9]] == ["piqa_0shot", "boolq", "race", "mine", "Rs, mean of 2", "RC, mean of 1"]
    assert table[-1] == "mine: no FG over chance, no chance level is known"
    long = fg_table(fg_rows({"piqa": [benchmark(generator, 100, [0.9] * 6)]})).splitlines()
    assert "stage 1" not in long[1] and "last" in long[1] and max(map(len, long)) < 140


def test_sequences_of_a_study(tmp_path, capsys):
    """Two seeds of a sequence with three stages, of which one arm trains all at once; FG as of the items."""
    generator, trees, stored = np.random.default_rng(4), [], []
    for seed in (1, 2):
        tree, order = tmp_path / f"seed{seed}", "a,b,c"
        runs = [Run(1, "none", "a", None, "lora_base/a", None)]
        for k, task in ((2, "b"), (3, "c")):
            folder, past = f"sequence/none/{order}/{k}_{task}", ("a", "b")[: k - 1]
            runs.append(Run(k, "none", task, None, folder, runs[-1].folder, order=order, past=past))
        runs.append(Run(3, "mtl", "c", None, f"sequence/mtl/{order}/3_joint", None, order=order, past=("a", "b")))
        states = benchmark(generator, 200, [0.9, 0.8, 0.7], options=["1", "2"])
        for folder, items in zip(("base", *(run.folder for run in runs[:3])), states, strict=True):
            write_jsonl(tree / folder / "eval" / "mini_mmlu.jsonl", items)
        write_jsonl(tree / runs[3].folder / "eval" / "mini_mmlu.jsonl", states[1])
        trees.append((tree, seed, runs))
        stored.append(states)
    rows = study_rows(trees, ["mini_mmlu", "unscored"])
    assert {(row["arm"], row["order"], row["column"]) for row in rows} == {("none", "a,b,c", "mini_mmlu")} and len(rows) == 2 * 5
    assert [{name: row[name] for name in row if name not in ("arm", "order")} for row in rows] == fg_rows({"mini_mmlu": stored})
    assert rows[0]["seeds"] == 2 and rows[0]["chance"] == 0.5
    table = fg_table(rows).splitlines()
    assert table[1] == "a > b > c" and table[2].startswith("arm ") and table[4].startswith("none ")
    for tree, seed, runs in trees:
        settings = {"identity": {"settings": {"seed": seed}}, "columns": {"mini_mmlu": {}}}
        write_json(tree / "study.json", settings)
        for run in runs:
            write_json(tree / run.folder / "run.json", {"status": "done", "run": vars(run)})
    report_general(tmp_path, [tree for tree, _, _ in trees], tmp_path / "pictures", quiet=False)
    record = read_json(tmp_path / "general_results.json")
    assert record["fg"] == rows and set(record) == {"results", "fg", "about"} and fg_table(rows) in capsys.readouterr().out
    (trees[0][0] / trees[0][2][2].folder / "eval" / "mini_mmlu.jsonl").unlink()  # a seed that is not scored to its end
    assert study_rows(trees, ["mini_mmlu"])[0]["seeds"] == 1
    assert study_rows([(tree, seed, runs[:1]) for tree, seed, runs in trees], ["mini_mmlu"]) == []
