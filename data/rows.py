"""Containers of rows: a JSON array, JSON lines, parquet. What a row means is the subject of records.py.

The container is told by content, not by suffix: owners ship JSON lines under .json. Each row comes with its place.
"""

import codecs
import difflib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from study.errors import LetheError

_CHUNK = 1 << 20  # characters or bytes read at a time
_SPACE = " \t\n\r"  # JSON's white space
_STUB = re.compile(r"[ \t\n\r]*[-+.\w\\]{0,12}", re.ASCII)  # where text may go on: tru, 1.5e+, \uD8, or nothing at all

OnBad = Callable[[str, str], None]  # (place "file:line", reason)


class Damaged(LetheError):
    """A file that is whole up to some byte only; lost says so without the mend, for those who take its leading rows."""

    def __init__(self, where: str, what: str, byte: int, rows: int, inside: str = "", mend: str = ""):
        hint = "or take the rows before it with --salvage (train.py, features)"
        super().__init__(f"{where}: {what} at byte {byte}{inside}, after {rows} whole rows; get the whole file, {mend}{hint}")
        self.where, self.lost = where, f"{what} at byte {byte} after {rows} whole rows; the rest is lost"


def _cut_off(where: str, begin: int, size: int, rows: int) -> Damaged:
    """The file of `size` bytes ends in a row that begins at byte `begin`, or (begin == size) where a row should follow."""
    return Damaged(where, "the file is cut off", size, rows, f", in a row that begins at byte {begin}" if begin < size else "")


def refuse(where: str, reason: str) -> None:
    """The strict OnBad: the first bad row is an error."""
    raise LetheError(f"{where}: {reason}")


def iter_rows(path: str | Path, on_bad: OnBad = refuse, salvage: bool = False) -> Iterator[tuple[str, object]]:
    """Yield (place, row) of every row of a file, streaming; place is "file:line" (parquet: "file:row"), and each has its own: rows
    of an array that share a line are "file:line (row 7)".

    A line of JSON lines that is no JSON goes to on_bad and is passed over. An array or JSON lines that are cut off, and an array
    that is damaged, raise Damaged, which names the byte; with salvage the rows before it are given and on_bad is told, once,
    what is lost. A missing or unreadable file, or damaged parquet (whose index stands at its end): LetheError in any case.
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
    padded = first in b"[{" and b"\0" not in head[:4]  # text, with zeros where the rest of a download should be
    if b"\0" in head and not padded or head.startswith(b"\x1f\x8b"):
        raise LetheError(f"{path}: not text but a binary file; give a json array, json lines or parquet")
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        raise LetheError(f"{path}: a {path.suffix} file holds no records; convert it to json lines")
    rows = _array(path) if first == b"[" else _lines(path, on_bad)
    return _leading(rows, on_bad) if salvage else rows


def _leading(rows: Iterator[tuple[str, object]], on_bad: OnBad) -> Iterator[tuple[str, object]]:
    """The rows before the damage; on_bad is told of it."""
    try:
        yield from rows
    except Damaged as error:
        on_bad(error.where, error.lost)


def _beside(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return f"; {near[0]} lies beside it" if near else ""


def _lines(path: Path, on_bad: OnBad) -> Iterator[tuple[str, object]]:
    good = byte = 0
    with path.open("rb") as file:  # split at \n alone: other "line ends" such as U+0085 occur inside strings
        for number, line in enumerate(file, 1):
            byte += len(line)
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(text.decode("utf-8"))
            except RecursionError:
                on_bad(where, "nested too deep")
            except ValueError as error:
                if not line.endswith(b"\n") and text.lstrip()[:1] == b"{" and not _is_json(text):
                    raise _cut_off(where, byte - len(text), byte, good) from None
                if good == 0 and text.strip() in (b"{", b"["):
                    raise LetheError(f"{path}: one JSON value over many lines; give an array of rows or json lines") from None
                bad_text = isinstance(error, UnicodeDecodeError)
                on_bad(where, f"not UTF-8 (byte {error.start} of the line)" if bad_text else f"not JSON ({error})")
            else:
                good += 1
                yield where, row


def _is_json(text: bytes) -> bool:
    """True for JSON, be it in another encoding than UTF-8."""
    try:
        json.loads(text.decode("utf-8", errors="replace"))
    except ValueError:
        return False
    return True


class _Text:
    """A window on a text file that grows at its end and is dropped at its front, with byte and line counts.

    Where the file's bytes are no UTF-8 the text ends; undecoded then says why.
    """

    def __init__(self, path: Path):
        self.file = path.open("rb")
        if self.file.read(3) != codecs.BOM_UTF8:
            self.file.seek(0)
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.pos, self.ended, self.undecoded = "", 0, False, ""
        self.bytes_before, self.line = self.file.tell(), 1  # of text[0]

    def grow(self) -> bool:
        """Drop what lies before pos and read on; False at the end of the text."""
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
            self.text += error.object[: error.start].decode()
            self.ended, self.undecoded = True, error.reason
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

    def damaged(what: str = "") -> Damaged:
        """what is wrong at window.pos; "": the text ends there, or in the row that begins there."""
        byte, line = window.place()
        if not what and window.undecoded in ("", "unexpected end of data"):
            return _cut_off(f"{path}:{line}", byte, path.stat().st_size, count)
        if not what:
            what, byte = f"not UTF-8 ({window.undecoded})", byte + len(window.text[window.pos :].encode())
        return Damaged(f"{path}:{line}", what, byte, count, mend="mend it there, ")

    with window.file:
        window.peek()
        window.pos += 1  # the opening bracket
        seen_pos, seen_line, seen_before = 0, 1, 0  # lines are counted on from the last row, so the work stays linear
        told_line = 0
        char = window.peek()
        while char != "]":
            if not char:
                raise damaged()
            row, end = _element(window, decode, count + 1, damaged)
            count += 1
            if seen_before != window.bytes_before:
                seen_pos, seen_line, seen_before = 0, window.line, window.bytes_before
            seen_line += window.text.count("\n", seen_pos, window.pos)
            seen_pos = window.pos
            yield f"{path}:{seen_line}{f' (row {count})' if seen_line == told_line else ''}", row
            told_line = seen_line
            window.pos = end
            char = window.peek()
            if char == ",":
                window.pos += 1
                char = window.peek()
                if char == "]":
                    raise damaged("a comma before the array's end")
            elif char != "]":
                raise damaged("no comma after the last row" if char else "")
        window.pos += 1
        if window.peek() or window.undecoded:
            raise damaged("there is more after the array's end")


def _element(window: _Text, decode, number: int, damaged) -> tuple[object, int]:
    """(row, end) of the array's element at window.pos, reading on as needed; raises what damaged() makes."""
    while True:
        try:
            row, end = decode(window.text, window.pos)
            number_may_go_on = type(row) in (int, float) and _STUB.fullmatch(window.text, end)  # "1." of "1.5"
            if not number_may_go_on or window.text[end : end + 1].isspace():
                return row, end
        except RecursionError:
            raise damaged(f"row {number} is nested too deep") from None
        except json.JSONDecodeError as error:
            # Text that merely stops shows its error at its very end, or as a string that never closes.
            if not error.msg.startswith("Unterminated") and not _STUB.fullmatch(window.text, error.pos):
                raise damaged(f"row {number} is not JSON ({error.msg})") from None
        except ValueError as error:  # a number of thousands of digits
            raise damaged(f"row {number} is not JSON ({error})") from None
        if not window.grow():
            raise damaged()


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
