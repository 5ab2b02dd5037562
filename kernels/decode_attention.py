"""Attention of one new token a sequence over a key-value cache of fixed size, reading what each sequence holds and no more.

    decode_attention(query (B, heads, D), keys (B, kv, S, D), values (B, kv, S, D), lengths (B,)) -> (B, heads, D)

The heads of a group share their key-value head: they are the rows of one small attention, and no key is copied. S is what
the cache has room for, lengths[b] what sequence b holds, its new token included.

On CUDA the walk over the slots is a Triton kernel of two stages (flash decoding, https://pytorch.org/blog/flash-decoding):
each program goes through one part of a sequence's slots, a second one joins the parts. Its grid depends on the shapes
alone, so a CUDA graph can hold it, and a program whose part lies behind the sequence's length ends at once. On CPU it is
PyTorch's attention with a mask, which is also the oracle of the tests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import use_triton


def decode_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, mask: Tensor | None = None) -> Tensor:
    """query (B, heads, D), keys and values (B, kv, S, D), lengths (B,) integers from 1 to S -> (B, heads, D). No gradient.

    mask: what `length_mask(lengths, S)` gives, where the caller has it already (the twin needs it in every layer).
    Raises ValueError for shapes or dtypes that do not fit.
    """
    _check(query, keys, values, lengths)
    if use_triton(query):
        from kernels import decode_attention_triton  # a missing Triton is an error here, never a detour

        return decode_attention_triton.attend(query, keys, values, lengths)
    return _attend_torch(query, keys, values, length_mask(lengths, keys.shape[2], query.dtype) if mask is None else mask)


def append_token(new: Tensor, cache: Tensor, lengths: Tensor) -> None:
    """Writes new (B, n, D), a token's keys and values of each sequence, as the last of its lengths[b] slots of cache (B, n, S, D)."""
    if use_triton(new):
        from kernels import decode_attention_triton

        return decode_attention_triton.append(new, cache, lengths)
    cache[torch.arange(len(new), device=new.device), :, lengths - 1] = new


def length_mask(lengths: Tensor, slots: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, 1, 1, slots): 0 for the slots that each sequence holds, minus infinity for the rest, to be added to its scores."""
    beyond = torch.arange(slots, device=lengths.device) >= lengths[:, None]
    return torch.zeros(beyond.shape, dtype=dtype, device=lengths.device).masked_fill_(beyond, -torch.inf)[:, None, None]


def _attend_torch(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The twin of decode_attention_triton.attend."""
    B, heads, D = query.shape
    grouped = query.reshape(B, keys.shape[1], -1, D)  # (B, kv, group, D)
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(B, heads, D)


def _check(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    fits = query.dim() == 3 and keys.dim() == 4 and keys.shape == values.shape and lengths.shape == query.shape[:1]
    fits = fits and len(keys) == len(query) and keys.shape[3] == query.shape[2] and query.shape[1] % keys.shape[1] == 0
    if not fits:
        shapes = f"{tuple(query.shape)}, {tuple(keys.shape)}, {tuple(values.shape)}, {tuple(lengths.shape)}"
        raise ValueError(f"query (B, heads, D), keys and values (B, kv, S, D), lengths (B,) do not fit: {shapes}")
    if not query.dtype == keys.dtype == values.dtype:
        raise ValueError(f"query, keys and values must have one dtype, got {query.dtype}, {keys.dtype} and {values.dtype}")
