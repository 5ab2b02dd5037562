"""Who takes part in benchmarks/train_step.py: ours, transformers + peft in several ways, and the processes that they live in."""

from __future__ import annotations

import importlib
import multiprocessing
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from benchmarks.ablations import ABLATIONS, padded
from data.batching import Examples, Micro, collate, micro_tokens_of, step_indices

PEERS = ("default", "tuned", "compiled", "liger")
PARITY_BATCHES = 5  # seen again and again, so that the losses fall and a wrong gradient shows


@dataclass(frozen=True)
class Settings:
    """What a contender needs to know. Everything here goes into the result."""

    preset: str
    dtype: str
    device: str
    batch_size: int  # examples of a peer's micro-batch
    accumulation: int  # micro-batches of a peer's step
    warmup: int  # steps before the clock starts
    steps: int  # a round
    rounds: int
    parity_steps: int
    parity_examples: int  # a step
    learning_rate: float
    micro_tokens: int | None = None  # of ours; None: what training uses
    rank: int = 16
    dropout: float = 0.05
    seed: int = 0
    shrink: int = 1  # lengths are divided by it
    threads: int | None = None
    data: str | None = None
    tokenizer: str | None = None
    folder: str = ""  # temporary: the model, the adapter, tokenised rows

    @property
    def shape(self) -> common.Shape:
        return common.SHAPES[self.preset]

    @property
    def per_step(self) -> int:
        return self.batch_size * self.accumulation

    @property
    def total_steps(self) -> int:
        return self.warmup + self.steps * self.rounds

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def examples(self) -> Examples:
        if self.data:
            return common.real_examples(self.data, self.tokenizer, 2048, Path(self.folder) / "tokens")
        return common.random_examples(
            max(50 * self.batch_size, self.per_step * self.total_steps), self.shape.vocabulary, self.seed, self.shrink
        )


# ----------------------------------------------------------------------------------------------------------------------
# Which examples a step sees


def random_plan(examples: Examples, settings: Settings) -> list[list[int]]:
    """Examples of each step, warm-up first: those of a run."""
    return [step_indices(len(examples), settings.per_step, settings.seed, step) for step in range(settings.total_steps)]


def grouped_plan(examples: Examples, settings: Settings) -> list[list[int]]:
    """The same for batches grouped by length. Short and long batches alternate over a run; each round here gets its share of both."""
    order = np.random.default_rng(settings.seed).permutation(len(examples))
    mega = 50 * settings.batch_size
    parts = [order[at : at + mega] for at in range(0, len(order), mega)]
    order = np.concatenate([part[np.argsort(-examples.lengths[part], kind="stable")] for part in parts])
    batches = [order[at : at + settings.per_step].tolist() for at in range(0, len(order) - settings.per_step + 1, settings.per_step)]

    def picks(rounds: int, steps: int) -> list[list[int]]:
        """One batch of each of `steps` stretches a round; alternately from its ends, so that no round gets all the long ones."""
        places = [[s * rounds + (r if s % 2 == 0 else rounds - 1 - r) for s in range(steps)] for r in range(rounds)]
        return [batches[int((place + 0.5) * len(batches) / (rounds * steps))] for row in places for place in row]

    return (picks(1, settings.warmup) if settings.warmup else []) + picks(settings.rounds, settings.steps)


def parity_plan(examples: Examples, settings: Settings) -> list[list[int]]:
    count, batches = settings.parity_examples, min(PARITY_BATCHES, settings.parity_steps)
    return [list(range(b * count, (b + 1) * count)) for b in (step % batches for step in range(settings.parity_steps))]


# ----------------------------------------------------------------------------------------------------------------------
# The contenders, each in a process of its own


class Ours:
    """The project's own way: data.batching, train.fit, lora.layers, AdamW."""

    def __init__(self, settings: Settings, variant: str):
        self.settings, self.variant = settings, variant
        self.examples = settings.examples()

    def build(self, plan: list[list[int]], dropout: float) -> None:
        import train
        from lora.layers import add_lora, lora_parameters
        from lora.resume import Learner
        from model import load_model

        s = self.settings
        ABLATIONS.get(self.variant, lambda: None)()
        dropout = 0.0 if self.variant == "no_dropout" else dropout
        model = load_model(Path(s.folder) / "model", s.torch_dtype, s.device)
        self.memory = common.Memory(s.device)
        add_lora(model, s.rank, s.rank, dropout, generator=torch.Generator().manual_seed(s.seed))

        def optimizers(masters: list) -> list[torch.optim.Optimizer]:
            return [torch.optim.AdamW(masters, lr=s.learning_rate, weight_decay=0.0)]

        def batches(step: int, micro_tokens: int) -> list[Micro]:
            examples, indices = self.examples, plan[step]
            if self.variant == "padded":
                examples, indices = padded(examples, indices), list(range(len(indices)))
            return collate(examples, indices, micro_tokens, np.ones(examples.completion_offsets[-1], dtype=np.float32))

        self.plan = plan
        self.steps = train.fit(
            model, Learner(model, lora_parameters(model), optimizers), batches, len(plan), seed=s.seed, schedule="constant",
            micro_tokens=micro_tokens_of(s.micro_tokens, model.device),
        )  # fmt: skip

    def plan_of(self) -> list[list[int]]:
        return random_plan(self.examples, self.settings)

    def step(self) -> torch.Tensor:
        return next(self.steps).readings[0]  # the loss, which nobody waits for


class Peer:
    """transformers + peft. The loop is that of transformers' Trainer without its bookkeeping."""

    def __init__(self, settings: Settings, variant: str):
        self.settings, self.variant = settings, variant
        self.examples = settings.examples()

    def plan_of(self) -> list[list[int]]:
        return (random_plan if self.variant == "default" else grouped_plan)(self.examples, self.settings)

    def build(self, plan: list[list[int]], dropout: float) -> None:
        from peft import LoraConfig, get_peft_model
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        warnings.filterwarnings("ignore", category=FutureWarning)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        s = self.settings
        if self.variant == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama()
        model = AutoModelForCausalLM.from_pretrained(Path(s.folder) / "model", dtype=s.torch_dtype).to(s.device)
        for parameter in model.parameters():
            parameter.flatten()[::512].sum()  # weights that are still in the mapped file count as loaded
        self.memory = common.Memory(s.device)
        model.config.use_cache = False
        lora = LoraConfig(r=s.rank, lora_alpha=s.rank, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora, autocast_adapter_dtype=self.variant == "default")
        # Ours and theirs start from the same factors; B is zero in both.
        start = load_file(Path(s.folder) / "adapter" / "adapter_model.safetensors")
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name.replace(".default", "") for name in trainable} == set(start)
        for name, parameter in trainable.items():
            parameter.data.copy_(start[name.replace(".default", "")])
        if self.variant == "compiled":
            for layer in model.base_model.model.model.layers:
                layer.compile(dynamic=True)
        self.model, self.parameters, self.plan, self.at = model.train(), list(trainable.values()), plan, 0
        self.optimizer = torch.optim.AdamW(self.parameters, lr=s.learning_rate, weight_decay=0.0, fused=True)

    def padded(self, indices: list[int]) -> dict[str, torch.Tensor]:
        ids = [torch.from_numpy(self.examples.ids(i).astype(np.int64)) for i in indices]
        shape = len(ids), max(map(len, ids))
        input_ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, (i, tokens) in enumerate(zip(indices, ids, strict=True)):
            start = int(self.examples.starts[i])
            input_ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            labels[row, start : len(tokens)] = tokens[start:]
        batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        return {name: tensor.to(self.settings.device, non_blocking=True) for name, tensor in batch.items()}

    def step(self) -> torch.Tensor:
        indices, size = self.plan[self.at], self.settings.batch_size
        self.at += 1
        count = int(sum(self.examples.lengths[i] - self.examples.starts[i] for i in indices))
        total = 0.0
        for at in range(0, len(indices), size):
            # num_items_in_batch: the Trainer's denominator, over all micro-batches of the step.
            loss = self.model(**self.padded(indices[at : at + size]), num_items_in_batch=count).loss
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


class Machine:
    """Makes what the contenders load, and measures the rate of matmuls."""

    def __init__(self, settings: Settings, variant: str):
        self.settings = settings

    def make(self) -> None:
        from lora.adapter import save_adapter
        from lora.layers import add_lora
        from model import load_model

        s, folder = self.settings, Path(self.settings.folder)
        model = load_model(common.write_model(s.shape, folder, s.seed), s.torch_dtype)
        add_lora(model, s.rank, s.rank, generator=torch.Generator().manual_seed(s.seed))
        save_adapter(model, folder / "adapter")

    def rates(self) -> dict[str, float]:
        return common.matmul_rates(
            self.settings.shape, self.settings.torch_dtype, self.settings.device, 1024 if self.settings.shrink == 1 else 64
        )


def serve(connection, kind: str, settings: Settings, variant: str) -> None:
    """The life of a contender's process: it answers (command, arguments) until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair; it then closes the connection
    if settings.threads:
        torch.set_num_threads(settings.threads)
    importlib.import_module("torch._dynamo")  # optimizers do in their first step, and code is not to count as memory
    subject = {"ours": Ours, "peer": Peer, "machine": Machine}[kind](settings, variant)

    def prepare() -> float:
        """Seconds from the weights on disk to the end of the warm-up."""
        began = time.perf_counter()
        subject.build(subject.plan_of(), settings.dropout)
        for _ in range(settings.warmup):
            subject.step()
        common.synchronize(settings.device)
        return time.perf_counter() - began

    def run(number: int) -> dict[str, float]:
        """Round `number`: its seconds and useful tokens."""
        first = settings.warmup + number * settings.steps
        tokens = sum(int(subject.examples.lengths[i]) for indices in subject.plan[first : first + settings.steps] for i in indices)
        common.synchronize(settings.device)
        began = time.perf_counter()
        for _ in range(settings.steps):
            subject.step()
        common.synchronize(settings.device)
        seconds = time.perf_counter() - began
        return {"tokens_per_s": tokens / seconds, "step_ms": seconds / settings.steps * 1e3, "tokens": tokens}

    def memory() -> float:
        return subject.memory.extra_gib()

    def parity() -> list[float]:
        subject.build(parity_plan(subject.examples, settings), 0.0)
        return [float(subject.step()) for _ in range(settings.parity_steps)]

    local = {"prepare": prepare, "run": run, "memory": memory, "parity": parity}
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, (local.get(command) or getattr(subject, command))(*arguments)))
        except (MemoryError, torch.OutOfMemoryError, RuntimeError, ImportError, AssertionError, OSError, ValueError) as error:
            lines = str(error).splitlines() or [""]
            connection.send((False, f"{type(error).__name__}: {lines[0]}"))


class Lost(Exception):
    """A contender could not do what was asked; the text says why."""


class Contender:
    """The parent's end of a contender's process."""

    def __init__(self, kind: str, settings: Settings, variant: str = ""):
        self.name = variant or kind
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, kind, settings, self.name), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, command: str, *arguments):
        try:
            self.connection.send((command, arguments))
            good, answer = self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self.process.join()
            code = self.process.exitcode
            raise Lost("killed: out of memory" if code == -signal.SIGKILL else f"ended with status {code}") from error
        if not good:
            raise Lost(answer)
        return answer

    def close(self) -> None:
        self.connection.close()
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()
