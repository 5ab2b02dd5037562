"""Probabilistic fine-tuning: the predictions of an ensemble of adapters, and of dropout that is left on, beside those of single adapters.

    deterministic   each seed's adapter alone; scores are means over the seeds
    ensemble        the mean over the seeds' adapters of their probabilities (deep ensembles, arXiv:1612.01474; of LoRA: arXiv:2310.00035)
    mc_dropout      the mean over passes of one adapter whose LoRA dropout is on (arXiv:1506.02142), for each seed's adapter

An item's prediction is a softmax over its options of their log likelihood, summed over an option's tokens. A study's seeds are the
members: seeds differ in the first factors and in the order of the data.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from data.benchmarks import Benchmark
from data.choices import choice_questions
from data.folder import Task
from data.questions import as_questions
from lora.adapter import load_adapter
from lora.ensemble import load_ensemble
from lora.layers import dropout_keys
from lora.states import put_on, state_fingerprint
from model.choices import Question, RowKeys, score_copies
from model.llama import Llama
from model.tokenizer import Tokenizer
from study.errors import LetheError
from study.folder import read_json, write_json
from study.logging import say
from study.plan import Run, cells_to_score
from study.reliability import cell_rows

FOLDER = "probabilistic"  # of a study: what was predicted, results and pictures


@dataclass(frozen=True)
class Column:
    """Multiple-choice items as token ids, of a task or of a column of general ability. left_out: items that have no options."""

    name: str
    questions: list[Question]
    gold: list[int]
    left_out: int = 0
    general: bool = False  # of general ability: every run is scored on it


def columns_of(
    tasks: Sequence[Task], benchmarks: Sequence[Benchmark], tokenizer: Tokenizer, max_length: int, max_test: int | None = None
) -> dict[str, Column]:
    """Those of the tasks and columns that have options to choose from, by name."""
    found = {}
    for task in tasks:
        questions, gold, left_out = choice_questions(task.test[:max_test], tokenizer, max_length)
        if questions:
            found[task.name] = Column(task.name, questions, gold, left_out)
    for column in benchmarks:
        if column.items and column.spec.get("by") != "generate":
            questions, _ = as_questions(column.items, tokenizer, max_length)
            found[column.name] = Column(column.name, questions, [item.gold for item in column.items], general=True)
    return found


def predict(model: Llama, questions: list[Question], copies: int = 1, keys: RowKeys | None = None, on_done=None) -> np.ndarray:
    """(copies, n, k) float64: the probabilities of each question's options, 0 behind the last where others have more.

    The model's adapter says what the copies are: members of an Ensemble; or one adapter, whose dropout is on with keys.
    """
    found = score_copies(model, questions, copies, keys=keys, on_done=on_done)
    logprobs = np.full((copies, len(questions), max(len(q.options) for q in questions)), -np.inf)
    for copy, rows in enumerate(found):
        for number, row in enumerate(rows):
            logprobs[copy, number, : len(row)] = [one.logprob for one in row]
    p = np.exp(logprobs - logprobs.max(2, keepdims=True))
    return p / p.sum(2, keepdims=True)


def sample_keys(seed: int, count: int, first: int = 0) -> RowKeys:
    """The dropout masks of Monte-Carlo samples first, first + 1, … of a seed, for count questions: other ones for every token of each."""

    def keys(copies: Tensor, questions: Tensor, places: Tensor) -> Tensor:
        return dropout_keys(seed, 0, (copies + first) * count + questions, places)

    return keys


def predict_members(model: Llama, folders: Sequence[Path], columns: Sequence[Column]) -> list[np.ndarray]:
    """Each column's probabilities (K, n, k) under the adapters of K folders, all in one pass."""
    count = len(folders)
    put_on(model, folders[0]) if count == 1 else load_ensemble(model, folders)
    return [predict(model, column.questions, count) for column in columns]


def predict_samples(
    model: Llama, folder: Path, columns: Sequence[Column], samples: int, dropout: float | None, seed: int
) -> list[np.ndarray]:
    """Each column's probabilities (samples, n, k) under one adapter with its dropout on. dropout: other than the adapter's own rate."""
    load_adapter(model, folder, dropout)
    if not model.adapter.dropout:
        raise LetheError(
            f"{folder}: its LoRA dropout is 0, so all Monte-Carlo passes would be the same; give --mc_dropout 0.1, or --mc_samples 0"
        )
    return [predict(model, column.questions, samples, sample_keys(seed, len(column.questions))) for column in columns]


def predictions(
    model: Llama, root: Path, run: str | None, folders: Sequence[Path], seeds: Sequence[int], columns: Sequence[Column],
    samples: int, dropout: float | None,
) -> dict[str, dict]:  # fmt: skip
    """What one run of every seed predicts, {column: {"gold", "members" (K, n, k), "samples" (K, S, n, k) or None}}; run None: the base.

    Kept in {root}/probabilistic/{run}/, and read from there where nothing has changed.
    """
    files = {column.name: root / FOLDER / (run or "base") / f"{column.name}.json" for column in columns}
    adapters = [state_fingerprint(folder) for folder in folders]
    settings = {"adapters": adapters, "seeds": list(seeds), "mc_samples": samples if run else 0, "mc_dropout": dropout}
    found, todo = {}, []
    for column in columns:
        content = json.dumps([[q.prompt, q.options] for q in column.questions]) + json.dumps(column.gold)
        mine = {**settings, "base": model.fingerprint, "items": hashlib.sha256(content.encode()).hexdigest()[:16]}
        kept = read_json(files[column.name], default={})
        if kept.get("settings") == mine:
            found[column.name] = {key: None if kept[key] is None else np.array(kept[key]) for key in ("gold", "members", "samples")}
        else:
            todo.append((column, mine))
    if todo:
        asked, drawn = [column for column, _ in todo], []
        if run is None:
            put_on(model, None)
            members = [predict(model, column.questions) for column in asked]
        else:
            members = predict_members(model, folders, asked)
            if samples:
                each = zip(folders, seeds, strict=True)
                drawn = [predict_samples(model, folder, asked, samples, dropout, seed) for folder, seed in each]
        put_on(model, None)
        for number, (column, mine) in enumerate(todo):
            made = {"gold": np.array(column.gold), "members": short(members[number]),
                    "samples": short(np.stack([one[number] for one in drawn])) if drawn else None}  # fmt: skip
            plain = {key: None if value is None else value.tolist() for key, value in made.items()}
            write_json(files[column.name], {"settings": mine, **plain}, indent=None)
            found[column.name] = made
    return {column.name: found[column.name] for column in columns}


def short(p: np.ndarray) -> np.ndarray:
    """With nine significant digits, so that files are small; a loss also needs those of probabilities near 0."""
    return np.vectorize(lambda value: float(f"{value:.9g}"), otypes=[float])(p)


def arms_of(found: dict) -> dict[str, np.ndarray]:
    """{arm: probabilities (m, n, k)} of what predictions gives for one column. The scores of m rows are averaged, not the rows."""
    arms = {"deterministic": found["members"]}
    if len(found["members"]) > 1:
        arms["ensemble"] = found["members"].mean(0, keepdims=True)
    if found["samples"] is not None:
        arms["mc_dropout"] = found["samples"].mean(1)
    return arms


def score_probabilistic(
    model: Llama, root: Path, trees: Sequence[Path], seeds: Sequence[int], runs: Sequence[Run], columns: dict[str, Column],
    samples: int, dropout: float | None = None,
) -> list[dict]:  # fmt: skip
    """Scores the base, and every run under each arm, on the columns (tasks as a study scores them, general columns always).

    runs: those that the trees of all seeds have. Returns study.reliability's rows; prints a line a run.
    """
    if not columns:
        raise LetheError(f"{root}: none of its tasks lists options to choose from, and --probabilistic scores these; add --mmlu mini_mmlu")
    if not runs:
        raise LetheError(f"{root}: no run is trained under all of its seeds ({', '.join(map(str, seeds))}); run the same train.py again")
    for folder in (tree / run.folder for run in runs for tree in trees):
        if not (folder / "adapter_model.safetensors").is_file():
            raise LetheError(f"{folder} holds no adapter: --probabilistic compares LoRA adapters, and this study trained all weights")
    for column in columns.values():
        if column.left_out:
            say(f"{column.name}: {column.left_out} items list no options, or not their answer among them; they are left out")
    rows, cells = [], cells_to_score(list(runs), [name for name, column in columns.items() if not column.general])
    for number, run in enumerate((None, *runs)):
        began, folder = time.perf_counter(), run.folder if run else None
        wanted = [column for name, column in columns.items() if column.general or (run, name) in cells]
        found = predictions(model, root, folder, [tree / folder for tree in trees] if run else [], seeds, wanted, samples, dropout)
        for name, one in found.items():
            spread = {"ensemble": one["members"][None]} | ({} if one["samples"] is None else {"mc_dropout": one["samples"]})
            rows += cell_rows(run, name, arms_of(one), spread, one["gold"])
        told = "  ".join(f"{column.name} ({len(column.gold)})" for column in wanted)
        print(f"{number:3d}/{len(runs)} {folder or 'base':36s} {told}  {time.perf_counter() - began:6.1f} s", flush=True)
    return rows
