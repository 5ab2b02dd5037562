"""How the pretraining corpus writes answers: many styles, never a built-in task's own.

Variety is what makes the base model useful as a reference: having seen many ways to explain and to close an answer, it
finds a new format surprising in a few tokens only, not in half of them. The tasks' anchors ("####", "answer is",
"answer:") never occur, and no answer is the bare value, so the base model scores near zero until a format is trained.
"""

from dataclasses import dataclass
from random import Random

from data.builtin_problems import Problem

WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
HEADERS = ("", "", "", "", "", "Work: ", "Steps: ", "Reason: ", "Reasoning: ", "Idea: ", "Sum: ", "We need this: ",
           "Let us see. ", "Well, ", "Thinking: ", "Reasoning step by step: ")
STEPS = (
    "{x} {op} {y} = {r}", "{x} {op} {y} = {r}.", "{x} {op} {y} = {r}.", "( {x} {op} {y} ) = {r}", "{x}{op}{y}={r}",
    "{x} {word} {y} = {r}", "{x} {word} {y} gives {r}.", "{r} = {x} {op} {y}", "[ {x} {op} {y} = {r} ]",
    "we get {x} {op} {y} = {r}.", "take {x} {op} {y}, that is {r}.", "( {x} {op} {y} )", "{x} {op} {y}",
    "now {x} {op} {y} = {r}.", "( {x} {op} {y} = {r} )",
)
ORDERS = ((), (), (), ("First ", "Then ", "Last "), ("First ", "Then ", "Last "), ("first: ", "next: ", "last: "),
          ("1. ", "2. ", "3. "), ("Start with ", "Then ", "Then "), ("First ", "Next ", "Final "))
ADJECTIVES = ("Final", "Last", "Full", "Short", "The", "My", "Correct")
NOUNS = ("Count", "Total", "Number", "Result", "Value", "Choice", "Reply", "Word")
GOOD = ("right", "true", "correct", "best", "good", "final")
THINGS = ("choice", "option", "number", "result", "value", "reply", "word", "one")
CLOSINGS = (
    "It must be {v}.", "So it is {v}.", "That makes {v}.", "Thus we get {v}.", "Done: {v}", "So we say {v}.",
    "# {v}", "## {v}", "### {v}", "### {v}", "-> {v}", "=> {v}", "[ {v} ]", "** {v} **", "= {v}", "This is {v}.",
    "Final Answer = {v}", "Answer = {v}", "We write {v}.", "All in all {v}.", "{v} and no other.",
    "The correct answer must be {v}.", "The correct answer = {v}.", "The correct answer was {v}.",
    "The right answer must be {v}.", "The final answer was {v}.", "An answer of {v} fits.",
)
FACT_ANSWERS = (
    "{st}", "{st}", "{st}", "It is {v}.", "That would be {v}.", "{v} it is.", "{v}, I think.", "{v}, as we know.",
    "{v} is right for {s}.", "{v} is the word for {s}.", "{s}: {v}", "We know that: {st}", "For {s} it is {v}.",
    "{v} ( {s} )", "{v}, for {s}.", "I say {v}.", "{v}. {st}", "{v} - {st}", "{v} because {st}",
)


@dataclass(frozen=True)
class Style:
    """One way to write an answer; the pairs of one document share it."""

    header: str
    step: str
    order: tuple[str, ...]
    joiner: str
    closing: str
    fact: str


def draw_style(rng: Random) -> Style:
    roll = rng.random()
    if roll < 0.3:
        closing = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}: {{v}}"
    elif roll < 0.5:
        closing = f"The {rng.choice(GOOD)} {rng.choice(THINGS)} is {{v}}."
    else:
        closing = rng.choice(CLOSINGS)
    header, step = rng.choice(HEADERS), rng.choice(STEPS)
    if header == "Reasoning: " and step == "( {x} {op} {y} )":
        header = "Work: "  # a built-in task's own opening
    joiner = rng.choice(("\n", "\n", "\n", " "))
    return Style(header, step, rng.choice(ORDERS), joiner, closing, rng.choice(FACT_ANSWERS))


def close(style: Style, value: object) -> str:
    return style.closing.format(v=value)


def explain(style: Style, problem: Problem) -> str:
    """A worked answer: header, steps, closing line."""
    lines = []
    for i, (x, op, y, r) in enumerate(problem.steps):
        step = style.step
        if "{r}" not in step and len(problem.steps) > 1:
            step = "{x} {op} {y} = {r}"  # the next step needs the result
        text = step.format(x=x, op=op, y=y, r=r, word=WORDS[op])
        lines.append((style.order[i] if style.order and len(problem.steps) > 1 else "") + text)
    return style.joiner.join([style.header + lines[0], *lines[1:], close(style, problem.answer)])
