"""The elementwise parts of a Llama layer, forward and backward apart: add + RMSNorm, rotary positions, SwiGLU.

Plain functions without autograd, for layers that recompute rather than save. Statistics and arithmetic are in float32
(float64 for float64), rounded where Hugging Face's Llama rounds. T tokens, H hidden, D head_dim, I inner size.

On CPU every pass goes through blocks of rows that stay in the cache, and writes in place: what these functions cost is
memory, not arithmetic. On CUDA they are Triton's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.dispatch import use_triton

BLOCK = 1 << 18  # elements in a block


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm (arXiv 1910.07467) of x + residual: x, residual (T, H), weight (H,) -> normed (T, H), summed (T, H), rstd (T,) float32.

    normed = weight * (summed * rstd), rstd = 1 / sqrt(mean(summed^2) + eps). Without a residual summed is x itself.
    """
    if use_triton(x):
        from kernels import layers_triton

        return layers_triton.add_rms_norm(x, residual, weight, eps)
    summed = x if residual is None else x + residual
    rstd = torch.linalg.vector_norm(summed, dim=-1, dtype=_wide(x)).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return rms_norm_again(summed, weight, rstd), summed, rstd


def rms_norm_again(summed: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """The normed (T, H) of add_rms_norm, bit for bit, from its summed (T, H) and rstd (T,)."""
    if use_triton(summed):
        from kernels import layers_triton

        return layers_triton.rms_norm_again(summed, weight, rstd)
    normed = torch.empty_like(summed)
    for rows in _blocks(summed):
        torch.mul(summed[rows], rstd[rows, None], out=normed[rows]).mul_(weight)
    return normed


def add_rms_norm_backward(
    grad_normed: Tensor, summed: Tensor, weight: Tensor, rstd: Tensor, grad_summed: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of add_rms_norm: of x and residual alike (T, H), and of weight (H,) float32 where weight_grad asks for it.

    grad_summed (T, H) is what reached summed by another way. The result may be written over grad_normed, and is on CPU.

        grad = rstd * (w * g - summed * rstd^2 * mean(w * g * summed)) + grad_summed
    """
    if use_triton(summed):
        from kernels import layers_triton

        return layers_triton.add_rms_norm_backward(grad_normed, summed, weight, rstd, grad_summed, weight_grad)
    wide = _wide(summed)
    weight = weight.to(wide)
    grad_weight = torch.zeros_like(weight) if weight_grad else None
    for rows in _blocks(summed):
        out, x, scale = grad_normed[rows], summed[rows].to(wide), rstd[rows]
        grad = out.to(wide)  # out itself, where it is wide already
        product = grad * x
        if weight_grad:
            grad_weight.addmv_(product.T, scale)
        pull = (product @ weight).mul_(scale**3).div_(x.shape[1])  # (rows,)
        grad.mul_(weight)
        if grad_summed is None:
            grad.mul_(scale[:, None])
        else:
            torch.addcmul(grad_summed[rows].to(wide), grad, scale[:, None], out=grad)
        grad.addcmul_(x, pull[:, None], value=-1)
        if grad.dtype != out.dtype:
            out.copy_(grad)
    return grad_normed, grad_weight


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    """Rotates, in place, the halves of every head (arXiv 2104.09864 in Hugging Face's layout); inverse turns back.

    heads (T, n, D), any view whose last dimension is contiguous; cos, sin (T, D / 2) float32.
        first, second = first * cos - second * sin, second * cos + first * sin
    """
    if use_triton(heads):
        from kernels import layers_triton

        layers_triton.rotate_(heads, cos, sin, inverse)
        return
    cos, sin, sign = cos[:, None], sin[:, None], -1 if inverse else 1
    for rows in _blocks(heads):
        c, s = cos[rows], sin[rows]
        first, second = heads[rows].chunk(2, dim=-1)
        turned = (first * c).addcmul_(second, s, value=-sign)  # in float32: cos and sin are
        second.copy_((second * c).addcmul_(first, s, value=sign))
        first.copy_(turned)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202) of gate_up (T, 2 I), the gate in the first half of the columns -> (T, I)."""
    if use_triton(gate_up):
        from kernels import layers_triton

        return layers_triton.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate)  # laid out as gate_up is
    for rows in _blocks(out):
        torch.ops.aten.silu.out(gate[rows], out=out[rows]).mul_(up[rows])
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of gate_up (T, 2 I) from that of swiglu's output (T, I). It is written to out, which may be gate_up itself.

    d silu / d gate = s + silu * (1 - s), s = sigmoid(gate)
    """
    out = torch.empty_like(gate_up) if out is None else out
    if use_triton(gate_up):
        from kernels import layers_triton

        layers_triton.swiglu_backward(grad, gate_up, out)
        return out
    (gate, up), (grad_gate, grad_up) = gate_up.chunk(2, dim=-1), out.chunk(2, dim=-1)
    for rows in _blocks(grad):
        g, from_above = gate[rows].to(_wide(grad)), grad[rows].to(_wide(grad))
        slope = torch.sigmoid(g)
        silu = g * slope
        slope.addcmul_(silu, slope, value=-1).add_(silu).mul_(from_above)
        torch.mul(slope, up[rows], out=grad_gate[rows])
        torch.mul(silu, from_above, out=grad_up[rows])
    return out


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(x: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK * x.shape[0] // max(1, x.numel()))
    return (slice(start, start + step) for start in range(0, x.shape[0], step))
