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

from benchmarks import common, contenders, loss, muon, paired, roofline, scale, study, train_step
from benchmarks.ablations import full_logits, padded, plain_modules
from benchmarks.make_random_llama import main
from data.batching import Examples, collate
from lora import add_lora
from lora.layers import lora_parameters
from masking import score
from model import llama, load_model, load_tokenizer
from study.errors import LetheError
from study.folder import write_json, write_jsonl

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
    for module, name in ((llama, "linear_nll"), (llama, "linear"), (llama, "norm_linear"), (llama, "swiglu_linear")):
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
# loss, study


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


# ----------------------------------------------------------------------------------------------------------------------
# muon, scale


def test_the_factors_of_a_model():
    found = muon.factors_of(common.SHAPES["1b"], 16)
    assert found == {"A_16x2048": (96, 16, 2048), "B_2048x16": (48, 2048, 16), "B_512x16": (32, 512, 16), "B_8192x16": (32, 8192, 16),
                     "A_16x8192": (16, 16, 8192)}  # fmt: skip
    assert sum(n for n, *_ in found.values()) == 224


def test_beams(tmp_path):
    text, result = command("beam.py", "--toy", "--rounds", "1", "--stops", "--no_repeat_ngram_size", "2", cwd=tmp_path)
    assert result["benchmark"] == "beam" and result["stops"] == 1 and result["ratio"] > 0 and result["best"].startswith("transformers")
    assert len(result["contenders"]) == 3 and all(found["same_outputs"] == 1 for found in result["contenders"].values())
    assert "ours over transformers" in text


def test_muon_command(tmp_path):
    text, result = command("muon.py", "--toy", "--device", "cpu", cwd=tmp_path)
    assert result["factors"] == 28 and result["ratio"] == result["ratios"]["torch"]["median"] > 0
    errors = result["max_relative_error"]
    assert errors["ours"] < 1e-5 and errors["torch, float32"] < 1e-5 < errors["torch"] < 0.1
    assert "torch, float32" in text and set(result["ms"]) == {"ours", "torch", "torch, float32", "adamw"}


def test_ensemble_command(tmp_path):
    text, result = command("ensemble.py", "--toy", cwd=tmp_path)
    assert result["items"] == 8 and result["members"] == 2 and set(result["ratios"]) == {"merged", "beside", "ensemble"}
    assert max(result["differences"].values()) < 1e-3 and "ensemble / side" in text


JOBS = [scale.Job("a", 4), scale.Job("b", 3), scale.Job("a_to_b", 2, "a"), scale.Job("b_to_a", 6, "b"), scale.Job("other", 1, "a")]


def test_the_makespan_by_hand():
    # Two workers. a 0-4, b 0-3; then b_to_a 3-9 beside a_to_b 4-6 and other 6-7.
    assert scale.makespan(JOBS, 2) == 9 and scale.makespan(JOBS, 1) == 16
    assert scale.least(JOBS, 2) == 9 and scale.least(JOBS, 1) == 16
    # The longest first, where its parent is done: a, then b_to_a has to wait for b all the same.
    assert [job.name for job in scale.longest_first(JOBS)] == ["b_to_a", "a", "b", "a_to_b", "other"]
    assert scale.makespan(JOBS, 2, scale.Faults(start=10, around=1)) == 10 + 11  # b and b_to_a, one second before each
    assert scale.makespan(JOBS, 2, scale.Faults(slow=1.0, slow_factor=3.0)) == 27
    with pytest.raises(LetheError, match="wait for one another: a, b"):
        scale.makespan([scale.Job("a", 1, "b"), scale.Job("b", 1, "a")], 2)


def in_ticks(jobs: list[scale.Job], workers: int) -> int:
    """The makespan of whole seconds, by walking through them."""
    left, running, done, now = list(jobs), {}, set(), 0
    while len(done) < len(jobs):
        done |= {job.name for job, end in running.values() if end == now}
        running = {worker: (job, end) for worker, (job, end) in running.items() if end > now}
        for worker in range(workers):
            ready = [job for job in left if job.parent is None or job.parent in done]
            if worker not in running and ready:
                left.remove(ready[0])
                running[worker] = ready[0], now + int(ready[0].seconds)
        now += 1
    return now - 1


def test_the_makespan_by_walking_through_it():
    rng = np.random.default_rng(0)
    for case in range(60):
        parents = [scale.Job(f"p{i}", int(rng.integers(1, 9))) for i in range(rng.integers(1, 5))]
        children = [scale.Job(f"c{i}", int(rng.integers(1, 9)), f"p{rng.integers(len(parents))}") for i in range(rng.integers(0, 9))]
        jobs, workers = [*parents, *children], 1 + case % 4
        for queue in (jobs, scale.longest_first(jobs)):
            found = scale.makespan(queue, workers)
            assert found == in_ticks(queue, workers) and found >= scale.least(jobs, workers) - 1e-9


def test_a_worker_that_dies(monkeypatch):
    class Scripted:
        lifetimes: list[float] = []

        def __init__(self, seed):
            self.left = list(self.lifetimes)

        def random(self):
            return 1.0

        def expovariate(self, rate):
            return self.left.pop(0) if self.left else float("inf")

    monkeypatch.setattr(scale.random, "Random", Scripted)
    jobs, faults = [scale.Job("a", 100), scale.Job("b", 50)], scale.Faults(mtbf=1, save=30, timeout=10, restart=1000)
    # The worker of a dies at 70 with 60 saved; the other, idle since 50, takes it over at 80.
    Scripted.lifetimes = [70.0]
    assert scale.makespan(jobs, 2, faults) == 80 + 40
    # Alone, it is back at 70 + 1000 and does what is left, 40 and 50; with checkpoints too rare it has to begin anew.
    assert scale.makespan(jobs, 1, faults) == 1070 + 90
    assert scale.makespan(jobs, 1, scale.Faults(mtbf=1, save=80, timeout=10, restart=1000)) == 1070 + 150
    # The idle worker dies at 55 and is not there when a is free; the first one is back before it.
    Scripted.lifetimes = [70.0, 55.0]
    assert scale.makespan(jobs, 2, scale.Faults(mtbf=1, save=30, timeout=10, restart=100)) == 155 + 40


def test_faults_cost_time_and_more_workers_save_it():
    jobs = scale.jobs_of_plan(tokens_per_s=1e4, arms=3)
    assert len(jobs) == 65 and sum(job.parent is None for job in jobs) == 5
    found = scale.simulate(jobs, [1, 4, 16], scale.Faults(slow=0.2, mtbf=2000), 20)
    by = {(row["gpus"], row["order"]): row for row in found}
    assert all(row["median"] >= row["without_faults"] >= row["least"] - 1e-6 and row["p95"] >= row["median"] for row in found)
    for order in ("plan", "longest"):
        assert by[1, order]["median"] > by[4, order]["median"] > by[16, order]["median"] and by[1, order]["efficiency"] <= 1
    assert found == scale.simulate(jobs, [1, 4, 16], scale.Faults(slow=0.2, mtbf=2000), 20)


def test_the_runs_of_a_study_and_of_a_file(tmp_path):
    def run(folder, stage, parent, seconds, status="done"):
        write_json(tmp_path / folder / "run.json", {"status": status, "seconds": seconds, "run": {
            "stage": stage, "folder": folder.removeprefix("seed0/"), "parent": parent}})  # fmt: skip

    run("seed0/a/a_to_b", 2, "lora_base/a", 2.5)
    run("seed0/lora_base/a", 1, None, 4.0)
    run("seed0/lora_base/b", 1, None, 4.0, status="running")
    jobs = scale.jobs_of_study(tmp_path)
    assert jobs == [scale.Job("seed0/lora_base/a", 4.0), scale.Job("seed0/a/a_to_b", 2.5, "seed0/lora_base/a")]
    with pytest.raises(LetheError, match="no finished run"):
        scale.jobs_of_study(tmp_path / "elsewhere")
    write_json(tmp_path / "s.json", {"a": 3, "a_to_b": {"seconds": 2, "parent": "a"}})
    assert scale.jobs_of_file(tmp_path / "s.json") == [scale.Job("a", 3), scale.Job("a_to_b", 2, "a")]
    write_json(tmp_path / "s.json", {"a": "long"})
    with pytest.raises(LetheError, match="a has no seconds"):
        scale.jobs_of_file(tmp_path / "s.json")


def test_the_arithmetic_of_models():
    counts = {name: roofline.weights_of(shape, tied)[1] for name, (shape, tied) in roofline.MODELS.items()}
    assert counts == {"1B": 1235814400, "3B": 3212749824, "8B": 8030261248, "70B": 70553706496}  # what the released files hold
    machine = roofline.Machine(790e12, 1.0, 4.3e12, 139 * roofline.GIB, 0.35e12, 0.04e12)
    work = roofline.Work(tokens=16384, length=256, loss_share=0.5, rank=16)
    one = {method: roofline.needs(*roofline.MODELS["1B"], method, 1, False, work, machine) for method in roofline.METHODS}
    # LoRA: 3.880 + 0.068 + 0.059 + 1.051 / 2 GFLOP a token (frozen linears, factors, attention, head)
    assert one["LoRA"]["tokens_per_s"] == pytest.approx(790e12 / 4.53e9, rel=2e-3)
    assert one["LoRA"]["state"] == pytest.approx(2 * 1235.8e6 + 18 * 11.27e6, rel=1e-3)
    assert one["LoRA"]["activations"] == pytest.approx(16384 * 16 * 51.2e3, rel=1e-3)
    assert one["full"]["state"] == 18 * counts["1B"]
    assert one["LoRA NF4"]["state"] == pytest.approx(0.516 * 973.1e6 + 2 * 262.7e6 + 18 * 11.27e6 + 2 * 16.8e6, rel=1e-3)
    shape, tied = roofline.MODELS["70B"]
    found = [roofline.needs(shape, tied, "full", gpus, True, work, machine) for gpus in (2, 8, 16)]
    assert found[0]["memory"] > found[1]["memory"] > machine.memory > found[2]["memory"]


def test_scale_command(tmp_path, capsys):
    text, result = command("scale.py", "--toy", "--gpus", "1,4", cwd=tmp_path)
    assert result["runs"] == 65 and [row["gpus"] for row in result["makespans"]] == [1, 1, 4, 4] and len(result["plans"]) == 24
    assert "4 GPUs" in text and "needs 158* GiB" in text

    assert scale.main(["--toy", "--gpus", "1", "--tokens_per_s", "1000", "--mtbf", "0", "--slow", "0"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["makespans"][0]["median"] == pytest.approx(result["seconds"] + 20 + 2 * 65)
    for words, message in ((["--gpus", "0"], "must be above 0"), (["--mtbf", "0.001"], "die faster than they are saved")):
        assert scale.main(words) == 2 and message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# gpu.sh, and the other shell script


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


@pytest.mark.parametrize("mode", ["data", "model", "runs"])
def test_the_slurm_example_starts_what_it_says(tmp_path, mode):
    """Under a srun that runs a single task here, a torchrun and a python that print what they are given."""
    bin = tmp_path / "bin"
    bin.mkdir()
    stubs = {
        "scontrol": "echo node7; echo node8",
        "srun": 'while [ "${1#--}" != "$1" ]; do case $1 in *=*) shift;; *) options="$options $1 $2"; shift 2;; esac; done\n'
        'echo "srun$options"; SLURM_PROCID=3 SLURM_NTASKS=16 exec "$@"',
        "torchrun": 'echo torchrun "$@"',
        "python": 'echo "python $@: $RANK of $WORLD_SIZE, $LOCAL_RANK, $MASTER_ADDR:$MASTER_PORT"',
    }
    for name, text in stubs.items():
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "20005", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64", "SLURM_JOB_NODELIST": "x"}
    environment = {**os.environ, **job, "PATH": f"{bin}:{os.environ['PATH']}", "MODE": mode}
    command = ["bash", REPO / "configs" / "slurm.sh", "--out", "my study"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    asked, said = done.stdout.splitlines()
    if mode == "runs":
        assert asked == "srun --ntasks 16 --ntasks-per-node 8 --gpus-per-task 1 --cpus-per-task 8"
        assert said == "python train.py --shard runs --out my study: 3 of 16, 0, node7:20005"
    else:
        assert asked == "srun --cpus-per-task 64"
        assert said.startswith("torchrun --nnodes 2 --nproc-per-node 8 ") and "--rdzv-endpoint node7:20005" in said
        assert said.endswith("train.py --full --shard model --out my study" if mode == "model" else "train.py --out my study")
    assert subprocess.run(command, env={**environment, "MODE": "all"}, cwd=tmp_path, capture_output=True).returncode == 2


def test_two_studies_are_paired_item_by_item(tmp_path, capsys):
    rights = {"one": [1, 1, 0, 0, 1, 0], "other": [1, 0, 0, 1, 0, 0]}
    for name, marks in rights.items():
        run = {"stage": 1, "arm": "none", "first": "a", "second": None, "folder": "lora_base/a", "parent": None}
        write_json(tmp_path / name / "lora_base/a/run.json", {"status": "done", "run": run})
        write_jsonl(tmp_path / name / "lora_base/a/eval/a.jsonl", [{"prompt": str(i), "exact_match": bool(x)} for i, x in enumerate(marks)])
    assert paired.main([str(tmp_path / "one"), str(tmp_path / "other")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]["all"]
    assert (found["n"], found["one"], found["other"], found["only_a"], found["only_b"]) == (6, 0.5, pytest.approx(1 / 3), 2, 1)
    assert found["difference"] == pytest.approx(-1 / 6) and found["p"] == 1.0  # 2 against 1 is no evidence
    write_jsonl(tmp_path / "other/lora_base/a/eval/a.jsonl", [{"prompt": "?", "exact_match": True}] * 6)
    assert paired.main([str(tmp_path / "one"), str(tmp_path / "other")]) == 2 and "other items" in capsys.readouterr().err
