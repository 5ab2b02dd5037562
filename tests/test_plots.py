"""study/plots.py: every picture is drawn from made-up rows, and tables say what the rows say."""

import pytest
from matplotlib.image import imread

from metrics.statistics import wilson_interval
from study.plan import cells_to_score, plan_runs
from study.plots import draw_all, heatmap_figure
from study.results import collect, summary_table


def made_up(tasks, arms, seeds=(0,), without=()):
    rows = []
    for seed in seeds:
        for run, task in cells_to_score(plan_runs(tasks, arms), tasks):
            if run is not None and run.folder in without:
                continue
            stage = 0 if run is None else run.stage
            share = 0.05 if stage == 0 else 0.9 if run.task == task else 0.0 if stage == 1 else 0.4 + 0.1 * seed
            low, high = wilson_interval(share * 200, 200)
            for metric in ("exact_match", "rougeL"):
                rows.append(
                    {
                        "run": run.folder if run else "base",
                        "arm": run.arm if run else "base",
                        "first": run and run.first,
                        "second": run and run.second,
                        "task": task,
                        "metric": metric,
                        "value": share,
                        "low": low,
                        "high": high,
                        "n": 200,
                        "unparsed": 0,
                        "seed": seed,
                        "stage": stage,
                    }
                )
    return rows


def test_every_file_of_the_built_in_study(tmp_path):
    files = draw_all(made_up(["a", "b", "c"], ["none", "bottom10", "highest"]), tmp_path / "p")
    names = {path.name for path in files}
    labels = ("lora_transfer", "mask_bottom10", "mask_highest")
    assert names == {"bar_base_lora_exact_match.png", "learning_vs_retention.png"} | {
        f"heatmap_{kind}_{label}.png" for kind in ("exact_match", "rougeL", "second_exact_match") for label in labels
    }
    assert names == {path.name for path in (tmp_path / "p").iterdir()}
    for path in files:
        assert min(imread(path).shape[:2]) > 300


def test_gaps_single_arm_and_stage_one_only(tmp_path):
    tasks = ["aqua_cot", "gsm8k", "openbookqa", "simpleQA", "svamp"]
    rows = made_up(tasks, ["none"], without=("lora_base/svamp", "lora_transfer/gsm8k_to_svamp"))
    assert len(draw_all(rows, tmp_path)) == 5
    words = [text.get_text() for text in heatmap_figure(rows, "none").axes[0].texts]
    assert words.count("no score") == 2 and words.count("90.0") == 4 and words.count("-50.0") == 15
    one = [row for row in rows if row["stage"] < 2 and row["task"] == "gsm8k"]
    assert [p.name for p in draw_all(one, tmp_path / "one")] == ["bar_base_lora_exact_match.png"]
    assert draw_all([], tmp_path / "none") == [] and summary_table([]) == "nothing has been scored yet"
    assert "gsm8k" in summary_table(one) and "After both" not in summary_table(one)


def test_seeds_are_averaged_with_an_interval_over_seeds():
    rows = made_up(["a", "b"], ["none"], seeds=(0, 1, 2))
    cell = collect(rows, "exact_match")[2, "none", "a", "b", "a"]
    assert abs(cell.value - 0.5) < 1e-9 and cell.seeds == 3 and abs(cell.half - 4.3027 * 0.1 / 3**0.5) < 1e-4


def test_seeds_that_agree_keep_the_interval_of_the_items():
    rows = [{"run": "base", "arm": "base", "first": None, "second": None, "task": "a", "metric": "exact_match", "stage": 0,
             "value": 0.0, "low": 0.0, "high": 0.0188, "n": 200, "unparsed": 0, "seed": seed} for seed in (1, 2, 3)]  # fmt: skip
    (cell,) = collect(rows, "exact_match").values()
    assert (cell.low, cell.high, cell.n, cell.seeds) == (0.0, pytest.approx(0.0188), 200, 3)
def test_table(tmp_path):
    rows = made_up(["a", "b", "c"], ["none", "highest"])
    text = summary_table(rows, {"mask/highest/a_to_b": 0.25})
    line = next(line for line in text.splitlines() if line.startswith("mask_highest"))
    assert line.split() == ["mask_highest", "90.0", "±2.9", "40.0", "±2.8", "90.0", "±2.0", "25.0", "6"]
    assert "base" in text and text.count("a > b") == 2 and "a > b" not in summary_table(rows, per_pair=False)


def test_the_lenient_column_and_unseen_templates_stand_beside_exact_match():
    rows = made_up(["a", "b"], ["none"])
    plain = summary_table(rows)
    assert "flexible" not in plain and "unseen" not in plain
    more = [row | {"metric": name, "value": 0.75} for row in rows if row["metric"] == "exact_match"
            for name in ("flexible_match", "exact_match_held_out")]  # fmt: skip
    single, means, _ = summary_table(rows + more).split("\n\n")
    assert "unseen templates  base, flexible  stage 1, flexible" in single and single.count("75.0") == 6
    assert "kept, flexible  learned, flexible" in means and means.count("75.0") == 2
