"""Times a step of Muon on all LoRA factors of a model against a loop of torch.optim.Muon, one factor after the other.

    python benchmarks/muon.py                          # the 224 factors of Llama-3.2-1B at rank 16; --device cuda
    python benchmarks/muon.py --toy                    # seconds, to see that it runs

Contenders take turns in one process, round by round, on the same gradients; the ratio is the median of each round's own.

    ours             the factors in stacks, as lora/layers.py keeps them; float32, Gram form
    torch            torch.optim.Muon on as many parameters as there are factors; its Newton-Schulz steps are in bfloat16
    torch, float32   its loop with the steps in float32: what the same exactness costs one factor at a time
    adamw            torch's AdamW on the stacks, for scale

The error is the largest of any factor's first update against float64, in the Frobenius norm, divided by that of the update. GB/s counts
what must move: gradients read, momenta and factors read and written, and AdamW's second moments.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks.common import SHAPES, Shape, finish, machine_lines, shown, spread  # noqa: E402
from benchmarks.decode import take_turns  # noqa: E402
from optim.muon import COEFFICIENTS, Muon, lr_scale, ordinary_form, stacked, wide  # noqa: E402
from study.logging import format_table  # noqa: E402

LR, MOMENTUM = 1e-3, 0.95


def factors_of(shape: Shape, rank: int) -> dict[str, tuple[int, int, int]]:
    """The stacks of a model's LoRA on all linears: name -> (n, rows, cols)."""
    counts: dict[tuple[int, int], int] = {}
    for out, inn in shape.linears.values():
        for factor in ((rank, inn), (out, rank)):
            counts[factor] = counts.get(factor, 0) + shape.layers
    return {f"{'A' if rows == rank else 'B'}_{rows}x{cols}": (n, rows, cols) for (rows, cols), n in counts.items()}


class FloatLoop(torch.optim.Optimizer):
    """torch.optim.Muon's loop, its Newton-Schulz steps in float32."""

    def __init__(self, params):
        super().__init__(params, {"lr": LR})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffer = self.state[p]["momentum_buffer"]
            buffer.lerp_(p.grad, 1 - MOMENTUM)
            ((_, orthogonal),) = ordinary_form([wide(stacked(p.grad.lerp(buffer, MOMENTUM)))], COEFFICIENTS, 5, 1e-7, torch.float32)
            update = orthogonal[0].T if p.shape[0] > p.shape[1] else orthogonal[0]
            p.add_(update, alpha=-LR * lr_scale("match_rms_adamw", *p.shape))


def torch_loop(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, LR, weight_decay=0.0, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")


CONTENDERS = {  # name: (makes the optimizer, one parameter a factor, floats that move for each element)
    "ours": (lambda parameters: Muon(parameters, LR, momentum=MOMENTUM), False, 5),
    "torch": (torch_loop, True, 5),
    "torch, float32": (FloatLoop, True, 5),
    "adamw": (lambda parameters: torch.optim.AdamW(parameters, LR), False, 7),
}


def made(name: str, start: list[Tensor], gradients: list[Tensor]) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """The contender's optimizer over copies of these stacks, its gradients in place."""
    make, apart, _ = CONTENDERS[name]
    parameters = [nn.Parameter(w.clone()) for stack in start for w in (stack if apart else [stack])]
    for p, gradient in zip(parameters, (g for stack in gradients for g in (stack if apart else [stack])), strict=True):
        p.grad = gradient.clone()
    return make(parameters), parameters


def update_error(parameters: list[nn.Parameter], exact: list[Tensor]) -> float:
    """Of one step from zero. parameters: (rows, cols) or stacks of them, in the order of exact, which are stacks in float64."""
    flat = [matrix for p in parameters for matrix in stacked(p.detach())]
    references = [matrix for stack in exact for matrix in stack]
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(flat, references, strict=True))


def run(shape: Shape, rank: int, device: str, rounds: int) -> dict:
    generator = torch.Generator(device).manual_seed(0)
    shapes = factors_of(shape, rank)
    start = [torch.randn(size, generator=generator, device=device) * 0.02 for size in shapes.values()]
    gradients = [torch.randn(size, generator=generator, device=device) for size in shapes.values()]
    count, elements = sum(size[0] for size in shapes.values()), sum(g.numel() for g in gradients)
    sizes = ", ".join(f"{n} {name}" for name, (n, *_) in shapes.items())
    print(f"{machine_lines(device)}\nfactors    {count} of {elements / 1e6:.2f} M elements: {sizes}; {rounds} rounds\n")

    # The first step from zero is the update itself: (1 - m²) times the gradient, orthogonalised, which is the gradient, orthogonalised.
    exact = []
    for g in gradients:
        ((_, orthogonal),) = ordinary_form([wide(g.double())], COEFFICIENTS, 5, 1e-7, torch.float64)
        scale = -LR * lr_scale("match_rms_adamw", *g.shape[-2:])
        exact.append(scale * (orthogonal.mT if g.shape[-2] > g.shape[-1] else orthogonal))
    errors = {}
    for name in (name for name in CONTENDERS if name != "adamw"):
        optimizer, parameters = made(name, [torch.zeros_like(w) for w in start], gradients)
        optimizer.step()
        errors[name] = update_error(parameters, exact)
    del exact

    optimizers = {name: made(name, start, gradients)[0] for name in CONTENDERS}
    for _ in range(2):  # beyond the uncounted one of take_turns: libraries choose their kernels, memory is gathered
        for optimizer in optimizers.values():
            optimizer.step()
    times, _ = take_turns({name: optimizer.step for name, optimizer in optimizers.items()}, rounds, device)
    ratios = {name: [a / b for a, b in zip(times[name], times["ours"], strict=True)] for name in CONTENDERS}
    rows = []
    for name, (_, _, floats) in CONTENDERS.items():
        error, rate = f"{errors[name]:.1e}" if name in errors else "-", 4e-9 * floats * elements / statistics.median(times[name])
        rows.append([name, shown([1e3 * t for t in times[name]], ".2f"), f"{rate:.1f}", shown(ratios[name], ".2f"), error])
    print(format_table(rows, ["step of", "ms", "GB/s", "of ours", "error"]))
    return {
        "device": device, "rank": rank, "factors": count, "elements": elements, "rounds": rounds,
        "ms": {name: spread([1e3 * t for t in found]) for name, found in times.items()}, "max_relative_error": errors,
        "ratio": statistics.median(ratios["torch"]), "ratios": {name: spread(found) for name, found in ratios.items()},
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="CUDA where there is one")
    parser.add_argument("--rank", type=int, help="of the adapters, 16 by default")
    parser.add_argument("--rounds", type=int, help="11 on CPU, 30 on CUDA by default")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", help="a file for the JSON of the last line")
    arguments = parser.parse_args(argv)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("error: this machine has no CUDA device", file=sys.stderr)
        return 2
    rank = arguments.rank or (4 if arguments.toy else 16)
    rounds = arguments.rounds or (2 if arguments.toy else 30 if device == "cuda" else 11)
    found = run(SHAPES["toy" if arguments.toy else "1b"], rank, device, rounds)
    finish({"benchmark": "muon", "toy": arguments.toy, **found}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
