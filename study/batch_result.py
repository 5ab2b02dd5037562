"""What a batch made of the model on each data set: a row each, in the result file of seed 004's form, as a table and a picture."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from metrics.statistics import compare_items, mean_interval, wilson_interval
from study.errors import LetheError
from study.folder import is_done, read_json, read_jsonl, write_json
from study.logging import format_table
from study.plots import COLOURS, _clean, _save

# What the result file says of itself.
ABOUT = {
    "processed_files": "files with a row in results, those that failed too; total_files - processed_files are still to do",
    "max_samples": "most questions of the benchmark that were asked, the same for all files; null: all",
    "content_hash": "sha256 of the file's bytes",
    "note": "what of a file could not be used, where it was trained on in part",
    "status": "ok, or failed: the reason says why, and finetuned_model is null",
    "base_model, finetuned_model": "the same questions before and after training on the file",
    "overall_accuracy": "share of all questions; one without a readable answer is wrong, and counted in unparsed",
    "accuracy_low, accuracy_high": "95 % over questions (Wilson)",
    "macro_accuracy": "mean over subjects, each counted alike",
    "answer_nll": "mean negative log-likelihood of the right answer, in nats; lower is better",
    "change": "finetuned - base accuracy on the same questions; low, high: 95 % over questions (paired bootstrap), p: exact McNemar test",
    "final_loss": "mean training loss over the last logged steps, of the answers' tokens alone",
    "seconds, memory_gib": "of training; the peak of the process so far, other files included",
}


@dataclass
class BatchResult:
    """The result of one chunk. runs: (name, file, folder of its run) of every data set; column: the benchmark that rows are about."""

    tree: Path
    chunk: str
    runs: list[tuple[str, Path, str]]
    column: str
    max_samples: int | None
    known: dict[str, dict] = field(default_factory=dict)  # rows that were made before: their intervals take a while

    @property
    def begun(self) -> str:
        """When, as 20260131_142500."""
        digits = re.sub(r"[^0-9]", "", read_json(self.tree / "study.json")["started"][:19])
        return f"{digits[:8]}_{digits[8:]}"

    @property
    def path(self) -> Path:
        """result/batch_mmlu_results_{when it was begun}_{chunk}.json beside the chunk's folder; of several seeds one each."""
        seed = f"_{self.tree.name}" if re.fullmatch(r"seed\d+", self.tree.name) else ""
        folder = self.tree.parent if seed else self.tree
        return folder.parent / "result" / f"batch_mmlu_results_{self.begun}_{self.chunk[:100]}{seed}.json"

    def rows(self) -> list[dict]:
        """A row for every data set that is done or failed by now."""
        left = [run for run in self.runs if self.known.get(run[0], {}).get("status") != "ok"]
        self.known.update({row["dataset"]: row for row in rows(self.tree, left, self.column)})
        return [self.known[name] for name, _, _ in self.runs if name in self.known]

    def save(self) -> None:
        """Writes the file with what is done by now."""
        header = {"folder_name": self.chunk, "timestamp": self.begun, "total_files": len(self.runs), "max_samples": self.max_samples}
        save(self.path, header, self.rows())

    def report(self) -> None:
        """The table in the terminal (first: a folder that cannot be written to still has it), the file, and its picture."""
        found = self.rows()
        print(f"\n{self.column} before and after training on each data set; changes on the same questions\n{table(found)}", flush=True)
        self.save()
        print(f"\nresults    {self.path}")
        if any(row["change"] for row in found):
            print(f"picture    {_save(changes_figure(found, self.column), self.path.with_suffix('.png'))}")


def rows(tree: str | Path, runs: Sequence[tuple[str, Path, str]], column: str) -> list[dict]:
    """A row for each (task name, file, run folder) that is done or failed, in their order; the others have none yet.

    Read from the study folder: {run folder}/run.json and eval/{column}.jsonl, base/eval/{column}.jsonl, and of those that failed
    {run folder}/failed.json {"reason"}. LetheError where the questions before and after are not the same.
    """
    tree = Path(tree)
    base = read_jsonl(tree / "base" / "eval" / f"{column}.jsonl")
    return [row for name, file, folder in runs if (row := _row(tree / folder, name, Path(file), column, base))]


def _row(folder: Path, name: str, file: Path, column: str, base: list[dict]) -> dict | None:
    record = read_json(folder / "run.json") if is_done(folder) else {}
    items = read_jsonl(folder / "eval" / f"{column}.jsonl") if record else []
    failure = None if items else read_json(folder / "failed.json", default=None)
    if not items and failure is None:
        return None
    if items and base and [_question(item) for item in items] != [_question(item) for item in base]:
        raise LetheError(f"{folder / 'eval' / column}.jsonl: other questions than those of the base; remove it and score again")
    told = ("data", "learning_rate", "template", "dtype", "seed")
    metrics = {"train_runtime": "seconds", "final_loss": "final_loss", "steps": "steps", "tokens": "tokens", "examples": "examples"}
    return {
        "dataset": name,
        "dataset_path": str(file),
        "file_name": file.name,
        "folder_name": file.resolve().parent.name,
        "content_hash": _content_hash(file),
        "status": "ok" if items else "failed",
        "note": _note(record) if items else None,
        "reason": None if items else str(failure.get("reason") or "not known"),
        "training_info": {
            "training_metrics": {ours: record.get(key) for ours, key in metrics.items()},
            **{key: record.get(key) for key in told},
            "adapter": str(folder) if record else None,
        },
        "evaluation_info": {"benchmark": column, "questions_by_subject": dict(Counter(item["subject"] for item in items or base))},
        "results": {"base_model": scores(base), "finetuned_model": scores(items)},
        "change": change(base, items),
        "seconds": record.get("seconds"),
        "memory_gib": record.get("memory_gib"),
    }


def _note(record: dict) -> str | None:
    """What of the file was not trained on."""
    data = record.get("data") or {}
    shown = data.get("bad_rows_shown") or [""]
    return f"{data['bad_rows']} rows left out, the first: {shown[0]}" if data.get("bad_rows") else None


def _content_hash(file: Path) -> str | None:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None


def _question(item: dict) -> tuple:
    return item["subject"], item.get("id"), item["gold"]


def scores(items: list[dict]) -> dict | None:
    """What one model scored on a benchmark's items {"subject", "correct", "extracted", "answer_nll"}; None of none."""
    if not items:
        return None
    values, by_subject = [float(item["correct"] or 0) for item in items], {}
    for item, value in zip(items, values, strict=True):
        by_subject.setdefault(item["subject"], []).append(value)
    right, verdicts = sum(values), all(value in (0.0, 1.0) for value in values)
    low, high = wilson_interval(right, len(items)) if verdicts else mean_interval(values)[1:]
    subjects = {subject: sum(found) / len(found) for subject, found in sorted(by_subject.items())}
    losses = [item["answer_nll"] for item in items if item.get("answer_nll") is not None]
    return {
        "overall_accuracy": right / len(items),
        "total_questions": len(items),
        "correct_questions": int(right) if verdicts else right,
        "unparsed": sum("extracted" in item and item["extracted"] is None for item in items),
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_accuracy": sum(subjects.values()) / len(subjects),
        "answer_nll": sum(losses) / len(losses) if losses else None,
        "subject_accuracy": subjects,
    }


def change(before: list[dict], after: list[dict]) -> dict | None:
    """{"difference", "low", "high", "p"} of accuracy on the same questions, see compare_items; None where one side has none."""
    if not before or not after:
        return None
    found = compare_items(*([float(item["correct"] or 0) for item in items] for items in (before, after)))
    return {name: found[name] for name in ("difference", "low", "high", "p")}


def save(path: str | Path, header: dict, rows: list[dict]) -> None:
    """The result file. header: folder_name, timestamp, total_files and max_samples, and what else is worth telling."""
    counted = {**header, "processed_files": len(rows)}
    first = {name: counted.pop(name) for name in ("folder_name", "timestamp", "total_files", "processed_files", "max_samples")}
    failed = sum(row["status"] == "failed" for row in rows)
    write_json(path, {**first, "failed_files": failed, **counted, "about": ABOUT, "results": rows})


def table(rows: list[dict]) -> str:
    """The rows in text, at most 110 columns: accuracy in % before and after, the paired change, nll; the failures below."""
    lines = []
    for row in rows:
        if row["status"] != "ok":
            continue
        before, after, moved = row["results"]["base_model"], row["results"]["finetuned_model"], row["change"]
        p = None if moved is None else "<0.0001" if moved["p"] < 1e-4 else f"{moved['p']:.4f}"
        lines.append([
            _short(row["dataset"]), row["training_info"]["training_metrics"]["examples"],
            *(None if side is None else f"{100 * side['overall_accuracy']:.1f}" for side in (before, after)),
            None if moved is None else f"{100 * moved['difference']:+.1f}",
            None if moved is None else f"{100 * moved['low']:+.1f} to {100 * moved['high']:+.1f}", p,
            *(None if side is None else side["answer_nll"] for side in (before, after)),
        ])  # fmt: skip
    headers = ["data set", "examples", "before %", "after %", "change", "95 %", "p", "nll before", "after"]
    failed = [f"in part    {_short(row['dataset'])}: {row['note'].partition(', the first')[0]}" for row in rows if row.get("note")]
    failed += [f"failed     {row['dataset']}: {row['reason']}" for row in rows if row["status"] != "ok"]
    return "\n".join(([format_table(lines, headers)] if lines else []) + failed) or "no file is done yet"


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 9]}…{name[-8:]}"


def changes_figure(rows: list[dict], column: str) -> Figure:
    """The change of every data set with its interval, the most harmful one below."""
    shown = sorted((row for row in rows if row["change"]), key=lambda row: row["change"]["difference"])
    figure = Figure(figsize=(8.2, 1.4 + 0.27 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(shown))
    axes.axvline(0, color="#999999", linewidth=1, linestyle="--")
    for place, row in zip(places, shown, strict=True):
        low, middle, high = (100 * row["change"][name] for name in ("low", "difference", "high"))
        colour = COLOURS[1] if high < 0 else COLOURS[2] if low > 0 else "#777777"
        axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(middle, place, "o", color=colour, markersize=5)
    axes.set_yticks(places, [_short(row["dataset"]) for row in shown], fontsize=8)
    axes.set_ylim(-0.8, len(shown) - 0.2)
    about = "95 % over questions; in colour where the interval excludes 0"
    axes.set_xlabel(f"change of {column} by training on the data set, in points\n{about}")
    _clean(axes)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.grid(axis="y", visible=False)
    return figure
