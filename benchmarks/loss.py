"""The loss of a frozen head from hidden states: milliseconds, memory and error against other ways.

    python benchmarks/loss.py                     # on CUDA: hidden 2048, 2K, 8K and 32K tokens; on a CPU: hidden 256
    python benchmarks/loss.py --tokens 8192 --dtype bfloat16
    python benchmarks/loss.py --toy

All give the gradient of the states (T, H) and none of the head (V, H), but for the line without gradient.

    ours               kernels.linear_nll, every token's loss
    ours, no gradient  the same for scoring
    eager              the loss of transformers: all logits, float32 copy, cross_entropy
    chunked            eager in chunks of 1024 tokens (CPU: 256), made again in the backward pass
    torch              torch.nn.functional.linear_cross_entropy with its chunks, on CUDA where this torch has it (slow on a CPU)
    compiled           eager under torch.compile (CUDA, or --compile)
    liger, cce         liger-kernel's fused linear cross entropy, cut-cross-entropy, on CUDA where they are installed

TFLOP/s counts the two products that are needed, 4 T H V (2 T H V without gradient), whatever a contender computes on top.
Errors are against float64 on the same states, a sample of 64 tokens: the largest error of a token's loss (nats), and
1 - cosine of the gradients. States are planted so that losses spread from near 0 to beyond ln V.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks import common  # noqa: E402
from kernels import linear_nll  # noqa: E402
from study.errors import is_out_of_memory  # noqa: E402
from study.logging import format_table  # noqa: E402

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (T, H), weight (V, H), targets (T,) -> (T,), or () where it gives only a sum
SAMPLE = 64  # tokens whose losses and gradients are compared with float64


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    size = 1024 if hidden.is_cuda else 256
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([checkpoint(eager, part, weight, labels, use_reentrant=False) for part, labels in parts])


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=torch.nn.LinearCrossEntropyOptions())


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets)


def cce(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=None)  # exact gradients


def contenders(device: str, compiled: bool) -> tuple[dict[str, Loss], list[str]]:
    """Those that can run here, and the names of those that cannot."""
    found: dict[str, Loss] = {"ours": linear_nll, "ours, no gradient": linear_nll, "eager": eager, "chunked": chunked}
    absent = []
    if hasattr(F, "linear_cross_entropy") and device == "cuda":
        found["torch"] = torch_chunked
    else:
        absent.append("torch")
    if compiled:
        found["compiled"] = torch.compile(eager, dynamic=False)
    for name, package, loss in (("liger", "liger_kernel", liger), ("cce", "cut_cross_entropy", cce)):
        if device == "cuda" and importlib.util.find_spec(package):
            found[name] = loss
        else:
            absent.append(name)
    return found, absent


def planted(T: int, H: int, V: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (T, H), weight (V, H), targets (T,): logits of spread 2, the target's raised by 0 to 12."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(V, H, generator=generator, device=device, dtype=dtype) * 0.02
    targets = torch.randint(V, (T,), generator=generator, device=device)
    own = weight[targets].float()
    lift = 12 * torch.rand(T, 1, generator=generator, device=device)
    noise = torch.randn(T, H, generator=generator, device=device) * (2 / (0.02 * math.sqrt(H)))
    return (noise + own * lift / own.square().sum(-1, keepdim=True)).to(dtype), weight, targets


def truth(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """nll (n,) and its gradients (n, H) in float64 for the first n = SAMPLE tokens."""
    states = hidden[:SAMPLE].double().requires_grad_()
    nll = F.cross_entropy(states @ weight.double().T, targets[:SAMPLE], reduction="none")
    nll.sum().backward()
    return nll.detach(), states.grad


def once(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    if not gradient:
        with torch.no_grad():
            return loss(hidden, weight, targets), None
    states = hidden.detach().requires_grad_()
    nll = loss(states, weight, targets)
    nll.sum().backward()
    return nll.detach(), states.grad


def measure(T: int, H: int, V: int, dtype: torch.dtype, device: str, losses: dict[str, Loss], rounds: int) -> list[dict]:
    """A row for each contender; they take turns, so that a change of the machine's mood meets all."""
    hidden, weight, targets = planted(T, H, V, dtype, device)
    exact_nll, exact_grad = truth(hidden, weight, targets)
    rows = {name: {"contender": name, "tokens": T, "hidden": H, "vocabulary": V} for name in losses}
    times: dict[str, list[float]] = {name: [] for name in losses}

    def run(name: str) -> tuple[Tensor, Tensor | None]:
        return once(losses[name], hidden, weight, targets, name != "ours, no gradient")

    for name, row in rows.items():
        try:
            run(name)  # compiles, and fills caches
            memory = common.Memory(device)
            nll, grad = run(name)
            common.synchronize(device)
            row["extra_mib"] = memory.extra_mib()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            row["failed"] = "out of memory"
            if device == "cuda":
                torch.cuda.empty_cache()
            continue
        # A sum over tokens has no losses of its own to compare.
        row["nll_error"] = float((nll[:SAMPLE].double() - exact_nll).abs().max()) if nll.dim() else None
        row["gradient_1_minus_cosine"] = None
        if grad is not None:
            row["gradient_1_minus_cosine"] = 1 - float(F.cosine_similarity(grad[:SAMPLE].double().flatten(), exact_grad.flatten(), dim=0))
        del nll, grad
    for _ in range(rounds):
        for name, row in rows.items():
            if "failed" not in row:
                common.synchronize(device)
                began = time.perf_counter()
                run(name)
                common.synchronize(device)
                times[name].append(time.perf_counter() - began)
    for name, row in rows.items():
        if times[name]:
            row["ms"] = {key: value * 1e3 for key, value in common.spread(times[name]).items()}
            products = 2 if name == "ours, no gradient" else 4
            row["tflop_per_s"] = products * T * H * V / statistics.median(times[name]) / 1e12
    return list(rows.values())


def shown(row: dict) -> list[str]:
    if "failed" in row:
        return [row["contender"], row["failed"], "", "", "", ""]
    ms, error, angle = row["ms"], row["nll_error"], row["gradient_1_minus_cosine"]
    return [
        row["contender"], f"{ms['median']:.2f} ({ms['min']:.2f} to {ms['max']:.2f})", f"{row['tflop_per_s']:.3g}",
        f"{row['extra_mib']:.0f}", "" if error is None else f"{error:.1e}", "" if angle is None else f"{angle:.1e}",
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a vocabulary of 1000")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tokens", help="token counts, for example 2048,8192")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true", help="eager under torch.compile too (always on CUDA)")
    parser.add_argument("--only", help="contenders, for example ours,eager")
    parser.add_argument("--out", help="write the result there too")
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    fast = device == "cuda"
    if args.threads:
        torch.set_num_threads(args.threads)
    hidden = args.hidden or (32 if args.toy else 2048 if fast else 256)
    vocabulary = 1000 if args.toy else 128256
    tokens = [int(n) for n in args.tokens.split(",")] if args.tokens else [70] if args.toy else [2048, 8192, 32768] if fast else [256, 1300]
    dtype = getattr(torch, args.dtype or ("bfloat16" if fast else "float32"))
    rounds = args.rounds or (2 if args.toy else 20 if fast else 5)
    losses, absent = contenders(device, args.compile or fast and not args.toy)
    if args.only:
        losses = {name: losses[name] for name in map(str.strip, args.only.split(",")) if name in losses}
    print(common.machine_lines(device))
    name_of_dtype = str(dtype).removeprefix("torch.")
    print(f"shape      hidden {hidden}, vocabulary {vocabulary}, {name_of_dtype}; not here: {', '.join(absent) or 'none'}")
    rows, ratios = [], {}
    for T in tokens:
        found = measure(T, hidden, vocabulary, dtype, device, losses, rounds)
        print(f"\n{T} tokens")
        print(
            format_table([shown(row) for row in found], ["contender", "ms", "TFLOP/s", "extra MiB", "nll error", "1 - cosine"]), flush=True
        )
        rows += found
        by_name = {row["contender"]: row["ms"]["median"] for row in found if "ms" in row}
        if "ours" in by_name:
            ratios[str(T)] = {name: ms / by_name["ours"] for name, ms in by_name.items() if name != "ours"}
    print()
    result = {"benchmark": "loss", "dtype": name_of_dtype, "device": device, "ratios": ratios, "rows": rows, "absent": absent}
    common.finish(result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
