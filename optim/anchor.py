"""A penalty that pulls parameters back to where a stage began, so that what earlier tasks need is kept: L2 and EWC.

    penalty  = coefficient / 2 * sum_i F_i (theta_i - theta*_i)^2
    gradient = coefficient * F_i (theta_i - theta*_i)               which is exact, so nothing is differentiated

theta*: the parameters as the stage begins, which are those that the stage before left. F = 1 is L2, F the diagonal of the Fisher
information on the task before is EWC (arXiv 1612.00796; lora/fisher.py estimates it). Only the task before has a say, as in the
baselines of arXiv 2403.01244, whose coefficient is 0.01; the paper of EWC adds a term for each of the earlier tasks.
The smaller a task's loss, the smaller its gradients and F: a coefficient that holds on to it under L2 may do nothing at all in
EWC, which the reading of the penalty tells.

On LoRA the anchor is on the factors. They are not identified: B A = (B G)(G^-1 A) for any invertible G, and the penalty tells
these apart although the model does not. A Fisher of the product's own entries does better (arXiv 2602.17559).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optim.parallel import ALONE, Ranks


class Anchor:
    """Holds the parameters as they are now, and in EWC what each of them weighs. Memory: one float32 copy of them, two in EWC.

    fisher: F >= 0, one tensor of each parameter's shape; None: 1 throughout. Raises ValueError where it does not fit, and for a
    coefficient that is no number or below 0.
    """

    def __init__(self, coefficient: float, masters: list[nn.Parameter], fisher: list[Tensor] | None = None):
        if not 0 <= coefficient < float("inf"):
            raise ValueError(f"an anchor's coefficient is a number of at least 0, not {coefficient}")
        if fisher is not None and [f.shape for f in fisher] != [master.shape for master in masters]:
            raise ValueError("the Fisher information is that of other parameters: their numbers or shapes differ")
        self.coefficient = coefficient
        self.means = [master.detach().clone() for master in masters]
        self.fisher = fisher and [f.to(mean.device, mean.dtype) for f, mean in zip(fisher, self.means, strict=True)]

    @torch.no_grad()
    def add_(self, masters: list[nn.Parameter]) -> None:
        """Adds the penalty's gradient to theirs, which are those of the whole step: after ranks are summed, before clipping.

        Every rank adds the same, so the sum over ranks must be behind it. A coefficient of 0 leaves every bit as it is.
        """
        if not self.coefficient:
            return
        for master in masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        gradients, moved = [master.grad for master in masters], torch._foreach_sub(masters, self.means)
        if self.fisher is not None:
            torch._foreach_mul_(moved, self.fisher)
        torch._foreach_add_(gradients, moved, alpha=self.coefficient)

    @torch.no_grad()
    def penalty(self, masters: list[nn.Parameter], ranks: Ranks = ALONE) -> float:
        """The penalty, in the loss's unit, summed in float64; a reading beside the loss, which is the data's alone.

        It waits for the device. ranks: those that the parameters are cut over (model/sharding.py), each with its own rows.
        """
        total = torch.zeros((), dtype=torch.float64, device=masters[0].device)
        for i, (master, mean) in enumerate(zip(masters, self.means, strict=True)):
            squared = (master - mean).square_()
            total += (squared if self.fisher is None else squared.mul_(self.fisher[i])).sum(dtype=torch.float64)
        ranks.sum_([], total)
        return self.coefficient / 2 * float(total)
