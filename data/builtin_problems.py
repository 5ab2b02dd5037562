"""Arithmetic word problems of the built-in study: one step, several steps, and multiple choice.

A template is (expression, text). The expression's steps are separated by ";", "_" is the result of the step before.
Numbers stay where a model of three million parameters can learn them: sums and differences within 60, the tables from
2 to 9, doubling and halving within 60. The last templates of each list are held out: they appear in test rows only.
"""

import re
from dataclasses import dataclass
from random import Random

NAMES = ("Tom Anna Ben Lucy Sam Mary Jack Rosa Paul Nina Max Ella Leo Kate Dan Ruth Finn Vera Hugo Iris Carl Emma Noah "
         "Clara").split()
OBJECTS = ("apples books coins pens cards stamps shells cups balls eggs plums stones toys keys buttons flowers cakes "
           "pears boxes bags hats rings nails beads").split()
FIELDS = "garden field room yard park court floor wall pool roof door flag".split()
VEHICLES = "train car bus truck boat horse bike cart ship van tram plane".split()

HELD_OUT = 4  # the last templates of each list

ONE_STEP = (
    ("a+b", "{n} has {a} {o}. {m} gives {n} {b} more. How many {o} does {n} have now?"),
    ("a+b", "There are {a} {o} on the table and {b} {o} on the floor. How many {o} are there in all?"),
    ("a+b", "{n} found {a} {o} and {m} found {b} {o}. How many {o} did they find together?"),
    ("a+b", "{n} bought {a} {o} on Monday and {b} {o} on Friday. How many {o} did {n} buy?"),
    ("a+b", "After {n} gave away {a} {o}, {b} {o} were left. How many {o} did {n} have at first?"),
    ("a+b", "{n} has {a} {o}. {m} has {b} {o} more than {n}. How many {o} does {m} have?"),
    ("a-b", "{n} had {a} {o}. {n} lost {b} of them. How many {o} are left?"),
    ("a-b", "{n} has {a} {o} and {m} has {b} {o}. How many more {o} does {n} have than {m}?"),
    ("a-b", "There were {a} {o} in the shop. {n} bought {b} of them. How many {o} stay in the shop?"),
    ("a-b", "{n} needs {a} {o} and has {b}. How many more {o} does {n} need?"),
    ("a-b", "{n} and {m} have {a} {o} together. {b} of them belong to {m}. How many {o} belong to {n}?"),
    ("a-b", "{n} made {a} {o} and sold {b} of them. How many {o} were not sold?"),
    ("a*b", "{n} has {a} bags with {b} {o} in each bag. How many {o} does {n} have?"),
    ("a*b", "Each day {n} makes {a} {o}. How many {o} does {n} make in {b} days?"),
    ("a*b", "There are {a} rows of {b} {o}. How many {o} are there?"),
    ("a*b", "One of the {o} costs {a} coins. {n} buys {b} of them. How many coins does {n} pay?"),
    ("a/b", "{n} puts {a} {o} into {b} equal groups. How many {o} are in each group?"),
    ("a/b", "{n} shares {a} {o} among {b} friends. How many {o} does each friend get?"),
    ("a/b", "{n} packs {a} {o} with {b} in each box. How many boxes does {n} fill?"),
    ("a/b", "{a} {o} are put in {b} equal rows. How many {o} are in one row?"),
    # held out
    ("a+b", "{m} took {b} {o} to the house of {n}, who already had {a}. Count the {o} in the house."),
    ("a-b", "Of the {a} {o} that {n} carried home, {b} were broken. How many {o} were good?"),
    ("a*b", "If every one of {a} friends brings {b} {o}, how many {o} come in all?"),
    ("a/b", "{b} friends of {n} find {a} {o} and share them. How many {o} does one friend get?"),
)

MULTI_STEP = (
    ("a+b;_+c", "{n} has {a} {o}. {m} gives {n} {b} more and then {c} more. How many {o} does {n} have now?"),
    ("a+b;_-c", "{n} has {a} {o}. {n} finds {b} more and then loses {c}. How many {o} does {n} have now?"),
    ("a-b;_+c", "{n} had {a} {o}. {n} gave {b} to {m} and then bought {c}. How many {o} does {n} have now?"),
    ("a-b;_-c", "There were {a} {o} in the shop. {n} bought {b} and {m} bought {c}. How many {o} are left?"),
    ("a*b;_+c", "{n} has {a} bags with {b} {o} in each bag and {c} {o} on the table. How many {o} are there in all?"),
    ("a*b;_-c", "{n} has {a} bags with {b} {o} in each bag. {n} sold {c} {o}. How many {o} are left?"),
    ("a*b;_+c", "Each day {n} makes {a} {o}. {n} works {b} days and then finds {c} more. How many {o} does {n} have?"),
    ("a*b;_-c", "There are {a} rows of {b} {o}. {c} of them are red. How many {o} are not red?"),
    ("a+b;_/c", "{n} has {a} {o} and {m} has {b}. They share them among {c} friends. How many {o} does each get?"),
    ("a-b;_/c", "{n} had {a} {o} and lost {b}. The rest go into {c} equal boxes. How many {o} are in each box?"),
    ("a/b;_+c", "{n} shares {a} {o} among {b} boxes. Then {c} more go into each box. How many {o} are in each box?"),
    ("a/b;_-c", "{a} {o} are put in {b} equal rows. {n} takes {c} from one row. How many {o} stay in that row?"),
    ("a+b;_*c", "Each box has {a} red and {b} blue {o}. {n} has {c} boxes. How many {o} does {n} have?"),
    ("a-b;_*c", "Each box had {a} {o}, but {n} took {b} out of each. There are {c} boxes. How many {o} are left?"),
    ("a+b;a+_", "{n} has {a} {o}. {m} has {b} more than {n}. How many {o} do they have together?"),
    ("a-b;a+_", "{n} has {a} {o}. {m} has {b} less than {n}. How many {o} do they have together?"),
    ("a*b;_+a", "{n} has {a} {o}. {m} has {b} times as many. How many {o} do they have together?"),
    ("a*b;_-a", "{n} has {a} {o}. {m} has {b} times as many. How many more {o} does {m} have?"),
    ("a+b;_+c;_-d", "{n} has {a} {o}, {m} has {b} and Bob has {c}. They lost {d}. How many {o} are left?"),
    ("a*b;_+c;_-d", "{n} buys {a} boxes of {b} {o} and finds {c} more. {n} gave {d} to {m}. How many {o} are left?"),
    # held out
    ("a+b;_-c", "On Monday {n} made {a} {o}, on Friday {b}. Of these {c} were sold. How many {o} were not sold?"),
    ("a*b;_-c", "{a} friends bring {b} {o} each to {n}, who loses {c} of them. Count the {o} that stay."),
    ("a-b;_+c", "Of {a} {o} in the house {b} were broken, so {n} bought {c}. How many good {o} are there now?"),
    ("a*b;_+c", "{n} pays for {a} bags of {b} {o}, and {m} adds {c} {o}. How many {o} are there?"),
)

CHOICE = (
    ("b-a", "If x + {a} = {b}, what is x, the number of {o}?"),
    ("a+b", "If x - {a} = {b}, what is x, the number of {o}?"),
    ("b/a", "If {a} times x = {b}, what is x, the number of {o}?"),
    ("a*b", "If x divided by {a} = {b}, what is x, the number of {o}?"),
    ("a*b", "A {f} is {a} m long and {b} m wide. What is its area?"),
    ("a+b;_*2", "A {f} is {a} m long and {b} m wide. How long is the line around it?"),
    ("a/b", "The area of a {f} is {a} and one side is {b} m. How long is the other side?"),
    ("a*b", "A {t} goes {a} km in one hour. How far does it go in {b} hours?"),
    ("a/b", "A {t} goes {a} km in {b} hours. How far does it go in one hour?"),
    ("a/b", "A {t} goes {b} km in one hour. How many hours does it need for {a} km?"),
    ("a-b", "A {t} goes from km {b} to km {a}. How far does it go?"),
    ("a+b;_/2", "{n} counts {a} {o} and then {b}. What is the mean of both counts?"),
    ("a/2", "What is half of the {a} {o} of {n}?"),
    ("a*2", "{n} has {a} {o}. What is twice that number?"),
    ("a+b", "{n} is {a} years old. How old will {n} be in {b} years?"),
    ("a-b", "{n} is {a} years old. How old was {n} {b} years ago?"),
    ("a+b", "{n} is {a} years old and {m} is {b} years older. How old is {m}?"),
    ("a-b;_/2", "{n} had {a} {o}, lost {b} and sold half of the rest. How many {o} were sold?"),
    ("a-b", "The {o} cost {b} coins to make and are sold for {a}. What is the gain?"),
    ("a+b", "The {o} cost {a} coins to make and the gain is {b}. What is the price?"),
    # held out
    ("a-b", "Which number of {o} must {n} add to {b} to get {a}?"),
    ("a*b", "At {a} km an hour, what way does a {t} make in {b} hours?"),
    ("a+b;_/2", "What is the middle between {a} and {b} {o}?"),
    ("a-b", "{n} is {a} and {m} is {b} years old. By how many years is {n} older?"),
)

TEMPLATES = {"one": ONE_STEP, "multi": MULTI_STEP, "choice": CHOICE}


@dataclass(frozen=True)
class Problem:
    """A question, its steps (x, operator, y, result), its answer and, for multiple choice, five printed numbers."""

    kind: str
    template: str
    held_out: bool
    question: str
    steps: tuple[tuple[int, str, int, int], ...]
    answer: int
    options: tuple[int, ...] = ()


def apply(x: int, op: str, y: int) -> int | None:
    """x op y, or None where it leaves the arithmetic that the model is taught."""
    if op == "+":
        return x + y if x >= 1 and y >= 1 and x + y <= 60 else None
    if op == "-":
        return x - y if 1 <= y < x <= 60 or 1 <= y < x <= 81 and x - y <= 60 and y <= 30 else None
    if op == "*":
        fits = 2 <= x <= 9 and 2 <= y <= 9 or y == 2 and 2 <= x <= 30 or x == 2 and 2 <= y <= 30
        return x * y if fits else None
    if x % y:
        return None
    return x // y if 2 <= y <= 9 and 2 <= x // y <= 9 or y == 2 and 2 <= x <= 60 else None


def work_out(expression: str, numbers: dict[str, int]) -> tuple[tuple[int, str, int, int], ...] | None:
    """The steps of an expression such as "a+b;_*2", or None when a step leaves the taught arithmetic."""
    steps, last = [], 0
    for step in expression.split(";"):
        left, op, right = re.fullmatch(r"(\w+)([-+*/])(\w+)", step).groups()
        x, y = (last if s == "_" else int(s) if s.isdigit() else numbers[s] for s in (left, right))
        result = apply(x, op, y)
        if result is None:
            return None
        steps.append((x, op, y, result))
        last = result
    return tuple(steps)


def draw_problem(rng: Random, kind: str, template: int) -> Problem:
    """A problem of this template with fresh names and numbers."""
    expression, text = TEMPLATES[kind][template]
    names = sorted(set(re.findall(r"[a-d]", expression)))
    small = set(re.findall(r"[*/]([a-d])", expression)) | set(re.findall(r"([a-d])\*[a-d]", expression))
    steps = None
    while steps is None:
        numbers = {name: rng.randint(2, 9) if name in small else rng.randint(2, 40) for name in names}
        if "/" in expression and expression[0] not in small:
            numbers[expression[0]] = rng.randint(2, 72)
        steps = work_out(expression, numbers)
    n, m = rng.sample(NAMES, 2)
    question = text.format(n=n, m=m, o=rng.choice(OBJECTS), f=rng.choice(FIELDS), t=rng.choice(VEHICLES), **numbers)
    answer = steps[-1][3]
    held_out = template >= len(TEMPLATES[kind]) - HELD_OUT
    options = _options(rng, steps) if kind == "choice" else ()
    return Problem(kind, f"{kind}_{template}", held_out, question, steps, answer, options)


def _options(rng: Random, steps: tuple[tuple[int, str, int, int], ...]) -> tuple[int, ...]:
    """The answer and four near misses, shuffled."""
    x, _, y, answer = steps[-1]
    misses = {x + y, abs(x - y), *(answer + d for d in (-10, -3, -2, -1, 1, 2, 3, 10)), x, y}
    misses = sorted(v for v in misses if 1 <= v <= 99 and v != answer)
    options = [answer, *rng.sample(misses, 4)]
    rng.shuffle(options)
    return tuple(options)


def normalise_question(text: str) -> str:
    """Lower case, letters and digits only, single spaces: what "the same question" means here."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
