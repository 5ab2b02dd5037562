"""Questions and answers in the raw text of a model: which pairs stand there, and which of them are worth keeping."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from metrics.answers import extract_answer
from metrics.text import collapse
from model.tokenizer import Tokenizer

QUESTION, ANSWER = "Input:", "Output:"
_WORD = re.compile(r"\w+|[-+*/=<>^%]")  # with the signs of arithmetic: x + 1 is not x - 1


def _setting(default: float, told: str):
    return field(default=default, metadata={"told": told})


@dataclass(frozen=True)
class Limits:
    """How items are sampled, and what is valid. The first four defaults and the lengths are the paper's."""

    shown: int = _setting(2, "demonstrations in a prompt; fewer where they do not fit")
    temperature: float = _setting(0.9, "of sampling")
    top_p: float = _setting(0.6, "of sampling")
    repetition_penalty: float = _setting(1.2, "of sampling; 1: none, which keeps closer to the form of the demonstrations")
    prompt_tokens: int = _setting(2048, "most tokens of a prompt")
    new_tokens: int = _setting(0, "most tokens of a sample; 0: twice the longest demonstration, at most a third of the context")
    input_tokens: int = _setting(500, "most tokens of definition and input together, if no demonstration has more")
    output_tokens: int = _setting(128, "most tokens of an output, if no demonstration has more")
    near: float = _setting(0.8, "share of common word pairs from which on two inputs are one; above 1: only equal words are")
    attempts: int = _setting(10, "samples for each item asked for, before the model is given up")


def parse(text: str, ended: bool = True) -> tuple[list[tuple[str, str]], list[str]]:
    """(pairs, a reason for each piece that is none) of what a model wrote after "Input:". ended: not cut off in its last answer."""
    pairs, reasons = [], []
    pieces = text.split(QUESTION)
    for number, piece in enumerate(pieces, 1):
        question, *answers = (part.strip() for part in piece.split(ANSWER))
        if number == len(pieces) and not ended:
            reasons.append("cut off")
        elif not any((question, *answers)) and number > 1:
            pass  # it stopped where the next one would begin
        elif len(answers) != 1:
            reasons.append("several outputs" if answers else f"no {ANSWER}")
        elif not question or not answers[0]:
            reasons.append("empty output" if question else "empty input")
        else:
            pairs.append((question, answers[0]))
    return pairs, reasons


class Judge:
    """Why a pair is not valid, in the light of the demonstrations and of what was added."""

    def __init__(
        self, demos: list[str], tokenizer: Tokenizer, prefix: str, limits: Limits, answer_kind: str | None = None,
        avoid: Sequence[str] = (),
    ):  # fmt: skip
        self.tokenizer, self.prefix, self.limits, self.answer_kind = tokenizer, prefix, limits, answer_kind
        self.demos, self.words, self.grams = [_grams(text) for text in demos], {_words(text) for text in demos}, []
        self.shown, self.avoid = frozenset(self.words), {_words(text) for text in avoid}

    def reason(self, question: str, answer: str) -> str:
        """ "" for a valid pair."""
        if len(self.tokenizer.encode(self.prefix + question)) > self.limits.input_tokens:
            return "input too long"
        if len(self.tokenizer.encode(answer)) > self.limits.output_tokens:
            return "output too long"
        words, grams = _words(question), _grams(question)
        if words in self.shown or self._near(grams, self.demos):
            return "a demonstration"
        if words in self.avoid:
            return "a test question"
        if words in self.words:
            return "duplicate"
        if self._near(grams, self.grams):
            return "near-duplicate"
        if self.answer_kind and extract_answer(self.answer_kind, answer) is None:
            return "no final answer"
        return ""

    def add(self, question: str) -> None:
        self.words.add(_words(question))
        self.grams.append(_grams(question))

    def _near(self, grams: frozenset, others: list[frozenset]) -> bool:
        """Jaccard's index with one of the others is at least `near`."""
        near, size = self.limits.near, len(grams)
        return any(
            near * len(other) <= size <= len(other) / near and len(grams & other) >= near * len(grams | other) for other in others if other
        )


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower())) or (collapse(text),)


def _grams(text: str) -> frozenset:
    """The pairs of words that follow each other; a single word stands for itself."""
    words = _words(text)
    return frozenset(zip(words, words[1:], strict=False)) or frozenset(words)


def without(text: str, prefix: str) -> str:
    """The input of a prompt: what follows the task's definition."""
    return text.removeprefix(prefix).strip()
