"""Records to tokens on disk, and tokens to the batches of a step."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import random_examples

from data.batching import Examples, collate, cut_middle, step_indices, steps_of, tokenize
from data.records import Record, iter_records
from model import load_tokenizer
from study.errors import LetheError


@pytest.fixture(scope="module")
def nano():
    return load_tokenizer("nano")


def record(question, answer, line=1):
    return Record((("user", question),), answer, f"some/file.jsonl:{line}")


RECORDS = [record("What is 2 + 2?", "It is 4."), record("And 3 + 4?", "7", 2), record("Who?", "Nobody at all.", 3)]


def test_tokens_are_prompt_and_answer(nano, tmp_path):
    examples = tokenize(RECORDS, nano, 64, "f", tmp_path)
    assert len(examples) == 3 and examples.flat.dtype == np.uint32 and isinstance(examples.flat, np.memmap)
    for i, entry in enumerate(RECORDS):
        prompt, answer = nano.render_prompt(entry.prompt), nano.render_answer(entry.answer)
        assert examples.ids(i).tolist() == prompt + answer and examples.completion(i).tolist() == answer
        assert examples.completion(i)[-1] == nano.end_id
    trainable = sum(len(examples.completion(i)) for i in range(3))
    report = examples.report
    assert report["rows"] == report["examples"] == 3 and report["trainable_tokens"] == trainable == examples.completion_offsets[-1]
    assert report["tokens"] == len(examples.flat) and report["source"] == "some/file.jsonl"
    assert report["length_p50_p95_max"][2] == examples.lengths.max() and report["truncated_prompts"] == report["answers_too_long"] == 0


def test_a_long_prompt_loses_its_middle(nano, tmp_path):
    long = record("one " * 50 + "What is it?", "It is 4.")
    whole, answer = nano.render_prompt(long.prompt), nano.render_answer(long.answer)
    examples = tokenize([long, RECORDS[0]], nano, 40, "f", tmp_path)
    ids = examples.ids(0).tolist()
    room = 40 - len(answer)
    assert len(ids) == 40 and ids[room:] == answer and examples.starts[0] == room
    assert ids[: room // 2] == whole[: room // 2] and ids[room // 2 : room] == whole[len(whole) - (room - room // 2) :]
    assert ids[0] == nano.bos and nano.decode(ids[:room]).endswith("What is it?\nOutput:")
    assert examples.report["truncated_prompts"] == 1 and examples.report["examples"] == 2
    assert cut_middle(list(range(10)), 4) == [0, 1, 8, 9] and cut_middle(list(range(10)), 5) == [0, 1, 7, 8, 9]
    assert cut_middle(list(range(10)), 1) == [9]


def test_answers_that_do_not_fit_are_dropped_and_counted(nano, tmp_path):
    answer = "word " * 60
    size = len(nano.render_answer(answer))
    just = tokenize([record("Say it.", answer), RECORDS[0]], nano, size + 1, "f", tmp_path)
    assert just.report["answers_too_long"] == 0 and just.starts[0] == 1 and len(just.ids(0)) == size + 1
    short = tokenize([record("Say it.", answer), RECORDS[0]], nano, size, "f", tmp_path)
    assert short.report["answers_too_long"] == 1 and len(short) == 1 and short.report["rows"] == 2
    with pytest.raises(LetheError, match="some/file.jsonl: of 1 examples none is left .* --max_length 10"):
        tokenize([record("Say it.", answer)], nano, 10, "g", tmp_path)
    with pytest.raises(LetheError, match="not one record to train on"):
        tokenize([], nano, 10, "h", tmp_path)


def test_tokens_are_cached_by_content(nano, tmp_path):
    first = tokenize(RECORDS, nano, 64, "f", tmp_path)

    def untouchable():
        raise AssertionError("the cache was not used")
        yield

    again = tokenize(untouchable(), nano, 64, "f", tmp_path)
    assert again.key == first.key and np.array_equal(again.flat, first.flat) and again.report == first.report
    keys = {first.key}
    for changed in ({"fingerprint": "g"}, {"max_length": 65}, {"limit": 2}):
        other = tokenize(RECORDS, nano, **{"max_length": 64, "fingerprint": "f", "cache": tmp_path, **changed})
        keys.add(other.key)
    assert len(keys) == 4 and len(other) == 2
    assert tokenize(RECORDS, load_tokenizer("nano", "plain"), 64, "f", tmp_path).key == first.key
    # What was cut short is written anew: the report is the last file.
    (tmp_path / first.key / "report.json").unlink()
    (tmp_path / first.key / "ids.bin").write_bytes(b"1234")
    assert np.array_equal(tokenize(RECORDS, nano, 64, "f", tmp_path).flat, first.flat)


def test_a_stream_is_not_held(nano, tmp_path):
    """Records are taken one by one, none after the limit, and a jsonl file is read as it goes."""
    alive = Counter()

    class Watched(str):
        def __del__(self):
            alive["now"] -= 1

    def stream():
        for i in range(10**9):
            text = Watched(f"number {i}")
            alive["now"] += 1
            alive["most"] = max(alive["most"], alive["now"])
            alive["made"] += 1
            yield Record((("user", text),), "yes", f"x:{i}")

    examples = tokenize(stream(), nano, 64, "f", tmp_path, limit=500)
    assert len(examples) == 500 and alive["made"] <= 501 and alive["most"] <= 4
    file = tmp_path / "long.jsonl"
    with file.open("w") as handle:
        for i in range(5000):
            handle.write(json.dumps({"instruction": f"number {i}", "output": "yes"}) + "\n")
        handle.write('{"instruction": "cut')
    records = iter_records(file)
    assert next(records).prompt == (("user", "number 0"),)  # long before the broken end
    assert len(tokenize(iter_records(file), nano, 64, "g", tmp_path, limit=20)) == 20


@pytest.mark.parametrize(("examples", "per_step"), [(10, 4), (12, 4), (3, 16), (1, 1), (64, 64)])
def test_every_epoch_is_a_permutation(examples, per_step):
    per_epoch = steps_of(examples, per_step, 1)
    orders = []
    for epoch in range(3):
        batches = [step_indices(examples, per_step, 7, epoch * per_epoch + i) for i in range(per_epoch)]
        assert all(len(batch) == per_step for batch in batches[:-1]) and len(batches[-1]) == examples - per_step * (per_epoch - 1)
        orders.append(sum(batches, []))
        assert sorted(orders[-1]) == list(range(examples))
    assert step_indices(examples, per_step, 7, 1) == step_indices(examples, per_step, 7, 1)
    if examples > 8:
        assert orders[0] != orders[1] != orders[2]
        assert orders[0] != sum((step_indices(examples, per_step, 8, i) for i in range(per_epoch)), [])


def test_number_of_steps():
    assert [steps_of(10, 4, e) for e in (1, 2, 0.5, 3.0)] == [3, 6, 2, 9]
    assert steps_of(10, 4, 0.01) == 1 and steps_of(10, 4, 3, max_steps=5) == 5 and steps_of(10, 4, 1, max_steps=50) == 3


def test_collate_aligns_rows_and_targets():
    examples = Examples.from_pairs([([1, 2], [3, 4, 5]), ([6], [7]), ([8, 9, 10, 11], [12, 13])])
    weights = np.arange(6, dtype=np.float32)
    (micro,) = collate(examples, [0, 1, 2], 10, weights)
    # Longest first; the last token of each is predicted but predicts nothing, so it is no input.
    assert micro.indices == [2, 0, 1] and micro.lengths == [5, 4, 1]
    assert micro.input_ids.tolist() == [8, 9, 10, 11, 12, 1, 2, 3, 4, 6] and micro.examples.tolist() == [2] * 5 + [0] * 4 + [1]
    # The token of weight 0 is run, as others see it, but it has no row: nothing of its loss is computed.
    assert micro.rows.tolist() == [3, 4, 7, 8, 9] and micro.targets.tolist() == [12, 13, 4, 5, 7]
    assert micro.sizes == [2, 2, 1] and micro.tokens == 13 and micro.weights.tolist() == [4, 5, 1, 2, 3]
    assert micro.weight_sum == 15 and micro.completions == 6
    assert collate(examples, [0], 8, None)[0].weights is None


def test_collate_covers_every_completion_token_once():
    examples = random_examples(37)
    order = torch.randperm(37).tolist()
    for size in (1, 60, 10_000):
        micros = collate(examples, order, size, 1 + np.arange(examples.completion_offsets[-1], dtype=np.float32))
        seen = torch.cat([micro.weights for micro in micros])
        assert sorted(seen.int().tolist()) == list(range(1, 1 + int(examples.completion_offsets[-1])))
        assert [i for micro in micros for i in micro.indices] == sorted(order, key=lambda i: (-examples.lengths[i], i))
        for micro in micros:
            assert len(micro.input_ids) <= size or len(micro.indices) == 1
            at, begin = 0, 0
            for i, length, count in zip(micro.indices, micro.lengths, micro.sizes, strict=True):
                ids, start = examples.ids(i).tolist(), int(examples.starts[i])
                rows = micro.rows[at : at + count]
                span = slice(begin, begin + length)
                assert micro.input_ids[span].tolist() == ids[:-1] and micro.examples[span].tolist() == [i] * length
                assert (rows >= begin).all() and (rows < begin + length).all() and micro.input_ids[rows].tolist() == ids[start - 1 : -1]
                assert len(rows) == count
                assert micro.targets[at : at + count].tolist() == ids[start:]
                assert (micro.weights[at : at + count].int() - 1).tolist() == list(range(*examples.completion_offsets[i : i + 2]))
                at, begin = at + count, begin + length
    moved = micros[0].to(torch.device("cpu"))
    assert torch.equal(moved.weights, micros[0].weights) and dataclasses.asdict(moved).keys() == dataclasses.asdict(micros[0]).keys()


def test_examples_in_memory():
    one, other = random_examples(5), random_examples(5, seed=1)
    assert one.key != other.key and one.key == random_examples(5).key
    assert one.lengths.tolist() == [len(one.ids(i)) for i in range(5)]
    assert one.completion_offsets.tolist() == np.cumsum([0, *(len(one.completion(i)) for i in range(5))]).tolist()
    for pair in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="a prompt or an answer is empty"):
            Examples.from_pairs([pair])
