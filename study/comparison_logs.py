"""The log and history files of the optimizer comparison, under the names of seed 001, from what the runs' folders hold."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from study.comparison_points import STATES, Scored
from study.folder import read_json, seed_folders, write_json, write_text

ABOUT_TENSORBOARD = "TensorBoard's files are in {}; this file system has no links.\n\n    tensorboard --logdir {}\n"


def write_logs(root: Path, scored: list[Scored], rows: list[dict]) -> None:
    """logs/training.log, experiment_metadata.json, training_history.json, evaluation_history.json, and tensorboard_logs."""
    logs, runs = root / "logs", [one for one in scored if one.optimizer]
    write_text(logs / "training.log", training_log(runs))
    write_json(logs / "experiment_metadata.json", metadata(root, runs))
    write_json(logs / "training_history.json", {"runs": [{**_who(one), **_columns(one)} for one in runs]}, indent=None)
    write_json(logs / "evaluation_history.json", evaluation_history(runs, rows))
    link_tensorboard(root)


def _who(one: Scored) -> dict:
    return {"seed": one.seed, "run": one.folder, "optimizer": one.optimizer, "learning_rate": one.learning_rate,
            "stage": one.run["stage"], "task": one.run["second"] or one.run["first"]}  # fmt: skip


def training_log(runs: list[Scored]) -> str:
    """One line per logged step of every run, in the order of time (UTC)."""
    lines = []
    for one in runs:
        for row in one.log:
            values = [f"{name.removeprefix('train/')} {value:.6g}" for name, value in row.items()
                      if name not in ("step", "time") and isinstance(value, (int, float))]  # fmt: skip
            moment = datetime.fromtimestamp(row.get("time", 0), UTC).strftime("%Y-%m-%d %H:%M:%S")
            where = f"seed {one.seed} {one.folder}"
            lines.append((row.get("time", 0), where, row["step"], f"{moment} | {where} | step {row['step']} | {' | '.join(values)}\n"))
    return "".join(line for *_, line in sorted(lines))


def _columns(one: Scored) -> dict:
    """metrics.jsonl by columns: those logged steps that have a loss."""
    steps = [row for row in one.log if row.get("train/loss") is not None]
    names = list(dict.fromkeys(name for row in steps for name in row))
    return {name.removeprefix("train/"): [row.get(name) for row in steps] for name in names}


def evaluation_history(runs: list[Scored], rows: list[dict]) -> dict:
    """final: the scores of every state on all test items; while_training: on the first few, every so many steps."""
    during = []
    for one in runs:
        for row in one.log:
            found: dict[str, dict] = {}
            for tag, value in row.items():
                if tag.startswith("eval/"):
                    task, _, metric = tag.removeprefix("eval/").rpartition("/")
                    found.setdefault(task, {})[metric] = value
            during += [{**_who(one), "step": row["step"], "scored": task, **values} for task, values in found.items()]
    names = ("seed", "optimizer", "learning_rate", "first", "second", "task", "metric", "value", "low", "high", "n", "unparsed")
    return {"final": [{"state": STATES[row["stage"]], **{name: row[name] for name in names}} for row in rows], "while_training": during}


def metadata(root: Path, runs: list[Scored]) -> dict:
    """What was asked and where it ran (study.json of every seed), and how every run went."""
    studies = {tree.name if tree != root else "study": read_json(tree / "study.json") for tree in seed_folders(root)}
    names = ("steps", "tokens", "seconds", "examples", "final_loss", "partition", "dtype", "memory_gib")
    return {"studies": studies, "runs": [{**_who(one), **{name: one.record.get(name) for name in names}} for one in runs]}


def link_tensorboard(root: Path) -> None:
    """tensorboard_logs, the seed's name: a link to tensorboard/, over several seeds a folder of links, else a note."""
    link, trees = root / "tensorboard_logs", seed_folders(root)
    links = {link: "tensorboard"} if trees == [root] else {link / tree.name: f"../{tree.name}/tensorboard" for tree in trees}
    for place, target in links.items():
        if place.is_symlink() and os.readlink(place) == target:
            continue
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.symlink_to(target, target_is_directory=True)
        except OSError:  # file systems without links, Windows without the right to make them
            where = target.removeprefix("../")
            write_text(link / "README.md", ABOUT_TENSORBOARD.format(where if trees == [root] else "seed*/tensorboard", root))
