"""A study that is killed, stopped, damaged or starved goes on to the same bits. In its long form: benchmarks/survive.py.

Each start is a process of its own, forked from one that has imported everything, and each kill a SIGKILL from outside.
"""

import json
import random
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest

from benchmarks.survive import ONE_RUN, PHASES, STUDY, TASKS, Attempt, Bench, Place, board_of, killed_study, outcome, planned, unequal
from model.snapshot import newest_checkpoint, read_checkpoint
from study.folder import read_json

FIRST, SECOND, THIRD = f"lora_base/{TASKS[0]}", f"lora_base/{TASKS[1]}", f"lora_transfer/{TASKS[0]}_to_{TASKS[1]}"


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("survive"))


@pytest.fixture(scope="module")
def undisturbed(bench) -> Attempt:
    attempt = bench.start(bench.folder / "study")
    assert attempt.status == 0, attempt.output
    return attempt


@pytest.fixture(scope="module")
def whole(bench, undisturbed) -> dict:
    return outcome(bench.folder / "study")


@pytest.fixture(scope="module")
def one_run(bench) -> dict:
    attempt = bench.start(bench.folder / "one_run", study=ONE_RUN)
    assert attempt.status == 0, attempt.output
    return outcome(bench.folder / "one_run")


def finish(bench, out, wanted, study=ONE_RUN) -> Attempt:
    """Starts the study again, lets it come to its end, and compares."""
    attempt = bench.start(out, study=study)
    assert attempt.status == 0, attempt.output
    assert unequal(outcome(out), wanted) == []
    return attempt


def killed(bench, out, place: Place, study=ONE_RUN) -> Attempt:
    attempt = bench.start(out, study=study, place=place)
    assert attempt.status == -signal.SIGKILL, attempt.output
    return attempt


def checkpoints(out, run: str) -> list[int]:
    """The steps of a run's whole checkpoints."""
    folders = [file.parent for file in (out / run / "checkpoints").glob("*/manifest.json")]
    return sorted(read_checkpoint(folder)[1]["step"] for folder in folders)


def test_what_is_compared(whole, undisturbed):
    """Four runs of twelve steps, each with its log and its board; ten cells; scores of one reference model."""
    names = set(whole)
    assert sum(name.endswith("adapter_model.safetensors") for name in names) == 4 == sum(name.endswith("run.json") for name in names)
    assert sum("/eval/" in name for name in names) == 10 and "eval_results_mask.json" in names
    assert [row["step"] for row in whole[f"{THIRD}/metrics.jsonl"]] == [1, 2, 4, 6, 8, 10, 12]
    assert {"train/loss", "train/grad_norm", "tokens"} < set(whole[f"{THIRD}/metrics.jsonl"][0])
    assert [step for step, _ in whole[f"tensorboard/{THIRD.replace('/', '__')}"]["train/loss"]] == [1, 2, 4, 6, 8, 10, 12]
    assert {phase: len(calls) for phase, calls in undisturbed.entered.items()} == {
        "step": 48, "save": 12, "scoring": 1, "evaluation": 10, "report": 1}  # fmt: skip


# In the order in which a study comes to them: between forward and backward; in a save with the adapter written, with the tensors
# written, before pruning; while going on, twice; in an optimizer step; with the adapter written but not run.json; in
# scoring, in an evaluation, between two, before the results.
PLACES = [
    Place("train:micro_nll", 5, leaving=True),
    Place("lora.resume:save_state", 2, leaving=True),
    Place("model.snapshot:write_tensors", 1, leaving=True),
    Place("lora.resume:prune", 1),
    Place("lora.resume:restore_rng", 1),
    Place("study.logging:append_jsonl", 1),
    Place("train:write_back", 1),
    Place("train:save_state", 1, leaving=True),
    Place("masking.score:micro_nll", 1, leaving=True),
    Place("eval:generate_and_score", 2, leaving=True),
    Place("eval:write_jsonl", 3),
    Place("report", 1),
]


def test_killed_in_every_place(bench, whole, tmp_path):
    for place in PLACES:
        killed(bench, tmp_path, place, STUDY)
        assert all(len(checkpoints(tmp_path, run)) <= 3 for run in (FIRST, SECOND, THIRD))
    finish(bench, tmp_path, whole, STUDY)
    assert checkpoints(tmp_path, THIRD) == [6, 9], "at most --keep of them"


def test_killed_at_random_moments(bench, undisturbed, whole, tmp_path):
    moments = planned(random.Random(7), undisturbed, ["any", "save", "scoring", "evaluation"])
    cut, _ = killed_study(bench, tmp_path, moments)
    assert unequal(outcome(tmp_path), whole) == [] and all(set(attempt.phases) <= set(PHASES) for attempt in cut)


def test_a_broken_resume_is_seen(bench, one_run, tmp_path):
    """Without the optimizer's moments the run goes on well, and ends in other bits: the comparison tells."""
    killed(bench, tmp_path, Place("save", 2, leaving=True))
    assert bench.start(tmp_path, study=ONE_RUN, changes="test_survive:forget_moments").status == 0
    told = unequal(outcome(tmp_path), one_run)
    assert {f"{SECOND}/{name}" for name in ("adapter_model.safetensors", "metrics.jsonl", "run.json")} <= set(told)
    assert f"base/eval/{TASKS[1]}.jsonl" not in told


def forget_moments():
    import lora.resume

    lora.resume.unpack = lambda *_: None


@pytest.mark.parametrize("more", ["--optimizer muon --full --dtype bfloat16", "--dtype float16"])
def test_other_ways_to_train(bench, tmp_path, more):
    """Muon's momentum, the float32 masters of full fine-tuning, the loss scale of float16: all of it comes back."""
    study = (*ONE_RUN, *more.split())
    assert bench.start(tmp_path / "whole", study=study).status == 0
    killed(bench, tmp_path / "cut", Place("step", 8, leaving=True), study)
    told = finish(bench, tmp_path / "cut", outcome(tmp_path / "whole"), study).output
    assert "after step 6 of 12" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_ends_with_130(bench, one_run, tmp_path, number):
    attempt = bench.start(tmp_path, study=ONE_RUN, place=Place("train:micro_nll", 5, wait=False), number=number)
    assert attempt.status == 130 and "stopping: this step is finished and saved" in attempt.output, attempt.output
    assert attempt.output.rstrip().endswith("the same command goes on with the rest") and "Traceback" not in attempt.output
    last = checkpoints(tmp_path, SECOND)[-1]  # the step that was under way, or one behind it on a busy machine
    assert last >= 5 and f"after step {last} of 12" in finish(bench, tmp_path, one_run).output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_nothing_trains_ends_with_130_too(bench, one_run, tmp_path, number):
    out = Path(shutil.copytree(bench.folder / "one_run", tmp_path / "out"))
    for file in out.rglob("eval/*.jsonl"):
        file.unlink()
    attempt = bench.start(out, study=ONE_RUN, place=Place("eval:write_jsonl", 2), number=number)
    assert attempt.status == 130 and "stopped; what is done is kept" in attempt.output and "Traceback" not in attempt.output, attempt.output
    assert [str(file.relative_to(out)) for file in out.rglob("eval/*.jsonl")] == [f"base/eval/{TASKS[1]}.jsonl"]
    finish(bench, out, one_run)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(bench, one_run, tmp_path):
    killed(bench, tmp_path, Place("save", 3, leaving=True))
    newest = newest_checkpoint(tmp_path / SECOND / "checkpoints")
    file = newest / "training_state.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    told = finish(bench, tmp_path, one_run).output
    assert re.search(rf"checkpoint .*{newest.name} is damaged \(.*training_state.*going on from .*step_6\b", told), told
    assert "after step 6 of 12" in told


def test_changed_data_is_refused_and_named(bench, tmp_path):
    rows = [{"prompt": f"What follows {i}?", "answer": str(i + 1)} for i in range(40)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, study = file.read_text(), ("--datasets", f"mine={file}", *ONE_RUN[2:])
    killed(bench, tmp_path / "out", Place("save", 2, leaving=True), study)
    file.write_text(before.replace('"1"', '"7"'))
    attempt = bench.start(tmp_path / "out", study=study)
    assert attempt.status == 2 and "data of mine" in attempt.output, attempt.output
    file.write_text(before)
    attempt = bench.start(tmp_path / "out", study=study)
    assert attempt.status == 0 and "after step 6 of 12" in attempt.output, attempt.output


def make_loss_nan():
    """The loss of step 8 (counted from 0), behind which a checkpoint is due; the optimizer steps as ever."""
    import train

    genuine, calls = train.forward_backward, []

    def forward_backward(*args):
        calls.append(1)
        loss, *rest = genuine(*args)
        return (loss * float("nan") if len(calls) == 9 else loss, *rest)

    train.forward_backward = forward_backward


def make_gradient_nan():
    """The gradient of step 8, whose own loss is a number: its checkpoint would be one of NaN weights."""
    import train

    genuine, calls = train.collect_gradients, []

    def collect_gradients(parameters, masters):
        genuine(parameters, masters)
        calls.append(1)
        if len(calls) == 9:
            masters[0].grad.fill_(float("nan"))

    train.collect_gradients = collect_gradients


@pytest.mark.parametrize("harm", [make_loss_nan, make_gradient_nan])
def test_nan_names_step_and_examples_and_is_not_saved(bench, one_run, tmp_path, harm):
    attempt = bench.start(tmp_path, study=ONE_RUN, changes=f"test_survive:{harm.__name__}")
    assert attempt.status == 2, attempt.output
    line = attempt.output.rstrip().splitlines()[-1]
    assert re.search(r"^error: the (loss|gradient).* nan at step 8 \(examples \[\d+(, \d+)+\] …\); lower --learning_rate", line), line
    assert checkpoints(tmp_path, SECOND) == [3, 6]
    assert "after step 6 of 12" in finish(bench, tmp_path, one_run).output


def starve():
    """No file of this process may grow beyond 60 kB: an adapter fits (33 kB), a checkpoint's tensors do not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))


def test_a_full_disk_is_one_line_and_keeps_what_is_done(bench, one_run, tmp_path):
    killed(bench, tmp_path, Place("save", 2, leaving=True))
    attempt = bench.start(tmp_path, study=ONE_RUN, changes="test_survive:starve")
    assert attempt.status == 2 and "Traceback" not in attempt.output, attempt.output
    assert re.search(r"error: (cannot write|no space left for) .*training_state\.safetensors", attempt.output), attempt.output
    assert checkpoints(tmp_path, SECOND) == [3, 6] and not list(tmp_path.rglob("*.tmp"))
    finish(bench, tmp_path, one_run)


def test_a_checkpoint_from_elsewhere(bench, one_run, tmp_path):
    """--resume_stage1 with another study's checkpoint: the run ends in the same adapter."""
    killed(bench, tmp_path / "one", Place("save", 2, leaving=True))
    folder = newest_checkpoint(tmp_path / "one" / SECOND / "checkpoints")
    attempt = bench.start(tmp_path / "two", "--resume_stage1", str(folder), study=ONE_RUN)
    assert attempt.status == 0 and "after step 6 of 12" in attempt.output, attempt.output
    name = f"{SECOND}/adapter_model.safetensors"
    assert (tmp_path / "two" / name).read_bytes() == one_run[name]
    assert read_json(tmp_path / "two" / SECOND / "run.json")["final_loss"] == one_run[f"{SECOND}/run.json"]["final_loss"]


def test_a_fold_is_seen(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step in (1, 2, 2, 3):
            writer.add_scalar("loss", 1.0, step)
    with pytest.raises(AssertionError, match="loss folds back"):
        board_of(tmp_path)
