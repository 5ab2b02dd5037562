"""Studies of sequences from the command line: which rows each arm rehearses, whose answers they have, and that a killed study goes on.

The model is a random one, which cannot invent questions: what it would sample is invented here, by each sample's seed alone.
"""

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from ranks import free_port
from tiny import SMALL, adapters, one_line, times, words

import data.synthesis
import study.report
import train
from benchmarks.survive import Bench, Place, outcome, unequal
from data.folder import find_task
from data.records import load_records
from data.superni import demonstrations
from lora import load_adapter
from lora.layers import merge_adapter
from model import generate, load_model, load_tokenizer
from study.folder import read_json, read_jsonl
from study.sequence import ANCHORED, ARMS, SYNTHETIC, WRITTEN

ORDER = ("mini_svamp", "mini_simpleqa", "mini_gsm8k")
NAME = ",".join(ORDER)
ROWS, KEPT = 24, 6  # a task's rows, and those rehearsed of each
SEQUENCE = ["--sequence", NAME, "--rehearsal_share", "0.25", "--relabel", "once"]


def invented(model, prompts, max_new_tokens, stop_ids, *, seeds, tokenizer, **_):
    """In place of model.sampling.sample: every third sample is no pair."""
    texts = [f" How many cups has child {seed % 99991}?\nOutput: {seed % 7}\n\n" if seed % 3 else " What?\n\n" for seed in seeds]
    return [tokenizer.encode(text + "Input:") for text in texts]


def invent() -> None:
    """For good, in a process that is there for one study: no pictures either."""
    data.synthesis.sample = invented
    study.report.draw_sequences = lambda *_: []


@pytest.fixture(scope="module", autouse=True)
def by_seed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.synthesis, "sample", invented)
        patch.setattr(study.report, "draw_sequences", lambda *_: [])
        patch.setattr(study.report, "draw_all", lambda *_: [])
        yield


def asked(model, out, *more) -> list[str]:
    return ["--model", str(model), *SMALL, *SEQUENCE, "--out", str(out), *map(str, more)]


def run(*command) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert train.main(list(command)) == 0, told.getvalue()
    return told.getvalue()


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """Three arms in two seeds, then all the others in the first of them; to be looked at, not written to."""
    out = tmp_path_factory.mktemp("sequences") / "study"
    drawn = data.synthesis.sample
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.synthesis, "sample", lambda *args, **more: calls.append(len(args[1])) or drawn(*args, **more))
        run(*asked(tiny, out, "--seeds", "0,1", "--rehearsal", "ssr,none,mtl"))
        (out.parent / "told.txt").write_text(run(*asked(tiny, out, "--seeds", "0")))
    (out.parent / "calls.json").write_text(json.dumps(calls))
    return out


@pytest.fixture(scope="module")
def tree(whole) -> Path:
    return whole / "seed0"


@pytest.fixture(scope="module")
def tasks() -> dict:
    return {name: find_task(name) for name in ORDER}


def folder(arm, stage) -> str:
    return f"sequence/{arm}/{NAME}/{stage}_{'joint' if arm == 'mtl' else ORDER[stage - 1]}"


def rehearsed(tree, arm, place, name=NAME):
    return tree / "rehearsal" / arm / name / f"{place}_{ORDER[place - 1]}.jsonl"


def pairs(records) -> list:
    return [(record.prompt, record.answer) for record in records]


# ----------------------------------------------------------------------------------------------------------------------
# What is there


def test_every_arm_comes_to_its_end(whole):
    told = (whole.parent / "told.txt").read_text()
    assert "plan       20 runs, 6 of them done before" in told  # stage 1, nine arms of two stages, mtl
    record = read_json(whole / "matrix.json")
    found = {(one["arm"], one["seed"]) for one in record["sequences"]}
    assert found == {(arm, 0) for arm in ARMS} | {(arm, 1) for arm in ("none", "ssr", "mtl")}
    for one in record["sequences"]:
        assert np.shape(one["R"]) == ((1, 3) if one["arm"] == "mtl" else (3, 3)) and one["order"] == NAME and one["tasks"] == list(ORDER)
    table = told[told.index("Sequences of 3 stages") :].splitlines()
    assert {line.split()[0]: line.split()[-1] for line in table[3:13]} == {
        arm: "2" if arm in ("none", "ssr", "mtl") else "1" for arm in ARMS
    }
    assert "means over 2 orders and seeds" in table[0]


def test_the_same_command_again_has_nothing_to_do(whole, tiny):
    before = times(whole, "*.safetensors") | times(whole, "*.jsonl") | times(whole, "matrix.json")
    assert "nothing to do" in run(*asked(tiny, whole, "--seeds", "0,1", "--rehearsal", "ssr,none,mtl"))
    assert "nothing to do" in run(*asked(tiny, whole, "--seeds", "0", "--rehearsal", "all"))
    assert times(whole, "*.safetensors") | times(whole, "*.jsonl") | times(whole, "matrix.json") == before


def test_counts(tree, tasks):
    for arm in set(ARMS) - {"mtl"}:
        for stage in (2, 3):
            record, told = read_json(tree / folder(arm, stage) / "run.json"), {}
            for place, name in enumerate(ORDER[: stage - 1], 1):
                if arm in ("random", "kmeans"):
                    told[name] = KEPT
                elif arm == "replay":
                    told[name] = len(list(tasks[name].replay()))
                elif arm in WRITTEN:  # but the answers that are empty
                    rows = read_jsonl(rehearsed(tree, arm, place).with_suffix(".answers.jsonl"))
                    assert len(rows) == KEPT
                    told[name] = sum(bool(row["answer"]) for row in rows)
            assert record["rehearsal"] == told, (arm, stage)
            assert record["examples"] == ROWS + sum(told.values()) and record["steps"] == -(-record["examples"] // 8)
            assert bool(record["anchor"]) == (arm in ANCHORED)
    joint = read_json(tree / folder("mtl", 3) / "run.json")
    assert joint["rehearsal"] == {name: ROWS for name in ORDER[:2]} and joint["examples"] == 3 * ROWS


def test_real_rows_are_rows_of_train(tree, tasks):
    for place, name in enumerate(ORDER[:2], 1):
        train_rows, test = pairs(tasks[name].train())[:ROWS], {record.prompt for record in tasks[name].test}
        files = {arm: pairs(load_records(rehearsed(tree, arm, place))) for arm in ("random", "kmeans", "replay", "mtl")}
        for arm, found in files.items():
            assert len(set(found)) == len(found) and not {prompt for prompt, _ in found} & test, (arm, name)
        assert set(files["random"]) < set(train_rows) and set(files["kmeans"]) < set(train_rows)
        assert files["random"] != files["kmeans"]
        assert files["mtl"] == train_rows and files["replay"] == pairs(tasks[name].replay())


def test_written_answers_are_those_of_the_model_that_had_just_learned_the_task(tree, tasks, tiny):
    tokenizer = load_tokenizer(tiny)
    for arm in WRITTEN:
        for place, name in enumerate(ORDER[:2], 1):
            found = load_records(rehearsed(tree, arm, place))
            model = load_model(tiny)
            load_adapter(model, tree / ("lora_base/mini_svamp" if place == 1 else folder(arm, 2)))
            merge_adapter(model)
            prompts = [tokenizer.render_prompt(record.prompt) for record in found]
            outputs = generate(model, prompts, tasks[name].max_new_tokens, tokenizer.stop_ids)
            assert [record.answer for record in found] == [tokenizer.decode(ids).strip() for ids in outputs], (arm, name)


def test_whose_inputs(tree, tasks):
    """self_output keeps the inputs of random; ssr and ssr_random choose among the same invented ones."""
    for place, name in enumerate(ORDER[:2], 1):
        prompts = {arm: [tuple(map(tuple, row["prompt"])) for row in read_jsonl(rehearsed(tree, arm, place).with_suffix(".answers.jsonl"))]
                   for arm in WRITTEN}  # fmt: skip
        assert prompts["self_output"] == [record.prompt for record in load_records(rehearsed(tree, "random", place))]
        made = load_records(tree / "synthetic" / f"{name}.jsonl")
        assert len(made) == 3 * KEPT
        real = {record.prompt for record in [*tasks[name].test, *demonstrations(tasks[name], 20, 0)]}
        for arm in SYNTHETIC:
            assert set(prompts[arm]) < {record.prompt for record in made} and not set(prompts[arm]) & real
        assert prompts["ssr"] != prompts["ssr_random"]


def test_the_base_invents_once_for_all_arms(whole):
    calls = json.loads((whole.parent / "calls.json").read_text())
    assert {file.name for file in (whole / "seed0/synthetic").glob("[!.]*")} == {f"{name}.jsonl" for name in ORDER[:2]}
    rows = [row for file in whole.glob("seed*/synthetic/*.jsonl") for row in read_jsonl(file)]
    assert len(rows) == 2 * 2 * 3 * KEPT and len(calls) >= 4
    samples = [read_jsonl(file)[-1]["index"] + 1 for file in whole.glob("seed*/synthetic/*.jsonl")]
    assert sum(samples) <= sum(calls) < 2 * sum(samples), "a second arm has sampled too"
    one, other = ((whole / f"seed{seed}/synthetic/mini_svamp.jsonl").read_bytes() for seed in (0, 1))
    assert one != other


def test_arms_differ(tree):
    last = {arm: (tree / folder(arm, 3) / "adapter_model.safetensors").read_bytes() for arm in ARMS}
    assert len(set(last.values())) == len(ARMS)


def test_none_is_a_plain_continuation(tree, tiny, tmp_path):
    """Bit for bit what a study of masks trains without a mask."""
    run(*words(tiny, tmp_path, "--pairs", ":".join(ORDER[:2]), "--mask", "none", "--max_test", "1"))
    plain = adapters(tmp_path)
    assert plain["lora_base/mini_svamp"] == adapters(tree)["lora_base/mini_svamp"]
    assert plain["lora_transfer/mini_svamp_to_mini_simpleqa"] == adapters(tree)[folder("none", 2)]


# ----------------------------------------------------------------------------------------------------------------------
# Added later, and other settings


def test_arms_and_orders_added_later(tree, tiny, tmp_path):
    """In a folder of its own, an arm at a time, the same bits; another order at the same place is another sequence."""
    run(*asked(tiny, tmp_path, "--rehearsal", "ssr,none"))
    told = run(*asked(tiny, tmp_path, "--rehearsal", "kmeans,mtl"))
    assert "plan       4 runs, 1 of them done before" in told
    assert [line.split()[0] for line in told[told.index("Sequences of") :].splitlines()[3:7]] == ["none", "kmeans", "ssr", "mtl"]
    mine, theirs = adapters(tmp_path), adapters(tree)
    assert len(mine) == 1 + 3 * 2 + 1 and all(theirs[name] == mine[name] for name in mine)
    for file in [*tmp_path.glob("rehearsal/**/*.jsonl"), *tmp_path.glob("synthetic/*.jsonl")]:
        same = tree / file.relative_to(tmp_path)
        assert load_records(file) and pairs(load_records(file)) == pairs(load_records(same)), file

    other = "mini_simpleqa,mini_svamp"
    told = run(*asked(tiny, tmp_path, "--rehearsal", "none,random", "--sequence", other))
    assert "plan       3 runs, 0 of them done before" in told and "Sequences of 2 or 3 stages" in told
    assert {name: found for name, found in adapters(tmp_path).items() if name in mine} == mine
    found = {(one["arm"], one["order"]) for one in read_json(tmp_path / "matrix.json")["sequences"]}
    assert found == {(arm, NAME) for arm in ("none", "ssr", "kmeans", "mtl")} | {("none", other), ("random", other)}
    assert "nothing to do" in run(*asked(tiny, tmp_path, "--rehearsal", "none", "--sequence", other))


def test_answers_written_anew_before_every_stage(tree, tiny, tasks, tmp_path):
    run(*asked(tiny, tmp_path, "--rehearsal", "self_output", "--relabel", "every_stage"))
    files = {stage: tmp_path / "rehearsal/self_output" / NAME / str(stage) for stage in (2, 3)}
    assert {file.name for file in files[3].glob("*")} == {
        "1_mini_svamp.jsonl", "2_mini_simpleqa.jsonl", "1_mini_svamp.answers.jsonl", "2_mini_simpleqa.answers.jsonl"}  # fmt: skip
    first, again = (load_records(files[stage] / "1_mini_svamp.jsonl") for stage in (2, 3))
    assert pairs(first) == pairs(load_records(rehearsed(tree, "self_output", 1)))
    assert pairs(first) != pairs(again)
    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    load_adapter(model, tmp_path / folder("self_output", 2))
    merge_adapter(model)
    outputs = generate(model, [tokenizer.render_prompt(r.prompt) for r in again], tasks["mini_svamp"].max_new_tokens, tokenizer.stop_ids)
    assert [record.answer for record in again] == [tokenizer.decode(ids).strip() for ids in outputs]


def test_equal_steps(tiny, tmp_path):
    """Rehearsal then replaces rows of the new task; mtl still passes over everything."""
    run(*asked(tiny, tmp_path, "--rehearsal", "none,random,mtl", "--equal", "steps", "--mask", "highest", "--optimizer", "muon"))
    records = {(arm, stage): read_json(tmp_path / folder(arm, stage) / "run.json") for arm in ("none", "random") for stage in (2, 3)}
    assert {record["steps"] for record in records.values()} == {3}
    assert records["random", 3]["examples"] == ROWS + 2 * KEPT and records["none", 3]["examples"] == ROWS
    assert read_json(tmp_path / folder("mtl", 3) / "run.json")["steps"] == 9
    # And a mask lies over all rows of every arm, and Muon steps on it.
    for record in records.values():
        assert record["run"]["policy"] == "highest" and record["mask"]["dropped_share"] > 0.2
        assert record["optimizer"]["name"] == "muon"
    assert records["random", 3]["mask"]["completion_tokens"] > records["none", 3]["mask"]["completion_tokens"]


def test_all_weights(tiny, tmp_path):
    """Each stage leaves a model of its own, the next one goes on from it; the base invents, and not what was trained last."""
    run(*asked(tiny, tmp_path, "--full", "--rehearsal", "ssr,ewc", "--sequence", ",".join(ORDER[:2])))
    name = ",".join(ORDER[:2])
    found = {folder: (tmp_path / folder / "model.safetensors").read_bytes() for folder in (
        "lora_base/mini_svamp", f"sequence/ssr/{name}/2_mini_simpleqa", f"sequence/ewc/{name}/2_mini_simpleqa")}  # fmt: skip
    assert len(set(found.values())) == 3
    record = read_json(tmp_path / "matrix.json")
    assert {one["arm"] for one in record["sequences"]} == {"ssr", "ewc"}
    rows = load_records(rehearsed(tmp_path, "ssr", 1, name))
    model, tokenizer = load_model(tmp_path / "lora_base/mini_svamp"), load_tokenizer(tiny)
    outputs = generate(model, [tokenizer.render_prompt(r.prompt) for r in rows], find_task(ORDER[0]).max_new_tokens, tokenizer.stop_ids)
    assert [record.answer for record in rows] == [tokenizer.decode(ids).strip() for ids in outputs]


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be


def test_no_rows_to_replay(tiny, tmp_path, capsys):
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(20)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets = f"mine={tmp_path / 'mine.jsonl'},mini_svamp"
    command = asked(tiny, tmp_path / "out", "--sequence", "mine,mini_svamp", "--datasets", datasets, "--rehearsal", "replay")
    assert "--rehearsal replay: mine comes without rows for it" in one_line(command, capsys)
    assert not (tmp_path / "out/sequence").exists()


def test_no_answer_above_the_floor(tiny, tmp_path, capsys):
    assert train.main(asked(tiny, tmp_path, "--rehearsal", "self_output", "--floor", "0")) == 2
    told = capsys.readouterr().err.splitlines()
    assert "0 of 6 answers kept, 6 below the floor" in told[-2]
    assert "--rehearsal self_output: not one of 6 answers for mini_svamp can be used" in told[-1] and "lower --floor" in told[-1]


def test_a_model_that_cannot_invent(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data.synthesis, "sample", lambda *args, seeds, **_: [[] for _ in seeds])
    told = one_line(asked(tiny, tmp_path, "--rehearsal", "ssr"), capsys)
    assert "mini_svamp: 0 of 18 items from" in told and "This model cannot make them so" in told
    assert (tmp_path / "lora_base/mini_svamp/run.json").exists(), "what was trained stays"


def test_without_scikit_learn(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    assert "pip install scikit-learn" in one_line(asked(tiny, tmp_path, "--rehearsal", "kmeans"), capsys)


# ----------------------------------------------------------------------------------------------------------------------
# Killed


KILLED = ("--sequence", NAME, "--rehearsal", "ssr,ewc", "--rehearsal_share", "0.25", "--max_train", "24", "--max_test", "4",
          "--epochs", "1", "--batch_size", "8", "--gradient_accumulation", "1", "--max_length", "256",
          "--max_new_tokens", "8", "--learning_rate", "1e-2",
          "--log_steps", "2", "--save_steps", "2", "--device", "cpu", "--dtype", "float32")  # fmt: skip
PLACES = [
    Place("data.synthesis:append_jsonl", 1, leaving=True),  # some of the items are there
    Place("data.refine:mean_logprobs", 1),  # the items are chosen, the answers not written
    Place("lora.rehearsal:write_jsonl", 1),  # the answers are written, the rows not
    Place("step", 3),  # of stage 2, with rehearsal
    Place("data.synthesis:append_jsonl", 1),  # of the second task
    Place("step", 4, leaving=True),  # of stage 3, behind a checkpoint
    Place("lora.fisher:write_tensors", 1),
    Place("step", 4),  # of stage 3 with its anchor
]


def everything(out) -> dict:
    found = outcome(out)
    for pattern in ("rehearsal/**/*.jsonl", "synthetic/*.jsonl", "matrix.json", "**/fisher.safetensors"):
        found |= {str(file.relative_to(out)): file.read_bytes() for file in out.glob(pattern)}
    return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def wanted(bench) -> dict:
    undisturbed = bench.start(bench.folder / "whole", study=KILLED, changes="test_rehearsal:invent")
    assert undisturbed.status == 0, undisturbed.output
    found = everything(bench.folder / "whole")
    assert {"matrix.json", "synthetic/mini_simpleqa.jsonl", f"rehearsal/ssr/{NAME}/2_mini_simpleqa.jsonl"} < set(found)
    return found


def test_killed_anywhere_it_goes_on_to_the_same_bits(bench, wanted, tmp_path):
    for place in PLACES:
        cut = bench.start(tmp_path / "cut", study=KILLED, changes="test_rehearsal:invent", place=place)
        assert cut.status == -signal.SIGKILL, (place, cut.output)
    last = bench.start(tmp_path / "cut", study=KILLED, changes="test_rehearsal:invent")
    assert last.status == 0, last.output
    assert unequal(everything(tmp_path / "cut"), wanted) == []


def as_rank(command: list[str], rank: int, shared: dict[str, str], log: Path) -> None:
    """One of the processes that torchrun would start."""
    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    invent()
    os._exit(train.main(command))


def test_two_processes_share_the_arms(bench, wanted, tmp_path):
    """Also ssr and ssr_random, which wait for the same invented rows."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [*KILLED, "--rehearsal", "ssr,ssr_random,ewc", "--model", str(bench.model), "--out", str(tmp_path / "out"), "--shard", "runs"]
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    ranks = [bench.context.Process(target=as_rank, args=(command, rank, shared, log)) for rank, log in enumerate(logs)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(200)
        rank.kill()
    told = [log.read_text() for log in logs]
    assert [rank.exitcode for rank in ranks] == [0, 0], told
    assert "processes  2, which share the study's runs" in told[0] and "Sequences of 3 stages" in told[0] and "Sequences" not in told[1]
    found = everything(tmp_path / "out")
    differing = {name for name in unequal(found, wanted) if "ssr_random" not in name}
    assert differing == {"matrix.json"}, differing
    assert {one["arm"] for one in read_json(tmp_path / "out/matrix.json")["sequences"]} == {"ssr", "ssr_random", "ewc"}


def test_another_mask_is_another_study(whole, tiny, tmp_path, capsys):
    assert train.main(asked(tiny, whole, "--seeds", "0", "--rehearsal", "none", "--mask", "highest")) == 2
    assert "mask: none in the folder, highest asked" in capsys.readouterr().err
    assert "asks a model trained on each task alone" in one_line(asked(tiny, tmp_path, "--rehearsal", "none", "--mask", "dpf"), capsys)
