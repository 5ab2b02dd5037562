"""Make a task's folder from its owners' files: python -m data.prepare gsm8k --source PATH

Writes {out}/{task}/{task}_test.json, _train_1p.json and, last, _remaining_train.json, which makes the folder a task.
Test (and dev) questions are removed from train by normalised text. The 1 % for rehearsal is drawn from what is left, so
no test question is in it, unless the owners chose rows for rehearsal themselves: those are kept, without test questions.
With --eval_size, rows to choose settings by are taken out of train too and written as {task}_eval.json.
"""

import argparse
import difflib
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from data.folder import task_module, task_modules, train_file
from data.tasks import MissingRaw
from metrics.text import collapse, normalise
from study.errors import LetheError, run_command
from study.folder import write_json

KEYS = ("instruction", "input", "output", "references", "original")  # of a written row; the last two where there are any
_SHOWN = 3  # places shown for each reason


@dataclass
class PrepareReport:
    """What became of the raw rows; str(report) is the printed text."""

    task: str
    origin: str
    split: str = ""
    raw: dict[str, int] = field(default_factory=dict)  # rows read, by raw split
    dropped: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # (place, reason), by raw split
    contaminated: list[str] = field(default_factory=list)  # places of train rows whose question is a test question
    duplicates: list[str] = field(default_factory=list)  # places of train rows that repeat an earlier one
    test_duplicates: int = 0
    eval: str = ""  # where the eval rows come from
    written: dict[str, int] = field(default_factory=dict)  # rows, by file

    def __str__(self) -> str:
        lines = [f"{self.task} from {self.origin}; split: {self.split}"]
        for split, count in self.raw.items():
            lines.append(f"  {split}: {count} rows, {len(self.dropped[split])} dropped")
            kinds = Counter(reason for _, reason in self.dropped[split])
            for reason, times in kinds.most_common(12):
                places = [place for place, why in self.dropped[split] if why == reason]
                lines.append(f"    {times} x {reason} ({_places(places)})")
            if len(kinds) > 12:
                lines.append(f"    and {len(kinds) - 12} other reasons")
        lines.append(f"  removed from train: {len(self.contaminated)} test questions{_listed(self.contaminated)}")
        lines.append(f"  removed from train: {len(self.duplicates)} repeated questions{_listed(self.duplicates)}")
        if self.eval:
            lines.append(f"  eval: {self.eval}")
        if self.test_duplicates:
            lines.append(f"  test repeats {self.test_duplicates} of its own questions; all are kept")
        lines += [f"  wrote {path}: {count} rows" for path, count in self.written.items()]
        return "\n".join(lines)


def _places(places: list[str]) -> str:
    shown = ", ".join("/".join(Path(place).parts[-1:]) for place in places[:_SHOWN])
    return shown + (", ..." if len(places) > _SHOWN else "")


def _listed(places: list[str]) -> str:
    return f" ({_places(places)})" if places else ""


def known_task(name: str) -> ModuleType:
    """folder.task_module; an unknown name is a LetheError with the nearest one."""
    names = task_modules()
    if name in names:
        return task_module(name)
    near = difflib.get_close_matches(name.lower(), names, 1, 0.4) or [n for n in names if n.lower() == name.lower()]
    hint = f"did you mean {near[0]}? " if near else ""
    raise LetheError(f"no task {name!r} to prepare: {hint}There are {', '.join(names)}")


def prepare(
    task: str, source: str | None = None, out: str = "data", split: str = "official", seed: int = 42, eval_size: float = 0
) -> PrepareReport:
    """Read the raw rows (from source, else from the hub), split, clean and write them; returns the report.

    eval_size: a share of train (below 1) or a count, set aside as {task}_eval.json; eval rows of the owners are taken instead.
    """
    module = known_task(task)
    folder, rows = _from_source(module, Path(source)) if source else _from_hub(module)
    report = PrepareReport(task, str(folder))
    kept = {name: _convert(module, split_rows, name, report) for name, split_rows in rows.items()}
    train, test = _split(module, kept, split, seed, report)
    report.test_duplicates = len(test) - len({_exact(row) for row in test})
    held = _without_leaks(module, kept.get("eval", []), test, report)
    train = _without_leaks(module, train, test + kept.get("dev", []) + held, report)
    if held:
        report.eval = f"the owners' {len(held)} rows" + "; --eval_size is not used" * bool(eval_size)
    elif eval_size and train:
        train, held = _set_aside(module, train, eval_size, seed, report)
    if not train or not test:
        raise LetheError(f"{task}: nothing left for {'test' if train else 'train'}\n{report}")
    replay = _without_leaks(module, kept.get("replay", []), test, report)
    replay = replay or random.Random(seed).sample(train, max(1, round(len(train) / 100)))
    target = train_file(Path(out), task)
    target.with_name(f"{task}_eval.json").unlink(missing_ok=True)  # of an earlier call, whose rows may be in train now
    parts = {"test": test, "eval": held, "train_1p": replay, "remaining_train": train}  # the last makes it a task
    for name, part in parts.items():
        if name == "eval" and not part:
            continue
        path = target.with_name(f"{task}_{name}.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LetheError(
                f"{path.parent}: cannot be made ({error.strerror}); give another folder by --out"
            ) from None
        write_json(path, [{key: row[key] for key in KEYS if key in row} for row in part])
        report.written[str(path)] = len(part)
    return report


def _convert(module: ModuleType, rows: list[dict], split: str, report: PrepareReport) -> list[dict]:
    report.raw[split], report.dropped[split], kept = len(rows), [], []
    for row in rows:
        made = module.to_alpaca(row)
        if isinstance(made, str):
            report.dropped[split].append((row["where"], made))
        else:
            kept.append(made | {"where": row["where"]})
    return kept


def _split(
    module: ModuleType, kept: dict[str, list[dict]], split: str, seed: int, report: PrepareReport
) -> tuple[list[dict], list[dict]]:
    """(train, test). official: as released, or a seeded share where the owners made no split; seed: 10 % of train."""
    train = list(kept["train"])
    if split == "official" and "test" in kept:
        report.split = "official test"
        return train, kept["test"]
    share = module.TEST_SHARE if split == "official" else 0.1
    random.Random(seed).shuffle(train)
    cut = max(1, int(len(train) * share))
    reason = "; the owners made none" if split == "official" else "; the official test is not used" * ("test" in kept)
    report.split = f"{share:.0%} of the train file as test, shuffled with seed {seed}{reason}"
    return train[cut:], train[:cut]


def _without_leaks(module: ModuleType, train: list[dict], held: list[dict], report: PrepareReport) -> list[dict]:
    question = getattr(module, "question", _whole)
    asked = {normalise(question(row)) for row in held}
    seen, clean = set(), []
    for row in train:
        if normalise(question(row)) in asked:
            report.contaminated.append(row["where"])
        elif _exact(row) in seen:
            report.duplicates.append(row["where"])
        else:
            seen.add(_exact(row))
            clean.append(row)
    return clean


def _set_aside(
    module: ModuleType, train: list[dict], size: float, seed: int, report: PrepareReport
) -> tuple[list[dict], list[dict]]:
    """(train, eval): rows drawn by the seed; what asks the same question as one of them leaves train with it."""
    count = math.ceil(size * len(train)) if size < 1 else int(size)
    if count >= len(train):
        raise LetheError(f"--eval_size {size:g} of {len(train)} training rows leaves none; give less")
    question, drawn = getattr(module, "question", _whole), set(random.Random(seed).sample(range(len(train)), count))
    held = [row for i, row in enumerate(train) if i in drawn]
    asked = {normalise(question(row)) for row in held}
    rest = [row for i, row in enumerate(train) if i not in drawn and normalise(question(row)) not in asked]
    report.eval = f"{count} rows of train, drawn with seed {seed}; {len(train) - count - len(rest)} more ask the same and are left out"
    return rest, held


def _whole(row: dict) -> str:
    return f"{row['instruction']}\n{row['input']}"


def _exact(row: dict) -> str:
    return collapse(_whole(row)).lower()  # keeps signs, which normalise drops: x+1 is not x-1


def _from_source(module: ModuleType, source: Path) -> tuple[Path, dict[str, list[dict]]]:
    """(folder, raw rows): the folder is source, or one of the task in it."""
    if source.is_file() and getattr(module, "SOURCE_FILE", False):
        return source, module.read_raw(source)
    folder = source.parent if source.is_file() else source
    if not folder.is_dir():
        raise LetheError(f"{source}: no such folder (--source); it should hold {module.RAW}")
    for inside in (folder / name for name in module.FOLDERS):
        try:
            return inside, module.read_raw(inside)
        except MissingRaw:
            continue
    return folder, module.read_raw(folder)


def _from_hub(module: ModuleType) -> tuple[Path, dict[str, list[dict]]]:
    """Fetch the task's files through huggingface-hub into its cache; returns (folder, raw rows)."""
    from huggingface_hub import constants, errors, hf_hub_download

    if module.HUB is None:
        raise LetheError(f"these files are not on the hub; give them by --source PATH: {module.RAW}")
    repo, files = module.HUB
    mend = f"or give the owners' files by --source PATH: {module.RAW}"
    revision, root = None, None
    for filename in files.values():
        name = f"{filename} of the dataset {repo}"
        command = f"hf download --repo-type dataset {repo} {filename}"
        try:
            path = Path(hf_hub_download(repo, filename, repo_type="dataset", revision=revision))
        except errors.GatedRepoError:  # before its parent, RepositoryNotFoundError
            raise LetheError(
                f"{name} is gated: accept its terms at {constants.ENDPOINT}/datasets/{repo}, then hf auth login, {mend}"
            ) from None
        except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
            if not isinstance(error, errors.LocalEntryNotFoundError):
                raise LetheError(f"{name} is not at {constants.ENDPOINT} (any more); {mend}") from None
            raise LetheError(_offline(name, command, mend)) from None
        except (OSError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError) as error:
            raise LetheError(_offline(name, command, mend, error)) from None
        root = path.parents[len(Path(filename).parts) - 1]
        revision = root.name if root.parent.name == "snapshots" else None  # the other files from the same commit
    return root, module.read_raw(root)


def _offline(name: str, command: str, mend: str, error: Exception | None = None) -> str:
    from huggingface_hub import constants

    why = f" ({str(error).splitlines()[0]})" if error and str(error) else ""
    return (
        f"{name} cannot be fetched from {constants.ENDPOINT}{why} and is not in the cache {constants.HF_HUB_CACHE}; "
        f"go online and run: {command}, {mend}"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise LetheError(f"{message}; see python -m data.prepare --help")


def _eval_size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not 0 < size < math.inf or size >= 1 and size % 1:
        raise LetheError(f"--eval_size {text}: give a share below 1, such as 0.01, or a whole number of rows")
    return size


def main(argv: list[str] | None = None) -> None:
    parser = _Parser(prog="python -m data.prepare", description="Make a task's folder from its owners' files.")
    parser.add_argument("task", nargs="?", help=f"one of {', '.join(task_modules())}")
    parser.add_argument("--source", help="folder of the raw files, or one that holds it; without: from the hub")
    parser.add_argument("--out", default="data", help="the data root (default: data)")
    parser.add_argument("--split", choices=("official", "seed"), default="official", help="seed: 10 %% of train")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--eval_size", "--eval-size", type=_eval_size, default=0, help="eval rows of train: a share below 1, or a count")
    args = parser.parse_args(argv)
    if not args.task:
        raise LetheError(f"which task? python -m data.prepare TASK, one of {', '.join(task_modules())}")
    print(prepare(args.task, args.source, args.out, args.split, args.seed, args.eval_size))


if __name__ == "__main__":
    sys.exit(run_command(main))
