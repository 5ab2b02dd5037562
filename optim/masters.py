"""Float32 masters of low-precision parameters: the optimizer steps on them, the model computes with their rounded copies.

Parameters that are float32 already (LoRA factors) are their own masters.
"""

from __future__ import annotations

import torch
from torch import nn


def make_masters(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in parameters]


def collect_gradients(parameters: list[nn.Parameter], masters: list[nn.Parameter]) -> None:
    """Moves the gradients of the model's parameters to their masters, as float32."""
    for parameter, master in zip(parameters, masters, strict=True):
        if master is not parameter and parameter.grad is not None:
            master.grad, parameter.grad = parameter.grad.float(), None


@torch.no_grad()
def write_back(parameters: list[nn.Parameter], masters: list[nn.Parameter]) -> None:
    """Rounds the masters into the model's parameters, after an optimizer step."""
    for parameter, master in zip(parameters, masters, strict=True):
        if master is not parameter:
            parameter.copy_(master)
