"""Pretraining through the same loop: one model on a corpus, and the study of a grown model against one from scratch."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from ranks import run_ranks
from tiny import NARROW, one_line, raw_config, write_folder

import eval as evaluation
import train
from data.corpus import load_corpus
from lora.states import fresh_model
from model import load_model
from model.checkpoint import NANO, load_config
from model.config import LlamaConfig, training_flops
from model.tokenizer import load_tokenizer
from study.config import parse
from study.errors import LetheError
from study.folder import newest_study, read_json, read_jsonl
from study.growth import Curve, Grown, flops_at, speed_up, stage_scores
from study.sequence import Sequence

SHAPE = "{hidden_size: 32, intermediate_size: 64, num_attention_heads: 2, num_hidden_layers: 2}"
LITTLE = ["--tokens", "4000", "--row_length", "32", "--rows_per_step", "8", "--held_out", "4", "--pretraining.log_steps", "4",
          "--pretraining.eval_steps", "5", "--pretraining.save_steps", "6", "--device", "cpu"]  # fmt: skip


def command(out, *more):
    return ["--corpus", "builtin", "--fresh", "--shape", SHAPE, *LITTLE, "--out", str(out), *map(str, more)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished pretraining."""
    out = tmp_path_factory.mktemp("pretraining") / "out"
    assert train.main(command(out)) == 0
    return out


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_model_learns_and_is_a_hugging_face_folder(whole):
    transformers = pytest.importorskip("transformers")
    record = read_json(whole / "model" / "pretraining.json")
    assert record["same"]["steps"] == 16 and record["tokens"] == 16 * 8 * 32 and record["outcomes"] == {"stepped": 16}
    lines = read_jsonl(whole / "model" / "metrics.jsonl")
    curve = {line["step"]: line["eval/nll"] for line in lines if "eval/nll" in line}
    assert list(curve) == [0, 5, 10, 15, 16] and abs(curve[0] - math.log(2048)) < 0.1 and curve[16] < curve[0] - 0.5
    corpus = load_corpus("builtin", load_tokenizer(NANO), whole / "tokens", tokens=4000, row_length=32, held_out=4)
    ids = torch.tensor(np.stack([corpus.row(len(corpus) + i) for i in range(4)]).astype(np.int64))
    peer = transformers.LlamaForCausalLM.from_pretrained(whole / "model", dtype=torch.float32)
    with torch.no_grad():
        expected = float(peer(input_ids=ids, labels=ids).loss)
    assert curve[16] == pytest.approx(expected, abs=1e-4) == record["held_out_nll"]
    assert load_config(whole / "model").num_hidden_layers == 2 and (whole / "tensorboard" / "model").is_dir()


def test_the_same_command_finds_it_and_another_is_refused(whole, capsys):
    before = (whole / "model" / "model.safetensors").stat().st_mtime_ns
    assert train.main(command(whole)) == 0
    assert (whole / "model" / "model.safetensors").stat().st_mtime_ns == before
    capsys.readouterr()
    assert train.main(command(whole, "--pretraining.learning_rate", "1e-3")) == 2
    told = capsys.readouterr().err
    assert "is of another training" in told and "optimizer.learning_rate: 0.008 there, 0.001 asked" in told


def test_a_cut_pretraining_goes_on_with_the_same_bits(whole, tmp_path, monkeypatch, capsys):
    steps = train.fit

    def cut(*args, **kwargs):
        for number, step in enumerate(steps(*args, **kwargs)):
            yield step
            if number == 8:  # behind the checkpoint of step 6
                raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", cut)
    assert train.main(command(tmp_path)) == 130
    assert not (tmp_path / "model" / "model.safetensors").exists()
    monkeypatch.setattr(train, "fit", steps)
    capsys.readouterr()
    assert train.main(command(tmp_path)) == 0
    assert "resumed    model after step 6 of 16" in capsys.readouterr().out
    assert weights(tmp_path / "model") == weights(whole / "model")
    curves = [[line.get("eval/nll") for line in read_jsonl(out / "model" / "metrics.jsonl")] for out in (tmp_path, whole)]
    assert curves[0] == curves[1]


def test_own_weights_go_on_by_adamw(whole, tmp_path):
    """Without --fresh training goes on from the model's weights, here those of the fixture, and one optimizer has all of them."""
    (tmp_path / "more.txt").write_text("A short text that comes again. " * 400)
    words = ["--corpus", tmp_path / "more.txt", "--model", whole / "model", *LITTLE, "--out", tmp_path / "out",
             "--pretraining.optimizer", "adamw", "--pretraining.learning_rate", "3e-3"]  # fmt: skip
    assert train.main([str(word) for word in words]) == 0
    curve = [line["eval/nll"] for line in read_jsonl(tmp_path / "out" / "model" / "metrics.jsonl") if "eval/nll" in line]
    assert curve[-1] < curve[0] - 1
    assert not (tmp_path / "out" / "start").exists()


def test_ranks_share_the_rows(whole, tmp_path):
    done = run_ranks("train.py", *command(tmp_path))
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr + done[1].stderr
    assert done[1].stdout == ""
    alone, two = (load_model(out / "model") for out in (whole, tmp_path))
    for (name, one), other in zip(alone.named_parameters(), two.parameters(), strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-3, name  # sums are rounded in another order, and Muon's steps grow it
    curves = [[line["eval/nll"] for line in read_jsonl(out / "model" / "metrics.jsonl") if "eval/nll" in line] for out in (whole, tmp_path)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


def test_fresh_weights(tmp_path):
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
    found = fresh_model(NANO, shape, 1, tmp_path / "a")
    config = load_config(found)
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads, config.num_hidden_layers) == (128, 32, 4, 3)
    assert config.vocab_size == 2048 and (found / "tokenizer.json").is_file()
    assert weights(found) == weights(fresh_model(NANO, shape, 1, tmp_path / "b")) != weights(fresh_model(NANO, shape, 2, tmp_path / "c"))
    with pytest.raises(LetheError, match="another shape or seed"):
        fresh_model(NANO, {"num_hidden_layers": 3}, 1, tmp_path / "a")
    for shape, told in (({"layers": 3}, "'layers' is not a number of a Llama's shape"), ({"vocab_size": 9}, "'vocab_size' is not"),
                        ({"num_attention_heads": 5}, "cannot be shared by 5 heads"), ({"num_hidden_layers": 0}, "must be 1 or more, not 0"),
                        ({"hidden_size": 63}, "21 numbers cannot have rotary positions")):  # fmt: skip
        with pytest.raises(LetheError, match=told):
            fresh_model(NANO, shape, 0, tmp_path / "d")


def test_flops_are_counted_product_by_product(tmp_path):
    """Against the shapes of a model's weights, and attention written out: every second key is masked."""
    raw = raw_config()
    config = LlamaConfig.from_dict(raw)
    model = load_model(write_folder(tmp_path, raw))
    multiplied = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name) + model.head_weight.numel()
    length, queries = 48, config.num_attention_heads * config.head_dim
    forward = 2 * multiplied + 2 * (2 * queries * length / 2) * config.num_hidden_layers  # q k^T and p v
    assert training_flops(config, length) == 3 * forward


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--corpus", "gone.txt"], "--corpus gone.txt: no such file or folder"),
        (["--learning_rate", "1e-3"], "--learning_rate is of fine-tuning; give --pretraining.learning_rate instead"),
        (["--mask", "highest"], "--mask is of fine-tuning; leave it out"),
        (["--seeds", "1,2"], "--seeds is of fine-tuning"),
        (["--shape", "{num_hidden_layers: two}"], "a mapping of names to whole numbers"),
        (["--sequence", "mini_ask,mini_reply"], "for both add --study growth"),
        (["--tokens", "0"], "above 0"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(more, told, tmp_path, capsys):
    assert told in one_line(command(tmp_path / "out", *more), capsys)


def test_where_it_may_not_be_written_and_what_is_no_study(whole, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "with --out" in one_line(command(tmp_path / "file"), capsys)
    folder = write_folder(tmp_path / "own", raw_config(**NARROW), tokenizer=True)
    assert "is the folder of --model" in one_line(["--corpus", "builtin", "--model", str(folder), "--out", str(folder)], capsys)
    for root, told in ((whole, f"--model {whole / 'model'}"), (whole / "model", "pretrained model"), (tmp_path / "gone", "no folder")):
        assert evaluation.main(["--root", str(root)]) == 2
        assert told in capsys.readouterr().err


def test_a_shape_needs_fresh_weights(tmp_path, capsys):
    assert "add --fresh" in one_line(["--corpus", "builtin", "--shape", SHAPE, "--out", str(tmp_path)], capsys)


# ----------------------------------------------------------------------------------------------------------------------
# Growth

STUDY = ["--study", "growth", "--sequence", "mini_simplify,mini_ask,mini_simplify", "--corpus", "builtin", "--shape", SHAPE,
         *LITTLE, "--source_tokens", "1500", "--full", "--max_train", "16", "--max_test", "6", "--epochs", "1", "--batch_size", "8",
         "--gradient_accumulation", "1", "--max_length", "256", "--max_new_tokens", "6", "--learning_rate", "1e-3", "--mmlu", "mini_mmlu",
         "--max_samples", "20"]  # fmt: skip


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    out = tmp_path_factory.mktemp("growth") / "out"
    assert train.main([*STUDY, "--seeds", "0,1", "--out", str(out)]) == 0
    return out


def test_both_models_cost_the_same(grown):
    records = {name: read_json(grown / "models" / name / "pretraining.json") for name in ("source", "grown", "naive")}
    assert [records[name]["layers"] for name in records] == [1, 2, 2]
    step = records["grown"]["flops_per_token"] * records["grown"]["tokens_per_step"]
    assert abs(records["grown"]["flops"] - records["naive"]["flops"]) <= step / 2
    assert records["grown"]["flops_before"] == records["source"]["flops"] > 0
    assert records["grown"]["same"]["skip"] == records["source"]["same"]["steps"] * 8, "it would see the source's rows again"
    start, source = load_model(grown / "models" / "grown_start"), load_model(grown / "models" / "source")
    for layer in start.model.layers:
        torch.testing.assert_close(layer.mlp.up_proj.weight, source.model.layers[0].mlp.up_proj.weight, rtol=0, atol=0)
    assert records["grown"]["same"]["start"] == start.fingerprint


def test_the_comparison_has_all_of_it(grown):
    found = read_json(grown / "growth_results.json")
    assert list(found["models"]) == ["grown", "naive"] and len(found["pretraining"]) == 3
    for name, model in found["models"].items():
        assert [one["seed"] for one in model["sequences"]] == [0, 1] and np.shape(model["sequences"][0]["R"]) == (3, 2)
        assert model["sequences"][0]["stages"] == ["mini_simplify", "mini_ask", "mini_simplify"]
        stages = {row["stage"] for row in model["fg"] if row["column"] == "mini_mmlu" and row["form"] == "plain"}
        assert stages == {1, 2, 3, "mean", "last"}
        items = [read_jsonl(grown / name / f"seed{seed}" / folder / "eval" / "mini_mmlu.jsonl") for seed in (0, 1)
                 for folder in ("base", "sequence/none/mini_simplify,mini_ask,mini_simplify/3_mini_simplify")]  # fmt: skip
        before, after = (np.mean([item["correct"] for one in items[k::2] for item in one]) for k in (0, 1))
        last = next(row for row in model["fg"] if (row["column"], row["form"], row["stage"]) == ("mini_mmlu", "plain", "last"))
        assert last["value"] == pytest.approx(100 * (before - after) / before) if before else last["value"] is None
        states = {row["state"] for row in model["text"] if row["task"] == "mini_ask" and row["metric"] == "rouge1"}
        assert states == {f"{name}, {state}" for state in ("base", "stage 1: mini_simplify", "stage 2: mini_ask", "stage 3: mini_simplify")}
        assert any(row["metric"] == "sari" for row in model["text"])
    assert imread(grown / "growth.png").shape[1] > 800


def test_again_there_is_nothing_to_train_and_eval_shows_it(grown, capsys):
    stamps = {file: file.stat().st_mtime_ns for file in grown.rglob("model.safetensors")}
    capsys.readouterr()
    assert train.main([*STUDY, "--seeds", "0,1", "--out", str(grown)]) == 0
    told = capsys.readouterr().out
    assert told.count("nothing to do") == 2 and "General forgetting FG" in told
    assert stamps == {file: file.stat().st_mtime_ns for file in grown.rglob("model.safetensors")}
    assert newest_study(grown.parent) == grown
    assert evaluation.main(["--root", str(grown)]) == 0
    again = capsys.readouterr().out
    assert again.count("scored     nothing") == 2 and again[again.index("Pretraining\n") :].split("\n\n")[:3] == \
        told[told.index("Pretraining\n") :].split("\n\n")[:3]  # fmt: skip


def test_a_cut_study_ends_in_the_same_results(grown, tmp_path, monkeypatch, capsys):
    """Cut while the grown model trains, and in its fine-tuning once more."""
    out = Path(shutil.copytree(grown, tmp_path / "copy"))
    shutil.rmtree(out / "models" / "grown"), shutil.rmtree(out / "models" / "grown_start"), shutil.rmtree(out / "grown")
    steps, taken = train.fit, []

    def cut(*args, **kwargs):
        for step in steps(*args, **kwargs):
            yield step
            taken.append(step)
            if len(taken) in (8, 20):  # behind a checkpoint of pretraining; and in its later runs
                raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", cut)
    command = [*STUDY, "--seeds", "0,1", "--out", str(out)]
    assert [train.main(command) for _ in range(3)] == [130, 130, 0]
    assert weights(out / "models" / "grown") == weights(grown / "models" / "grown")
    before, after = ({str(file.relative_to(root)): file.read_bytes() for file in root.rglob("eval/*.jsonl")} for root in (grown, out))
    assert before == after
    results = [read_json(root / "growth_results.json")["models"] for root in (grown, out)]
    assert json.dumps(results[0]).replace(str(grown), "") == json.dumps(results[1]).replace(str(out), "")


def test_models_of_ones_own_are_compared(tmp_path, capsys):
    models = {name: str(write_folder(tmp_path / name, raw_config(**NARROW), seed, tokenizer=True)) for seed, name in enumerate("ab")}
    file = tmp_path / "own.yaml"
    file.write_text(f"study: growth\nmodel: {models['a']}\nsequence: mini_ask,mini_reply\ngrowth: {{models: {json.dumps(models)}}}\n")
    words = ["--config", str(file), "--max_train", "8", "--max_test", "4", "--epochs", "1", "--batch_size", "8", "--max_new_tokens", "4",
             "--gradient_accumulation", "1", "--max_length", "256", "--device", "cpu", "--out", str(tmp_path / "out")]  # fmt: skip
    assert train.main(words) == 0
    told = capsys.readouterr().out
    assert "Pretraining\n" not in told and "Tasks: mini_ask > mini_reply" in told
    assert set(read_json(tmp_path / "out" / "growth_results.json")["models"]) == {"a", "b"}
    assert (tmp_path / "out" / "a" / "lora_base" / "mini_ask" / "adapter_model.safetensors").is_file()  # LoRA where not --full


def test_speed_up_is_read_off_the_curves():
    slow = Curve("naive", {"flops_before": 0.0}, [0.0, 100.0, 200.0], [8.0, 4.0, 3.0])
    fast = Curve("grown", {"flops_before": 50.0}, [50.0, 100.0, 150.0], [6.0, 4.0, 2.0])
    assert flops_at(fast, 3.0) == 125.0 and flops_at(fast, 7.0) == 50.0 and math.isnan(flops_at(slow, 1.0))
    found = speed_up(slow, fast)
    assert found["flops"] == pytest.approx(200 / 125 - 1) and found["own"] == pytest.approx(200 / 75 - 1)
    assert speed_up(slow, slow)["flops"] == 0.0


def test_the_scores_of_stages_have_intervals_over_seeds():
    R = [np.array([[0.8, 0.1], [0.2, 0.7]]), np.array([[0.6, 0.1], [0.2, 0.7]])]
    found = [Sequence("none", "a,b", ["a", "b"], seed, one, np.full((2, 2), 0.03), np.array([0.05, 0.0]), {}) for seed, one in enumerate(R)]
    values, halves = stage_scores([Grown("m", "", found, [], [])], "a")["m"]
    assert values == pytest.approx([0.05, 0.7, 0.2])
    assert halves == pytest.approx([math.nan, 12.706 * 0.1, 0.03], rel=1e-3, nan_ok=True)  # Student's with one degree of freedom


def test_what_a_growth_study_needs():
    words = ["--study", "growth", "--sequence", "mini_ask,mini_reply"]
    config = parse([*words, "--corpus", "builtin"])
    assert (config.study, config.rehearsal.arms, config.datasets) == ("growth", "none", "mini_ask,mini_reply") and "growth" in config.out
    for more, told in (
        ([], "give --corpus builtin"), (["--growth.models", "{a: x}"], "compares two or more"),
        (["--corpus", "builtin", "--shard", "model", "--full", "--rehearsal", "none"], "leave out --shard model"),
        (["--corpus", "builtin", "--growth.factor", "1"], "2 or more"), (["--corpus", "builtin", "--stage", "1"], "leave out --stage"),
    ):  # fmt: skip
        with pytest.raises(LetheError, match=told):
            parse([*words, *more])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--growth.factor", "3"], "2 layers are no multiple of --factor 3"),
        (["--source_tokens", "100000"], "--source_tokens cost more than --tokens allow"),
        (["--growth.order", "pile"], "pile"),
        (["--growth.order", "partial:1*3"], "gives 3 layers, not 2"),
    ],
)
def test_growth_that_cannot_be_is_told_in_one_line(more, told, tmp_path, capsys):
    assert told in one_line([*STUDY, "--out", str(tmp_path / "out"), *more], capsys)
    assert not (tmp_path / "out" / "models" / "source").exists(), "it was trained first"
