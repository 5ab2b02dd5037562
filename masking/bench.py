"""What the runs of a study share: tokens, scores under reference models, and the weights that masks make of them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain, islice

import numpy as np
import torch
from torch import nn

from data.batching import Examples, steps_of, tokenize
from data.benchmarks import Benchmark
from data.folder import Task, held_out
from data.records import Report
from lora.fisher import fisher_of
from lora.layers import add_lora
from lora.rehearsal import rehearse
from lora.states import put_on, state_fingerprint
from masking.inspect import as_page, in_terminal, masked_example, masked_markdown
from masking.score import dataset_weights, score_examples
from masking.weights import policies
from model.llama import Llama
from model.subject import Subject
from optim.anchor import Anchor
from optim.parallel import ALONE, Ranks
from study.config import Config, changed, stage_config
from study.errors import LetheError
from study.folder import StudyFolder, is_done, write_text
from study.logging import RunLog, progress
from study.plan import Run, arm_label
from study.sequence import ANCHORED, WITH_ROWS
from study.settings import OptimizerConfig, StageConfig


@dataclass
class Bench:
    """What all runs of a study share: the base stays loaded, tokens and scores are made once."""

    config: Config
    subject: Subject
    tasks: dict[str, Task]
    study: StudyFolder
    seed: int
    ranks: Ranks = ALONE
    trained: Llama | None = None  # what is trained; the subject's model, or (--shard model) a sharded one beside it
    check: Callable[[], None] = lambda: None  # raises where another worker has taken the run over
    tell: Callable = print  # for the one process that speaks for all
    told: list = field(default_factory=list)  # what is printed once for all runs
    columns: dict[str, Benchmark] = field(default_factory=dict)  # of general ability: every model is scored on them

    def examples(self, task: str, max_train: int | None) -> Examples:
        """The task's training examples, tokenised once and mapped from the study folder."""
        found, bad_rows = self.tasks[task], Report()
        records = found.train(report=bad_rows)
        cache, length, source = self.study.path / "tokens", self.config.max_length, self.config.train_on_source
        return tokenize(records, self.subject.tokenizer, length, found.fingerprint, cache, max_train, bad_rows, source)

    def examples_of(self, run: Run, max_train: int | None) -> tuple[Examples, dict[str, int]]:
        """What a run trains on, and how many rows of which earlier task are among it (they are made where they are not there yet)."""
        if run.arm not in WITH_ROWS or not run.past:
            return self.examples(run.task, max_train), {}
        config, task = self.config, self.tasks[run.task]
        old = rehearse(
            self.subject, self.study.path, run, self.tasks, config.rehearsal, max_train=max_train, max_length=config.max_length,
            batch_size=config.evaluation.batch_size, seed=self.seed,
        )  # fmt: skip
        rows = [record for records in old.values() for record in records]
        content = json.dumps([task.fingerprint, max_train, [[record.prompt, record.answer] for record in rows]])
        records = chain(islice(task.train(), max_train), rows)
        cache, fingerprint = self.study.path / "tokens", hashlib.sha256(content.encode()).hexdigest()
        source = config.train_on_source
        found = tokenize(records, self.subject.tokenizer, config.max_length, fingerprint, cache, on_source=source)
        return found, {name: len(records) for name, records in old.items()}

    def anchor(self, run: Run, names: list[str], parameters: list[nn.Parameter], masters: list[nn.Parameter]) -> Anchor | None:
        """What holds a run's parameters near where the stage before left them (arms l2 and ewc)."""
        if run.arm not in ANCHORED or run.parent is None:
            return None
        settings, fisher = self.config.rehearsal, None
        if run.arm == "ewc":
            before = self.examples(run.past[-1], self.config.max_train)
            folder = self.study.dir(run.parent)
            with self.ranks.main_first():
                fisher = fisher_of(self.trained, names, parameters, before, folder, settings.fisher_samples, self.seed)
        return Anchor(settings.l2_coefficient if fisher is None else settings.ewc_coefficient, masters, fisher)

    def scores(self, run: str | None, examples: Examples) -> np.ndarray:
        """nll of all completion tokens under what a run left (its folder; None: the base), cached."""
        folder = None if run is None else self.study.dir(run)
        put_on(self.subject.model, folder)
        reference = "base" if folder is None else state_fingerprint(folder)
        with progress(len(examples), "perplexity", "examples") as bar:
            return score_examples(self.subject.model, examples, reference, self.study.path / "perplexity", progress=bar.update)

    def mask_settings(self) -> dict:
        m = self.config.masking
        return {"threshold": m.threshold, "group_size": m.group_size, "overlap_ratio": m.overlap_ratio, "ratio": m.ratio,
                "direction": m.direction, "match": m.match, "tau": m.tau}  # fmt: skip


def settings_of(bench: Bench, run: Run) -> tuple[StageConfig, int | None, OptimizerConfig]:
    """(settings, max_train, optimizer) of one run: its stage's and its arm's, with what is the run's own."""
    config = changed(bench.config, run.changes)
    settings, max_train = stage_config(config, 1 if run.parent is None else run.stage, run.mask)  # from the base: as stage 1
    if run.past and config.rehearsal.equal == "steps" and run.arm != "mtl":  # as many as its own rows alone would take
        rows = len(bench.examples(run.task, max_train))
        steps = steps_of(rows, settings.batch_size * settings.gradient_accumulation, settings.epochs, settings.max_steps)
        settings = replace(settings, max_steps=steps)
    if run.changes:  # arms are chosen among by rows that none of them has seen
        max_train = held_out(bench.tasks[run.task], max_train)[0]
    return settings, max_train, config.optimizer


def begin(bench: Bench, run: Run) -> list[tuple[str, nn.Parameter]]:
    """Puts on the model what the run starts from, and returns what it trains: the factors of its adapter, or every weight."""
    config, model = bench.config, bench.trained
    parent = None if run.parent is None else bench.study.dir(run.parent)
    if config.full:
        put_on(model, parent)
        model.requires_grad_(True)
        model.altered = True
        return list(model.named_parameters())
    if parent is None:
        put_on(model, None)
        add_lora(model, config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.targets, config.lora.rslora,
                 torch.Generator().manual_seed(bench.seed))  # fmt: skip
    else:
        put_on(model, parent, dropout=config.lora.dropout)
    return list(model.adapter.stacks.items())


def masked_weights(bench: Bench, run: Run, examples: Examples) -> tuple[np.ndarray | None, dict, np.ndarray | None]:
    """(weights, statistics, nll) of a run's completions. Weights are None for --reference online: the loop decides them."""
    masking = bench.config.masking
    if run.mask == "none":
        return *dataset_weights(examples, "none", {}, None), None
    if masking.reference == "online":
        return None, {"completion_tokens": int(examples.completion_offsets[-1])}, None
    nll = bench.scores(run.parent if masking.reference == "start" else None, examples)
    # The difference filters ask whether a model trained plainly on this very task finds the token harder.
    other = bench.scores(f"lora_base/{run.second}", examples) if "adapter_nll" in policies()[run.mask] else None
    weights, stats = dataset_weights(examples, run.mask, bench.mask_settings(), nll, other, masking.mask_end, bench.seed)
    return weights, stats, nll


def log_masked_examples(bench: Bench, log: RunLog, examples: Examples, nll: np.ndarray | None, weights: np.ndarray | None) -> None:
    """Two examples with their dropped tokens struck through, and the histogram of token perplexities."""
    if nll is not None:
        log.histogram("mask/log10_perplexity", nll / np.log(10))
    if weights is not None:
        for index in range(min(2, len(examples))):
            log.text(f"mask/example_{index}", masked_markdown(*masked_example(examples, index, nll, weights, bench.subject.tokenizer)))


def show_masks(bench: Bench, runs: list[Run]) -> None:
    """--inspect N: kept and dropped tokens of the first N examples of each pair and arm, here and as an HTML page."""
    config = bench.config
    shown_runs = [run for run in runs if run.stage == 2 and run.mask != "none"]
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
