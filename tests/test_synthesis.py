"""Synthesis: what a model's raw text holds, which pairs are valid, and files that go on bit for bit where they were cut."""

import json
import random
from collections import Counter

import pytest
import torch

from data import pairs, synthesis
from data.folder import find_task
from data.pairs import Judge, Limits, parse
from data.records import Record
from data.superni import definition_of, demonstrations
from data.synthesis import read_items, synthesize
from lora import add_lora
from model import load_tokenizer
from model.generate import Decoder
from model.sampling import sample
from model.subject import load_subject
from study.errors import LetheError

LIMITS = Limits(repetition_penalty=1.0)


# ----------------------------------------------------------------------------------------------------------------------
# What a model may write


@pytest.mark.parametrize(
    ("text", "found", "reasons"),
    [
        (" 2 cups\nOutput: 2\n\n", [("2 cups", "2")], []),
        (" a\nb\nOutput: c\nd\n\nInput:", [("a\nb", "c\nd")], []),
        (" a\nOutput: 1\n\nInput: b\nOutput: 2\n\nInput: c\nOutput: 3", [("a", "1"), ("b", "2"), ("c", "3")], []),
        (" a\nOutput: 1\n\nInput: b and c\n\nInput: d\nOutput: 3", [("a", "1"), ("d", "3")], ["no Output:"]),
        (" what is it?", [], ["no Output:"]),
        ("", [], ["no Output:"]),
        ("\n\nOutput: 4", [], ["empty input"]),
        (" a\nOutput: \n\n", [], ["empty output"]),
        (" a\nOutput: 1\nOutput: 2", [], ["several outputs"]),
        (" a output: b Output:c", [("a output: b", "c")], []),
    ],
)
def test_pairs_in_raw_text(text, found, reasons):
    assert parse(text) == (found, reasons)


def test_a_text_that_was_cut_off_has_no_last_answer():
    assert parse(" a\nOutput: 1\n\nInput: b\nOutput: 2", ended=False) == ([("a", "1")], ["cut off"])
    assert parse("x" * 10_000, ended=False) == ([], ["cut off"])
    assert parse(" a\nOutput: 1\n\nInput:", ended=False) == ([("a", "1")], ["cut off"])


def test_what_is_valid():
    demos = ["Anna has 3 cups. How many cups does Anna have?", "What is x + 1?"]
    judge = Judge(demos, load_tokenizer("nano"), "Solve it.\n", Limits(input_tokens=60, output_tokens=20, near=0.8), "number")
    right = "It is so.\n#### 5"
    assert judge.reason("Ben has 4 hats. How many hats does Ben have?", right) == ""
    judge.add("Ben has 4 hats. How many hats does Ben have?")
    for question, answer, reason in (
        ("anna has 3 cups.  How many CUPS does Anna have", right, "a demonstration"),
        ("Well, Anna has 3 cups. How many cups does Anna have?", right, "a demonstration"),  # 9 of 10 pairs of words
        ("Ben has 4 hats; how many hats does Ben have?", right, "duplicate"),
        ("Now Ben has 4 hats. How many hats does Ben have?", right, "near-duplicate"),
        ("Ben has 5 hats. How many hats does Ben have?", right, ""),  # 7 of 11
        ("What is x - 1?", right, ""),
        ("what is x+1", right, "a demonstration"),
        ("y " * 10_000, right, "input too long"),
        ("What is y?", "5 " * 10_000, "output too long"),
        ("What is y?", "It is five, I think.", "no final answer"),
        ("???", right, ""),
        ("", right, ""),  # parse passes none on
    ):
        assert judge.reason(question, answer) == reason, question
    judge = Judge(demos, judge.tokenizer, "", Limits(), None, ["What is Y?"])
    assert judge.reason("what is y", "x") == "a test question" and judge.reason("What is z?", "x") == ""
    assert Judge(demos, judge.tokenizer, "", Limits(near=2)).reason("Well, Anna has 3 cups. How many cups does Anna have?", "x") == ""
    assert Judge(demos, judge.tokenizer, "", Limits()).reason("What is y?", "It is five, I think.") == ""


def test_near_is_the_share_of_common_word_pairs():
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcd", k=draw.randint(1, 7))) for _ in range(300)]

    def share(one, other):
        a, b = (set(zip(t.split(), t.split()[1:], strict=False)) or {t} for t in (one, other))
        return len(a & b) / len(a | b)

    told = Counter()
    for near in (0.5, 0.8, 1.0):
        judge = Judge([], load_tokenizer("nano"), "", Limits(near=near))
        kept: list[str] = []
        for text in texts:
            expected = "duplicate" if text in kept else "near-duplicate" if any(share(text, old) >= near for old in kept) else ""
            assert judge.reason(text, "x") == expected
            told[expected] += 1
            if not expected:
                judge.add(text)
                kept.append(text)
    assert min(told.values()) > 20


# ----------------------------------------------------------------------------------------------------------------------
# With the built-in model


@pytest.fixture(scope="module")
def subject():
    return load_subject("nano", "cpu")


def make(subject, out, budget=20, name="mini_svamp", **more):
    task = find_task(name)
    demos = demonstrations(task, 20, 0)
    return synthesize(subject, name, definition_of(task), demos, budget, **{"limits": LIMITS, "out": out, "batch_size": 16, **more})


@pytest.mark.parametrize("name", ["mini_gsm8k", "mini_simpleqa", "mini_aqua"])
def test_the_built_in_model_makes_new_items(subject, tmp_path, name):
    report = make(subject, tmp_path / "a.jsonl", 24, name)
    items, task = read_items(tmp_path / "a.jsonl", 24), find_task(name)
    definition, known = definition_of(task), {record.prompt for record in demonstrations(task, 20, 0)}
    assert report.kept == len(items) == len({item.prompt for item in items}) == 24 and not known & {item.prompt for item in items}
    assert report.attempts == 24 + sum(report.dropped.values()) <= 48
    for item in items:
        ((role, text),) = item.prompt
        assert role == "user" and text.startswith(definition) and item.answer and "Output:" not in text + item.answer
        assert len(text) > len(definition) and "Input:" not in text + item.answer
    if name == "mini_aqua":
        assert sum("E" in item.prompt[0][1] for item in items) > 16  # five options, as the demonstrations have
    assert str(report).startswith(f"{name}: 24 of 24 items from {report.attempts} samples; dropped: ")


def test_prompts_and_items_are_those_of_the_paper(subject, tmp_path):
    """Written out by hand: raw text, two demonstrations, the first pair that the model goes on with."""
    make(subject, tmp_path / "a.jsonl", 4)
    task, tokenizer = find_task("mini_svamp"), subject.tokenizer
    definition, demos, limits = "Reason step by step and provide the final answer.", demonstrations(task, 20, 0), LIMITS
    orders = set()
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        row = json.loads(line)
        (a, b), ask = row["demos"], lambda record: record.prompt[0][1].removeprefix(definition + "\n")
        text = f"{definition}\n\nInput: {ask(demos[a])}\nOutput: {demos[a].answer}\n\n"
        text += f"Input: {ask(demos[b])}\nOutput: {demos[b].answer}\n\nInput:"
        ids = sample(
            subject.model, [[tokenizer.bos, *tokenizer.encode(text)]], 120, tokenizer.stop_ids, temperature=0.9, top_p=limits.top_p,
            seeds=[row["seed"]],
        )[0]  # fmt: skip
        question, answer = tokenizer.decode(ids).split("Input:")[0].split("Output:")
        assert row["prompt"] == [["user", f"{definition}\n{question.strip()}"]] and row["answer"] == answer.strip()
        orders.add((a, b))
    assert len(orders) > 2 and all(a != b for a, b in orders)


def test_the_same_items_at_any_batch_size(subject, tmp_path):
    expected = None
    for batch in (1, 5, 64):
        make(subject, tmp_path / f"{batch}.jsonl", 12, "mini_simpleqa", batch_size=batch)
        expected = expected or (tmp_path / f"{batch}.jsonl").read_bytes()
        assert (tmp_path / f"{batch}.jsonl").read_bytes() == expected
    make(subject, tmp_path / "other.jsonl", 12, "mini_simpleqa", seed=1)
    assert (tmp_path / "other.jsonl").read_bytes() != expected


def test_a_file_goes_on_where_it_was_cut(subject, tmp_path):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    told = make(subject, whole, 30, "mini_simpleqa", batch_size=6)
    data, decoder = whole.read_bytes(), Decoder(subject.model, 6)
    assert told.dropped["duplicate"] > 1
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in (10, ends[7], ends[20] + 30, ends[25] - 1, len(data) - 1, len(data)):
        part.write_bytes(data[:cut])
        report = make(subject, part, 30, "mini_simpleqa", batch_size=6, decoder=decoder)
        assert part.read_bytes() == data and report == told, cut
    shorter = make(subject, part, 10, "mini_simpleqa")
    assert shorter.kept == 10 and part.read_bytes() == data and len(read_items(part, 10)) == 10
    make(subject, part, 32, "mini_simpleqa", batch_size=6)
    assert part.read_bytes().startswith(data) and len(read_items(part, 99)) == 32


def test_a_file_of_other_settings_is_refused(subject, tmp_path):
    out = tmp_path / "a.jsonl"
    make(subject, out, 3)
    for more in ({"seed": 1}, {"limits": Limits()}, {"name": "mini_gsm8k"}, {"answer_kind": "number"}, {"avoid": read_items(out, 1)}):
        with pytest.raises(LetheError, match=r"a.jsonl:1 is no item of this synthesis .*choose another --out"):
            make(subject, out, 5, **more)
    make(subject, out, 4, limits=Limits(repetition_penalty=1.0, attempts=7))  # which changes no item
    out.write_text('{"instruction": "x", "output": "y"}\n')
    with pytest.raises(LetheError, match="is no item"):
        make(subject, out, 5)


def test_a_model_that_cannot_says_so_with_its_counts(subject, tmp_path):
    out = tmp_path / "a.jsonl"
    words = r"mini_svamp: 0 of 5 items from 15 samples; dropped: 15 no final answer. This model cannot .* a larger model; what was made"
    for _ in range(2):  # the same command again
        with pytest.raises(LetheError, match=words):
            make(subject, out, 5, limits=Limits(repetition_penalty=1.0, attempts=3), answer_kind="number")
    with pytest.raises(LetheError, match="dropped: 10 prompt too long"):
        make(subject, out, 5, limits=Limits(prompt_tokens=20, attempts=2))
    with pytest.raises(LetheError, match="dropped: 10 cut off"):
        make(subject, out, 5, limits=Limits(new_tokens=4, attempts=2))


def test_what_cannot_be_shown_is_refused(subject, tmp_path):
    out, chat = tmp_path / "a.jsonl", Record((("user", "a"), ("assistant", "b"), ("user", "c")), "d", "f.json:3")
    one = Record((("user", "a"),), "b")
    with pytest.raises(LetheError, match="f.json:3: a demonstration is one question"):
        synthesize(subject, "x", "", [chat, one], 5, out=out)
    with pytest.raises(LetheError, match="shows 2 demonstrations, and there are 1"):
        synthesize(subject, "x", "", [one], 5, out=out)
    assert synthesize(subject, "x", "", [one, one], 0, out=out).kept == 0 and not out.exists()


def test_only_the_base_makes_items(tmp_path):
    subject = load_subject("nano", "cpu")
    add_lora(subject.model, 2, 4)
    with pytest.raises(ValueError, match="without an adapter"):
        make(subject, tmp_path / "a.jsonl")


def test_a_definition_that_the_prompts_do_not_hold_is_shown_only(subject, tmp_path):
    demos = [Record((("user", f"{n} + {n} = ?"),), f"It is {2 * n}.") for n in range(2, 20)]
    maker = synthesis._Maker(subject, "sums", "Add the numbers.\n", demos, LIMITS, 0)
    ids, (a, b) = maker.prompt_of(0)
    text = subject.tokenizer.decode(ids)
    assert text == f"Add the numbers.\n\nInput: {a + 2} + {a + 2} = ?\nOutput: It is {2 * a + 4}.\n\nInput: " + (
        f"{b + 2} + {b + 2} = ?\nOutput: It is {2 * b + 4}.\n\nInput:"
    )
    assert maker.prefix == ""


def test_where_two_demonstrations_do_not_fit_one_is_shown(subject, tmp_path):
    demos = [Record((("user", "Sort the words.\n" + "pen cup " * n),), "cup pen " * n) for n in range(1, 61)]
    maker = synthesis._Maker(subject, "sort", "Sort the words.\n", demos, Limits(prompt_tokens=150, input_tokens=9, output_tokens=9), 0)
    shown = [maker.prompt_of(i) for i in range(40)]
    assert {len(which) for _, which in shown} == {0, 1, 2} and max(len(ids) for ids, _ in shown) <= 150
    assert all(bool(ids) == bool(which) for ids, which in shown)
    assert maker.new_tokens == min(2 * len(subject.tokenizer.encode(synthesis._written(maker.demos[-1]))), 1024 // 3)
    limits, last = maker.judge.limits, (demos[-1].prompt[0][1].strip(), demos[-1].answer.strip())  # none is too long
    assert [limits.input_tokens, limits.output_tokens] == [len(subject.tokenizer.encode(text)) for text in last]


def test_the_parser_and_the_filters_meet_whatever_is_sampled(subject, tmp_path, monkeypatch):
    """Malformed texts in the place of samples: what is kept and what is counted."""
    demos = demonstrations(find_task("mini_svamp"), 20, 0)
    own = demos[3].prompt[0][1].split("\n", 1)[1]
    three = " Three?\nOutput: 1\nInput: pairs?\nOutput: 2\nInput: in one?\nOutput: 3"
    texts = [" A new one?\nOutput: yes", " none", "", three, "z " * 10_000, f" {own}\nOutput: 7", " a NEW one\nOutput: no",
             "Output: 3", " b c?\nOutput:", " Asked later?\nOutput: 9", " The last?\nOutput: 4"]  # fmt: skip
    definition = definition_of(find_task("mini_svamp"))
    avoid = [Record((("user", definition + "Asked later?"),), "9")]

    def canned(model, prompts, new, *_, seeds, **__):
        made.extend(seeds)
        return [subject.tokenizer.encode(texts[index_of[seed]] if seed in index_of else "")[:new] for seed in seeds]

    made: list[int] = []
    maker = synthesis._Maker(subject, "mini_svamp", definition, demos, LIMITS, 0, avoid=avoid)
    index_of = {maker.seed_of(i): i for i in range(len(texts))}
    monkeypatch.setattr(synthesis, "sample", canned)
    report = make(subject, tmp_path / "a.jsonl", 5, avoid=avoid)
    assert [item.answer for item in read_items(tmp_path / "a.jsonl", 9)] == ["yes", "1", "2", "3", "4"] and len(made) >= 10
    expected = {"no Output:": 2, "cut off": 1, "a demonstration": 1, "duplicate": 1, "empty input": 1, "empty output": 1}
    assert report.dropped == {**expected, "a test question": 1} and report.attempts == 11


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command(tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    command = [
        "--model",
        "nano",
        "--task",
        "mini_svamp",
        "--budget",
        "6",
        "--out",
        str(out),
        "--device",
        "cpu",
        "--repetition_penalty",
        "1",
    ]
    assert synthesis.main(command) == 0
    told = capsys.readouterr().out
    assert "mini_svamp: 6 of 6 items from" in told and f"wrote {out}" in told
    first = out.read_bytes()
    assert synthesis.main(command) == 0 and out.read_bytes() == first
    torch.manual_seed(7)
    expected = tmp_path / "b.jsonl"
    make(load_subject("nano", "cpu"), expected, 6, avoid=find_task("mini_svamp").test)
    assert expected.read_bytes() == first
    capsys.readouterr()
    for more, words in {
        ("--budget", "0"): "--budget 0: a whole number from 1 on", ("--top_p", "2"): "--top_p in (0, 1]",
        ("--task", "mini_svmp"): "mini_svamp", ("--near", "x"): "invalid float value",
        ("--seed", "3"): "is no item of this synthesis", ("--bogus", "1"): "see python -m data.synthesis",
    }.items():  # fmt: skip
        assert synthesis.main([*command, *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1


def test_defaults_are_the_papers():
    limits = Limits()
    assert (limits.shown, limits.temperature, limits.top_p, limits.repetition_penalty) == (2, 0.9, 0.6, 1.2)
    assert (limits.prompt_tokens, limits.input_tokens, limits.output_tokens) == (2048, 500, 128)
    assert (pairs.QUESTION, pairs.ANSWER) == ("Input:", "Output:")
