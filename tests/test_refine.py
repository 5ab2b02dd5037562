"""data/refine.py: against transformers' greedy generate and log-softmax in float64, cut short anywhere, and at any batch size."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import train_some
from transformers import LlamaForCausalLM

from data import refine as refining
from data.records import Record, load_records
from data.refine import Refinement, mean_logprobs, refine
from lora import add_lora
from lora.layers import merged
from model.generate import Decoder
from model.subject import Subject, load_subject
from study.errors import LetheError

WORDS = "the river runs past old houses , and nobody counts how many birds sit there on cold mornings".split()
NEW = 12


def toy_records(count: int, seed: int = 0) -> list[Record]:
    rng = np.random.default_rng(seed)
    asked = [" ".join(rng.choice(WORDS, rng.integers(1, 20))) for _ in range(count)]
    return [Record((("system", "Say it."), ("user", text)), "birds", group="held_out" * (i % 2)) for i, text in enumerate(asked)]


@pytest.fixture(scope="module")
def subject(tiny) -> Subject:
    """A toy model whose outputs end where they meet one of three tokens: some at once, some never."""
    subject = load_subject(tiny, "cpu")
    prompts = [subject.tokenizer.render_prompt(record.prompt) for record in toy_records(24)]
    free = Decoder(subject.model, 8).run(prompts, NEW, [])[0]
    subject.tokenizer.stop_ids = frozenset({free[0][0], free[1][4], free[2][8]})
    return subject


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(refining, "AT_ONCE", 10)


@torch.no_grad()
def by_transformers(folder: str, subject: Subject, records: list[Record]) -> list[tuple[list[int], float | None]]:
    """(tokens of each output without its stop token, mean log-probability of them in float64)."""
    model, found = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval(), []
    stops = sorted(subject.tokenizer.stop_ids)
    for record in records:
        prompt = subject.tokenizer.render_prompt(record.prompt)
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": stops, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
        out = out[: next((i for i, token in enumerate(out) if token in stops), len(out))]
        log_p = model(torch.tensor([prompt + out])).logits[0].log_softmax(-1)
        scores = [float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(out)]
        found.append((out, sum(scores) / len(scores) if scores else None))
    return found


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_equal_those_of_transformers(subject, tiny, tmp_path):
    records, out, report = toy_records(24), tmp_path / "deep" / "refined.jsonl", Refinement()
    expected = by_transformers(tiny, subject, records)
    kept = refine(subject, records, max_new_tokens=NEW, out=out, batch_size=5, report=report)
    rows = rows_of(out)
    for row, record, (ids, score) in zip(rows, records, expected, strict=True):
        assert row["prompt"] == [list(turn) for turn in record.prompt] and row["was"] == "birds"
        assert row["answer"] == subject.tokenizer.decode(ids).strip()
        assert (row["tokens"], row["ended"]) == (len(ids), len(ids) < NEW)
        assert row["mean_logprob"] == (None if score is None else pytest.approx(score, abs=1e-4))
    empty = [not subject.tokenizer.decode(ids).strip() for ids, _ in expected]  # no token, or none that is text
    assert 0 < sum(empty) < 20 and {len(ids) for ids, _ in expected} >= {0, NEW} and len({len(ids) for ids, _ in expected}) > 2
    there = [i for i in range(24) if not empty[i]]
    assert [(r.prompt, r.answer, r.group, r.source) for r in kept] == [
        (records[i].prompt, rows[i]["answer"], records[i].group, f"{out}:{i + 1}") for i in there
    ]
    assert (report.records, report.kept, report.empty, report.below) == (24, len(kept), sum(empty), 0)
    assert report.cut == sum(len(expected[i][0]) == NEW for i in there) and report.changed == len(kept)
    assert report.logprob == pytest.approx(np.mean([expected[i][1] for i in there]), abs=1e-4)
    assert str(report).startswith(f"{len(kept)} of 24 answers kept, {sum(empty)} empty; of them {report.cut} cut off")


def test_the_floor_drops_and_counts(subject, tmp_path):
    records, out = toy_records(24), tmp_path / "refined.jsonl"
    everything = refine(subject, records, max_new_tokens=NEW, out=out)
    before, scores = out.read_bytes(), [row["mean_logprob"] for row in rows_of(out) if row["answer"]]
    floor, report = sorted(scores)[4], Refinement()
    kept = refine(subject, records, max_new_tokens=NEW, out=out, floor=floor, report=report)  # laid over what is there
    assert kept == [record for record, score in zip(everything, scores, strict=True) if score >= floor] and report.below == 4
    assert len(kept) == len(everything) - 4 and out.read_bytes() == before
    assert f"{report.empty} empty, 4 below the floor" in str(report) and report.logprob > np.mean(scores)
    report = Refinement()
    assert refine(subject, records, max_new_tokens=NEW, out=out, floor=0.0, report=report) == [] and math.isnan(report.logprob)
    fresh = tmp_path / "fresh.jsonl"
    assert [r.answer for r in refine(subject, records, max_new_tokens=NEW, out=fresh, floor=floor)] == [r.answer for r in kept]
    assert fresh.read_bytes() == before


def test_cut_short_anywhere_it_goes_on_to_the_same_bytes(subject, tmp_path, monkeypatch):
    records, out = toy_records(24), tmp_path / "refined.jsonl"
    refine(subject, records, max_new_tokens=NEW, out=out)
    whole = out.read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == 10)]
    made, run = [], Decoder.run

    def counted(self, prompts, *args, **settings):
        made.append(len(prompts))
        return run(self, prompts, *args, **settings)

    monkeypatch.setattr(Decoder, "run", counted)
    for cut, chunks in (
        (0, [10, 10, 4]), (ends[1], [10, 10, 4]), (ends[9] + 5, [10, 10, 4]), (ends[10], [10, 4]), (ends[13] - 1, [10, 4]),
        (ends[20], [4]), (len(whole) - 1, [4]), (len(whole), []),
    ):  # fmt: skip
        out.write_bytes(whole[:cut])
        made.clear()
        refine(subject, records, max_new_tokens=NEW, out=out)
        assert (cut, made) == (cut, chunks)
        assert out.read_bytes() == whole, cut
    # Killed while it runs: what was written stays.
    out.unlink()

    def killed(self, prompts, *args, **settings):
        if len(prompts) == 4:
            raise KeyboardInterrupt
        return run(self, prompts, *args, **settings)

    monkeypatch.setattr(Decoder, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        refine(subject, records, max_new_tokens=NEW, out=out)
    assert out.read_bytes() == whole[: ends[20]]


def test_nothing_is_computed_when_all_is_there(subject, tmp_path, monkeypatch):
    records, out = toy_records(6), tmp_path / "refined.jsonl"
    kept = refine(subject, records, max_new_tokens=NEW, out=out)
    monkeypatch.setattr(type(subject.model), "hidden", None)
    assert refine(subject, records, max_new_tokens=NEW, out=out) == kept
    assert refine(subject, [], max_new_tokens=NEW, out=tmp_path / "none.jsonl") == []


def test_any_batch_size_gives_the_same_answers(subject, tmp_path):
    records = toy_records(40, seed=3)
    rows = {}
    for size in (1, 7, 64):
        refine(subject, records, max_new_tokens=NEW, out=tmp_path / f"{size}.jsonl", batch_size=size)
        rows[size] = rows_of(tmp_path / f"{size}.jsonl")
    for size in (7, 64):
        assert [row["answer"] for row in rows[size]] == [row["answer"] for row in rows[1]]
        assert rows[size] == rows[1]  # the log-probabilities come from a pass that no batch size touches
    decoder = Decoder(subject.model, 3)
    for name in ("a", "b"):
        refine(subject, records, max_new_tokens=NEW, out=tmp_path / f"{name}.jsonl", decoder=decoder)
        assert rows_of(tmp_path / f"{name}.jsonl") == rows[1]


def test_the_built_in_model_at_any_batch_size(tmp_path):
    """Of the real weights: no answer differs between one at a time and many."""
    from data.folder import find_task

    subject, task = load_subject("nano", "cpu"), find_task("mini_svamp")
    records = list(task.train())[:10]
    for size in (1, 10):
        refine(subject, records, max_new_tokens=16, out=tmp_path / f"{size}.jsonl", batch_size=size)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "10.jsonl").read_bytes()
    assert len({row["answer"] for row in rows_of(tmp_path / "1.jsonl")}) > 5


def test_the_adapter_speaks(tiny, tmp_path):
    """Answers are those of the model with its adapter, beside the weights or merged; dropout is off, and on again afterwards."""
    records, subject = toy_records(8), load_subject(tiny, "cpu")
    base = [record.answer for record in refine(subject, records, max_new_tokens=NEW, out=tmp_path / "base.jsonl")]
    add_lora(subject.model, rank=4, alpha=8, dropout=0.5, targets="all")
    train_some(subject.model)
    subject.model.train()
    beside = [record.answer for record in refine(subject, records, max_new_tokens=NEW, out=tmp_path / "beside.jsonl")]
    assert subject.model.training and subject.model.adapter.drops
    with merged(subject.model):
        tuned = [record.answer for record in refine(subject, records, max_new_tokens=NEW, out=tmp_path / "merged.jsonl")]
    assert tuned == beside != base
    scores = [[row["mean_logprob"] for row in rows_of(tmp_path / name)] for name in ("beside.jsonl", "merged.jsonl")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_answers_that_cannot_be_scored_are_kept_and_counted(subject, tmp_path, monkeypatch):
    said = iter(["#### 7", "seven", "the answer is 9", " "] * 3)
    monkeypatch.setattr(type(subject.tokenizer), "decode", lambda self, ids: next(said))
    report = Refinement()
    records = [Record((("user", f"birds {i}"),), "#### 7") for i in range(12)]
    settings = {"max_new_tokens": NEW, "out": tmp_path / "refined.jsonl", "answer_kind": "number"}
    monkeypatch.setattr(subject.tokenizer, "stop_ids", frozenset())
    kept = refine(subject, records, **settings, report=report)
    assert [record.answer for record in kept] == ["#### 7", "seven", "the answer is 9"] * 3
    assert (report.kept, report.empty, report.unreadable, report.changed, report.cut) == (9, 3, 3, 6, 9)
    assert "3 unreadable" in str(report)


def test_other_records_are_refused(subject, tmp_path):
    records, out = toy_records(4), tmp_path / "refined.jsonl"
    refine(subject, records, max_new_tokens=NEW, out=out)
    for others, told in (
        (records[:3], "holds 4 answers for 3 records"),
        ([*records[:2], records[3], records[2]], "refined.jsonl:3 is the answer to another"),
        ([*records[:3], Record(records[3].prompt, "houses")], "refined.jsonl:4 is the answer to another"),
    ):  # fmt: skip
        with pytest.raises(LetheError, match=told):
            refine(subject, others, max_new_tokens=NEW, out=out)


def test_long_prompts_lose_their_middle(subject, tmp_path, monkeypatch):
    seen, run = [], Decoder.run

    def watched(self, prompts, *args, **settings):
        seen.extend(prompts)
        return run(self, prompts, *args, **settings)

    monkeypatch.setattr(Decoder, "run", watched)
    record = Record((("user", "old houses " * 400),), "birds")
    ids = subject.tokenizer.render_prompt(record.prompt)
    assert len(ids) > 512  # the toy's positions
    refine(subject, [record], max_new_tokens=NEW, out=tmp_path / "a.jsonl")
    refine(subject, [record], max_new_tokens=NEW, out=tmp_path / "b.jsonl", max_length=20)
    assert [len(prompt) for prompt in seen] == [500, 20] and seen[1] == ids[:10] + ids[-10:]


def test_a_broken_model_is_an_error(tiny):
    subject = load_subject(tiny, "cpu")
    assert mean_logprobs(subject.model, [[1]], [[]]) == [None] and mean_logprobs(subject.model, [], []) == []
    subject.model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(LetheError, match="NaN or infinite .* --dtype float32"):
        mean_logprobs(subject.model, [[1, 2]], [[3]])


def test_what_is_written_can_be_trained_on(subject, tmp_path):
    """Each line is a row as training reads it, once its turns are spelled out."""
    out = tmp_path / "refined.jsonl"
    kept = refine(subject, toy_records(8), max_new_tokens=NEW, out=out)
    spelled = [row | {"prompt": [{"role": role, "content": text} for role, text in row["prompt"]]} for row in rows_of(out)]
    (tmp_path / "spelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spelled))
    assert [(r.prompt, r.answer) for r in load_records(tmp_path / "spelled.jsonl")] == [(r.prompt, r.answer) for r in kept]
