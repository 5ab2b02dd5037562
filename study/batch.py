"""The files of a batch: fine-tuning on each of many data sets, a chunk (a folder) of them at a time."""

from __future__ import annotations

import difflib
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from study.errors import LetheError
from study.logging import format_table

SUFFIXES = (".json", ".jsonl", ".parquet")

def chunks(root: str | Path) -> list[tuple[str, list[Path]]]:
    """(name, files) of every chunk under root, in natural order (chunk_2 before chunk_10).

    A chunk is a sub-folder that holds .json, .jsonl or .parquet files, or root itself where it holds some (the last one, under its
    own name), or root alone where it is such a file. Hidden files and folders are passed over. LetheError where there is none.
    """
    root = Path(root)
    if root.is_file():
        if root.suffix.lower() not in SUFFIXES:
            raise LetheError(f"{root}: not a data set; give a {', '.join(SUFFIXES)} file or a folder of them")
        return [(root.stem, [root])]
    if not root.is_dir():
        names = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
        near = difflib.get_close_matches(root.name, names, 1)
        raise LetheError(f"{root}: no such file or folder{f'; {near[0]} lies beside it' if near else ''}")
    folders = sorted((path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")), key=lambda p: natural(p.name))
    found = [(path.name, _files_of(path)) for path in folders] + [(root.resolve().name, _files_of(root))]
    found = [(name, files) for name, files in found if files]
    if not found:
        deeper = next((path.parent for path in sorted(root.rglob("*")) if path.suffix.lower() in SUFFIXES), None)
        hint = f"; {deeper} has some, give the folder above it" if deeper else ""
        raise LetheError(f"{root}: no {', '.join(SUFFIXES)} file in it or in its sub-folders{hint}")
    return found


def _files_of(folder: Path) -> list[Path]:
    files = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(filter(Path.is_file, files), key=lambda path: natural(path.name))


def natural(name: str) -> list:
    """Sorting key that counts the digits in a name as numbers, whatever zeros lead them."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name.lower()))]


def choose_chunk(
    root: str | Path, asked: str | None = None, ask: Callable[[str], str] = input, terminal: bool | None = None
) -> tuple[str, list[Path]]:
    """(name, files) of the chunk to work on: --chunk 1, 001 and chunk_001 are the same one; a single chunk needs no asking.

    Without --chunk the chunks are listed and asked for on a terminal (None: where stdin is one), where q leaves by SystemExit;
    elsewhere, and for a chunk that is not there, LetheError lists them.
    """
    found = chunks(root)
    keys = _keys([name for name, _ in found])
    shown = [[key, name, len(files), f"{_megabytes(files):.1f}"] for key, (name, files) in zip(keys, found, strict=True)]
    listed = [f"{key} ({'' if key == name else f'{name}: '}{count} files, {size} MB)" for key, name, count, size in shown]
    told = ", ".join(listed[:20]) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "")
    if asked is not None:
        if (place := _place(str(asked), keys, found)) is None:
            raise LetheError(f"--chunk {asked}: no such chunk in {root}; there are {told}")
        return found[place]
    if len(found) == 1:
        return found[0]
    if not (sys.stdin.isatty() if terminal is None else terminal):
        raise LetheError(f"{root} holds {len(found)} chunks; choose one with --chunk: {told}")
    print(format_table(shown, ["", "chunk", "files", "MB"]))
    while True:
        try:
            answer = ask("which chunk (q leaves)? ").strip()
        except EOFError:
            answer = "q"
        if answer.lower() == "q":
            raise SystemExit(0)
        if answer and (place := _place(answer, keys, found)) is not None:
            return found[place]
        print(f"{answer!r} is none of them")


def _keys(names: list[str]) -> list[str]:
    """What to type for each: the last number in its name where no other has it; where no name has one, its place."""
    numbers = [re.findall(r"[0-9]+", name)[-1:] for name in names]
    if not any(numbers):
        return [str(place) for place in range(1, len(names) + 1)]
    values = [str(int(digits[0])) if digits else "" for digits in numbers]
    return [value if value and values.count(value) == 1 else name for value, name in zip(values, names, strict=True)]


def _place(asked: str, keys: list[str], found: list[tuple[str, list[Path]]]) -> int | None:
    names = [name for name, _ in found]
    number = str(int(asked)) if re.fullmatch("[0-9]+", asked) else asked
    for hits in (
        [i for i, name in enumerate(names) if name == asked],
        [i for i, name in enumerate(names) if natural(name) == natural(asked)],
        [i for i, key in enumerate(keys) if key == number],
    ):
        if len(hits) == 1:
            return hits[0]
    return None


def _megabytes(files: Sequence[Path]) -> float:
    return sum(path.stat().st_size for path in files) / 1e6


def task_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name for each file that a folder can carry, unlike all others in lower case too: the file's stem.

    Where the stem has other characters than letters, digits, '_', '.' and '-', is too long, or is another file's too, six digits of
    the file name's hash follow it. So a file keeps its name when others are added, unless they share its stem; then both get new
    ones, and no name goes over to another file.
    """
    plain = {}
    for file in files:
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", file.stem)[:100]
        plain[file] = re.sub(r"^[^A-Za-z0-9]+", "", stem) or "data"
    shared = Counter(name.lower() for name in plain.values())
    names = {}
    for file, name in plain.items():
        tag = hashlib.sha256(file.name.encode("utf-8", "surrogateescape")).hexdigest()[:6]
        names[file] = name if name == file.stem and shared[name.lower()] == 1 else f"{name}-{tag}"
    return names
