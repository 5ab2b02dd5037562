"""train.py and eval.py from end to end, on a random Llama of 80 thousand parameters and two built-in tasks."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny import SMALL, TASKS, adapters, cells, one_line, times, words

import eval as evaluation
import train
from study.folder import read_json, read_jsonl

PAIRS = ("mini_svamp_to_mini_simpleqa", "mini_simpleqa_to_mini_svamp")
ARM_FOLDERS = ("lora_transfer", "mask/bottom10_group", "mask/highest")
RUNS = [f"lora_base/{task}" for task in TASKS] + [f"{arm}/{pair}" for arm in ARM_FOLDERS for pair in PAIRS]
METRICS = {"exact_match", "flexible_match", "string_match", "rougeL", "answer_nll"}


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than everything else here, and one study with its pictures is enough."""
    monkeypatch.setattr("study.report.draw_all", lambda rows, folder: [])


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory) -> Path:
    """The whole study in one go, pictures and all; to be looked at, not written to."""
    out = tmp_path_factory.mktemp("study") / "one_go"
    assert train.main(words(tiny, out)) == 0
    return out


@pytest.fixture
def study(finished, tmp_path) -> Path:
    """A copy of it to be maltreated."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# ----------------------------------------------------------------------------------------------------------------------
# What a study leaves behind


def test_layout(finished):
    def below(folder):
        return {path.name for path in (finished / folder).iterdir()}

    assert {"config.yaml", "study.json", "lora_base", "lora_transfer", "mask", "perplexity", "eval_results_mask.json",
            "performance_matrices_mask", "tensorboard"} <= below(".")  # fmt: skip
    assert below("lora_base") == set(TASKS) and below("lora_transfer") == set(PAIRS)
    assert below("mask") == {"bottom10_group", "highest"} and below("mask/bottom10_group") == below("mask/highest") == set(PAIRS)
    assert set(adapters(finished)) == set(RUNS)
    for run in RUNS:
        assert {"adapter_model.safetensors", "adapter_config.json", "run.json", "metrics.jsonl", "eval"} <= below(run)
        assert below(f"{run}/eval") == {f"{task}.jsonl" for task in TASKS}
    assert below("base/eval") == {f"{task}.jsonl" for task in TASKS}
    labels = ("lora_transfer", "mask_bottom10", "mask_highest")
    assert {f"heatmap_{metric}_{label}.png" for metric in ("exact_match", "rougeL") for label in labels} | {
        "bar_base_lora_exact_match.png"
    } <= below("performance_matrices_mask")
    leftovers = [path for path in finished.rglob("*") if path.name.endswith((".tmp", ".partial", ".writing"))]
    assert not leftovers
    for picture in (finished / "performance_matrices_mask").iterdir():
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 5000


def test_records(finished, tiny):
    record = read_json(finished / "study.json")
    assert record["command"].startswith("python train.py --model") and {"torch", "python"} <= set(record["versions"])
    assert record["model"] == tiny and set(record["identity"]["data"]) == set(TASKS) and record["hardware"]["cores"]
    run = read_json(finished / "mask/highest" / PAIRS[0] / "run.json")
    assert run["status"] == "done" and run["run"]["parent"] == "lora_base/mini_svamp" and run["reference"] == "start"
    assert run["steps"] == run["outcomes"]["stepped"] == 3 and run["examples"] == 24 and run["template"] == "plain"
    assert 0 < run["mask"]["dropped_share"] < 1 and run["base_fingerprint"] == record["identity"]["model"]
    assert read_json(finished / "lora_transfer" / PAIRS[0] / "run.json")["mask"]["dropped_share"] == 0
    (first, *_, last) = read_jsonl(finished / "lora_base/mini_svamp/metrics.jsonl")
    assert first["step"] == 1 and first["tokens"] > 0 and last["train/final_loss" if "train/final_loss" in last else "train/loss"] > 0
    for item in read_jsonl(finished / "base/eval/mini_svamp.jsonl"):
        assert {"prompt", "output", "extracted", "gold", "correct", "answer_nll"} <= set(item)
        assert item["prompt"].endswith("Output:") and item["gold"] is not None and item["answer_nll"] > 0


def test_results_schema(finished):
    rows = read_json(finished / "eval_results_mask.json")["results"]
    wanted = {"run", "arm", "first", "second", "task", "metric", "value", "low", "high", "n", "unparsed", "seed"}
    assert all(wanted <= set(row) for row in rows)
    scored = {(row["run"], row["task"]) for row in rows}
    assert scored == {(run, task) for run in ["base", *RUNS] for task in TASKS}
    for run, task in scored:
        mine = {row["metric"]: row for row in rows if (row["run"], row["task"]) == (run, task)}
        assert set(mine) >= METRICS
        assert all(row["low"] <= row["value"] <= row["high"] and row["seed"] == 0 for row in mine.values())
        assert mine["exact_match"]["n"] == 6 and 0 <= mine["exact_match"]["value"] <= 1
    arms = {row["run"]: (row["arm"], row["first"], row["second"]) for row in rows}
    assert arms["base"] == ("base", None, None) and arms["lora_base/mini_svamp"] == ("none", "mini_svamp", None)
    assert arms[f"mask/bottom10_group/{PAIRS[1]}"] == ("bottom10", "mini_simpleqa", "mini_svamp")


def test_one_tensorboard_run_per_training_run(finished):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    board = EventMultiplexer().AddRunsFromDirectory(str(finished / "tensorboard"))
    board.Reload()
    assert set(board.Runs()) == {run.replace("/", "__") for run in RUNS} | {"study"}
    assert sum(1 for _ in (finished / "tensorboard").rglob("*tfevents*")) == len(RUNS) + 1
    for run in RUNS:
        tags, accumulator = board.Runs()[run.replace("/", "__")], board.GetAccumulator(run.replace("/", "__"))
        assert {"train/loss", "train/learning_rate", "train/grad_norm", "train/kept_share", "train/tokens_per_s"} <= set(tags["scalars"])
        assert "_hparams_/session_start_info" in accumulator.summary_metadata
        assert any(tag.startswith("mask/example_0") for tag in tags["tensors"])  # text
        assert ("mask/log10_perplexity" in tags["histograms"]) == run.startswith("mask/")
    assert "heatmap_exact_match_mask_bottom10" in board.Runs()["study"]["images"]


# ----------------------------------------------------------------------------------------------------------------------
# Continuing


def test_the_header_names_the_configuration_that_was_read(tiny, tmp_path, no_pictures, capsys):
    (tmp_path / "mine.yaml").write_text("training:\n  stage1: {max_steps: 1}\n")
    assert train.main(words(tiny, tmp_path / "out", "--stage", 1, "--config", tmp_path / "mine.yaml")) == 0
    assert "mine.yaml; LoRA r 16" in capsys.readouterr().out


def test_the_same_command_again_has_nothing_to_do(study, tiny, capsys, no_pictures):
    before = times(study, "adapter_model.safetensors") | times(study, "*.jsonl") | times(study, "run.json")
    assert train.main(words(tiny, study)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert times(study, "adapter_model.safetensors") | times(study, "*.jsonl") | times(study, "run.json") == before
    assert read_json(study / "study.json")["continued"]


def test_selections_add_up_to_the_same_study(finished, tiny, tmp_path, no_pictures):
    out = tmp_path / "pieces"
    assert train.main(words(tiny, out, "--stage", 1)) == 0
    assert set(adapters(out)) == set(RUNS[:2])
    assert train.main(words(tiny, out, "--stage", 2, "--mask", "bottom10", "--pairs", "mini_svamp:mini_simpleqa")) == 0
    assert set(adapters(out)) == {*RUNS[:2], f"mask/bottom10_group/{PAIRS[0]}"}
    assert train.main(words(tiny, out)) == 0
    assert adapters(out) == adapters(finished) and cells(out) == cells(finished)


def test_stage_2_alone_trains_its_parents_first(finished, tiny, tmp_path, no_pictures):
    assert train.main(words(tiny, tmp_path, "--stage", 2, "--mask", "highest", "--pairs", "mini_svamp:mini_simpleqa")) == 0
    mine = adapters(tmp_path)
    assert set(mine) == {"lora_base/mini_svamp", f"mask/highest/{PAIRS[0]}"}
    assert all(content == adapters(finished)[run] for run, content in mine.items())


def test_another_identity_is_refused(study, tiny, capsys):
    before = adapters(study)
    assert train.main(words(tiny, study, "--learning_rate", "2e-3", "--lora_rank", "4")) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "learning_rate: 0.01 in the folder, 0.002 asked" in told
    assert "lora.rank: 16 in the folder, 4 asked" in told
    assert adapters(study) == before


@pytest.mark.parametrize("run", [RUNS[1], RUNS[4]])
def test_a_run_without_its_manifest_is_trained_again(study, finished, tiny, run, no_pictures):
    (study / run / "run.json").unlink()
    (study / run / "adapter_model.safetensors").write_bytes(b"cut short")
    others = {name: when for name, when in times(study, "adapter_model.safetensors").items() if not name.startswith(run)}
    assert train.main(words(tiny, study)) == 0
    assert adapters(study) == adapters(finished) and cells(study) == cells(finished)
    assert {name: when for name, when in times(study, "adapter_model.safetensors").items() if not name.startswith(run)} == others


def test_ctrl_c_keeps_what_is_done(finished, tiny, tmp_path, monkeypatch, capsys, no_pictures):
    whole_fit, runs_begun = train.fit, []

    def stopped_in_the_fourth(*args, **kwargs):
        runs_begun.append(1)
        for step in whole_fit(*args, **kwargs):
            yield step
            if len(runs_begun) == 4 and step.number == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", stopped_in_the_fourth)
    assert train.main(words(tiny, tmp_path)) == 130
    assert "stopped" in capsys.readouterr().err and len(adapters(tmp_path)) == 3
    assert not list(tmp_path.rglob("eval"))
    monkeypatch.setattr(train, "fit", whole_fit)
    kept = times(tmp_path, "adapter_model.safetensors")
    assert train.main(words(tiny, tmp_path)) == 0
    assert kept.items() <= times(tmp_path, "adapter_model.safetensors").items()
    assert adapters(tmp_path) == adapters(finished) and cells(tmp_path) == cells(finished)


def test_ctrl_c_while_scoring(study, finished, tiny, monkeypatch, no_pictures):
    for file in study.rglob("eval/*.jsonl"):
        file.unlink()
    score, scored = evaluation.score_task, []

    def stopped_in_the_third(*args, **kwargs):
        scored.append(1)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    monkeypatch.setattr(evaluation, "score_task", stopped_in_the_third)
    assert evaluation.main(["--root", str(study)]) == 130 and len(cells(study)) == 2
    monkeypatch.setattr(evaluation, "score_task", score)
    assert evaluation.main(["--root", str(study)]) == 0
    assert cells(study) == cells(finished)


def test_ctrl_c_while_drawing(study, tiny, monkeypatch, capsys, no_pictures):
    """The pictures of a study are owed until they are there, also where older results lie in the folder."""
    (study / "base/eval/mini_svamp.jsonl").unlink()

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("study.report.draw_all", stopped)
        assert train.main(words(tiny, study)) == 130
    capsys.readouterr()
    assert train.main(words(tiny, study)) == 0 and "nothing to do" not in capsys.readouterr().out
    assert train.main(words(tiny, study)) == 0 and "nothing to do" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# eval.py


def test_eval_fills_the_missing_cell_only(study, finished, capsys, no_pictures):
    gone = study / "mask/highest" / PAIRS[0] / "eval/mini_svamp.jsonl"
    gone.unlink()
    (study / "eval_results_mask.json").unlink()
    before = times(study, "eval/*.jsonl") | times(study, "adapter_model.safetensors")
    assert evaluation.main(["--root", str(study)]) == 0
    assert "scored     1 missing cell" in capsys.readouterr().out
    assert cells(study) == cells(finished) and before.items() <= times(study, "*.*").items()
    assert read_json(study / "eval_results_mask.json") == read_json(finished / "eval_results_mask.json")


def test_eval_takes_the_newest_study_and_selects_tasks(study, tmp_path, monkeypatch, capsys, no_pictures):
    (tmp_path / "out").mkdir()
    shutil.move(study, tmp_path / "out" / "older")
    shutil.copytree(tmp_path / "out/older", tmp_path / "out/newer")
    os.utime(tmp_path / "out/older/study.json", ns=(1, 1))
    for file in (tmp_path / "out/newer/base/eval").iterdir():
        file.unlink()
    monkeypatch.chdir(tmp_path)
    assert evaluation.main(["--tasks", "mini_svamp"]) == 0
    assert "study      out/newer" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out/newer/base/eval").iterdir()] == ["mini_svamp.jsonl"]
    assert evaluation.main(["--tasks", "gsm8k"]) == 2 and "it has mini_svamp, mini_simpleqa" in capsys.readouterr().err


def test_replot_scores_nothing(study, no_pictures, monkeypatch):
    (study / "base/eval/mini_svamp.jsonl").unlink()
    monkeypatch.setattr(evaluation, "load_subject", None)
    assert evaluation.main(["--root", str(study), "--replot"]) == 0
    rows = read_json(study / "eval_results_mask.json")["results"]
    assert ("base", "mini_svamp") not in {(row["run"], row["task"]) for row in rows}


def test_eval_of_any_model_and_adapter(finished, tiny, tmp_path, capsys):
    run = finished / "lora_base/mini_svamp"
    command = ["--model", tiny, "--tasks", "mini_svamp", "--max_test", "6", "--max_new_tokens", "8", "--device", "cpu"]
    command += ["--out", str(tmp_path)]
    assert evaluation.main([*command, "--adapter", str(run)]) == 0
    told = capsys.readouterr().out
    assert "on 14 linears" in told and "exact_match" in told
    assert read_jsonl(tmp_path / "eval/mini_svamp.jsonl") == read_jsonl(run / "eval/mini_svamp.jsonl")
    rows = read_json(tmp_path / "eval_results.json")["results"]
    assert {row["metric"] for row in rows} >= METRICS and all(row["adapter"] == str(run) for row in rows)
    assert evaluation.main(command) == 0  # without: the base
    assert read_jsonl(tmp_path / "eval/mini_svamp.jsonl") == read_jsonl(finished / "base/eval/mini_svamp.jsonl")
    assert "unmerged" not in read_json(tmp_path / "eval_results.json")


def test_an_adapter_beside_the_weights_answers_alike(finished, tiny, tmp_path, capsys):
    command = ["--model", tiny, "--tasks", "mini_svamp", "--max_test", "6", "--max_new_tokens", "8", "--device", "cpu"]
    command += ["--out", str(tmp_path), "--adapter", str(finished / "lora_base/mini_svamp"), "--no_merge"]
    assert evaluation.main(command) == 0
    found = read_json(tmp_path / "eval_results.json")["unmerged"]["mini_svamp"]
    assert (found["n"], found["outputs"], found["answers"], found["flips"]) == (6, 0, 0, 0) and 0 < found["answer_nll"] < 1e-4
    assert "0 of 6 outputs, 0 answers and 0 verdicts differ" in capsys.readouterr().out
    one = {"output": "A", "extracted": "a", "exact_match": True, "answer_nll": 1.0}
    other = {"output": "B", "extracted": None, "exact_match": False, "answer_nll": 1.5}
    told = evaluation.differences_of([one, one, one], [one, {**one, "output": "C"}, other])
    assert told == {"n": 3, "outputs": 2, "answers": 1, "flips": 1, "answer_nll": 0.5}


# ----------------------------------------------------------------------------------------------------------------------
# Arms, seeds, types, inspection


def test_several_seeds(tiny, tmp_path, no_pictures, finished):
    assert train.main(words(tiny, tmp_path, "--seeds", "0,1", "--mask", "highest", "--pairs", "mini_svamp:mini_simpleqa")) == 0
    runs = {"lora_base/mini_svamp", "lora_base/mini_simpleqa", f"mask/highest/{PAIRS[0]}"}
    assert set(adapters(tmp_path)) == {f"seed{n}/{run}" for n in (0, 1) for run in runs}
    for run in runs:
        assert adapters(tmp_path / "seed0")[run] == adapters(finished)[run] != adapters(tmp_path / "seed1")[run]
    rows = read_json(tmp_path / "eval_results_mask.json")["results"]
    assert {row["seed"] for row in rows} == {0, 1}
    for n in (0, 1):
        assert (tmp_path / f"seed{n}/study.json").is_file() and (tmp_path / f"seed{n}/tensorboard").is_dir()
        assert read_json(tmp_path / f"seed{n}/eval_results_mask.json")["results"] == [row for row in rows if row["seed"] == n]
    assert train.main(words(tiny, tmp_path)) == 2  # one seed into the folder of several would be lost to sight
    before = times(tmp_path, "*.jsonl")
    assert evaluation.main(["--root", str(tmp_path)]) == 0 and times(tmp_path, "*.jsonl") == before


@pytest.mark.parametrize(
    "reference, arms, more",
    [
        ("start", "lowest,random,dpf,stm_dpf,soft", []),
        ("base", "highest,bottom10,lowest,random,dpf,stm_dpf,soft", ["--match", "bottom10"]),
        ("online", "highest,bottom10,lowest,random,soft", ["--direction", "low_confidence", "--normalize", "all", "--mask_end"]),
    ],
)
def test_every_mask_runs(tiny, tmp_path, no_pictures, reference, arms, more):
    # A threshold at which a random model (perplexities around the vocabulary's 2048) keeps some tokens and drops others.
    command = words(tiny, tmp_path, "--mask", arms, "--reference", reference, "--pairs", "mini_simpleqa:mini_svamp",
                    "--max_test", 2, "--threshold", 2000, "--tau", 3000, *more)  # fmt: skip
    assert train.main(command) == 0
    shares = {}
    for arm in arms.split(","):
        folder = tmp_path / "mask" / {"bottom10": "bottom10_group"}.get(arm, arm) / PAIRS[1]
        run = read_json(folder / "run.json")
        assert run["status"] == "done" and run["reference"] == reference and sum(run["outcomes"].values()) == 3
        shares[arm] = run["mask"]["dropped_share"]
    assert len({content for run, content in adapters(tmp_path).items() if run.startswith("mask")}) == len(arms.split(","))
    # Under their own model's losses each arm soon sees other losses, so there the counts match at the first step only.
    assert abs(shares["lowest"] - shares["random"]) <= (0.05 if reference == "online" else 0) and 0 < shares["random"] < 1
    assert len(list((tmp_path / "perplexity").glob("*"))) == {"start": 2, "base": 2, "online": 0}[reference]


def test_dpf_alone_trains_the_model_that_it_compares_with(tiny, tmp_path, no_pictures, capsys):
    command = words(tiny, tmp_path, "--mask", "dpf", "--pairs", "mini_svamp:mini_simpleqa", "--threshold", 0)
    assert "--stage 1 first" in one_line([*command, "--inspect", "1"], capsys)
    assert train.main([*command, "--stage", "2"]) == 0
    assert set(adapters(tmp_path)) == {"lora_base/mini_svamp", "lora_base/mini_simpleqa", f"mask/dpf/{PAIRS[0]}"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_on_the_cpu(tiny, tmp_path, no_pictures, dtype):
    command = words(tiny, tmp_path, "--dtype", dtype, "--mask", "highest", "--pairs", "mini_svamp:mini_simpleqa", "--max_test", 2)
    assert train.main(command) == 0
    run = read_json(tmp_path / "mask/highest" / PAIRS[0] / "run.json")
    assert run["dtype"] == dtype and run["final_loss"] > 0 and run["outcomes"]["stepped"] >= 1


def test_scores_while_training(tiny, tmp_path, no_pictures, finished):
    command = words(tiny, tmp_path, "--pairs", "mini_svamp:mini_simpleqa", "--mask", "none", "--eval_steps", 1, "--eval_items", 2)
    assert train.main(command) == 0
    logged = [row for row in read_jsonl(tmp_path / "lora_transfer" / PAIRS[0] / "metrics.jsonl") if "eval/mini_svamp/exact_match" in row]
    assert [row["step"] for row in logged] == [1, 2, 3]
    assert all(row["eval/mini_simpleqa/answer_nll"] > 0 and 0 <= row["eval/mini_simpleqa/exact_match"] <= 1 for row in logged)
    mine = adapters(tmp_path)
    assert all(content == adapters(finished)[run] for run, content in mine.items())  # looking changes nothing


def test_selected_tasks_are_scored_alone(tiny, tmp_path, no_pictures):
    assert train.main(words(tiny, tmp_path, "--stage", 1, "--tasks", "mini_svamp")) == 0
    assert {Path(name).stem for name in cells(tmp_path)} == {"mini_svamp"}


def test_inspect_trains_nothing(tiny, tmp_path, capsys):
    assert train.main(words(tiny, tmp_path, "--mask", "bottom10", "--inspect", 3, "--pairs", "mini_simpleqa:mini_svamp")) == 0
    told = capsys.readouterr().out
    assert not adapters(tmp_path) and told.count("answer tokens dropped") == 3 and "[-" in told
    (page,) = (tmp_path / "inspect").glob("*.html")
    text = page.read_text()
    assert text.count("<h2>") == 3 and "class=dropped" in text and "http" not in text
    assert train.main(words(tiny, tmp_path, "--stage", 1)) == 0  # the study it lies in can still be trained


def test_a_file_of_ones_own(tiny, tmp_path, no_pictures):
    rows = [{"prompt": f"What follows {i}?", "answer": str(i + 1)} for i in range(30)] + [{"prompt": "Nothing?"}]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--model", tiny, "--datasets", f"counting={file},mini_svamp", *SMALL, "--out", str(tmp_path / "out"), "--mask", "none"]
    assert train.main(command) == 0
    assert set(adapters(tmp_path / "out")) == {"lora_base/counting", "lora_base/mini_svamp", "lora_transfer/counting_to_mini_svamp",
                                               "lora_transfer/mini_svamp_to_counting"}  # fmt: skip
    (tmp_path / "out/base/eval/counting.jsonl").unlink()
    assert evaluation.main(["--root", str(tmp_path / "out")]) == 0  # finds the file again
    file.write_text(file.read_text() + json.dumps(rows[0]) + "\n")
    assert evaluation.main(["--root", str(tmp_path / "out")]) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: exit 2 and one line that names the thing


def broken_model(tiny, folder, change) -> str:
    shutil.copytree(tiny, folder)
    change(Path(folder))
    return str(folder)


def drop_key(folder):
    config = read_json(folder / "config.json")
    del config["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(config))


def cut_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "change, named",
    [
        (cut_weights, "model.safetensors is cut"),
        (drop_key, "num_attention_heads"),
        (lambda folder: (folder / "config.json").write_text('{"hidden_size": 3'), "config.json is no valid JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0", "mod'), "tokenizer.json is cut"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickled"),
    ],
    ids=["cut weights", "config without a key", "cut config", "no config", "no tokenizer", "cut tokenizer", "pickled"],
)
def test_broken_models(tiny, tmp_path, capsys, change, named):
    model = broken_model(tiny, tmp_path / "broken", change)
    assert named in one_line(["--model", model, "--datasets", "mini_svamp", *SMALL, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, named",
    [
        (["--model", "no/such/folder"], "no model folder 'no/such/folder'"),
        (["--datasets", "mini_svam,mini_simpleqa"], "did you mean mini_svamp"),
        (["--datasets", "mine=/no/such/file.jsonl"], "/no/such/file.jsonl: no such file"),
        (["--datasets", ","], "--datasets names no task"),
        (["--mask", "botom10"], "did you mean 'bottom10'"),
        (["--learnin_rate", "1"], "did you mean --learning_rate"),
        (["--learning_rate", "fast"], "--learning_rate must be a number"),
        (["--learning_rate", "nan"], "--learning_rate must be a number"),
        (["--learning_rate", "-1"], "--learning_rate must be above 0"),
        (["--pairs", "mini_svamp:gsm8k"], "'gsm8k' is not among the tasks"),
        (["--datasets", "mini_svamp", "--stage", "2"], "needs a second task"),
        (["--lora_targets", "q_proj,w_proj"], "w_proj"),
        (["--threshold", "0", "--mask", "highest"], "threshold"),
        (["--match", "dpf", "--mask", "random"], "match"),
        (["--reference", "online", "--mask", "dpf"], "--reference start or base"),
        (["--seeds", "0,one"], "--seeds must be whole numbers"),
        (["--out", "{modell}"], "did you mean 'model'"),
        (["--config", "configs/nanoo.yaml"], "did you mean 'nano.yaml'"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--threshold", "1.0000001", "--mask", "highest", "--mask_end"], "the mask keeps no token"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_requests(tiny, tmp_path, capsys, more, named):
    assert named in one_line(words(tiny, tmp_path / "out", *more), capsys)


@pytest.mark.parametrize(
    "content, named",
    [
        ('[{"instruction": "a", "output": "b"}, {"instruction": "c", "outp', "mine.json:1"),
        ('[\n {"instruction": "a", "output": "b"},\n {"instruction": "c"},\n {"instruction": "d", "output": ""}', "mine.json"),
        ('[{"instruction": "a"}, {"instruction": "b", "output": ""}]', "no output"),
        ("[]", "mine.json"),
        ("", "mine.json"),
        ('[{"instruction": "a", "output": "b"}]', "one row only"),
    ],
    ids=["cut in a row", "cut after a row", "no output", "empty array", "empty file", "one row"],
)
def test_bad_data(tiny, tmp_path, capsys, content, named):
    file = tmp_path / "mine.json"
    file.write_text(content)
    told = one_line(["--model", tiny, "--datasets", f"mine={file}", "--stage", "1", *SMALL, "--out", str(tmp_path / "out")], capsys)
    assert str(file) in told and named in told


def test_no_answer_fits(tiny, tmp_path, capsys):
    told = one_line(words(tiny, tmp_path / "out", "--max_length", 2), capsys)
    assert "no answer fits into --max_length 2" in told and "mini_svamp" in told


def test_out_that_cannot_be_written(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in one_line(words(tiny, tmp_path / "file"), capsys)
    assert str(tmp_path / "file/below") in one_line(words(tiny, tmp_path / "file/below"), capsys)
    if os.path.isdir("/proc/1"):
        assert "/proc/lethe" in one_line(words(tiny, "/proc/lethe"), capsys)


def test_a_disk_that_is_full(study, tiny, capsys, monkeypatch, no_pictures):
    """The write of an adapter fails: what was there stays, and the message says how to go on."""
    (study / RUNS[1] / "run.json").unlink()

    def full(*_, **__):  # what safetensors raises: no OSError
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("model.checkpoint.save_file", full)
    before = {run: content for run, content in adapters(study).items() if run != RUNS[1]}
    told = one_line(words(tiny, study), capsys)
    assert "no space left" in told and "same command again" in told
    assert {run: content for run, content in adapters(study).items() if run != RUNS[1]} == before


def test_out_of_memory(tiny, tmp_path, capsys, monkeypatch):
    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMuch more text")

    monkeypatch.setattr(train, "fit", too_much)
    told = one_line(words(tiny, tmp_path / "out"), capsys)
    assert "Tried to allocate 9 GiB" in told and "add --gradient_checkpointing, lower --max_length" in told


def test_half_an_environment_of_torchrun_is_refused(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start with torchrun" in one_line(words(tiny, tmp_path / "out"), capsys)


def test_two_files_of_one_name_are_refused(tiny, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{name} {i}", "answer": "{i}"}}\n' for i in range(4)))
    both = f"mine={tmp_path}/a.jsonl,mine={tmp_path}/b.jsonl"
    assert train.main(["--model", tiny, "--datasets", both, "--out", str(tmp_path / "out")]) == 2
    assert "two different files 'mine'" in capsys.readouterr().err


def test_nothing_to_inspect_is_said(tiny, tmp_path, capsys):
    assert train.main(words(tiny, tmp_path / "out", "--mask", "none", "--inspect", 1)) == 2
    assert "name one with --mask" in capsys.readouterr().err
