"""study/comparison*.py: the plan, and a report of made-up folders whose every number can be counted."""

import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import study.comparison
from metrics.statistics import mcnemar
from study.comparison import comparison_table, plan_comparison, report_comparison
from study.comparison_points import least_forgetting, points_of, read_study
from study.errors import LetheError
from study.folder import append_jsonl, write_json, write_jsonl

SWEEP = {"adamw": [0.001, 0.003], "muon": [0.003, 0.01]}
PICTURES = ("training_curves", "evaluation_curves", "forgetting_analysis", "frontier")


def items_of(task, share, n, letters, draw):
    """n items of which a share is right; every tenth output has no answer at all."""
    right, rows = draw.random(n) < share, []
    for i in range(n):
        gold = "ABCDE"[i % 5] if letters else str(i)
        wrong = None if i % 10 == 3 else "ABCDE"[(i + 1) % 5] if letters else "-1"
        extracted = gold if right[i] else wrong
        rows.append({"prompt": f"{task} {i}", "output": str(extracted), "reference": gold, "extracted": extracted, "gold": gold,
                     "exact_match": bool(right[i]), "flexible_match": bool(right[i] or i % 4 == 0), "string_match": False, "rougeL": 0.5,
                     "correct": bool(right[i]), "answer_nll": 2.0 - float(right[i]), "tokens": 5, "group": ""})  # fmt: skip
    return rows


def shares_of(name, rate, state):
    """Right on A and on B: larger rates learn and forget more, Muon a little less of both."""
    strength = math.log10(rate * 3000) / 2 * (0.85 if name == "muon" else 1.0)
    return [(0.05, 0.1), (0.5 + 0.35 * strength, 0.12), (0.8 - 0.6 * strength, 0.3 + 0.5 * strength)][state]


def build(
    root, comparison=SWEEP, seeds=(0,), n=120, letters=True, drift=True, dev=True, tasks=("gsm8k", "aqua_rat"), pairs=None, held_out=True
):
    """A finished study as training leaves it."""
    runs = plan_comparison(list(tasks), comparison, pairs)
    for seed in seeds:
        tree = root / f"seed{seed}" if len(seeds) > 1 else root
        draw = np.random.default_rng(seed)
        write_json(tree / "study.json", {"identity": {"settings": {"seed": seed}}, "tasks": {task: {} for task in tasks}, "commit": "c"})
        (tree / "tensorboard").mkdir()
        for task in tasks:
            write_jsonl(tree / "base" / "eval" / f"{task}.jsonl", items_of(task, 0.05, n, letters and task == "aqua_rat", draw))
        for k, run in enumerate(runs):
            folder, (name, rate) = tree / run.folder, (run.changes["optimizer.name"], run.changes["learning_rate"])
            kept, learned = shares_of(name, rate, run.stage)
            for task in tasks if run.stage == 1 else (run.first, run.second):
                share = kept if task == run.first else learned
                write_jsonl(folder / "eval" / f"{task}.jsonl", items_of(task, share, n, letters and task == "aqua_rat", draw))
            for step in range(0, 60, 10):
                loss = 3 * math.exp(-step * rate * 8) + 0.02 * draw.random()
                row = {"step": step or 1, "time": 1.8e9 + 1000 * k + step + 0.25, "train/loss": loss,
                       "train/learning_rate": rate, "tokens": 100 * step}  # fmt: skip
                append_jsonl(folder / "metrics.jsonl", row)
                if held_out and step in (20, 40):
                    mine = {f"eval/{t}/exact_match": kept * step / 60 for t in filter(None, (run.first, run.second))}
                    append_jsonl(folder / "metrics.jsonl", {"step": step, "time": 1.8e9 + 1000 * k + step + 0.5, **mine})
            if drift:
                size = {"frobenius": 20 * rate**0.5, "spectral": rate**0.5, "relative_frobenius": 0.3 * rate**0.5}
                kl = {run.task: {"mean": 2.0 * rate**0.5 * run.stage, "low": 0.0, "high": 1.0, "n": n}}
                write_json(folder / "drift.json", {**size, "kl": kl})
            if dev:  # the second rate of each optimizer has learned best
                write_json(folder / "dev.json", {run.task: 0.5 + abs(rate - sorted(comparison[name])[-1])})
            record = {"status": "done", "run": run.__dict__, "steps": 50, "seconds": 1.0, "final_loss": 0.1, "optimizer": name}
            write_json(folder / "run.json", record)
    return runs


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(study.comparison, "draw_comparison", lambda *_: [])


# ----------------------------------------------------------------------------------------------------------------------
# The plan


def test_the_plan():
    runs = plan_comparison(["a", "b", "c"], {"adamw": [1e-3, 3e-3, 1e-3], "muon": [0.02]})
    assert [run.folder for run in runs] == [
        "optimizer/adamw_lr0.001/a",
        "optimizer/adamw_lr0.003/a",
        "optimizer/muon_lr0.02/a",
        "optimizer/adamw_lr0.001/a_to_b",
        "optimizer/adamw_lr0.003/a_to_b",
        "optimizer/muon_lr0.02/a_to_b",
    ]
    assert [run.parent for run in runs[:3]] == [None] * 3 and [run.parent for run in runs[3:]] == [run.folder for run in runs[:3]]
    assert runs[5].changes == {"optimizer.name": "muon", "learning_rate": 0.02} and runs[5].arm == "muon_lr0.02"
    assert {run.mask for run in runs} == {"none"}
    two = plan_comparison(["a", "b", "c"], {"adamw": [1.0]}, "a:b,a:c,b:c")
    assert [run.folder for run in two] == [f"optimizer/adamw_lr1/{name}" for name in ("a", "b", "a_to_b", "a_to_c", "b_to_c")]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: plan_comparison(["a", "a"], {"adamw": [1.0]}), "needs two tasks"),
        (lambda: plan_comparison(["a", "../b"], {"adamw": [1.0]}), "cannot be a folder"),
        (lambda: plan_comparison(["a", "b"], {"adamw": []}), "no learning rate"),
        (lambda: plan_comparison(["a", "b"], {"adamw": [0.12345678, 0.12345679]}), "fewer digits"),
        (lambda: plan_comparison(["a", "b"], {"adamw": [1.0]}, "a:c"), "not among the tasks"),
        (lambda: plan_comparison(["a", "A"], {"adamw": [1.0]}, "a:A,A:a"), "rename a task"),
    ],
)
def test_plans_that_are_refused(call, words):
    with pytest.raises(LetheError, match=words):
        call()


# ----------------------------------------------------------------------------------------------------------------------
# The report


def test_every_file_and_every_number(tmp_path, capsys):
    build(tmp_path)
    results = report_comparison(tmp_path)
    (pair,) = results["pairs"]
    assert [(p["optimizer"], p["learning_rate"], p["chosen"]) for p in pair["points"]] == [
        ("adamw", 0.001, False), ("adamw", 0.003, True), ("muon", 0.003, False), ("muon", 0.01, True)]  # fmt: skip
    right = {}  # counted from the files
    for file in tmp_path.glob("**/eval/*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        right[file.parent.parent.relative_to(tmp_path).as_posix(), file.stem] = [row["exact_match"] for row in rows]
    for point in pair["points"]:
        arm = f"optimizer/{point['optimizer']}_lr{point['learning_rate']:g}"
        a = [np.mean(right[folder, "gsm8k"]) for folder in ("base", f"{arm}/gsm8k", f"{arm}/gsm8k_to_aqua_rat")]
        b = [np.mean(right[folder, "aqua_rat"]) for folder in ("base", f"{arm}/gsm8k", f"{arm}/gsm8k_to_aqua_rat")]
        states = [point["states"][state] for state in ("base", "after_stage1", "after_stage2")]
        assert [s["gsm8k"]["exact_match"] for s in states] == pytest.approx(a) and [
            s["aqua_rat"]["exact_match"] for s in states
        ] == pytest.approx(b)
        assert point["F_abs"] == pytest.approx(a[1] - a[2]) == pytest.approx(point["intervals"]["F_abs"]["difference"])
        assert point["F_rel"] == pytest.approx((a[1] - a[2]) / a[1]) and point["L_B"] == pytest.approx(b[2] - b[0])
        assert point["intervals"]["L_B"]["low"] < point["L_B"] < point["intervals"]["L_B"]["high"]
        assert point["nll_rise"] == pytest.approx(a[1] - a[2])  # made so: a right answer's nll is lower by 1
        assert "f1" in states[2]["aqua_rat"] and "f1" not in states[2]["gsm8k"] and states[2]["aqua_rat"]["recall"] == pytest.approx(b[2])
        assert point["drift"]["after_stage2"]["kl"] == pytest.approx({"aqua_rat": 4.0 * point["learning_rate"] ** 0.5})
    kept = pair["paired"]["differences"]["A kept after stage 2"]
    adamw, muon = right["optimizer/adamw_lr0.003/gsm8k_to_aqua_rat", "gsm8k"], right["optimizer/muon_lr0.01/gsm8k_to_aqua_rat", "gsm8k"]
    counts = Counter(zip(adamw, muon, strict=True))
    assert (kept["only_b"], kept["only_a"]) == (counts[True, False], counts[False, True])
    assert kept["difference"] == pytest.approx(np.mean(adamw) - np.mean(muon)) and kept["p"] == pytest.approx(
        mcnemar(counts[True, False], counts[False, True])
    )
    assert pair["paired"]["learning_rates"] == [0.003, 0.01]

    names = {path.name for path in (tmp_path / "logs").iterdir()}
    histories = {f"{name}.json" for name in ("experiment_metadata", "training_history", "evaluation_history", "final_results")}
    assert names == {"training.log"} | histories | {f"{name}.png" for name in PICTURES}
    for name in PICTURES:
        assert min(imread(tmp_path / "logs" / f"{name}.png").shape[:2]) > 400
    assert (tmp_path / "tensorboard_logs").resolve() == (tmp_path / "tensorboard").resolve()
    rows = json.loads((tmp_path / "eval_results_optimizers.json").read_text())["results"]
    row = next(r for r in rows if r["run"] == "optimizer/muon_lr0.01/gsm8k" and r["task"] == "gsm8k" and r["metric"] == "exact_match")
    assert (row["optimizer"], row["learning_rate"], row["stage"], row["seed"], row["n"]) == ("muon", 0.01, 1, 0, 120)
    assert {r["metric"] for r in rows if r["task"] == "aqua_rat"} > {"exact_match", "answer_nll", "precision", "recall", "f1"}

    log = (tmp_path / "logs" / "training.log").read_text().splitlines()
    times = [line.split(" | ")[0] for line in log]
    assert len(log) == 8 * 8 and times == sorted(times)
    assert log[0].startswith("2027-01-15 08:00:00 | seed 0 optimizer/adamw_lr0.001/gsm8k | step 1 | loss ")
    history = json.loads((tmp_path / "logs" / "training_history.json").read_text())["runs"]
    assert len(history) == 8 and history[0]["step"] == [1, 10, 20, 30, 40, 50] and len(history[0]["loss"]) == 6
    evaluation = json.loads((tmp_path / "logs" / "evaluation_history.json").read_text())
    assert {row["state"] for row in evaluation["final"]} == {"base", "after_stage1", "after_stage2"} and len(
        evaluation["while_training"]
    ) == 4 * 2 * 3
    assert len(json.loads((tmp_path / "logs" / "experiment_metadata.json").read_text())["runs"]) == 8

    printed = capsys.readouterr().out
    assert max(map(len, printed.split("\nresults")[0].splitlines())) <= 110
    adam = next(p for p in pair["points"] if p["chosen"])
    line = next(line for line in printed.splitlines() if line.startswith("adamw") and "0.003*" in line).split()
    assert line[2:8] == [f"{100 * adam['states'][s][t]['exact_match']:.1f}" for t in ("gsm8k", "aqua_rat") for s in adam["states"]]
    assert line[8] == f"{100 * adam['F_abs']:.1f}" and "At matched learning" in printed and "McNemar" in printed


def test_equal_folders_give_equal_bytes(tmp_path):
    for name in ("one", "two"):
        build(tmp_path / name, {"muon": [0.003]}, n=40)
        report_comparison(tmp_path / name, quiet=True)
    files = [path.relative_to(tmp_path / "one") for path in sorted((tmp_path / "one").rglob("*")) if path.is_file()]
    assert len(files) > 20
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_three_seeds_four_rates_two_pairs(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(study.comparison_plots, "_save", lambda figure, path: drawn.append((figure, path.stem)))
    sweep = {"adamw": [1e-3, 2e-3, 4e-3, 8e-3], "muon": [2e-3, 4e-3, 8e-3, 0.016]}
    build(tmp_path, sweep, (0, 1, 2), n=60, tasks=("gsm8k", "aqua_rat", "svamp"), pairs="gsm8k:aqua_rat,gsm8k:svamp")
    results = report_comparison(tmp_path, quiet=True)
    assert [(p["first"], p["second"]) for p in results["pairs"]] == [("gsm8k", "aqua_rat"), ("gsm8k", "svamp")]
    for pair in results["pairs"]:
        assert len(pair["points"]) == 8 and all(point["seeds"] == [0, 1, 2] for point in pair["points"])
        found = pair["points"][0]["intervals"]["F_abs"]
        assert len(found["by_seed"]) == 3 and found["difference"] == pytest.approx(np.mean(found["by_seed"]))
        assert found["seed_low"] < found["difference"] < found["seed_high"]
        at = pair["matched_learning"]["at"]
        assert at["difference"] == pytest.approx(at["adamw"] - at["muon"]) and at["low"] <= at["difference"] <= at["high"]
    assert [name for _, name in drawn] == [f"{name}_gsm8k_to_{second}" for second in ("aqua_rat", "svamp") for name in PICTURES]
    words = [text.get_text() for text in drawn[3][0].axes[0].texts]
    assert Counter(words[1:]) == Counter(f"{rate:g}" for rates in sweep.values() for rate in rates) and "3 seeds" in words[0]
    assert sorted(path.name for path in (tmp_path / "tensorboard_logs").iterdir()) == ["seed0", "seed1", "seed2"]
    assert (tmp_path / "tensorboard_logs" / "seed1").resolve() == (tmp_path / "seed1" / "tensorboard").resolve()
    assert max(map(len, comparison_table(results).splitlines())) <= 110
    from_file = json.loads((tmp_path / "logs" / "final_results.json").read_text())
    assert comparison_table(from_file) == comparison_table(results)


def test_points_at_one_place_and_short_axes_can_be_read(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(study.comparison_plots, "_save", lambda figure, path: drawn.update({path.stem: figure}))
    build(tmp_path, n=20, held_out=False)
    for file in tmp_path.glob("**/eval/*.jsonl"):  # nobody learns anything
        rows = [json.loads(line) | {"exact_match": False} for line in file.read_text().splitlines()]
        write_jsonl(file, rows)
    for file in tmp_path.glob("**/metrics.jsonl"):  # three steps and one, losses within a factor of 1.4
        file.unlink()
        for step, loss in enumerate((0.011, 0.009, 0.008)[: 1 if "_to_" in file.parent.name else 3], 1):
            append_jsonl(file, {"step": step, "time": 1.8e9, "train/loss": loss, "train/learning_rate": 0.001, "tokens": 1})
    for file in tmp_path.glob("**/drift.json"):
        write_json(file, {"frobenius": 1.0, "spectral": 1.0, "relative_frobenius": 1e-5,
                          "kl": {"aqua_rat": {"mean": 0.0021, "low": 0.0, "high": 1.0, "n": 20}}})  # fmt: skip
    report_comparison(tmp_path, quiet=True)

    def ticks(axis):
        axis.figure.draw_without_rendering()
        low, high = sorted(axis.get_view_interval())
        return [text for place, text in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
                if low <= place <= high and text.get_text()]  # fmt: skip

    for axes, steps in zip(drawn["training_curves"].axes, (["1", "2", "3"], ["1"]), strict=True):
        assert len(ticks(axes.yaxis)) >= 3 and [text.get_text() for text in ticks(axes.xaxis)] == steps
    for axes in drawn["forgetting_analysis"].axes[1:]:
        boxes = [text.get_window_extent() for text in ticks(axes.xaxis)]
        assert 3 <= len(boxes) <= 5 and all(left.x1 + 3 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    for name in ("evaluation_curves", "forgetting_analysis", "frontier"):
        legends = [axes.get_legend() for axes in drawn[name].axes if axes.get_legend()]
        assert legends[0].get_texts()[-1].get_text() == "chosen rate", name
    axes = drawn["frontier"].axes[0]
    sizes = [line.get_markersize() for line in axes.lines if line.get_marker() == "o"]
    assert sizes == sorted(set(sizes), reverse=True) and len(sizes) == 4  # the later drawn, the smaller: none hidden
    assert len({text.get_color() for text in axes.texts[1:]}) == 2


def test_one_optimizer_at_one_rate_without_extras(tmp_path):
    build(tmp_path, {"muon": [0.01]}, drift=False, dev=False, letters=False, held_out=False)
    (pair,) = report_comparison(tmp_path, quiet=True)["pairs"]
    (point,) = pair["points"]
    assert point["chosen"] and pair["paired"] is None and pair["matched_learning"] is None
    assert point["drift"] == {"after_stage1": {}, "after_stage2": {}} and len(list((tmp_path / "logs").glob("*.png"))) == 4
    table = comparison_table({"pairs": [pair]})
    assert "KL " not in table.splitlines()[1] and "f1" not in table.lower() and " - " not in table.split("\n\n")[0].splitlines()[-2]


def test_without_dev_nothing_is_chosen_among_several_rates(tmp_path, no_pictures):
    build(tmp_path, dev=False)
    (pair,) = report_comparison(tmp_path, quiet=True)["pairs"]
    assert not any(point["chosen"] for point in pair["points"]) and pair["paired"] is None and pair["matched_learning"]
    assert "*" not in comparison_table({"pairs": [pair]})


def test_what_is_missing_is_left_out_and_what_does_not_fit_is_told(tmp_path, no_pictures):
    build(tmp_path, seeds=(0, 1), n=40)
    (tmp_path / "seed1/optimizer/muon_lr0.01/gsm8k_to_aqua_rat/run.json").unlink()  # this run has not ended
    (tmp_path / "seed0/optimizer/adamw_lr0.001/gsm8k/eval/gsm8k.jsonl").unlink()  # this one is not scored yet
    (pair,) = report_comparison(tmp_path, quiet=True)["pairs"]
    assert [point["seeds"] for point in pair["points"]] == [[1], [0, 1], [0, 1], [0]]
    assert len(pair["paired"]["differences"]["F_abs"]["by_seed"]) == 1  # the seed that both have
    file = tmp_path / "seed1/optimizer/muon_lr0.003/gsm8k/eval/aqua_rat.jsonl"
    write_jsonl(file, [json.loads(line) for line in file.read_text().splitlines()][:-1])
    with pytest.raises(LetheError, match="other test items"):
        report_comparison(tmp_path, quiet=True)
    write_json(tmp_path / "empty/study.json", {"identity": {"settings": {"seed": 0}}, "tasks": {"a": {}}})
    with pytest.raises(LetheError, match="trained and scored yet"):
        report_comparison(tmp_path / "empty")


def test_where_there_are_no_links_a_note_stands(tmp_path, monkeypatch, no_pictures):
    build(tmp_path, {"muon": [0.01]}, n=20)

    def refuse(*_, **__):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    report_comparison(tmp_path, quiet=True)
    assert "tensorboard --logdir" in (tmp_path / "tensorboard_logs" / "README.md").read_text()
    assert not os.path.islink(tmp_path / "tensorboard_logs")


def test_points_know_their_scores(tmp_path):
    build(tmp_path, seeds=(3, 4), n=30)
    points = points_of(read_study(tmp_path), "gsm8k", "aqua_rat")
    assert points[0].scores("gsm8k", 2).shape == (2, 30) and points[0].scores("gsm8k", 2, seeds=[4]).shape == (1, 30)
    assert set(np.unique(points[0].lost())) <= {-1, 0, 1} and points[1].dev_nll == pytest.approx(1.0)


def test_least_forgetting_on_a_line():
    learned, lost = np.array([[0.2, 0.4, 0.6]]), np.array([[0.1, 0.3, 0.2]])
    for level, expected in ((0.3, 0.2), (0.4, 0.3), (0.6, 0.2), (0.5, 0.25), (0.2, 0.1)):
        assert least_forgetting(np.array([level]), learned, lost) == pytest.approx(expected)
    back = np.array([[0.2, 0.6, 0.4]])  # the largest rate learns less again: the level is met twice, the better way counts
    assert least_forgetting(np.array([0.5]), back, np.array([[0.1, 0.5, 0.2]])) == pytest.approx(0.35)
    assert np.isnan(least_forgetting(np.array([0.7]), learned, lost)) and np.isnan(least_forgetting(np.array([0.1]), learned, lost))
    flat = np.array([[0.4, 0.4]])
    assert least_forgetting(np.array([0.4]), flat, np.array([[0.3, 0.1]])) == pytest.approx(0.1)
    assert least_forgetting(np.array([0.4]), np.array([[0.4]]), np.array([[0.7]])) == pytest.approx(0.7)
