"""benchmarks/: the random model loads everywhere, the arithmetic is right, every command runs at toy size and ends in JSON."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import random_examples, raw_config, tiny_model, train_some, write_folder

from benchmarks import common, contenders, loss, study, train_step
from benchmarks.ablations import full_logits, padded, plain_modules
from benchmarks.make_random_llama import main
from data.batching import Examples, collate
from lora import add_lora
from lora.layers import lora_parameters
from masking import score
from model import llama, load_model, load_tokenizer
from study.errors import LetheError

REPO = Path(__file__).parent.parent
ROPE = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64, "rope_type": "llama3"}


@pytest.mark.parametrize("tied, shard_mib", [(True, 1024), (False, 0)], ids=["one file, tied", "a file a tensor"])
def test_transformers_agrees_on_a_random_model(tmp_path, tied, shard_mib):
    from transformers import AutoModelForCausalLM

    raw = raw_config(vocab_size=2048, tie_word_embeddings=tied, rope_scaling=ROPE, initializer_range=0.2, torch_dtype="float16")
    source = write_folder(tmp_path / "source", raw, tokenizer=True)
    (source / "model.safetensors").unlink()  # only the configuration is needed
    made = tmp_path / "made"
    assert main(["--config", str(source), "--out", str(made), "--shard_mib", str(shard_mib)]) == 0
    ids = torch.tensor([load_tokenizer(made).encode("If Ann has 12 pens and gives 5 away, how many are left?" * 6)])  # past the old context
    ours = load_model(made)(ids)
    theirs = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    with torch.inference_mode():
        assert (ours - theirs(ids).logits).abs().max() < 1e-4 < ours.std()
    assert AutoModelForCausalLM.from_pretrained(made, dtype="auto").dtype == torch.bfloat16
    files = sorted(file.name for file in made.glob("*.safetensors"))
    if shard_mib:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((made / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files and len(files) == len(theirs.state_dict()) == len(index["weight_map"])


def test_the_seed_is_the_model(tmp_path, capsys):
    source = write_folder(tmp_path / "source")

    def made(name, *more):
        assert main(["--config", str(source), "--out", str(tmp_path / name), *more]) == 0
        return load_model(tmp_path / name).state_dict()

    first, again, other = made("a"), made("b", "--shard_mib", "0"), made("c", "--seed", "1")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert main(["--config", str(source), "--out", str(tmp_path / "a")]) == 2 and "is not empty" in capsys.readouterr().err
    assert main(["--config", str(tmp_path), "--out", str(tmp_path / "d")]) == 2 and "config.json is missing" in capsys.readouterr().err


def test_it_is_a_command(tmp_path):
    script = REPO / "benchmarks" / "make_random_llama.py"
    source = write_folder(tmp_path / "source")
    command = [sys.executable, script, "--config", source, "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "model.safetensors" in done.stdout, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# What the benchmarks share


def test_examples_have_the_lengths_of_the_histogram():
    table = np.array(json.loads(common.LENGTHS.read_text())["lengths"])
    assert table[:, 2].sum() == 7473 and abs(np.average(table[:, 0], weights=table[:, 2]) - 109.3) < 1
    examples = common.random_examples(7473, 50, seed=3)
    assert sorted(examples.lengths.tolist()) == sorted(np.repeat(table[:, 0] + table[:, 1], table[:, 2]).tolist())
    few, again = common.random_examples(9, 50, seed=3, shrink=8), common.random_examples(9, 50, seed=3, shrink=8)
    assert np.array_equal(few.flat, again.flat) and few.flat.max() < 50 and few.lengths.max() < 70
    assert few.key != common.random_examples(9, 50, seed=4, shrink=8).key


def test_memory_sees_what_was_held_and_given_back():
    # In a process of its own: what other tests have left here may be given back in between.
    work = """
import torch
from benchmarks import common
torch.ones(8).sum()
held = common.Memory("cpu")
torch.ones(64 * 2**20 // 4).sum()  # 64 MiB
print(held.extra_mib(), common.Memory("cpu").extra_mib())
"""
    done = subprocess.run([sys.executable, "-c", work], cwd=REPO, capture_output=True, text=True, check=True)
    during, afterwards = map(float, done.stdout.split())
    assert 60 < during < 120 and afterwards < 30


def test_the_model_and_the_rates_of_a_shape(tmp_path):
    shape = common.SHAPES["toy"]
    model = load_model(common.write_model(shape, tmp_path))
    assert {name: tuple(p.shape) for name, p in model.model.layers[0].named_parameters() if "proj" in name} == {
        f"{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}.weight": size
        for name, size in shape.linears.items()
    }
    rates = common.matmul_rates(shape, torch.float32, "cpu", 16)
    assert rates["head"] > 1e6 and rates["body"] > 1e6
    whole = common.SHAPES["1b"]
    assert whole.layers * sum(out * inn for out, inn in whole.linears.values()) == 973078528  # Llama-3.2-1B without embeddings


# ----------------------------------------------------------------------------------------------------------------------
# train_step


def test_arithmetic_of_a_token():
    # One layer, H = 4, two heads of 2, one kv head, inner 8, V = 10; examples of 3 + 1 and 1 + 1 tokens.
    shape = common.Shape(4, 8, 1, 2, 1, 2, 10)
    examples = Examples.from_pairs([([1, 2, 3], [4]), ([5], [6])])
    found = train_step.flops_per_token(shape, 3, examples)
    qkv, rest = 4 * (4 + 2 + 2), 4 * 4 + 3 * 4 * 8
    assert found["linears"] == 4 * (qkv + rest) - 2 * qkv
    assert found["lora"] == 6 * 3 * (8 + 6 + 6 + 8 + 12 + 12 + 12)
    # Causal: a query at position i meets i + 1 keys, about S / 2 in the mean; two products, 2 FLOPs, forward and 2.5 backward.
    assert found["attention"] == 3.5 * 2 * 2 * (2 * 2) * ((16 + 4) / 6) / 2
    assert found["head"] == pytest.approx(4 * 10 * 4 * 2 / 6) and found["loss_share"] == pytest.approx(2 / 6)
    assert found["total"] == sum(found[term] for term in ("linears", "lora", "attention", "head"))


def settings(*more: str) -> contenders.Settings:
    return train_step.settings_of(train_step.parser().parse_args(["--toy", "--device", "cpu", *more]))


def test_grouped_batches_are_grouped_and_fair():
    asked = settings("--batch_size", "4", "--accumulation", "1", "--steps", "5", "--rounds", "4")
    examples = asked.examples()
    plan = contenders.grouped_plan(examples, asked)
    timed = plan[asked.warmup :]
    assert len(plan) == asked.total_steps == len(contenders.random_plan(examples, asked))
    waste = [1 - examples.lengths[batch].mean() / examples.lengths[batch].max() for batch in timed]
    random = [1 - examples.lengths[batch].mean() / examples.lengths[batch].max() for batch in contenders.random_plan(examples, asked)]
    assert np.mean(waste) < 0.3 * np.mean(random)
    assert len({i for batch in timed for i in batch}) == 80  # no batch is seen twice
    by_round = [examples.lengths[sum(timed[r * 5 : r * 5 + 5], [])].mean() for r in range(4)]
    assert max(by_round) < 1.15 * min(by_round)
    assert abs(np.mean(by_round) / examples.lengths.mean() - 1) < 0.05


@pytest.mark.parametrize("ablation", [full_logits, plain_modules])
def test_an_ablation_computes_the_same(tmp_path, monkeypatch, ablation):
    examples = random_examples(5)
    model = tiny_model(tmp_path)
    add_lora(model, 4, 8.0, 0.0, generator=torch.Generator().manual_seed(0))
    train_some(model)

    def loss_and_gradients() -> list[torch.Tensor]:
        (micro,) = collate(examples, list(range(5)), 10_000, None)
        nll = score.micro_nll(model, micro)
        return [nll.detach(), *torch.autograd.grad(nll.sum(), lora_parameters(model))]

    expected = loss_and_gradients()
    for module, name in ((score, "linear_nll"), (llama, "linear"), (llama, "norm_linear"), (llama, "swiglu_linear")):
        monkeypatch.setattr(module, name, getattr(module, name))  # is put back afterwards
    ablation()
    for found, other in zip(loss_and_gradients(), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)


def test_padding_fills_prompts_alone():
    examples = random_examples(6)
    filled = padded(examples, [4, 1, 2])
    assert set(filled.lengths.tolist()) == {max(examples.lengths[[4, 1, 2]])}
    assert all(np.array_equal(filled.completion(k), examples.completion(i)) for k, i in enumerate([4, 1, 2]))
    assert all(np.array_equal(filled.ids(k)[-examples.lengths[i] :], examples.ids(i)) for k, i in enumerate([4, 1, 2]))


def test_a_killed_contender_is_said():
    contender = contenders.Contender("machine", settings())
    os.kill(contender.process.pid, signal.SIGKILL)
    with pytest.raises(contenders.Lost, match="killed: out of memory"):
        contender.ask("rates")
    contender.close()


def command(script: str, *more: str, cwd: Path, status: int = 0) -> tuple[str, dict]:
    """What it printed, and the JSON of its last line."""
    done = subprocess.run([sys.executable, REPO / "benchmarks" / script, *more], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1]) if status == 0 else {}


def test_train_step_command(tmp_path):
    text, result = command("train_step.py", "--toy", "--device", "cpu", "--rounds", "1", "--out", "found.json", cwd=tmp_path)
    assert result == json.loads((tmp_path / "found.json").read_text())
    assert result["parity"] is True and result["parity_max_difference"] < 1e-4 and len(result["losses"]["ours"]) == 6
    assert result["losses"]["ours"][5] < result["losses"]["ours"][0] - 0.1  # it learns
    assert set(result["tokens_per_s"]) == {"ours", "default", "tuned"} and result["lost"] == {}
    for key in ("ratio_default", "ratio_tuned", "extra_memory_ratio", "matmul_bound_share"):
        assert result[key] > 0
    assert result["commit"] is None or set(result["commit"]) == {"hash", "dirty"}
    assert {"hardware", "versions", "started", "command", "settings"} <= set(result)
    table = text[text.index("\ncontender ") :]
    assert table.index("\nbound, at the head's rate") < table.index("\nours  ") < table.index("\ndefault  ")


def test_train_step_memory_command(tmp_path):
    text, result = command("train_step.py", "--toy", "--device", "cpu", "--memory", "--only", "ours", cwd=tmp_path)
    assert result["mode"] == "memory" and result["extra_memory_gib"]["ours"] > 0 and "above the loaded model" in text


def test_train_step_refuses():
    for words, message in ((["--data", "x"], "belong together"), (["--data", "x", "--tokenizer", "y"], "real vocabulary")):
        with pytest.raises(SystemExit, match=message):
            settings(*words)
    with pytest.raises(SystemExit, match="known are ours, default"):
        train_step.contenders_of(train_step.parser().parse_args(["--only", "theirs"]), "cpu")


# ----------------------------------------------------------------------------------------------------------------------
# loss, study, gpu.sh


def test_losses_agree():
    losses, absent = loss.contenders("cpu", compiled=False)
    rows = {row["contender"]: row for row in loss.measure(90, 16, 300, torch.float32, "cpu", losses, 2)}
    assert set(rows) == {"ours", "ours, no gradient", "eager", "chunked"} and "liger" in absent
    for name, row in rows.items():
        assert row["nll_error"] < 1e-4 and row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert name == "ours, no gradient" or row["gradient_1_minus_cosine"] < 1e-6
    assert rows["ours"]["tflop_per_s"] == pytest.approx(4 * 90 * 16 * 300 / rows["ours"]["ms"]["median"] * 1e-9)
    hidden, weight, targets = loss.planted(400, 64, 1000, torch.float32, "cpu")
    nll, _ = loss.once(loss.eager, hidden, weight, targets, False)
    assert nll.min() < 0.5 and nll.max() > math.log(1000)  # planted: no loss is like another


def test_loss_command(tmp_path):
    text, result = command("loss.py", "--toy", "--device", "cpu", "--only", "ours,eager", cwd=tmp_path)
    assert [row["contender"] for row in result["rows"]] == ["ours", "eager"] and "70 tokens" in text


def test_study_extrapolation(capsys):
    found = study.extrapolate(training=1000.0, decoding=500.0, forward=2000.0, run_seconds=2.0)
    rows = 2701 * 162.5 + 3000 * (207.8 + 95.9 + 62.8) + 700 * 106.0
    answers = 250 * 73.2 + 1319 * 103.8 + 500 * 7.0 + 432 * 5.4 + 299 * 21.6
    assert found["runs"] == 65 and found["train_tokens"] == pytest.approx(3 * (5 + 60) / 5 * rows)
    assert found["parts"]["training"] == pytest.approx(39 * rows / 1000) and found["parts"]["around the runs"] == 130
    assert found["answer_tokens"] == pytest.approx(answers * (1 + 5 + 24))
    assert found["seconds"] == pytest.approx(sum(found["parts"].values())) and found["seconds_if_no_answer_ends"] > found["seconds"]
    assert "65" in capsys.readouterr().out


def test_study_reads_the_other_results(tmp_path):
    speed, decode = tmp_path / "a.json", tmp_path / "b.json"
    speed.write_text(json.dumps({"tokens_per_s": {"ours": {"median": 7.0}}}, indent=2))
    decode.write_text(
        json.dumps({"stops": {"ours 8": {"tokens_per_s": {"median": 9.0}}, "transformers 4": {"tokens_per_s": {"median": 90.0}}}})
    )
    assert study.rate_of(str(speed), None, "train_step") == 7.0 and study.rate_of(str(decode), None, "decode") == 9.0
    assert study.rate_of(None, 3.0, "decode") == 3.0
    with pytest.raises(LetheError, match="needs --decode FILE"):
        study.rate_of(None, None, "decode")
    with pytest.raises(LetheError, match="holds no result"):
        study.rate_of(str(speed), None, "decode")


def test_study_command(tmp_path):
    text, result = command("study.py", "--toy", "--peer", "--max_train", "8", "--max_test", "2", cwd=tmp_path)
    assert result["runs"] == 4 and result["cells"] == 10 and result["items"] == 20 and "training steps" in text
    assert sum(result["parts"].values()) == pytest.approx(result["seconds"]) and min(result["parts"].values()) >= 0
    assert result["peer"]["ratio_training"] > 0 and result["peer"]["ratio_scoring"] > 0 and "transformers + peft" in text
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize("broken", [None, "loss"])
def test_the_suite_goes_on_after_a_failure(tmp_path, broken):
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
case "$*" in *{broken}.py*) echo no luck; exit 3;; esac
echo "a table"
echo '{{"from": "'"$*"'"}}'
""")
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), "TOY": "1"}
    done = subprocess.run(["bash", REPO / "benchmarks" / "gpu.sh"], env=environment, capture_output=True, text=True)
    made = {file.stem for file in (tmp_path / "out").glob("*.json")}
    assert done.returncode == (1 if broken else 0), done.stdout
    assert {"train_step", "decode", "study"} <= made and ("loss" in made) == (broken is None)
    assert (tmp_path / "out" / "loss.txt").is_file()
    assert ("failed: loss" in done.stdout) == (broken is not None)
    assert json.loads((tmp_path / "out" / "decode.json").read_text())["from"].endswith("decode.py --toy")
