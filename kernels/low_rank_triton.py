"""The Triton kernels of low_rank. A mask is hashed again wherever it is needed, in registers; dropout.py says how.

    thin          a program per block of rows and span walks the columns
    thin_grad_A   a program per block of columns, span and share of the rows; the shares are added up by PyTorch, in fixed order
    thin_grad_x_  a program per tile of grad_x, all spans

Up to four spans go in one launch, and those of one block run side by side, so that x is read from memory once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import LAST, Span, dropped_hashes, to_int32

SPANS = 4  # in a launch
SHARES = 8  # of the rows, in thin_grad_A
# Salts look random and lengths vary: compile once for all of them.
VARIES = [name + str(i) for name in ("start", "stop", "salt") for i in range(SPANS)] + ["shift", "bound"]


@triton.jit
def mix(x):
    """MurmurHash3's finaliser on uint32, as dropout.mix."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def pick(i, a, b, c, d):
    return tl.where(i == 0, a, tl.where(i == 1, b, tl.where(i == 2, c, d)))


@triton.jit
def kept(words, column, shift, bound):
    """Which elements survive (rows, columns): words (rows, 1) uint32 are those of dropout.words, column (1, columns) int32."""
    hashes = words * (mix((column + 1).to(tl.uint32)) | 1)
    return (hashes.to(tl.int32, bitcast=True) + shift) >= bound


@triton.jit
def row_words(keys_ptr, row, inside, salt):
    return mix((tl.load(keys_ptr + row, mask=inside, other=0) ^ salt).to(tl.uint32, bitcast=True)) | 1


@triton.jit(do_not_specialize=VARIES)
def thin_kernel(
    x_ptr, x_stride, A_ptr, A_stride, keys_ptr, out_ptr, out_stride, rows, columns, scale, shift, bound,
    start0, stop0, salt0, start1, stop1, salt1, start2, stop2, salt2, start3, stop3, salt3,
    DOT: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    rank = pick(span, start0, start1, start2, start3) + tl.arange(0, RANK)[None, :]
    in_span = rank < pick(span, stop0, stop1, stop2, stop3)
    words = row_words(keys_ptr, row, inside, pick(span, salt0, salt1, salt2, salt3))
    total = tl.zeros([ROWS, RANK], dtype=tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        across, down = column[None, :], column[:, None]
        x = tl.load(x_ptr + row.to(tl.int64) * x_stride + across, mask=inside & (across < columns), other=0.0)
        x = tl.where(kept(words, across, shift, bound), x, 0.0)
        A = tl.load(A_ptr + rank.to(tl.int64) * A_stride + down, mask=in_span & (down < columns), other=0.0)
        total += tl.dot(x.to(DOT), A.to(DOT), input_precision="ieee")
    tl.store(out_ptr + row.to(tl.int64) * out_stride + rank, (total * scale).to(out_ptr.dtype.element_ty), mask=inside & in_span)


@triton.jit(do_not_specialize=VARIES)
def thin_grad_A_kernel(
    grad_ptr, grad_stride, x_ptr, x_stride, keys_ptr, partial_ptr, ranks, rows, columns, share, shift, bound,
    start0, stop0, salt0, start1, stop1, salt1, start2, stop2, salt2, start3, stop3, salt3,
    DOT: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    part = tl.program_id(2)
    rank = pick(span, start0, start1, start2, start3) + tl.arange(0, RANK)[:, None]
    in_span = rank < pick(span, stop0, stop1, stop2, stop3)
    salt = pick(span, salt0, salt1, salt2, salt3)
    total = tl.zeros([RANK, COLUMNS], dtype=tl.float32)
    end = tl.minimum((part + 1) * share, rows)
    for start in range(part * share, end, ROWS):
        row = start + tl.arange(0, ROWS)
        across, down = row[None, :], row[:, None]
        x = tl.load(x_ptr + down.to(tl.int64) * x_stride + column, mask=(down < end) & (column < columns), other=0.0)
        words = row_words(keys_ptr, down, down < end, salt)
        x = tl.where(kept(words, column, shift, bound), x, 0.0)
        grad = tl.load(grad_ptr + across.to(tl.int64) * grad_stride + rank, mask=(across < end) & in_span, other=0.0)
        total += tl.dot(grad.to(DOT), x.to(DOT), input_precision="ieee")
    place = partial_ptr + (part * ranks + rank).to(tl.int64) * columns + column
    tl.store(place, total, mask=in_span & (column < columns))


@triton.jit(do_not_specialize=VARIES)
def thin_grad_x_kernel(
    out_ptr, out_stride, grad_ptr, grad_stride, A_ptr, A_stride, keys_ptr, rows, columns, scale, shift, bound,
    start0, stop0, salt0, start1, stop1, salt1, start2, stop2, salt2, start3, stop3, salt3,
    DOT: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for span in range(COUNT):
        rank = pick(span, start0, start1, start2, start3) + tl.arange(0, RANK)
        in_span = rank < pick(span, stop0, stop1, stop2, stop3)
        across, down = rank[None, :], rank[:, None]
        grad = tl.load(grad_ptr + row.to(tl.int64) * grad_stride + across, mask=(row < rows) & in_span[None, :], other=0.0)
        A = tl.load(A_ptr + down.to(tl.int64) * A_stride + column, mask=in_span[:, None] & (column < columns), other=0.0)
        product = tl.dot(grad.to(DOT), A.to(DOT), input_precision="ieee")
        words = row_words(keys_ptr, row, row < rows, pick(span, salt0, salt1, salt2, salt3))
        total += tl.where(kept(words, column, shift, bound), product, 0.0)
    place = out_ptr + row.to(tl.int64) * out_stride + column
    out = tl.load(place, mask=inside, other=0.0).to(tl.float32) + total * scale
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=inside)


def thin(x: Tensor, A: Tensor, spans: list[Span], p: float, row_keys: Tensor) -> Tensor:
    x, A = _dense(x), _dense(A)
    rows, columns = x.shape
    out = torch.empty((rows, A.shape[0]), dtype=x.dtype, device=x.device)
    block = {"ROWS": 64, "COLUMNS": 64, "DOT": _dot_type(x), "num_warps": 4, "num_stages": 3}
    for some, rank in _launches(spans) if rows else ():
        thin_kernel[(len(some), triton.cdiv(rows, block["ROWS"]))](
            x, x.stride(0), A, A.stride(0), row_keys, out, out.stride(0), rows, columns, 1 / (1 - p), *_interval(p), *_numbers(some),
            RANK=rank, **block,
        )  # fmt: skip
    return out


def thin_grad_A(grad_thin: Tensor, x: Tensor, spans: list[Span], p: float, row_keys: Tensor) -> Tensor:
    grad_thin, x = _dense(grad_thin), _dense(x)
    rows, columns = x.shape
    ranks = grad_thin.shape[1]
    block = {"ROWS": 64, "COLUMNS": 64, "DOT": _dot_type(x), "num_warps": 4, "num_stages": 3}
    share = triton.cdiv(triton.cdiv(rows, SHARES), block["ROWS"]) * block["ROWS"]
    shares = triton.cdiv(rows, share) if rows else 0
    partial = torch.empty((shares, ranks, columns), dtype=torch.float32, device=x.device)
    for some, rank in _launches(spans) if rows else ():
        thin_grad_A_kernel[(len(some), triton.cdiv(columns, block["COLUMNS"]), shares)](
            grad_thin, grad_thin.stride(0), x, x.stride(0), row_keys, partial, ranks, rows, columns, share, *_interval(p), *_numbers(some),
            RANK=rank, **block,
        )  # fmt: skip
    return partial.sum(0).mul_(1 / (1 - p)).to(x.dtype)


def thin_grad_x_(grad_x: Tensor, grad_thin: Tensor, A: Tensor, spans: list[Span], p: float, row_keys: Tensor) -> None:
    grad_thin, A = _dense(grad_thin), _dense(A)
    if grad_x.stride(1) != 1:
        raise ValueError("the last dimension of grad_x must be contiguous")
    rows, columns = grad_x.shape
    block = {"ROWS": 64, "COLUMNS": 64, "DOT": _dot_type(grad_x), "num_warps": 4, "num_stages": 1}
    for some, rank in _launches(spans) if rows else ():
        thin_grad_x_kernel[(triton.cdiv(columns, block["COLUMNS"]), triton.cdiv(rows, block["ROWS"]))](
            grad_x, grad_x.stride(0), grad_thin, grad_thin.stride(0), A, A.stride(0), row_keys, rows, columns, 1 / (1 - p),
            *_interval(p), *_numbers(some), COUNT=len(some), RANK=rank, **block,
        )  # fmt: skip


def _launches(spans: list[Span]) -> list[tuple[list[Span], int]]:
    """Spans by fours, each with the rank that its tiles are padded to: a power of two, at least the 16 that tl.dot asks for."""
    groups = [spans[i : i + SPANS] for i in range(0, len(spans), SPANS)]
    return [(group, max(16, triton.next_power_of_2(max(span.stop - span.start for span in group)))) for group in groups]


def _numbers(spans: list[Span]) -> list[int]:
    numbers = [value for span in spans for value in (span.start, span.stop, to_int32(span.salt * 0x9E3779B1))]
    return numbers + [0] * (3 * SPANS - len(numbers))


def _interval(p: float) -> tuple[int, int]:
    """shift and bound: a hash is kept where hash + shift >= bound, in wrapping int32."""
    n = dropped_hashes(p)
    return to_int32(n - 1 - LAST - 2**31), to_int32(n - 2**31)


def _dot_type(x: Tensor) -> tl.dtype:
    """What tl.dot multiplies: the inputs as they are. But the interpreter would multiply the bits of bfloat16, as integers."""
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(x.dtype, tl.float32) if x.is_cuda else tl.float32


def _dense(x: Tensor) -> Tensor:
    """x with contiguous rows."""
    return x if x.stride(-1) == 1 else x.contiguous()
