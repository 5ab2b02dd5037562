"""Which of a kernel's two forms runs: Triton on CUDA, its PyTorch twin elsewhere. There is no silent detour."""

from __future__ import annotations

import os

from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """CUDA tensors always; any tensor with LETHE_KERNELS=triton (on CPU in Triton's interpreter, for tests)."""
    return tensor.is_cuda or os.environ.get("LETHE_KERNELS") == "triton"
