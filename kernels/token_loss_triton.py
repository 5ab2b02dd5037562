"""The Triton kernel of token_loss: one program per row of logits, two walks over its columns.

The first walk keeps a running maximum, sum and sum of p * z in float32 (the online softmax of arXiv 1805.02867) and gives
nll, entropy, argmax hit and keep flag. The second, for training, writes softmax - onehot over the logits, in place.
A row is walked in blocks, never held whole, so any vocabulary fits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def row_kernel(
    logits_ptr, stride, target_logit_ptr, targets_ptr, nll_ptr, perplexity_ptr, entropy_ptr, hit_ptr, keep_ptr,
    columns, log_threshold, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    target_logit = tl.load(target_logit_ptr + row)
    top = -float("inf")
    total = 0.0
    weighted = 0.0  # sum of exp(z - top) * (z - top)
    argmax = 0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = tl.load(logits_ptr + column, mask=inside, other=-float("inf")).to(tl.float32)
        block_top = tl.max(z, axis=0)
        # The first maximum wins, as in torch.argmax: later blocks must be strictly greater.
        first = tl.min(tl.where((z == block_top) & inside, column, columns), axis=0)
        argmax = tl.where(block_top > top, first, argmax)
        new_top = tl.maximum(top, block_top)
        shift = tl.where(total > 0.0, top - new_top, 0.0)
        scale = tl.exp(shift)
        shifted = tl.where(inside, z - new_top, 0.0)
        e = tl.where(inside, tl.exp(shifted), 0.0)
        weighted = (weighted + total * shift) * scale + tl.sum(e * shifted, axis=0)
        total = total * scale + tl.sum(e, axis=0)
        top = new_top
    log_total = top + tl.log(total)
    nll = log_total - target_logit
    nll = tl.where(nll < 0.0, 0.0, nll)  # unlike tl.maximum on a GPU, this lets NaN through
    tl.store(nll_ptr + row, nll)
    tl.store(perplexity_ptr + row, tl.exp(nll))
    tl.store(entropy_ptr + row, tl.log(total) - weighted / total)
    tl.store(hit_ptr + row, (argmax == target).to(tl.int8))
    tl.store(keep_ptr + row, (nll <= log_threshold).to(tl.int8))
    if GRADIENT:
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < columns
            z = tl.load(logits_ptr + column, mask=inside, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(z - top) / total - tl.where(column == target, 1.0, 0.0)
            tl.store(logits_ptr + column, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def rows(logits: Tensor, target_logit: Tensor, targets: Tensor, log_threshold: float, gradient: bool):
    """(nll, perplexity, entropy, hit, keep), each (C,); with gradient, logits (C, V) become softmax - onehot in place."""
    count, columns = logits.shape
    nll, perplexity, entropy = torch.empty(3, count, dtype=torch.float32, device=logits.device)
    hit, keep = torch.empty(2, count, dtype=torch.int8, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(columns))
    row_kernel[(count,)](
        logits, logits.stride(0), target_logit, targets, nll, perplexity, entropy, hit, keep,
        columns, log_threshold, GRADIENT=gradient, BLOCK=block, num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip
    return nll, perplexity, entropy, hit.bool(), keep.bool()
