"""What each token of a forward pass may see. A "sight" is handed to the model and knows it; nothing else does.

A sight has cos and sin (T, D / 2) float32, the rotary phases of its T tokens, and attend(layer, qkv), the attention of the
rotated qkv (T, (heads + 2 kv) * D) -> (T, heads * D). Pack is the sight of whole examples one behind the other; those of
generation, which keep keys and values, are in model/cache.py.
"""

from __future__ import annotations

import inspect
from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.dispatch import to_device, use_triton
from model.config import LlamaConfig, rotary_phases


class Pack:
    """Examples one behind the other, without padding: each token sees its own example up to itself."""

    def __init__(self, lengths: list[int], config: LlamaConfig, device: torch.device | str = "cpu"):
        self.lengths = lengths
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        # Made on the host and sent once: attention in every layer reads the same offsets.
        self.positions = to_device(torch.cat([torch.arange(n) for n in lengths]), device)  # (T,)
        self.offsets = to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)  # (N + 1,)
        self.cos, self.sin = rotary_phases(config, self.positions)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, (heads + 2 kv) * D) -> query (T, heads, D), key and value (T, kv, D), as views."""
        return qkv.view(len(qkv), -1, self.head_dim).split((self.heads, self.kv_heads, self.kv_heads), dim=1)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        if attention_kind(qkv.device, qkv.dtype) == "varlen":
            return _varlen(*self.split(qkv), self.offsets, max(self.lengths)).reshape(len(qkv), -1)
        # One small causal attention an example: no padding is computed, and on CPU that is faster than any batch of them.
        outs = []
        for part in qkv.view(len(qkv), -1, self.head_dim).split(self.lengths):
            query, key, value = part.transpose(0, 1)[None].split((self.heads, self.kv_heads, self.kv_heads), dim=1)  # (1, heads, t, D)
            grouped = self.heads != self.kv_heads
            outs.append(F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)[0].transpose(0, 1))
        return torch.cat(outs).reshape(len(qkv), -1)


def attention_kind(device: torch.device, dtype: torch.dtype) -> str:
    """ "varlen": one kernel over the pack (CUDA from Ampere on, 16-bit, torch from 2.10 on); "per example": SDPA, anywhere."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or not _varlen_settings():
        return "per example"
    return "varlen" if torch.cuda.get_device_capability(device) >= (8, 0) else "per example"


def kernels_in_use(model: nn.Module) -> str:
    """One line on which code computes: there is no other path that a setting could switch to unseen."""
    kind = {"varlen": "torch's varlen_attn over the pack", "per example": "torch's SDPA, example by example"}
    rest = "Triton" if use_triton(model.head_weight) else "PyTorch"
    rest += "" if model.captures or model.device.type != "cuda" else ", without CUDA graphs"
    return f"attention by {kind[attention_kind(model.device, model.dtype)]}; loss, norm, rotary, SwiGLU, LoRA dropout, decoding by {rest}"


@cache
def _varlen_settings() -> dict | None:
    """How this torch's varlen_attn is told to be causal and grouped; None where it has none. 2.10, 2.11 and 2.13 differ."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    settings = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    return settings | ({"enable_gqa": True} if "enable_gqa" in known else {})


def _varlen(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    settings = _varlen_settings()
    if "enable_gqa" not in settings and query.shape[1] != key.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return varlen_attn(query, key, value, offsets, offsets, longest, longest, **settings)
