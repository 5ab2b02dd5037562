"""Times the elementwise kernels of a layer, forward and backward: add + RMSNorm, rotary positions, SwiGLU.

    python benchmarks/layers.py [--device cpu|cuda] [--dtype float32|bfloat16] [--toy]

Beside ours (on CUDA Triton, on CPU its PyTorch twin): the same formula as Hugging Face's Llama writes it, eager, its backward by
autograd without its forward; and on CUDA the twin. GB/s counts the bytes that must move once, not those that do. The error is
the largest against float64, divided by the largest value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks.kernel_table import Row, main  # noqa: E402
from kernels import layers  # noqa: E402

SIZES = {  # tokens, hidden, inner, heads that are rotated, key-value heads that are not, head_dim
    "cpu": [(2500, 256, 1024, 10, 2, 32), (3000, 2048, 8192, 40, 8, 64)],
    "cuda": [(8192, 2048, 8192, 40, 8, 64), (32768, 2048, 8192, 40, 8, 64)],
    "toy": [(64, 64, 128, 6, 2, 16)],
}


def plain_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    wide = summed if summed.dtype == torch.float64 else summed.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype), summed


def plain_rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = torch.cat((cos, cos), -1)[:, None].to(heads.dtype), torch.cat((sin, sin), -1)[:, None].to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def backward_of(function: Callable, inputs: list[Tensor], grads: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """A call that runs the backward pass alone, again and again."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)


def rows(size: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Row]:
    T, H, inner, turned, rest, D = size
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, residual, grad, grad_summed, weight = draw(T, H), draw(T, H), draw(T, H), draw(T, H), draw(H)
    gate_up, grad_inner, qkv, angle = draw(T, 2 * inner), draw(T, inner), draw(T, turned + rest, D), torch.rand(T, D // 2, device=device)
    cos, sin, heads = angle.cos(), angle.sin(), qkv[:, :turned]
    _, summed, rstd = layers.add_rms_norm(x, residual, weight, 1e-5)
    scratch, back, out = qkv.clone(), grad.clone(), torch.empty_like(gate_up)

    def norm_backward() -> Tensor:  # over its own input, as in training; refilled where the result is looked at
        return layers.add_rms_norm_backward(back, summed, weight, rstd, grad_summed, False)[0]

    def fresh_norm_backward() -> Tensor:
        return layers.add_rms_norm_backward(grad.clone(), summed, weight, rstd, grad_summed, False)[0]

    def turn(into: Tensor) -> Tensor:
        layers.rotate_(into[:, :turned], cos, sin)
        return into[:, :turned]

    def norm_of(s: Tensor) -> tuple[Tensor, Tensor]:
        return plain_norm(s, torch.zeros((), dtype=s.dtype, device=device), weight.to(s.dtype))

    item = dtype.itemsize
    name = f"T {T} H {H} I {inner}"
    return [
        Row(
            "add + norm", name, 4 * T * H * item,
            lambda: layers.add_rms_norm(x, residual, weight, 1e-5)[0], lambda: plain_norm(x, residual, weight)[0],
            lambda: plain_norm(x.double(), residual.double(), weight.double())[0],
        ),
        Row(
            "norm backward", name, 4 * T * H * item, norm_backward, backward_of(norm_of, [summed], [grad, grad_summed]),
            lambda: backward_of(norm_of, [summed.double()], [grad.double(), grad_summed.double()])(), fresh_norm_backward,
        ),
        Row(
            "rotate in place", name, 2 * heads.numel() * item, lambda: turn(scratch), lambda: plain_rotate(heads, cos, sin),
            lambda: plain_rotate(heads.double(), cos.double(), sin.double()), lambda: turn(qkv.clone()),
        ),
        Row(
            "swiglu", name, 3 * T * inner * item, lambda: layers.swiglu(gate_up), lambda: plain_swiglu(gate_up),
            lambda: plain_swiglu(gate_up.double()),
        ),
        Row(
            "swiglu backward", name, 5 * T * inner * item, lambda: layers.swiglu_backward(grad_inner, gate_up, out=out),
            backward_of(plain_swiglu, [gate_up], [grad_inner]),
            lambda: backward_of(plain_swiglu, [gate_up.double()], [grad_inner.double()])(),
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(__doc__, "layers", SIZES, rows))
