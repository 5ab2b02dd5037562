"""Several adapters on one linear at once: of K T rows member k has rows k T to (k + 1) T, and factors of its own.

    y_k = x_k W^T + bias + sum over projections j of  (x_k A_jk^T) B_jk^T   (in j's own columns; B holds the scale)

The frozen W is there once. With few rows a member, all rows meet W in one product, and the rank-r products beside it are batched over
the members. With many, W + B_k A_k is made in scratch memory of one matrix: that costs as much as r rows do, and spares every row
its rank-r products. For inference: there is no backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.linear import product

MERGE = {"cpu": 0.5, "cuda": 1.0}  # from so many times in * out / (in + out) rows a member on, W + B A is made


class Members(NamedTuple):
    """What K adapters of one shape add to a linear, or to several joined ones; kernels.linear takes it in place of an Addition."""

    A: Tensor  # (K, sum of ranks, in)
    B: tuple[Tensor, ...]  # of each projection (K, out_j, r_j), times its scale
    columns: list[tuple[int, int]]  # of each projection: its part of the joined output

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (K T, in), weight (out, in) -> (K T, out)."""
        count, (outputs, inputs) = len(self.A), weight.shape
        x = x.view(count, -1, inputs)
        if x.shape[1] * (inputs + outputs) >= MERGE[x.device.type] * inputs * outputs:
            y, own = x.new_empty(count, x.shape[1], outputs), torch.empty_like(weight)
            for k in range(count):
                own.copy_(weight)
                for A, B, (a, b) in self.projections():
                    own[a:b].addmm_(B[k], A[k])
                torch.mm(x[k], own.T, out=y[k])
            y = y.flatten(0, 1)
            return y if bias is None else y.add_(bias)
        y = product(x.flatten(0, 1), weight, bias).view(count, -1, outputs)
        low = torch.bmm(x, self.A.mT)  # (K, T, sum of ranks)
        for low_j, (_, B, (a, b)) in zip(low.split([B.shape[2] for B in self.B], 2), self.projections(), strict=True):
            y[:, :, a:b].baddbmm_(low_j, B.mT)
        return y.flatten(0, 1)

    def projections(self):
        """(A_j (K, r_j, in), B_j (K, out_j, r_j), columns) of each"""
        return zip(self.A.split([B.shape[2] for B in self.B], 1), self.B, self.columns, strict=True)
