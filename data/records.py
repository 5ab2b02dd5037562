"""Records: what is asked, and the answer to train on, from the row formats people have.

One row may be (told per row, in this order):
    messages / conversations   [{"role", "content"}] or [{"from", "value"}], with "system"
    context_text + qa_pairs    [{"question", "output"}]: one record per pair
    instruction                alpaca: input, output, system, history [[question, answer], ...]
    prompt                     answer or completion; texts, or lists of messages
    question                   answer
    input                      output
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.rows import iter_rows
from study.errors import LetheError

Turns = tuple[tuple[str, str], ...]

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
_SHOWN = 20  # dropped rows that a report keeps


@dataclass(frozen=True)
class Record:
    """prompt: (role, content) turns up to the answer, roles system, user, assistant; source: "file:line"."""

    prompt: Turns
    answer: str
    source: str = ""
    group: str = ""  # "held_out": a test item of a template that training never saw
    references: tuple[str, ...] = ()  # all acceptable answers, the first equal to answer; empty: only answer
    original: str = ""  # the text that the answer rewrites


@dataclass
class Report:
    """What became of a file's rows. rows: read; kept: records made (a row may give several); dropped: the first 20."""

    path: str = ""
    rows: int = 0
    kept: int = 0
    dropped_count: int = 0
    dropped: list[tuple[str, str]] = field(default_factory=list)

    def drop(self, where: str, reason: str) -> None:
        self.dropped_count += 1
        if len(self.dropped) < _SHOWN:
            self.dropped.append((where, reason))

    def __str__(self) -> str:
        lines = [f"{self.path or 'records'}: {self.rows} rows, {self.kept} records, {self.dropped_count} dropped"]
        lines += [f"  {where}: {reason}" for where, reason in self.dropped]
        if self.dropped_count > len(self.dropped):
            lines.append(f"  and {self.dropped_count - len(self.dropped)} more")
        return "\n".join(lines)


class _Bad(ValueError):
    """Why a row (or one of its pairs) gives no record."""


def _text(value: object, name: str, required: bool = True) -> str:
    if isinstance(value, list) and value and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text", "")) for part in value)  # messages whose content comes in parts
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is None or value == "":
        if required:
            raise _Bad(f"no {name}")
        return ""
    if not isinstance(value, str):
        raise _Bad(f"{name} is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Bad(f"{name} holds half of a surrogate pair") from None
    if required and not value.strip():
        raise _Bad(f"empty {name}")
    return value.strip()


def _conversation(turns: object, name: str, system: object = None) -> list[tuple[Turns, str]]:
    """One (prompt, answer) per assistant turn; a last user turn without an answer is left out."""
    if not isinstance(turns, list) or not turns:
        raise _Bad(f"{name} is {'empty' if turns == [] else type(turns).__name__}, not a list of turns")
    done: list[tuple[str, str]] = []
    pairs = []
    if (text := _text(system, "system", required=False)) and not _is_system(turns[0]):
        done.append(("system", text))
    for number, turn in enumerate(turns, 1):
        if isinstance(turn, list) and len(turn) == 2:
            turn = {"role": turn[0], "content": turn[1]}  # as_row's
        if not isinstance(turn, dict):
            raise _Bad(f"turn {number} is {type(turn).__name__}, not an object")
        tag = turn.get("role", turn.get("from"))
        role = _ROLES.get(tag) if isinstance(tag, str) else None
        if role is None:
            raise _Bad(f"turn {number} has the unknown role {tag!r}")
        content = _text(turn.get("content", turn.get("value")), "answer" if role == "assistant" else f"text in turn {number}")
        before = done[-1][0] if done else None
        allowed = {"user": (None, "system", "assistant"), "assistant": ("user",), "system": (None,)}
        if before not in allowed[role]:
            raise _Bad(f"turn {number} is {role} after {before or 'nothing'}")
        if role == "assistant":
            pairs.append((tuple(done), content))
        done.append((role, content))
    if not pairs:
        raise _Bad("no answer: no assistant turn")
    return pairs


def _is_system(turn: object) -> bool:
    return isinstance(turn, list) and turn[:1] == ["system"] or isinstance(turn, dict) and turn.get("role", turn.get("from")) == "system"


def _alpaca(row: dict) -> list[tuple[Turns, str]]:
    user = "\n".join(filter(None, (_text(row.get(k), k, required=False) for k in ("instruction", "input"))))
    if not user:
        raise _Bad("empty instruction and input")
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise _Bad("history is not a list of [question, answer]")
    turns = [{"role": role, "content": text} for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    turns += [{"role": "user", "content": user}, {"role": "assistant", "content": _text(row.get("output"), "output")}]
    return _conversation(turns, "history", row.get("system"))


def _as_turns(value: object, role: str) -> list:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _context_pairs(row: dict) -> list[tuple[Turns, str] | _Bad]:
    context = _text(row["context_text"], "context_text", required=False)
    pairs = row.get("qa_pairs")
    if not isinstance(pairs, list) or not pairs:
        raise _Bad("qa_pairs is not a list of pairs" if pairs else "no qa_pairs")
    found: list[tuple[Turns, str] | _Bad] = []
    for number, pair in enumerate(pairs, 1):
        try:
            if not isinstance(pair, dict):
                raise _Bad("not an object")
            question, answer = (
                _text(pair.get("question"), "question"),
                _text(pair.get("output", pair.get("answer")), "output"),
            )
            found.append(((("user", f"{context}\n\n{question}" if context else question),), answer))
        except _Bad as reason:
            found.append(_Bad(f"pair {number}: {reason}"))
    return found


def _examples(row: object) -> list[tuple[Turns, str] | _Bad]:
    """The (prompt, answer) pairs of a row in whichever format it has; raises _Bad."""
    if not isinstance(row, dict):
        raise _Bad(f"a {type(row).__name__}, not an object")
    has = {key for key, value in row.items() if value is not None}
    for name in ("messages", "conversations"):
        if name in has:
            return _conversation(row[name], name, row.get("system"))
    if "context_text" in has and "qa_pairs" in row:
        return _context_pairs(row)
    if "instruction" in has:
        return _alpaca(row)
    for question in ("prompt", "question"):
        if question in has:
            answer = next((key for key in ("answer", "completion") if key in has), None)
            if answer is None:
                raise _Bad("no answer")
            if not isinstance(row[question], list):
                _text(row[question], question)
            return _conversation(_as_turns(row[question], "user") + _as_turns(row[answer], "assistant"), question)[-1:]
    if "input" in has:
        return _alpaca(row)
    raise _Bad(f"no known format: its keys are {', '.join(map(str, row)) or 'none'}")


def to_records(row: object, where: str, report: Report, strict: bool = False) -> Iterator[Record]:
    """The records of one row; what is wrong with it goes into the report (strict: LetheError)."""
    report.rows += 1
    try:
        examples = _examples(row)
    except _Bad as reason:
        examples = [reason]
    group = "held_out" if isinstance(row, dict) and row.get("held_out") is True else ""
    for example in examples:
        if isinstance(example, _Bad):
            if strict:
                raise LetheError(f"{where}: {example}")
            report.drop(where, str(example))
        else:
            report.kept += 1
            yield Record(*example, source=where, group=group)


def as_row(record: Record) -> dict:
    """A record as a row that reading takes back."""
    return {"prompt": [list(turn) for turn in record.prompt], "answer": record.answer}


def iter_records(path: str | Path, strict: bool = False, report: Report | None = None, salvage: bool = False) -> Iterator[Record]:
    """The records of a file (json array, json lines, parquet), streaming.

    Bad rows are counted in the report and dropped; strict makes the first one a LetheError. A file that is empty,
    damaged or gives no record at all is a LetheError in any case; salvage takes the whole rows before the byte at which a file
    is cut off or damaged, and the report says what was lost (which strict forbids).
    """
    report = Report() if report is None else report
    report.path = str(path)
    kept_before = report.kept

    def on_bad(where: str, reason: str) -> None:
        report.rows += 1
        if strict:
            raise LetheError(f"{where}: {reason}")
        report.drop(where, reason)

    for where, row in iter_rows(path, on_bad, salvage):
        yield from to_records(row, where, report, strict)
    if report.kept == kept_before:
        first = f"; the first: {report.dropped[0][0]}: {report.dropped[0][1]}" if report.dropped else ""
        raise LetheError(f"{path}: no row to train on among {report.rows}{first}")


def load_records(path: str | Path, strict: bool = False, report: Report | None = None, salvage: bool = False) -> list[Record]:
    """All records of a file; see iter_records."""
    return list(iter_records(path, strict, report, salvage))
