"""The five built-in tasks: generated in the likeness of GSM8K, SVAMP, AQuA, OpenBookQA and SimpleQA, always the same.

They exist so that a whole study runs offline in minutes with the built-in nano model. No question (normalised text) is
in two of train, test and the pretraining corpus. Test rows mix templates seen in training with held-out ones; the row
says which ("template", "held_out"), so that both can be reported.
"""

from functools import cache
from random import Random

from data.builtin_problems import HELD_OUT, TEMPLATES, Problem, draw_problem, normalise_question
from data.builtin_world import Fact, people_facts, science_facts
from study.errors import LetheError

BUILTIN_TASKS = ("mini_gsm8k", "mini_svamp", "mini_aqua", "mini_openbookqa", "mini_simpleqa")
ANSWER_KINDS = dict(zip(BUILTIN_TASKS, ("number", "number", "number", "short", "short"), strict=True))
MAX_NEW_TOKENS = dict(zip(BUILTIN_TASKS, (64, 32, 48, 32, 12), strict=True))
TRAIN_ROWS, TEST_ROWS = 640, 200
PROBLEM_KINDS = {"mini_gsm8k": "multi", "mini_svamp": "one", "mini_aqua": "choice"}


def builtin_task(name: str) -> dict:
    """The task as dict(train=, test=, replay=, answer_kind=, max_new_tokens=); the first three hold alpaca rows.

    Replay is 1 % of train. Raises LetheError for a name that is not in BUILTIN_TASKS.
    """
    if name not in BUILTIN_TASKS:
        raise LetheError(f"no built-in task {name!r}; there are {', '.join(BUILTIN_TASKS)}")
    train, test = _rows(name)
    replay = Random(f"{name} replay").sample(train, max(1, len(train) // 100))
    return dict(train=[dict(row) for row in train], test=[dict(row) for row in test], replay=[dict(r) for r in replay],
                answer_kind=ANSWER_KINDS[name], max_new_tokens=MAX_NEW_TOKENS[name])


@cache
def task_questions() -> frozenset[str]:
    """Every question of every train and test row, normalised: what the pretraining corpus must not contain."""
    return frozenset(row["key"] for name in BUILTIN_TASKS for part in _drawn(name) for row in part)


def question_of(row: dict) -> str:
    """The bare question of an alpaca row of these tasks, without instruction and options."""
    text = row["input"] or row["instruction"]
    return text.split("\nA. ")[0].split("\nA)")[0]


@cache
def _rows(name: str) -> tuple[tuple[dict, ...], tuple[dict, ...]]:
    train, test = _drawn(name)
    return tuple({k: v for k, v in r.items() if k != "key"} for r in train), tuple(
        {k: v for k, v in r.items() if k != "key"} for r in test)


@cache
def _drawn(name: str) -> tuple[list[dict], list[dict]]:
    if name in PROBLEM_KINDS:
        return _problem_rows(name)
    return _openbook_rows(name) if name == "mini_openbookqa" else _simple_rows(name)


def _problem_rows(name: str) -> tuple[list[dict], list[dict]]:
    kind = PROBLEM_KINDS[name]
    write = {"multi": gsm8k_row, "one": svamp_row, "choice": aqua_row}[kind]
    count = len(TEMPLATES[kind])
    seen, parts = set(), []
    for part, rows, templates in (("train", TRAIN_ROWS, count - HELD_OUT), ("test", TEST_ROWS, count)):
        rng, out = Random(f"{name} {part}"), []
        while len(out) < rows:
            problem = draw_problem(rng, kind, len(out) % templates)
            key = normalise_question(problem.question)
            if key not in seen:
                seen.add(key)
                out.append(write(problem) | dict(template=problem.template, held_out=problem.held_out, key=key))
        rng.shuffle(out)
        parts.append(out)
    return parts[0], parts[1]


def gsm8k_row(problem: Problem) -> dict:
    words = ("First", "Then", "Last")
    lines = [f"{word} {x} {op} {y} = {r}." for word, (x, op, y, r) in zip(words, problem.steps, strict=False)]
    return dict(instruction="Solve step by step and end with ####.", input=problem.question,
                output="\n".join([*lines, f"#### {problem.answer}"]))


def svamp_row(problem: Problem) -> dict:
    x, op, y, result = problem.steps[0]
    return dict(instruction="Reason step by step and provide the final answer.", input=problem.question,
                output=f"Reasoning: ( {x} {op} {y} )\nFinal Answer: {result}")


def aqua_row(problem: Problem) -> dict:
    options = " ".join(f"{letter}){value}" for letter, value in zip("ABCDE", problem.options, strict=True))
    steps = "\n".join(f"{x} {op} {y} = {r}." for x, op, y, r in problem.steps)
    return dict(instruction="Solve step by step and provide the correct answer.",
                input=f"{problem.question}\n{options}",
                output=f"{steps}\nThe correct answer is {problem.answer}.")


def _openbook_rows(name: str) -> tuple[list[dict], list[dict]]:
    """Train and test ask about different facts; the corpus tells them all."""
    rng = Random(name)

    def row(fact: Fact, wording: int) -> dict:
        options = fact_options(rng, fact)
        lines = "\n".join(f"{letter}. {value}" for letter, value in zip("ABCD", options, strict=True))
        question = fact.question(wording)
        return dict(instruction="Answer this open-book question by reasoning.", input=f"{question}\n{lines}",
                    output=f"{fact.statement()}\nAnswer: {fact.value}", template=fact.template_id(wording),
                    held_out=wording < 0, key=normalise_question(question))

    facts = science_facts()
    train = [row(fact, wording) for fact in facts for wording in fact.train_wordings]
    seen = [row(fact, wording) for fact in facts for wording in fact.test_wordings if wording >= 0]
    held_out = [row(fact, wording) for fact in facts for wording in fact.test_wordings if wording < 0]
    test = seen + held_out[: TEST_ROWS - len(seen)]
    rng.shuffle(train)
    rng.shuffle(test)
    return train[:TRAIN_ROWS], test


def _simple_rows(name: str) -> tuple[list[dict], list[dict]]:
    """Every fact is in train in some wordings; the test asks 200 of them in another one, a quarter of them held out."""
    rng = Random(name)

    def row(fact: Fact, wording: int) -> dict:
        question = fact.question(wording)
        return dict(instruction=question, input="", output=fact.value, template=fact.template_id(wording),
                    held_out=wording < 0, key=normalise_question(question))

    facts = people_facts()
    train = [row(fact, wording) for fact in facts for wording in fact.train_wordings]
    asked = rng.sample(facts, TEST_ROWS)
    test = [row(fact, fact.test_wordings[1 if i % 4 == 0 else 0]) for i, fact in enumerate(asked)]
    rng.shuffle(train)
    return train, test


def fact_options(rng: Random, fact: Fact, count: int = 4) -> list[str]:
    """The fact's value among others of the same relation, shuffled."""
    options = [fact.value, *rng.sample([v for v in fact.relation.values if v != fact.value], count - 1)]
    rng.shuffle(options)
    return options
