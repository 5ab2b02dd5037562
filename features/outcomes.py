"""Features of data sets beside what training on them did: reads both tables and joins them.

Features are the CSV of `python -m features`. Outcomes are a batch's result JSON, a CSV of your own, or columns of the features' own
CSV (the layout of the seed's table). Several outcomes of one data set, say of several seeds, are averaged.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from metrics.statistics import seed_interval
from study.errors import LetheError
from study.folder import read_json

NAME = "dataset_name"
BOOKKEEPING = (NAME, "status", "reason", "content_hash", "settings_hash")  # of the features' CSV, never features
_OUTCOMES = {"change", "difference", "answer_nll"}  # columns that can only be known afterwards: these, and those with such a word:
_OUTCOME_WORDS = {"accuracy", "acc", "correct", "outcome", "target", "label", "mmlu", "score"}
_ENDING = re.compile(r"\.(jsonl?|parquet)$", re.IGNORECASE)
_PARTS = "chunk|part|split|shard|subset|sample|fold|seed|train|test|val|dev"
_PART = re.compile(rf"[_\-. ](v?\d|({_PARTS})(?=[_\-. \d]|$))")
_NO_NAME = re.compile(rf"({_PARTS}|data|dataset|)")


@dataclass(frozen=True)
class Table:
    """A CSV: numbers {column: (rows,) float64, NaN where empty}, words {column: texts}; lines: where each row begins."""

    path: Path
    numbers: dict[str, np.ndarray]
    words: dict[str, list[str]]
    lines: list[int]
    notes: list[str]

    def __len__(self) -> int:
        return len(self.lines)

    def take(self, rows: list[int]) -> Table:
        numbers = {name: values[rows] for name, values in self.numbers.items()}
        words = {name: [values[k] for k in rows] for name, values in self.words.items()}
        return Table(self.path, numbers, words, [self.lines[k] for k in rows], self.notes)


@dataclass(frozen=True)
class Outcome:
    """What training on one data set did, in the target's own unit; low, high: its 95 % interval, NaN where unknown."""

    name: str
    value: float
    low: float = math.nan
    high: float = math.nan
    content: str = ""  # sha256 of the file's bytes, where it was recorded
    also: tuple[str, ...] = ()  # other names of the data set: of its file, with and without folder


@dataclass(frozen=True)
class Joined:
    """Data sets with features and an outcome. table: their features; truth, low, high: (rows,) in the target's own unit.

    shown = value * scale, in `unit`; notes say what was left out and why.
    """

    table: Table
    target: str
    truth: np.ndarray
    low: np.ndarray
    high: np.ndarray
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return self.table.words[NAME]

    @property
    def targets(self) -> list[str]:
        """Columns that are the target, or by their name another outcome: never features."""
        own = {self.target, f"{self.target}_low", f"{self.target}_high", *_OUTCOMES}
        return [name for name in self.table.numbers if name in own or _OUTCOME_WORDS & set(re.split(r"[^a-z]+", name.lower()))]

    @property
    def in_nats(self) -> bool:
        return bool(re.search(r"nll|loss|perplexity|kl", self.target))

    @property
    def scale(self) -> float:
        return 1.0 if self.in_nats or np.abs(self.truth).max() > 1.5 else 100.0  # above 1.5: these are points already

    @property
    def unit(self) -> str:
        return "" if self.in_nats or np.abs(self.truth).max() > 100 else "points"


def family(name: str) -> str:
    """The data set that a file was cut from, by its name: "dolly_chunk_001_500" and "dolly/train.json" -> "dolly"."""
    for part in reversed(re.split(r"[/\\]", name)):
        stem = _simple(part)
        cut = _PART.search(stem)
        found = stem[: cut.start()] if cut else re.sub(r"(?<=\D\D)\d+$", "", stem)  # "part12", and not "gsm8k"
        if not _NO_NAME.fullmatch(found):
            return found
    return _simple(name)


def counted(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def read_table(path: str | Path) -> Table:
    """The CSV of features; rows whose status is not ok are left out and told. LetheError names the line of what is wrong."""
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            rows = [(reader.line_num, row) for row in reader if row]
    except FileNotFoundError:
        raise LetheError(f"no file {path}; python -m features makes the CSV of features") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LetheError(f"{path}: cannot be read as CSV: {error}") from None
    twice = [name for name, times in Counter(header).items() if times > 1]
    if twice or NAME not in header:
        raise LetheError(f"{path}: " + (f"two columns are called {twice[0]}" if twice else f"no column {NAME} in its first line"))
    for line, row in rows:
        if len(row) != len(header):
            raise LetheError(f"{path}:{line}: {len(row)} cells where the first line has {len(header)}; is the file cut off?")
    status = header.index("status") if "status" in header else None
    good = [(line, row) for line, row in rows if status is None or row[status] in ("ok", "")]
    notes = [f"{counted(len(rows) - len(good), 'row')} of {path.name} without features (status is not ok)"] if len(good) < len(rows) else []
    if not good:
        raise LetheError(f"{path}: no row with features")
    numbers, words = {}, {}
    for k, name in enumerate(header):
        cells = [row[k].strip() for _, row in good]
        values = None if name in BOOKKEEPING else _numbers(cells)
        if values is None:
            words[name] = cells
        else:
            numbers[name] = values
    if len(made := {word for word in words.get("settings_hash", []) if word}) > 1:
        notes.append(f"the features of {path.name} were made with {len(made)} different settings")
    odd = [f"{name} ({next(c for c in cells if _number(c) is None)!r})" for name, cells in words.items() if name not in BOOKKEEPING]
    return Table(path, numbers, words, [line for line, _ in good], notes + ([f"columns without numbers: {', '.join(odd)}"] if odd else []))


def _number(cell: str) -> float | None:
    """Empty and not finite cells are NaN; None for a word."""
    try:
        value = float(cell or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else math.nan


def _numbers(cells: list[str]) -> np.ndarray | None:
    values = [_number(cell) for cell in cells]
    return None if None in values else np.array(values, dtype=np.float64)


def read_outcomes(path: str | Path, target: str) -> tuple[list[Outcome], list[str]]:
    """(outcomes, notes) of a batch's result JSON or of a CSV with dataset_name, the target and, if known, {target}_low, _high."""
    path = Path(path)
    if path.suffix.lower() == ".csv":
        return table_outcomes(read_table(path), target)
    rows = read_json(path)
    rows = rows.get("results") if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LetheError(f'{path}: no list "results" of data sets in it; give the result JSON of train.py --datasets_folder')
    good = [row for row in rows if row.get("status", "ok") in ("ok", "done")]
    failed = len(rows) - len(good)
    found, without = [], []
    for row in good:
        file, folder = str(row.get("file_name") or ""), row.get("folder_name")
        name = str(row.get("dataset") or file or row.get(NAME))
        also = tuple(f"{folder}/{part}" for part in (file, _ENDING.sub("", file)) if part and folder) + ((file,) if file else ())
        triple = _triple(row, target)
        if triple is None:
            without.append(name)
        else:
            found.append(Outcome(name, *triple, content=str(row.get("content_hash") or ""), also=also))
    if not found:
        known = sorted({key for row in good for key in _targets(row)})
        raise LetheError(f"{path}: no {target} in it" + (f"; there is {', '.join(known)}" if known else "; every run of it failed"))
    notes = [f"{counted(failed, 'run')} of {path.name} that failed"] if failed else []
    return found, notes + ([f"{counted(len(without), 'run')} of {path.name} without {target}, such as {without[0]}"] if without else [])


def _triple(row: dict, target: str) -> tuple[float, float, float] | None:
    """(value, low, high) of a result row's target.

    change stands in the row; scores under its fine-tuned model; {score}_change is that score less the base model's.
    """
    before, after = ((row.get("results") or {}).get(f"{side}_model") or {} for side in ("base", "finetuned"))
    short = target.removeprefix("overall_")
    if isinstance(row.get(target), dict):
        found = row[target].get("difference"), row[target].get("low"), row[target].get("high")
    elif target.endswith("_change"):
        sides = [side.get(target.removesuffix("_change")) for side in (after, before)]
        found = (sides[0] - sides[1] if all(isinstance(side, (int, float)) for side in sides) else None, None, None)
    else:
        found = after.get(target, row.get(target)), after.get(f"{short}_low"), after.get(f"{short}_high")
    if isinstance(found[0], bool) or not isinstance(found[0], (int, float)) or not math.isfinite(found[0]):
        return None
    return tuple(math.nan if value is None else float(value) for value in found)


def _targets(row: dict) -> set[str]:
    scores = (row.get("results") or {}).get("finetuned_model") or {}
    names = {"change", *scores, *(f"{key}_change" for key in scores)}
    return {name for name in names if _triple(row, name) and not name.endswith(("_low", "_high"))}


def table_outcomes(table: Table, target: str) -> tuple[list[Outcome], list[str]]:
    """The target's column of a CSV as outcomes; rows where it is empty are left out and told."""
    if target not in table.numbers:
        near = difflib.get_close_matches(target, table.numbers, 1, 0.4)
        mend = f"did you mean --target {near[0]}?" if near else "give the results by --outcomes, or another --target"
        raise LetheError(f"{table.path}: no column of numbers called {target}; {mend}")
    nothing = np.full(len(table), math.nan)
    low, high = (table.numbers.get(f"{target}_{side}", nothing) for side in ("low", "high"))
    content = table.words.get("content_hash", [""] * len(table))
    every = zip(table.words[NAME], table.numbers[target].tolist(), low.tolist(), high.tolist(), content, strict=True)
    found = [Outcome(*row) for row in every if not math.isnan(row[1])]
    empty = len(table) - len(found)
    return found, table.notes + ([f"{counted(empty, 'row')} of {table.path.name} without {target}"] if empty else [])


def load(features: str | Path, outcomes: list[str] | None, target: str) -> Joined:
    """Reads and joins both; without outcomes the target is a column of the features' CSV. LetheError where nothing joins."""
    table = read_table(features)
    if not outcomes:
        _, notes = table_outcomes(table, target)
        kept = table.take(np.flatnonzero(~np.isnan(table.numbers[target])).tolist())
        sides = [kept.numbers.get(f"{target}_{side}", np.full(len(kept), math.nan)) for side in ("low", "high")]
        return Joined(kept, target, kept.numbers[target], *sides, notes)
    found, notes = [], list(table.notes)
    for path in outcomes:
        more, said = read_outcomes(path, target)
        found, notes = found + more, notes + said
    return join(table, found, target, notes)


def join(table: Table, outcomes: list[Outcome], target: str, notes: list[str]) -> Joined:
    """Pairs rows with outcomes by the content's hash, where both have one, else by name (with or without folder and ending)."""
    names, contents = table.words[NAME], table.words.get("content_hash", [""] * len(table))
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        first, second = [line for line, name in zip(table.lines, names, strict=True) if name == repeated[0]][:2]
        raise LetheError(f"{table.path}:{second}: {repeated[0]} stands already in line {first}; which one do the outcomes mean?")
    places: dict[str, list[int]] = {}
    for k, name in enumerate(names):
        for key in {f"content {contents[k]}" if contents[k] else "", f"name {name}", f"simple {_simple(name)}"} - {""}:
            places.setdefault(key, []).append(k)
    pairs: dict[int, list[Outcome]] = {}
    alone, changed = [], []
    for outcome in outcomes:
        called = (*outcome.also[:2], outcome.name, *outcome.also[2:])  # with its folder first
        keys = [f"content {outcome.content}", *(f"name {name}" for name in called), *(f"simple {_simple(name)}" for name in called)]
        hit = next((places[key] for key in keys if key in places), [])
        hit = [k for k in hit if names[k] in called] or hit  # of several copies of one content, its namesake
        if len(hit) > 1:
            raise LetheError(f"outcome {outcome.name} could be {names[hit[0]]} or {names[hit[1]]} of {table.path}; make the names tell")
        if not hit:
            alone.append(outcome.name)
        elif outcome.content and contents[hit[0]] and outcome.content != contents[hit[0]]:
            changed.append(outcome.name)
        else:
            pairs.setdefault(hit[0], []).append(outcome)
    rows = sorted(pairs)
    if not rows:
        raise LetheError(f"no data set of {table.path} ({names[0]}, ...) has an outcome ({(alone + changed)[0]}, ...)")
    triples = np.array([_mean(pairs[k]) for k in rows])  # (rows, 3)
    several = sum(len(found) > 1 for found in pairs.values())
    said = [
        (len(table) - len(rows), "data set", "with features but without an outcome"),
        (len(alone), "outcome", "without features"),
        (len(changed), "outcome", "of another content than the features of that name"),
        (several, "data set", "with several outcomes: their mean is taken"),
    ]
    notes = notes + [f"{counted(count, word)} {words}" for count, word, words in said if count]
    return Joined(table.take(rows), target, *triples.T, notes)


def _simple(name: str) -> str:
    """A name without folder, ending and case, and with the characters that a run's folder may have."""
    return re.sub(r"[^\w.+-]+", "_", _ENDING.sub("", re.split(r"[/\\]", name)[-1]).lower())


def _mean(found: list[Outcome]) -> tuple[float, float, float]:
    """Over several runs: the wider of Student's interval over the runs and the mean of theirs over items, as study.results has it."""
    low, high = (float(np.mean([getattr(one, side) for one in found])) for side in ("low", "high"))
    mean, run_low, run_high = seed_interval([one.value for one in found])
    return mean, float(np.fmin(low, run_low)), float(np.fmax(high, run_high))


class Parser(argparse.ArgumentParser):
    """`-` and `_` mean the same in flags; what is wrong is a LetheError, with the nearest flag."""

    def error(self, message: str):
        raise LetheError(f"{message}; see {self.prog} --help")

    def read(self, argv: list[str]) -> argparse.Namespace:
        words = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), word) for word in argv]
        args, rest = self.parse_known_args(words)
        if rest:
            near = difflib.get_close_matches(rest[0].partition("=")[0], self._option_string_actions, 1)
            raise LetheError(f"unknown {rest[0]}" + (f"; did you mean {near[0]}?" if near else f"; see {self.prog} --help"))
        return args


def plain(value: float) -> str:
    """A number for a CSV: its shortest exact form, empty for NaN."""
    return "" if math.isnan(value) else repr(float(value))
