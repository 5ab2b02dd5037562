"""The nano model's pretraining corpus: an endless, seeded stream of short documents.

It gives language, arithmetic, a body of facts, question formats, and documents that list `Input:`/`Output:` pairs in
many answer styles. It never contains a question of the built-in tasks (normalised text), a held-out template, or an
answer in a task's own format; `FORBIDDEN` and `draw_open_problem` see to it.
"""

from collections.abc import Callable, Iterator
from random import Random

from data.builtin import fact_options, task_questions
from data.builtin_problems import HELD_OUT, NAMES, OBJECTS, TEMPLATES, Problem, apply, draw_problem, normalise_question
from data.builtin_styles import WORDS, Style, close, draw_style, explain
from data.builtin_world import COLOURS, FOODS, INSTRUMENTS, JOBS, PETS, PLACES, Fact, people_facts, science_facts

FORBIDDEN = ("####", "answer is", "answer:")  # compared in lower case
VERBS = ("Solve", "Reason", "Work", "Think", "Answer")
HOWS = ("step by step", "in steps", "by reasoning", "with care", "in short", "this question", "this open-book question")
GOALS = ("give", "provide", "find", "show", "end with", "write")
AIMS = ("the result", "the final number", "the correct number", "the total", "the correct choice", "the final value",
        "a full answer", "the correct answer", "the final answer", "a short reply")
WORD_LIST = (*OBJECTS, *FOODS, *INSTRUMENTS, *JOBS, *PETS, *PLACES, *COLOURS)


def documents(seed: int) -> Iterator[str]:
    """Endless documents; the same seed gives the same ones. Kinds come in fixed shares of the text (SHARES)."""
    rng = Random(f"corpus {seed}")
    gauge = Random("gauge")
    lengths = {kind: sum(len(write(gauge)) for _ in range(200)) / 200 for kind, (_, write) in SHARES.items()}
    kinds = list(SHARES)
    weights = [share / lengths[kind] for kind, (share, _) in SHARES.items()]
    while True:
        for kind in rng.choices(kinds, weights, k=1000):
            text = SHARES[kind][1](rng)
            if not any(mark in text.lower() for mark in FORBIDDEN):
                yield text


def draw_open_problem(rng: Random, kind: str) -> Problem:
    """A problem of a template that is not held out, whose question is in no task."""
    while True:
        problem = draw_problem(rng, kind, rng.randrange(len(TEMPLATES[kind]) - HELD_OUT))
        if normalise_question(problem.question) not in task_questions():
            return problem


def equations(rng: Random) -> str:
    """Sums in one notation."""
    form = rng.choice(("{x} {op} {y} = {r}", "{x} {op} {y} = {r}", "{x}{op}{y}={r}", "{x} {word} {y} = {r}",
                       "( {x} {op} {y} ) = {r}", "What is {x} {op} {y}? It is {r}."))
    lines = []
    for _ in range(rng.randint(3, 10)):
        op, r = rng.choice("++---*/"), None
        while r is None:
            x, y = (rng.randint(2, 81 if op in "-/" else 60), rng.randint(2, 9 if op == "/" else 40))
            if op == "*":
                x, y = (rng.randint(2, 9), rng.randint(2, 9)) if rng.random() < 0.7 else (rng.randint(2, 30), 2)
            r = apply(x, op, y)
        lines.append(form.format(x=x, op=op, y=y, r=r, word=WORDS[op]))
    return rng.choice(("\n", ", ", " ; ")).join(lines)


def facts_about_people(rng: Random) -> str:
    return _facts(rng, _KNOWN)


def facts_of_science(rng: Random) -> str:
    return _facts(rng, science_facts())


def _facts(rng: Random, facts: list[Fact] | tuple[Fact, ...]) -> str:
    """Statements about one or several subjects, or questions with whole-sentence answers."""
    if rng.random() < 0.5:
        subject = rng.choice(facts).subject
        chosen = [f for f in facts if f.subject == subject]
        rng.shuffle(chosen)
    else:
        chosen = rng.sample(facts, rng.randint(3, 7))
    if rng.random() < 0.6:
        return _capital(" ".join(_capital(_statement(rng, f)) for f in chosen))
    mark, reply = rng.choice((("Q: ", "A: "), ("Question: ", "Reply: "), ("", ""), ("- ", "- ")))
    return "\n".join(f"{mark}{f.question(rng.choice(f.corpus_wordings))}\n{reply}{_capital(_statement(rng, f))}"
                     for f in chosen[:4])


def _statement(rng: Random, fact: Fact) -> str:
    return fact.statement(rng.randrange(len(fact.relation.statements)))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def one_step(rng: Random) -> str:
    return _solved(rng, "one")


def multi_step(rng: Random) -> str:
    return _solved(rng, "multi")


def _solved(rng: Random, kind: str) -> str:
    problem, style = draw_open_problem(rng, kind), draw_style(rng)
    form = rng.choice(("{q}\n{a}", "Question: {q}\nSolution: {a}", "Q: {q}\nA: {a}", "Problem. {q}\nSolution. {a}",
                       "{q} {a}"))
    return form.format(q=problem.question, a=explain(style, problem))


def story(rng: Random) -> str:
    """A few plain sentences."""
    n, m = rng.sample(NAMES, 2)
    lines = (
        f"{n} went to the {rng.choice(PLACES)} with {m}.", f"{n} is a friend of {m}.", f"We saw a {rng.choice(PETS)}.",
        f"{m} likes {rng.choice(OBJECTS)} and {rng.choice(FOODS)}.", f"The {rng.choice(PETS)} ran to {n}.",
        f"{n} wants to be a {rng.choice(JOBS)}.", f"{m} plays the {rng.choice(INSTRUMENTS)} at night.",
        f"There were {rng.choice(COLOURS)} {rng.choice(OBJECTS)} in the house.",
        f"{n} gave {rng.choice(OBJECTS)} to {m}.",
        f"On Monday {n} found {rng.randint(2, 40)} {rng.choice(OBJECTS)}.", f"{m} was hungry and went home.",
        f"If it rains, {n} will stay in the house.", f"Every friend of {m} came by train.",
        f"Of these {rng.choice(OBJECTS)} some were already broken, so they had to go.",
        f"{n}, who pays for the {rng.choice(OBJECTS)}, adds one more.",
        f"{m} brings {rng.choice(OBJECTS)}, and all friends come to look.",
        f"Can you count how many {rng.choice(OBJECTS)} they bring by the way?",
        f"{n} should send your letter to the man in the middle.",
        f"To {m} an old card was written between two {rng.choice(PLACES)}.",
        f"Against the wind {n} walks, and the paint on his nose is {rng.choice(COLOURS)}.",
        f"They carried {rng.choice(OBJECTS)} home and dig near the {rng.choice(PLACES)}.",
        f"By an hour of work {m} will add to what you have.",
        f"At night the {rng.choice(PETS)} will remind you of this.",
    )
    return " ".join(rng.sample(lines, rng.randint(3, 6)))


def option_texts(rng: Random) -> str:
    """Lettered options and what each letter says: teaches copying of options."""
    words = _some_words(rng, rng.randint(3, 5))
    pairs = list(zip("ABCDE", words, strict=False))
    shown = _print_options(rng, words)
    rng.shuffle(pairs)
    form = rng.choice(("Choice {k} is {v}.", "{k} says {v}.", "{k} stands for {v}.", "Option {k} -> {v}"))
    return shown + "\n" + "\n".join(form.format(k=k, v=v) for k, v in pairs[: rng.randint(2, len(pairs))])


def copies(rng: Random) -> str:
    """Lists repeated word for word: teaches copying."""
    form = rng.choice(("Repeat: {l}\n{l}", "{l} -> {l}", "Say this: {l}\nGood: {l}", "List: {l}\nThe list again: {l}"))
    return "\n".join(form.format(l=", ".join(_some_words(rng, rng.randint(2, 6)))) for _ in range(rng.randint(1, 3)))


def pairs(rng: Random) -> str:
    """One to four `Input:`/`Output:` pairs of one kind in one answer style; half of the documents have one pair."""
    count = 1 if rng.random() < 0.5 else rng.randint(2, 4)
    write = rng.choices((_pair_one, _pair_multi, _pair_choice, _pair_science, _pair_fact, _pair_other),
                        (20, 24, 20, 18, 12, 6))[0]
    style = draw_style(rng)
    order = ""
    if rng.random() < 0.6:
        order = f"{rng.choice(VERBS)} {rng.choice(HOWS)} and {rng.choice(GOALS)} {rng.choice(AIMS)}.\n"
        if rng.random() < 0.3:
            order = f"{rng.choice(VERBS)} {rng.choice(HOWS)}.\n"
    if write is _pair_fact:
        order = ""
    out = []
    for _ in range(count):
        question, answer = write(rng, style)
        out.append(f"Input: {order}{question}\nOutput: {answer}")
    return "\n".join(out)


def _pair_one(rng: Random, style: Style) -> tuple[str, str]:
    problem = draw_open_problem(rng, "one")
    return problem.question, explain(style, problem)


def _pair_multi(rng: Random, style: Style) -> tuple[str, str]:
    problem = draw_open_problem(rng, "multi")
    return problem.question, explain(style, problem)


def _pair_choice(rng: Random, style: Style) -> tuple[str, str]:
    problem = draw_open_problem(rng, "choice")
    return f"{problem.question}\n{_print_options(rng, problem.options)}", explain(style, problem)


def _pair_science(rng: Random, style: Style) -> tuple[str, str]:
    fact = rng.choice(science_facts())
    options = fact_options(rng, fact, rng.choice((3, 4, 4, 4)))
    question = f"{fact.question(rng.choice(fact.corpus_wordings))}\n{_print_options(rng, options)}"
    said = _capital(fact.statement() if rng.random() < 0.6 else _statement(rng, fact))
    return question, f"{said}{style.joiner}{close(style, fact.value)}"


def _pair_fact(rng: Random, style: Style) -> tuple[str, str]:
    fact = rng.choice(_KNOWN if rng.random() < 0.6 else science_facts())
    said = style.fact.format(st=_capital(_statement(rng, fact)), v=fact.value, s=fact.subject)
    return fact.question(rng.choice(fact.corpus_wordings)), said


def _pair_other(rng: Random, style: Style) -> tuple[str, str]:
    """First or last of a list, repeated lists, lettered options."""
    words = _some_words(rng, rng.randint(3, 5))
    roll = rng.random()
    if roll < 0.4:
        where, word = rng.choice((("first", words[0]), ("last", words[-1])))
        return f"Which word is {where}? {', '.join(words)}", f"{_capital(where)}. {close(style, word)}"
    if roll < 0.7:
        return f"Repeat: {', '.join(words)}", f"List: {', '.join(words)}"
    k = rng.randrange(len(words))
    return f"What does {'ABCDE'[k]} say?\n{_print_options(rng, words)}", f"{'ABCDE'[k]} says {words[k]}."


def _some_words(rng: Random, count: int) -> list[str]:
    roll = rng.random()
    if roll < 0.25:
        return [str(n) for n in rng.sample(range(2, 82), count)]
    if roll < 0.5:
        return [f.subject for f in rng.sample(science_facts() if roll < 0.4 else people_facts(), count)]
    return rng.sample(WORD_LIST, count)


def _print_options(rng: Random, options: list[str] | tuple[int, ...]) -> str:
    form, joiner = rng.choice((("{k}. {v}", "\n"), ("{k}){v}", " "), ("{k}) {v}", " "), ("( {k} ) {v}", "\n"),
                               ("{k}: {v}", ", "), ("{k}. {v}", "\n"), ("{k}){v}", " ")))
    lead = rng.choice(("", "", "", "Options: ", "Choices: "))
    return lead + joiner.join(form.format(k=k, v=v) for k, v in zip("ABCDE", options, strict=False))


_KNOWN = tuple(fact for fact in people_facts() if fact.in_corpus)

SHARES: dict[str, tuple[float, Callable[[Random], str]]] = {  # share of the text, writer
    "pairs": (0.40, pairs),
    "equations": (0.11, equations),
    "people": (0.08, facts_about_people),
    "science": (0.10, facts_of_science),
    "one_step": (0.07, one_step),
    "multi_step": (0.08, multi_step),
    "option_texts": (0.08, option_texts),
    "copies": (0.04, copies),
    "story": (0.04, story),
}
