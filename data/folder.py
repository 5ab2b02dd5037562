"""Tasks by name: the built-in ones, prepared folders under the data root, and files given as name=path."""

import difflib
import functools
import hashlib
import importlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.builtin import BUILTIN_TASKS, builtin_task
from data.builtin_generation import GENERATION_TASKS, generation_task
from data.records import Record, Report, iter_records, load_records, to_records
from data.tasks import superni
from metrics.text import collapse
from study.errors import LetheError

MADE_HERE = (*BUILTIN_TASKS, *GENERATION_TASKS)  # tasks without files
TEST_SHARE, TEST_MOST, SPLIT_SEED = 0.1, 500, 42  # what is held back from a file that comes without a test file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Task:
    """A data set with its scorer.

    train() streams the training records, anew at every call (train(report=Report()) tells what was dropped); replay()
    does so for the 1 % kept for rehearsal, None where there is none. fingerprint: sha256 of the files' bytes (built-in:
    of the rows).
    """

    name: str
    answer_kind: str  # number, letter, short, text: see metrics/answers.py
    max_new_tokens: int
    train: Callable[..., Iterator[Record]]
    test: list[Record]
    fingerprint: str
    spec: str  # finds this task again: its name, or name=file with the whole path
    replay: Callable[..., Iterator[Record]] | None = None
    train_path: Path | None = None
    test_report: Report | None = None


def held_out(task: Task, max_train: int | None, most: int = 200) -> tuple[int, list[Record]]:
    """(how many rows to train on, rows to choose settings by that are not among them): what follows the first max_train.

    Where all rows would be trained on, the last twentieth is kept back; never more than `most` are given. Raises LetheError
    where there is no row to keep back.
    """
    rows = list(task.train())
    if len(rows) < 2:
        raise LetheError(f"{task.name}: one row to train on, and one must be kept back to choose the learning rate by; give more rows")
    limit = min(max_train or len(rows), len(rows) - min(most, -(-len(rows) // 20)))
    return limit, rows[limit:][:most]


def task_modules() -> list[str]:
    """Names of the tasks that python -m data.prepare can make."""
    files = (Path(__file__).parent / "tasks").glob("[!_]*.py")
    own = [path.stem for path in files if "\ndef to_alpaca(" in path.read_text(encoding="utf-8")]  # others are benchmarks
    return sorted([*own, *superni.TASKS])


def task_module(name: str):
    """What data.prepare and scoring need of one of task_modules(): data/tasks/{name}.py, or one of SuperNI's ten."""
    return superni.TASKS.get(name) or importlib.import_module(f"data.tasks.{name}")


def scan(data_root: str | Path = "data") -> list[str]:
    """The task names that find_task knows: built-in, then the prepared folders under the data root."""
    root = Path(data_root)
    folders = sorted(p.name for p in root.iterdir() if train_file(root, p.name).is_file()) if root.is_dir() else []
    return [*MADE_HERE, *(name for name in folders if name not in MADE_HERE)]


def train_file(root: Path, name: str) -> Path:
    return root / name / f"{name}_remaining_train.json"


def find_task(name: str, data_root: str | Path = "data", strict: bool = False, salvage: bool = False) -> Task:
    """A task by its name, or a file as "name=train.jsonl" or "name=train.jsonl:test.jsonl".

    Without a test file, "{stem}_test" beside the train file is taken, else a tenth of its rows (seeded, 1 to 500) is
    held back. salvage: of a file that is cut off, its whole leading rows. LetheError for an unknown name, a missing test file, or a
    file with nothing to train on.
    """
    if "=" in name:
        return _given(*name.split("=", 1), strict, salvage)
    if name in MADE_HERE:
        return _builtin(name)
    root = Path(data_root)
    train = train_file(root, name)
    if _NAME.fullmatch(name) and train.is_file():
        test, replay = train.with_name(f"{name}_test.json"), train.with_name(f"{name}_train_1p.json")
        if not test.is_file():
            raise LetheError(f"{test}: no such file, so {name} cannot be scored; prepare the task again or write one")
        return _task(name, name, train, test, replay if replay.is_file() else None, strict, salvage)
    known = scan(root)
    near = difflib.get_close_matches(name, [*known, *task_modules()], 3, 0.5)
    if name in task_modules():
        raise LetheError(f"task {name} is not prepared: {train} is missing; run python -m data.prepare {name} --out {root} [--source PATH]")
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    if Path(name).is_file():
        hint = f"; a file needs a name: --datasets mine={name}."
    raise LetheError(f"unknown task {name!r}{hint} Known: {', '.join(known)} (scanned {root}/*/*_remaining_train.json)")


def _scoring(name: str) -> tuple[str, int]:
    if name in task_modules():
        module = task_module(name)
        return module.ANSWER_KIND, module.MAX_NEW_TOKENS
    return "text", 256


def fingerprint_files(*paths: Path) -> str:
    """sha256 over the files' bytes, streamed; each preceded by its length, so that moved bytes change it."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def whole_file(name: str, path: Path, strict: bool = False, salvage: bool = False) -> Task:
    """A file whose rows are all trained on, with none held back. What is wrong with it is told when its rows are read."""
    try:
        fingerprint = fingerprint_files(path)
    except OSError as error:
        fingerprint = f"unreadable: {error.strerror or error}"
    spec = f"{name}={path.resolve()}"
    return Task(name, "text", 256, functools.partial(iter_records, path, strict, salvage=salvage), [], fingerprint, spec, train_path=path)


def _task(name: str, spec: str, train: Path, test: Path, replay: Path | None, strict: bool, salvage: bool) -> Task:
    report = Report()
    return Task(
        name,
        *_scoring(name),
        train=functools.partial(iter_records, train, strict, salvage=salvage),
        test=load_records(test, strict, report, salvage),
        fingerprint=fingerprint_files(train, test, *([replay] if replay else [])),
        spec=spec,
        replay=functools.partial(iter_records, replay, strict, salvage=salvage) if replay else None,
        train_path=train,
        test_report=report,
    )


def _of_rows(rows: list[dict], where: str, report: Report | None = None) -> Iterator[Record]:
    report = Report() if report is None else report
    report.path = where
    for number, row in enumerate(rows, 1):
        yield from to_records(row, f"{where}:{number}", report, strict=True)


def _builtin(name: str) -> Task:
    made = generation_task(name) if name in GENERATION_TASKS else builtin_task(name)
    rows = json.dumps([made["train"], made["test"], made["replay"]], sort_keys=True, ensure_ascii=False)
    return Task(
        name,
        made["answer_kind"],
        made["max_new_tokens"],
        train=functools.partial(_of_rows, made["train"], f"{name}/train"),
        test=list(_of_rows(made["test"], f"{name}/test")),
        fingerprint=hashlib.sha256(rows.encode()).hexdigest(),
        spec=name,
        replay=functools.partial(_of_rows, made["replay"], f"{name}/replay"),
    )


def _given(name: str, files: str, strict: bool, salvage: bool) -> Task:
    """A file the user names: name=train or name=train:test."""
    if not _NAME.fullmatch(name):
        raise LetheError(f"{name!r} cannot name a task: letters, digits, '_', '.' and '-' only (it becomes a folder)")
    train, _, test = files.rpartition(":") if ":" in files and not Path(files).is_file() else (files, "", "")
    path = Path(train)
    if not path.is_file():
        raise LetheError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'} (given as {name}={files})")
    beside = path.with_name(f"{path.stem}_test{path.suffix}")
    if test or beside.is_file():
        other = Path(test) if test else beside
        return _task(name, f"{name}={path.resolve()}:{other.resolve()}", path, other, None, strict, salvage)
    rows = _count_rows(path, strict, salvage)
    if rows < 2:
        raise LetheError(f"{path}: one row only, none is left for testing; give {name}={path}:TEST_FILE")
    count = min(TEST_MOST, max(1, int(rows * TEST_SHARE)))
    held = frozenset(random.Random(SPLIT_SEED).sample(range(rows), count))
    report = Report()
    test_records = [record for row, record in _by_row(path, strict, salvage, report) if row in held]
    asked = frozenset(_prompt_key(record) for record in test_records)
    train_of = functools.partial(_not_held, path, held, asked, strict, salvage)
    if next(train_of(), None) is None:
        raise LetheError(f"{path}: every prompt also occurs in the held-back tenth; give {name}={path}:TEST_FILE")
    return Task(
        name,
        *_scoring(name),
        train_of,
        test_records,
        fingerprint_files(path),
        f"{name}={path.resolve()}",
        train_path=path,
        test_report=report,
    )


def _by_row(path: Path, strict: bool, salvage: bool, report: Report | None = None) -> Iterator[tuple[int, Record]]:
    """(index of the row, record): the records of one conversation must not part into train and test."""
    index, last = -1, None
    for record in iter_records(path, strict, report, salvage):
        index, last = index + (record.source != last), record.source
        yield index, record


def _count_rows(path: Path, strict: bool, salvage: bool) -> int:
    index = -1
    for index, _ in _by_row(path, strict, salvage):  # noqa: B007  only the last index is wanted
        pass
    return index + 1


def _prompt_key(record: Record) -> str:
    return "\n".join(f"{role}: {collapse(text).lower()}" for role, text in record.prompt)


def _not_held(
    path: Path, held: frozenset[int], asked: frozenset[str], strict: bool, salvage: bool, report: Report | None = None
) -> Iterator[Record]:
    for row, record in _by_row(path, strict, salvage, report):
        if row not in held and _prompt_key(record) not in asked:
            yield record
