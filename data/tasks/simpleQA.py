"""SimpleQA: short questions about facts (arXiv 2411.04368, MIT). 4326 rows and no split of its own.

Scored offline by the normalised short answer; the official score asks a language model and is not comparable.
"""

import csv
from pathlib import Path

from data.tasks import missing, need_raw
from metrics.answers import extract_answer
from metrics.text import collapse
from study.errors import LetheError

ANSWER_KIND = "short"
MAX_NEW_TOKENS = 32
TEST_SHARE = 0.1
FOLDERS = ("simpleqa", "simpleQA", "SimpleQA")
RAW = "simple_qa_test_set.csv of openai/simple-evals"
HUB = ("basicv8vc/SimpleQA", {"train": "simple_qa_test_set.csv"})


def read_raw(folder: Path) -> dict[str, list[dict]]:
    """The csv by a csv reader (answers hold line ends). Its metadata column, Python literals, is not needed."""
    path = need_raw(folder, "simple_qa_test_set.csv")
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            line = 2
            for row in reader:
                rows.append({"problem": row.get("problem"), "answer": row.get("answer"), "where": f"{path}:{line}"})
                line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise LetheError(f"{path}: damaged csv after {len(rows)} rows ({error}); get the whole file") from None
    if not rows:
        raise LetheError(f"{path}: no rows")
    return {"train": rows}


def to_alpaca(row: dict) -> dict | str:
    """The question is the instruction; the answer on one line, since a short answer is read from one line."""
    if reason := missing(row, "problem", "answer"):
        return reason
    answer = collapse(row["answer"])
    if extract_answer(ANSWER_KIND, answer) is None:
        return f"answer {answer!r} has no word"
    return {"instruction": row["problem"].strip(), "input": "", "output": answer}
