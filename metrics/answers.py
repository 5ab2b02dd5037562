"""The final answer in a model's output, and whether it is right.

Extraction is anchored: an answer counts only where the output says that it is the answer ("#### 42", "The answer is
B"). What is not found is None, never a guess, and None matches nothing: the unparsed stay in the denominator.
"""

import re
from collections.abc import Sequence

from metrics.generation import score_text
from metrics.text import collapse, normalise, rouge_l

KINDS = ("number", "letter", "short", "text")

# What may stand between the anchor and the answer: space, markdown, LaTeX, an opening bracket.
_DECORATION = r"(?:\s|[*_`:$(\[{]|\\[(\[]|\\boxed|\\text(?:bf)?|\\\$)*"
# Digits, with comma groups (also the Indian 1,00,000) and a fraction; $ may stand on either side of the sign.
_NUMBER = (
    r"(?P<sign>(?:\\?\$)?[-+\u2212]?)(?:\\?\$)?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?!\.?[0-9]|[eE][-+]?[0-9]|\s*/\s*[0-9])"  # not the front part of 1.2.3, 1e5 or 1/2
)
_ANSWER = r"\banswer[\s*_]*(?:is\b|:)"
_HASHES = re.compile(rf"(?<!#)####(?!#){_DECORATION}{_NUMBER}")
_ANSWER_NUMBER = re.compile(rf"{_ANSWER}{_DECORATION}{_NUMBER}", re.IGNORECASE)
_ONLY_NUMBER = re.compile(rf"{_DECORATION}{_NUMBER}(?:\s|[*_`$%)\]}}.]|\\[)\]%])*")
_ANY_NUMBER = re.compile(rf"(?<![0-9A-Za-z.]){_NUMBER}")

# A letter that stands alone. Anchored lower case must also look like a choice ("answer: b."), not like "a dog".
_ANSWER_LETTER = re.compile(
    r"\b(?i:answer|option|choice)[\s*_]*(?:(?i:is)\b|:)"
    rf"{_DECORATION}(?:(?i:option|choice)\b{_DECORATION})?"
    r"(?P<letter>[B-E](?![\w'\u2019-])|A(?![\w'\u2019-]|[ \t]+[a-z])|[a-e](?=[*_$}\s]*(?:[).,\]]|$)))",
    re.MULTILINE,
)
_FIRST_LETTER = re.compile(r"[\s*_(\[]*(?P<letter>[A-E])(?:[*_]*[).:,\]]|[*_\s]*(?:\n|$))(?!\w\.)")
_ANY_LETTER = re.compile(r"(?<![\w'\u2019.-])[A-E](?![\w'\u2019-])")
_ANSWER_SHORT = re.compile(rf"{_ANSWER}[\s*_:]*(?P<rest>[^\n]*)", re.IGNORECASE)


def _canonical(match: re.Match) -> str:
    """70,000 -> 70000, -3.50 -> -3.5, 14.0 -> 14: by characters, since floats would lose digits."""
    whole, _, fraction = match["digits"].replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    text = f"{whole}.{fraction}" if fraction else whole
    negative = match["sign"][-1:] in ("-", "\u2212")
    return f"-{text}" if negative and text != "0" else text


def _last(pattern: re.Pattern, text: str) -> re.Match | None:
    found = None
    for found in pattern.finditer(text):  # noqa: B007  the last one is wanted
        pass
    return found


def _number(text: str) -> str | None:
    match = _last(_HASHES, text) or _last(_ANSWER_NUMBER, text) or _ONLY_NUMBER.fullmatch(text)
    return _canonical(match) if match else None


def _letter(text: str) -> str | None:
    match = _last(_ANSWER_LETTER, text) or _FIRST_LETTER.match(text)
    return match["letter"].upper() if match else None


def _short(text: str) -> str | None:
    match = _last(_ANSWER_SHORT, text)
    line = match["rest"] if match else next((line for line in text.split("\n") if line.strip()), "")
    return normalise(line) or None


def extract_answer(kind: str, text: str) -> str | None:
    """The final answer of an output in canonical form, or None where it gives none.

    number  the last "####" (exactly four) before a number, else the last "answer is"/"answer:" before one, else a text
            that is nothing but a number; without commas, $, % and needless zeros: "70000", "-3.5", "14".
    letter  A to E after the last "answer/option/choice" + "is" or ":", else a text that begins with a letter alone.
    short   the line after the last "answer is"/"answer:", else the first line that is not empty; see text.normalise.
    text    the whole output, white space collapsed.
    """
    if kind == "number":
        return _number(text)
    if kind == "letter":
        return _letter(text)
    if kind == "short":
        return _short(text)
    if kind == "text":
        return collapse(text) or None
    raise ValueError(f"unknown answer kind {kind!r}: one of {', '.join(KINDS)}")


def _flexible(kind: str, output: str, gold: str | None) -> bool:
    """The lenient column: last number or letter anywhere, or the gold words somewhere in the output."""
    if gold is None:
        return False
    if kind == "number":
        match = _last(_ANY_NUMBER, output)
        return match is not None and _canonical(match) == gold
    if kind == "letter":
        match = _last(_ANY_LETTER, output)
        return match is not None and match[0] == gold
    words = normalise(gold)
    return bool(words) and f" {words} " in f" {normalise(output)} "


def score_answer(kind: str, output: str, reference: str, references: Sequence[str] = (), original: str = "") -> dict:
    """All scores of one output against the reference answer (a whole one, such as a worked solution).

    extracted, gold: the final answers or None; exact_match: they are equal and not None; flexible_match: the lenient
    column beside it; string_match: output and reference equal after white space is collapsed; rougeL in [0, 1].
    references: every acceptable answer, of which any will do; gold is the reference's. Of kind "text" metrics.generation.score_text's
    too, with original, the text that the answer rewrites.
    """
    every = tuple(references) or (reference,)
    extracted, golds = extract_answer(kind, output), [extract_answer(kind, one) for one in every]
    scores = score_text(output, reference, every, original) if kind == "text" else {"rougeL": max(rouge_l(output, one) for one in every)}
    return {
        "extracted": extracted,
        "gold": extract_answer(kind, reference),
        "exact_match": extracted is not None and extracted in golds,
        "flexible_match": any(_flexible(kind, output, gold) for gold in golds),
        "string_match": collapse(output) in map(collapse, every),
        **scores,
    }
