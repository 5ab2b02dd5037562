"""Per-token loss and perplexity from hidden states, without ever holding the (T, V) logits.

With a frozen head the gradient of each token's loss with respect to its state is a row of its own,
    d nll_i / d hidden_i = (softmax(z_i) - onehot(y_i)) W,
and no sum over tokens exists (the only such sum is dW). So the unscaled rows are formed in the forward pass, and whatever
factor a token gets later (a mask, a weight, 1 / count, a loss scale) is a scaling of its row in the backward pass: one
pass, no recompute, and the mask may depend on all losses. A trainable head needs dW and recomputes its logits chunk by
chunk. The chunked walk is that of Cut Cross-Entropy (arXiv 2411.09009) and Liger (arXiv 2410.10989); the row scaling
is exact, not an approximation.

On CUDA the rows of a chunk go through one Triton program each; on CPU the same arithmetic is PyTorch, which is also the
oracle of the tests. LETHE_KERNELS=triton forces Triton (in its interpreter, for tests on CPU).
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of logits held at a time


class TokenStats(NamedTuple):
    """Per-token statistics, each (T,) float32 but hit and keep, which are bool."""

    nll: Tensor  # -log p(target), natural logarithm
    perplexity: Tensor  # exp(nll)
    entropy: Tensor  # of the predictive distribution, in nats
    hit: Tensor  # whether the target is the argmax
    keep: Tensor  # nll <= log(threshold): equal is kept


def linear_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden weight^T)[target] of every token: hidden (T, H), weight (V, H), targets (T,) -> (T,) float32.

    Differentiable in hidden, and in weight where it requires a gradient. Double backward is not supported. Raises
    ValueError for shapes or dtypes that do not fit or targets outside the vocabulary.
    """
    _check(hidden, weight, targets)
    return _LinearNLL.apply(hidden, weight, targets)


@torch.no_grad()
def token_stats(hidden: Tensor, weight: Tensor, targets: Tensor, threshold: float = float("inf")) -> TokenStats:
    """Every statistic of each token, without gradients: hidden (T, H), weight (V, H), targets (T,). threshold: perplexity."""
    _check(hidden, weight, targets)
    if not threshold > 0:
        raise ValueError(f"threshold is a perplexity and must be positive, got {threshold}")
    log_threshold = math.log(threshold)
    parts = [
        _rows(hidden[a:b] @ weight.T, _target_logits(hidden[a:b], weight, targets[a:b]), targets[a:b], log_threshold, False)
        for a, b in _chunks(hidden, weight)
    ]
    if not parts:
        empty = torch.zeros(0, device=hidden.device)
        return TokenStats(empty, empty, empty, empty.bool(), empty.bool())
    return TokenStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        trainable = weight.requires_grad
        wants_rows = hidden.requires_grad and not trainable
        nll = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        rows = torch.empty_like(hidden) if wants_rows else None
        for a, b in _chunks(hidden, weight):
            chunk = hidden[a:b]
            logits = chunk @ weight.T  # (C, V)
            nll[a:b] = _rows(logits, _target_logits(chunk, weight, targets[a:b]), targets[a:b], math.inf, wants_rows).nll
            if wants_rows:
                torch.mm(logits, weight, out=rows[a:b])  # logits now hold softmax - onehot
        ctx.trainable = trainable
        ctx.save_for_backward(*((hidden, weight, targets) if trainable else (rows,)))
        return nll

    @staticmethod
    def backward(ctx, grad_nll: Tensor):
        if not ctx.trainable:
            (rows,) = ctx.saved_tensors
            return None if rows is None else (rows * grad_nll[:, None]).to(rows.dtype), None, None
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for a, b in _chunks(hidden, weight):
            chunk = hidden[a:b]
            logits = chunk @ weight.T
            _rows(logits, _target_logits(chunk, weight, targets[a:b]), targets[a:b], math.inf, True)
            logits *= grad_nll[a:b, None].to(logits.dtype)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[a:b])
            grad_weight += logits.T @ chunk
        return grad_hidden, grad_weight.to(weight.dtype), None


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        raise ValueError(f"hidden (T, H), weight (V, H), targets (T,) do not fit: {shapes}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    # On CUDA a look at the values would wait for the device; there the gather below fails loudly by itself.
    if not targets.is_cuda and targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < weight.shape[0]:
        raise ValueError(f"targets must lie in [0, {weight.shape[0]}), got {int(targets.min())} to {int(targets.max())}")


def _chunks(hidden: Tensor, weight: Tensor):
    """Row ranges whose logits fit the memory budget, even in size."""
    total = hidden.shape[0]
    size = max(64, CHUNK_BYTES[hidden.device.type] // (weight.shape[0] * hidden.element_size()))
    count = -(-total // size)
    size = -(-total // count) if count else 0
    return [(a, min(a + size, total)) for a in range(0, total, size or 1)]


def _target_logits(chunk: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """h_i . W[y_i] in float32: in bf16 logits a rounding of z_y alone would move a perplexity by several per cent."""
    return (chunk.float() * weight[targets].float()).sum(-1)


def _rows(logits: Tensor, target_logit: Tensor, targets: Tensor, log_threshold: float, gradient: bool) -> TokenStats:
    """Statistics of each row; with gradient, logits (C, V) become softmax - onehot in place (and entropy is not needed)."""
    if logits.is_cuda or os.environ.get("LETHE_KERNELS") == "triton":
        from kernels import token_loss_triton  # a missing Triton is an error here, never a detour

        return TokenStats(*token_loss_triton.rows(logits, target_logit, targets, log_threshold, gradient))
    return _rows_torch(logits, target_logit, targets, log_threshold, gradient)


def _rows_torch(logits: Tensor, target_logit: Tensor, targets: Tensor, log_threshold: float, gradient: bool) -> TokenStats:
    """The twin of token_loss_triton.rows."""
    top, argmax = logits.max(-1)
    top = top.float()
    if gradient and logits.dtype == torch.float32:
        probability = logits.sub_(top[:, None]).exp_()  # in place: no second (C, V)
    else:
        probability = (logits.float() - top[:, None]).exp_()
    total = probability.sum(-1)
    log_total = top + total.log()
    # The target's logit is exact while its twin in the sum is rounded to the logits' dtype: never below zero.
    nll = (log_total - target_logit).clamp_(min=0)
    stats = (nll, nll.exp()), (argmax == targets, nll <= log_threshold)
    probability.div_(total[:, None])
    if gradient:
        probability.scatter_add_(1, targets[:, None], torch.full_like(nll, -1.0)[:, None])
        if logits.dtype != torch.float32:
            logits.copy_(probability)
        return TokenStats(*stats[0], torch.full_like(nll, math.nan), *stats[1])
    entropy = log_total - (probability * logits).sum(-1)  # log Z - sum p z
    return TokenStats(*stats[0], entropy, *stats[1])
