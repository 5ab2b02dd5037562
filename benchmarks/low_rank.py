"""Times the thin products of LoRA with dropout: x A^T, the gradient of A, and the gradient of x.

    python benchmarks/low_rank.py [--device cpu|cuda] [--dtype float32|bfloat16] [--toy]

Beside ours (on CUDA Triton, on CPU its PyTorch twin): PyTorch's dropout and a product for each projection, as PEFT does, its
backward by autograd with the masks that it stored; and on CUDA the twin. GB/s counts the bytes that must move once. The error
is the largest against float64 with our masks, divided by the largest value; PyTorch's masks being its own, it has none.
Rows with p = 0 show what dropout costs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks.kernel_table import Row, main  # noqa: E402
from kernels.dropout import Span, drop  # noqa: E402
from kernels.low_rank import thin, thin_grad_A, thin_grad_x_  # noqa: E402

SIZES = {  # rows, columns, projections that share the input, rank
    "cpu": [(1250, 192, 3, 16), (2500, 256, 3, 16), (2500, 1024, 1, 16), (3000, 2048, 3, 16)],
    "cuda": [(8192, 2048, 3, 16), (8192, 2048, 2, 16), (8192, 8192, 1, 16), (32768, 2048, 3, 16)],
    "toy": [(64, 96, 3, 4)],
}


def rows(size: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Row]:
    M, K, count, rank = size
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, A, grad, grad_x = draw(M, K), draw(count * rank, K), draw(M, count * rank), draw(M, K)
    keys = torch.randint(-(2**31), 2**31 - 1, (M,), dtype=torch.int32, generator=generator, device=device)
    spans = [Span(i * rank, (i + 1) * rank, i + 1) for i in range(count)]
    work = grad_x.clone()

    def peft(x: Tensor, A: Tensor, p: float) -> list[Tensor]:
        return [F.dropout(x, p) @ A[a:b].T for a, b, _ in spans]

    def exact(x: Tensor, A: Tensor, p: float) -> Tensor:
        return torch.cat([drop(x, p, keys, salt) @ A[a:b].T for a, b, salt in spans], dim=1)

    def exact_gradients(p: float) -> tuple[Tensor, Tensor]:
        inputs = A.double().requires_grad_(), x.double().requires_grad_()
        return torch.autograd.grad(exact(inputs[1], inputs[0], p), inputs, grad.double())

    def peft_gradient(of: str, p: float):
        inputs = {"A": A.clone(), "x": x.clone()}
        inputs[of].requires_grad_()
        outputs = peft(inputs["x"], inputs["A"], p)
        return lambda: torch.autograd.grad(outputs, inputs[of], list(grad.split(rank, dim=1)), retain_graph=True)

    def add(into: Tensor, p: float) -> Tensor:
        thin_grad_x_(into, grad, A, spans, p, keys)
        return into

    item = dtype.itemsize
    found = []
    for p in (0.05, 0.0):
        name = f"M {M} K {K} R {count} x {rank} p {p}"
        small = (M + K) * count * rank * item
        found += [
            Row("thin", name, M * K * item + small, lambda p=p: thin(x, A, spans, p, keys), lambda p=p: peft(x, A, p),
                lambda p=p: exact(x.double(), A.double(), p), comparable=not p),
            Row("grad A", name, M * K * item + small, lambda p=p: thin_grad_A(grad, x, spans, p, keys), peft_gradient("A", p),
                lambda p=p: exact_gradients(p)[0], comparable=not p),
            Row("grad x", name, 2 * M * K * item + small, lambda p=p: add(work, p), peft_gradient("x", p),
                lambda p=p: exact_gradients(p)[1] + grad_x.double(), lambda p=p: add(grad_x.clone(), p), comparable=False),
        ]  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main(__doc__, "low_rank", SIZES, rows))
