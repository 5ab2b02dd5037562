"""The Kullback-Leibler divergence between two models' next-token distributions, from their hidden states."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK_BYTES = 256 << 20  # of float32 logits held at a time, both models' together
TILE = 8192  # columns of the vocabulary multiplied at a time


@torch.no_grad()
def linear_kl(hidden: Tensor, reference_hidden: Tensor, weight: Tensor, reference_weight: Tensor | None = None) -> Tensor:
    """KL(reference || current) of every row, in nats: hidden, reference_hidden (T, H), weight (V, H) -> (T,) float32.

        KL_i = sum over v of p0 (log p0 - log p),    p = softmax(hidden_i weight^T), p0 the reference's

    reference_weight: the reference's head, where it is another one (full fine-tuning).  Products and statistics are float32
    whatever the dtype of the states, since in 16-bit logits the rounding alone would be a divergence.  Rows go in chunks and
    the vocabulary in tiles under a running maximum, so (T, V) is never held.  Raises ValueError for shapes that do not fit.
    """
    other = weight if reference_weight is None else reference_weight
    if hidden.dim() != 2 or hidden.shape != reference_hidden.shape or weight.shape != other.shape or hidden.shape[1:] != weight.shape[1:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, reference_hidden, weight, other))
        raise ValueError(f"hidden and reference_hidden (T, H), weight and reference_weight (V, H) do not fit: {shapes}")
    tile = min(TILE, len(weight))
    rows = max(16, CHUNK_BYTES // (2 * 4 * tile))
    parts = [_rows(hidden[a : a + rows].float(), reference_hidden[a : a + rows].float(), weight, other, tile)
             for a in range(0, len(hidden), rows)]  # fmt: skip
    return torch.cat(parts) if parts else torch.zeros(0, device=hidden.device)


def _rows(states: Tensor, reference: Tensor, weight: Tensor, other: Tensor, tile: int) -> Tensor:
    """KL (C,) of the rows of one chunk, float32 (C, H) each. What is one number a row is float64: large parts of it cancel."""
    log_total, log_total0 = (torch.full((len(states),), -math.inf, dtype=torch.float64, device=states.device) for _ in range(2))
    cross = torch.zeros_like(log_total)  # sum of p0 (z0 - z) over the vocabulary so far, p0 among it
    for start in range(0, len(weight), tile):
        z = states @ weight[start : start + tile].float().T  # (C, t)
        z0 = reference @ other[start : start + tile].float().T
        gap = z0 - z
        log_total = torch.logaddexp(log_total, _take_exp(z)[0])
        part, top = _take_exp(z0)
        new = torch.logaddexp(log_total0, part)
        cross = cross * (log_total0 - new).exp() + (z0 * gap).sum(-1).double() * (top - new).exp()
        log_total0 = new
    return (cross + log_total - log_total0).clamp_(min=0).float()  # the sum is not negative, its rounding may be


def _take_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(log of the sum of exp, largest logit) of each row, float64; the logits become exp(logit - largest)."""
    top = logits.amax(-1)
    total = logits.sub_(top[:, None]).exp_().sum(-1).double()
    return total.log() + top.double(), top.double()
