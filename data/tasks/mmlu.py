"""MMLU: 57 subjects, four choices (arXiv 2009.03300, MIT). 14042 test questions, 285 solved examples (dev).

    load_mmlu("data/mmlu", shots=5)                        # as released: test/*_test.csv, dev/*_dev.csv
    load_mmlu("test_all_subjects.json", shots=0)           # [{"question", "choices", "answer", "subject"}, …]

Prompts are those of lm-evaluation-harness, and the answer is the letter of the highest likelihood (data.questions,
model.choices). For a chat model that is to say its answer: chat_prompt and said_letter. Nobody trains on it here: this is
no task that data.prepare makes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.benchmarks import Benchmark, Item
from data.records import Turns
from data.rows import iter_rows
from metrics.answers import extract_answer
from study.errors import LetheError

LETTERS = "ABCD"
OPTIONS = tuple(f" {letter}" for letter in LETTERS)
MAX_NEW_TOKENS = 10  # of a said answer


class _Row(NamedTuple):
    subject: str
    question: str
    choices: list[str]
    gold: int
    where: str  # "file:row"


def load_mmlu(path: str | Path, shots: int = 5, max_items: int | None = None) -> Benchmark:
    """The test questions as a benchmark "mmlu_{shots}shot".

    path: a folder of the released csv files (with test/ and dev/, with data/ above these, or of *_test.csv alone), or a json
    file: a list of {"question", "choices", "answer" 0 to 3 or a letter, "subject" where there are several}, or {subject: list}.
    shots: solved examples before each question, the first of its subject's dev file; of a json file, from the file beside
    it with "dev" in place of "test" in its name. max_items: as many, evenly over the subjects, the same at every call.
    Raises LetheError naming file:row for a bad row, and for missing files or examples.
    """
    path = Path(path)
    if shots < 0 or max_items is not None and max_items < 1:
        raise LetheError("--shots must be 0 or more" if shots < 0 else f"the number of MMLU items must be 1 or more, not {max_items}")
    if not path.exists():
        raise LetheError(f"{path}: no such file or folder; MMLU is a folder with test/ and dev/ of csv files, or a json file")
    rows, solved = _from_folder(path, shots) if path.is_dir() else _from_json(path, shots)
    examples = {}
    for row in rows:
        if row.subject not in examples:
            found = solved.get(row.subject, [])[:shots]
            if len(found) < shots:
                what = f"{len(found)} solved examples of {row.subject or 'no subject'}"
                raise LetheError(f"{path}: {what}, not {shots}; give --shots {len(found)}")
            examples[row.subject] = tuple(f"{_asked(one)} {LETTERS[one.gold]}\n\n" for one in found)
    items = [
        Item(row.subject, _asked(row), OPTIONS, row.gold, _header(row.subject), examples[row.subject], row.where)
        for row in _some(rows, max_items)
    ]
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.header, item.shots, item.question, item.gold]).encode())
    spec = {"mmlu": str(path.resolve()), "shots": shots, "max_items": max_items}
    return Benchmark(f"mmlu_{shots}shot", items, digest.hexdigest(), spec)


def usual_shots(path: str | Path) -> int:
    """5 where solved examples lie with the questions, else 0."""
    path = Path(path)
    beside = path.with_name(path.name.replace("test", "dev"))
    folders = (path / "dev", path / "data" / "dev", path)
    return 5 if any(any(folder.glob("*_dev.csv")) for folder in folders) or beside != path and beside.is_file() else 0


def _header(subject: str) -> str:
    about = f" about {subject.replace('_', ' ')}" if subject else ""
    return f"The following are multiple choice questions (with answers){about}.\n\n"


def _asked(row: _Row) -> str:
    options = (f"{letter}. {choice}" for letter, choice in zip(LETTERS, row.choices, strict=True))
    return "\n".join([row.question.strip(), *options, "Answer:"])


def _some(rows: list[_Row], count: int | None) -> list[_Row]:
    """count of the rows, in their order: one of each subject in turn, drawn from a fixed seed. More rows contain fewer ones."""
    if count is None or count >= len(rows):
        return rows
    draws: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        draws.setdefault(row.subject, []).append(i)
    for subject, indices in draws.items():
        random.Random(f"mmlu {subject}").shuffle(indices)
    turns = sorted(draws)
    random.Random("mmlu").shuffle(turns)
    order = [(k, turns.index(subject), i) for subject, indices in draws.items() for k, i in enumerate(indices)]
    return [rows[i] for i in sorted(i for _, _, i in sorted(order)[:count])]


# ----------------------------------------------------------------------------------------------------------------------
# Files


def _from_folder(root: Path, shots: int) -> tuple[list[_Row], dict[str, list[_Row]]]:
    """(test rows, dev rows by subject) of the released files."""
    folder = next((f for f in (root / "test", root / "data" / "test", root) if any(f.glob("*_test.csv"))), None)
    if folder is None:
        raise LetheError(
            f"{root}: no *_test.csv in it, in test/ or in data/test/; give the folder of the released MMLU files or a json file"
        )
    tests = sorted(folder.glob("*_test.csv"))
    dev = folder.parent / "dev" if folder.name == "test" else folder
    rows = [row for file in tests for row in _csv_rows(file, file.name.removesuffix("_test.csv"))]
    if not rows:
        raise LetheError(f"{folder}: its *_test.csv files are empty")
    solved = {}
    for subject in {row.subject for row in rows} if shots else ():
        file = dev / f"{subject}_dev.csv"
        if not file.is_file():
            raise LetheError(f"{file}: no such file, and --shots {shots} takes its examples from there; give --shots 0")
        solved[subject] = list(_csv_rows(file, subject))
    return rows, solved


def _csv_rows(file: Path, subject: str) -> Iterator[_Row]:
    # newline="" and no splitlines: fields hold line ends, and U+0085, which splitlines takes for one.
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            for number, fields in enumerate(reader, 1):
                if len(fields) not in (0, 6):
                    raise LetheError(f"{file}:{number}: {len(fields)} columns, not 6 (question, A, B, C, D, key)")
                if fields:  # files differ in their line ends, and so would the questions that hold some
                    question, *choices, key = (text.replace("\r\n", "\n") for text in fields)
                    yield _row(subject, question, choices, key, f"{file}:{number}")
        except UnicodeDecodeError as error:
            raise LetheError(f"{file}: not UTF-8 ({error.reason} after line {reader.line_num}); get the released file") from None
        except csv.Error as error:
            raise LetheError(f"{file}: no csv at line {reader.line_num} ({error}); is the file cut?") from None


def _from_json(file: Path, shots: int) -> tuple[list[_Row], dict[str, list[_Row]]]:
    """(test rows, dev rows by subject) of a json file and the one beside it."""
    solved: dict[str, list[_Row]] = {}
    if shots:
        beside = file.with_name(file.name.replace("test", "dev"))
        if beside == file or not beside.is_file():
            where = "" if beside == file else f" and {beside.name} does not lie beside it"
            raise LetheError(f"{file}: it has no solved examples{where}, and --shots {shots} needs some; give --shots 0")
        for row in _json_rows(beside):
            solved.setdefault(row.subject, []).append(row)
    return _json_rows(file), solved


def _json_rows(file: Path) -> list[_Row]:
    """The rows of a list, of {subject: list}, or of json lines."""
    try:
        whole = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise LetheError(f"{file}: not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError):  # json lines, or damaged: said by what reads rows
        whole = [row for _, row in iter_rows(file)]
    if isinstance(whole, dict) and "question" not in whole:
        pairs = [(row, subject) for subject, rows in whole.items() for row in (rows if isinstance(rows, list) else [rows])]
    else:
        pairs = [(row, "") for row in (whole if isinstance(whole, list) else [whole])]
    if not pairs:
        raise LetheError(f"{file}: no question in it")
    found = []
    for number, (row, subject) in enumerate(pairs, 1):
        if not isinstance(row, dict):
            raise LetheError(f"{file}:{number}: a {type(row).__name__}, not an object with question, choices, answer")
        subject = row.get("subject") or subject
        found.append(_row(subject, row.get("question"), row.get("choices"), row.get("answer"), f"{file}:{number}"))
    return found


def _row(subject: object, question: object, choices: object, key: object, where: str) -> _Row:
    """Checks what a file says. Raises LetheError."""
    if not isinstance(subject, str):
        raise LetheError(f"{where}: the subject is {subject!r}, not text")
    if not isinstance(question, str) or not question.strip():
        raise LetheError(f"{where}: no question")
    if not isinstance(choices, list) or len(choices) != 4:
        told = f"{len(choices)} choices" if isinstance(choices, list) else "no list of choices"
        raise LetheError(f"{where}: {told}, not 4")
    choices = [str(c) if isinstance(c, int | float) and not isinstance(c, bool) else c for c in choices]
    if bad := [letter for letter, c in zip(LETTERS, choices, strict=True) if not isinstance(c, str) or not c.strip()]:
        raise LetheError(f"{where}: choice {bad[0]} is empty or no text")
    if isinstance(key, str) and len(key.strip()) == 1:
        key = LETTERS.find(key.strip().upper())
    if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 4:
        raise LetheError(f"{where}: the answer is none of A, B, C, D or 0 to 3")
    return _Row(subject, question, choices, key, where)


# ----------------------------------------------------------------------------------------------------------------------
# By generation


def chat_prompt(item: Item) -> Turns:
    """An item as a conversation up to the answer, in the words of the project that asked so first; shots are turns before it."""
    turns = []
    for shot in item.shots:
        asked, _, letter = shot.rstrip().rpartition(" ")
        turns += [("user", _said(asked)), ("assistant", letter)]
    return (*turns, ("user", _said(item.question)))


def _said(asked: str) -> str:
    body, start = asked.removesuffix("\nAnswer:"), len(asked)
    for letter in reversed(LETTERS):  # from the last to the first: the question may have lines like those of the options
        start = body.rfind(f"\n{letter}. ", 0, start)
    question, options = body[:start], body[start + 1 :]
    opening = "Please answer the following multiple choice question:"
    return f"{opening}\n\nQuestion: {question}\n\nOptions:\n{options}\n\nPlease only answer with the option letter (A, B, C, or D)."


def said_letter(output: str) -> int | None:
    """Which option an output says is the answer, 0 to 3; None where it says none of them (see metrics.answers)."""
    letter = extract_answer("letter", output)
    return LETTERS.index(letter) if letter is not None and letter in LETTERS else None
