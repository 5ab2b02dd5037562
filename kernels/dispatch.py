"""Which of a kernel's two forms runs: Triton on CUDA, its PyTorch twin elsewhere. There is no silent detour."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """CUDA tensors always; any tensor with LETHE_KERNELS=triton (on CPU in Triton's interpreter, for tests)."""
    return tensor.is_cuda or os.environ.get("LETHE_KERNELS") == "triton"


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Sends a host tensor without waiting for what the device is doing, which needs pinned memory."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
