"""Scores what was trained, fills the missing cells of a study, and draws its tables and pictures.

    python eval.py                                             # the newest study
    python eval.py --root out/nano --tasks mini_gsm8k
    python eval.py --model DIR --adapter DIR --tasks gsm8k,svamp   # any model, no study

Read from `score_task` (one model on one task) to `score_study` (every missing cell) to `report` (results, table, pictures).
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from data.batching import Examples, cut_middle, tokenize
from data.builtin import BUILTIN_TASKS
from data.folder import Task, find_task, held_out, scan
from data.records import Record
from lora.adapter import load_adapter
from lora.drift import drift_record
from lora.layers import lora_layers, merged
from lora.states import put_on, state_fingerprint
from masking.score import score_examples
from metrics.answers import score_answer
from metrics.summary import summarise
from model.checkpoint import load_model
from model.generate import Decoder, generate_and_score
from model.llama import Llama
from model.subject import Subject, load_subject
from model.tokenizer import Tokenizer
from study.comparison import report_comparison
from study.config import Config, EvalConfig, parse, parse_eval
from study.errors import LetheError, run_command
from study.folder import newest_study, read_json, read_jsonl, seed_folders, write_json, write_jsonl
from study.logging import RunLog, format_table, progress
from study.plan import Run, cells_to_score, in_order
from study.plots import draw_all
from study.results import summary_table

# ----------------------------------------------------------------------------------------------------------------------
# The model and the tasks


def choose_tasks(datasets: str | None, data_root: str, builtin_model: bool, strict: bool = False) -> dict[str, Task]:
    """--datasets → tasks by name. None or "all": the built-in tasks for the built-in model, else every prepared folder."""
    if datasets in (None, "all"):
        names = list(BUILTIN_TASKS) if builtin_model else [name for name in scan(data_root) if name not in BUILTIN_TASKS]
        if not names:
            raise LetheError(f"no task folder under {data_root}; make one with python -m data.prepare gsm8k, or give --datasets name=file")
    else:
        names = [name.strip() for name in datasets.split(",") if name.strip()]
    if not names:
        raise LetheError("--datasets names no task")
    tasks = [find_task(name, data_root, strict) for name in names]
    for name in {task.name for task in tasks}:
        if len({task.spec for task in tasks if task.name == name}) > 1:
            raise LetheError(f"--datasets names two different files {name!r}; give each a name of its own")
    return {task.name: task for task in tasks}


# ----------------------------------------------------------------------------------------------------------------------
# One model on one task


def score_task(
    model: Llama, tokenizer: Tokenizer, task: Task, *, max_test: int | None = None, max_length: int = 2048,
    batch_size: int = 64, max_new_tokens: int | None = None, quiet: bool = False, merge: bool = True, decoder: Decoder | None = None,
) -> list[dict]:  # fmt: skip
    """One dict per test item: prompt, output, extracted, gold, exact_match and the other scores, answer_nll, group.

    Greedy decoding with the adapter merged into scratch weights; without merge and on a quantised base, beside them. answer_nll:
    mean nll of the reference answer's tokens (its end token included), in nats. decoder: see model.generate.
    """
    records = task.test[:max_test]
    prompts, answers = as_ids(tokenizer, records, max_length)
    new, stops = max_new_tokens or task.max_new_tokens, tokenizer.stop_ids
    with (
        merged(model) if merge and not model.quantized else nullcontext(),
        progress(len(records), f"score {task.name}", "items", enabled=not quiet) as bar,
    ):
        outputs, losses = generate_and_score(model, prompts, answers, new, stops, batch_size, bar.update, decoder)
    items = []
    for record, ids, output, loss in zip(records, prompts, outputs, losses, strict=True):
        text = tokenizer.decode(output).strip()
        scores = score_answer(task.answer_kind, text, record.answer)
        prompt = tokenizer.decode(ids, skip_special=False)
        items.append({"prompt": prompt, "output": text, "reference": record.answer, **scores, "correct": scores["exact_match"],
                      "answer_nll": loss, "tokens": len(output), "group": record.group})  # fmt: skip
    return items


def as_ids(tokenizer: Tokenizer, records: list[Record], max_length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, their middle cut where they are longer, and reference answers."""
    prompts = [tokenizer.render_prompt(record.prompt) for record in records]
    prompts = [ids if len(ids) <= max_length else cut_middle(ids, max_length) for ids in prompts]
    return prompts, [tokenizer.render_answer(record.answer) for record in records]


def differences_of(items: list[dict], others: list[dict]) -> dict:
    """How far two scorings of the same items are apart: other outputs, other answers, right or wrong changed, largest step in nll."""
    pairs = list(zip(items, others, strict=True))
    return {
        "n": len(pairs),
        "outputs": sum(a["output"] != b["output"] for a, b in pairs),
        "answers": sum(a["extracted"] != b["extracted"] for a, b in pairs),
        "flips": sum(a["exact_match"] != b["exact_match"] for a, b in pairs),
        "answer_nll": max((abs(a["answer_nll"] - b["answer_nll"]) for a, b in pairs), default=0.0),
    }


# ----------------------------------------------------------------------------------------------------------------------
# A study


def trained_runs(tree: Path) -> list[Run]:
    """The finished runs of a study, as their manifests say, stage 1 first."""
    found = [read_json(file) for file in sorted(tree.glob("**/run.json"))]
    return in_reading_order([Run(**record["run"]) for record in found if record.get("status") == "done"])


def in_reading_order(runs: list[Run]) -> list[Run]:
    arms = in_order(run.arm for run in runs)
    return sorted(runs, key=lambda run: (run.stage, run.first, run.second or "", arms.index(run.arm)))


def cell_file(tree: Path, run: Run | None, task: str) -> Path:
    return tree / (run.folder if run else "base") / "eval" / f"{task}.jsonl"


def score_study(tree: Path, config: Config, subject: Subject, tasks: dict[str, Task], only: set[str] | None = None) -> int:
    """Scores every cell that has no file yet: the base and stage 1 on every task, stage 2 on its two. Returns how many."""
    runs = [run for run in trained_runs(tree) if {run.first, run.second or run.first} <= set(tasks)]
    cells = cells_by_run(runs, list(tasks), only)
    todo = [run for run, names in cells.items() if unscored(tree, run, names)]
    count = sum(len(missing(tree, run, names)) for run, names in cells.items())
    decoder = Decoder(subject.model, config.evaluation.batch_size)  # one cache for all cells
    for number, run in enumerate(todo, 1):
        header = "" if number > 1 else SCORING
        label = f"{number:3d}/{len(todo)} {run.folder if run else 'base':36s}"
        score_run(tree, config, subject, tasks, run, cells[run], label, decoder, header)
    put_on(subject.model, None)
    return count


SCORING = "exact match after each run, on the tasks it concerns"


def cells_by_run(runs: list[Run], tasks: list[str], only: set[str] | None = None) -> dict[Run | None, list[str]]:
    """The tasks that each run is scored on; None is the base."""
    cells = [(run, name) for run, name in cells_to_score(runs, tasks) if only is None or name in only]
    return {run: [name for other, name in cells if other == run] for run in dict.fromkeys(run for run, _ in cells)}


def missing(tree: Path, run: Run | None, names: list[str]) -> list[str]:
    return [name for name in names if not cell_file(tree, run, name).is_file()]


def unscored(tree: Path, run: Run | None, names: list[str]) -> bool:
    return bool(missing(tree, run, names)) or run is not None and bool(run.changes) and not (tree / run.folder / "dev.json").is_file()


def score_run(
    tree: Path, config: Config, subject: Subject, tasks: dict[str, Task], run: Run | None, names: list[str], label: str,
    decoder: Decoder, header: str = "",
) -> None:  # fmt: skip
    """Scores what one run left (None: the base) on those of the tasks that have no file yet, and prints a line."""
    if header:
        print(header)
    began, told = time.perf_counter(), []
    put_on(subject.model, tree / run.folder if run else None)
    for name in missing(tree, run, names):
        items = score_task(
            subject.model, subject.tokenizer, tasks[name], max_test=config.max_test, max_length=config.max_length,
            max_new_tokens=config.evaluation.max_new_tokens, decoder=decoder,
        )  # fmt: skip
        write_jsonl(cell_file(tree, run, name), items)
        told.append(f"{name} {np.mean([item['exact_match'] for item in items]):6.1%}")
    if run is not None and run.changes:
        measure(subject, tree, run, tasks, config)
    print(f"{label}  {'  '.join(told)}  {time.perf_counter() - began:6.1f} s", flush=True)


def measure(subject: Subject, tree: Path, run: Run, tasks: dict[str, Task], config: Config) -> None:
    """drift.json and dev.json of a run: how far it moved the model, and its nll on rows that are in neither train nor test.

    The KL to the base is on the test items' reference answers. dev.json: {task: mean over rows of the answers' mean nll}.
    """
    model, tokenizer, folder = subject.model, subject.tokenizer, tree / run.folder
    mine = {name: tasks[name] for name in (run.first, run.second) if name}
    items = {}
    for name, task in mine.items():
        prompts, answers = as_ids(tokenizer, task.test[: config.max_test], config.max_length)
        items[name] = Examples.from_pairs(list(zip(prompts, answers, strict=True)))
    base = load_model(model.source, model.dtype, model.device) if model.altered else None
    write_json(folder / "drift.json", drift_record(model, items, model.source, base))
    dev = {}
    for name, task in mine.items():
        limit, records = held_out(task, config.max_train)
        rows = tokenize(records, tokenizer, config.max_length, f"{task.fingerprint} from row {limit}", tree / "tokens")
        nll = score_examples(model, rows, state_fingerprint(folder), tree / "perplexity")
        dev[name] = float(np.mean([part.mean() for part in np.split(nll, rows.completion_offsets[1:-1])]))
    write_json(folder / "dev.json", dev)


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


def report(root: Path, quiet: bool = False) -> list[dict]:
    """Writes eval_results_mask.json and the pictures of a study (over its seeds too), logs them, prints the table.

    The results of an optimizer study are study.comparison's.
    """
    trees = seed_folders(root)
    compared = [run for run in trained_runs(trees[0]) if run.changes]
    if compared:
        report_comparison(root, quiet)
        log_pictures(root, sorted((root / "logs").glob("*.png")))
    if len(compared) == len(trained_runs(trees[0])) > 0:
        return []
    rows, dropped = [], {}
    for tree in trees:
        seed = read_json(tree / "study.json")["identity"]["settings"]["seed"]
        mine = result_rows(tree, seed)
        rows += mine
        for file in tree.glob("**/run.json"):
            record = read_json(file)
            if record.get("status") == "done" and record["run"]["stage"] == 2:
                dropped[record["run"]["folder"]] = dropped.get(record["run"]["folder"], 0.0) + record["mask"]["dropped_share"] / len(trees)
        if tree != root:
            write_json(tree / "eval_results_mask.json", {"results": mine})
            draw_all(mine, tree / "performance_matrices_mask")
    if not rows:
        raise LetheError(f"{root}: nothing is scored yet; run python train.py first")
    if not quiet:  # first: a folder that cannot be written to still has its table
        print("\n" + summary_table(rows, dropped), flush=True)
    pictures = draw_all(rows, root / "performance_matrices_mask")
    log_pictures(root, pictures)
    write_json(root / "eval_results_mask.json", {"results": rows})  # last: is_reported goes by it
    if not quiet:
        print(f"\nresults    {root / 'eval_results_mask.json'}")
        print(f"pictures   {root / 'performance_matrices_mask'}/ ({len(pictures)})")
        print(f"curves     tensorboard --logdir {root / 'tensorboard' if len(trees) == 1 else root}")
    return rows


def log_pictures(root: Path, pictures: list[Path]) -> None:
    with RunLog(root, "study") as log:
        for path in pictures:
            log.picture(path.stem, path)


def is_reported(root: Path) -> bool:
    """True when results and pictures have been made since the last cell was scored."""
    results = root / "eval_results_mask.json"
    if not results.is_file():
        results = root / "eval_results_optimizers.json"
    return results.is_file() and all(file.stat().st_mtime_ns <= results.stat().st_mtime_ns for file in root.glob("**/eval/*.jsonl"))


def evaluate_study(arguments: EvalConfig) -> None:
    root = Path(arguments.root) if arguments.root else newest_study("out")
    trees = seed_folders(root)
    if not (trees[0] / "study.json").is_file():
        raise LetheError(f"{root} is no study folder (it has no study.json); give --root, or train one with python train.py")
    print(f"study      {root}")
    only = {name.strip() for name in arguments.tasks.split(",")} if arguments.tasks else None
    record = read_json(trees[0] / "study.json")
    known = record["tasks"]
    for name in sorted(only or ()):
        if name not in known:
            raise LetheError(f"--tasks: {name!r} is not in this study; it has {', '.join(known)}")
    if not arguments.replot:
        config = parse(["--config", str(trees[0] / "config.yaml")])
        tasks = {name: find_task(**spec) for name, spec in known.items()}
        for name, task in tasks.items():
            if task.fingerprint != record["identity"]["data"].get(name):
                raise LetheError(f"the data of {name} changed since this study was trained; restore it, or train anew with another --out")
        dtype = arguments.dtype if arguments.dtype != "auto" else config.dtype
        memory = arguments.max_memory or config.max_memory
        subject = load_subject(record["model"], arguments.device, dtype, config.template, config.quantize, memory)
        if subject.model.fingerprint != record["identity"]["model"]:
            raise LetheError(f"{record['model']} is not the model that this study was trained on; its weights have changed")
        print(subject.about)
        scored = sum(score_study(tree, config, subject, tasks, only) for tree in trees)
        print(f"scored     {scored} missing cell{'s' * (scored > 1)}" if scored else "scored     nothing: every cell was there")
    report(root)


def evaluate_model(arguments: EvalConfig) -> None:
    """Any model, with or without an adapter, on any tasks."""
    subject = load_subject(
        arguments.model, arguments.device, arguments.dtype, arguments.template, arguments.quantize, arguments.max_memory
    )
    tasks = choose_tasks(arguments.tasks or arguments.datasets, arguments.data_root, arguments.model == "nano")
    print(subject.about)
    if arguments.adapter:
        load_adapter(subject.model, arguments.adapter)
        print(f"adapter    {arguments.adapter} on {len(lora_layers(subject.model))} linears")
    rows, results, unmerged = [], [], {}
    settings = {"max_test": arguments.max_test, "batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens}
    for task in tasks.values():
        items = score_task(subject.model, subject.tokenizer, task, **settings)
        for row in summarise(items):
            results.append({"model": arguments.model, "adapter": arguments.adapter, "task": task.name, **row})
            interval = f"{row['low']:.3f} to {row['high']:.3f}"
            rows.append([task.name, row["metric"], f"{row['value']:.3f}", interval, row["n"], row["unparsed"]])
        if arguments.out:
            write_jsonl(Path(arguments.out) / "eval" / f"{task.name}.jsonl", items)
        if arguments.no_merge:
            others = score_task(subject.model, subject.tokenizer, task, **settings, merge=False)
            unmerged[task.name] = differences_of(items, others)
    print(format_table(rows, ["task", "metric", "value", "95 % interval", "n", "unparsed"]))
    for name, found in unmerged.items():
        told = f"{found['outputs']} of {found['n']} outputs, {found['answers']} answers and {found['flips']} verdicts"
        print(f"unmerged   {name}: {told} differ; answer_nll by at most {found['answer_nll']:.2g}")
    if arguments.out:
        write_json(Path(arguments.out) / "eval_results.json", {"results": results, **({"unmerged": unmerged} if unmerged else {})})
        print(f"results    {Path(arguments.out) / 'eval_results.json'}")


def main(argv: list[str] | None = None) -> int:
    def work() -> None:
        arguments = parse_eval(sys.argv[1:] if argv is None else argv)
        evaluate_model(arguments) if arguments.model else evaluate_study(arguments)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
