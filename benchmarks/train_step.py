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
import importlib.util
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks import common  # noqa: E402
from benchmarks.ablations import ABLATIONS  # noqa: E402
from benchmarks.contenders import PEERS, Contender, Lost, Settings  # noqa: E402
from data.batching import Examples  # noqa: E402
from study.errors import LetheError  # noqa: E402
from study.logging import format_table  # noqa: E402

TOLERANCE = {"float32": 1e-3, "bfloat16": 2.5e-2, "float16": 2.5e-2}  # of a loss, in nats; 16-bit: 2e-3 of ln(vocabulary)

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
    if args.only:
        chosen = [name.strip() for name in args.only.split(",")]
        unknown = [name for name in chosen if name not in ("ours", *PEERS, *ABLATIONS)]
        if unknown:
            raise SystemExit(f"error: --only {unknown[0]}: known are {', '.join(('ours', *PEERS, *ABLATIONS))}")
        names = chosen
    names += [name for name in ABLATIONS if args.ablate and name not in names]
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
        **{f"ratio_{name}": statistics.median(values) for name, values in ratios.items() if name in PEERS},
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


def measure(names: list[str], settings: Settings, memory: bool) -> dict:
    """The result, but for what finish adds."""
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
        if memory:
            machine.close()
            return measure_memory(names, settings)
        found = measure_speed(names, settings, machine)
        machine.close()
        return report_speed(found, settings, examples) | report_parity(found["losses"], settings)


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
    try:
        result = measure(names, settings, args.memory)
    except Lost as error:  # of the machine's own measurements
        print(f"error: {error}", file=sys.stderr)
        return 1
    kept = {name: value for name, value in asdict(settings).items() if name != "folder"}
    print()
    common.finish(
        {"benchmark": "train_step", "mode": "memory" if args.memory else "speed", **result, "settings": kept, "absent": absent}, args.out
    )
    # A peer that does not fit into memory is a result of --memory, and a failure elsewhere.
    lost = "ours" in result["lost"] if args.memory else bool(result["lost"])
    return 1 if lost or result.get("parity") is False else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        sys.exit(main())
    except LetheError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
