"""Two studies on the same test items: exact match of each run on the task it trained last, paired.

    python train.py --stage 1 --dtype bfloat16 --out out/bf16
    python train.py --stage 1 --dtype bfloat16 --quantize nf4 --out out/nf4
    python benchmarks/paired.py out/bf16 out/nf4

Items of all runs that both studies have are pooled. The p-value is exact (McNemar's), the interval a bootstrap over items.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks.common import finish  # noqa: E402
from metrics.statistics import compare_items  # noqa: E402
from study.errors import LetheError, run_command  # noqa: E402
from study.folder import read_jsonl  # noqa: E402
from study.logging import format_table  # noqa: E402
from study.report import cell_file, trained_runs  # noqa: E402


def paired_items(one: Path, other: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{run: exact match (0 or 1) of each item in the one study and in the other}. Raises LetheError where the items differ."""
    found = {}
    shared = {run.folder for run in trained_runs(one)} & {run.folder for run in trained_runs(other)}
    for run in trained_runs(one):
        files = [cell_file(root, run, run.task) for root in (one, other)]
        if run.folder not in shared or not all(file.is_file() for file in files):
            continue
        items = [read_jsonl(file) for file in files]
        if [item["prompt"] for item in items[0]] != [item["prompt"] for item in items[1]]:
            raise LetheError(f"{files[0]} and {files[1]} are of other items; score both studies on the same data")
        found[run.folder] = tuple(np.array([float(item["exact_match"]) for item in rows]) for rows in items)
    if not found:
        raise LetheError(f"{one} and {other} share no scored run")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--out", help="a file for the JSON of the last line")
    arguments = parser.parse_args(argv)

    def work() -> None:
        pairs = paired_items(arguments.one, arguments.other)
        pairs["all"] = tuple(np.concatenate(side) for side in zip(*pairs.values(), strict=True))
        rows, result = [], {}
        for name, (a, b) in pairs.items():
            found = compare_items(a, b)
            result[name] = {"n": len(a), "one": a.mean(), "other": b.mean(), **found}
            interval = f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}"
            rows.append([name, len(a), f"{100 * a.mean():.1f}", f"{100 * b.mean():.1f}", f"{100 * found['difference']:+.1f}", interval,
                         f"{found['p']:.4f}"])  # fmt: skip
        headers = ["run", "items", arguments.one.name, arguments.other.name, "difference", "95 % over items", "p"]
        print(format_table(rows, headers))
        finish({"benchmark": "paired", "one": str(arguments.one), "other": str(arguments.other), "runs": result}, arguments.out)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
