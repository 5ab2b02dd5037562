"""Three built-in tasks whose answers are sentences: simplification, question generation and dialogue, always the same.

    mini_simplify   a sentence with hard words, to be said in simple ones; a table of 55 decides. original: the sentence
    mini_ask        a statement of an invented fact, and the question that it answers
    mini_reply      what somebody says, and a fitting reply that names the same thing

Several answers are right where the table has two simple words, and where a question or a reply can be put in other ways: they
are the references, and the first of them, always put the same way, is what is trained on and what exact match asks for. They
stand beside the five tasks of data/builtin.py, are found by name, and are not among "all". The pretraining corpus holds no prompt
of them. Where a name must be copied it is one of the corpus's people, since nano has learned to copy those, but none of its facts.
"""

from collections.abc import Callable
from functools import cache
from itertools import product
from random import Random

from data import builtin_world as world
from data.builtin import TEST_ROWS, TRAIN_ROWS
from data.builtin_problems import NAMES, OBJECTS, normalise_question

GENERATION_TASKS = ("mini_simplify", "mini_ask", "mini_reply")
MAX_NEW_TOKENS = {"mini_simplify": 32, "mini_ask": 24, "mini_reply": 32}
DAYS = ("Monday", "Friday")

# Hard word or phrase: the simple one; "a/b": either will do, the first is written.
HARD_WORDS = {
    "did": "did find: found, did see: saw, did lose: lost, did buy: bought/took, did make: made, did take: took, did give: gave, "
    "did sell: sold",
    "does": "is in need of: needs, does want: wants, does like: likes, does have: has, does keep: keeps, does bring: brings",
    "who": "ally: friend, tutor: teacher, medic: doctor, author: writer, man of the farm: farmer, man of the ship: sailor, "
    "man with paint: painter, man of bread: baker",
    "pet": "canine: dog, feline: cat, steed: horse, hare: rabbit, swine: pig, toad: frog",
    "things": "tomes: books, blooms: flowers, tarts: cakes, caps: hats, sacks: bags, ova: eggs",
    "place": "abode: house/home, lea: field, store: shop, plot: garden",
    "adj": "red in colour: red, blue in colour: blue, green in colour: green, black in colour: black, brown in colour: brown, "
    "grey in colour: grey, yellow in colour: yellow, white in colour: white, long in years: old, of good make: good/best",
    "when": "at this hour: now, by the moon: at night, one more time: again, as a group: together, in the end: then",
    "near": "not far from: near, at the side of: near",
}  # fmt: skip
TABLE = {kind: [(hard, tuple(simple.split("/"))) for hard, simple in (pair.split(": ") for pair in text.split(", "))]
         for kind, text in HARD_WORDS.items()}  # fmt: skip

FRAMES = (  # each with more sentences than there are rows of it, else drawing would not end
    "{n} {did} {k} {o}.", "{n} {did} the {o} of {m}.", "{n} {does} {k} {o}.", "{n} {does} the {o} of {m}.", "The {o} of {n} are {adj}.",
    "The {pet} of {n} is {adj}.", "{n} is the {who} of {m}.", "The {who} of {n} has {o}.", "{n} and {m} play {when}.",
    "{n} went to the {place} of {m}.", "{n} is {near} {m}.", "{n} has {k} {things}.", "{n} {did} the {o} {when}.",
    "The {things} of {n} are {adj}.", "The {pet} of {n} is {near} {m}.", "The {who} of {n} {did} {o}.",
    # held out
    "On {d} {n} {did} {o}.", "{n} {does} the {pet} of {m}.", "The {place} of {n} is {near} {m}.", "The {o} of {n} and {m} are {adj}.",
)  # fmt: skip
FRAMES_HELD_OUT = 4  # the last of them

# Mood: what is said, the last of it held out, and the replies, the first of which is written.
MOODS = {
    "loss": (("I lost {o}.", "The {o} are not in the bag.", "Where are the {o}?", "There were {o} here, now there are no {o}."),
             ("We will look for the {o}, {n}.", "Let us find the {o}, {n}.", "{n}, we will find the {o}.")),
    "joy": (("I found {k} {o}.", "{m} gave us {k} {o}.", "Now I have {k} {o}.", "By train came {k} {o} for us."),
            ("How good that you have {o}, {n}.", "It is good to have {o}, {n}.", "So you have {k} {o}, {n}.")),
    "wish": (("I want some {o}.", "I need {o} for {m}.", "I have no {o} left.", "If I had some {o}."),
             ("I will give you {o}, {n}.", "{n}, you can have {o}.", "Take some of these {o}, {n}.")),
    "fear": (("There is a {p} in the room.", "I am afraid of the {p}.", "A {p} ran to the house.", "Let the {p} not come near."),
             ("The {p} will go away, {n}.", "{n}, the {p} will not stay.", "We will send the {p} away, {n}.")),
    "work": (("I made these {o}.", "Look at these {o}.", "The {o} on the table are from {m}.", "Of all {o} these are from the shop."),
             ("They are the best {o}, {n}.", "They are good {o}, {n}.", "{n}, I like these {o}.")),
    "food": (("I would like some {f}.", "I am hungry for {f}.", "We should eat {f}.", "The friends of {m} eat {f}."),
             ("Let us eat {f}, {n}.", "We can eat {f} together, {n}.", "There are {f} for you, {n}.")),
    "music": (("I have the {i} of {m}.", "There is a {i} on the table.", "{m} gave us a {i}.", "With a {i} the day is not long."),
              ("You can play the {i}, {n}.", "Let us play the {i}, {n}.", "Will you play the {i}, {n}?")),
    "theft": (("{m} took the {o}.", "{m} has all the {o}.", "{m} sold the {o}.", "Every day {m} carries {o} away."),
              ("{m} must give you {o}, {n}.", "That was not right of {m}, {n}.", "{n}, I will go to {m} for the {o}.")),
}  # fmt: skip

Template = tuple[str, bool, Callable[[Random], dict]]  # name, held out, and what writes a row


def generation_task(name: str) -> dict:
    """The task as data.builtin.builtin_task gives its own; rows also have references, and mini_simplify's the original."""
    train, test = _rows(name)
    replay = Random(f"{name} replay").sample(train, len(train) // 100)
    copies = ([dict(row) for row in part] for part in (train, test, replay))
    return dict(zip(("train", "test", "replay"), copies, strict=True), answer_kind="text", max_new_tokens=MAX_NEW_TOKENS[name])


@cache
def _rows(name: str) -> tuple[tuple[dict, ...], tuple[dict, ...]]:
    """Train and test: the templates by turns, those held out in test alone, and no input twice."""
    templates = {"mini_simplify": _simplify, "mini_ask": _ask, "mini_reply": _reply}[name]()
    seen, parts = set(), []
    for part, rows, usable in (("train", TRAIN_ROWS, [t for t in templates if not t[1]]), ("test", TEST_ROWS, templates)):
        rng, out = Random(f"{name} {part}"), []
        while len(out) < rows:
            template, held_out, write = usable[len(out) % len(usable)]
            row = write(rng)
            if (key := normalise_question(row["input"])) not in seen:
                seen.add(key)
                out.append(row | dict(template=template, held_out=held_out))
        rng.shuffle(out)
        parts.append(tuple(out))
    return parts[0], parts[1]


def _names_and_things(rng: Random) -> dict[str, object]:
    n, m = rng.sample(world.PEOPLE, 2)
    return dict(n=n, m=m, k=rng.randint(2, 40), d=rng.choice(DAYS), o=rng.choice(OBJECTS), p=rng.choice(world.PETS),
                f=rng.choice(world.FOODS), i=rng.choice(world.INSTRUMENTS))  # fmt: skip


def _simplify() -> list[Template]:
    def write(rng: Random, frame: str) -> dict:
        words, hard = _names_and_things(rng), {kind: rng.choice(pairs) for kind, pairs in TABLE.items() if f"{{{kind}}}" in frame}
        sentence = frame.format(**words, **{kind: word for kind, (word, _) in hard.items()})
        choices = product(*(simple for _, simple in hard.values()))
        answers = [frame.format(**words, **dict(zip(hard, choice, strict=True))) for choice in choices]
        return dict(instruction="Rewrite this in simple words.", input=f"Text: {sentence}", output=answers[0], references=answers,
                    original=sentence)  # fmt: skip

    first_held_out = len(FRAMES) - FRAMES_HELD_OUT
    return [(f"frame_{i}", i >= first_held_out, lambda rng, f=frame: write(rng, f)) for i, frame in enumerate(FRAMES)]


def _ask() -> list[Template]:
    """Relations of the built-in world, of people and pets that its facts are not about; the last statement of each is held out."""

    def write(rng: Random, relation: world.Relation, statement: str) -> dict:
        subject = rng.choice(NAMES if relation in world.PEOPLE_RELATIONS else world.PETS)
        told = statement.format(s=subject, v=rng.choice(relation.values))
        questions = [question.format(s=subject) for question in relation.questions]
        return dict(instruction="Ask the question that this answers.", input=told[0].upper() + told[1:], output=questions[0],
                    references=questions)  # fmt: skip

    return [
        (f"{relation.name}_{i}", i == len(relation.statements) - 1, lambda rng, r=relation, s=statement: write(rng, r, s))
        for relation in (*world.PEOPLE_RELATIONS, *world.BEAST_RELATIONS)
        if relation.name != "instrument"  # the corpus's stories say who plays what
        for i, statement in enumerate(relation.statements)
    ]


def _reply() -> list[Template]:
    def write(rng: Random, said: str, replies: tuple[str, ...]) -> dict:
        words = _names_and_things(rng)
        answers = [reply.format(**words) for reply in replies]
        return dict(instruction="Reply to this.", input=f"From {words['n']}: {said.format(**words)}", output=answers[0], references=answers)

    return [
        (f"{mood}_{i}", i == len(said) - 1, lambda rng, s=text, r=replies: write(rng, s, r))
        for mood, (said, replies) in MOODS.items()
        for i, text in enumerate(said)
    ]
