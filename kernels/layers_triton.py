"""The Triton kernels of layers: one program per token (SwiGLU: per token and block of columns), arithmetic in float32.

A row of the hidden size is held whole, so the norm reads its input once. Where the norm's weight is trained, a program
walks several rows and leaves one partial sum; PyTorch adds these up, in an order that never changes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of SwiGLU in a program
ROWS = 64  # in a program that sums the gradient of the norm's weight


@triton.jit
def norm_kernel(
    x_ptr, x_stride, residual_ptr, residual_stride, weight_ptr, normed_ptr, summed_ptr, rstd_ptr, columns, eps,
    ADD: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(summed_ptr + row * columns + column, x, mask=inside)
    wide = x.to(tl.float32)
    if AGAIN:
        rstd = tl.load(rstd_ptr + row)
    else:
        rstd = tl.rsqrt(tl.sum(wide * wide, axis=0) / columns + eps)
        tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    normed = (wide * rstd).to(x.dtype).to(tl.float32) * weight  # rounded before the weight, as Hugging Face does
    tl.store(normed_ptr + row * columns + column, normed.to(x.dtype), mask=inside)


@triton.jit
def norm_backward_kernel(
    grad_ptr, grad_stride, summed_ptr, summed_stride, weight_ptr, rstd_ptr, other_ptr, other_stride, out_ptr, partial_ptr, rows, columns,
    OTHER: tl.constexpr, WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        here = inside & (row < rows)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=here, other=0.0).to(tl.float32)
        x = tl.load(summed_ptr + row * summed_stride + column, mask=here, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        x *= rstd
        if WEIGHT:
            total += grad * x
        grad *= weight
        grad = (grad - x * (tl.sum(grad * x, axis=0) / columns)) * rstd
        if OTHER:
            grad += tl.load(other_ptr + row * other_stride + column, mask=here, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * columns + column, grad.to(out_ptr.dtype.element_ty), mask=here)
    if WEIGHT:
        tl.store(partial_ptr + program * columns + column, total, mask=inside)


@triton.jit
def rotate_kernel(
    heads_ptr, token_stride, head_stride, cos_ptr, cos_stride, sin_ptr, sin_stride, heads, half,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    cos = tl.load(cos_ptr + token * cos_stride + column, mask=column < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_stride + column, mask=column < half, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    place = heads_ptr + token * token_stride + head * head_stride + column
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (first * cos - second * sin).to(heads_ptr.dtype.element_ty), mask=inside)
    tl.store(place + half, (second * cos + first * sin).to(heads_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(gate_up_ptr, stride, out_ptr, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(gate_up_ptr + row * stride + column, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + row * stride + columns + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)  # rounded before the product, as Hugging Face does
    tl.store(out_ptr + row * columns + column, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=inside)


@triton.jit
def swiglu_backward_kernel(grad_ptr, grad_stride, gate_up_ptr, stride, out_ptr, out_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + columns + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    grad_gate = (sigmoid + silu * (1.0 - sigmoid)) * grad * up
    tl.store(out_ptr + row * out_stride + column, grad_gate.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + row * out_stride + columns + column, (silu * grad).to(out_ptr.dtype.element_ty), mask=inside)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = _dense(x)
    residual = None if residual is None else _dense(residual)
    rows, columns = x.shape
    normed = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    summed = x if residual is None else torch.empty_like(normed)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    _norm(x, residual, weight, normed, summed, rstd, eps, again=False)
    return normed, summed, rstd


def rms_norm_again(summed: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    summed = _dense(summed)
    normed = torch.empty(summed.shape, dtype=summed.dtype, device=summed.device)
    _norm(summed, None, weight, normed, summed, rstd, 0.0, again=True)
    return normed


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, normed: Tensor, summed: Tensor, rstd: Tensor, eps: float, again: bool
) -> None:
    rows, columns = x.shape
    if not rows:
        return
    other = x if residual is None else residual
    block = triton.next_power_of_2(columns)
    norm_kernel[(rows,)](
        x, x.stride(0), other, other.stride(0), weight.contiguous(), normed, summed, rstd, columns, eps,
        ADD=residual is not None, AGAIN=again, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


def add_rms_norm_backward(
    grad_normed: Tensor, summed: Tensor, weight: Tensor, rstd: Tensor, grad_summed: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    grad_normed, summed = _dense(grad_normed), _dense(summed)
    other = summed if grad_summed is None else _dense(grad_summed)
    rows, columns = summed.shape
    out = torch.empty((rows, columns), dtype=summed.dtype, device=summed.device)
    at_once = ROWS if weight_grad else 1
    programs = triton.cdiv(rows, at_once)
    partial = torch.empty((programs, columns), dtype=torch.float32, device=out.device) if weight_grad else rstd
    if rows:
        block = triton.next_power_of_2(columns)
        norm_backward_kernel[(programs,)](
            grad_normed, grad_normed.stride(0), summed, summed.stride(0), weight.contiguous(), rstd, other, other.stride(0), out, partial,
            rows, columns, OTHER=grad_summed is not None, WEIGHT=weight_grad, ROWS=at_once, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return out, partial.sum(0) if weight_grad else None


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    tokens, count, size = heads.shape
    if heads.stride(2) != 1:
        raise ValueError("the last dimension of heads must be contiguous")
    if not tokens:
        return
    cos, sin = _dense(cos), _dense(sin)
    half = triton.next_power_of_2(size // 2)
    at_once = min(triton.next_power_of_2(count), max(1, 4096 // half))
    rotate_kernel[(tokens, triton.cdiv(count, at_once))](
        heads, heads.stride(0), heads.stride(1), cos, cos.stride(0), sin, sin.stride(0), count, size // 2,
        INVERSE=inverse, HEADS=at_once, HALF=half, num_warps=4,
    )  # fmt: skip


def swiglu(gate_up: Tensor) -> Tensor:
    gate_up = _dense(gate_up)
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, columns), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        block = min(COLUMNS, triton.next_power_of_2(columns))
        swiglu_kernel[(rows, triton.cdiv(columns, block))](gate_up, gate_up.stride(0), out, columns, BLOCK=block, num_warps=4)
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor, out: Tensor) -> None:
    grad, gate_up = _dense(grad), _dense(gate_up)
    rows, columns = grad.shape
    if out.stride(1) != 1:
        raise ValueError("the last dimension of out must be contiguous")
    if rows:
        block = min(COLUMNS, triton.next_power_of_2(columns))
        swiglu_backward_kernel[(rows, triton.cdiv(columns, block))](
            grad, grad.stride(0), gate_up, gate_up.stride(0), out, out.stride(0), columns, BLOCK=block, num_warps=4
        )


def _dense(x: Tensor) -> Tensor:
    """x with contiguous rows."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _warps(block: int) -> int:
    return 8 if block >= 4096 else 4
