"""Float32 masters of low-precision parameters: the optimizer steps on them, the model computes with their rounded copies.

Parameters that are float32 already (LoRA factors) are their own masters. Where a parameter is shared out over ranks (a DTensor,
see model/sharding.py) the master is this rank's part of it, in the same memory: optimizers see plain tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, as a plain tensor that shares its memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def make_masters(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    plain = [p if p.dtype == torch.float32 and own_part(p) is p else None for p in parameters]
    return [p if p is not None else nn.Parameter(own_part(q.detach()).float()) for p, q in zip(plain, parameters, strict=True)]


def collect_gradients(parameters: list[nn.Parameter], masters: list[nn.Parameter]) -> None:
    """Moves the gradients of the model's parameters to their masters, as float32."""
    for parameter, master in zip(parameters, masters, strict=True):
        if master is not parameter and parameter.grad is not None:
            master.grad, parameter.grad = own_part(parameter.grad).float(), None


@torch.no_grad()
def write_back(parameters: list[nn.Parameter], masters: list[nn.Parameter]) -> None:
    """Rounds the masters into the model's parameters, after an optimizer step."""
    for parameter, master in zip(parameters, masters, strict=True):
        if master is not parameter:
            own_part(parameter).copy_(master)
