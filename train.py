"""Trains LoRA adapters on one task after another, under different token masks, and scores what is forgotten.

    python train.py                                    # the built-in study: nano model, three tasks, both stages, three arms
    torchrun train.py --stage 2 --mask bottom10        # every ordered pair of tasks, this arm
    python train.py --config configs/masking.yaml --model meta-llama/Llama-3.2-1B-Instruct

Read from `fit` (one optimizer step after another) to `train_run` (one adapter) to `run_study` (all of them, then eval.py).
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import eval as evaluation
from data.batching import Examples, Micro, collate, micro_tokens_of, step_indices, steps_of, tokenize
from data.records import Report
from lora.adapter import adapter_fingerprint, load_adapter, save_adapter
from lora.layers import add_lora, dropout_keys, lora_parameters, remove_lora
from masking.inspect import as_page, in_terminal, masked_example, masked_markdown
from masking.score import dataset_weights, example_weights, micro_nll, score_examples
from masking.weights import policies
from model.attention import Pack
from model.checkpoint import find_model
from model.llama import Llama
from optim.masters import collect_gradients, make_masters, write_back
from optim.schedule import lr_factor
from study.config import Config, config_text, parse, parse_seeds, stage_config
from study.errors import LetheError, is_out_of_memory, run_command
from study.folder import StudyFolder, expand_out, is_done, open_study, seed_folders, write_json, write_text
from study.identity import identity_of
from study.logging import RunLog, format_table, memory_gib, progress, say
from study.plan import Run, arm_label, nearest, parse_arms, plan_runs

# ----------------------------------------------------------------------------------------------------------------------
# The loop


@dataclass
class Step:
    """What one optimizer step did. Its readings stay on the device until they are asked for, so that no step waits."""

    number: int
    kept: float  # share of the completion tokens with a weight above 0
    tokens: int  # tokens of the batch, prompts included
    learning_rate: float
    outcome: str  # "stepped"; "skipped": nothing was kept; "overflowed": float16 gradients were not finite
    micro_tokens: int  # the budget of one forward pass, smaller than asked once memory ran out
    examples: list[int]
    readings: Tensor  # (2,) loss and gradient norm

    @property
    def loss(self) -> float:
        """The weighted mean nll of the kept completion tokens, in nats. Raises LetheError where it is not finite."""
        loss = float(self.readings[0])
        if not math.isfinite(loss):
            raise LetheError(
                f"the loss is {loss} at step {self.number} (examples {self.examples[:8]} …); "
                "lower --learning_rate, or with --dtype float16 use bfloat16 or float32"
            )
        return loss

    @property
    def grad_norm(self) -> float:
        return float(self.readings[1])


def fit(
    model: Llama,
    parameters: list[nn.Parameter],
    make_optimizers: Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]],
    batches: Callable[[int, int], list[Micro]],
    total_steps: int,
    *,
    micro_tokens: int,
    schedule: str = "cosine",
    warmup: int = 0,
    floor: float = 0.0,
    max_grad_norm: float = 1.0,
    normalize: str = "kept",
    online_weights: Callable[[Tensor, Micro], Tensor] | None = None,
    seed: int = 0,
) -> Iterator[Step]:
    """Trains `parameters`, yielding after each optimizer step.

    The loss of a step is sum(w * nll) / sum(w) over all its micro-batches (normalize "all": / completion tokens), so it
    does not matter how the step is split. batches(step, micro_tokens) gives the micro-batches, of at most micro_tokens
    tokens each; where one has no weights of its own, online_weights(nll, micro) decides them from this pass's losses.
    Optimizers step on float32 masters. A step that runs out of memory is taken again in smaller micro-batches, and so are
    those after it; this is said once.
    """
    masters = make_masters(parameters)
    optimizers = make_optimizers(masters)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    # float16 gradients underflow without a loss scale; bfloat16 and float32 need none.
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)
    model.train()
    for number in range(total_steps):
        factor = lr_factor(number, total_steps, warmup, schedule, floor)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

        # Forward and backward. Gradients gather sum(w * nll) / count; the true denominator is known at the end.
        sums = None
        while sums is None:
            micros = batches(number, micro_tokens)
            count = sum(micro.completions for micro in micros)
            try:
                sums = forward_backward(model, micros, lambda loss: scaler.scale(loss / count).backward(), online_weights, (seed, number))  # noqa: B023
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or all(len(micro.lengths) == 1 for micro in micros):
                    raise
            if sums is None:  # beyond the except, so that nothing holds the failed pass
                micro_tokens = smaller_passes(model, parameters, micros, number)
        loss_sum, weight_sum, kept = sums

        # One global denominator, then clip and step.
        denominator = weight_sum if normalize == "kept" else count
        collect_gradients(parameters, masters)
        outcome, grad_norm = "stepped", torch.zeros((), device=model.device)
        if weight_sum == 0:
            outcome = "skipped"
        else:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            for master in masters:
                if master.grad is not None:
                    master.grad.mul_(count / denominator)
            grad_norm = torch.nn.utils.clip_grad_norm_(masters, max_grad_norm or float("inf"))
            scale = scaler.get_scale()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            outcome = "overflowed" if scaler.is_enabled() and scaler.get_scale() < scale else "stepped"
            write_back(parameters, masters)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        readings = torch.stack((loss_sum / (denominator or 1), grad_norm.double()))
        tokens, examples = sum(micro.tokens for micro in micros), [i for micro in micros for i in micro.indices]
        yield Step(number, kept / count, tokens, peaks[0][0] * factor, outcome, micro_tokens, examples, readings)


def forward_backward(
    model: Llama, micros: list[Micro], backward: Callable[[Tensor], None], online_weights: Callable | None, key: tuple[int, int]
) -> tuple[Tensor, float, int]:
    """One forward and backward pass a micro-batch -> (sum of w * nll, on the device), sum of w, how many w are above 0."""
    loss_sum, weight_sum, kept = torch.zeros((), dtype=torch.float64, device=model.device), 0.0, 0
    for micro in micros:
        if not len(micro.rows):  # the mask has dropped every token of it
            continue
        micro = micro.to(model.device)
        sight = Pack(micro.lengths, model.config, model.device)
        nll = micro_nll(model, micro, sight, dropout_keys(*key, micro.examples, sight.positions))  # (n,)
        if micro.weights is None:
            weights = online_weights(nll.detach(), micro)
            weight_sum, kept = weight_sum + float(weights.sum(dtype=torch.float64)), kept + int((weights > 0).sum())
        else:
            weights = micro.weights
            weight_sum, kept = weight_sum + micro.weight_sum, kept + len(weights)
        weighted = (nll * weights).sum()
        backward(weighted)
        loss_sum += weighted.detach()
    return loss_sum, weight_sum, kept


def smaller_passes(model: Llama, parameters: list[nn.Parameter], micros: list[Micro], number: int) -> int:
    """After a step ran out of memory: drops what it has computed, says so, and returns the next budget of a pass."""
    for parameter in parameters:
        parameter.grad = None
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    tried = max(len(micro.input_ids) for micro in micros)
    say(f"out of memory at step {number} with {tried} tokens in a pass: going on with at most {tried // 2}; the gradient is the same")
    return tried // 2


# ----------------------------------------------------------------------------------------------------------------------
# One run


@dataclass
class Bench:
    """What all runs of a study share: the base stays loaded, tokens and scores are made once."""

    config: Config
    subject: evaluation.Subject
    tasks: dict[str, evaluation.Task]
    study: StudyFolder
    seed: int

    def examples(self, task: str, max_train: int | None) -> Examples:
        """The task's training examples, tokenised once and mapped from the study folder."""
        found, bad_rows = self.tasks[task], Report()
        records = found.train(report=bad_rows)
        cache, length = self.study.path / "tokens", self.config.max_length
        return tokenize(records, self.subject.tokenizer, length, found.fingerprint, cache, max_train, bad_rows)

    def scores(self, adapter: str | None, examples: Examples) -> np.ndarray:
        """nll of all completion tokens under base + adapter (a run folder; None: the base), cached."""
        model = self.subject.model
        reference = "base"
        if adapter is None:
            remove_lora(model)
        else:
            folder = self.study.dir(adapter)
            load_adapter(model, folder)
            reference = adapter_fingerprint(folder)
        with progress(len(examples), "perplexity", "examples") as bar:
            return score_examples(model, examples, reference, self.study.path / "perplexity", progress=bar.update)

    def mask_settings(self) -> dict:
        m = self.config.masking
        return {"threshold": m.threshold, "group_size": m.group_size, "overlap_ratio": m.overlap_ratio, "ratio": m.ratio,
                "direction": m.direction, "match": m.match, "tau": m.tau}  # fmt: skip


def masked_weights(bench: Bench, run: Run, examples: Examples) -> tuple[np.ndarray | None, dict, np.ndarray | None]:
    """(weights, statistics, nll) of a run's completions. Weights are None for --reference online: the loop decides them."""
    masking = bench.config.masking
    if run.arm == "none":
        return *dataset_weights(examples, "none", {}, None), None
    if masking.reference == "online":
        return None, {"completion_tokens": int(examples.completion_offsets[-1])}, None
    nll = bench.scores(run.parent if masking.reference == "start" else None, examples)
    # The difference filters ask whether a model trained plainly on this very task finds the token harder.
    other = bench.scores(f"lora_base/{run.second}", examples) if "adapter_nll" in policies()[run.arm] else None
    weights, stats = dataset_weights(examples, run.arm, bench.mask_settings(), nll, other, masking.mask_end, bench.seed)
    return weights, stats, nll


def train_run(bench: Bench, run: Run, label: str) -> None:
    """Trains one adapter and writes it, its log and, last, its manifest run.json."""
    config, model, folder = bench.config, bench.subject.model, bench.study.dir(run.folder)
    settings, max_train = stage_config(config, run.stage, run.arm)
    if folder.exists():  # a run that was cut short begins anew: same seed, same bits
        shutil.rmtree(folder)
    examples = bench.examples(run.task, max_train)
    weights, mask_stats, nll = masked_weights(bench, run, examples)

    # The adapter: a fresh one, or the first stage's, continued.
    if run.parent is None:
        add_lora(model, config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.targets, config.lora.rslora,
                 torch.Generator().manual_seed(bench.seed))  # fmt: skip
    else:
        load_adapter(model, bench.study.dir(run.parent), dropout=config.lora.dropout)
    parameters = lora_parameters(model)
    model.gradient_checkpointing = settings.gradient_checkpointing

    # Steps. One is batch_size * gradient_accumulation examples; how they are packed into passes changes nothing but memory.
    per_step = settings.batch_size * settings.gradient_accumulation
    total = steps_of(len(examples), per_step, settings.epochs, settings.max_steps)

    def batches(step: int, micro_tokens: int) -> list[Micro]:
        return collate(examples, step_indices(len(examples), per_step, bench.seed, step), micro_tokens, weights)

    def online(losses: Tensor, micro: Micro) -> Tensor:
        parts = []
        for index, part in zip(micro.indices, losses.split(micro.sizes), strict=True):
            generator = torch.Generator().manual_seed(bench.seed * 1_000_003 + index)
            parts.append(example_weights(part.cpu().numpy(), run.arm, bench.mask_settings(), config.masking.mask_end, generator=generator))
        return torch.cat(parts).to(losses.device)

    def optimizers(masters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        o = config.optimizer
        decay = settings.weight_decay
        return [torch.optim.AdamW(masters, lr=settings.learning_rate, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=decay)]

    steps = fit(
        model, parameters, optimizers, batches, total, micro_tokens=micro_tokens_of(config.micro_tokens, model.device),
        schedule=settings.scheduler, warmup=round(settings.warmup_ratio * total), max_grad_norm=settings.max_grad_norm,
        normalize="all" if run.arm == "soft" else config.masking.normalize, online_weights=online, seed=bench.seed,
    )  # fmt: skip

    began, tokens, outcomes, kept, recent, last_loss = time.perf_counter(), 0, {}, [], [], math.nan
    with RunLog(bench.study.path, run.folder) as log, progress(total, " ".join(label.split()), " steps") as bar:
        log.text("config", "```\n" + config_text(config) + "```")
        log_masked_examples(bench, log, examples, nll, weights)
        for step in steps:
            tokens += step.tokens
            outcomes[step.outcome] = outcomes.get(step.outcome, 0) + 1
            kept.append(step.kept)
            recent.append(step)
            number = step.number + 1
            if number % settings.log_steps == 0 or number in (1, total):
                last_loss = float(np.mean([step.loss for step in recent]))  # the mean since the line before, there and in TensorBoard
                speed = tokens / (time.perf_counter() - began)  # after the reading, which waits for the device
                log.scalars({"train/loss": last_loss, "train/learning_rate": step.learning_rate, "train/grad_norm": step.grad_norm,
                             "train/kept_share": step.kept, "train/tokens_per_s": speed, "train/memory_gib": memory_gib()},
                            number, tokens=tokens)  # fmt: skip
                recent.clear()
            bar.update(1, loss=last_loss, kept=step.kept, tok_s=int(speed), mem_gib=memory_gib())
            if settings.eval_steps and number % settings.eval_steps == 0:
                log.scalars(held_out_scores(bench, run), number)
        seconds = time.perf_counter() - began
        log.hparams({"stage": run.stage, "arm": run.arm, "first": run.first, "second": run.second, "seed": bench.seed,
                     "learning_rate": settings.learning_rate, "epochs": settings.epochs, "examples_per_step": per_step,
                     "lora_rank": config.lora.rank, "lora_alpha": config.lora.alpha},
                    {"train/final_loss": last_loss, "train/dropped_share": 1 - float(np.mean(kept))}, total)  # fmt: skip

    if weights is None:
        mask_stats["dropped_share"] = 1 - float(np.mean(kept))
    if not outcomes.get("stepped"):
        mend = "the mask keeps no token; raise --tau" if run.arm == "soft" else "the mask keeps no token; raise --threshold"
        raise LetheError(f"{run.folder}: not one of {total} steps could be taken ({outcomes}): {mend}")
    save_adapter(model, folder, bench.subject.name)
    write_json(folder / "run.json", {
        "status": "done", "run": run.__dict__, "steps": total, "outcomes": outcomes, "tokens": tokens, "seconds": round(seconds, 3),
        "micro_tokens": step.micro_tokens, "examples": len(examples), "data": examples.report,
        "mask": mask_stats, "reference": config.masking.reference if run.arm != "none" else None,
        "template": bench.subject.tokenizer.template, "dtype": str(model.dtype).removeprefix("torch."), "seed": bench.seed,
        "base_fingerprint": model.fingerprint, "adapter_fingerprint": adapter_fingerprint(folder),
        "learning_rate": settings.learning_rate, "final_loss": last_loss, "memory_gib": memory_gib(),
    })  # fmt: skip
    note = "".join(f", {count} {outcome}" for outcome, count in outcomes.items() if outcome != "stepped")
    print(f"{label}  {total:3d} steps{note}  loss {last_loss:6.3f}  dropped {mask_stats['dropped_share']:5.1%}  "
          f"{tokens / seconds / 1000:4.1f}k tok/s {seconds:5.1f} s", flush=True)  # fmt: skip


def held_out_scores(bench: Bench, run: Run) -> dict[str, float]:
    """Exact match and answer nll on the first test items of the run's tasks, while it trains."""
    values = {}
    for name in filter(None, (run.first, run.second)):
        items = evaluation.score_task(
            bench.subject.model, bench.subject.tokenizer, bench.tasks[name], max_test=bench.config.evaluation.eval_items,
            max_length=bench.config.max_length, batch_size=bench.config.evaluation.batch_size,
            max_new_tokens=bench.config.evaluation.max_new_tokens, quiet=True,
        )  # fmt: skip
        values[f"eval/{name}/exact_match"] = float(np.mean([item["exact_match"] for item in items]))
        values[f"eval/{name}/answer_nll"] = float(np.mean([item["answer_nll"] for item in items]))
    return values


def log_masked_examples(bench: Bench, log: RunLog, examples: Examples, nll: np.ndarray | None, weights: np.ndarray | None) -> None:
    """Two examples with their dropped tokens struck through, and the histogram of token perplexities."""
    if nll is not None:
        log.histogram("mask/log10_perplexity", nll / np.log(10))
    if weights is not None:
        for index in range(min(2, len(examples))):
            log.text(f"mask/example_{index}", masked_markdown(*masked_example(examples, index, nll, weights, bench.subject.tokenizer)))


# ----------------------------------------------------------------------------------------------------------------------
# The whole study


def run_study(config: Config, argv: list[str]) -> None:
    began = time.perf_counter()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LetheError("one process at a time: use --nproc-per-node 1")
    find_model(config.model.name)  # before the data: a wrong name is told as such
    tasks = evaluation.choose_tasks(config.datasets, config.data_root, config.model.name == "nano", config.strict)
    known = policies()
    arms = parse_arms(config.mask, known)
    refuse_masks(config, arms)
    runs = plan_runs(list(tasks), arms, config.pairs, config.stage, any("adapter_nll" in known[arm] for arm in arms))
    involved = {name for run in runs for name in (run.first, run.second)}
    tasks = {name: task for name, task in tasks.items() if name in involved}
    root = expand_out(config.out, config.model.name)
    subject = evaluation.load_subject(config.model.name, config.device, config.dtype, config.template)
    print(subject.about)
    # What "auto" turned out to be is part of the study: another machine must not mix its own choice in.
    resolved = replace(config, dtype=str(subject.model.dtype).removeprefix("torch."), template=subject.tokenizer.template)
    seeds, worked = parse_seeds(config), 0
    if (root / "study.json").is_file() if config.seeds else seed_folders(root) != [root]:
        raise LetheError(f"{root} holds a study of {'one seed' if config.seeds else 'several seeds'}; choose another folder with --out")
    for seed in seeds:
        tree = root if config.seeds is None else root / f"seed{seed}"
        identity = identity_of(resolved, subject.model.fingerprint, {name: task.fingerprint for name, task in tasks.items()}, seed)
        specs = {name: {"name": task.spec, "data_root": str(Path(config.data_root).resolve())} for name, task in tasks.items()}
        more = {"tasks": specs, "model": config.model.name, "template": subject.tokenizer.template}
        study = open_study(tree, resolved, identity, more, argv)
        bench = Bench(config, subject, tasks, study, seed)
        if config.inspect:
            show_masks(bench, runs, arms)
            continue
        todo = [run for run in runs if not is_done(study.dir(run.folder))]
        print(f"\nstudy      {tree}   seed {seed}")
        print(plan_lines(bench, runs, len(runs) - len(todo)))
        names = [run.first if run.stage == 1 else f"{run.first} > {run.second}  {arm_label(run.arm)}" for run in todo]
        for number, (run, name) in enumerate(zip(todo, names, strict=True), 1):
            train_run(bench, run, f"{number:3d}/{len(todo)} {name:{max(map(len, names))}s}")
        only = {name.strip() for name in config.evaluation.tasks.split(",")} if config.evaluation.tasks else None
        scored = evaluation.score_study(tree, config, subject, tasks, only)
        worked += len(todo) + scored
    if config.inspect:
        return
    if not worked and evaluation.is_reported(root):
        print(f"nothing to do: every run is trained and every cell is scored; python eval.py --root {root} shows the results")
        return
    evaluation.report(root)
    print(f"took       {time.perf_counter() - began:.0f} s")


def refuse_masks(config: Config, arms: list[str]) -> None:
    """Settings under which an arm could not run, told before anything is trained."""
    masking, known = config.masking, policies()
    matchable = [name for name in known if "count" not in known[name] and "adapter_nll" not in known[name]]
    if masking.match not in matchable:
        raise LetheError(f"--match {masking.match}: no such policy to match{nearest(masking.match, matchable)}")
    for arm in config.arms or {}:
        parse_arms(arm, known)
    for arm in arms:
        asked = masking.match if "count" in known[arm] else arm
        if masking.threshold == 0 and asked in ("highest", "stm_dpf"):
            raise LetheError(f"--mask {arm} drops what lies above --threshold, a perplexity: give one above 0 (dpf alone takes 0)")
        if masking.reference == "online" and "adapter_nll" in known[arm]:
            raise LetheError(f"--mask {arm} compares two stored models; give --reference start or base")


def plan_lines(bench: Bench, runs: list[Run], done: int) -> str:
    """What will run, with the derived quantities, once; and which rows of the data were bad."""
    config = bench.config
    source = ", ".join(os.path.relpath(path) for path in config.sources) or "the defaults"
    lines = [f"settings   {source}; LoRA r {config.lora.rank}, alpha {config.lora.alpha:g}, dropout {config.lora.dropout:g}"]
    stages = sorted({run.stage for run in runs})
    table, bad = [], []
    for name, task in bench.tasks.items():
        found = bench.examples(name, config.max_train)
        report = found.report
        bad += [*report["bad_rows_shown"], *(f"{where}: {reason}" for where, reason in (task.test_report or Report()).dropped)]
        row = [name, len(found), len(task.test[: config.max_test]), report["length_p50_p95_max"][0], report["trainable_tokens"],
               report["truncated_prompts"], report["answers_too_long"], report["bad_rows"]]  # fmt: skip
        for stage in stages:
            settings, max_train = stage_config(config, stage)
            per_step = settings.batch_size * settings.gradient_accumulation
            row.append(steps_of(len(bench.examples(name, max_train)), per_step, settings.epochs, settings.max_steps))
        table.append(row)
    headers = ["task", "train", "test", "median tokens", "answer tokens", "cut prompts", "too long", "bad rows"]
    lines.append(format_table(table, headers + [f"stage {stage} steps" for stage in stages]))
    lines += [f"bad row    {line}" for line in list(dict.fromkeys(bad))[:20]]
    lines.append(f"plan       {len(runs)} run{'s' * (len(runs) > 1)}, {done} of them done before")
    return "\n".join(lines)


def show_masks(bench: Bench, runs: list[Run], arms: list[str]) -> None:
    """--inspect N: kept and dropped tokens of the first N examples of each pair and arm, here and as an HTML page."""
    config = bench.config
    shown_runs = [run for run in runs if run.stage == 2 and run.arm != "none"]
    if not shown_runs:
        raise LetheError("--inspect shows what a mask drops in stage 2; name one with --mask bottom10, and leave out --stage 1")
    for run in shown_runs:
        if config.masking.reference == "start" and not is_done(bench.study.dir(run.parent)):
            # Nothing is trained here, so without the stage-1 adapter the base stands in, and the page says so.
            print(f"{run.parent} is not trained yet: the base's perplexities are shown instead of the start model's")
            bench_reference = None
        else:
            bench_reference = run.parent if config.masking.reference == "start" else None
        examples = bench.examples(run.second, stage_config(config, 2, run.arm)[1])
        nll = bench.scores(bench_reference, examples)
        other = None
        if "adapter_nll" in policies()[run.arm]:
            if not is_done(bench.study.dir(f"lora_base/{run.second}")):
                raise LetheError(f"--mask {run.arm} needs lora_base/{run.second}, which is not trained yet; run --stage 1 first")
            other = bench.scores(f"lora_base/{run.second}", examples)
        weights, stats = dataset_weights(examples, run.arm, bench.mask_settings(), nll, other, config.masking.mask_end, bench.seed)
        shown = [masked_example(examples, i, nll, weights, bench.subject.tokenizer) for i in range(min(config.inspect, len(examples)))]
        title = f"{arm_label(run.arm)}: {run.first} > {run.second}"
        subtitle = (f"perplexity under {bench_reference or 'the base'}; "
                    f"{stats['dropped_share']:.1%} of {stats['completion_tokens']} completion tokens dropped, "
                    f"{stats['emptied_examples']} examples left with their end token alone")  # fmt: skip
        print(f"\n{title}\n{subtitle}")
        for prompt, tokens in shown:
            print("\n" + in_terminal(prompt, tokens, sys.stdout.isatty()))
        page = bench.study.path / "inspect" / f"{arm_label(run.arm)}_{run.first}_to_{run.second}.html"
        write_text(page, as_page(title, subtitle, shown))
        print(f"\npage       {page}")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv

    def work() -> None:
        config = parse(argv)
        if config.print_config:
            print(config_text(config), end="")
        else:
            run_study(config, ["train.py", *argv])

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
