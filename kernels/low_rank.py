"""The thin products of LoRA (arXiv 2106.09685) on inputs whose dropout mask is stored nowhere.

The projections that read one input stack their A (R, K); each span of its rows has a salt, that is a mask, of its own, as
PEFT draws one per projection (the masks: dropout.py). M rows of x, K columns. The factor 1 / (1 - p) goes into the thin
side, so x is only ever masked.

On CPU the work is done in blocks of rows that stay in the cache. On CUDA it is Triton's, with the same masks bit for bit;
without dropout it is one product of PyTorch's on either.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.dispatch import use_triton
from kernels.dropout import Span, masked_, words

BLOCK = 1 << 19  # elements of x that are hashed and masked at a time on CPU


def thin(x: Tensor, A: Tensor, spans: list[Span], p: float, row_keys: Tensor | None) -> Tensor:
    """(M, R): drop(x, p, row_keys, span.salt) @ A[span]^T for every span. x (M, K), A (R, K), row_keys (M,) int32."""
    if not p:
        return x @ A.T
    if use_triton(x):
        from kernels import low_rank_triton

        return low_rank_triton.thin(x, A, spans, p, row_keys)
    A = A.to(_wide(x)).T / (1 - p)  # (K, R)
    out = A.new_empty(x.shape[0], A.shape[1])
    for rows, span, hashes in _hashes(x.shape, spans, row_keys):
        torch.mm(masked_(hashes, x[rows], p), A[:, span], out=out[rows, span])
    return out.to(x.dtype)


def thin_grad_A(grad_thin: Tensor, x: Tensor, spans: list[Span], p: float, row_keys: Tensor | None) -> Tensor:
    """(R, K): the gradient of A from that of thin's result, grad_thin (M, R)."""
    if not p:
        return grad_thin.T @ x
    if use_triton(x):
        from kernels import low_rank_triton

        return low_rank_triton.thin_grad_A(grad_thin, x, spans, p, row_keys)
    grad_thin = grad_thin.to(_wide(x)) / (1 - p)
    out = grad_thin.new_zeros(grad_thin.shape[1], x.shape[1])
    for rows, span, hashes in _hashes(x.shape, spans, row_keys):
        out[span].addmm_(grad_thin[rows, span].T, masked_(hashes, x[rows], p))
    return out.to(x.dtype)


def thin_grad_x_(grad_x: Tensor, grad_thin: Tensor, A: Tensor, spans: list[Span], p: float, row_keys: Tensor | None) -> None:
    """Adds to grad_x (M, K), in place, the gradient of x from that of thin's result, grad_thin (M, R)."""
    if not p:
        grad_x.addmm_(grad_thin, A)
        return
    if use_triton(grad_x):
        from kernels import low_rank_triton

        low_rank_triton.thin_grad_x_(grad_x, grad_thin, A, spans, p, row_keys)
        return
    A, grad_thin = A.to(_wide(grad_x)), grad_thin.to(_wide(grad_x)) / (1 - p)
    products = A.new_empty(_rows(grad_x.shape), A.shape[1])
    total = grad_x.to(A.dtype)  # grad_x itself, where it is wide already; else it is rounded once for all spans
    for rows, span, hashes in _hashes(grad_x.shape, spans, row_keys):
        product = torch.mm(grad_thin[rows, span], A[span], out=products[: len(hashes)])
        total[rows].add_(masked_(hashes, product, p))
    if total is not grad_x:
        grad_x.copy_(total)


def _hashes(shape: torch.Size, spans: list[Span], row_keys: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, rows of A, hashes (rows, K) int32) for every block of rows and span; the next overwrites the hashes."""
    of_rows, of_columns = words(row_keys, [span.salt for span in spans], shape[1])
    step = _rows(shape)
    memory = of_columns.new_empty(step, shape[1])
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        hashes = memory[: rows.stop - start]
        for span, of_span in zip(spans, of_rows, strict=True):
            torch.mul(of_span[rows, None], of_columns, out=hashes)
            yield rows, slice(span.start, span.stop), hashes


def _rows(shape: torch.Size) -> int:
    """Rows in a block, even in size."""
    count = max(1, round(shape[0] * shape[1] / BLOCK))
    return max(1, -(-shape[0] // count))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
