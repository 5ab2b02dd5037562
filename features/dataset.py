"""The data set that features are about: its files, and a seeded sample of its records."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.records import Record, Report, to_records
from data.rows import iter_rows
from study.batch import SUFFIXES, natural
from study.errors import LetheError

BESIDE = (".settings.json", ".times.jsonl")  # what python -m features writes beside its table


@dataclass(frozen=True)
class Sample:
    """Records drawn without replacement, in file order, and what is known of the whole file.

    items: its records; chars: of their prompts and answers, as training sees them (a context asked about twice counts twice);
    skipped: its bad rows; digest: sha256 of its bytes; contexts: for each record the context_text it asks about, "" where it has
    none; note: which rows were passed over, "" where none was.
    """

    name: str
    path: Path
    records: list[Record]
    items: int
    chars: int
    skipped: int
    digest: str
    contexts: tuple[str, ...] = ()
    note: str = ""


def dataset_files(folder: str | Path) -> dict[str, Path]:
    """Data set name -> file, of every record file under a folder, in natural order (chunk_2 before chunk_10).

    The name is the path below the folder without suffix; files that differ in the suffix alone keep it. LetheError for none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        hint = "; for one file there is --single_dataset" if folder.is_file() else ""
        raise LetheError(f"--data_folder {folder}: no such folder{hint}")
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    inside = {path: path.relative_to(folder) for path in found if not path.name.endswith(BESIDE)}
    inside = {path: place for path, place in inside.items() if not any(part.startswith(".") for part in place.parts)}
    if not inside:
        raise LetheError(f"--data_folder {folder}: no {', '.join(SUFFIXES)} file in it")
    short = [place.with_suffix("").as_posix() for place in inside.values()]
    named = {}
    for path, place in inside.items():
        name = place.with_suffix("").as_posix()
        named[clean_name(place.as_posix() if short.count(name) > 1 else name)] = path
    return {name: named[name] for name in sorted(named, key=in_order)}


def clean_name(name: str) -> str:
    """A name that stays on one line of the table."""
    return " ".join(name.split())


def in_order(name: str) -> tuple:
    """Sorting key of data sets: chunk_2 before chunk_10, and no two alike."""
    return natural(name), name


def file_digest(path: str | Path) -> str:
    """sha256 of a file's bytes, streamed. LetheError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LetheError(f"{path}: cannot be read ({error.strerror or error})") from None


def load_sample(path: str | Path, sample_size: int = 100, seed: int = 0, salvage: bool = False, name: str | None = None) -> Sample:
    """A seeded sample of a file's records (sample_size 0: all), streaming: memory holds the sample, not the file.

    Algorithm R (Vitter 1985): record i takes a random place of the full sample with probability sample_size / (i + 1). salvage: of
    a file that is cut off, its whole leading rows. LetheError for what cannot be read, or holds no record.
    """
    path = Path(path)
    digest, report, rng = file_digest(path), Report(str(path)), random.Random(seed)
    drawn: list[tuple[int, Record, str]] = []
    items = chars = 0
    for record, context in _read(path, report, salvage):
        chars += len(record.answer) + sum(len(text) for _, text in record.prompt)
        if not sample_size or items < sample_size:
            drawn.append((items, record, context))
        elif (place := rng.randrange(items + 1)) < sample_size:
            drawn[place] = (items, record, context)
        items += 1
    drawn.sort(key=lambda entry: entry[0])
    note = ""
    if report.dropped_count:
        where, reason = report.dropped[0]
        note = f"{report.dropped_count} of its rows passed over; the first: {Path(where).name}: {reason}"
    return Sample(
        name or clean_name(path.stem), path, [record for _, record, _ in drawn], items, chars, report.dropped_count, digest,
        tuple(context for *_, context in drawn), note,
    )  # fmt: skip


def _read(path: Path, report: Report, salvage: bool) -> Iterator[tuple[Record, str]]:
    """(record, its context): as iter_records reads, which does not tell a context from the question behind it."""

    def on_bad(where: str, reason: str) -> None:
        report.rows += 1
        report.drop(where, reason)

    for where, row in iter_rows(path, on_bad, salvage):
        context = row.get("context_text") if isinstance(row, dict) else None
        context = context.strip() if isinstance(context, str) else ""
        for record in to_records(row, where, report):
            yield record, context if record.prompt[0][1].startswith(context) else ""
    if not report.kept:
        first = f"; the first: {report.dropped[0][0]}: {report.dropped[0][1]}" if report.dropped else ""
        raise LetheError(f"{path}: no record among {report.rows} rows{first}")
