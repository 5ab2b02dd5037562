"""Training steps against transformers + peft: tokens/s, step time, memory and first losses, side by side.

    python benchmarks/train_step.py                                   # the CPU configuration; --preset 1b on CUDA
    python benchmarks/train_step.py --data DIR --tokenizer DIR        # real GSM8K rows; else random tokens of their lengths
    python benchmarks/train_step.py --preset 1b --dtype bfloat16 --memory     # peak memory of one step alone
    python benchmarks/train_step.py --toy                             # seconds, to see that everything runs

Each contender runs in a fresh process of its own and keeps it; the processes take turns, one at a time, round by round, so
that a change of the machine's mood meets all. All load the same folder of seeded random weights, start from the same adapter,
and train on examples of the same rows with dropout 0.05 (parity: dropout 0), AdamW, gradients clipped to norm 1.

    default    transformers + peft as people run it: random batches padded to their longest example, the model's own loss over all
               positions, adapters as peft makes them (float32)
    tuned      the same with batches grouped by length (transformers' group_by_length: megabatches of 50 batches, sorted) and
               autocast_adapter_dtype=False
    compiled   tuned, each decoder layer under torch.compile (--compile)
    liger      tuned, with liger-kernel's rotary, norm, SwiGLU and fused linear cross entropy, on CUDA where it is installed

tokens/s counts useful tokens: prompts included, padding not. Memory is the peak from the loaded model to the last timed step,
less what the loaded model holds: resident memory on a CPU, allocated memory on CUDA.

The bound is the rate of this machine's own matmuls at the head's shapes over the arithmetic that a useful token needs:

    FLOPs = 4 N_linear - 2 N_qkv(first layer)    frozen linears, forward and dX; nothing lies below the first layer
          + 6 N_lora                             forward, dX, and the factors' own gradients
          + 3.5 * 2 S heads D layers             causal attention, forward and 2.5 times that backward; S: mean of length^2 / mean length
          + 4 V H f                              head, forward and dX, for the share f of tokens that carry loss

It leaves out everything that is not a matmul, so 100 % is out of reach. (Ours skips the prompt's rows of the last layer behind its
attention, which the formula counts: at most 3 % of the CPU configuration.)
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks import common  # noqa: E402
from benchmarks.ablations import ABLATIONS, padded  # noqa: E402
from data.batching import Examples, Micro, collate, micro_tokens_of, step_indices  # noqa: E402
from study.logging import format_table  # noqa: E402

PEERS = ("default", "tuned", "compiled", "liger")
PARITY_BATCHES = 5  # seen again and again, so that the losses fall and a wrong gradient shows
TOLERANCE = {"float32": 1e-3, "bfloat16": 2.5e-2, "float16": 2.5e-2}  # of a loss, in nats; 16-bit: 2e-3 of ln(vocabulary)


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
        from model import load_model

        s = self.settings
        ABLATIONS.get(self.variant, lambda: None)()
        dropout = 0.0 if self.variant == "ours, no dropout" else dropout
        model = load_model(Path(s.folder) / "model", s.torch_dtype, s.device)
        self.memory = common.Memory(s.device)
        add_lora(model, s.rank, s.rank, dropout, generator=torch.Generator().manual_seed(s.seed))

        def optimizers(masters: list) -> list[torch.optim.Optimizer]:
            return [torch.optim.AdamW(masters, lr=s.learning_rate, weight_decay=0.0)]

        def batches(step: int, micro_tokens: int) -> list[Micro]:
            examples, indices = self.examples, plan[step]
            if self.variant == "ours, padded":
                examples, indices = padded(examples, indices), list(range(len(indices)))
            return collate(examples, indices, micro_tokens, np.ones(examples.completion_offsets[-1], dtype=np.float32))

        self.plan = plan
        self.steps = train.fit(
            model, lora_parameters(model), optimizers, batches, len(plan), seed=s.seed, schedule="constant",
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


# ----------------------------------------------------------------------------------------------------------------------
# The bound


def flops_per_token(shape: common.Shape, rank: int, examples: Examples) -> dict[str, float]:
    """FLOPs of a useful token, by term; see the head of this file."""
    linears = shape.linears
    frozen = shape.layers * sum(out * inn for out, inn in linears.values())
    first = sum(out * inn for name, (out, inn) in linears.items() if name in ("q_proj", "k_proj", "v_proj"))
    lora = shape.layers * rank * sum(out + inn for out, inn in linears.values())
    lengths = examples.lengths.astype(np.float64)
    share = float((lengths - examples.starts).sum() / lengths.sum())
    spanned = float((lengths**2).sum() / lengths.sum())
    terms = {
        "linears": 4 * frozen - 2 * first,
        "lora": 6 * lora,
        "attention": 3.5 * 2 * spanned * shape.heads * shape.head_dim * shape.layers,
        "head": 4 * shape.vocabulary * shape.hidden * share,
    }
    return {**terms, "total": sum(terms.values()), "loss_share": share}


# ----------------------------------------------------------------------------------------------------------------------
# The command


def contenders_of(args: argparse.Namespace, device: str) -> tuple[list[str], list[str]]:
    """(names that take part, lines about those that cannot)."""
    names, absent = ["ours", "default", "tuned"], []
    if args.compile:
        names.append("compiled")
    if device == "cuda":
        if importlib.util.find_spec("liger_kernel"):
            names.append("liger")
        else:
            absent.append("liger      absent: liger-kernel is not installed")
    if args.ablate:
        names += list(ABLATIONS)
    if args.only:
        chosen = [name.strip() for name in args.only.split(",")]
        unknown = [name for name in chosen if name not in ("ours", *PEERS, *ABLATIONS)]
        if unknown:
            raise SystemExit(f"error: --only {unknown[0]}: known are {', '.join(('ours', *PEERS, *ABLATIONS))}")
        names = chosen
    missing = [name for name in ("transformers", "peft") if not importlib.util.find_spec(name)]
    if missing and any(name in PEERS for name in names):
        absent.append(f"peers      absent: {' and '.join(missing)} not installed (pip install -r requirements-dev.txt)")
        names = [name for name in names if name not in PEERS]
    return names, absent


def kind_of(name: str) -> str:
    return "peer" if name in PEERS else "ours"


def settings_of(args: argparse.Namespace) -> Settings:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    preset = "toy" if args.toy else args.preset or ("1b" if device == "cuda" else "cpu")
    gpu = device == "cuda"
    base = {
        "cpu": dict(
            dtype="float32", batch_size=16, accumulation=1, warmup=1, steps=3, rounds=3, parity_steps=20, parity_examples=4,
            learning_rate=1e-3,
        ),
        "1b": dict(
            dtype="bfloat16", batch_size=16, accumulation=4 if gpu else 1, warmup=20 if gpu else 0, steps=17 if gpu else 1,
            rounds=3 if gpu else 1, parity_steps=20 if gpu else 0, parity_examples=16, learning_rate=1e-4,
        ),
        "toy": dict(
            dtype="float32", batch_size=4, accumulation=2, warmup=1, steps=2, rounds=2, parity_steps=6, parity_examples=4,
            learning_rate=1e-2, shrink=8,
        ),
    }[preset]  # fmt: skip
    names = ("dtype", "batch_size", "accumulation", "warmup", "steps", "rounds", "parity_steps", "micro_tokens", "threads")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    settings = Settings(preset, device=device, seed=args.seed, data=args.data, tokenizer=args.tokenizer, **{**base, **given})
    if bool(settings.data) != bool(settings.tokenizer):
        raise SystemExit("error: --data and --tokenizer belong together: the prepared rows, and the folder whose tokenizer cuts them")
    if settings.data and settings.shape.vocabulary < 128256:
        raise SystemExit("error: real rows need a preset with the real vocabulary: cpu or 1b")
    if args.memory:
        return replace(settings, warmup=0, steps=1, rounds=1)
    return settings


def attempt(action: Callable, lost: dict[str, str], contender: Contender):
    """action's answer, or None with the reason noted."""
    try:
        return action()
    except Lost as error:
        lost[contender.name] = str(error)
        print(f"{contender.name:10s} {error}", flush=True)
        contender.close()
        return None


def measure_memory(names: list[str], settings: Settings) -> dict:
    """Peak memory of one step, each contender alone on the machine, in GiB."""
    found, lost = {}, {}
    for name in names:
        contender = Contender(kind_of(name), settings, name)

        def one_step(contender=contender) -> float:
            contender.ask("prepare")
            contender.ask("run", 0)
            return contender.ask("memory")

        peak = attempt(one_step, lost, contender)
        if peak is not None:
            found[name] = peak
            print(f"{name:18s} {peak:7.2f} GiB above the loaded model", flush=True)
            contender.close()
    return {"extra_memory_gib": found, "lost": lost, **memory_ratios(found)}


def memory_ratios(found: dict[str, float]) -> dict:
    both = "ours" in found and "default" in found
    return {"extra_memory_ratio": found["ours"] / found["default"] if both else None}


def measure_speed(names: list[str], settings: Settings, machine: Contender) -> dict:
    """Rounds of all contenders in turn, then their first losses."""
    lost: dict[str, str] = {}
    running = {}
    for name in names:
        contender = Contender(kind_of(name), settings, name)
        seconds = attempt(lambda contender=contender: contender.ask("prepare"), lost, contender)
        if seconds is not None:
            running[name] = contender
            print(f"{name:18s} ready after {seconds:.1f} s: loading and {settings.warmup} steps", flush=True)
    rounds: dict[str, list[dict]] = {name: [] for name in running}
    rates = []
    for number in range(settings.rounds):
        rates.append(machine.ask("rates"))
        for name, contender in list(running.items()):
            done = attempt(lambda contender=contender, number=number: contender.ask("run", number), lost, contender)
            if done is None:
                del running[name]
            else:
                rounds[name].append(done)
        line = "  ".join(f"{name} {rounds[name][-1]['tokens_per_s']:.0f}" for name in running)
        print(f"round {number + 1}    tokens/s: {line}", flush=True)
    memory = {name: contender.ask("memory") for name, contender in running.items()}
    losses = {}
    if settings.parity_steps:
        for name in ("ours", "default"):
            if name in running:
                losses[name] = attempt(lambda name=name: running[name].ask("parity"), lost, running[name])
    for contender in running.values():
        contender.close()
    done = {name: found for name, found in rounds.items() if len(found) == settings.rounds}
    return {"rounds": done, "rates": rates, "extra_memory_gib": memory, "losses": {k: v for k, v in losses.items() if v}, "lost": lost}


def report_speed(found: dict, settings: Settings, examples: Examples) -> dict:
    """Prints the tables and gives what goes into the result."""
    flops = flops_per_token(settings.shape, settings.rank, examples)
    head = [rate["head"] for rate in found["rates"]]
    body = [rate["body"] for rate in found["rates"]]
    bounds = [rate / flops["total"] for rate in head]
    mixed = [1 / (flops["head"] / h + (flops["total"] - flops["head"]) / b) for h, b in zip(head, body, strict=True)]
    mega = {name: value / 1e6 for name, value in flops.items()}
    unit, name_of_unit = (1e12, "TFLOP/s") if max(head) > 5e12 else (1e9, "GFLOP/s")
    print(
        f"\nmatmul     head {common.shown([x / unit for x in head], '.1f')} {name_of_unit}, "
        f"body {common.shown([x / unit for x in body], '.1f')} {name_of_unit}, {settings.dtype}"
    )
    print(
        f"arithmetic {mega['linears']:.2f} linears + {mega['lora']:.2f} LoRA + {mega['attention']:.2f} attention + {mega['head']:.2f} head "
        f"(f = {flops['loss_share']:.3f}) = {mega['total']:.2f} MFLOP a useful token\n"
    )
    speeds = {name: [r["tokens_per_s"] for r in rounds] for name, rounds in found["rounds"].items()}
    ratios = {
        name: [a / b for a, b in zip(speeds["ours"], speed, strict=True)]
        for name, speed in speeds.items()
        if name != "ours" and "ours" in speeds
    }
    rows = [
        ["bound, at the head's rate", common.shown(bounds), "", "", ""],
        ["bound, each at its own rate", common.shown(mixed), "", "", ""],
    ]
    for name, speed in speeds.items():
        times = common.shown([r["step_ms"] for r in found["rounds"][name]])
        ratio = common.shown(ratios[name], ".2f") + " x" if name in ratios else ""
        rows.append([name, common.shown(speed), times, f"{found['extra_memory_gib'][name]:.2f}", ratio])
    print(format_table(rows, ["contender", "tokens/s", "step ms", "extra GiB", "ours is"]))
    memory = found["extra_memory_gib"]
    shares = [a / b for a, b in zip(speeds["ours"], bounds, strict=True)] if "ours" in speeds else []
    result = {
        **{f"ratio_{name.replace('ours, ', 'without_').replace(' ', '_')}": statistics.median(values) for name, values in ratios.items()},
        **memory_ratios(memory),
        "matmul_bound_share": statistics.median(shares) if shares else None,
        "ratios": {name: common.spread(values) for name, values in ratios.items()},
        "tokens_per_s": {name: common.spread(values) for name, values in speeds.items()},
        "step_ms": {name: common.spread([r["step_ms"] for r in rounds]) for name, rounds in found["rounds"].items()},
        "extra_memory_gib": memory,
        "bound_tokens_per_s": common.spread(bounds),
        "bound_tokens_per_s_own_rates": common.spread(mixed),
        "matmul_flop_per_s": {"head": common.spread(head), "body": common.spread(body)},
        "flops_per_token": flops,
        "lost": found["lost"],
    }
    if shares:
        print(f"\nbound      ours reaches {common.shown([100 * x for x in shares], '.0f')} % of the bound at the head's rate")
    if result["extra_memory_ratio"]:
        print(f"memory     ours takes {result['extra_memory_ratio']:.3f} of default's extra memory")
    return result


def report_parity(losses: dict[str, list[float]], settings: Settings) -> dict:
    """Prints the first losses side by side; the largest difference decides."""
    if "ours" not in losses or "default" not in losses:
        return {"parity_max_difference": None, "parity": None}
    ours, theirs = losses["ours"], losses["default"]
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    table = [[step, f"{a:.6f}", f"{b:.6f}", f"{gap:.1e}"] for step, (a, b, gap) in enumerate(zip(ours, theirs, gaps, strict=True))]
    print(f"\nfirst losses, dropout 0, {settings.parity_examples} examples a step")
    print(format_table(table, ["step", "ours", "default", "difference"]))
    worst, bound = max(gaps), TOLERANCE[settings.dtype]
    good = bool(np.isfinite(worst)) and worst <= bound
    print(f"parity     largest difference {worst:.1e}, at most {bound:g} allowed: {'equal' if good else 'NOT EQUAL'}")
    return {"parity_max_difference": worst, "parity": good, "losses": losses}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--preset", choices=("cpu", "1b"), help="cpu: 4 layers of width 256; 1b: Llama-3.2-1B (default on CUDA)")
    found.add_argument("--toy", action="store_true", help="a toy shape and short examples")
    found.add_argument("--device", choices=("cpu", "cuda"))
    found.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    found.add_argument("--batch_size", type=int, help="examples of a peer's micro-batch")
    found.add_argument("--accumulation", type=int, help="micro-batches of a peer's step; ours gets the same examples a step")
    found.add_argument("--micro_tokens", type=int, help="tokens of a micro-batch of ours")
    found.add_argument("--warmup", type=int, help="steps before the clock starts")
    found.add_argument("--steps", type=int, help="timed steps a round")
    found.add_argument("--rounds", type=int, help="turns of every contender")
    found.add_argument("--parity_steps", type=int, help="losses compared with dropout off; 0: none")
    found.add_argument("--threads", type=int, help="threads of each process; default: PyTorch's")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--data", help="the folder of python -m data.prepare gsm8k")
    found.add_argument("--tokenizer", help="a Llama-3 folder with tokenizer.json; its vocabulary is the shape's")
    found.add_argument("--only", help="contenders, for example ours,tuned")
    found.add_argument("--compile", action="store_true", help="the tuned peer with compiled layers too")
    found.add_argument("--ablate", action="store_true", help="ours with one thing taken away, each in turn")
    found.add_argument("--memory", action="store_true", help="peak memory of one step alone, one contender after the other")
    found.add_argument("--out", help="write the result there too")
    return found


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    settings = settings_of(args)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    names, absent = contenders_of(args, settings.device)
    print(common.machine_lines(settings.device))
    shape = settings.shape
    print(
        f"shape      hidden {shape.hidden}, inner {shape.inner}, {shape.layers} layers, {shape.heads}/{shape.kv_heads} heads, "
        f"vocabulary {shape.vocabulary}, tied; {settings.dtype}; LoRA r {settings.rank} on all linears, dropout {settings.dropout}"
    )
    print("\n".join(absent) + ("\n" if absent else ""), end="")
    with tempfile.TemporaryDirectory(prefix="lethe_bench_") as folder:
        settings = replace(settings, folder=folder)
        machine = Contender("machine", settings)
        machine.ask("make")
        examples = settings.examples()
        lengths = examples.lengths
        print(
            f"examples   {len(examples)} {'GSM8K rows' if settings.data else 'of random tokens with the lengths of GSM8K rows'}, "
            f"{lengths.mean():.0f} tokens in the mean, {lengths.max()} at most; {settings.per_step} a step; "
            f"{settings.rounds} rounds of {settings.steps} steps\n",
            flush=True,
        )
        if args.memory:
            machine.close()
            result = measure_memory(names, settings)
        else:
            found = measure_speed(names, settings, machine)
            machine.close()
            result = report_speed(found, settings, examples)
            result |= report_parity(found["losses"], settings)
    kept = {name: value for name, value in asdict(settings).items() if name != "folder"}
    print()
    common.finish(
        {"benchmark": "train_step", "mode": "memory" if args.memory else "speed", **result, "settings": kept, "absent": absent}, args.out
    )
    return 1 if result.get("parity") is False else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
