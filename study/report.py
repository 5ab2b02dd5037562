"""The results of a study: its table, results file and pictures, from the scored cells in its folder."""

from __future__ import annotations

from pathlib import Path

from metrics.summary import summarise
from study.comparison import report_comparison
from study.errors import LetheError
from study.folder import read_json, read_jsonl, seed_folders, write_json
from study.forgetting import ABOUT, fg_table
from study.forgetting import study_rows as fg_study_rows
from study.general import draw_general, general_table, read_column
from study.general import result_rows as general_rows
from study.growth import report_models
from study.growth_plots import draw_growth
from study.logging import RunLog
from study.plan import Run, in_order
from study.plots import draw_all
from study.results import summary_table
from study.sequence import matrix_record, read_sequences, sequence_table
from study.sequence_plots import draw_sequences
from study.text_scores import signature_lines, text_cells, text_table


def trained_runs(tree: Path) -> list[Run]:
    """The finished runs of a study, as their manifests say, stage 1 first."""
    found = [read_json(file) for file in sorted(tree.glob("**/run.json"))]
    return in_reading_order([Run(**record["run"]) for record in found if record.get("status") == "done"])


def in_reading_order(runs: list[Run]) -> list[Run]:
    arms = in_order(run.arm for run in runs)
    return sorted(runs, key=lambda run: (run.stage, run.first, run.second or "", arms.index(run.arm)))


def cell_file(tree: Path, run: Run | None, task: str) -> Path:
    return tree / (run.folder if run else "base") / "eval" / f"{task}.jsonl"


def result_rows(tree: Path, seed: int) -> list[dict]:
    """All scored cells of one tree as rows {run, arm, stage, first, second, task, metric, value, low, high, n, unparsed, seed}."""
    rows, order = [], list(read_json(tree / "study.json")["tasks"])
    for run in [None, *(run for run in trained_runs(tree) if not run.changes)]:
        folder = run.folder if run else "base"
        who = {"run": folder, "arm": run.arm if run else "base", "stage": run.stage if run else 0,
               "first": run.first if run else None, "second": run.second if run else None}  # fmt: skip
        files = [tree / folder / "eval" / f"{task}.jsonl" for task in order]
        for file in filter(Path.is_file, files):
            rows += [{**who, "task": file.stem, **row, "seed": seed} for row in summarise(read_jsonl(file))]
    return rows


def dropped_shares(trees: list[Path]) -> dict[str, float]:
    """Of every finished run of stage 2: the share of completion tokens that its mask dropped, mean over the seeds' trees."""
    dropped: dict[str, float] = {}
    for tree in trees:
        for file in tree.glob("**/run.json"):
            record = read_json(file)
            if record.get("status") == "done" and record["run"]["stage"] == 2:
                folder = record["run"]["folder"]
                dropped[folder] = dropped.get(folder, 0.0) + record["mask"]["dropped_share"] / len(trees)
    return dropped


def report(root: Path, quiet: bool = False) -> list[dict]:
    """Writes eval_results_mask.json and the pictures of a study (over its seeds too), logs them, prints the table.

    The results of an optimizer study are study.comparison's.
    """
    trees = seed_folders(root)
    trained = trained_runs(trees[0])
    if read_json(trees[0] / "study.json")["identity"]["settings"].get("study") == "sequences":
        report_sequences(root, trees, quiet)
        report_general(root, trees, root / "sequence_plots", quiet)
        return []
    compared = [run for run in trained if run.changes]
    if compared:
        report_comparison(root, quiet)
        if compared == trained:
            report_general(root, trees, root / "logs", quiet)
        log_pictures(root, sorted((root / "logs").glob("*.png")))
        if compared == trained:
            return []
    rows = []
    for tree in trees:
        seed = read_json(tree / "study.json")["identity"]["settings"]["seed"]
        mine = result_rows(tree, seed)
        rows += mine
        if tree != root:
            write_json(tree / "eval_results_mask.json", {"results": mine})
            draw_all(mine, tree / "performance_matrices_mask")
    if rows and not quiet:  # first: a folder that cannot be written to still has its table
        print("\n" + summary_table(rows, dropped_shares(trees)), flush=True)
        if table := text_table(text_cells(rows)):
            print("\n" + "\n".join([table, *signature_lines(rows)]), flush=True)
    pictures = draw_all(rows, root / "performance_matrices_mask") if rows else []
    general, more = report_general(root, trees, root / "performance_matrices_mask", quiet)
    if not rows and not general:
        raise LetheError(f"{root}: nothing is scored yet; run python train.py first")
    pictures += more
    log_pictures(root, pictures)
    write_json(root / "eval_results_mask.json", {"results": rows, "general": general})  # last: is_reported goes by it
    if not quiet:
        print(f"\nresults    {root / 'eval_results_mask.json'}")
        print(f"pictures   {root / 'performance_matrices_mask'}/ ({len(pictures)})")
        print(f"curves     tensorboard --logdir {root / 'tensorboard' if len(trees) == 1 else root}")
    return rows


def report_sequences(root: Path, trees: list[Path], quiet: bool) -> None:
    """Table, matrix.json and pictures of a study of sequences."""
    found, kinds = [], {}
    for tree in trees:
        record = read_json(tree / "study.json")
        kinds |= record["kinds"]
        found += read_sequences(tree, record["identity"]["settings"]["seed"], trained_runs(tree), kinds)
    if not found:
        raise LetheError(f"{root}: no sequence is trained and scored to its end yet; run the same train.py command again")
    if not quiet:
        print("\n" + sequence_table(found), flush=True)
    pictures = draw_sequences(found, root / "sequence_plots")
    log_pictures(root, pictures)
    write_json(root / "matrix.json", matrix_record(found))
    if not quiet:
        print(f"\nresults    {root / 'matrix.json'}\npictures   {root / 'sequence_plots'}/ ({len(pictures)})")


def report_general(root: Path, trees: list[Path], folder: Path, quiet: bool) -> tuple[list[dict], list[Path]]:
    """Table and picture of every column of general ability; its rows (also in general_results.json), and the pictures."""
    studied = [(tree, read_json(tree / "study.json"), trained_runs(tree)) for tree in trees]
    rows, pictures = [], []
    for name in dict.fromkeys(name for _, record, _ in studied for name in record.get("columns", {})):
        scored = read_column([(tree, record["identity"]["settings"]["seed"], runs) for tree, record, runs in studied], name)
        if not scored:
            continue
        rows += general_rows(scored, name)
        if not quiet:
            print("\n" + general_table(scored, name), flush=True)
        pictures.append(draw_general(scored, name, folder))
    columns = list(dict.fromkeys(row["task"] for row in rows))
    forgotten = fg_study_rows([(tree, record["identity"]["settings"]["seed"], runs) for tree, record, runs in studied], columns)
    if forgotten and not quiet:
        print("\n" + fg_table(forgotten), flush=True)
    if rows:
        fg = {"fg": forgotten, "about": ABOUT} if forgotten else {}
        write_json(root / "general_results.json", {"results": rows, **fg})
    return rows, pictures


def report_growth(root: Path) -> None:
    """Tables, growth_results.json and one page of pictures of a study of several models."""
    curves, models = report_models(root, trained_runs)
    picture = draw_growth(curves, models, root)
    log_pictures(root, [picture])
    print(f"\nresults    {root / 'growth_results.json'}\npictures   {picture}")


def log_pictures(root: Path, pictures: list[Path]) -> None:
    with RunLog(root, "study") as log:
        for path in pictures:
            log.picture(path.stem, path)


def is_reported(root: Path) -> bool:
    """True when results and pictures have been made since the last cell was scored."""
    results = root / "eval_results_mask.json"
    if not results.is_file():
        results = root / "eval_results_optimizers.json"
    if not results.is_file():
        results = root / "matrix.json"
    return results.is_file() and all(file.stat().st_mtime_ns <= results.stat().st_mtime_ns for file in root.glob("**/eval/*.jsonl"))
