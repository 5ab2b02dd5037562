"""A frozen or trainable linear with what comes before it and what is added to it, as one autograd function.

    y = f(source) W^T + bias + sum over adapters j of  scale_j * (dropout_j(f(source)) A_j^T) B_j^T   (in j's own columns)

f is nothing, add + RMSNorm, or SwiGLU. What f gives is made again in the backward pass instead of being kept, and so are
dropout masks; kept are the residual stream, the gate and up halves, and the rank-r products: about half of what separate
modules keep. The rank-r products come first, so neither B A nor a gradient of a frozen W is ever formed (LoRA is 1.5 % of
a Llama's arithmetic and, done module by module, more than half of its memory traffic).

W may join several linears that share an input (q, k, v; gate, up): one product instead of three.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import layers
from kernels.dropout import Span
from kernels.low_rank import thin, thin_grad_A, thin_grad_x_

COLUMN_WISE = 16, 512  # rows between which W x^T is the faster product on CPU


class Addition(NamedTuple):
    """What adapters add to one linear, or to several joined ones: adapter j to the output columns columns[j]."""

    factors: tuple[Tensor, ...]  # A_0 (r_0, in), B_0 (out_0, r_0), A_1, B_1, …
    spans: list[Span]  # of each adapter: its rows of the stacked A, and the salt of its dropout masks
    columns: list[tuple[int, int]]
    scales: list[float]
    dropout: float


class Joined(NamedTuple):
    """The weights of linears that share an input: whole (sum of out, in) is the memory, parts are its rows as parameters.

    Weights that do not lie as they are multiplied (quantised, in host memory, sharded) have as whole an object whose
    dense() makes the matrix. Each product asks for it, in the backward pass again, and nothing keeps it between them.
    """

    whole: Tensor  # or what has dense() -> Tensor
    parts: tuple[Tensor, ...]  # those that may be trained; the rows of whole in their order
    bias: Tensor | None

    def dense(self) -> Tensor:
        """(sum of out, in) in the compute dtype"""
        return self.whole if isinstance(self.whole, Tensor) else self.whole.dense()


def linear(x: Tensor, weight: Joined, addition: Addition | None = None, row_keys: Tensor | None = None) -> Tensor:
    """x (T, in) -> (T, out). row_keys (T,) int32 choose the dropout masks, see kernels/dropout.py; needed where dropout is on."""
    return _apply("plain", x, None, None, 0.0, weight, addition, row_keys)


def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Joined,
    addition: Addition | None = None, row_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x, residual (T, in) -> (linear(RMSNorm(x + residual)) (T, out), x + residual). Without a residual, x is the sum."""
    return _apply("norm", x, residual, norm_weight, eps, weight, addition, row_keys)


def swiglu_linear(gate_up: Tensor, weight: Joined, addition: Addition | None = None, row_keys: Tensor | None = None) -> Tensor:
    """gate_up (T, 2 in) -> linear(silu(gate) * up) (T, out)."""
    return _apply("swiglu", gate_up, None, None, 0.0, weight, addition, row_keys)


def norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(x + residual) alone, for the end of the model."""
    if not torch.is_grad_enabled():
        return layers.add_rms_norm(x, residual, weight, eps)[0]
    return _Norm.apply(x, residual, weight, eps)


def rotate(qkv: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first `heads` heads of qkv (T, n * D), in place; cos, sin (T, D / 2) float32."""
    qkv = qkv.contiguous()  # attention wants the columns of a row together, and product may have laid them apart
    if not torch.is_grad_enabled():
        layers.rotate_(qkv.view(len(qkv), -1, 2 * cos.shape[-1])[:, :heads], cos, sin)
        return qkv
    return _Rotate.apply(qkv, heads, cos, sin)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (T, in) W^T + bias -> (T, out); on CPU a wide result may lie column by column.

    Few rows, as in decoding or in a step of short examples, cost a CPU's matmul a quarter less as W x^T. A narrow result is
    turned at once: that is cheaper than to read it across in what follows.
    """
    if x.is_cuda or x.dtype != torch.float32 or not COLUMN_WISE[0] <= len(x) <= COLUMN_WISE[1]:
        return F.linear(x, weight, bias)
    y = torch.mm(weight, x.T).T
    y = y if len(weight) > 1024 else y.contiguous()
    return y if bias is None else y.add_(bias)


def _apply(before, source, residual, norm_weight, eps, weight: Joined, addition: Addition | None, row_keys):
    factors = addition.factors if isinstance(addition, Addition) else ()
    if not torch.is_grad_enabled():  # the same arithmetic without autograd's bookkeeping, which decoding would feel
        y, source, *_ = _forward(before, eps, weight, source, residual, norm_weight, weight.bias, addition, factors, row_keys)
        return (y, source) if before == "norm" else y
    meta = (before, eps, weight, addition, row_keys)
    return _Linear.apply(meta, source, residual, norm_weight, weight.bias, *weight.parts, *factors)


def _forward(before, eps, weight, source, residual, norm_weight, bias, addition, factors, keys):
    """y, what the backward pass starts from (the sum, for a norm), rstd, and the rank-r products."""
    rstd = low = None
    if before == "norm":
        x, source, rstd = layers.add_rms_norm(source, residual, norm_weight, eps)
    else:
        x = layers.swiglu(source) if before == "swiglu" else source
    if addition and not isinstance(addition, Addition):  # kernels.members: rows of several adapters, without gradients
        return addition.product(x, weight.dense(), bias), source, rstd, low
    y = product(x, weight.dense(), bias)
    if addition:
        A = torch.cat(factors[::2])  # (sum of ranks, in)
        low = thin(x, A, addition.spans, addition.dropout, keys)  # (T, sum of ranks)
        for span, (a, b), scale, B in zip(addition.spans, addition.columns, addition.scales, factors[1::2], strict=True):
            y[:, a:b].addmm_(low[:, span.start : span.stop], B.T, alpha=scale)
    return y, source, rstd, low


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, meta, source, residual, norm_weight, bias, *tensors):
        before, eps, weight, addition, keys = meta
        factors = tensors[len(weight.parts) :]
        y, source, rstd, low = _forward(before, eps, weight, source, residual, norm_weight, bias, addition, factors, keys)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(source, rstd, norm_weight, low, keys, *factors)
        ctx.meta = before, weight, [part.shape[0] for part in weight.parts], addition
        return (y, source) if before == "norm" else y

    @staticmethod
    def backward(ctx, grad, grad_sum=None):
        source, rstd, norm_weight, low, keys, *factors = ctx.saved_tensors
        before, weight, sizes, addition = ctx.meta
        _, needs_source, needs_residual, needs_norm, needs_bias, *needs = ctx.needs_input_grad
        needs_input = needs_source or needs_residual or needs_norm
        needs_weight = any(needs[: len(sizes)])
        x = None
        if needs_weight or addition:
            if before == "norm":
                x = layers.rms_norm_again(source, norm_weight, rstd)
            else:
                x = layers.swiglu(source) if before == "swiglu" else source
        grad_parts, grad_factors = [None] * len(sizes), []
        if needs_weight:
            grad_parts = list((grad.T @ x).split(sizes))
        grad_bias = grad.sum(0) if needs_bias else None
        if addition:
            spans, grad_low = addition.spans, torch.empty_like(low)
            grad_Bs = []
            for span, (a, b), scale, B in zip(spans, addition.columns, addition.scales, factors[1::2], strict=True):
                mine, columns = slice(span.start, span.stop), grad[:, a:b]
                torch.mm(columns, B, out=grad_low[:, mine]).mul_(scale)
                grad_Bs.append((columns.T @ low[:, mine]).mul_(scale))
            grad_A = thin_grad_A(grad_low, x, spans, addition.dropout, keys)
            for span, grad_B in zip(spans, grad_Bs, strict=True):
                grad_factors += [grad_A[span.start : span.stop], grad_B]
        del x
        if not needs_input:
            return None, None, None, None, grad_bias, *grad_parts, *grad_factors
        grad_x = grad @ weight.dense()
        if addition:
            thin_grad_x_(grad_x, grad_low, torch.cat(factors[::2]), spans, addition.dropout, keys)
        grad_norm = None
        if before == "norm":
            grad_x, grad_norm = layers.add_rms_norm_backward(grad_x, source, norm_weight, rstd, grad_sum, needs_norm)
            grad_norm = None if grad_norm is None else grad_norm.to(norm_weight.dtype)
        elif before == "swiglu":
            grad_x = layers.swiglu_backward(grad_x, source)
        return None, grad_x if needs_source else None, grad_x if needs_residual else None, grad_norm, grad_bias, *grad_parts, *grad_factors


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        out, total, rstd = layers.add_rms_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        return out

    @staticmethod
    def backward(ctx, grad):
        total, weight, rstd = ctx.saved_tensors
        # The incoming gradient may be shared with another branch, and the kernel may write over it.
        grad, grad_weight = layers.add_rms_norm_backward(grad.clone(), total, weight, rstd, None, ctx.needs_input_grad[2])
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad, grad if ctx.needs_input_grad[1] else None, grad_weight, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, heads, cos, sin):
        ctx.mark_dirty(qkv)
        ctx.heads = heads
        ctx.save_for_backward(cos, sin)
        layers.rotate_(qkv.view(len(qkv), -1, 2 * cos.shape[-1])[:, :heads], cos, sin)
        return qkv

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        grad = grad.contiguous()  # attention alone has read qkv, so this gradient is ours to write over
        layers.rotate_(grad.view(len(grad), -1, 2 * cos.shape[-1])[:, : ctx.heads], cos, sin, inverse=True)
        return grad, None, None, None
