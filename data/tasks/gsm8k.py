"""GSM8K: grade-school word problems with worked solutions (arXiv 2110.14168, MIT). 7473 train, 1319 test."""

from pathlib import Path

from data.tasks import missing, need_raw, rows_of
from metrics.answers import extract_answer

ANSWER_KIND = "number"
MAX_NEW_TOKENS = 320
FOLDERS = ("gsm8k",)
RAW = "train.jsonl and test.jsonl of openai/grade-school-math (or the hub's main/*.parquet)"
HUB = ("openai/gsm8k", {"train": "main/train-00000-of-00001.parquet", "test": "main/test-00000-of-00001.parquet"})


def read_raw(folder: Path) -> dict[str, list[dict]]:
    return {split: rows_of(need_raw(folder, f"{split}.jsonl", HUB[1][split])) for split in ("train", "test")}


def to_alpaca(row: dict) -> dict | str:
    """The solution as released: steps with <<a=b>> marks, last line "#### n"."""
    if reason := missing(row, "question", "answer"):
        return reason
    if extract_answer(ANSWER_KIND, row["answer"]) is None or "####" not in row["answer"]:
        return "the solution has no '#### number'"
    return {
        "instruction": "Solve step by step and give the final answer (format like #### 42).",
        "input": row["question"].strip(),
        "output": row["answer"].strip(),
    }
