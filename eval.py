"""Scores what was trained, fills the missing cells of a study, and draws its tables and pictures.

    python eval.py                                             # the newest study
    python eval.py --root out/nano --tasks mini_gsm8k
    python eval.py --model DIR --adapter DIR --tasks gsm8k,svamp   # any model, no study

Read from `score_task` and `score_benchmark` (one model) to `score_study` (every missing cell). Tables and pictures: study/report.py.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.batching import Examples, cut_middle, tokenize
from data.benchmarks import Benchmark
from data.builtin import BUILTIN_TASKS
from data.builtin_mmlu import MINI_MMLU, mini_mmlu
from data.folder import MADE_HERE, Task, find_task, held_out, scan, task_modules
from data.questions import as_questions
from data.records import Record
from data.tasks import mmlu
from lora.adapter import load_adapter
from lora.drift import drift_record
from lora.layers import lora_layers, merged
from lora.probabilistic import columns_of, score_probabilistic
from lora.states import put_on, state_fingerprint
from masking.bench import Bench
from masking.score import score_examples
from metrics.answers import score_answer
from metrics.summary import summarise, summarise_benchmark
from model.checkpoint import load_model
from model.choices import score_options
from model.decoding import GREEDY, Decoding, decode, seed_of
from model.generate import Decoder, generate, generate_and_score
from model.harness import load_harness, score_suite
from model.llama import Llama
from model.subject import Subject, load_subject
from model.tokenizer import Tokenizer
from study.benchmark_groups import tasks_and_shots
from study.config import EvalConfig, parse, parse_eval
from study.errors import LetheError, run_command
from study.folder import StudyFolder, newest_study, read_json, seed_folders, write_json, write_jsonl
from study.logging import format_table, progress, say
from study.plan import Run, cells_to_score, nearest
from study.reliability import report_reliability
from study.report import cell_file, report, report_growth, trained_runs
from study.settings import DECODING, EvaluationConfig
from study.text_scores import signature_lines

MOST_TOKENS = 4096  # of a benchmark's prompt: with five solved examples a few of MMLU's are longer

# ----------------------------------------------------------------------------------------------------------------------
# The model and the tasks


def choose_tasks(
    datasets: str | None, data_root: str, builtin_model: bool, strict: bool = False, salvage: bool = False
) -> dict[str, Task]:
    """--datasets → tasks by name. None or "all": the built-in tasks for the built-in model, else every prepared folder."""
    if datasets in (None, "all"):
        names = list(BUILTIN_TASKS) if builtin_model else [name for name in scan(data_root) if name not in MADE_HERE]
        if not names:
            raise LetheError(f"no task folder under {data_root}; make one with python -m data.prepare gsm8k, or give --datasets name=file")
    else:
        names = [name.strip() for name in datasets.split(",") if name.strip()]
    if not names:
        raise LetheError("--datasets names no task")
    tasks = [find_task(name, data_root, strict, salvage) for name in names]
    for name in {task.name for task in tasks}:
        if len({task.spec for task in tasks if task.name == name}) > 1:
            raise LetheError(f"--datasets names two different files {name!r}; give each a name of its own")
    return {task.name: task for task in tasks}


def decoding_of(asked: EvaluationConfig | EvalConfig, task: str) -> Decoding:
    """How a task's outputs are decoded: as `decoding` says of it, else as all."""
    own = (asked.decoding or {}).get(task)
    try:
        return Decoding(**({name: getattr(asked, name) for name in DECODING} if own is None else own))
    except LetheError as error:
        raise LetheError(f"{'evaluation' if own is None else f'decoding of {task}'}: {error}") from None


def check_decoding(asked: EvaluationConfig | EvalConfig, tasks: Iterable[str], data_root: str) -> None:
    """Refuses settings that contradict each other and names that no task has; one that is not asked for now may have its own."""
    tasks = list(tasks)
    known = list(dict.fromkeys([*tasks, *scan(data_root), *task_modules()]))
    for name in asked.decoding or {}:
        if name not in known:
            raise LetheError(f"decoding: no task is named {name!r}{nearest(name, known)}")
    for name in {*tasks, *(asked.decoding or {})}:
        decoding_of(asked, name)


def choose_columns(asked: EvaluationConfig | EvalConfig) -> dict[str, Benchmark]:
    """The columns of general ability, by name, their items read: --mmlu, then --harness."""
    specs = []
    if asked.mmlu == MINI_MMLU and asked.mmlu_by == "generate":
        raise LetheError("mini_mmlu is scored by the likelihood of its answers; leave out --mmlu_by generate, or give --mmlu FOLDER")
    if asked.mmlu == MINI_MMLU and asked.shots and not asked.harness:
        raise LetheError(f"mini_mmlu has no solved examples; leave out --shots {asked.shots}, or give --mmlu FOLDER")
    if asked.harness_path and not asked.harness:
        raise LetheError("--harness_path says where tasks of --harness lie; give --harness NAME too")
    if asked.mmlu:
        specs.append({"mmlu": asked.mmlu, "shots": asked.shots, "by": asked.mmlu_by, "max_items": asked.max_samples})
    for name in filter(None, (word.strip() for word in (asked.harness or "").split(","))):
        for task, shots in tasks_and_shots(name, asked.shots):
            specs.append({"harness": task, "shots": shots, "path": asked.harness_path, "max_items": asked.max_samples})
    columns: dict[str, Benchmark] = {}
    for column in (column for spec in specs for column in find_columns(spec)):
        if column.name in columns:
            raise LetheError(f"two columns of general ability are named {column.name}; give one of them, or other --shots")
        columns[column.name] = column
    return columns


def find_columns(spec: dict) -> list[Benchmark]:
    """The benchmark that a spec names (one of choose_columns', or of a study's record); a tag of the harness names several."""
    if name := spec.get("harness"):
        path = str(Path(spec["path"]).resolve()) if spec.get("path") else None
        columns, shots = [], "" if spec.get("shots") is None else f"_{spec['shots']}shot"
        for suite in load_harness([name], spec.get("shots"), path):
            if any(task.OUTPUT_TYPE == "loglikelihood_rolling" for task in suite.loaded["tasks"].values()):
                raise LetheError(f"--harness: {suite.name} has no score of its own for each item, which a column needs")
            which = f"{suite.fingerprint}, {spec.get('max_items')} items"  # the suite itself does not know how many are asked
            fingerprint = hashlib.sha256(which.encode()).hexdigest()
            columns.append(Benchmark(suite.name + shots, [], fingerprint, {**spec, "path": path, "harness": suite.name}, suite))
        return columns
    if spec["mmlu"] == MINI_MMLU:
        return [mini_mmlu(spec.get("max_items"))]
    said, shots = spec.get("by") == "generate", spec.get("shots")
    if shots is None:
        shots = 0 if said else mmlu.usual_shots(spec["mmlu"])
    column = mmlu.load_mmlu(spec["mmlu"], shots, spec.get("max_items"))
    if said:
        column = replace(column, name=f"{column.name}_generate", spec=column.spec | {"by": "generate"})
    return [column]


# ----------------------------------------------------------------------------------------------------------------------
# One model on one task


def score_task(
    model: Llama, tokenizer: Tokenizer, task: Task, *, max_test: int | None = None, max_length: int = 2048,
    batch_size: int = 64, max_new_tokens: int | None = None, quiet: bool = False, merge: bool = True, decoder: Decoder | None = None,
    how: Decoding = GREEDY, seed: int = 0,
) -> list[dict]:  # fmt: skip
    """One dict per test item: prompt, output, extracted, gold, exact_match and the other scores, answer_nll, group.

    With the adapter merged into scratch weights; without merge and on a quantised base, beside them. answer_nll: mean nll of the
    reference answer's tokens (its end token included), in nats. how: greedily if nothing is said; what is drawn depends on seed
    and the item alone. decoder: see model.generate.
    """
    records = task.test[:max_test]
    prompts, answers = as_ids(tokenizer, records, max_length)
    new, stops = max_new_tokens or task.max_new_tokens, tokenizer.stop_ids
    with (
        merged(model) if merge and not model.quantized else nullcontext(),
        progress(len(records), f"score {task.name}", "items", enabled=not quiet) as bar,
    ):
        if how.greedy:
            outputs, losses = generate_and_score(model, prompts, answers, new, stops, batch_size, bar.update, decoder)
        else:
            _, losses = generate_and_score(model, prompts, answers, 0, stops, batch_size, None, decoder)
            seeds = [seed_of(seed, *(text for _, text in record.prompt), record.answer) for record in records]
            outputs = decode(model, prompts, new, stops, how, seeds=seeds, batch_size=batch_size, on_done=bar.update, decoder=decoder)
    items = []
    for record, ids, output, loss in zip(records, prompts, outputs, losses, strict=True):
        text = tokenizer.decode(output).strip()
        scores = score_answer(task.answer_kind, text, record.answer, record.references, record.original)
        prompt = tokenizer.decode(ids, skip_special=False)
        items.append({"prompt": prompt, "output": text, "reference": record.answer, **scores, "correct": scores["exact_match"],
                      "answer_nll": loss, "tokens": len(output), "group": record.group})  # fmt: skip
        more = {"references": list(record.references), "original": record.original}
        items[-1] |= {name: value for name, value in more.items() if value}
    return items


def score_benchmark(
    subject: Subject, column: Benchmark, *, batch_size: int = 64, quiet: bool = False, decoder: Decoder | None = None
) -> list[dict]:
    """One dict per item: subject, question, options, gold and extracted (letters), correct, and logprobs with answer_nll, or the output.

    By the likelihood of the options (nats, summed over an option's tokens), by a generated answer, or as lm-evaluation-harness
    says; with the adapter merged, as for tasks.
    """
    model, tokenizer = subject.model, subject.tokenizer
    max_length = min(MOST_TOKENS, model.config.max_position_embeddings)
    with nullcontext() if model.quantized else merged(model):
        if column.suite is not None:
            return score_suite(subject, column.suite, limit=column.spec.get("max_items"), batch_size=batch_size, quiet=quiet).items
        with progress(len(column.items), f"score {column.name}", "items", enabled=not quiet) as bar:
            if column.spec.get("by") == "generate":
                prompts = [tokenizer.render_prompt(mmlu.chat_prompt(item)) for item in column.items]
                prompts = [ids if len(ids) <= max_length else cut_middle(ids, max_length) for ids in prompts]
                made = generate(model, prompts, mmlu.MAX_NEW_TOKENS, tokenizer.stop_ids, batch_size, bar.update, decoder)
                outputs = [tokenizer.decode(ids).strip() for ids in made]
                answers = [{"picked": mmlu.said_letter(output), "output": output} for output in outputs]
            else:
                questions, fit = as_questions(column.items, tokenizer, max_length)
                if fit.lost_shots + fit.cut and not quiet:
                    told = f"{fit.lost_shots} items go without some of their solved examples, {fit.cut} are cut in the middle"
                    say(f"{column.name}: of the prompts beyond {max_length} tokens {told}")
                answers = []
                for item, found in zip(column.items, score_options(model, questions, on_done=bar.update), strict=True):
                    logprobs = [one.logprob for one in found]
                    picked = max(range(len(logprobs)), key=logprobs.__getitem__)  # the first of equals
                    answers.append({"picked": picked, "logprobs": logprobs, "answer_nll": -logprobs[item.gold]})
    items = []
    for item, answer in zip(column.items, answers, strict=True):
        picked = answer.pop("picked")
        extracted = None if picked is None else chr(65 + picked)
        items.append({"subject": item.subject, "question": item.question, "options": [text.strip() for text in item.options],
                      "gold": chr(65 + item.gold), "extracted": extracted, "correct": picked == item.gold, **answer})  # fmt: skip
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


def score_study(bench: Bench, only: set[str] | None = None) -> int:
    """Scores every cell without a file: base and stage 1 on every task, stage 2 on its two, all on the columns. Returns how many."""
    tree, subject = bench.study.path, bench.subject
    runs = [run for run in trained_runs(tree) if {run.first, run.second or run.first} <= set(bench.tasks)]
    cells = cells_by_run(runs, list(bench.tasks), list(bench.columns), only)
    todo = [run for run, names in cells.items() if unscored(tree, run, names)]
    count = sum(len(missing(tree, run, names)) for run, names in cells.items())
    decoder = Decoder(subject.model, bench.config.evaluation.batch_size)  # one cache for all cells
    for number, run in enumerate(todo, 1):
        header = "" if number > 1 else SCORING
        label = f"{number:3d}/{len(todo)} {run.folder if run else 'base':36s}"
        score_run(bench, run, cells[run], label, decoder, header)
    put_on(subject.model, None)
    return count


SCORING = "scores after each run: exact match on its tasks (free text: ROUGE-L), then accuracy on what is beside them"


def cells_by_run(runs: list[Run], tasks: list[str], columns: list[str], only: set[str] | None = None) -> dict[Run | None, list[str]]:
    """The tasks and columns that each run is scored on; None is the base."""
    cells = [*cells_to_score(runs, tasks), *((run, name) for run in (None, *runs) for name in columns)]
    cells = [(run, name) for run, name in cells if only is None or name in only]
    return {run: [name for other, name in cells if other == run] for run in dict.fromkeys(run for run, _ in cells)}


def missing(tree: Path, run: Run | None, names: list[str]) -> list[str]:
    return [name for name in names if not cell_file(tree, run, name).is_file()]


def unscored(tree: Path, run: Run | None, names: list[str]) -> bool:
    return bool(missing(tree, run, names)) or run is not None and bool(run.changes) and not (tree / run.folder / "dev.json").is_file()


def score_run(bench: Bench, run: Run | None, names: list[str], label: str, decoder: Decoder, header: str = "") -> None:
    """Scores what one run left (None: the base) on those of the tasks and columns that have no file yet, and prints a line."""
    tree, config, subject = bench.study.path, bench.config, bench.subject
    if header:
        print(header)
    began, told = time.perf_counter(), []
    put_on(subject.model, tree / run.folder if run else None)
    for name in missing(tree, run, names):
        if name in bench.columns:
            items = score_benchmark(subject, bench.columns[name], batch_size=config.evaluation.batch_size, decoder=decoder)
        else:
            items = score_task(
                subject.model, subject.tokenizer, bench.tasks[name], max_test=config.max_test, max_length=config.max_length,
                max_new_tokens=config.evaluation.max_new_tokens, decoder=decoder, how=decoding_of(config.evaluation, name), seed=bench.seed,
            )  # fmt: skip
        write_jsonl(cell_file(tree, run, name), items)
        score = "rougeL" if name in bench.tasks and bench.tasks[name].answer_kind == "text" else "correct"
        told.append(f"{name} {np.mean([item[score] for item in items if item[score] is not None]):6.1%}")
    if run is not None and run.changes:
        measure(bench, run)
    print(f"{label}  {'  '.join(told)}  {time.perf_counter() - began:6.1f} s", flush=True)


def measure(bench: Bench, run: Run) -> None:
    """drift.json and dev.json of a run: how far it moved the model, and its nll on rows that are in neither train nor test.

    The KL to the base is on the test items' reference answers. dev.json: {task: mean over rows of the answers' mean nll}.
    """
    tree, config, model, tokenizer = bench.study.path, bench.config, bench.subject.model, bench.subject.tokenizer
    folder = tree / run.folder
    mine = {name: bench.tasks[name] for name in (run.first, run.second) if name}
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


def evaluate_study(arguments: EvalConfig) -> None:
    root = Path(arguments.root) if arguments.root else newest_study("out")
    if not (root / "growth.json").is_file():
        return evaluate_one(arguments, root)
    for name in read_json(root / "growth.json")["models"]:
        evaluate_one(arguments, root / name)
    report_growth(root)


def evaluate_one(arguments: EvalConfig, root: Path) -> None:
    """A study of one model."""
    trees = seed_folders(root)
    if not root.is_dir():
        raise LetheError(f"no folder {root} (--root)")
    if (root / "pretraining.json").is_file() or (root / "model" / "pretraining.json").is_file():
        model = root if (root / "config.json").is_file() else root / "model"
        raise LetheError(f"{root} holds a pretrained model and no study; score it as --model {model}")
    if not (trees[0] / "study.json").is_file():
        raise LetheError(f"{root} is no study folder (it has no study.json); give --root, or train one with python train.py")
    print(f"study      {root}")
    only = {name.strip() for name in arguments.tasks.split(",")} if arguments.tasks else None
    record = read_json(trees[0] / "study.json")
    if "batch" in record:
        raise LetheError(f"{root} holds a batch of data sets; python train.py --datasets_folder … goes on with it and shows its table")
    known = record["tasks"]
    asked = {} if arguments.replot else choose_columns(arguments)
    names = list(dict.fromkeys([*known, *record.get("columns", {}), *asked]))
    for name in sorted(only or ()):
        if name not in names:
            raise LetheError(f"--tasks: {name!r} is not in this study; it has {', '.join(names)}")
    if not arguments.replot:
        config = parse(["--config", str(trees[0] / "config.yaml")])
        tasks = {name: find_task(**spec) for name, spec in known.items()}
        columns = {column.name: column for spec in record.get("columns", {}).values() for column in find_columns(spec)}
        for name, found in (tasks | columns).items():
            if found.fingerprint != record["identity"]["data"].get(name):
                raise LetheError(f"the data of {name} changed since this study was trained; restore it, or train anew with another --out")
        for name, column in asked.items():
            if columns.setdefault(name, column).fingerprint != column.fingerprint:
                raise LetheError(f"{name}: this study has it with other items or settings; leave out the flag, or see its study.json")
        for tree in trees:
            add_columns(tree, columns)
        dtype = arguments.dtype if arguments.dtype != "auto" else config.dtype
        memory = arguments.max_memory or config.max_memory
        subject = load_subject(record["model"], arguments.device, dtype, config.template, config.quantize, memory)
        if subject.model.fingerprint != record["identity"]["model"]:
            raise LetheError(f"{record['model']} is not the model that this study was trained on; its weights have changed")
        print(subject.about)
        studies = [StudyFolder(tree, read_json(tree / "study.json")) for tree in trees]
        seeds = [study.record["identity"]["settings"]["seed"] for study in studies]
        benches = [Bench(config, subject, tasks, study, seed, columns=columns) for study, seed in zip(studies, seeds, strict=True)]
        if arguments.probabilistic:
            evaluate_probabilistic(root, benches, only, arguments)
            return
        scored = sum(score_study(bench, only) for bench in benches)
        print(f"scored     {scored} missing cell{'s' * (scored > 1)}" if scored else "scored     nothing: every cell was there")
    report(root)


def evaluate_probabilistic(root: Path, benches: list[Bench], only: set[str] | None, arguments: EvalConfig) -> None:
    """The adapters of a study's seeds as an ensemble, and dropout left on, beside single adapters: accuracy and calibration."""
    config, subject, trees = benches[0].config, benches[0].subject, [bench.study.path for bench in benches]
    chosen = [[one for name, one in found.items() if only is None or name in only] for found in (benches[0].tasks, benches[0].columns)]
    longest = min(config.max_length, subject.model.config.max_position_embeddings)
    columns = columns_of(*chosen, subject.tokenizer, longest, config.max_test)
    seeds = [bench.study.record["identity"]["settings"]["seed"] for bench in benches]
    trained = [{run.folder for run in trained_runs(tree)} for tree in trees]
    runs = [run for run in trained_runs(trees[0]) if all(run.folder in folders for folders in trained)]
    print(f"seeds      {', '.join(map(str, seeds))}" + ("" if len(seeds) > 1 else ": an ensemble needs several, so there is none"))
    rows = score_probabilistic(subject.model, root, trees, seeds, runs, columns, arguments.mc_samples, arguments.mc_dropout)
    report_reliability(root, rows, runs)


def add_columns(tree: Path, columns: dict[str, Benchmark]) -> None:
    """Makes columns of general ability part of a study that was trained without them."""
    record = read_json(tree / "study.json")
    if set(columns) - set(record.get("columns", {})):
        record["columns"] = record.get("columns", {}) | {name: column.spec for name, column in columns.items()}
        record["identity"]["data"] |= {name: column.fingerprint for name, column in columns.items()}
        write_json(tree / "study.json", record)


def evaluate_model(arguments: EvalConfig) -> None:
    """Any model, with or without an adapter, on any tasks and columns of general ability."""
    subject = load_subject(
        arguments.model, arguments.device, arguments.dtype, arguments.template, arguments.quantize, arguments.max_memory
    )
    columns, asked = choose_columns(arguments), arguments.tasks or arguments.datasets
    tasks = {} if columns and not asked else choose_tasks(asked, arguments.data_root, arguments.model == "nano")
    if arguments.no_merge and not tasks:
        raise LetheError("--no_merge compares the answers on tasks; name some with --tasks")
    check_decoding(arguments, tasks, arguments.data_root)
    print(subject.about)
    if arguments.adapter:
        load_adapter(subject.model, arguments.adapter)
        print(f"adapter    {arguments.adapter} on {len(lora_layers(subject.model))} linears")
    rows, results, unmerged = [], [], {}

    def keep(name: str, items: list[dict], found: list[dict]) -> None:
        results.extend({"model": arguments.model, "adapter": arguments.adapter, "task": name, **row} for row in found)
        for row in sorted(found, key=lambda row: not row["metric"].startswith("accuracy/")):  # what sums up comes last, and is seen
            interval = f"{row['low']:.3f} to {row['high']:.3f}"
            rows.append([name, row["metric"], f"{row['value']:.3f}", interval, row["n"], row["unparsed"]])
        if arguments.out:
            write_jsonl(Path(arguments.out) / "eval" / f"{name}.jsonl", items)

    settings = {"max_test": arguments.max_test, "batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens,
                "seed": arguments.seed}  # fmt: skip
    for task in tasks.values():
        settings["how"] = decoding_of(arguments, task.name)
        items = score_task(subject.model, subject.tokenizer, task, **settings)
        keep(task.name, items, summarise(items))
        if arguments.no_merge:
            others = score_task(subject.model, subject.tokenizer, task, **settings, merge=False)
            unmerged[task.name] = differences_of(items, others)
    for column in columns.values():
        items = score_benchmark(subject, column, batch_size=arguments.batch_size)
        keep(column.name, items, summarise_benchmark(items))
    print(format_table(rows, ["task", "metric", "value", "95 % interval", "n", "unparsed"]))
    for line in signature_lines(results):
        print(line)
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
