"""What a study will do: its runs, what makes one of them impossible, and the table that is printed before they start."""

from __future__ import annotations

import os

from data.batching import Examples, steps_of
from data.folder import held_out
from data.records import Report
from masking.bench import Bench
from masking.weights import policies
from study.comparison import plan_comparison
from study.config import Config, optimizer_arms, stage_config
from study.errors import LetheError
from study.folder import is_done
from study.logging import format_table
from study.plan import Run, nearest, parse_arms, plan_batch, plan_runs
from study.sequence import parse_orders, parse_rehearsal, plan_sequences


def plan(config: Config, tasks: list[str]) -> list[Run]:
    """The runs of the study, parents before children. Settings under which one of them could not run are told now."""
    if config.study == "batch":
        return plan_batch(tasks)
    if config.study == "sequences":
        arms = parse_rehearsal(config.rehearsal.arms)
        parse_arms(config.mask, policies())
        refuse_masks(config, [config.mask])
        if "adapter_nll" in policies()[config.mask]:
            raise LetheError(f"--mask {config.mask} asks a model trained on each task alone, which a sequence has not; choose another mask")
        return plan_sequences(parse_orders(config.sequence, tasks), arms, config.mask)
    compared = optimizer_arms(config)
    if compared is not None:
        rates = {name: [rate for other, rate in compared if other == name] for name, _ in compared}
        return plan_comparison(tasks, rates, config.pairs)
    known = policies()
    arms = parse_arms(config.mask, known)
    refuse_masks(config, arms)
    return plan_runs(tasks, arms, config.pairs, config.stage, any("adapter_nll" in known[arm] for arm in arms))


def refuse_masks(config: Config, arms: list[str]) -> None:
    """Settings under which an arm could not run, told before anything is trained."""
    masking, known = config.masking, policies()
    matchable = [name for name in known if "count" not in known[name] and "adapter_nll" not in known[name]]
    if masking.match not in matchable:
        raise LetheError(f"--match {masking.match}: no such policy to match{nearest(masking.match, matchable)}")
    for arm in config.arms or {}:
        parse_arms(arm, known)
    if config.train_on_source and config.stage != 1 and (masked := [arm for arm in arms if arm != "none"]):
        raise LetheError(f"--train_on_source trains on whole prompts, and --mask {masked[0]} chooses among answer tokens; give --mask none")
    for arm in arms:
        asked = masking.match if "count" in known[arm] else arm
        if masking.threshold == 0 and asked in ("highest", "stm_dpf"):
            raise LetheError(f"--mask {arm} drops what lies above --threshold, a perplexity: give one above 0 (dpf alone takes 0)")
        if masking.reference == "online" and "adapter_nll" in known[arm]:
            raise LetheError(f"--mask {arm} compares two stored models; give --reference start or base")


def plan_lines(bench: Bench, runs: list[Run]) -> str:
    """What will run, with the derived quantities, once; and which rows of the data were bad."""
    config = bench.config
    source = ", ".join(os.path.relpath(path) for path in config.sources) or "the defaults"
    lora = f"LoRA r {config.lora.rank}, alpha {config.lora.alpha:g}, dropout {config.lora.dropout:g}"
    lines = [f"settings   {source}; {'all weights are trained' if config.full else lora}"]
    done = sum(is_done(bench.study.dir(run.folder)) for run in runs)
    left = f"; the other {len(runs) - done} are not trained, as asked" if config.skip_training and done < len(runs) else ""
    planned = f"plan       {len(runs)} run{'s' * (len(runs) > 1)}, {done} of them done before{left}"
    columns = [f"{column.name} ({len(column.items) or column.spec.get('max_items') or 'all'} items)" for column in bench.columns.values()]
    if columns:
        lines.append(f"columns    {', '.join(columns)}: general ability, scored beside the tasks and never trained on")
    if config.study == "batch":  # whose files are read one by one, when their turn comes
        return "\n".join([*lines, planned])
    stages = sorted({run.stage for run in runs})
    table, bad = [], []

    def rows_of(name: str, max_train: int | None) -> Examples:
        """Those that are trained on: an optimizer study keeps some back."""
        return bench.examples(name, held_out(bench.tasks[name], max_train)[0] if config.study == "optimizers" else max_train)

    for name, task in bench.tasks.items():
        found = rows_of(name, config.max_train)
        report = found.report
        bad += [*report["bad_rows_shown"], *(f"{where}: {reason}" for where, reason in (task.test_report or Report()).dropped)]
        row = [name, len(found), len(task.test[: config.max_test]), report["length_p50_p95_max"][0], report["trainable_tokens"],
               report["truncated_prompts"], report["answers_too_long"], report["bad_rows"]]  # fmt: skip
        for stage in stages:
            settings, max_train = stage_config(config, stage)
            per_step = settings.batch_size * settings.gradient_accumulation
            row.append(steps_of(len(rows_of(name, max_train)), per_step, settings.epochs, settings.max_steps))
        table.append(row)
    lossy = "trained tokens" if config.train_on_source else "answer tokens"
    headers = ["task", "train", "test", "median tokens", lossy, "cut prompts", "too long", "bad rows"]
    lines.append(format_table(table, headers + [f"stage {stage} steps" for stage in stages]))
    lines += [f"bad row    {line}" for line in list(dict.fromkeys(bad))[:20]]
    return "\n".join([*lines, planned])
