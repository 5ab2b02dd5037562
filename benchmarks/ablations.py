"""Ours with one thing taken away, for benchmarks/train_step.py --ablate: what each part of the training step is worth.

An ablation changes the modules of its own process, so it must run in one that nothing else uses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batching import Examples
from kernels.linear import Addition, Joined


def full_logits() -> None:
    """The loss from the logits of a whole pass, in float32, by autograd."""
    from model import llama

    llama.linear_nll = lambda states, weight, targets: F.cross_entropy((states @ weight.T).float(), targets, reduction="none")


def plain_modules() -> None:
    """Norms, SwiGLU and adapters as separate operations of autograd, each projection alone: what peft's modules do."""
    from model import llama

    def projected(x: Tensor, weight: Joined, addition: Addition | None = None, row_keys: Tensor | None = None) -> Tensor:
        outs = list(F.linear(x, weight.whole, weight.bias).split([len(part) for part in weight.parts], dim=-1))
        if addition:
            starts = {sum(map(len, weight.parts[:index])): index for index in range(len(outs))}  # first column -> which part
            pairs = zip(addition.factors[::2], addition.factors[1::2], addition.columns, addition.scales, strict=True)
            for A, B, (start, _), scale in pairs:
                low = F.linear(F.dropout(x, addition.dropout), A)
                outs[starts[start]] = outs[starts[start]] + F.linear(low, B) * scale
        return torch.cat(outs, dim=-1)

    def normed(x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, *rest) -> tuple[Tensor, Tensor]:
        summed = x if residual is None else x + residual
        wide = summed.float()
        return projected(norm_weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype), *rest), summed

    def gated(gate_up: Tensor, *rest) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return projected(F.silu(gate) * up, *rest)

    llama.linear, llama.norm_linear, llama.swiglu_linear = projected, normed, gated


def padded(examples: Examples, indices: list[int]) -> Examples:
    """These examples, each prompt filled up until all are as long as the longest: what a padded batch has to compute."""
    longest = max(examples.lengths[i] for i in indices)
    pairs = []
    for i in indices:
        ids, start = examples.ids(i).tolist(), int(examples.starts[i])
        pairs.append(([0] * int(longest - len(ids)) + ids[:start], ids[start:]))
    return Examples.from_pairs(pairs)


ABLATIONS: dict[str, Callable[[], None]] = {
    "full_logits": full_logits,
    "plain_modules": plain_modules,
    "padded": lambda: None,  # of the data, see train_step.Ours
    "no_dropout": lambda: None,
}
