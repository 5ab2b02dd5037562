"""OpenBookQA: elementary science, four choices (arXiv 1809.02789, Apache-2.0). 4957 train, 500 test."""

from pathlib import Path

from data.tasks import find_raw, missing, need_raw, rows_of
from metrics.text import collapse

ANSWER_KIND = "letter"
MAX_NEW_TOKENS = 32
FOLDERS = ("openbookqa", "OpenBookQA-V1-Sep2018/Data/Main", "Data/Main")
RAW = "train.jsonl and test.jsonl of the release (or the hub's main/*.parquet)"
HUB = ("allenai/openbookqa", {s: f"main/{s}-00000-of-00001.parquet" for s in ("train", "test", "validation")})


def read_raw(folder: Path) -> dict[str, list[dict]]:
    rows = {split: rows_of(need_raw(folder, f"{split}.jsonl", HUB[1][split])) for split in ("train", "test")}
    dev = find_raw(folder, "dev.jsonl", HUB[1]["validation"])
    return rows | ({"dev": rows_of(dev)} if dev else {})


def _parts(row: dict) -> tuple[str, list[tuple[str, str]]]:
    """(stem, [(letter, text), ...]) of the release's form or the hub's; raises KeyError, TypeError, ValueError."""
    if "question_stem" in row:
        return row["question_stem"], list(zip(row["choices"]["label"], row["choices"]["text"], strict=True))
    question = row["question"]
    return question["stem"], [(choice["label"], choice["text"]) for choice in question["choices"]]


def to_alpaca(row: dict) -> dict | str:
    if reason := missing(row, "answerKey"):
        return reason
    try:
        stem, choices = _parts(row)
        stem, texts = stem.strip(), {label: collapse(text) for label, text in choices}
    except (KeyError, TypeError, ValueError, AttributeError):
        return "no question with choices"
    key = row["answerKey"].strip()
    if len(stem) < 2:
        return f"the question is only {stem!r}"
    if list(texts) != ["A", "B", "C", "D"] or not all(texts.values()):
        return f"choices are labelled {', '.join(texts)}, not A, B, C, D" if len(texts) != 4 else "a choice is empty"
    if key not in texts:
        return f"key {key!r} is not among the choices"
    if [text.lower() for text in texts.values()].count(texts[key].lower()) > 1:
        return "another choice has the same text as the key's"
    return {
        "instruction": "Answer this open-book question by reasoning step by step, then provide the correct answer.",
        "input": "\n".join([stem, *(f"{label}. {text}" for label, text in texts.items())]),
        "output": f"The correct answer is {key}.",
    }


def question(row: dict) -> str:
    """The stem with the right choice: 15 train rows are test questions with their choices in another order."""
    stem, *choices = row["input"].rsplit("\n", 4)
    return stem + "\n" + next(choice for choice in choices if choice[0] == row["output"][-2])[3:]
