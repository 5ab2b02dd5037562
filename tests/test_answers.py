"""Answer extraction: golden vectors, traps, and the scores built on them."""

import random

import pytest

from metrics import extract_answer, rouge_l
from metrics.answers import score_answer
from metrics.text import normalise

NUMBERS = [
    ("#### 70,000", "70000"),
    ("#### -3.50", "-3.5"),
    ("Answer: $1,234.", "1234"),
    ("no number here", None),
    ("It takes 5 days.\n#### 14.0", "14"),
    ("##### 5", None),
    ("### 5", None),
    ("#### 3\nso #### 4", "4"),
    ("#### 3\nThe answer is 9", "3"),
    ("#### none\nThe answer is 9", "9"),
    ("The final answer is 9 apples.", "9"),
    ("Final Answer: 7", "7"),
    ("**Answer:** 12", "12"),
    ("the answer is **1,234.50**", "1234.5"),
    ("42", "42"),
    ("answer is $\\boxed{42}$.", "42"),
    ("The answer is \\(\\boxed{-7}\\)", "-7"),
    ("Answer: \\$5", "5"),
    (" $1,234. ", "1234"),
    ("50%", "50"),
    ("I have 3 apples", None),
    ("The answer isn't 5", None),
    ("The answer is not 5", None),
    ("#### -$5", "-5"),
    ("#### $-5", "-5"),
    ("#### \u22125", "-5"),
    ("#### .5", "0.5"),
    ("#### 007", "7"),
    ("#### -0", "0"),
    ("#### 1/2", None),
    ("#### 1e5", None),
    ("#### 12/4", None),
    ("#### 1,00,000", "100000"),
    ("#### 12345678901234567890123456789012345", "12345678901234567890123456789012345"),
    ("Answer:\n42", "42"),
    ("", None),
    ("####", None),
    ("answer: x", None),
    ("#### 5 / day", "5"),
]
LETTERS = [
    ("Answer: B", "B"),
    ("Correct answer is B.", "B"),
    ("Because x", None),
    ("D. Panama", "D"),
    ("The answer is D", "D"),
    ("The answer is D.", "D"),
    ("(C)", "C"),
    ("B", "B"),
    ("B)", "B"),
    ("  **C**", "C"),
    ("**C.** grass", "C"),
    ("ANSWER:E", "E"),
    ("The correct option is (b).", "B"),
    ("answer is **A**", "A"),
    ("Answer: $\\boxed{\\text{D}}$", "D"),
    ("the answer is option C", "C"),
    ("The answer is a dog", None),
    ("The answer is A dog", None),
    ("A dog runs", None),
    ("Big", None),
    ("F", None),
    ("The answer is F", None),
    ("The answer is A. No: the answer is E.", "E"),
    ("The answer is A.\nThe answer is unclear.", "A"),
    ("answer: b", "B"),
    ("answer: beta", None),
    ("Option A is wrong, so is B", None),
    ("", None),
    ("**Answer**: C", "C"),
    ("The correct answer is B.\n", "B"),
    ("E.g. this", None),
]
SHORTS = [
    ("Michio Sugeno", "michio sugeno"),
    ("The answer is the U.S.A.", "usa"),
    ("Answer: grass\nmore", "grass"),
    ("\n\n Paris. \nFrance", "paris"),
    ("Answer:\nParis", "paris"),
    ("", None),
    ("...", None),
    ("The The", "the the"),
    ("3.5 km", "3.5 km"),
    ("1,000", "1000"),
    ("\u201cBj\u00f6rk\u201d", "bj\u00f6rk"),
    ("\u5317\u4eac", "\u5317\u4eac"),
    ("**Answer:** 12 May", "12 may"),
    ("Sand is soft.\nAnswer: grass", "grass"),
]


@pytest.mark.parametrize(("text", "want"), NUMBERS)
def test_number(text, want):
    assert extract_answer("number", text) == want


@pytest.mark.parametrize(("text", "want"), LETTERS)
def test_letter(text, want):
    assert extract_answer("letter", text) == want


@pytest.mark.parametrize(("text", "want"), SHORTS)
def test_short(text, want):
    assert extract_answer("short", text) == want


def test_text_and_unknown_kind():
    assert extract_answer("text", "  a\n\n b ") == "a b"
    assert extract_answer("text", " \n ") is None
    with pytest.raises(ValueError, match="one of number, letter"):
        extract_answer("numbr", "1")


def test_scores():
    row = score_answer("number", "So it is 7", "Reasoning: ( 3 + 4 )\nFinal Answer: 7")
    assert (row["extracted"], row["gold"], row["exact_match"], row["flexible_match"]) == (None, "7", False, True)
    row = score_answer("letter", "I would say C", "The correct answer is C.")
    assert not row["exact_match"] and row["flexible_match"] and not row["string_match"]
    row = score_answer("short", "He was born in Paris, France.", "Paris")
    assert not row["exact_match"] and row["flexible_match"]
    assert not score_answer("short", "Comparison", "Paris")["flexible_match"]
    row = score_answer("short", "the  Eiffel Tower", "the Eiffel\nTower")
    assert row["string_match"] and row["rougeL"] == 1.0


def test_none_never_matches():
    row = score_answer("number", "dunno", "dunno")
    assert not row["exact_match"] and not row["flexible_match"] and row["string_match"]


def test_rouge_equals_the_package():
    from rouge_score import rouge_scorer

    theirs, draw = rouge_scorer.RougeScorer(["rougeL"]), random.Random(0)
    for size in (1, 5, 30, 90):
        for _ in range(20):
            one, other = (" ".join(draw.choices("ab c d3 e, 17 The".split(), k=draw.randint(0, size))) for _ in range(2))
            assert rouge_l(one, other) == pytest.approx(theirs.score(other, one)["rougeL"].fmeasure, abs=1e-12)


def test_rouge_golden():
    score = rouge_l("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog")
    assert score == pytest.approx(0.588235, abs=1e-6)
    assert rouge_l("", "x") == 0.0 and rouge_l("x", "") == 0.0


def test_normalise_keeps_words_apart():
    assert normalise("The cat,  a dog\u2019s bone!") == "cat dogs bone"


def test_long_output_is_linear():
    for kind in ("number", "letter", "short", "text"):
        extract_answer(kind, "answer is " + "( * $ " * 20_000)
        extract_answer(kind, "#### " + "1,23," * 20_000)
        extract_answer(kind, "answer " * 20_000 + " " * 20_000)
