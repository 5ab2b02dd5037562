"""Per-token loss and perplexity from hidden states, without ever holding the (T, V) logits.

With a frozen head the gradient of each token's loss with respect to its state is a row of its own,
    d nll_i / d hidden_i = (softmax(z_i) - onehot(y_i)) W,
and no sum over tokens exists (the only such sum is dW). So the unscaled rows are formed in the forward pass, and whatever
factor a token gets later (a mask, a weight, 1 / count, a loss scale) is a scaling of its row in the backward pass: one
pass, no recompute, and the mask may depend on all losses. A trainable head needs dW and makes its logits a second time.

On CPU the vocabulary is walked in tiles small enough for the cache. A running maximum and sum give the softmax, and the
rows above are, but for the onehot, attention of the states over W as keys and values (the recurrence of arXiv 2205.14135):
the two products run at the rate of the matrix unit and W is read once. On CUDA rows go in chunks of the size that fills
the device (arXiv 2410.10989), one Triton program a row between two products. LETHE_KERNELS=triton forces that way
(in Triton's interpreter, for tests on CPU).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import use_triton

CHUNK_BYTES = 512 << 20  # CUDA: of logits held at a time
TILE = 1024, 2048  # CPU: columns and rows of logits held at a time, 8 MiB in float32


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
    if not len(hidden):
        empty = torch.zeros(0, device=hidden.device)
        return TokenStats(empty, empty, empty, empty.bool(), empty.bool())
    parts = []
    for a, b in _blocks(hidden, weight):
        block, labels = hidden[a:b], targets[a:b]
        label_logit = _target_logits(block, weight, labels)
        if use_triton(hidden):
            from kernels import token_loss_triton  # a missing Triton is an error here, never a detour

            parts.append(token_loss_triton.rows(block @ weight.T, label_logit, labels, log_threshold, False))
            continue
        walk = _walk(block, weight, statistics=True)
        nll = (walk.log_total - label_logit).clamp_(min=0)
        parts.append((nll, nll.exp(), walk.entropy, walk.argmax == labels, nll <= log_threshold))
    return TokenStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        trainable = weight.requires_grad
        wants_rows = hidden.requires_grad and not trainable
        log_total = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        nll = torch.empty_like(log_total)
        rows = torch.empty_like(hidden) if wants_rows else None
        for a, b in _blocks(hidden, weight):
            block, labels = hidden[a:b], targets[a:b]
            label_logit = _target_logits(block, weight, labels)
            if use_triton(hidden):
                from kernels import token_loss_triton

                logits = block @ weight.T  # (C, V)
                nll[a:b] = token_loss_triton.rows(logits, label_logit, labels, math.inf, wants_rows)[0]
                if wants_rows:
                    torch.mm(logits, weight, out=rows[a:b])  # logits now hold softmax - onehot
            else:
                walk = _walk(block, weight, expectation=wants_rows)
                log_total[a:b] = walk.log_total
                # The target's logit is exact while its twin in the sum is rounded to the logits' dtype: never below zero.
                nll[a:b] = (walk.log_total - label_logit).clamp_(min=0)
                if wants_rows:
                    rows[a:b] = walk.expectation.sub_(weight[labels])
        ctx.trainable = trainable
        ctx.save_for_backward(*((hidden, weight, targets, log_total) if trainable else (rows,)))
        return nll

    @staticmethod
    def backward(ctx, grad_nll: Tensor):
        if not ctx.trainable:
            (rows,) = ctx.saved_tensors
            return None if rows is None else (rows * grad_nll[:, None]).to(rows.dtype), None, None
        hidden, weight, targets, log_total = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for a, b in _blocks(hidden, weight):
            block, labels, scale = hidden[a:b], targets[a:b], grad_nll[a:b, None]
            if use_triton(hidden):
                from kernels import token_loss_triton

                logits = block @ weight.T
                token_loss_triton.rows(logits, _target_logits(block, weight, labels), labels, math.inf, True)
                logits *= scale.to(logits.dtype)
                grad_hidden[a:b] = logits @ weight
                grad_weight += logits.T @ block
                continue
            for start in range(0, len(weight), TILE[0]):
                tile = weight[start : start + TILE[0]]
                probability = (block @ tile.T).float().sub_(log_total[a:b, None]).exp_().mul_(scale)
                probability = probability.to(block.dtype)
                grad_hidden[a:b] += probability @ tile
                grad_weight[start : start + TILE[0]] += probability.T @ block
            grad_hidden[a:b] -= weight[labels] * scale
            grad_weight.index_add_(0, labels, block.float() * scale, alpha=-1)
        return grad_hidden.to(hidden.dtype) if ctx.needs_input_grad[0] else None, grad_weight.to(weight.dtype), None


class _Walk(NamedTuple):
    log_total: Tensor  # (C,) log of the sum of exp(logits)
    expectation: Tensor | None  # (C, H) float32, softmax(logits) W
    entropy: Tensor | None  # (C,)
    argmax: Tensor | None  # (C,)


def _walk(block: Tensor, weight: Tensor, expectation: bool = False, statistics: bool = False) -> _Walk:
    """One walk over the vocabulary for the states block (C, H), tile by tile, under a running maximum."""
    rows = len(block)
    top, total = torch.full((rows,), -math.inf), torch.zeros(rows)
    mean = torch.zeros(block.shape) if expectation else None  # sum of exp(z - top) w
    weighted = torch.zeros(rows) if statistics else None  # sum of exp(z - top) (z - top)
    argmax = torch.zeros(rows, dtype=torch.long) if statistics else None
    logits = torch.empty(rows * min(TILE[0], len(weight)), dtype=block.dtype)  # one piece of memory for all tiles
    for start in range(0, len(weight), TILE[0]):
        tile = weight[start : start + TILE[0]]  # (t, H)
        z = torch.mm(block, tile.T, out=logits[: rows * len(tile)].view(rows, len(tile))).float()  # (C, t)
        tile_top, where = z.max(-1) if statistics else (z.amax(-1), None)
        new_top = torch.maximum(top, tile_top)
        shift = top - new_top  # 0 or below; -inf at the first tile
        if statistics:
            argmax = torch.where(tile_top > top, where + start, argmax)  # the first maximum wins, as in torch.argmax
        scale = shift.exp()
        z.sub_(new_top[:, None])
        e = z.exp() if statistics else z.exp_()
        if statistics:
            weighted = (weighted + total * shift.nan_to_num(neginf=0.0)) * scale + (e * z).sum(-1)
        total = total * scale + e.sum(-1)
        if expectation:
            mean.mul_(scale[:, None])
            mean = mean.addmm_(e, tile) if tile.dtype == torch.float32 else mean.add_(e.to(tile.dtype) @ tile)
        top = new_top
    if expectation:
        mean.div_(total[:, None])
    return _Walk(top + total.log(), mean, total.log() - weighted / total if statistics else None, argmax)


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        raise ValueError(f"hidden (T, H), weight (V, H), targets (T,) do not fit: {shapes}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    # On CUDA a look at the values would wait for the device; there the gather below fails loudly by itself.
    if not targets.is_cuda and targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < weight.shape[0]:
        raise ValueError(f"targets must lie in [0, {weight.shape[0]}), got {int(targets.min())} to {int(targets.max())}")


def _blocks(hidden: Tensor, weight: Tensor) -> list[tuple[int, int]]:
    """Row ranges that are computed at a time, even in size."""
    total, size = hidden.shape[0], TILE[1]
    if use_triton(hidden):
        size = max(64, CHUNK_BYTES // (weight.shape[0] * hidden.element_size()))
    count = -(-total // size)
    size = -(-total // count) if count else 1
    return [(a, min(a + size, total)) for a in range(0, total, size)]


def _target_logits(block: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """h_i . W[y_i] in float32: in bf16 logits a rounding of z_y alone would move a perplexity by several per cent."""
    return (block.float() * weight[targets].float()).sum(-1)
