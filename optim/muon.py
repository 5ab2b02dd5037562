"""Muon: momentum whose update is made orthogonal, for matrices and stacks of them, a batch at a time.

    M <- momentum M + (1 - momentum) gradient            one step of a weight W (rows, cols)
    U  = momentum M + (1 - momentum) gradient            nesterov; else U = M
    W <- (1 - lr weight_decay) W - lr scale O            O: U with its singular values brought near 1

O comes from Newton-Schulz steps X <- aX + (b XXᵀ + c (XXᵀ)²) X, begun at U over its Frobenius norm: the semantics of torch.optim.Muon.
Source: K. Jordan, https://kellerjordan.github.io/posts/muon/. scale, so that a step is as large whatever the matrix's shape:

    match_rms_adamw    0.2 √max(rows, cols)        a step of about AdamW's size at the same lr (arXiv:2502.16982)
    original           √max(1, rows / cols)        on LoRA's factors A x1 and B x√(out / rank): B learns faster by accident

Not for embeddings, heads, norms and biases: they are no maps between hidden states, AdamW takes them (optim/partition.py). Cautions
on what is left: it is little tried for fine-tuning and small batches; a model pretrained with Adam fares worse under it in full
fine-tuning (arXiv:2605.06654), less so with LoRA (arXiv:2605.10468); and a LoRA's A, whose first gradients are next to nothing
because B starts at zero, gets steps of full size all the same, so it may be left to AdamW (muon_factors B).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.775, 2.0315)
SCALES = ("match_rms_adamw", "original")
RESTART = 3  # Newton-Schulz steps on one Gram matrix, see gram_form
BATCH_CUDA, BATCH_CPU = 2**27, 2**19  # most elements of a batch: beyond it nothing is gained; on a CPU all of it stays in the cache


class Muon(torch.optim.Optimizer):
    """Parameters are float32, each one matrix (rows, cols) or a stack (n, rows, cols) of independent ones.

    State: "momentum_buffer" alone, of the parameter's shape. Nothing waits for the device. A matrix whose gradient and momentum
    are zero is left where it is (but for weight decay). Raises ValueError for other shapes and types, and for settings out of range.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        scale: str = "match_rms_adamw",
    ):
        if scale not in SCALES:
            raise ValueError(f"Muon's scale {scale!r} is unknown; known: {', '.join(SCALES)}")
        if not (lr >= 0 and weight_decay >= 0 and 0 <= momentum < 1 and eps > 0 and ns_steps >= 1):
            asked = f"lr {lr}, weight_decay {weight_decay}, momentum {momentum}, eps {eps}, ns_steps {ns_steps}"
            raise ValueError(f"Muon needs lr and weight_decay >= 0, momentum in [0, 1), eps > 0 and ns_steps >= 1; got {asked}")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
                    "ns_coefficients": tuple(ns_coefficients), "eps": eps, "ns_steps": ns_steps, "scale": scale}  # fmt: skip
        super().__init__(params, defaults)
        for p in (p for group in self.param_groups for p in group["params"]):
            if hasattr(p, "full_tensor"):
                raise ValueError("Muon needs whole matrices, and this one is sharded over processes: use AdamW there")
            if p.ndim not in (2, 3) or p.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"Muon steps on float32 matrices and stacks of them, not on {p.dtype} of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for form, batch in batches([p for p in group["params"] if p.grad is not None]):
                self._step(form, batch, group)
        return loss

    def _step(self, form: str, batch: list[tuple[nn.Parameter, slice]], group: dict) -> None:
        weights, gradients, buffers = [], [], []  # (n, rows, cols) each, views
        for p, part in batch:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
            for found, tensor in ((weights, p.detach()), (gradients, p.grad), (buffers, self.state[p]["momentum_buffer"])):
                found.append(stacked(tensor)[part])
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"]) if group["nesterov"] else buffers
        orthogonalise = gram_form if form == "gram" else ordinary_form
        products = orthogonalise([wide(u) for u in updates], group["ns_coefficients"], group["ns_steps"], group["eps"])
        for weight, (Q, X) in zip(weights, products, strict=True):
            rows, cols = weight.shape[-2:]
            keep, alpha = 1 - group["lr"] * group["weight_decay"], -group["lr"] * lr_scale(group["scale"], rows, cols)
            if Q is None:
                weight.mul_(keep).add_(X.mT if rows > cols else X, alpha=alpha)
            else:  # the last product, the scale and the decay in one pass
                weight.baddbmm_(*((X.mT, Q.mT) if rows > cols else (Q, X)), beta=keep, alpha=alpha)


def lr_scale(scale: str, rows: int, cols: int) -> float:
    """What the learning rate is multiplied with for a matrix of this shape; see the head of this file."""
    return 0.2 * math.sqrt(max(rows, cols)) if scale == "match_rms_adamw" else math.sqrt(max(1.0, rows / cols))


def stacked(tensor: Tensor) -> Tensor:
    """(rows, cols) or (n, rows, cols) -> (n, rows, cols), a view."""
    return tensor[None] if tensor.ndim == 2 else tensor


def wide(stack: Tensor) -> Tensor:
    """(n, rows, cols) with its short side first, a view: the iteration of Xᵀ is that of X, transposed."""
    return stack.mT if stack.shape[-2] > stack.shape[-1] else stack


def form_of(short: int, long: int, cuda: bool) -> str:
    """ "gram" or "ordinary", for matrices of this shape.

    Five steps take 8 short² long + 34 short³ FLOPs in the Gram form and 20 short² long + 10 short³ in the ordinary one: the
    former pays where long > 2 short, and reads the long side four times instead of fifteen. On CUDA the ordinary form has
    bfloat16's tensor cores, some 14 times the rate of the Gram form's float32, so only ranks up to 256 stay with that: they
    are bound by bandwidth and not by FLOPs.
    """
    return "gram" if long > 2 * short and (not cuda or short <= 256) else "ordinary"


def batches(parameters: list[nn.Parameter]) -> Iterator[tuple[str, list[tuple[nn.Parameter, slice]]]]:
    """(form, parts of parameters that are orthogonalised together): in the ordinary form matrices of one shape, either way up; in
    the Gram form all of one short side, since only their small Gram matrices meet."""
    found: dict[tuple, list[nn.Parameter]] = {}
    for p in parameters:
        short, long = sorted(p.shape[-2:])
        form = form_of(short, long, p.is_cuda)
        found.setdefault((form, p.device, p.dtype, short, long if form == "ordinary" else 0), []).append(p)
    for (form, device, *_), same in found.items():
        most = BATCH_CUDA if device.type == "cuda" else BATCH_CPU
        batch, size = [], 0
        for p in same:
            each = p.shape[-2] * p.shape[-1]
            stride = max(1, most // each)  # matrices of a stack that are taken at once
            for start in range(0, p.numel() // each, stride):
                part = slice(start, min(start + stride, p.numel() // each))
                elements = (part.stop - part.start) * each
                if batch and size + elements > most:
                    yield form, batch
                    batch, size = [], 0
                batch, size = [*batch, (p, part)], size + elements
        yield form, batch


def ordinary_form(
    updates: list[Tensor], coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype | None = None
) -> list[tuple[None, Tensor]]:
    """Stacks (n, short, long) of one shape, as one batch -> (None, O) for each.

    dtype: of the iteration; bfloat16 on CUDA, as torch.optim.Muon has it everywhere, else the updates' own. bfloat16 puts each O off by
    1 or 2 % of its norm, and by some 15 % where the gradient lacks full rank.
    """
    a, b, c = coefficients
    dtype = dtype or (torch.bfloat16 if updates[0].is_cuda else updates[0].dtype)
    X = torch.cat([u.to(dtype) for u in updates])  # (N, short, long)
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        G = torch.bmm(X, X.mT)
        X = torch.baddbmm(X, torch.baddbmm(G, G, G, beta=b, alpha=c), X, beta=a)
    return [(None, x) for x in X.split([len(u) for u in updates])]


def gram_form(updates: list[Tensor], coefficients: tuple[float, float, float], steps: int, eps: float) -> list[tuple[Tensor, Tensor]]:
    """Stacks (n, short, long) whose short sides are equal -> (Q, X) for each, with O = Q X and Q (n, short, short).

    A step multiplies X from the left by a polynomial of G = XXᵀ, so only G, which is small, need be iterated. But G holds squared
    singular values: what lies below 3e-4 of the largest is lost in its rounding, and five steps bring it up to 485 times its size. So
    X is multiplied out and G formed anew after three steps, before that shows: with singular values over three decades the error
    against float64 is then the ordinary form's, 4e-6 of O, and 2e-4 otherwise.
    """
    counts, norm, Q = [len(u) for u in updates], None, None
    for start in range(0, steps, RESTART):
        if Q is not None:
            updates = [torch.bmm(q, u) for q, u in zip(Q.split(counts), updates, strict=True)]
        G = torch.cat([torch.bmm(u, u.mT) for u in updates])  # (N, short, short)
        taken = min(RESTART, steps - start)
        if norm is None:  # the trace of XXᵀ is the squared Frobenius norm
            norm = G.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt().clamp(min=eps)[:, None, None]
            Q = gram_factor(G / norm / norm, coefficients, taken) / norm
        else:
            Q = gram_factor(G, coefficients, taken)
    return list(zip(Q.split(counts), updates, strict=True))


def gram_factor(G: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Q (n, m, m) such that Q X is X after these Newton-Schulz steps; G = XXᵀ."""
    a, b, c = coefficients
    Q = None
    for left in reversed(range(steps)):
        P = torch.baddbmm(G, G, G, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if Q is None else P @ Q
        if left:
            G = P @ G @ P  # P and G commute: XXᵀ of the next X
    return Q
