"""AQuA-RAT: algebra with five choices and rationales (arXiv 1705.04146, Apache-2.0). 97467 train, 254 dev, 254 test.

The 47 MB train.json is often missing where dev and test are; the 2728 train rows that FLAN carries stand in for it.
"""

import re
from pathlib import Path

from data.tasks import find_raw, missing, need_raw, rows_of
from metrics.answers import extract_answer
from metrics.text import collapse
from study.errors import LetheError

ANSWER_KIND = "letter"
MAX_NEW_TOKENS = 320
FOLDERS = ("aqua", "AQuA", "aqua_rat", "aqua_cot")
RAW = "test.json and train.json (or flan_cot_aqua_train.tsv) of google-deepmind/AQuA (or the hub's raw/*.parquet)"
HUB = ("deepmind/aqua_rat", {s: f"raw/{s}-00000-of-00001.parquet" for s in ("train", "test", "validation")})

_PREFIX = re.compile(r"^(?:\(?[A-E]\)\s*)+")  # "A)59", "(A) 59", and the doubled "A)A)59"
# What the rationale itself calls the answer; narrower than the scorer, which also reads "choice: (A)".
_STATED = re.compile(r"(?i:\banswer\s*(?:is|:|=))\s*\(?([A-E])(?![\w'\u2019-])(?![ \t]+[a-z])")
_CLOSING = re.compile(r"(?i:\b(?:answer|ans|option|choice)\b)[\s.:=\u2013\u2014-]*(?i:is\s*)?\(?([A-E])\)?[.!\s]*$")


def read_raw(folder: Path) -> dict[str, list[dict]]:
    rows = {"test": rows_of(need_raw(folder, "test.json", HUB[1]["test"]))}
    if dev := find_raw(folder, "dev.json", HUB[1]["validation"]):
        rows["dev"] = rows_of(dev)
    train = need_raw(folder, "train.json", "flan_cot_aqua_train.tsv", HUB[1]["train"])
    rows["train"] = _flan(train) if train.suffix == ".tsv" else rows_of(train)
    return rows


def _flan(path: Path) -> list[dict]:
    """FLAN's three columns (question with options, "(C)", rationale). Only backslash-n is an escape there."""
    rows = []
    try:
        lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise LetheError(f"{path}: not UTF-8 at byte {error.start}") from None
    for number, line in enumerate(lines, 1):
        row: dict = {"where": f"{path}:{number}"}
        columns = [column.replace("\\n", "\n") for column in line.rstrip("\r").split("\t")]
        if len(columns) == 3:
            stem, _, options = columns[0].rpartition("\nOptions:\n")  # the last: a stem may hold options too
            row |= {
                "question": stem,
                "options": options.split("\n"),
                "correct": columns[1].strip("() "),
                "rationale": columns[2],
            }
        rows.append(row)
    return rows


def to_alpaca(row: dict) -> dict | str:
    """Question, options as a Python list; the rationale, then "The correct answer is X." unless it says so itself."""
    if reason := missing(row, "question", "rationale", "correct"):
        return reason
    options, key, rationale = row.get("options"), row["correct"].strip(), row["rationale"].strip()
    if not isinstance(options, list) or len(options) != 5 or not all(isinstance(option, str) for option in options):
        return "not five options"
    texts = [collapse(_PREFIX.sub("", option.strip())) for option in options]
    if not all(texts):
        return f"option {'ABCDE'[texts.index('')]} is empty"
    if key not in tuple("ABCDE"):
        return f"key {key!r} is not one of A to E"
    index = "ABCDE".index(key)
    if [text.lower() for text in texts].count(texts[index].lower()) > 1:
        return "another option has the same text as the key's"
    stated = {*_STATED.findall(rationale)[-1:], *_CLOSING.findall(rationale)}
    if stated - {key}:
        return "the rationale states another answer than the key"
    if extract_answer(ANSWER_KIND, rationale) != key:
        rationale += f"\nThe correct answer is {key}."
    listed = [f"{letter}){text}" for letter, text in zip("ABCDE", texts, strict=True)]
    return {
        "instruction": "Solve step by step and provide the correct answer.",
        "input": f"{row['question'].strip()}\n{listed}",
        "output": rationale,
    }


def question(row: dict) -> str:
    """The question without its options: the same stem with other options still gives a test item away."""
    return row["input"].rpartition("\n")[0]
