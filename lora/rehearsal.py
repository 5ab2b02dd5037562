"""The rows of earlier tasks that a later stage rehearses: real ones, invented ones, with their own answers or a model's.

study/sequence.py names the arms. Rows lie in rehearsal/{arm}/{order}/{k}_{task}.jsonl; what the base has invented of a task, which no
arm or order changes, in synthetic/{task}.jsonl. Each file is made once, and one that was cut goes on where it was.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from data.folder import Task
from data.pairs import Limits
from data.records import Record, as_row, load_records
from data.refine import Refinement, refine
from data.selection import inputs_of, pooled_states, prompt_key, select
from data.superni import definition_of, demonstrations, labels_of
from data.synthesis import read_items, synthesize
from lora.layers import merged
from lora.states import put_on
from model.subject import Subject
from study.errors import LetheError
from study.folder import one_at_a_time, write_jsonl
from study.logging import say
from study.plan import Run
from study.sequence import SYNTHETIC, WRITTEN
from study.settings import RehearsalConfig


def rehearsal_file(tree: Path, run: Run, place: int, settings: RehearsalConfig) -> Path:
    """Of the run's place-th earlier task (from 1 on)."""
    when = f"{run.stage}/" if settings.relabel == "every_stage" and run.arm in WRITTEN else ""
    return tree / "rehearsal" / run.arm / run.order / f"{when}{place}_{run.past[place - 1]}.jsonl"


def folder_after(run: Run, stage: int) -> str:
    """The run folder of an earlier stage of the same sequence."""
    return f"lora_base/{run.past[0]}" if stage == 1 else f"sequence/{run.arm}/{run.order}/{stage}_{run.past[stage - 1]}"


def rehearse(
    subject: Subject, tree: Path, run: Run, tasks: dict[str, Task], settings: RehearsalConfig, *, max_train: int | None, max_length: int,
    batch_size: int, seed: int,
) -> dict[str, list[Record]]:  # fmt: skip
    """The rows of every earlier task that this run trains on beside its own, made where they are not there yet.

    Leaves some model on the subject: whoever trains puts on what it starts from. Raises LetheError for a task without rows to
    replay, and where the base cannot invent enough.
    """
    found = {}
    for place, name in enumerate(run.past, 1):
        if name == run.task or name in run.past[place:]:
            continue  # it is trained on here, or the model knew it better at a later stage
        file = rehearsal_file(tree, run, place, settings)
        if not file.is_file():
            rows = list(islice(tasks[name].train(), max_train))
            chosen = _chosen(subject, tree, run.arm, tasks[name], rows, settings, batch_size, seed)
            if run.arm in WRITTEN:
                put_on(subject.model, tree / (folder_after(run, place) if settings.relabel == "once" else run.parent))
                report = Refinement()
                with nullcontext() if subject.model.quantized else merged(subject.model):
                    task, answers = tasks[name], file.with_suffix(".answers.jsonl")
                    chosen = refine(
                        subject, chosen, max_new_tokens=task.max_new_tokens, out=answers, batch_size=batch_size, floor=settings.floor,
                        max_length=max_length, answer_kind=task.answer_kind, report=report,
                    )  # fmt: skip
                say(f"rehearse   {run.arm} {name}: {report}")
                if not chosen:
                    lower = "" if settings.floor is None else ", or give a lower --floor and another --out"
                    mend = f"leave this arm out with --rehearsal{lower}"
                    raise LetheError(f"--rehearsal {run.arm}: not one of {report.records} answers for {name} can be used; {mend}")
            write_jsonl(file, [as_row(record) for record in chosen])
        found[name] = load_records(file)
    return found


def _chosen(
    subject: Subject, tree: Path, arm: str, task: Task, rows: list[Record], settings: RehearsalConfig, batch_size: int, seed: int
) -> list[Record]:
    """The rows before a model has written their answers."""
    if arm == "mtl":
        return rows
    if arm == "replay":
        if task.replay is None:
            raise LetheError(f"--rehearsal replay: {task.name} comes without rows for it (…_train_1p.json); prepare the task again")
        return list(task.replay())
    count = max(1, round(settings.share * len(rows)))
    demos = demonstrations(task, settings.demos, seed)
    if arm in SYNTHETIC:
        rows = synthetic(subject, tree, task, demos, round(settings.pool * count), settings, batch_size, seed)
    vectors = None
    if arm in ("kmeans", "ssr"):
        put_on(subject.model, None)
        vectors = pooled_states(subject, inputs_of(rows))
    picked = select(
        rows, count, "random" if vectors is None else "kmeans", seed=seed, vectors=vectors, clusters=settings.clusters,
        labels=labels_of(rows), exclude={prompt_key(demo) for demo in demos} if arm in SYNTHETIC else (),
    )  # fmt: skip
    return [rows[i] for i in picked]


def synthetic(
    subject: Subject, tree: Path, task: Task, demos: list[Record], budget: int, settings: RehearsalConfig, batch_size: int, seed: int
) -> list[Record]:
    """What the base invents of a task."""
    file = tree / "synthetic" / f"{task.name}.jsonl"
    put_on(subject.model, None)
    with one_at_a_time(file):  # workers that share a study's runs share this file
        limits = Limits(temperature=settings.temperature, top_p=settings.top_p, repetition_penalty=settings.repetition_penalty)
        report = synthesize(
            subject, task.name, definition_of(task), demos, budget, limits=limits, seed=seed, out=file, batch_size=batch_size,
            avoid=task.test, quiet=False,
        )  # fmt: skip
    say(f"synthesis  {report}")
    return read_items(file, budget)
