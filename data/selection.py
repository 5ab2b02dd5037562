"""Which records of a task to keep for rehearsal: exactly as many as asked for, drawn at random or spread over clusters.

    python -m data.selection --input rows.jsonl --count 200 --method kmeans --model nano --out kept.jsonl
    python -m data.selection --input rows.jsonl --count 200 --method kmeans --vectors vectors.npy --balance short --out kept.jsonl

kmeans is the selection of Self-Synthesized Rehearsal (arXiv 2403.01244): clusters of the inputs' embeddings, a quota for each by its
size, the items nearest to the centroid. Three things differ: copies are set aside first, quotas are by largest remainder, so that
the sum is exact, and any embedding does. Its authors find random as good.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.records import Record, Report, as_row, to_records
from data.rows import iter_rows
from data.vectors import inputs_of, likeness, load_vectors, pooled_states, prompt_text
from metrics.answers import KINDS, extract_answer
from metrics.text import collapse
from model.pooling import unit
from model.subject import load_subject
from study.errors import LetheError, run_command
from study.folder import write_jsonl

METHODS = ("random", "kmeans")
NEAR = 0.95  # cosine above which an item is a near copy


@dataclass
class Selection:
    """What select did. clusters: (size, quota) of each; labels: label -> (candidates, chosen); short: labels with less than their share."""

    records: int = 0
    excluded: int = 0
    copies: int = 0
    near: int = 0  # near copies, set aside
    used_near: int = 0  # of them, taken after all because the others were too few
    unlabelled: int = 0
    chosen: int = 0
    clusters: list[tuple[int, int]] = field(default_factory=list)
    labels: dict[str, tuple[int, int]] = field(default_factory=dict)
    short: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {"excluded": self.excluded, "copies": self.copies, "near copies": self.near, "without a label": self.unlabelled}
        told = ", ".join(f"{what} {n}" for what, n in counts.items() if n)
        lines = [f"{self.chosen} of {self.records} records" + (f"; left out: {told}" if told else "")]
        if self.used_near:
            lines.append(f"  {self.used_near} of the near copies are among them: the others were too few")
        if self.clusters:
            lines.append("  clusters (size:chosen)  " + "  ".join(f"{size}:{quota}" for size, quota in self.clusters))
        for label, (size, chosen) in self.labels.items():
            lines.append(f"  label {label}: {chosen} of {size}" + " (all there are)" * (label in self.short))
        return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Selecting


def select(
    records: Sequence[Record], count: int, method: str, *, seed: int = 0, vectors: np.ndarray | None = None, clusters: int = 20,
    labels: list[str] | None = None, exclude: Collection[str] = (), near: float = NEAR, report: Selection | None = None,
) -> list[int]:  # fmt: skip
    """Indices of exactly `count` records, ascending; the same ones for the same arguments.

    Records whose prompt_key is in `exclude` (those of demonstrations) or that of an earlier record are left out. method:

        random  a seeded permutation's first: with a larger count the same ones and more
        kmeans  of vectors (N, d) float, scaled to length 1: near copies (cosine above `near` with one that stays) are set aside;
                min(clusters, count) clusters, their quotas by size, within each the nearest to its centroid. Near copies fill
                up what is missing then, the least alike first.

    labels (N): equal shares of each; one with too few items gives all it has and the others more, and the report says so. "" is
    no label, such a record is left out. clusters are shared out among the labels. Raises LetheError where fewer than `count` are left.
    """
    report = Selection() if report is None else report
    if method not in METHODS:
        raise LetheError(f"--method {method!r} is unknown; known: {', '.join(METHODS)}")
    if count < 1 or clusters < 1:
        raise LetheError(f"{'--count' if count < 1 else '--clusters'} must be 1 or more")
    if labels is not None and len(labels) != len(records):
        raise LetheError(f"{len(labels)} labels for {len(records)} records")
    vectors = _checked(vectors, len(records)) if method == "kmeans" else None
    report.records = len(records)
    left = _distinct(records, exclude, report)
    groups = {"all": left} if labels is None else {}
    for i in left if labels is not None else ():
        groups.setdefault(labels[i], []).append(i)
    report.unlabelled = len(groups.pop("", []))
    if len(left) - report.unlabelled < count:
        told = f"{report.excluded} are excluded, {report.copies} copies of another, {report.unlabelled} without a label"
        raise LetheError(f"--count {count}: of {len(records)} records {len(left) - report.unlabelled} are left ({told}); ask for fewer")
    names = sorted(groups)
    shares = equal_shares([len(groups[name]) for name in names], count)
    chosen: list[int] = []
    for number, (name, share) in enumerate(zip(names, shares, strict=True)):
        if method == "random":
            order = np.random.default_rng((seed, number)).permutation(len(groups[name]))
            mine = [groups[name][k] for k in order[:share]]
        else:
            mine = _spread(groups[name], share, vectors, -(-clusters // len(names)), seed, near, report)
        chosen += mine
        if labels is not None:
            report.labels[name] = len(groups[name]), share
            if share < count // len(names):
                report.short.append(name)
    report.chosen = len(chosen)
    return sorted(chosen)


def quotas(sizes: list[int], budget: int) -> list[int]:
    """How many of each cluster: proportional to its size, `budget` in all, by largest remainder (Hamilton); ties to the first.

    Never more than the cluster has. In whole numbers, so exact. Raises ValueError for a budget that is negative or above the sum.
    """
    total = sum(sizes)
    if not 0 <= budget <= total:
        raise ValueError(f"a budget of {budget} out of {total}")
    shares = [divmod(budget * size, total) if total else (0, 0) for size in sizes]  # (floor, remainder in units of 1 / total)
    found = [floor for floor, _ in shares]
    for i in sorted(range(len(sizes)), key=lambda i: -shares[i][1])[: budget - sum(found)]:
        found[i] += 1
    return found


def equal_shares(sizes: list[int], budget: int) -> list[int]:
    """How many of each label: as equal as the sizes allow, `budget` in all; what is left over goes to the first of the smallest."""
    if not 0 <= budget <= sum(sizes):
        raise ValueError(f"a budget of {budget} out of {sum(sizes)}")
    found = [0] * len(sizes)
    for rank, i in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        found[i] = min(sizes[i], -(-budget // (len(sizes) - rank)))  # a fair share of what is left, rounded up
        budget -= found[i]
    return found


def _distinct(records: Sequence[Record], exclude: Collection[str], report: Selection) -> list[int]:
    """Indices of the records whose prompt is neither excluded nor that of an earlier one."""
    seen, left = set(), []
    for i, record in enumerate(records):
        key = prompt_key(record)
        if key in exclude:
            report.excluded += 1
        elif key in seen:
            report.copies += 1
        else:
            left.append(i)
        seen.add(key)
    return left


def _spread(group: list[int], count: int, vectors: np.ndarray, clusters: int, seed: int, near: float, report: Selection) -> list[int]:
    """`count` of a group's indices by k-means over its vectors that are no near copies."""
    if not count:
        return []
    x = vectors[group]
    alike = likeness(x, near)
    own, rest = np.flatnonzero(alike <= near), np.flatnonzero(alike > near)
    report.near += len(rest)
    picked = own
    if len(own) > count:
        assigned, distances = _cluster(x[own], min(clusters, count), seed)
        members = [np.flatnonzero(assigned == c) for c in range(assigned.max() + 1)]
        parts = quotas([len(part) for part in members], count)
        report.clusters += [(len(part), quota) for part, quota in zip(members, parts, strict=True)]
        nearest = [part[np.argsort(distances[part], kind="stable")[:quota]] for part, quota in zip(members, parts, strict=True)]
        picked = own[np.concatenate(nearest)]
    missing = rest[np.argsort(alike[rest], kind="stable")[: count - len(picked)]]
    report.used_near += len(missing)
    return [group[k] for k in [*picked, *missing]]


def _cluster(x: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(cluster of each row of x (N, d), numbered without gaps; its distance to that cluster's centroid), (N,) each."""
    try:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits
    except ImportError:
        raise LetheError("--method kmeans needs scikit-learn: pip install scikit-learn") from None
    with threadpool_limits(1):  # several threads add up in whatever order they end
        fitted = KMeans(min(clusters, len(np.unique(x, axis=0))), n_init="auto", random_state=seed).fit(x)
    _, assigned = np.unique(fitted.labels_, return_inverse=True)
    return assigned, np.linalg.norm(x - fitted.cluster_centers_[fitted.labels_], axis=1)


def _checked(vectors: np.ndarray | None, count: int) -> np.ndarray:
    if vectors is None:
        raise LetheError("--method kmeans needs vectors: give --model or --vectors")
    if vectors.ndim != 2 or len(vectors) != count:
        raise LetheError(f"vectors of shape {vectors.shape} do not fit {count} records: one row each is needed")
    vectors = np.asarray(vectors, dtype=np.float64)
    if not np.isfinite(vectors).all():
        raise LetheError(f"vectors: row {int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])} holds NaN or infinity")
    return unit(vectors)


# ----------------------------------------------------------------------------------------------------------------------
# What is told apart


def prompt_key(record: Record) -> str:
    """What "the same prompt" means here: equal but for case and white space. Signs stay, x + 1 is not x - 1."""
    return collapse(prompt_text(record)).lower()


def labels_of(records: Sequence[Record], kind: str) -> list[str]:
    """The answer of each record as a class, read as `kind` says (metrics/answers.py); "" where it cannot be read."""
    return [extract_answer(kind, record.answer) or "" for record in records]


# ----------------------------------------------------------------------------------------------------------------------
# The command


def read_rows(path: str | Path, report: Report) -> list[tuple[dict, Record]]:
    """(row, record) of a file: the row as it stands there, or as_row where one row gives several records. Turns may be [role, text]."""
    found = []

    def on_bad(where: str, reason: str) -> None:
        report.rows += 1
        report.drop(where, reason)

    report.path = str(path)
    for where, row in iter_rows(path, on_bad):
        records = list(to_records(row, where, report))
        found += [(row if len(records) == 1 else as_row(record), record) for record in records]
    if not found:
        first = f"; the first: {': '.join(report.dropped[0])}" if report.dropped else ""
        raise LetheError(f"{path}: no record among {report.rows} rows{first}")
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise LetheError(f"{message}; see python -m data.selection --help")


def _parse(argv: list[str]) -> argparse.Namespace:
    lines = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m data.selection", description=__doc__, formatter_class=lines, allow_abbrev=False)
    parser.add_argument("--input", required=True, metavar="F", help="rows in any format that training reads")
    parser.add_argument("--out", required=True, metavar="F", help="the chosen rows, json lines")
    parser.add_argument("--count", required=True, type=int, metavar="N", help="how many")
    parser.add_argument("--method", default="random", choices=METHODS)
    parser.add_argument("--model", metavar="M", help="kmeans: on this model's mean hidden states; nano, a folder or a hub id")
    parser.add_argument("--vectors", metavar="F", help="kmeans: on these, of any embedder: .npy or .safetensors, a row for each record")
    parser.add_argument("--clusters", type=int, default=20, metavar="N", help="of kmeans (20)")
    parser.add_argument("--near", type=float, default=NEAR, metavar="X", help=f"kmeans: cosine of near copies ({NEAR}); 1: there are none")
    parser.add_argument("--balance", choices=KINDS, metavar="KIND", help=f"equal shares of each answer, read as {', '.join(KINDS)}")
    parser.add_argument("--exclude", metavar="F", help="records whose prompts are not to be chosen, such as demonstrations")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    def work() -> None:
        args, read, report = _parse(sys.argv[1:] if argv is None else argv), Report(), Selection()
        if args.seed < 0:
            raise LetheError(f"--seed {args.seed}: a whole number from 0 on")
        if args.method == "kmeans" and bool(args.model) == bool(args.vectors):
            raise LetheError("--method kmeans: give --model or --vectors" + (", not both" if args.model else ""))
        rows, records = zip(*read_rows(args.input, read), strict=True)
        exclude = {prompt_key(record) for _, record in read_rows(args.exclude, Report())} if args.exclude else ()
        vectors = None
        if args.method == "kmeans" and args.vectors:
            vectors = load_vectors(args.vectors)
        elif args.method == "kmeans":
            vectors = pooled_states(load_subject(args.model, args.device, args.dtype), inputs_of(records))
        chosen = select(
            records, args.count, args.method, seed=args.seed, vectors=vectors, clusters=args.clusters, near=args.near,
            labels=labels_of(records, args.balance) if args.balance else None, exclude=exclude, report=report,
        )  # fmt: skip
        write_jsonl(args.out, [rows[i] for i in chosen])
        if read.dropped_count:
            print(read)
        print(f"{report}\nwrote {args.out}")

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
