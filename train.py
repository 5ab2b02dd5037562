"""Trains LoRA adapters on one task after another, under different token masks, and scores what is forgotten.

    python train.py                                    # the built-in study: nano model, three tasks, both stages, three arms
    torchrun train.py --stage 2 --mask bottom10        # every ordered pair of tasks, this arm
    python train.py --config configs/masking.yaml --model meta-llama/Llama-3.2-1B-Instruct

Read from `fit` (one optimizer step after another) to `train_run` (one adapter) to `run_study` (all of them, then eval.py).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import eval as evaluation
from data.batching import Micro, collate, micro_tokens_of, step_indices, steps_of
from data.corpus import Corpus, load_corpus
from data.folder import whole_file
from lora.layers import dropout_keys
from lora.resume import Learner, Tally, asked_checkpoint, refuse_other, resume, save_checkpoint
from lora.states import fresh_model, save_state, state_fingerprint
from masking.attempts import forget_changed, one_by_one
from masking.bench import Bench, begin, log_masked_examples, masked_weights, settings_of, show_masks
from masking.outline import plan, plan_lines
from masking.score import example_weights, micro_nll
from masking.weights import policies
from model.attention import Pack
from model.checkpoint import find_model, load_config, load_model
from model.config import training_flops
from model.generate import Decoder
from model.growth import grow
from model.layer_map import layer_map
from model.llama import Llama
from model.sharding import check_optimizers, gathered, idle_pass, is_sharded, load_sharded
from model.subject import load_subject, resolve
from model.tokenizer import load_tokenizer
from optim.anchor import Anchor
from optim.masters import collect_gradients, write_back
from optim.parallel import ALONE, RankLost, Ranks
from optim.partition import optimizers_of, partition_lines
from optim.schedule import lr_factor
from study.batch import choose_chunk, task_names
from study.batch_result import BatchResult
from study.config import config_text, optimizer_arms, parse, parse_seeds
from study.errors import LetheError, is_out_of_memory, run_command
from study.folder import StudyFolder, expand_out, in_use, is_done, open_study, read_json, seed_folders, write_json
from study.identity import circumstances, identity_of
from study.logging import RunLog, memory_gib, progress, say
from study.plan import Run, numbered, title_of
from study.queue import Job, Workers, gather
from study.report import in_reading_order, is_reported, report, report_general, report_growth, trained_runs
from study.settings import Config, GrowthConfig, PretrainingConfig, StageConfig
from study.signals import Interrupted, stop_on_signal

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
        """The weighted mean nll of the kept completion tokens, in nats. Raises LetheError where it or the gradient is not finite."""
        loss = float(self.readings[0])
        for name, value in (("loss", loss), ("gradient's norm", self.grad_norm if self.outcome == "stepped" else 0.0)):
            if not math.isfinite(value):
                raise LetheError(
                    f"the {name} is {value} at step {self.number} (examples {self.examples[:8]} …); "
                    "lower --learning_rate, or with --dtype float16 use bfloat16 or float32"
                )
        return loss

    @property
    def grad_norm(self) -> float:
        return float(self.readings[1])


def fit(
    model: Llama,
    learner: Learner,
    batches: Callable[[int, int], list[Micro]],
    total_steps: int,
    *,
    micro_tokens: int,
    start: int = 0,
    schedule: str = "cosine",
    warmup: int = 0,
    floor: float = 0.0,
    max_grad_norm: float = 1.0,
    normalize: str = "kept",
    online_weights: Callable[[Tensor, Micro], Tensor] | None = None,
    anchor: Anchor | None = None,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> Iterator[Step]:
    """Trains the learner's parameters from step `start` on, yielding after each optimizer step.

    The loss of a step is sum(w * nll) / sum(w) over all its micro-batches (normalize "all": / completion tokens), so it
    does not matter how the step is split. batches(step, micro_tokens) gives the micro-batches, of at most micro_tokens
    tokens each; where one has no weights of its own, online_weights(nll, micro) decides them from this pass's losses.
    Learning rate, data and dropout are functions of the step's number alone. With several ranks, batches gives this rank's
    share, and gradients and sums are those of all (optim.parallel). A step that runs out of memory is taken again
    in smaller micro-batches, and so are those after it; this is said once. An anchor's gradient (optim.anchor) joins that of
    the whole step, so clipping and the gradient's norm are of both; the loss is the data's alone.
    """
    parameters, masters, optimizers, scaler = learner.parameters, learner.masters, learner.optimizers, learner.scaler
    model.train()
    sharded = is_sharded(model)  # then gradients come summed and cut, and no rank can take a pass again by itself
    for number in range(start, total_steps):
        factor = lr_factor(number, total_steps, warmup, schedule, floor)
        for optimizer, rates in zip(optimizers, learner.peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

        # Forward and backward. Gradients gather sum(w * nll) / count; the true denominator is known at the end.
        micros = batches(number, micro_tokens)
        examples = [i for micro in micros for i in micro.indices]
        count, tokens = ranks.totals(sum(micro.completions for micro in micros), sum(micro.tokens for micro in micros))
        sums = None
        while sums is None:
            try:
                backward = lambda loss, scale=scaler.scale, count=count: scale(loss / count).backward()  # noqa: E731
                sums = forward_backward(model, micros, backward, online_weights, (seed, number), ranks)
            except (RuntimeError, MemoryError) as error:
                if sharded or not is_out_of_memory(error) or all(len(micro.lengths) == 1 for micro in micros):
                    raise
            if sums is None:  # beyond the except, so that nothing holds the failed pass
                micro_tokens = smaller_passes(model, parameters, micros, number)
                micros = batches(number, micro_tokens)

        # One global denominator, then clip and step.
        loss_sum, (weight_sum, kept) = sums[0], ranks.totals(*sums[1:])
        denominator = weight_sum if normalize == "kept" else count
        collect_gradients(parameters, masters)
        ranks.sum_([] if sharded else masters, loss_sum)
        outcome, grad_norm = "stepped", torch.zeros((), device=model.device)
        if weight_sum == 0:
            outcome = "skipped"
        else:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            for master in masters:
                if master.grad is not None:
                    master.grad.mul_(count / denominator)
            if anchor is not None:
                anchor.add_(masters)
            clip_ = ranks.clip_ if sharded else torch.nn.utils.clip_grad_norm_
            grad_norm = clip_(masters, max_grad_norm or float("inf"))
            scale = scaler.get_scale()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            outcome = "overflowed" if scaler.is_enabled() and scaler.get_scale() < scale else "stepped"
            write_back(parameters, masters)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        readings = torch.stack((loss_sum / (denominator or 1), grad_norm.double()))
        yield Step(number, kept / count, int(tokens), learner.peaks[0][0] * factor, outcome, micro_tokens, examples, readings)


def forward_backward(
    model: Llama,
    micros: list[Micro],
    backward: Callable[[Tensor], None],
    online_weights: Callable | None,
    key: tuple[int, int],
    ranks: Ranks = ALONE,
) -> tuple[Tensor, float, int]:
    """One forward and backward pass a micro-batch -> (sum of w * nll, on the device), sum of w, how many w are above 0."""
    loss_sum, weight_sum, kept = torch.zeros((), dtype=torch.float64, device=model.device), 0.0, 0
    micros = [micro for micro in micros if len(micro.rows)]  # of the others the mask has dropped every token
    idle = int(ranks.most(len(micros))) - len(micros) if is_sharded(model) else 0
    for micro in micros:
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
    for _ in range(idle):
        idle_pass(model)
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


def follow(
    learner: Learner, steps: Callable[[int, int], Iterator[Step]], tree: Path, run: str, label: str, total: int, same: dict, *,
    per_epoch: int, stage: int, settings: StageConfig | PretrainingConfig, micro_tokens: int, keep: int, name: str, ranks: Ranks,
    hparams: dict, asked: Path | None = None, check: Callable[[], None] = lambda: None, tell: Callable = print,
    begins: Callable[[RunLog], None] = lambda log: None, scores: Callable[[int], dict[str, float]] | None = None,
) -> Tally:  # fmt: skip
    """Takes the steps of a run, from its newest checkpoint on, and logs, scores and saves on the way as the settings say.

    steps(start, micro_tokens) gives them; run is its folder in `tree`; same: what a checkpoint must have in common with it. After SIGINT or
    SIGTERM the step is finished and saved, and Interrupted raised.
    """
    folder, tally, same = tree / run, Tally(micro_tokens), json.loads(json.dumps(same))
    with ranks.main_first():
        saved, done = resume(folder, learner, same, asked, keep, ranks), 0
    if saved:
        done, budget = saved["step"], tally.micro_tokens
        tally.__dict__.update(saved["tally"])
        tally.micro_tokens = min(tally.micro_tokens, budget)
        tell(f"resumed    {run} after step {done} of {total}")
    before, began, speed = tally.seconds, time.perf_counter(), 0.0
    with (
        RunLog(tree, run, done, enabled=ranks.main) as log,
        progress(total, " ".join(label.split()), " steps", start=done, enabled=ranks.main) as bar,
        stop_on_signal() as stop,
    ):
        if not done:
            begins(log)
        for step in steps(done, tally.micro_tokens):
            number = step.number + 1
            tally.add(step)
            check()
            if number % settings.log_steps == 0 or number in (1, total):
                tally.close_line()
                speed = tally.tokens / (before + time.perf_counter() - began)  # after the reading, which waits for the device
                log.scalars({"train/loss": tally.last_loss, "train/learning_rate": step.learning_rate, "train/grad_norm": step.grad_norm,
                             "train/kept_share": step.kept, "train/tokens_per_s": speed, "train/memory_gib": memory_gib()},
                            number, tokens=tally.tokens)  # fmt: skip
            bar.update(1, loss=tally.last_loss, kept=step.kept, tok_s=int(speed), mem_gib=memory_gib())
            if scores is not None and (number % settings.eval_steps == 0 or number == total) and ranks.main:
                log.scalars(scores(number), number)
            stops = bool(ranks.most(stop.asked))
            if number < total and (stops or number % settings.save_steps == 0):
                tally.seconds = before + time.perf_counter() - began
                log.flush()
                state = {"same": same, "tally": tally.state()}  # a loss that is not finite is an error here, and never saved
                if ranks.main or is_sharded(learner.model):
                    save_checkpoint(folder, stage, number / per_epoch, number, learner, state, keep, name, ranks)
            if stops:
                raise Interrupted
        tally.seconds = before + time.perf_counter() - began
        ends = {"train/final_loss": tally.last_loss, "train/dropped_share": 1 - float(np.mean(tally.kept))}
        log.hparams(hparams, ends, total)
    return tally


def train_run(bench: Bench, run: Run, label: str) -> None:
    """Trains one run from its newest checkpoint on, and writes what it leaves, its log and, last, its manifest run.json."""
    config, model, folder, ranks = bench.config, bench.trained, bench.study.dir(run.folder), bench.ranks
    settings, max_train, optimizer = settings_of(bench, run)
    with ranks.main_first():
        examples, rehearsed = bench.examples_of(run, max_train)
        weights, mask_stats, nll = masked_weights(bench, run, examples)
    names, parameters = zip(*begin(bench, run), strict=True)
    model.gradient_checkpointing = settings.gradient_checkpointing

    # Steps. One is batch_size * gradient_accumulation examples; how they are packed into passes changes nothing but memory.
    per_step = settings.batch_size * settings.gradient_accumulation
    total = steps_of(len(examples), per_step, settings.epochs, settings.max_steps)
    warmup = round(settings.warmup_ratio * total) if settings.warmup_steps is None else settings.warmup_steps

    def batches(step: int, micro_tokens: int) -> list[Micro]:
        mine = ranks.share(step_indices(len(examples), per_step, bench.seed, step), examples.lengths)
        return collate(examples, mine, micro_tokens, weights) if mine else []

    def online(losses: Tensor, micro: Micro) -> Tensor:
        parts = []
        for index, part in zip(micro.indices, losses.split(micro.sizes), strict=True):
            generator = torch.Generator().manual_seed(bench.seed * 1_000_003 + index)
            parts.append(example_weights(part.cpu().numpy(), run.mask, bench.mask_settings(), config.masking.mask_end, generator=generator))
        return torch.cat(parts).to(losses.device)

    o = optimizer
    choice = {"name": o.name, "learning_rate": settings.learning_rate, "weight_decay": settings.weight_decay, "betas": (o.beta1, o.beta2),
              "eps": o.eps, "momentum": o.momentum, "nesterov": o.nesterov, "ns_steps": o.ns_steps, "muon_scale": o.muon_scale,
              "muon_factors": o.muon_factors}  # fmt: skip
    learner = Learner(model, list(parameters), lambda masters: optimizers_of(list(names), masters, **choice))
    partition = partition_lines(list(names), list(parameters), name=o.name, muon_scale=o.muon_scale, muon_factors=o.muon_factors)
    if partition not in bench.told:  # once for each optimizer and rate
        bench.tell("optimizer  " + ("adamw for all parameters" if o.name == "adamw" else "\n           ".join(partition)))
        bench.told.append(partition)
    anchor = bench.anchor(run, list(names), list(parameters), learner.masters)
    same = {
        "run": run.__dict__, "base": model.fingerprint, "tokens": examples.key, "steps": total, "examples_per_step": per_step,
        "optimizer": choice, "warmup": warmup, "schedule": settings.scheduler, "seed": bench.seed, "mask": mask_stats,
        "lora": None if config.full else config.lora.__dict__, "masking": None if run.mask == "none" else config.masking.__dict__,
        "max_grad_norm": settings.max_grad_norm, "dtype": str(model.dtype).removeprefix("torch."),
        "rehearsal": rehearsed, "anchor": anchor and [anchor.coefficient, anchor.fisher is not None],
    }  # fmt: skip

    def steps(start: int, micro_tokens: int) -> Iterator[Step]:
        return fit(
            model, learner, batches, total, start=start, micro_tokens=micro_tokens, schedule=settings.scheduler, warmup=warmup,
            max_grad_norm=settings.max_grad_norm, normalize="all" if run.mask == "soft" else config.masking.normalize,
            online_weights=online, seed=bench.seed, ranks=ranks, anchor=anchor,
        )  # fmt: skip

    def begins(log: RunLog) -> None:
        log.text("config", "```\n" + config_text(config) + "```")
        log_masked_examples(bench, log, examples, nll, weights)

    if ranks.main:
        shutil.rmtree(folder / "eval", ignore_errors=True)  # scores of what was there before
    tally = follow(
        learner, steps, bench.study.path, run.folder, label, total, same, per_epoch=math.ceil(len(examples) / per_step), stage=run.stage,
        settings=settings, micro_tokens=micro_tokens_of(config.micro_tokens, model.device), keep=config.keep, name=bench.subject.name,
        ranks=ranks, asked=asked_checkpoint(config, run), check=bench.check, tell=bench.tell, begins=begins,
        scores=(lambda _: held_out_scores(bench, run)) if settings.eval_steps else None,
        hparams={"stage": run.stage, "arm": run.arm, "first": run.first, "second": run.second, "seed": bench.seed,
                 "optimizer": o.name, "learning_rate": settings.learning_rate, "epochs": settings.epochs,
                 "examples_per_step": per_step, "lora_rank": config.lora.rank, "lora_alpha": config.lora.alpha},
    )  # fmt: skip
    dropped = 1 - float(np.mean(tally.kept))
    if weights is None:
        mask_stats["dropped_share"] = dropped
    if not tally.outcomes.get("stepped"):
        mend = "the mask keeps no token; raise --tau" if run.mask == "soft" else "the mask keeps no token; raise --threshold"
        raise LetheError(f"{run.folder}: not one of {total} steps could be taken ({tally.outcomes}): {mend}")
    if is_sharded(model):
        model = gathered(model, ranks, model.dtype)
    if not ranks.main:
        return
    save_state(model, folder, bench.subject.name)
    write_json(folder / "run.json", {
        "status": "done", "run": run.__dict__, "steps": total, "outcomes": tally.outcomes, "tokens": tally.tokens,
        "seconds": round(tally.seconds, 3), "micro_tokens": tally.micro_tokens, "examples": len(examples), "data": examples.report,
        "rehearsal": rehearsed, "anchor": anchor and {"coefficient": anchor.coefficient, "fisher": anchor.fisher is not None},
        "mask": mask_stats, "reference": config.masking.reference if run.mask != "none" else None,
        "template": bench.subject.tokenizer.template, "dtype": str(model.dtype).removeprefix("torch."), "seed": bench.seed,
        "base_fingerprint": model.fingerprint, "adapter_fingerprint": state_fingerprint(folder), "optimizer": choice,
        "partition": partition, "learning_rate": settings.learning_rate,
        "final_loss": tally.last_loss, "memory_gib": memory_gib(),
    })  # fmt: skip
    note = "".join(f", {count} {outcome}" for outcome, count in tally.outcomes.items() if outcome != "stepped")
    print(f"{label}  {total:3d} steps{note}  loss {tally.last_loss:6.3f}  dropped {mask_stats['dropped_share']:5.1%}  "
          f"{tally.tokens / tally.seconds / 1000:4.1f}k tok/s {tally.seconds:5.1f} s", flush=True)  # fmt: skip


def held_out_scores(bench: Bench, run: Run) -> dict[str, float]:
    """Exact match and answer nll on the first test items of the run's tasks, while it trains."""
    values = {}
    for name in filter(None, (run.first, run.second)):
        items = evaluation.score_task(
            bench.subject.model, bench.subject.tokenizer, bench.tasks[name], max_test=bench.config.evaluation.eval_items,
            max_length=bench.config.max_length, batch_size=bench.config.evaluation.batch_size,
            max_new_tokens=bench.config.evaluation.max_new_tokens, quiet=True,
            how=evaluation.decoding_of(bench.config.evaluation, name), seed=bench.seed,
        )  # fmt: skip
        values[f"eval/{name}/exact_match"] = float(np.mean([item["exact_match"] for item in items]))
        values[f"eval/{name}/answer_nll"] = float(np.mean([item["answer_nll"] for item in items]))
    return values


# ----------------------------------------------------------------------------------------------------------------------
# Pretraining


def pretrain(
    config: Config, start: Path, corpus: Corpus, total: int, tree: Path, run: str, label: str, *, skip: int = 0, before: float = 0.0,
    ranks: Ranks = ALONE, check: Callable[[], None] = lambda: None, tell: Callable = print,
) -> None:  # fmt: skip
    """Trains every weight of the model in `start` for `total` steps; tree/run becomes a Hugging Face folder with, last, pretraining.json.

    skip: rows of the corpus that have been seen before. before: FLOPs that the model in `start` has cost.
    """
    p, o, folder = config.pretraining, config.optimizer, tree / run
    device, dtype, _ = resolve(config.device if ranks.device is None else str(ranks.device), config.dtype)
    model = load_model(start, getattr(torch, dtype), device).requires_grad_(True)
    names, parameters = zip(*model.named_parameters(), strict=True)
    warmup, per_step = min(p.warmup_steps, total // 10), p.rows_per_step * p.row_length
    choice = {"name": p.optimizer, "learning_rate": p.learning_rate, "adamw_rate": p.adamw_rate if p.optimizer == "muon" else None,
              "weight_decay": p.weight_decay, "betas": (o.beta1, p.adamw_beta2), "eps": o.eps, "momentum": o.momentum,
              "nesterov": o.nesterov, "ns_steps": o.ns_steps, "muon_scale": o.muon_scale, "muon_factors": o.muon_factors}  # fmt: skip
    learner = Learner(model, list(parameters), lambda masters: optimizers_of(list(names), masters, **choice))
    flops = training_flops(model.config, p.row_length)
    same = {"start": model.fingerprint, "corpus": corpus.key, "skip": skip, "steps": total, "rows_per_step": p.rows_per_step,
            "optimizer": choice, "warmup": warmup, "schedule": p.scheduler, "floor": p.final_rate, "max_grad_norm": p.max_grad_norm,
            "seed": config.seed, "dtype": dtype}  # fmt: skip
    if (done := read_json(folder / "pretraining.json", {})).get("status") == "done":
        refuse_other(folder, done["same"], same)
        return

    def batches(step: int, micro_tokens: int) -> list[Micro]:
        rows = corpus.rows_of(step, p.rows_per_step, config.seed, skip)
        return corpus.micros([rows[i] for i in ranks.share(range(len(rows)), [p.row_length] * len(rows))], micro_tokens)

    def steps(done: int, micro_tokens: int) -> Iterator[Step]:
        return fit(model, learner, batches, total, start=done, micro_tokens=micro_tokens, schedule=p.scheduler, warmup=warmup,
                   floor=p.final_rate, max_grad_norm=p.max_grad_norm, seed=config.seed, ranks=ranks)  # fmt: skip

    def scores(step: int) -> dict[str, float]:
        found = held_out_loss(model, corpus, micro_tokens)
        if step * 8 // total > max(0, step - p.eval_steps) * 8 // total and step < total and not sys.stderr.isatty():  # which has a bar
            tell(f"{label}  step {step} of {total}  held-out {found['eval/nll']:.3f}")
        return found

    micro_tokens = micro_tokens_of(config.micro_tokens, model.device)
    tally = follow(
        learner, steps, tree, run, label, total, same, per_epoch=-(-len(corpus) // p.rows_per_step), stage=0, settings=p,
        micro_tokens=micro_tokens, keep=config.keep, name=str(start), ranks=ranks, check=check, tell=tell,
        begins=lambda log: log.scalars(scores(0), 0), scores=scores, hparams={"optimizer": p.optimizer, "learning_rate": p.learning_rate},
    )  # fmt: skip
    if not ranks.main:
        return
    save_state(model, folder, str(start))
    held_out = held_out_loss(model, corpus, micro_tokens)["eval/nll"]
    write_json(folder / "pretraining.json", {
        "status": "done", "start": str(start), "same": same, "tokens": total * per_step, "tokens_per_step": per_step,
        "flops_per_token": flops, "flops_before": before, "flops": before + flops * total * per_step,
        "layers": model.config.num_hidden_layers, "parameters": sum(x.numel() for x in parameters),
        "seconds": round(tally.seconds, 3), "final_loss": tally.last_loss, "held_out_nll": held_out, "outcomes": tally.outcomes,
        "memory_gib": memory_gib(), **circumstances(),
    })  # fmt: skip
    print(f"{label}  {total} steps  loss {tally.last_loss:.3f}, held-out {held_out:.3f}  {tally.tokens / tally.seconds / 1000:.1f}k tok/s "
          f"{tally.seconds:.0f} s", flush=True)  # fmt: skip


@torch.inference_mode()
def held_out_loss(model: Llama, corpus: Corpus, micro_tokens: int) -> dict[str, float]:
    """Mean nll of the held-out rows' tokens, in nats."""
    was_training = model.training
    model.eval()
    losses = [micro_nll(model, micro.to(model.device)).double().sum() for micro in corpus.test_micros(micro_tokens)]
    model.train(was_training)
    return {"eval/nll": float(torch.stack(losses).sum()) / (corpus.held_out * (corpus.row_length - 1))}


def run_pretraining(config: Config) -> None:
    """--corpus: one model, from its own weights or (--fresh) from random ones."""
    p, (ranks, _) = config.pretraining, gather(config)
    root, source = expand_out(config.out, config.model.name), find_model(config.model.name)
    if root.resolve() in (source.resolve(), *source.resolve().parents):
        raise LetheError(f"--out {root} is the folder of --model, or holds it; choose another")
    with ranks.main_first():
        corpus = load_corpus(p.corpus, load_tokenizer(source, config.template), root / "tokens", tokens=p.tokens, row_length=p.row_length,
                             held_out=p.held_out, seed=config.seed)  # fmt: skip
        start = fresh_model(source, p.shape or {}, config.seed, root / "start") if p.fresh else source
    total = math.ceil(p.tokens / (p.rows_per_step * p.row_length))
    if ranks.main:
        print(f"corpus     {p.corpus}: {len(corpus)} rows of {p.row_length} tokens, {corpus.held_out} more held out; {total} steps")
    with in_use(root) if ranks.main else nullcontext():
        pretrain(config, start, corpus, total, root, "model", "pretraining", ranks=ranks)
    ranks.barrier()
    ranks.stop()
    if ranks.main:
        print(f"model      {root / 'model'}: a Hugging Face folder, which --model takes")
        print(f"curves     tensorboard --logdir {root / 'tensorboard'}")


# ----------------------------------------------------------------------------------------------------------------------
# Growth: one model grown from a small one, one as large from the beginning, both fine-tuned through the same sequence


def grown_and_naive(config: Config, root: Path, ranks: Ranks, workers: Workers, tell: Callable) -> dict[str, Path]:
    """Pretrains both at equal FLOPs, or finds them: the grown one's are those of its small source and its own together."""
    p, g, source = config.pretraining, config.growth, find_model(config.model.name)
    models, per_step = root / "models", p.rows_per_step * p.row_length
    layers = (p.shape or {}).get("num_hidden_layers", load_config(source).num_hidden_layers)
    if layers % g.factor:
        raise LetheError(f"growth: {layers} layers are no multiple of --factor {g.factor}; give --shape another num_hidden_layers")
    layer_map(layers // g.factor, layers, g.order)  # an order that does not fit is told before anything is trained
    with ranks.main_first(), workers.main_first("models"):
        large = fresh_model(source, p.shape or {}, config.seed, models / "naive_start")
        small = fresh_model(source, (p.shape or {}) | {"num_hidden_layers": layers // g.factor}, config.seed, models / "source_start")
        corpus = load_corpus(p.corpus, load_tokenizer(source, config.template), root / "tokens", tokens=p.tokens + g.source_tokens,
                             row_length=p.row_length, held_out=p.held_out, seed=config.seed)  # fmt: skip
    each, before = (training_flops(load_config(folder), p.row_length) * per_step for folder in (large, small))
    steps = {"source": math.ceil(g.source_tokens / per_step), "naive": math.ceil(p.tokens / per_step)}
    before *= steps["source"]
    steps["grown"] = round(steps["naive"] - before / each)
    if steps["grown"] < 1:
        raise LetheError("growth: --source_tokens cost more than --tokens allow in all; give fewer of them")
    tell(f"corpus     {p.corpus}: {len(corpus)} rows of {p.row_length} tokens, {corpus.held_out} more held out")
    tell(f"budget     {steps['naive'] * each:.2e} FLOPs a model: naive {steps['naive']} steps of {per_step} tokens, grown {steps['grown']} "
         f"after {steps['source']} of a source with {layers // g.factor} of the {layers} layers")  # fmt: skip

    def train(name: str, start: Path, skip: int = 0, before: float = 0.0) -> None:
        pretrain(config, start, corpus, steps[name], root, f"models/{name}", f"{name:6s}", skip=skip, ranks=ranks,
                 check=workers.check, tell=tell, before=before)  # fmt: skip

    def train_grown() -> None:
        start = models / "grown_start"
        if ranks.main:  # or finds what it grew before
            grow(models / "source", start, factor=g.factor, order=g.order, zero_init=g.zero_init, noise=g.noise, seed=config.seed)
        ranks.barrier()
        train("grown", start, steps["source"] * p.rows_per_step, before)

    jobs = [Job("source", [], False, partial(train, "source", small)), Job("grown", ["source"], False, train_grown),
            Job("naive", [], False, partial(train, "naive", large))]  # fmt: skip
    workers.do("models", jobs)
    return {"grown": models / "grown", "naive": models / "naive"}


def run_growth(config: Config, argv: list[str]) -> None:
    began, (ranks, workers) = time.perf_counter(), gather(config)
    root, main = expand_out(config.out, config.model.name), ranks.main and workers.main
    with in_use(root) if main else nullcontext():
        models = config.growth.models or grown_and_naive(config, root, ranks, workers, print if main else lambda *_: None)
    for name, folder in models.items():
        if main:
            print(f"\n{name:10s} {folder}")
        fine_tuning = replace(config, study="sequences", model=replace(config.model, name=str(folder)), out=str(root / name),
                              pretraining=PretrainingConfig(), growth=GrowthConfig())  # fmt: skip
        object.__setattr__(fine_tuning, "sources", config.sources)
        run_study(fine_tuning, argv, (ranks, workers))
    ranks.stop()
    if main:
        write_json(root / "growth.json", {"models": {name: str(folder) for name, folder in models.items()}, **circumstances(argv)})
        report_growth(root)
        print(f"took       {time.perf_counter() - began:.0f} s")


# ----------------------------------------------------------------------------------------------------------------------
# The whole study


def run_study(config: Config, argv: list[str], processes: tuple[Ranks, Workers] | None = None) -> None:
    """A study of one model. processes: of a caller that has several."""
    began = time.perf_counter()
    ranks, workers = processes or gather(config)
    tell = print if ranks.main and workers.main else lambda *_: None
    for note in config.notes:
        tell(note)
    load_config(find_model(config.model.name))  # before the data: a wrong name is told as such
    chunk, files = None, []
    if config.study == "batch":
        if ranks.world > 1:
            raise LetheError("--datasets_folder gives each process data sets of its own: add --shard runs")
        if config.training.stage1.eval_steps:
            raise LetheError("--datasets_folder trains on all rows and has none to score between steps; leave out --eval_steps")
        chunk, files = choose_chunk(config.datasets_folder, config.chunk, terminal=False if workers.shared else None)
        tasks = {name: whole_file(name, file, config.strict, config.salvage) for file, name in task_names(files).items()}
    else:
        tasks = evaluation.choose_tasks(config.datasets, config.data_root, config.model.name == "nano", config.strict, config.salvage)
    evaluation.check_decoding(config.evaluation, tasks, config.data_root)
    columns = evaluation.choose_columns(config.evaluation)
    if both := sorted(set(tasks) & set(columns)):
        raise LetheError(f"{both[0]} is both a data set and a column of general ability; rename the data set")
    runs = plan(config, list(tasks))
    if asked := config.resume_stage1 or config.resume_stage2:
        if not any(asked_checkpoint(config, run) for run in runs):
            raise LetheError(f"{asked} is the checkpoint of no run of this study; give its task and optimizer, or another checkpoint")
    involved = {name for run in runs for name in (run.first, run.second, *run.past)}
    tasks = {name: task for name, task in tasks.items() if name in involved}
    root = expand_out(config.out, config.model.name) / (chunk or "")
    if chunk and Path(config.datasets_folder).resolve() in (root.resolve(), root.resolve().parent):
        raise LetheError(f"{root} would lie among the data sets, and its files be taken for some; choose another --out")
    device, dtype, _ = resolve(config.device if ranks.device is None else str(ranks.device), config.dtype)
    trained = None
    if config.shard == "model":
        check_optimizers([name for name, _ in optimizer_arms(config) or [(config.optimizer.name, 0)]])
        trained = load_sharded(config.model.name, ranks, getattr(torch, dtype))
    # The main rank scores, by a whole model beside its part of the sharded one.
    subject = load_subject(config.model.name, device, config.dtype, config.template, config.quantize, config.max_memory,
                           None if ranks.main else trained)  # fmt: skip
    tell(subject.about)
    if ranks.world > 1 or workers.shared:
        shared = "the study's runs" if workers.shared else "the weights and each step" if trained else "each step's examples"
        tell(f"processes  {workers.world if workers.shared else ranks.world}, which share {shared}")
    # What "auto" turned out to be is part of the study: another machine must not mix its own choice in.
    resolved = replace(config, dtype=str(subject.model.dtype).removeprefix("torch."), template=subject.tokenizer.template)
    if (root / "study.json").is_file() if config.seeds else seed_folders(root) != [root]:
        raise LetheError(f"{root} holds a study of {'one seed' if config.seeds else 'several seeds'}; choose another folder with --out")
    worked, batches = 0, []
    for seed in parse_seeds(config):
        tree = root if config.seeds is None else root / f"seed{seed}"
        # The files of a batch are no part of what it is: one that is added, mended or changed since is trained on (anew).
        known = columns if chunk else tasks | columns
        identity = identity_of(resolved, subject.model.fingerprint, {name: found.fingerprint for name, found in known.items()}, seed)
        specs = {name: {"name": task.spec, "data_root": str(Path(config.data_root).resolve()), "salvage": config.salvage}
                 for name, task in tasks.items()}  # fmt: skip
        more = {"tasks": {} if chunk else specs, "kinds": {name: task.answer_kind for name, task in tasks.items()},
                "model": config.model.name, "template": subject.tokenizer.template,
                "columns": {name: column.spec for name, column in columns.items()}}  # fmt: skip
        with ranks.main_first(), workers.main_first(str(tree)):
            mine = ranks.main and workers.main
            study = open_study(tree, resolved, identity, more, argv) if mine else StudyFolder(tree, read_json(tree / "study.json"))
            if chunk and mine:
                forget_changed(study, {name: task.fingerprint for name, task in tasks.items()})
            bench = Bench(config, subject, tasks, study, seed, ranks, trained or subject.model, workers.check, tell, columns=columns)
            shown = plan_lines(bench, runs)  # which makes the tokens of every task
        if config.inspect:
            show_masks(bench, runs)
            continue
        tell(f"\nstudy      {tree}   seed {seed}\n{shown}")
        jobs = jobs_of(bench, runs)
        if chunk:
            of = [(run.task, file, run.folder) for run, file in zip(runs, files, strict=True)]
            batches.append(BatchResult(tree, chunk, of, list(columns)[0], config.evaluation.max_samples))
            jobs = one_by_one(bench, runs, jobs, None if workers.shared else batches[-1].save)
        worked += sum(not job.done for job in jobs)
        with in_use(tree) if mine else nullcontext():
            workers.do(str(tree), jobs)
    ranks.barrier()
    if processes is None:
        ranks.stop()
    if config.inspect or not (ranks.main and workers.main):
        return
    if not worked and not chunk and is_reported(root):
        print(f"nothing to do: every run is trained and every cell is scored; python eval.py --root {root} shows the results")
        return
    for batch in batches:
        batch.report()
    if chunk:
        report_general(root, seed_folders(root), root, quiet=len(columns) == 1)
    else:
        report(root)
    print(f"took       {time.perf_counter() - began:.0f} s")


def jobs_of(bench: Bench, runs: list[Run]) -> list[Job]:
    """The training and the scoring of every run, in order; each says what must be done before it."""
    config, tree, known = bench.config, bench.study.path, policies()
    done = {run: is_done(bench.study.dir(run.folder)) for run in runs}
    todo = [] if config.skip_training else [run for run in runs if not done[run]]
    labels = numbered(todo, [title_of(run) for run in todo])
    jobs = []
    for run in runs:
        needs = [run.parent] if run.parent else []
        needs += [f"lora_base/{run.second}"] if "adapter_nll" in known.get(run.mask, ()) else []
        jobs.append(Job(run.folder, needs, run not in todo, partial(train_run, bench, run, labels.get(run, ""))))
    here = [run for run in runs if done[run] or run in todo]
    here += [run for run in trained_runs(tree) if run not in runs and {run.first, run.second or run.first} <= set(bench.tasks)]
    asked, scored = config.evaluation.tasks, list(bench.tasks)
    if config.study == "batch":  # which trains on all rows and has none to test
        asked, scored = None, []
    only = {name.strip() for name in asked.split(",")} if asked else None
    cells = evaluation.cells_by_run(in_reading_order(here), scored, list(bench.columns), only)
    missing = [run for run, names in cells.items() if run in todo or evaluation.unscored(tree, run, names)] if bench.ranks.main else []
    labels = numbered(missing, [run.folder if run else "base" for run in missing])
    decoder = Decoder(bench.subject.model, config.evaluation.batch_size)  # one cache for all cells
    for run, names in cells.items():
        header = evaluation.SCORING if missing[:1] == [run] else ""
        work = partial(evaluation.score_run, bench, run, names, labels.get(run, ""), decoder, header)
        jobs.append(Job(f"score {run.folder if run else 'base'}", [run.folder] if run else [], run not in missing, work))
    return jobs


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv

    def work() -> None:
        config = parse(argv)
        if config.print_config:
            print("".join(f"# {note}\n" for note in config.notes) + config_text(config), end="")
            return
        try:
            if config.study == "pretraining":
                run_pretraining(config)
            elif config.study == "growth":
                run_growth(config, ["train.py", *argv])
            else:
                run_study(config, ["train.py", *argv])
        except RankLost as error:
            raise LetheError(str(error)) from error

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
