"""Containers of rows: a JSON array, JSON lines, parquet. What a row means is the subject of records.py.

The container is told by content, not by suffix: owners ship JSON lines under .json. Each row comes with its place.
"""

import codecs
import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from study.errors import LetheError

_CHUNK = 1 << 20  # characters or bytes read at a time
_SPACE = " \t\n\r"  # JSON's white space

OnBad = Callable[[str, str], None]  # (place "file:line", reason)


def refuse(where: str, reason: str) -> None:
    """The strict OnBad: the first bad row is an error."""
    raise LetheError(f"{where}: {reason}")


def iter_rows(path: str | Path, on_bad: OnBad = refuse) -> Iterator[tuple[str, object]]:
    """Yield (place, row) of every row of a file, streaming; place is "file:line" (parquet: "file:row").

    A line of JSON lines that is no JSON goes to on_bad and is passed over. A damaged array, a cut last line, a missing
    or unreadable file: LetheError.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            while head and not head.removeprefix(codecs.BOM_UTF8).strip() and (more := file.read(4096)):
                head = more
    except FileNotFoundError:
        raise LetheError(f"{path}: no such file{_beside(path)}") from None
    except OSError as error:
        raise LetheError(f"{path}: cannot be read ({error.strerror or error})") from None
    first = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if not first:
        raise LetheError(f"{path}: the file is empty")
    if head.startswith(b"PAR1") or path.suffix.lower() == ".parquet":
        return _parquet(path)
    if b"\0" in head or head.startswith(b"\x1f\x8b"):
        raise LetheError(f"{path}: not text but a binary file; give a json array, json lines or parquet")
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        raise LetheError(f"{path}: a {path.suffix} file holds no records; convert it to json lines")
    return _array(path) if first == b"[" else _lines(path, on_bad)


def _beside(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return f"; {near[0]} lies beside it" if near else ""


def _lines(path: Path, on_bad: OnBad) -> Iterator[tuple[str, object]]:
    good = 0
    with path.open("rb") as file:  # split at \n alone: other "line ends" such as U+0085 occur inside strings
        for number, line in enumerate(file, 1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(text.decode("utf-8"))
            except UnicodeDecodeError as error:
                on_bad(where, f"not UTF-8 (byte {error.start} of the line)")
            except RecursionError:
                on_bad(where, "nested too deep")
            except ValueError as error:
                if good == 0 and text.strip() in (b"{", b"["):
                    raise LetheError(
                        f"{path}: one JSON value over many lines; give an array of rows or json lines"
                    ) from None
                if not line.endswith(b"\n"):
                    raise LetheError(
                        f"{where}: the file is cut off in its last line ({error}); get the whole file"
                    ) from None
                on_bad(where, f"not JSON ({error})")
            else:
                good += 1
                yield where, row


class _Text:
    """A window on a text file that grows at its end and is dropped at its front, with byte and line counts."""

    def __init__(self, path: Path):
        self.path, self.file = path, path.open("rb")
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.pos, self.ended = "", 0, False
        self.bytes_before, self.line = 0, 1  # of text[0]

    def grow(self) -> bool:
        """Drop what lies before pos and read on; False at the end of the file."""
        if self.ended:
            return False
        done = self.text[: self.pos]
        self.bytes_before, self.line = self.bytes_before + len(done.encode()), self.line + done.count("\n")
        self.text, self.pos = self.text[self.pos :], 0
        block = self.file.read(max(_CHUNK, len(self.text)))  # doubling keeps one huge row linear
        self.ended = not block
        try:
            self.text += self.decoder.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            raise LetheError(
                f"{self.path}: not UTF-8 ({error.reason}) near byte {self.file.tell() - len(block) + error.start}"
            ) from None
        return True

    def peek(self) -> str:
        """The next character that is not white space, "" at the end; pos stands on it."""
        while True:
            while self.pos < len(self.text):
                if self.text[self.pos] not in _SPACE:
                    return self.text[self.pos]
                self.pos += 1
            if not self.grow():
                return ""

    def place(self) -> tuple[int, int]:
        """(byte offset, line number) of pos."""
        done = self.text[: self.pos]
        return self.bytes_before + len(done.encode()), self.line + done.count("\n")


def _array(path: Path) -> Iterator[tuple[str, object]]:
    """The elements of one JSON array, with a window of about a megabyte in memory."""
    window, decode, count = _Text(path), json.JSONDecoder().raw_decode, 0

    def damaged(what: str) -> LetheError:
        byte, line = window.place()
        return LetheError(
            f"{path}:{line}: {what} at byte {byte}, after {count} whole rows; get the whole file or mend it there"
        )

    with window.file:
        window.peek()
        window.pos += 1  # the opening bracket
        seen_pos, seen_line, seen_before = 0, 1, 0  # lines are counted on from the last row, so the work stays linear
        char = window.peek()
        while char != "]":
            if not char:
                raise damaged("the array is cut off")
            row, end = _element(window, decode, count + 1, damaged)
            count += 1
            if seen_before != window.bytes_before:
                seen_pos, seen_line, seen_before = 0, window.line, window.bytes_before
            seen_line += window.text.count("\n", seen_pos, window.pos)
            seen_pos = window.pos
            yield f"{path}:{seen_line}", row
            window.pos = end
            char = window.peek()
            if char == ",":
                window.pos += 1
                char = window.peek()
                if char == "]":
                    raise damaged("a comma before the array's end")
            elif char != "]":
                raise damaged("no comma after the last row" if char else "the array is cut off")
        window.pos += 1
        if window.peek():
            raise damaged("there is more after the array's end")


def _element(window: _Text, decode, number: int, damaged) -> tuple[object, int]:
    """(row, end) of the array's element at window.pos, reading on as needed; raises what damaged() makes."""
    while True:
        try:
            row, end = decode(window.text, window.pos)
            number_may_go_on = isinstance(row, int | float) and end > len(window.text) - 8  # "1." of "1.5"
            if window.ended or not number_may_go_on:
                return row, end
        except RecursionError:
            raise damaged(f"row {number} is nested too deep") from None
        except json.JSONDecodeError as error:
            # Text that merely stops shows its error at its very end, or as a string that never closes.
            stops = error.msg.startswith("Unterminated") or error.pos >= len(window.text.rstrip(_SPACE)) - 12
            if window.ended or not stops:
                raise damaged(
                    f"row {number} is cut off" if stops else f"row {number} is not JSON ({error.msg})"
                ) from None
        window.grow()


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise LetheError(f"{path}: parquet needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise LetheError(f"{path}: damaged parquet file after {number} rows ({error}); get the whole file") from None
