"""Studies in other ways, from end to end: all weights, a quantised base, layers in host memory, several processes.

Run as a script, this file is one rank of several: it does several commands, one after the other, since a start costs seconds.
"""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import free_port, run_ranks
from safetensors.torch import load_file
from tiny import NARROW, TASKS, adapters, cells, one_line, raw_config, words, write_folder

import eval as evaluation
import study.comparison
import study.queue
import study.report
import train
from data.folder import find_task
from lora.merge import merge
from model import load_model, load_tokenizer
from study.folder import read_json, read_jsonl

FIRST, SECOND = TASKS
PAIR = f"{FIRST}_to_{SECOND}"
MASKS = ["--mask", "none,highest", "--pairs", f"{FIRST}:{SECOND}", "--threshold", "2000", "--save_steps", "2"]
FULL = ["--full", "--learning_rate", "1e-3", "--epochs", "2", "--max_train", "25"]  # the last step of an epoch has one example
RUNS = [f"lora_base/{FIRST}", f"lora_base/{SECOND}", f"lora_transfer/{PAIR}", f"mask/highest/{PAIR}"]


def no_pictures() -> None:
    study.report.draw_all = lambda rows, folder: []
    study.comparison.draw_comparison = lambda *_: []


@pytest.fixture(scope="module", autouse=True)
def like_a_rank():
    """One thread, since sums in another order have other bits; and no pictures, which take longer than all the rest."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.report, "draw_all", study.report.draw_all)
        patch.setattr(study.comparison, "draw_comparison", None)
        no_pictures()  # which the patches take back
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


def done(command) -> str:
    """Runs train.py, and returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert train.main(command) == 0
    return told.getvalue()


def scores(out) -> list[str]:
    """What eval.py is told for the settings of a study."""
    return ["--tasks", ",".join(TASKS), "--max_test", "6", "--max_new_tokens", "8", "--device", "cpu", "--out", str(out)]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def whole_models(out) -> dict[str, bytes]:
    return {str(file.parent.relative_to(out)): file.read_bytes() for file in sorted(Path(out).rglob("model.safetensors"))}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all tensors as one vector, relative to the second."""
    assert set(one) == set(other)
    flat = [torch.cat([tensors[name].flatten().double() for name in sorted(tensors)]) for tensors in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory) -> Path:
    """Adapters, in one process; to be looked at, not written to."""
    out = tmp_path_factory.mktemp("modes") / "plain"
    done(words(tiny, out, *MASKS))
    return out


@pytest.fixture(scope="module")
def full(tiny, tmp_path_factory) -> Path:
    """The same study of all weights."""
    out = tmp_path_factory.mktemp("modes") / "full"
    done(words(tiny, out, *MASKS, *FULL))
    return out


# ----------------------------------------------------------------------------------------------------------------------
# All weights


@pytest.mark.parametrize("run", [RUNS[0], RUNS[3]])
def test_a_run_is_a_model_folder_that_scores_alike(full, tiny, tmp_path, run):
    assert not adapters(full) and set(whole_models(full)) == set(RUNS)
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {path.name for path in (full / run).iterdir()}
    assert evaluation.main(["--model", str(full / run), *scores(tmp_path)]) == 0
    for task in TASKS:
        items = read_jsonl(tmp_path / f"eval/{task}.jsonl")
        assert items == read_jsonl(full / run / f"eval/{task}.jsonl") != read_jsonl(full / f"base/eval/{task}.jsonl")
    moved = distance(weights(full / run), weights(tiny))
    assert 0.001 < moved < 0.5 and all(not torch.equal(tensor, weights(tiny)[name]) for name, tensor in weights(full / run).items())


def test_the_base_comes_back_bit_for_bit(full, plain, tiny, tmp_path):
    """After a run has trained every weight, the next one and the scoring of the base begin from the base's own."""
    for task in TASKS:
        assert cells(full)[f"base/eval/{task}.jsonl"] == cells(plain)[f"base/eval/{task}.jsonl"]
    done(words(tiny, tmp_path, *FULL, "--datasets", SECOND, "--stage", 1))
    assert whole_models(tmp_path)[RUNS[1]] == whole_models(full)[RUNS[1]]  # alone, and as the second run of a study


def test_stage_2_begins_where_stage_1_ended(tiny, tmp_path):
    done(words(tiny, tmp_path, *MASKS, *FULL, "--stage2.learning_rate", "1e-12", "--mask", "none"))
    one, two = weights(tmp_path / RUNS[0]), weights(tmp_path / RUNS[2])
    assert distance(two, one) < 1e-7 < 1e-3 < distance(one, weights(tiny))


@torch.no_grad()
def test_masks_go_by_the_whole_model_of_stage_1(full, tiny):
    model, tokenizer = load_model(full / RUNS[0]), load_tokenizer(tiny)
    tokens = dropped = 0
    for record, _ in zip(find_task(SECOND).train(), range(25), strict=False):
        prompt, answer = tokenizer.render_prompt(record.prompt), tokenizer.render_answer(record.answer)
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
        tokens, dropped = tokens + len(answer), dropped + int((nll[:-1] > math.log(2000)).sum())
    found = read_json(full / RUNS[3] / "run.json")["mask"]
    assert found["completion_tokens"] == tokens and found["dropped_share"] == pytest.approx(dropped / tokens) and 0 < dropped < tokens
    assert distance(weights(full / RUNS[3]), weights(full / RUNS[2])) > 1e-4


def test_a_cut_run_of_all_weights_goes_on_with_the_same_bits(full, tiny, tmp_path, monkeypatch, capsys):
    steps, taken = train.fit, []

    def cut(*args, **kwargs):
        for step in steps(*args, **kwargs):
            yield step
            taken.append(step)
            if len(taken) == 19:  # in the third run: stage 2, behind the checkpoint of its second step
                raise KeyboardInterrupt

    out = Path(shutil.copytree(full, tmp_path / "copy"))
    for run in RUNS[:3]:
        shutil.rmtree(out / run)
    monkeypatch.setattr(train, "fit", cut)
    assert train.main(words(tiny, out, *MASKS, *FULL)) == 130
    monkeypatch.setattr(train, "fit", steps)
    capsys.readouterr()
    told = done(words(tiny, out, *MASKS, *FULL))
    assert f"resumed    {RUNS[2]} after step 2 of 8" in told and told.count("resumed") == 1
    assert whole_models(out) == whole_models(full) and cells(out) == cells(full)


def test_all_weights_by_two_optimizers(tiny, tmp_path):
    """Muon takes the layers' matrices, AdamW the rest; how far each moved is measured against the base's files."""
    sweep = ["--compare_optimizers", "--comparison", "{adamw: [1.0e-3], muon: [1.0e-3]}", "--full", "--max_test", 2]
    done(words(tiny, tmp_path, *sweep))
    base = weights(tiny)
    for name in ("adamw", "muon"):
        folder = tmp_path / f"optimizer/{name}_lr0.001/{PAIR}"
        partition = [line.split()[:2] for line in read_json(folder / "run.json")["partition"]]
        by_muon = {kind for owner, kind in partition if owner == "muon"}
        assert by_muon == (set() if name == "adamw" else {f"{x}_proj.weight" for x in ("q", "k", "v", "o", "gate", "up", "down")})
        mine, found = weights(folder), read_json(folder / "drift.json")
        change = {key: (mine[key] - base[key]).double() for key in base}
        size = math.sqrt(sum(float(delta.norm()) ** 2 for delta in change.values()))
        whole = math.sqrt(sum(float(tensor.double().norm()) ** 2 for tensor in base.values()))
        assert found["frobenius"] == pytest.approx(size, rel=1e-5) and found["relative_frobenius"] == pytest.approx(size / whole, rel=1e-5)
        peak = max(float(torch.linalg.matrix_norm(delta, 2)) for delta in change.values() if delta.dim() == 2)
        assert found["spectral"] >= 0.999 * peak and found["kinds"]["embed_tokens"]["frobenius"] > 0
        assert min(found["kl"][task]["mean"] for task in TASKS) > 1e-5
    one, other = (weights(tmp_path / f"optimizer/{name}_lr0.001/{PAIR}") for name in ("adamw", "muon"))
    assert distance(one, other) > 1e-4
    assert set(cells(tmp_path)) > {f"base/eval/{task}.jsonl" for task in TASKS}
    assert read_json(tmp_path / "logs/final_results.json")["pairs"][0]["paired"]["one"] == "adamw"


# ----------------------------------------------------------------------------------------------------------------------
# A quantised base


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_study_of_a_quantised_base(plain, tiny, tmp_path, capsys, kind):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "study"
    told = done(words(tiny, out, *MASKS, "--quantize", kind))
    assert f"the layers' linears in {kind}" in told and set(adapters(out)) == set(RUNS)
    for run, content in adapters(out).items():
        apart = distance(load_file(out / run / "adapter_model.safetensors"), load_file(plain / run / "adapter_model.safetensors"))
        assert 1e-5 < apart < 0.5 and content != adapters(plain)[run]  # near those of the whole base, and not the same
        assert read_json(out / run / "run.json")["base_fingerprint"] == f"{read_json(plain / run / 'run.json')['base_fingerprint']}:{kind}"
    before = cells(out)
    for name in (f"base/eval/{FIRST}.jsonl", f"{RUNS[3]}/eval/{SECOND}.jsonl"):
        (out / name).unlink()
    assert evaluation.main(["--root", str(out), "--device", "cpu"]) == 0 and cells(out) == before
    assert "scored     2 missing cells" in capsys.readouterr().out

    command = ["--model", tiny, "--adapter", str(out / RUNS[3]), *scores(tmp_path / "alone")]
    assert evaluation.main([*command, "--quantize", kind]) == 0
    quantised = read_jsonl(tmp_path / f"alone/eval/{SECOND}.jsonl")
    assert quantised == read_jsonl(out / RUNS[3] / f"eval/{SECOND}.jsonl") and "was trained on" not in capsys.readouterr().err
    assert evaluation.main(command) == 0  # on the whole base: said aloud, and a little different
    assert f"was trained on this base in {kind}; here it is in full" in capsys.readouterr().err.replace("\n", " ")
    gaps = [
        abs(a["answer_nll"] - b["answer_nll"]) for a, b in zip(quantised, read_jsonl(tmp_path / f"alone/eval/{SECOND}.jsonl"), strict=True)
    ]
    assert 0 < max(gaps) < 0.5
    assert train.main(words(tiny, out, *MASKS)) == 2 and "quantize" in capsys.readouterr().err  # another study than one of the whole base


def test_merging_an_adapter_of_a_quantised_base_into_the_whole_one(tiny, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    done(words(tiny, tmp_path / "study", "--quantize", "int8", "--stage", 1, "--datasets", FIRST))
    folder = tmp_path / "study" / RUNS[0]
    assert merge(tiny, str(folder), tmp_path / "merged")["argmax_agreement"] > 0.99
    assert "was trained on this base in int8; here it is in full" in capsys.readouterr().err.replace("\n", " ")
    factors, config, base = load_file(folder / "adapter_model.safetensors"), read_json(folder / "adapter_config.json"), weights(tiny)
    expected = dict(base)
    for name in {key.partition(".lora_")[0] for key in factors}:
        a, b = (factors[f"{name}.lora_{x}.weight"].double() for x in "AB")
        expected[name.removeprefix("base_model.model.") + ".weight"] = (
            base[name.removeprefix("base_model.model.") + ".weight"].double() + config["lora_alpha"] / config["r"] * b @ a
        )
    assert distance(weights(tmp_path / "merged"), expected) < 1e-6 and distance(base, expected) > 1e-2


# ----------------------------------------------------------------------------------------------------------------------
# Layers in host memory


def test_layers_in_host_memory_give_the_same_bits(tmp_path):
    deep = str(write_folder(tmp_path / "deep", raw_config(**NARROW, num_hidden_layers=5), tokenizer=True))
    command = ["--mask", "highest", *MASKS[2:]]
    done(words(deep, tmp_path / "held", *command))
    told = done(words(deep, tmp_path / "streamed", *command, "--max_memory", "0.38MiB"))
    assert "4 of 5 layers" in told
    assert adapters(tmp_path / "streamed") == adapters(tmp_path / "held") and len(adapters(tmp_path / "held")) == 3
    assert cells(tmp_path / "streamed") == cells(tmp_path / "held")
    before = cells(tmp_path / "streamed")
    (tmp_path / "streamed" / f"base/eval/{FIRST}.jsonl").unlink()
    assert evaluation.main(["--root", str(tmp_path / "streamed"), "--device", "cpu", "--max_memory", "0.38MiB"]) == 0
    assert cells(tmp_path / "streamed") == before
    assert "nothing to do" in done(words(deep, tmp_path / "streamed", *command))  # the same study, with and without


@pytest.mark.parametrize(
    "more, told",
    [
        (["--max_memory", "1kB"], "is too small for this model"),
        (["--full", "--shard", "model"], "start it with torchrun --nproc-per-node N"),
        (["--full", "--shard", "model", "--optimizer", "muon"], "--optimizer muon needs whole matrices"),
        (["--full", "--shard", "model", "--eval_steps", "1"], "leave out --eval_steps"),
        (["--full", "--quantize", "int8"], "--quantize int8 freezes"),
        (["--full", "--max_memory", "1GB"], "--max_memory keeps away"),
        (["--quantize", "int8", "--shard", "model"], "--shard model is for --full"),
    ],
)
def test_what_does_not_go_together(tiny, tmp_path, capsys, more, told):
    assert told in one_line(words(tiny, tmp_path, *more), capsys)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def wait_for(file: Path) -> None:
    end = time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert file.exists(), file


def rank_main(jobs: list[dict]) -> int:
    """Each job: {"words", "port", "harm", "marks": a folder}; the exit status of the last."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    no_pictures()
    genuine, steps = train.train_run, train.fit
    for job in jobs:
        os.environ["MASTER_PORT"] = str(job["port"])
        marks = Path(job["marks"])

        def train_run(bench, run, label, job=job, marks=marks):
            """Both workers have a run in hand before either goes on; the one that is to be killed is, before the other does."""
            (marks / f"begun_{rank}").touch()
            wait_for(marks / f"begun_{1 - rank}")
            if job["harm"] == "killed" and rank == 0:
                wait_for(marks / "killed")
            genuine(bench, run, label)

        def fit(*args, job=job, marks=marks, **kwargs):
            for step in steps(*args, **kwargs):
                yield step
                if job["harm"] == "killed" and rank == 1 and step.number == 2:
                    (marks / "killed").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                if job["harm"] == "stopped" and step.number == 2:
                    raise KeyboardInterrupt

        train.train_run, train.fit = (train_run if job["harm"] in ("together", "killed") else genuine), fit
        if job["harm"] == "killed":
            study.queue.RunQueue = partial(study.queue.RunQueue, heartbeat_seconds=0.1, timeout_seconds=2.0)
        print(f"== {job['name']}", flush=True)
        status = train.main(job["words"])
        print(f"== status {status}", flush=True)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return status


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory) -> tuple[Path, list]:
    """Four studies by two ranks, one of which is killed in the last; their folder, and what each rank told."""
    folder, jobs = tmp_path_factory.mktemp("ranks"), []
    stage_1 = words(tiny, folder / "model", *MASKS, *FULL, "--stage", 1, "--shard", "model")
    for name, harm, command in (
        ("each_step", None, words(tiny, folder / "each_step", *MASKS)),
        ("model", None, stage_1),
        ("model_cut", "stopped", [word.replace(str(folder / "model"), str(folder / "model_cut")) for word in stage_1]),
        ("runs", "together", words(tiny, folder / "runs", *MASKS, "--shard", "runs")),
        ("killed", "killed", words(tiny, folder / "killed", *MASKS, "--shard", "runs")),
    ):
        marks = folder / f"marks_{name}"
        marks.mkdir()
        jobs.append({"name": name, "harm": harm, "words": command, "port": free_port(), "marks": str(marks)})
    done = run_ranks(__file__, json.dumps(jobs))
    assert [rank.returncode for rank in done] == [0, -signal.SIGKILL], "\n".join(rank.stdout + rank.stderr for rank in done)
    return folder, done


def same_record(one: Path, other: Path) -> None:
    """run.json, but for times and memory."""
    records = [read_json(folder / "run.json") for folder in (one, other)]
    for record in records:
        del record["seconds"], record["memory_gib"]
    assert records[0] == records[1]


def test_data_parallel_equals_one_process(two, plain):
    folder = two[0] / "each_step"
    assert set(adapters(folder)) == set(RUNS)
    for run in RUNS:
        apart = distance(load_file(folder / run / "adapter_model.safetensors"), load_file(plain / run / "adapter_model.safetensors"))
        assert apart < 1e-4, run
        one, other = (read_json(out / run / "run.json") for out in (folder, plain))
        assert one["tokens"] == other["tokens"] and one["outcomes"] == other["outcomes"]
        assert one["mask"]["dropped_share"] == other["mask"]["dropped_share"]
        assert one["final_loss"] == pytest.approx(other["final_loss"], rel=1e-5)
        for a, b in zip(read_jsonl(folder / run / "metrics.jsonl"), read_jsonl(plain / run / "metrics.jsonl"), strict=True):
            assert (a["step"], a["tokens"]) == (b["step"], b["tokens"]) and a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
    for name in cells(plain):
        for a, b in zip(read_jsonl(folder / name), read_jsonl(plain / name), strict=True):
            assert a["answer_nll"] == pytest.approx(b["answer_nll"], abs=1e-4) and a["prompt"] == b["prompt"]
    said = two[1][1].stdout.split("== ")[1]
    assert said.count("\n") == 1  # the second rank works and says nothing


@pytest.mark.parametrize("name", ["runs", "killed"])
def test_runs_shared_by_workers_equal_one_process(two, plain, name):
    """Byte for byte, also where one of two workers was killed with a run in hand."""
    folder, done = two
    out = folder / name
    assert adapters(out) == adapters(plain) and cells(out) == cells(plain) and set(adapters(out)) == set(RUNS)
    assert (out / "eval_results_mask.json").read_bytes() == (plain / "eval_results_mask.json").read_bytes()
    for run in RUNS:
        same_record(out / run, plain / run)
    trained = [next(part for part in rank.stdout.split("== ") if part.startswith(name)).count(" steps  loss ") for rank in done]
    assert sum(trained) == len(RUNS) and (min(trained) == 0) == (name == "killed")
    if name == "killed":
        assert "has been silent for 2 s" in done[0].stderr and "resumed    " in done[0].stdout


def test_a_model_spread_over_ranks_is_close_to_one_process(two, full, tiny):
    for run in RUNS[:2]:
        folder = two[0] / "model" / run
        assert distance(weights(folder), weights(full / run)) < 1e-4 < 1e-3 < distance(weights(folder), weights(tiny))
        for a, b in zip(read_jsonl(folder / f"eval/{SECOND}.jsonl"), read_jsonl(full / run / f"eval/{SECOND}.jsonl"), strict=True):
            assert a["answer_nll"] == pytest.approx(b["answer_nll"], abs=1e-4)
        assert not list(folder.rglob("adapter_model.safetensors"))


def test_what_two_ranks_began_one_process_finishes(two, full, tiny):
    out = two[0] / "model_cut"
    (cut,) = (out / RUNS[0] / "checkpoints").iterdir()
    assert cut.name.endswith("step_2") and len(list(cut.glob("training_state_*_of_2.safetensors"))) == 2
    assert all("== status 130" in rank.stdout for rank in two[1])
    told = done(words(tiny, out, *MASKS, *FULL, "--stage", 1))
    assert f"resumed    {RUNS[0]} after step 2 of 8" in told
    for run in RUNS[:2]:
        assert distance(weights(out / run), weights(full / run)) < 1e-4


if __name__ == "__main__":
    sys.exit(rank_main(json.loads(sys.argv[1])))
