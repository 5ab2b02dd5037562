"""SVAMP: one-step word problems with varied wording (arXiv 2103.07191, MIT). 1000 rows, usually split 700/300."""

import ast
import operator
from pathlib import Path

from data.tasks import find_raw, missing, need_raw, rows_of
from metrics.answers import extract_answer

ANSWER_KIND = "number"
MAX_NEW_TOKENS = 64
TEST_SHARE = 0.3  # of SVAMP.json, which has no split of its own
FOLDERS = ("svamp", "SVAMP")
RAW = "SVAMP.json of arkilpatel/SVAMP (or train.json and test.json of the hub)"
HUB = ("ChilleD/SVAMP", {"train": "train.json", "test": "test.json"})

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def read_raw(folder: Path) -> dict[str, list[dict]]:
    if whole := find_raw(folder, "SVAMP.json"):
        return {"train": rows_of(whole)}
    train = need_raw(folder, "train.json", "SVAMP.json")
    return {"train": rows_of(train), "test": rows_of(need_raw(folder, "test.json"))}


def _value(equation: str) -> float:
    """An equation of numbers and + - * / in brackets; ValueError for anything else."""

    def of(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        raise ValueError

    try:
        return of(ast.parse(equation.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError):
        raise ValueError from None


def to_alpaca(row: dict) -> dict | str:
    """Body and question in one text; the equation as released, then the answer. Drops an equation of another value."""
    if reason := missing(row, "Body", "Question", "Equation"):
        return reason
    try:
        answer, value = float(row.get("Answer")), _value(row["Equation"])
    except (TypeError, ValueError):
        return f"equation {row['Equation']!r} or answer {row.get('Answer')!r} is not arithmetic"
    if abs(value - answer) > 1e-4:
        return f"equation {row['Equation'].strip()} is {value:g}, the answer {answer:g}"
    body, equation = row["Body"].strip(), row["Equation"].strip()
    body += "" if body[-1] in ".?!,;:" else "."  # 358 bodies end without punctuation
    return {
        "instruction": "Reason step by step and provide the final answer.",
        "input": f"{body} {row['Question'].strip()}",
        "output": f"Reasoning: {equation}\nFinal Answer: {extract_answer(ANSWER_KIND, f'{answer:.6f}')}",
    }
