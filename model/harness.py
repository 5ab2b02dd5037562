"""Any task of lm-evaluation-harness as a column of scores. Needs the package lm-eval, which is imported on first use.

    columns = run_harness(subject, ["hellaswag", "mmlu"], shots=5)
    columns["mmlu"].summary["acc"]           # (0.31, 0.004): value and standard error, as lm-eval has them
    columns["mmlu"].items[0]                 # one per document: id, subject, prompt, gold, output, extracted, correct, metrics

Tasks are those of lm-eval and of a folder of one's own (include_path: its YAML files). Data come from the Hugging Face hub, or
from files that a YAML names; what is in the cache of `datasets` needs no network. Neither transformers nor
accelerate is needed.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from model.subject import Subject
from model.tokenizer import CHAT_TEMPLATES
from study.errors import LetheError

SHOTS_SEED = 1234  # lm-eval's own seeds: which solved examples are drawn, and what tasks shuffle
PYTHON_SEED, NUMPY_SEED = 0, 1234
RESAMPLES = 1000  # for the standard errors that have no formula
PROMPT_SHOWN = 400  # characters of an item's prompt, its end
FIRST = ("acc", "exact_match")  # what `correct` holds where a task has it, else the first metric that the task lists


@dataclass(frozen=True)
class Suite:
    """A task or a group of tasks, its data loaded. fingerprint: sha256 of settings and documents."""

    name: str
    loaded: dict  # lm-eval's {"tasks": {name: Task}, "groups": …, "group_map": …}
    shots: int | None  # solved examples before each question; None where the tasks of a group differ
    fingerprint: str


@dataclass(frozen=True)
class Column:
    """What a model scored on a suite. metric: the one that each item's `correct` holds."""

    name: str
    metric: str
    higher_is_better: bool
    items: list[dict]
    summary: dict[str, tuple[float, float | None]]  # metric, or metric,filter -> value, standard error
    shots: int | None


def run_harness(
    subject: Subject, tasks: list[str], *, shots: int | None = None, limit: int | None = None, include_path: str | None = None,
    chat: bool = False, batch_size: int = 64, quiet: bool = False,
) -> dict[str, Column]:  # fmt: skip
    """Scores a model, as it is (merge an adapter before), on tasks by name; a tag becomes the tasks that carry it.

    shots: solved examples, instead of what the tasks say (those that fix 0 keep it). limit: documents of each task. chat:
    prompts in the model's chat template. batch_size: sequences that are generated at a time.
    Raises LetheError without lm-eval, and for what is unknown, cannot be fetched, or is no greedy text task.
    """
    suites = load_harness(tasks, shots, include_path)
    return {suite.name: score_suite(subject, suite, limit=limit, chat=chat, batch_size=batch_size, quiet=quiet) for suite in suites}


def load_harness(tasks: list[str], shots: int | None = None, include_path: str | None = None) -> list[Suite]:
    """The suites of some names and their data, so that what is wrong with them is found before anything is trained."""
    _library()
    tasks = list(dict.fromkeys(name.strip() for name in tasks if name.strip()))
    if not tasks:
        raise LetheError("--harness names no task; give for example --harness hellaswag,arc_easy")
    if include_path and not Path(include_path).is_dir():
        raise LetheError(f"--harness_path {include_path} is no folder; it should hold lm-eval's YAML files of tasks")
    manager = _manager(include_path, False) if include_path else None
    if manager is None or any(name not in manager.task_index for name in tasks):
        manager = _manager(include_path, True)
    names = []
    for name in tasks:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            mend = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
            raise LetheError(f"--harness: lm-eval knows no task {name!r}; {mend}")
        names += sorted(manager.task_index[name].tags) if name in manager.all_tags else [name]
    return [_load(manager, name, shots) for name in dict.fromkeys(names)]


def score_suite(
    subject: Subject, suite: Suite, *, limit: int | None = None, chat: bool = False, batch_size: int = 64, quiet: bool = False
) -> Column:
    """A model's scores on one suite, see run_harness. The random state of the process is what it was before."""
    from lm_eval import evaluate

    from model.harness_model import HarnessModel

    if chat and subject.tokenizer.template not in CHAT_TEMPLATES:
        used = f"this one is used with --template {subject.tokenizer.template}"
        raise LetheError(f"--harness in chats needs a model with a chat template; {used}")
    tasks, model = suite.loaded["tasks"], HarnessModel(subject, batch_size, quiet, f"score {suite.name}")
    with _steady():
        for task in tasks.values():
            task.set_fewshot_seed(SHOTS_SEED)
        chats = {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
        found = evaluate(model, suite.loaded, limit=limit, bootstrap_iters=RESAMPLES, **chats)
    summary = _summary(found["results"].get(suite.name, {}))
    samples = [sample for name in tasks for sample in found["samples"][name]]
    listed = list(dict.fromkeys(_name(metric, sample["filter"]) for sample in samples for metric in sample["metrics"]))
    metric = next((name for wanted in FIRST for name in listed if name.split(",")[0] == wanted), listed[0])
    items = [item for name in tasks for item in _items(name, found["samples"][name], metric)]
    higher = {key: better for name in tasks for key, better in found["higher_is_better"][name].items()}
    if not summary:  # a group that says nothing of how to sum it up
        values = [float(item["correct"]) for item in items if item["correct"] is not None]
        error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
        summary = {metric: (float(np.mean(values)), error)} if values else {}
    return Column(suite.name, metric, bool(higher.get(metric.split(",")[0], True)), items, summary, suite.shots)


def _library() -> Any:
    """lm-eval's index and loader of tasks, and the one place that says what to do without it."""
    try:
        return importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise LetheError(f"--harness needs lm-evaluation-harness ({error}); pip install lm-eval") from error


@cache
def _manager(include_path: str | None, defaults: bool) -> Any:
    """lm-eval's index of tasks. With its own 14 thousand it takes seconds."""
    return _library().TaskManager(include_path=include_path, include_defaults=defaults)


def _load(manager: Any, name: str, shots: int | None) -> Suite:
    """One suite with its data."""
    with _steady():
        try:
            loaded = manager.load([name])
        except Exception as error:  # of `datasets`, the hub, the network or the YAML: each has its own
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            mend = "its data are fetched once, on a machine with network and without HF_HUB_OFFLINE, or named as files by a YAML"
            raise LetheError(f"--harness {name} cannot be loaded ({type(error).__name__}: {reason}); {mend} in --harness_path") from error
    tasks, digest = loaded["tasks"], hashlib.sha256()
    for own, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "runs code that the model writes" if getattr(task, "UNSAFE_CODE", False) else "shows pictures or plays sounds"
            raise LetheError(f"--harness {name}: {own} {what}, which Lethe does not do")
        fixed = task.get_config("num_fewshot")
        if fixed is None or shots is not None and fixed != 0:
            task.set_config("num_fewshot", shots or 0)
        count = task.get_config("num_fewshot")
        solved = task.sampler.fewshot_docs() if count and hasattr(task, "sampler") else []
        if hasattr(task, "sampler") and len(solved) < count:
            raise LetheError(f"--harness {name}: {own} has {len(solved)} solved examples, fewer than the {count} asked for; lower --shots")
        config = task.dump_config()
        settings = {key: config[key] for key in config if key not in ("dataset_kwargs", "metadata")}  # those name folders
        known = json.dumps([task.VERSION, settings], sort_keys=True, default=str)
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", known).encode())
        for doc in chain(task.eval_docs, solved):
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    found = {task.get_config("num_fewshot") for task in tasks.values()}
    return Suite(name, loaded, found.pop() if len(found) == 1 else None, digest.hexdigest())


@contextmanager
def _steady() -> Iterator[None]:
    """lm-eval's seeds, bars and prints off, no processes of its own; all as it was afterwards."""
    import datasets
    from lm_eval.api import metrics, task

    def resampled(function, values, iters):  # the library's draws, without its pool of processes
        return metrics.sample_stddev(metrics._bootstrap_internal(function, iters)((0, values)))

    states, bar, bootstrap = (random.getstate(), np.random.get_state()), task.tqdm, metrics.bootstrap_stderr
    bars = not datasets.are_progress_bars_disabled()
    random.seed(PYTHON_SEED)
    np.random.seed(NUMPY_SEED)
    task.tqdm, metrics.bootstrap_stderr = (lambda work, **_: work), resampled
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        task.tqdm, metrics.bootstrap_stderr = bar, bootstrap
        if bars:
            datasets.enable_progress_bars()


def _name(metric: str, kind: str) -> str:
    """A metric with the filter that picked its answer, where there is one: exact_match,strict-match."""
    return metric if kind == "none" else f"{metric},{kind}"


def _summary(results: dict) -> dict[str, tuple[float, float | None]]:
    """lm-eval's {"acc,none": 0.5, "acc_stderr,none": 0.01, …} as {"acc": (0.5, 0.01)}."""
    found = {}
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = results.get(f"{metric}_stderr,{kind}")
            found[_name(metric, kind)] = float(value), float(error) if isinstance(error, (int, float)) else None
    return found


def _items(task: str, samples: list[dict], metric: str) -> list[dict]:
    """One dict per document, in their order, of lm-eval's samples, of which there is one for each filter."""
    items: dict[int, dict] = {}
    for sample in samples:
        item = items.setdefault(sample["doc_id"], _item(task, sample))
        item["metrics"] |= {_name(key, sample["filter"]): _plain(sample[key]) for key in sample["metrics"]}
        if metric in (_name(key, sample["filter"]) for key in sample["metrics"]) and "extracted" in item:
            item["extracted"] = _plain(sample["filtered_resps"][0])
    for item in items.values():
        value = item["metrics"].get(metric)
        item["correct"] = value if isinstance(value, (int, float)) else None
    return [items[number] for number in sorted(items)]


def _item(task: str, sample: dict) -> dict:
    """What was asked and answered: a text that was generated, or the likeliest of several continuations."""
    asked, answered = sample["arguments"], [answers[0] for answers in sample["resps"]]
    prompt = asked[0][0]
    item = {"id": sample["doc_id"], "subject": task, "prompt": prompt if len(prompt) <= PROMPT_SHOWN else f"… {prompt[-PROMPT_SHOWN:]}",
            "gold": _plain(sample["target"]), "metrics": {}}  # fmt: skip
    if isinstance(answered[0], str):
        item |= {"output": answered[0], "extracted": None}
    elif len(answered) > 1:
        given = [i for i, (context, _) in enumerate(asked) if context] or list(range(len(asked)))  # not those that only normalise
        best = max(given, key=lambda i: answered[i][0])
        options = len({asked[i][1] for i in given}) > 1  # else the contexts are what is chosen from
        item |= {"output": asked[best][1].strip() if options else best, "loglikelihoods": [float(answered[i][0]) for i in given]}
    return item


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return value if value is None or isinstance(value, (str, int, float)) else str(value)
