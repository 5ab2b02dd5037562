"""Optimizer studies from the command line: AdamW against Muon, what they leave behind, and the words of an earlier study."""

import contextlib
import hashlib
import io
import json
import math
import re
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file
from test_seed_words import README_BLOCKS
from tiny import NARROW, TASKS, adapters, cells, one_line, raw_config, times, words, write_folder

import eval as evaluation
import train
from data.folder import Task, find_task, held_out
from data.prepare import prepare
from data.records import Record
from model import load_model, load_tokenizer
from study.errors import LetheError
from study.folder import read_json, read_jsonl

SWEEP = ["--compare_optimizers", "--comparison", "{adamw: [1.0e-2, 1.0e-3], muon: [1.0e-2]}", "--epochs", "2", "--save_steps", "2",
         "--log_steps", "2", "--max_test", "10"]  # fmt: skip
ARMS = ("adamw_lr0.001", "adamw_lr0.01", "muon_lr0.01")
FIRST, SECOND = TASKS
RUNS = [f"optimizer/{arm}/{rest}" for arm in ARMS for rest in (FIRST, f"{FIRST}_to_{SECOND}")]
PICTURES = ("training_curves", "evaluation_curves", "forgetting_analysis", "frontier")


@pytest.fixture(scope="module", autouse=True)
def verdicts():
    """A random model is never right, and of scores that are all 0 nothing can be seen: here a coin decides, one for each output."""
    score = evaluation.score_answer

    def by_coin(kind, output, reference, *more):
        found = score(kind, output, reference, *more)
        coin = hashlib.sha256((output + reference).encode()).digest()
        right, answered = coin[0] < 110, coin[1] < 200
        return {**found, "exact_match": right, "extracted": found["gold"] if right else "wrong" if answered else None}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "score_answer", by_coin)
        yield


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr("study.comparison.draw_comparison", lambda *_: [])


def without_pictures(command) -> str:
    """Runs train.py, and returns what it printed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as told:
        patch.setattr("study.comparison.draw_comparison", lambda *_: [])
        assert train.main(command) == 0
    return told.getvalue()


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory) -> Path:
    """One seed, pictures and all; to be looked at, not written to."""
    out = tmp_path_factory.mktemp("compared") / "one"
    assert train.main(words(tiny, out, *SWEEP)) == 0
    return out


@pytest.fixture(scope="module")
def over_seeds(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "two"
    without_pictures(words(tiny, out, *SWEEP, "--seeds", "0,1"))
    return out


# ----------------------------------------------------------------------------------------------------------------------
# The comparison: files


def test_every_named_file(compared):
    names = {path.name for path in (compared / "logs").iterdir()}
    files = ("experiment_metadata", "training_history", "evaluation_history", "final_results")
    assert names == {"training.log", *(f"{name}.json" for name in files), *(f"{name}.png" for name in PICTURES)}
    for name in files:
        assert read_json(compared / f"logs/{name}.json")
    assert (compared / "tensorboard_logs").resolve() == compared / "tensorboard"
    assert {path.name for path in (compared / "tensorboard").iterdir()} == {run.replace("/", "__") for run in RUNS} | {"study"}
    assert (compared / "eval_results_optimizers.json").is_file() and not (compared / "eval_results_mask.json").exists()
    assert set(adapters(compared)) == set(RUNS)
    for run in RUNS:
        stage = 2 if "_to_" in run else 1
        assert {path.name for path in (compared / run / "checkpoints").iterdir()} == {
            f"stage{stage}_checkpoint_epoch_0_step_2", f"stage{stage}_checkpoint_epoch_1_step_4"}  # fmt: skip
        for name in ("run.json", "metrics.jsonl", "drift.json", "dev.json", "adapter_config.json"):
            assert (compared / run / name).is_file()
    assert not [path for path in compared.rglob("*") if path.name.endswith((".tmp", ".partial", ".writing"))]
    log = (compared / "logs/training.log").read_text().splitlines()
    assert len(log) == len(RUNS) * 4 and all(" | step " in line and "| loss " in line for line in log)  # steps 1, 2, 4 and 6


def test_pictures_can_be_looked_at(compared):
    for name in PICTURES:
        pixels = imread(compared / f"logs/{name}.png")[..., :3]
        assert all(300 < side < 5000 for side in pixels.shape[:2]) and 0.02 < pixels.std() < 0.4, name
        assert len(np.unique((pixels[::3, ::3].reshape(-1, 3) * 255).astype(np.uint8), axis=0)) > 20, name


def test_every_state_of_every_optimizer_and_rate(compared, over_seeds):
    for root, trees in ((compared, {0: compared}), (over_seeds, {n: over_seeds / f"seed{n}" for n in (0, 1)})):
        for tree in trees.values():
            assert set(cells(tree)) == {f"{run}/eval/{task}.jsonl" for run in ["base", *RUNS] for task in TASKS}
        (pair,) = read_json(root / "logs/final_results.json")["pairs"]
        assert [f"{p['optimizer']}_lr{p['learning_rate']:g}" for p in pair["points"]] == list(ARMS)
        for point in pair["points"]:
            assert point["seeds"] == list(trees) and set(point["states"]) == {"base", "after_stage1", "after_stage2"}
            assert all(set(state) == set(TASKS) and state[FIRST]["n"] == 10 for state in point["states"].values())
        final = read_json(root / "logs/evaluation_history.json")["final"]
        told = {(row["state"], row["optimizer"], row["learning_rate"], row["task"], row["seed"]) for row in final}
        arms = [("base", None, None), *product(("after_stage1", "after_stage2"), ("adamw",), (0.001, 0.01))]
        arms += [(state, "muon", 0.01) for state in ("after_stage1", "after_stage2")]
        assert told == {(*arm, task, seed) for arm in arms for task in TASKS for seed in trees}


def test_what_a_run_says_of_itself(compared):
    for run in RUNS:
        record, muon = read_json(compared / run / "run.json"), "muon" in run
        assert record["optimizer"]["name"] == ("muon" if muon else "adamw") and record["steps"] == 6 and record["examples"] == 24
        assert record["learning_rate"] == record["optimizer"]["learning_rate"] == float(run.split("lr")[1].split("/")[0])
        assert sum(int(re.search(r"(\d+) matrices", line)[1]) for line in record["partition"]) == 28  # 2 layers, 7 linears, 2 factors
        assert all(line.split()[0] == record["optimizer"]["name"] for line in record["partition"])
        assert all(("lr x 0.2·√" in line) == muon for line in record["partition"])
    one, other = (load_file(compared / f"optimizer/{arm}_lr0.01/{FIRST}/adapter_model.safetensors") for arm in ("adamw", "muon"))
    assert set(one) == set(other) and not any(torch.equal(one[name], other[name]) for name in one)


def test_stage_2_goes_on_from_its_own_stage_1(tiny, tmp_path):
    """With the same optimizer, at the rate that is to stage 1's as the settings have it: here so low that nothing moves."""
    rates = ["--stage1.learning_rate", "1e-2", "--stage2.learning_rate", "1e-11", "--max_test", 2]
    without_pictures(words(tiny, tmp_path, *SWEEP, *rates))
    seen = set()
    for arm in ARMS:
        record = read_json(tmp_path / f"optimizer/{arm}/{FIRST}_to_{SECOND}/run.json")
        assert record["run"]["parent"] == f"optimizer/{arm}/{FIRST}" and record["optimizer"]["name"] == arm.partition("_")[0]
        assert record["learning_rate"] == pytest.approx(1e-9 * float(arm.partition("lr")[2]))
        one, two = (load_file(tmp_path / f"optimizer/{arm}/{rest}/adapter_model.safetensors") for rest in (FIRST, f"{FIRST}_to_{SECOND}"))
        assert set(one) == set(two) and all(torch.allclose(one[name], two[name], rtol=0, atol=1e-8) for name in one)
        seen.add(float(sum(tensor.norm() for tensor in one.values())))
    assert len(seen) == 3


# ----------------------------------------------------------------------------------------------------------------------
# The comparison: again


def test_another_folder_gives_the_same_bytes(compared, tiny, tmp_path, over_seeds):
    without_pictures(words(tiny, tmp_path / "two", *SWEEP))
    for name in ("logs/final_results.json", "logs/evaluation_history.json", "eval_results_optimizers.json"):
        assert (tmp_path / "two" / name).read_bytes() == (compared / name).read_bytes(), name
    assert adapters(tmp_path / "two") == adapters(compared) and cells(tmp_path / "two") == cells(compared)
    for run in RUNS:
        for name in ("drift.json", "dev.json"):
            assert (tmp_path / "two" / run / name).read_bytes() == (compared / run / name).read_bytes()
    assert adapters(over_seeds / "seed0") == adapters(compared) and cells(over_seeds / "seed0") == cells(compared)
    zero, one = adapters(over_seeds / "seed0"), adapters(over_seeds / "seed1")
    assert set(zero) == set(one) and all(zero[run] != one[run] for run in zero)


def test_the_same_command_again_has_nothing_to_do(compared, tiny, tmp_path, capsys, no_pictures):
    out = Path(shutil.copytree(compared, tmp_path / "copy", symlinks=True))
    kept = ("adapter_model.safetensors", "*.jsonl", "run.json", "d*.json", "final_results.json")
    before = [times(out, pattern) for pattern in kept]
    assert train.main(words(tiny, out, *SWEEP)) == 0
    assert "nothing to do: every run is trained and every cell is scored" in capsys.readouterr().out
    assert [times(out, pattern) for pattern in kept] == before
    gone = out / RUNS[0] / "eval" / f"{SECOND}.jsonl"  # a cell and a measurement that are missing are made again, and no other
    gone.unlink()
    (out / RUNS[3] / "drift.json").unlink()
    (out / RUNS[3] / "dev.json").unlink()
    assert train.main(words(tiny, out, *SWEEP)) == 0 and "nothing to do" not in capsys.readouterr().out
    assert cells(out) == cells(compared) and (out / RUNS[3] / "dev.json").read_bytes() == (compared / RUNS[3] / "dev.json").read_bytes()
    assert times(out, "adapter_model.safetensors") == before[0]
    assert (out / "logs/final_results.json").read_bytes() == (compared / "logs/final_results.json").read_bytes()


def test_eval_scores_it_again_from_its_folder(compared, tmp_path, no_pictures):
    out = Path(shutil.copytree(compared, tmp_path / "copy", symlinks=True))
    for file in [*out.rglob("eval/*.jsonl"), *out.rglob("drift.json"), *out.rglob("dev.json"), out / "logs/final_results.json"]:
        file.unlink()
    assert evaluation.main(["--root", str(out), "--device", "cpu"]) == 0
    assert cells(out) == cells(compared)
    for name in ("logs/final_results.json", "eval_results_optimizers.json"):
        assert (out / name).read_bytes() == (compared / name).read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# The comparison: numbers, counted from the items


def right(tree, folder, task) -> list[int]:
    return [int(item["exact_match"]) for item in read_jsonl(tree / folder / "eval" / f"{task}.jsonl")]


def exact_p(counts: list[int]) -> float:
    """McNemar's, or over seeds the sign flips by item: all patterns of signs, one after the other."""
    sizes = [abs(count) for count in counts if count]
    sums = [abs(sum(s * size for s, size in zip(signs, sizes, strict=True))) for signs in product((1, -1), repeat=len(sizes))]
    return sum(s >= abs(sum(counts)) for s in sums) / len(sums)


@pytest.mark.parametrize("seeds", [1, 2])
def test_forgetting_learning_and_the_paired_test(compared, over_seeds, seeds):
    root, trees = (compared, [compared]) if seeds == 1 else (over_seeds, [over_seeds / "seed0", over_seeds / "seed1"])
    (pair,) = read_json(root / "logs/final_results.json")["pairs"]
    assert (pair["first"], pair["second"]) == TASKS

    def states(arm, task) -> np.ndarray:  # (3 states, seeds, items)
        folders = ("base", f"optimizer/{arm}/{FIRST}", f"optimizer/{arm}/{FIRST}_to_{SECOND}")
        return np.array([[right(tree, folder, task) for tree in trees] for folder in folders])

    for arm, point in zip(ARMS, pair["points"], strict=True):
        a, b = states(arm, FIRST).mean(axis=(1, 2)), states(arm, SECOND).mean(axis=(1, 2))
        expected = {
            "F_abs": a[1] - a[2], "F_base": a[0] - a[2], "L_A": a[1] - a[0], "L_B": b[2] - b[0], "forward_transfer": b[1] - b[0],
            "performance_gap": abs(a[2] - b[2]), "average_performance": (a[2] + b[2]) / 2, "performance_balance": 1 - abs(a[2] - b[2]),
        }  # fmt: skip
        assert {name: point[name] for name in expected} == pytest.approx(expected)
        assert point["F_rel"] == pytest.approx((a[1] - a[2]) / a[1])
        for what in ("F_abs", "L_B"):
            assert point["intervals"][what]["difference"] == pytest.approx(expected[what])
            assert point["intervals"][what]["low"] <= expected[what] <= point["intervals"][what]["high"]
        dev = [read_json(tree / f"optimizer/{arm}/{rest}/dev.json") for tree in trees for rest in (FIRST, f"{FIRST}_to_{SECOND}")]
        assert point["dev_nll"] == pytest.approx(sum(d[FIRST] for d in dev[::2]) / seeds + sum(d[SECOND] for d in dev[1::2]) / seeds)
    measured = [point[name] for point in pair["points"] for name in ("F_abs", "L_A", "L_B", "forward_transfer")]
    assert len(set(measured)) > 4 and any(measured)  # there is something to see

    chosen = {name: min((p for p in pair["points"] if p["optimizer"] == name), key=lambda p: p["dev_nll"]) for name in ("adamw", "muon")}
    assert all(point["chosen"] == (point in chosen.values()) for point in pair["points"])
    assert pair["paired"]["learning_rates"] == [chosen["adamw"]["learning_rate"], 0.01]
    arms = [f"{name}_lr{chosen[name]['learning_rate']:g}" for name in ("adamw", "muon")]
    one, other = ({task: states(arm, task) for task in TASKS} for arm in arms)
    items = {
        "A after stage 1": one[FIRST][1] - other[FIRST][1],
        "A kept after stage 2": one[FIRST][2] - other[FIRST][2],
        "B learned after stage 2": one[SECOND][2] - other[SECOND][2],
    }
    items["F_abs"] = items["A after stage 1"] - items["A kept after stage 2"]
    for name, change in items.items():  # (seeds, items)
        found = pair["paired"]["differences"][name]
        assert found["difference"] == pytest.approx(change.mean()) and found["by_seed"] == pytest.approx(list(change.mean(axis=1)))
        assert (found["only_b"], found["only_a"]) == ((change > 0).sum(), (change < 0).sum())
        assert found["p"] == pytest.approx(exact_p(change.sum(axis=0).tolist()))
    assert any(change.any() for change in items.values())


# ----------------------------------------------------------------------------------------------------------------------
# The comparison: drift, and rows kept back


@pytest.fixture(scope="module")
def moved(compared, tiny):
    """(the last Muon run's folder, the base, base + adapter with the sum taken here in float64, that change by linear)"""
    folder = compared / RUNS[-1]
    base, config = load_file(f"{tiny}/model.safetensors"), read_json(folder / "adapter_config.json")
    factors = load_file(folder / "adapter_model.safetensors")
    change = {}
    for name in {name.partition(".lora_")[0] for name in factors}:
        a, b = (factors[f"{name}.lora_{x}.weight"].double() for x in "AB")
        change[name.removeprefix("base_model.model.") + ".weight"] = config["lora_alpha"] / config["r"] * b @ a
    return folder, base, {name: weight.double() + change.get(name, 0) for name, weight in base.items()}, change


def logits_of(weights, tiny, folder) -> torch.nn.Module:
    return load_model(write_folder(folder, raw_config(**NARROW), weights={name: w.float() for name, w in weights.items()}))


def test_the_size_of_the_change(moved):
    folder, base, _, change = moved
    found, sizes = read_json(folder / "drift.json"), [float(delta.norm()) for delta in change.values()]
    total = math.sqrt(sum(size**2 for size in sizes))
    assert len(change) == found["matrices"] == 14 and found["frobenius"] == pytest.approx(total, rel=1e-5) and total > 0.1
    assert found["spectral"] == pytest.approx(max(float(torch.linalg.matrix_norm(delta, 2)) for delta in change.values()), rel=1e-5)
    whole = math.sqrt(sum(float(base[name].double().norm()) ** 2 for name in change))
    assert found["relative_frobenius"] == pytest.approx(total / whole, rel=1e-5)
    (pair,) = read_json(folder.parents[2] / "logs/final_results.json")["pairs"]
    assert pair["points"][-1]["drift"]["after_stage2"]["frobenius"] == found["frobenius"]


@torch.no_grad()
def test_the_kl_and_the_loss_on_rows_kept_back(moved, tiny, tmp_path):
    folder, base, merged, _ = moved
    model, before = logits_of(merged, tiny, tmp_path / "merged"), logits_of(base, tiny, tmp_path / "base")
    tokenizer = load_tokenizer(tiny)

    def log_p(of, record):  # (answer tokens, vocabulary), and the answer
        prompt, answer = tokenizer.render_prompt(record.prompt), tokenizer.render_answer(record.answer)
        return of(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].double().log_softmax(-1), torch.tensor(answer)

    for name in TASKS:
        task, kl = find_task(name), []
        for record in task.test[:10]:
            (after, _), (at_first, _) = log_p(model, record), log_p(before, record)
            kl.append(float((at_first.exp() * (at_first - after)).sum(-1).mean()))
        found = read_json(folder / "drift.json")["kl"][name]
        spread = 1.959964 * np.std(kl, ddof=1) / math.sqrt(10)
        assert min(kl) > 1e-4 and found["n"] == 10 and found["mean"] == pytest.approx(np.mean(kl), rel=1e-3)
        assert (found["low"], found["high"]) == pytest.approx((np.mean(kl) - spread, np.mean(kl) + spread), rel=2e-3)

        kept_back = list(task.train())[24:224]  # --max_train 24, and at most 200 of the rest
        losses = []
        for record in kept_back:
            scores, answer = log_p(model, record)
            losses.append(-float(scores[range(len(answer)), answer].mean()))
        assert read_json(folder / "dev.json")[name] == pytest.approx(np.mean(losses), rel=1e-4)
        seen = {str(record.prompt) for record in [*list(task.train())[:24], *task.test]}
        assert len(kept_back) == 200 and not seen & {str(record.prompt) for record in kept_back}


def rows(count: int) -> Task:
    records = [Record((("user", f"row {i}"),), str(i), f"mine:{i}") for i in range(count)]
    return Task("mine", "number", 8, lambda **_: iter(records), [], "", "mine")


@pytest.mark.parametrize(
    "count, max_train, most, expected",
    [
        (640, None, 200, (608, 32)),
        (640, 24, 200, (24, 200)),
        (640, 600, 200, (600, 40)),
        (640, 639, 200, (608, 32)),  # always a twentieth
        (640, 10_000, 200, (608, 32)),
        (10_000, None, 200, (9800, 200)),
        (10_000, None, 50, (9950, 50)),
        (21, None, 200, (19, 2)),
        (20, None, 200, (19, 1)),
        (3, 3, 200, (2, 1)),
        (2, None, 200, (1, 1)),
        (2, 1, 200, (1, 1)),
    ],
)
def test_rows_kept_back(count, max_train, most, expected):
    """What follows the first max_train rows; where all would be trained on, the last twentieth."""
    limit, kept = held_out(rows(count), max_train, most)
    assert (limit, len(kept)) == expected
    assert [record.answer for record in kept] == [str(i) for i in range(limit, limit + len(kept))]


def test_one_row_cannot_be_kept_back_and_trained_on(tiny, tmp_path, capsys):
    with pytest.raises(LetheError, match="mine: one row to train on"):
        held_out(rows(1), None)
    for name, count in (("few", 1), ("few_test", 2), ("more", 9)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{name} {i}", "answer": "{i}"}}\n' for i in range(count)))
    data = f"few={tmp_path}/few.jsonl,more={tmp_path}/more.jsonl"
    assert "few: one row to train on" in one_line(words(tiny, tmp_path / "out", *SWEEP, "--datasets", data), capsys)
    assert not adapters(tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------------------
# The words of the earlier study

MUON = "optimizer/muon_lr0.0002"


@pytest.fixture(scope="module")
def seed_style(tiny, tmp_path_factory) -> list[str]:
    """The command: its config.yaml as it stands, on rows in the owners' formats that data.prepare has made tasks of."""
    folder = tmp_path_factory.mktemp("seed")
    raw = {}
    for split, start, count in (("train", 0, 42), ("test", 100, 5), ("dev", 200, 3)):
        numbers = range(start, start + count)
        raw[f"gsm8k/{split}.jsonl"] = [
            {"question": f"How much is {i} + {i}?", "answer": f"<<{i}+{i}={2 * i}>>\n#### {2 * i}"} for i in numbers
        ]
        raw[f"aqua/{split}.json"] = [
            {"question": f"What is {i} x 2?", "options": [f"{c}){i + k}" for k, c in enumerate("ABCDE")], "rationale": f"twice {i}",
             "correct": "ABCDE"[i % 5]} for i in numbers]  # fmt: skip
    for name, content in raw.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    for task in ("gsm8k", "aqua_rat"):
        prepare(task, str(folder), str(folder / "data"))
    (folder / "config.yaml").write_text(README_BLOCKS)
    return ["--config", str(folder / "config.yaml"), "--model", tiny, "--data_root", str(folder / "data"), "--optimizer", "muon",
            "--max_new_tokens", "6", "--device", "cpu", "--save_steps", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def seed_run(seed_style, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("seed_study") / "run_001"
    return out, without_pictures([*seed_style, "--output-dir", str(out)])


def test_its_config_runs_as_it_stands(seed_run):
    out, told = seed_run
    assert set(adapters(out)) == {f"{MUON}/gsm8k", f"{MUON}/gsm8k_to_aqua_rat"}
    for run in adapters(out):
        record = read_json(out / run / "run.json")
        assert record["optimizer"] | {"name": "muon", "learning_rate": 2e-4, "weight_decay": 0.01, "eps": 1e-8} == record["optimizer"]
        per_step = 4 * 4  # its batch_size, and gradient_accumulation by default
        assert record["examples"] == 39 and record["steps"] == 3 * math.ceil(39 / per_step)  # 42 rows, 3 of them kept back
    adapter = read_json(out / f"{MUON}/gsm8k/adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"], len(adapter["target_modules"])) == (16, 32, 7)
    unused = [f"optimizer.muon.{key}" for key in ("beta1", "beta2", "eps", "mu")]
    spoken = told.replace(",", " ").split()
    assert [spoken.count(name) for name in unused] == [1] * 4 and told.count("not used") == 1
    (pair,) = read_json(out / "logs/final_results.json")["pairs"]
    after = pair["points"][0]["states"]["after_stage2"]
    assert {"precision", "recall", "f1"} <= set(after["aqua_rat"]) and "f1" not in after["gsm8k"]
    assert after["aqua_rat"]["recall"] == pytest.approx(after["aqua_rat"]["exact_match"])
    items = read_jsonl(out / f"{MUON}/gsm8k_to_aqua_rat/eval/aqua_rat.jsonl")
    assert len(items) == 5 and all(item["gold"] in "ABCDE" and item["reference"] == item["gold"] for item in items)


def test_the_plan_that_is_printed_is_the_one_that_runs(seed_run):
    """Rows that are kept back do not count as rows to train on, nor for the steps."""
    out, told = seed_run
    for task in ("gsm8k", "aqua_rat"):
        shown = next(line.split() for line in told.splitlines() if line.startswith(task))
        assert (shown[1], shown[-1], shown[-2]) == ("39", "9", "9")


def test_resuming_by_name(seed_run, seed_style, tmp_path):
    """Checkpoints of another folder: of stage 1, of stage 2, and a run's folder; the same bits at the end."""
    out, _ = seed_run
    run, first = f"{MUON}/gsm8k_to_aqua_rat", f"{MUON}/gsm8k"
    told = without_pictures([*seed_style, "--output-dir", str(tmp_path / "a"), "--resume-stage1",
                             str(out / first / "checkpoints/stage1_checkpoint_epoch_2_step_6")])  # fmt: skip
    assert f"resumed    {first} after step 6 of 9" in told and adapters(tmp_path / "a") == adapters(out)
    assert [row["step"] for row in read_jsonl(tmp_path / "a" / first / "metrics.jsonl")] == [9]
    told = without_pictures([*seed_style, "--output-dir", str(tmp_path / "b"), "--resume-stage2", str(out / run)])
    assert f"resumed    {run} after step 8 of 9" in told and told.count("resumed    ") == 1
    assert adapters(tmp_path / "b") == adapters(out) and cells(tmp_path / "b") == cells(out)


@pytest.mark.parametrize(
    "more, told",
    [
        (["--learning_rate", "1e-3"], "is the checkpoint of no run of this study"),
        (["--optimizer", "adamw"], "is the checkpoint of no run of this study"),
        (["--datasets", "aqua_rat,gsm8k"], "is the checkpoint of no run of this study"),
        (["--compare-optimizers"], "--optimizer takes one optimizer"),
        (["--seeds", "0,1"], "names one run's checkpoint, and there are several seeds"),
        (["--skip-training"], "trains and --skip_training does not"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(seed_run, seed_style, tmp_path, capsys, more, told):
    folder = seed_run[0] / f"{MUON}/gsm8k/checkpoints/stage1_checkpoint_epoch_2_step_6"
    assert told in one_line([*seed_style, "--output-dir", str(tmp_path), "--resume-stage1", str(folder), *more], capsys)
    assert not adapters(tmp_path)


@pytest.mark.parametrize(
    "more, differs",
    [
        (["--lora_rank", "4"], "lora.rank: 16 there, 4 asked"),
        (["--momentum", "0.5"], "optimizer.momentum: 0.95 there, 0.5 asked"),
        (["--epochs", "2"], "steps: 9 there, 6 asked"),
        (["--seed", "1"], "seed: 0 there, 1 asked"),
        (["--max_grad_norm", "0.1"], "max_grad_norm: 1.0 there, 0.1 asked"),
        (["--dtype", "bfloat16"], "dtype: float32 there, bfloat16 asked"),
        (["--max_train", "20"], "tokens: "),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(seed_run, seed_style, tmp_path, capsys, more, differs):
    folder = seed_run[0] / f"{MUON}/gsm8k/checkpoints/stage1_checkpoint_epoch_2_step_6"
    assert train.main([*seed_style, "--output-dir", str(tmp_path), "--resume-stage1", str(folder), *more]) == 2
    line, *differences = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "is of another training; ask for the same settings" in line
    assert any(text.strip().startswith(differs) for text in differences), differences
    assert not adapters(tmp_path)


def test_no_checkpoint_there(seed_style, tmp_path, capsys):
    told = one_line([*seed_style, "--output-dir", str(tmp_path), "--resume-stage1", str(tmp_path / "nowhere")], capsys)
    assert str(tmp_path / "nowhere") in told


def test_skip_training(seed_run, seed_style, tmp_path, capsys, monkeypatch, no_pictures):
    """Trains nothing: what is there is scored, what is not is told."""
    out = Path(shutil.copytree(seed_run[0], tmp_path / "copy", symlinks=True))
    shutil.rmtree(out / f"{MUON}/gsm8k_to_aqua_rat")
    (out / f"{MUON}/gsm8k/eval/gsm8k.jsonl").unlink()
    monkeypatch.setattr(train, "train_run", lambda *_: pytest.fail("it trains"))
    before = times(out, "adapter_model.safetensors")
    command = [*seed_style, "--output-dir", str(out), "--skip-training"]
    status = train.main(command)
    told = capsys.readouterr()
    assert "2 runs, 1 of them done before; the other 1 are not trained, as asked" in told.out
    assert cells(out) == {name: content for name, content in cells(seed_run[0]).items() if "_to_" not in name}
    assert times(out, "adapter_model.safetensors") == before
    assert (status, "no optimizer has both its stages trained and scored yet" in told.err) == (2, True)
    whole = Path(shutil.copytree(seed_run[0], tmp_path / "whole", symlinks=True))
    for file in whole.rglob("eval/*.jsonl"):
        file.unlink()
    assert train.main([*seed_style, "--output-dir", str(whole), "--skip-training"]) == 0
    assert cells(whole) == cells(seed_run[0])
    assert (whole / "logs/final_results.json").read_bytes() == (seed_run[0] / "logs/final_results.json").read_bytes()
