"""Scored outputs in AlpacaEval's JSON, for its judge: python -m data.alpaca_eval --root out/nano --run base --task gsm8k --out F.json

    python eval.py --model DIR --adapter DIR --tasks alpaca_eval=F.json:F.json --out RESULTS        # F: the prompts, as AlpacaEval has them
    python -m data.alpaca_eval --root RESULTS --run . --task alpaca_eval=F.json:F.json --out outputs.json
    alpaca_eval --model_outputs outputs.json                                                        # its own command

Each row is {"instruction", "output", "generator", "dataset"}. AlpacaEval pairs the outputs of two models by the instruction's
text, so it is taken from the task's file as it stands there, not from the prompt in its template.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data.folder import Task, find_task
from data.rows import iter_rows
from data.superni import input_of
from study.errors import LetheError, run_command
from study.folder import read_json, read_jsonl, write_json


def alpaca_rows(task: Task, items: list[dict], generator: str) -> list[dict]:
    """The rows of the items of eval/{task}.jsonl, in their order.

    instruction: the test row's own where it has one and no input beside it, else its last user turn. dataset: the row's own,
    else the task's name. Raises LetheError where the items are not those of the task's test rows.
    """
    if not items:
        raise LetheError(f"{task.name}: no scored item to export")
    if len(items) > len(task.test):
        raise LetheError(f"{task.name}: {len(items)} scored items and {len(task.test)} test rows; is it the task that was scored?")
    raw = _raw_rows(task)
    made = []
    for number, (record, item) in enumerate(zip(task.test, items, strict=False), 1):
        if item.get("reference") != record.answer:
            raise LetheError(f"{task.name}: scored item {number} answers another row than {record.source}; is it the task that was scored?")
        row = raw.get(record.source, {})
        own = row.get("instruction") if not row.get("input") and not row.get("history") else None
        made.append({"instruction": own or input_of(record, ""), "output": item["output"], "generator": generator,
                     "dataset": row.get("dataset") or task.name})  # fmt: skip
    return made


def _raw_rows(task: Task) -> dict[str, dict]:
    """The rows of the task's test file by their place; {} for a built-in task."""
    path = task.test_report.path if task.test_report else ""
    rows = iter_rows(path, lambda where, reason: None, salvage=True) if path else ()
    return {where: row for where, row in rows if isinstance(row, dict)}


def export(root: Path, run: str, task: str, generator: str | None = None, data_root: str = "data") -> list[dict]:
    """The rows of {root}/{run}/eval/{task}.jsonl. root: a study, or what eval.py --model … --out wrote (there task is told as for it).

    run: the folder of a run in the study, or "base". Raises LetheError for what is missing and for data that changed since.
    """
    record = read_json(root / "study.json", default={})
    name = task.split("=", 1)[0]
    file = root / run / "eval" / f"{name}.jsonl"
    if not file.is_file():
        there = sorted(path.parent.parent.relative_to(root).as_posix() for path in root.rglob(f"eval/{name}.jsonl"))
        hint = f"{name} is scored under {', '.join(there[:5])}{', …' * (len(there) > 5)}" if there else f"nothing under {root} has {name}"
        raise LetheError(f"{file}: not scored; {hint}")
    spec = record.get("tasks", {}).get(name) or {"name": task, "data_root": data_root}
    found = find_task(**spec)
    if record and found.fingerprint != record["identity"]["data"].get(name):
        raise LetheError(f"the data of {name} changed since this study was trained; restore it")
    told = "/".join(part for part in (record.get("model", root.name), run) if part != ".")
    return alpaca_rows(found, read_jsonl(file), generator or told)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise LetheError(f"{message}; see python -m data.alpaca_eval --help")


def main(argv: list[str] | None = None) -> None:
    parser = _Parser(prog="python -m data.alpaca_eval", allow_abbrev=False, description="Scored outputs in AlpacaEval's JSON.")
    parser.add_argument("--root", required=True, help="study folder, or the --out of eval.py --model")
    parser.add_argument("--run", default="base", help="a run's folder in it, such as lora_base/gsm8k (default: base; of eval.py: .)")
    parser.add_argument("--task", required=True, help="which task's outputs; outside a study as in --tasks, name=file.json:file.json too")
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--generator", help="the model's name in it (default: the model and the run)")
    parser.add_argument("--data_root", default="data", help="where the data folders lie (outside a study)")
    args = parser.parse_args(argv)
    rows = export(Path(args.root), args.run, args.task, args.generator, args.data_root)
    write_json(args.out, rows)
    print(f"wrote {args.out}: {len(rows)} outputs of {rows[0]['generator']}")


if __name__ == "__main__":
    sys.exit(run_command(main))
