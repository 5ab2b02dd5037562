"""The table of features: a CSV that grows by a row as each data set is done, and can be killed at any moment.

Rows stand in the natural order of their names, whatever was done first, and hold no times: the same data sets and settings give
the same bytes, in one go or in several. Beside it, {table}.settings.json says what made it.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import math
import os
from numbers import Integral
from pathlib import Path
from typing import Any

from features.dataset import in_order
from study.errors import LetheError
from study.folder import write_error, write_text

FIRST = ("dataset_name", "dataset_num_items", "dataset_total_chars")
LAST = ("status", "reason", "content_hash", "settings_hash")


class Table:
    """An opened table. features: the names of its feature columns; settings: what its numbers depend on, beside the data.

    Opening it drops a last line that a kill left half-written. LetheError where the file has other columns or was made with
    other settings (restart: it is deleted), or where another command writes to it.
    """

    def __init__(self, path: str | Path, features: tuple[str, ...], settings: dict[str, Any], restart: bool = False):
        self.path, self.columns = Path(path), (*FIRST, *features, *LAST)
        self.settings_hash = settings_hash(settings)
        self.rows: dict[str, dict[str, str]] = {}  # by data set, in the order of the file
        beside = self.path.with_name(self.path.name + ".settings.json")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = open(beside, "a+", encoding="utf-8")
        except OSError as error:
            raise _cannot(self.path, error) from error
        try:
            _lock(self.lock, self.path)
            self._open(settings, restart)
        except BaseException:
            if not os.fstat(self.lock.fileno()).st_size:
                beside.unlink(missing_ok=True)
            self.lock.close()
            raise

    def _open(self, settings: dict[str, Any], restart: bool) -> None:
        try:
            if restart:
                self.path.unlink(missing_ok=True)
            if self.path.exists():
                self._read()
            self._check(settings)
            self.lock.truncate(0)
            self.lock.write(json.dumps(settings, indent=2) + "\n")
            self.lock.flush()
            if not self.path.exists():
                write_text(self.path, _line(self.columns))  # and readers have a whole table from here on
        except OSError as error:
            raise _cannot(self.path, error) from error

    def close(self) -> None:
        """Lets other commands write to the table."""
        self.lock.close()

    def done(self, name: str, digest: str) -> bool:
        """Whether the features of this content of the data set stand in the table. A row of an error is none."""
        row = self.rows.get(name)
        return row is not None and row["status"] == "ok" and row["content_hash"] == digest

    def put(self, row: dict[str, Any]) -> None:
        """Writes a data set's row to the disk: at the end where it belongs there, else the whole table anew, atomically.

        None and numbers that are not finite become empty cells. LetheError for a full disk; the rows before are kept.
        """
        name, last = row["dataset_name"], next(reversed(self.rows), None)
        cells = {column: _cell(row.get(column)) for column in self.columns} | {"settings_hash": self.settings_hash}
        if self.rows.get(name) == cells:
            return
        self.rows[name] = cells
        if last is None or in_order(name) > in_order(last):
            try:
                with open(self.path, "ab") as file:
                    file.write(_line(cells.values()).encode())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise _cannot(self.path, error) from error
        else:
            self.rows = {name: self.rows[name] for name in sorted(self.rows, key=in_order)}
            write_text(self.path, _line(self.columns) + "".join(_line(cells.values()) for cells in self.rows.values()))

    def _read(self) -> None:
        content, header = self.path.read_bytes(), _line(self.columns).encode()
        whole = content[: content.rfind(b"\n") + 1]
        if header.startswith(content):  # not even the header was written
            whole = header
        try:
            lines = list(csv.reader(io.StringIO(whole.decode("utf-8"), newline=""), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise LetheError(f"{self.path} is no table of features ({error}); give another --output_csv") from None
        found = tuple(lines[0]) if lines else ()
        if found != self.columns:
            ours, theirs = set(self.columns), set(found)
            said = [f"{what} {', '.join(sorted(names)[:5])}" for what, names in (("lacks", ours - theirs), ("has", theirs - ours)) if names]
            raise LetheError(
                f"{self.path} has other columns: it {' and '.join(said) or 'has them in another order'}; "
                "give another --output_csv, or --restart to make it anew"
            )
        for number, cells in enumerate(lines[1:], 2):
            if len(cells) != len(self.columns):
                raise LetheError(f"{self.path}:{number}: {len(cells)} cells, not {len(self.columns)}; mend the line or take it out")
            row = dict(zip(self.columns, cells, strict=True))
            self.rows[row["dataset_name"]] = row
        if whole != content:
            write_text(self.path, whole.decode("utf-8"))

    def _check(self, settings: dict[str, Any]) -> None:
        """LetheError where a row was made with other settings, saying which."""
        strange = next((row for row in self.rows.values() if row["settings_hash"] != self.settings_hash), None)
        if strange is None:
            return
        self.lock.seek(0)
        try:
            made = json.load(self.lock)
        except ValueError:
            made = {}
        said = [f"{k}: {made.get(k)} in the table, {settings.get(k)} asked" for k in {**made, **settings} if made.get(k) != settings.get(k)]
        if settings_hash(made) != strange["settings_hash"]:
            said = [f"settings_hash {strange['settings_hash']} of {strange['dataset_name']}, {self.settings_hash} asked"]
        raise LetheError(
            f"{self.path} was made with other settings: {'; '.join(said)}; give another --output_csv, or --restart to make it anew"
        )


def settings_hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _line(cells) -> str:
    """One physical line: no cell holds a line end, so that a torn row is told by its missing one."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, Integral):
        return str(int(value))
    return repr(float(value)) if math.isfinite(value) else ""


def _cannot(path: Path, error: OSError) -> LetheError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return write_error(path, error)
    return LetheError(f"{path}: {error.strerror or error}; give another --output_csv")


def _lock(file, path: Path) -> None:
    """Held until the file is closed, by a kill too; where the system has no locks there is none."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LetheError(f"{path} is in use by another command; wait for it, or give another --output_csv") from None
    except (ImportError, OSError):
        pass
