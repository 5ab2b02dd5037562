"""AQuA-RAT answered by the letter alone, as in seed 001: aqua_cot's raw files and rows, without the rationales.

Beside aqua_cot it tells what the worked solution teaches: questions, keys, splits and what is dropped are the same.
"""

import ast

from data.tasks import aqua_cot

ANSWER_KIND = "letter"
MAX_NEW_TOKENS = 16
FOLDERS, RAW, HUB, read_raw = aqua_cot.FOLDERS, aqua_cot.RAW, aqua_cot.HUB, aqua_cot.read_raw


def to_alpaca(row: dict) -> dict | str:
    """Question and options as the seed wrote them; the output is the key, a letter from A to E."""
    made = aqua_cot.to_alpaca(row)
    if isinstance(made, str):
        return made
    stem, _, listed = made["input"].rpartition("\n")
    options = [f"{text[0]}. {text[2:]}" for text in ast.literal_eval(listed)]  # of "A)59"
    return {
        "instruction": "Solve this multiple choice math problem and answer with the letter alone.",
        "input": "\n".join([f"Problem: {stem}", "Options:", *options]),
        "output": row["correct"].strip(),
    }


def question(row: dict) -> str:
    """The question without its options, as for aqua_cot."""
    return row["input"].rpartition("\nOptions:\n")[0]
