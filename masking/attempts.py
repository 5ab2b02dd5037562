"""A batch of data sets: each is trained on and scored for itself, and one that fails is left behind."""

from __future__ import annotations

import errno
import gc
import shutil
import traceback
from collections.abc import Callable
from functools import partial

import torch

from lora.states import put_on
from masking.bench import Bench
from optim.parallel import RankLost
from study.errors import LetheError
from study.folder import StudyFolder, in_use, is_done, write_json
from study.plan import Run
from study.queue import Job, QueueError


def forget_changed(study: StudyFolder, data: dict[str, str]) -> None:
    """Removes what was made of files that have changed since: their rows of the batch are made anew. data: fingerprints by name."""
    before = study.record.get("batch", {})
    if all(before.get(name) == data[name] for name in data):
        return
    with in_use(study.path):
        for name in sorted(data):
            if before.get(name, data[name]) != data[name]:
                print(f"changed    {name}: its file is another one than before, so it is trained on anew")
                shutil.rmtree(study.dir(f"lora_base/{name}"), ignore_errors=True)
        study.record["batch"] = before | data  # last: a kill before it removes again
        write_json(study.path / "study.json", study.record)


def one_by_one(bench: Bench, runs: list[Run], jobs: list[Job], save: Callable[[], None] | None) -> list[Job]:
    """The jobs of a batch: the base, then every data set trained and scored at once, its row saved; one that fails is left behind."""
    known = {job.name: job for job in jobs}
    ordered = [known["score base"]]
    for run in runs:
        for job in filter(None, (known.get(run.folder), known.get(f"score {run.folder}"))):
            ordered.append(job._replace(work=partial(attempt, bench, run, job, save)))
    return ordered


def attempt(bench: Bench, run: Run, job: Job, save: Callable[[], None] | None) -> None:
    """Does a job of a batch. What stops it is noted in failed.json, and what it held in memory is given back."""
    folder, trains = bench.study.dir(run.folder), job.name == run.folder
    if not trains and not is_done(folder):
        return  # its training failed
    try:
        job.work()
        (folder / "failed.json").unlink(missing_ok=True)
    except (QueueError, RankLost):
        raise
    except (LetheError, OSError, RuntimeError, MemoryError, ValueError) as error:
        if getattr(error.__cause__ or error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise  # no fault of the data set, and the next one would be trained in vain
        reason = (str(error) or type(error).__name__).splitlines()[0]
        write_json(folder / "failed.json", {"reason": reason, "traceback": traceback.format_exc()})
        bench.tell(f"failed     {run.task}: {reason}")
    put_on(bench.subject.model, None)
    gc.collect()
    if bench.subject.model.device.type == "cuda":
        torch.cuda.empty_cache()
    if save and not (trains and is_done(folder)):  # once it is scored, or has failed
        save()
