"""One file per task: where its raw rows lie, what a row becomes, how its answers are scored.

Each has ANSWER_KIND, MAX_NEW_TOKENS, RAW (what lies under --source), FOLDERS, HUB (repository, files), read_raw(folder)
and to_alpaca(row); where it must, TEST_SHARE (no official test split), SOURCE_FILE (--source may name one of several files) and
question(row), by which leaks are found.
"""

from pathlib import Path

from data.rows import iter_rows
from study.errors import LetheError


class MissingRaw(LetheError):
    """A folder without a task's raw files."""


def find_raw(folder: Path, *names: str) -> Path | None:
    """The first of the names that is a file in the folder."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def need_raw(folder: Path, *names: str) -> Path:
    """As find_raw, but none of them raises MissingRaw."""
    if found := find_raw(folder, *names):
        return found
    raise MissingRaw(
        f"{folder}: none of {', '.join(names)} is there; give the folder of the released files by --source"
    )


def rows_of(path: Path) -> list[dict]:
    """All rows of a raw file, each with its place under "where". A damaged line is an error: files come whole."""
    rows = []
    for where, row in iter_rows(path):
        if not isinstance(row, dict):
            raise LetheError(f"{where}: a {type(row).__name__}, not an object; is this the released file?")
        rows.append(row | {"where": where})
    return rows


def missing(row: dict, *names: str) -> str | None:
    """The reason to drop a row that lacks one of these texts, or None."""
    absent = [name for name in names if not (isinstance(row.get(name), str) and row[name].strip())]
    return f"no {', no '.join(absent)}" if absent else None
