"""mini_simplify, mini_ask, mini_reply: their rows, their references, and how they are found."""

import re
from itertools import islice

import pytest

import eval as evaluation
from data.builtin import BUILTIN_TASKS
from data.builtin_corpus import FORBIDDEN, documents
from data.builtin_generation import FRAMES, GENERATION_TASKS, TABLE, generation_task
from data.builtin_problems import normalise_question
from data.folder import find_task, scan
from model import load_tokenizer
from study.errors import LetheError


@pytest.mark.parametrize("name", GENERATION_TASKS)
def test_sizes_and_held_out_templates(name):
    task = generation_task(name)
    assert (len(task["train"]), len(task["test"]), len(task["replay"])) == (640, 200, 6)
    assert all(row in task["train"] for row in task["replay"])
    trained = {row["template"] for row in task["train"]}
    held_out = {row["template"] for row in task["test"] if row["held_out"]}
    assert len(trained | held_out) >= 20 and len(held_out) >= 4
    assert not trained & held_out and not any(row["held_out"] for row in task["train"])
    assert 0.1 < sum(row["held_out"] for row in task["test"]) / len(task["test"]) < 0.4


@pytest.mark.parametrize("name", GENERATION_TASKS)
def test_no_input_is_shared(name):
    task = generation_task(name)
    train, test = ({normalise_question(row["input"]) for row in task[part]} for part in ("train", "test"))
    assert len(train) == 640 and len(test) == 200 and not train & test


@pytest.mark.parametrize("name", GENERATION_TASKS)
def test_answers_are_short_and_of_known_words(name):
    """Of 24 tokens at most, and where decoding stops them; nearly every word of one token or two."""
    nano, task = load_tokenizer("nano"), generation_task(name)
    for row in task["train"] + task["test"]:
        answer = nano.render_answer(row["output"])
        assert len(answer) <= 24 < task["max_new_tokens"] + 1 and len(answer) - 2 <= 1.5 * len(row["output"].split()) + 2
        assert row["references"][0] == row["output"] and len(set(row["references"])) == len(row["references"])
        assert "{" not in row["input"] + "".join(row["references"])
    assert any(len(row["references"]) > 1 for row in task["test"])


def test_the_corpus_holds_none_of_their_prompts():
    text = normalise_question(" ".join(islice(documents(0), 20_000)))
    for name in GENERATION_TASKS:
        for row in generation_task(name)["train"] + generation_task(name)["test"]:
            assert f" {normalise_question(row['input'])} " not in text, row
            assert not any(mark in row["instruction"].lower() for mark in FORBIDDEN)


def test_simple_sentences_follow_the_table():
    """Putting each hard word's simple one in its place gives the answer; every other choice gives a reference."""
    pairs = [pair for kind in TABLE.values() for pair in kind]
    assert 50 <= len(pairs) == len({hard for hard, _ in pairs}) and len(FRAMES) == 20
    met = set()
    for row in generation_task("mini_simplify")["train"]:
        assert row["input"] == f"Text: {row['original']}"
        found = [(hard, simple) for hard, simple in pairs if re.search(rf"\b{hard}\b", row["original"])]
        met |= {hard for hard, _ in found}
        answers = [row["original"]]
        for hard, simple in found:
            answers = [re.sub(rf"\b{hard}\b", word, answer) for answer in answers for word in simple]
        assert found and answers[0] == row["output"] and set(answers) == set(row["references"])
    assert met == {hard for hard, _ in pairs}


def test_questions_and_replies_name_the_same():
    for row in generation_task("mini_ask")["test"]:
        told = set(normalise_question(row["input"]).split())
        assert all(question.endswith("?") and told & set(normalise_question(question).split()) for question in row["references"])
    for row in generation_task("mini_reply")["test"]:
        speaker = re.match(r"From (\w+): ", row["input"])[1]
        assert all(speaker in reply for reply in row["references"])


def test_they_are_found_by_name_and_not_among_all(tmp_path):
    for name in GENERATION_TASKS:
        task = find_task(name)
        assert task.answer_kind == "text" and len(task.test) == 200 and len(list(task.replay())) == 6
        assert {record.group for record in task.test} == {"", "held_out"} and task.fingerprint == find_task(name).fingerprint
        assert all(record.references[:1] in ((), (record.answer,)) for record in task.test)
        assert all(bool(record.original) == (name == "mini_simplify") for record in task.test)
    assert list(evaluation.choose_tasks("all", str(tmp_path), True)) == list(BUILTIN_TASKS)
    assert set(GENERATION_TASKS) < set(scan(tmp_path))
    with pytest.raises(LetheError, match="no task folder under"):
        evaluation.choose_tasks("all", str(tmp_path), False)
