"""Three built-in tasks whose answers are sentences: simplification, question generation and dialogue, always the same.

    mini_simplify   a sentence with hard words, to be said in simple ones; a table of 64 words decides. original: the sentence
    mini_ask        a statement of an invented fact, and the question that it answers
    mini_reply      what somebody says, and a fitting reply that names the same thing

Several answers are right where the table has two simple words, and where a question or a reply can be put in other ways: they
are the references, and the first of them, always put the same way, is what is trained on and what exact match asks for. They
stand beside the five tasks of data/builtin.py, are found by name, and are not among "all". The pretraining corpus holds no hard
word, no prompt of these tasks and none of their facts, which are about other names than its own.
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

# Hard word: its simple one; "a/b": either will do, the first is written.
HARD_WORDS = {
    "did": "mislaid: lost, located: found, beheld: saw, vended: sold, acquired: bought/took, fashioned: made, seized: took, "
    "ferried: carried, bestowed: gave",
    "does": "desires: wants, requires: needs, adores: likes, possesses: has, retains: keeps, conveys: brings, procures: buys/gets",
    "who": "comrade: friend, physician: doctor, tutor: teacher, vocalist: singer, scribe: writer, mariner: sailor, sentry: guard, "
    "magistrate: judge",
    "pet": "canine: dog, feline: cat, equine: horse, serpent: snake, swine: pig, rodent: mouse, hare: rabbit",
    "things": "tomes: books, currency: coins/money, blossoms: flowers, pastries: cakes, trinkets: toys, crates: boxes, pebbles: stones, "
    "caps: hats, sacks: bags, ova: eggs",
    "thing": "vessel: boat/ship, cycle: bike, lorry: truck, epistle: letter, automobile: car",
    "place": "abode: house/home, meadow: field, store: shop, chamber: room, plot: garden",
    "adj": "crimson: red, azure: blue, verdant: green, ebony: black, ivory: white, amber: yellow, ancient: old, shattered: broken, "
    "superb: good/best",
    "when": "presently: now, nocturnally: at night, anew: again, thereafter: then",
}  # fmt: skip
TABLE = {kind: [(hard, tuple(simple.split("/"))) for hard, simple in (pair.split(": ") for pair in text.split(", "))]
         for kind, text in HARD_WORDS.items()}  # fmt: skip

FRAMES = (
    "{n} {did} the {adj} {things}.", "{n} {did} {k} {things} near the {place}.", "{n} {did} the {thing} of the {who}.",
    "The {who} {does} the {adj} {pet}.", "The {pet} of {n} {does} the {things}.", "{n} {does} the {adj} {thing}.",
    "The {who} {did} the {pet} {when}.", "{n} and {m} {did} the {things} {when}.", "Near the {place} {n} {did} the {pet}.",
    "There are {k} {adj} {things} in the {place}.", "{n} is the {who} of {m} {when}.", "The {who} is in the {adj} {place}.",
    "{m} {does} {k} {things} from the {who}.", "On {d} {n} {did} the {adj} {pet}.", "The {pet} was near the {adj} {thing}.",
    "The {adj} {thing} is for the {who}.", "{n} put the {things} into the {thing}.", "The {place} has {k} {adj} {things}.",
    "{n} went to the {place} {when}.", "{n} {does} the {who} and the {pet}.", "On {d} the {who} took the {thing}.",
    "The {pet} ran into the {place} {when}.",
    # held out
    "{n}, who {does} the {things}, {did} the {thing}.", "In the {place} the {who} {did} {k} {things}.",
    "{m} walks with the {adj} {pet} near the {place}.", "The {who} of {n} {does} {k} {things} {when}.",
)  # fmt: skip
FRAMES_HELD_OUT = 4  # the last of them

# Mood: what is said, the last of it held out, and the replies, the first of which is written.
MOODS = {
    "loss": (("I lost my {o}.", "My {o} are not in my bag.", "Where are my {o}?", "There were {o} in my hats, now there are no {o}."),
             ("We will look for your {o}, {n}.", "Let us look for your {o}, {n}.", "I will help you to find your {o}, {n}.")),
    "joy": (("I found {k} {o}.", "{m} gave me {k} {o}.", "I have {k} new {o}.", "By train came {k} {o} for me."),
            ("How good that you have {o}, {n}.", "So now you have {k} {o}, {n}.", "It is good to have {o}, {n}.")),
    "wish": (("I want some {o}.", "I need {o} for {m}.", "I have no {o} left.", "If I only had some {o}."),
             ("You can have my {o}, {n}.", "I will give you my {o}, {n}.", "Take some of my {o}, {n}.")),
    "fear": (("There is a {p} in my room.", "I am afraid of the {p}.", "A {p} ran to my house.", "Do not let the {p} come to me."),
             ("The {p} will go away, {n}.", "Stay with me, {n}, and the {p} will go.", "I will send the {p} away, {n}.")),
    "pride": (("I made these {o}.", "Look at my {o}.", "The {o} on the table are my work.", "Of all {o} these are from my shop."),
              ("Your {o} are the best, {n}.", "These are very good {o}, {n}.", "I like your {o}, {n}.")),
    "hunger": (("I would like some {f}.", "I am hungry for {f}.", "It is time to eat {f}.", "My friends eat {f}, and so should I."),
               ("Let us eat {f}, {n}.", "We can eat {f} together, {n}.", "There is some {f} for you, {n}.")),
    "music": (("I play the {i} at night.", "My {i} is on the table.", "{m} gave me a {i}.", "With a {i} the day is not long."),
              ("Play the {i} for us, {n}.", "Let us hear the {i}, {n}.", "Will you play the {i} for me, {n}?")),
    "anger": (("{m} took my {o}.", "{m} has all my {o}.", "{m} sold my {o}.", "Every day {m} carries my {o} away."),
              ("{m} must give you {o}, {n}.", "That was not right of {m}, {n}.", "I will go to {m} for your {o}, {n}.")),
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
    n, m = rng.sample(NAMES, 2)
    return dict(n=n, m=m, k=rng.randint(2, 40), d=rng.choice(DAYS), o=rng.choice(OBJECTS), p=rng.choice(world.PETS),
                f=rng.choice(world.FOODS), i=rng.choice(world.INSTRUMENTS))  # fmt: skip


def _simplify() -> list[Template]:
    def write(rng: Random, frame: str) -> dict:
        words, hard = _names_and_things(rng), {kind: rng.choice(pairs) for kind, pairs in TABLE.items() if f"{{{kind}}}" in frame}
        sentence = frame.format(**words, **{kind: word for kind, (word, _) in hard.items()})
        choices = product(*(simple for _, simple in hard.values()))
        answers = [frame.format(**words, **dict(zip(hard, choice, strict=True))) for choice in choices]
        return dict(instruction="Rewrite this in simple words.", input=sentence, output=answers[0], references=answers, original=sentence)

    first_held_out = len(FRAMES) - FRAMES_HELD_OUT
    return [(f"frame_{i}", i >= first_held_out, lambda rng, f=frame: write(rng, f)) for i, frame in enumerate(FRAMES)]


def _ask() -> list[Template]:
    """Relations of the built-in world, of subjects that its facts are not about; the last statement of each is held out."""

    def write(rng: Random, relation: world.Relation, statement: str) -> dict:
        subject = rng.choice(NAMES if relation in world.PEOPLE_RELATIONS else world.STRANGERS)
        told = statement.format(s=subject, v=rng.choice(relation.values))
        questions = [question.format(s=subject) for question in relation.questions]
        return dict(instruction="Ask the question that this answers.", input=told[0].upper() + told[1:], output=questions[0],
                    references=questions)  # fmt: skip

    return [
        (f"{relation.name}_{i}", i == len(relation.statements) - 1, lambda rng, r=relation, s=statement: write(rng, r, s))
        for relation in (*world.PEOPLE_RELATIONS, *world.BEAST_RELATIONS, *world.PLANT_RELATIONS)
        for i, statement in enumerate(relation.statements)
    ]


def _reply() -> list[Template]:
    def write(rng: Random, said: str, replies: tuple[str, ...]) -> dict:
        words = _names_and_things(rng)
        answers = [reply.format(**words) for reply in replies]
        return dict(instruction="Reply to this.", input=f"{words['n']}: {said.format(**words)}", output=answers[0], references=answers)

    return [
        (f"{mood}_{i}", i == len(said) - 1, lambda rng, s=text, r=replies: write(rng, s, r))
        for mood, (said, replies) in MOODS.items()
        for i, text in enumerate(said)
    ]
