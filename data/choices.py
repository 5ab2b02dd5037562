"""Tasks whose prompts list the options of an answer, as multiple-choice questions over these options.

The continuation that is scored is the sentence in which such an answer closes ("The correct answer is 81.", "Answer: worms", "C"), directly
after the prompt: worked steps before it would give the answer away. It is once written with each option in the answer's place.
"""

from __future__ import annotations

import ast
import os.path
import re
from dataclasses import dataclass

from data.batching import cut_middle
from data.records import Record
from metrics.answers import extract_answer
from model.choices import Question
from model.tokenizer import Tokenizer

CLOSING = "The correct answer is {}."  # where an answer closes in words of its own
_CLOSINGS = re.compile(r"(?P<before>The correct answer is |Answer: |)(?P<said>.+?)(?P<after>\.?)")
_LINE = re.compile(r"\(?([A-Z])[.)]\s*(\S.*)")  # "A. worms" or "A) worms", a line each
_INLINE = re.compile(r"(?:^|\s)\(?([A-Z])\)\s*(.+?)(?=\s+\(?[A-Z]\)|$)")  # "A)15 B)18 C)16"


@dataclass(frozen=True)
class Choice:
    """What may end a record's answer: the closing sentence with each of the options; the right one is answers[gold]."""

    answers: tuple[str, ...]
    gold: int


def choice_of(record: Record) -> Choice | None:
    """The options that the prompt ends with, each in the place of the answer's; None where there are none or the answer is none of them.

    The answer's last line says by what an option is named there, its letter or its text.
    """
    listed = _listed(record.prompt[-1][1])
    lines = record.answer.strip().splitlines()
    if len(listed) < 2 or not lines:
        return None
    letters, texts = [letter for letter, _ in listed], [text for _, text in listed]
    match = _CLOSINGS.fullmatch(lines[-1].strip())
    said = match["said"] if match else ""
    if said in letters or texts.count(said) == 1:
        names = letters if said in letters else texts
        return Choice(tuple(f"{match['before']}{name}{match['after']}" for name in names), names.index(said))
    letter = extract_answer("letter", record.answer)
    return Choice(tuple(CLOSING.format(name) for name in letters), letters.index(letter)) if letter in letters else None


def choice_questions(records: list[Record], tokenizer: Tokenizer, max_length: int) -> tuple[list[Question], list[int], int]:
    """(questions, their right options, how many records have no options) of a task's records, in their order.

    What the closing sentences begin with in common belongs to the prompt. Their end token is asked for only where one of them is the
    beginning of another, which would otherwise have its own likelihood and the other's. A prompt that is too long loses its middle.
    """
    questions, gold = [], []
    for record in records:
        choice = choice_of(record)
        if choice is None:
            continue
        answers = [tokenizer.render_answer(answer) for answer in choice.answers]
        if not any(a is not b and a[:-1] == b[: len(a) - 1] for a in answers for b in answers):
            answers = [ids[:-1] for ids in answers]
        common = min(len(os.path.commonprefix(answers)), min(map(len, answers)) - 1)
        options = [ids[common:] for ids in answers]
        prompt, room = tokenizer.render_prompt(record.prompt), max_length - max(map(len, answers))
        prompt = prompt if len(prompt) <= room else cut_middle(prompt, room)
        questions.append(Question(prompt + answers[0][:common], options, "task"))
        gold.append(choice.gold)
    return questions, gold, len(records) - len(questions)


def _listed(prompt: str) -> list[tuple[str, str]]:
    """[(letter, text)] of the options at the prompt's end: lines "A. …", one line "A)… B)…", or a Python list ['A)…', …]."""
    lines = prompt.strip().splitlines()
    last = lines[-1].strip() if lines else ""
    if last.startswith("[") and last.endswith("]"):
        try:
            parts = ast.literal_eval(last)
        except (ValueError, SyntaxError):
            parts = []
        matches = [_LINE.fullmatch(part) for part in parts if isinstance(part, str)]
    else:
        matches = []
        while lines and (match := _LINE.fullmatch(lines[-1].strip())) and (len(matches) == 0 or match[1] < matches[0][1]):
            matches.insert(0, match)
            lines.pop()
        if len(matches) < 2:
            matches = list(_INLINE.finditer(last))
    found = [(match[1], match[2].strip()) for match in matches if match]
    return found if [letter for letter, _ in found] == [chr(65 + i) for i in range(len(found))] else []
