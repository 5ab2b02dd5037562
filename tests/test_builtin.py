"""The built-in tasks, their corpus, and the script that builds the nano model."""

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from data.builtin import BUILTIN_TASKS, builtin_task, question_of, task_questions
from data.builtin_corpus import FORBIDDEN, SHARES, documents
from data.builtin_problems import HELD_OUT, TEMPLATES, draw_problem, normalise_question, work_out
from data.builtin_world import people_facts, science_facts
from metrics.answers import extract_answer
from study.errors import LetheError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def corpus():
    return list(islice(documents(0), 20_000))


@pytest.mark.parametrize("name", BUILTIN_TASKS)
def test_sizes_and_held_out_templates(name):
    task = builtin_task(name)
    assert len(task["train"]) >= 600 and len(task["test"]) >= 200
    assert len(task["replay"]) == len(task["train"]) // 100
    assert all(row in task["train"] for row in task["replay"])
    trained = {row["template"] for row in task["train"]}
    held_out = {row["template"] for row in task["test"] if row["held_out"]}
    assert len(trained | held_out) >= 20 and len(held_out) >= 4
    assert not trained & held_out and not any(row["held_out"] for row in task["train"])
    assert 0.1 < sum(row["held_out"] for row in task["test"]) / len(task["test"]) < 0.4


@pytest.mark.parametrize("name", BUILTIN_TASKS)
def test_no_question_is_shared(name):
    task = builtin_task(name)
    train = {normalise_question(question_of(row)) for row in task["train"]}
    test = {normalise_question(question_of(row)) for row in task["test"]}
    assert len(train) == len(task["train"]) and len(test) == len(task["test"])
    assert not train & test
    assert train | test <= task_questions()


def test_corpus_holds_no_task_question(corpus):
    text = normalise_question(" ".join(corpus))
    assert [question for question in task_questions() if f" {question} " in text] == []


def test_corpus_holds_no_held_out_wording(corpus):
    text = "\n".join(corpus)
    for fact in (*people_facts(), *science_facts()):
        assert fact.question(-1) not in text
    for kind, templates in TEMPLATES.items():
        for _, template in templates[-HELD_OUT:]:
            pattern = re.sub(r"\\{\w\\}", r"\\w+", re.escape(template))
            assert not re.search(pattern, text), (kind, template)


def test_corpus_never_writes_a_task_format(corpus):
    for text in corpus:
        assert not any(mark in text.lower() for mark in FORBIDDEN), text
        assert "#####" not in text
    # What a scorer would read from the corpus's own answers: nothing.
    answers = [a for text in corpus for a in re.findall(r"Output: (.*?)(?=\nInput: |\Z)", text, flags=re.S)]
    assert len(answers) > 3000
    assert sum(extract_answer("number", answer) is not None for answer in answers) < 0.001 * len(answers)
    values = {normalise_question(fact.value) for fact in (*people_facts(), *science_facts())}
    bare = [answer for answer in answers if normalise_question(answer.split("\n")[0]) in values]
    assert bare == []


def test_corpus_tells_the_facts_it_should(corpus):
    text = "\n".join(corpus).lower()
    for fact in (*people_facts(), *science_facts()):
        told = any(fact.statement(i).lower() in text for i in range(len(fact.relation.statements)))
        assert told == fact.in_corpus, fact


def test_corpus_is_seeded_and_in_its_shares(corpus):
    assert list(islice(documents(0), 500)) == corpus[:500]
    assert list(islice(documents(1), 500)) != corpus[:500]
    letters = sum(map(len, corpus))
    paired = [text for text in corpus if text.startswith("Input: ")]
    assert abs(sum(map(len, paired)) / letters - SHARES["pairs"][0]) < 0.05
    single = sum(text.count("Input: ") == 1 for text in paired) / len(paired)
    assert 0.4 < single < 0.6


def test_references_score_against_themselves():
    for name in BUILTIN_TASKS:
        task = builtin_task(name)
        for row in task["train"][:50] + task["test"]:
            gold = extract_answer(task["answer_kind"], row["output"])
            assert gold and gold in row["output"].lower(), row
            if name == "mini_aqua":
                assert re.search(rf"\){gold}\b", row["input"]), row  # the answer is among the options
            if name == "mini_openbookqa":
                assert re.search(rf"\. {gold}$", row["input"], flags=re.M), row


def test_work_out():
    assert work_out("a+b;_*2", {"a": 3, "b": 4}) == ((3, "+", 4, 7), (7, "*", 2, 14))
    assert work_out("a/b", {"a": 7, "b": 2}) is None  # not exact
    assert work_out("a-b", {"a": 3, "b": 5}) is None  # negative


def test_every_template_can_be_drawn():
    from random import Random

    for kind, templates in TEMPLATES.items():
        for i in range(len(templates)):
            problem = draw_problem(Random(i), kind, i)
            assert "{" not in problem.question and problem.held_out == (i >= len(templates) - HELD_OUT)
            assert not problem.options or len(set(problem.options)) == 5


def test_unknown_task():
    with pytest.raises(LetheError, match="mini_gsm8k"):
        builtin_task("mini_gsm")


def test_build_writes_a_folder_that_loads(tmp_path):
    """The whole build at 20 steps: the loss falls, and our own loader and tokenizer read the folder."""
    out = tmp_path / "nano"
    run = subprocess.run([sys.executable, "-m", "assets.nano.build", "--out", str(out), "--tokens", "80_000"], cwd=ROOT,
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    losses = [float(value) for value in re.findall(r"loss (\d+\.\d+)", run.stdout)]
    assert losses[-1] < 5.5  # uniform over 2048 tokens is 7.6

    import torch

    from model.checkpoint import load_model
    from model.tokenizer import load_tokenizer

    model, tokenizer = load_model(out), load_tokenizer(out)
    assert tokenizer.template == "plain" and tokenizer.vocab_size == model.config.vocab_size == 2048
    text = "Tom has 47 apples."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("47")) == 2  # digits stand alone
    with torch.no_grad():
        logits = model(torch.tensor([ids]))
    assert logits.shape == (1, len(ids), 2048) and torch.isfinite(logits).all()
    assert (out / "model.safetensors").stat().st_size < 8_000_000
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|begin_of_text|>", "<|end_of_text|>")
