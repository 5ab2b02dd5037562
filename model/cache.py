"""The key-value cache of generation, and what a token of a prompt or a new token sees of it.

    cache = KVCache(config, slots=64, room=512, dtype, device)    # one sequence a slot, each of at most `room` tokens
    model.hidden(packed_prompts, Prefill(cache, slots, lengths))  # whole prompts, into any slots
    model.hidden(tokens, Decode(cache, 8))                        # one token for each of the first 8 slots

Nothing here moves or grows: a CUDA graph may hold the addresses.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from kernels.decode_attention import append_token, decode_attention, length_mask
from kernels.dispatch import to_device, use_triton
from model.attention import Pack
from model.config import LlamaConfig, rotary_phases


class KVCache:
    """Keys and values of every layer, and how many tokens each slot holds.

    A layer is one block (slots, 2 kv, room, D), keys first, since a token's keys and values lie side by side where they are
    made. Whatever lies behind a slot's length is never read, so nothing is ever cleared.
    """

    def __init__(self, config: LlamaConfig, slots: int, room: int, dtype: torch.dtype, device: torch.device | str):
        self.config, self.room = config, room
        shape = (config.num_hidden_layers, slots, 2 * config.num_key_value_heads, room, config.head_dim)
        # Zeros and not whatever lay there: the masked slots that CPU attention multiplies by 0 must not be NaN.
        self.layers = torch.zeros(shape, dtype=dtype, device=device).unbind(0)
        self.lengths = torch.ones(slots, dtype=torch.long, device=device)  # (slots,) at least 1, also where nothing runs
        self.cos, self.sin = rotary_phases(config, torch.arange(room, device=device))  # (room, D / 2)

    def move(self, sources: Tensor, targets: Tensor, places: Tensor | slice | None = None) -> None:
        """Copies slots (n,) to others; no slot is both, unless it goes to itself.

        places: of the tokens alone that lie there, their number as it was: (n, m), each slot's own, or a slice for all.
        """
        if isinstance(places, Tensor):
            sources, targets = sources[:, None], targets[:, None]
        for block in self.layers:  # a layer at a time: the copy on the way is small
            if places is None:
                block[targets] = block[sources]
            else:
                block[targets, :, places] = block[sources, :, places]
        if places is None:
            self.lengths[targets] = self.lengths[sources]


class Prefill(Pack):
    """The sight of examples one behind the other whose first `kept` tokens go into slots of a cache."""

    def __init__(self, cache: KVCache, slots: list[int], lengths: list[int], kept: list[int] | None = None):
        super().__init__(lengths, cache.config, cache.lengths.device)
        self.cache, kept = cache, kept or lengths
        device = cache.lengths.device
        self.slot = to_device(torch.tensor(slots).repeat_interleave(torch.tensor(kept)), device)  # (K,)
        self.place = to_device(torch.cat([torch.arange(n) for n in kept]), device)  # (K,)
        self.chosen = None  # (K,) which of the T tokens are kept, if not all
        if kept != lengths:
            starts = [0, *accumulate(lengths)]
            self.chosen = to_device(torch.cat([torch.arange(a, a + n) for a, n in zip(starts, kept, strict=False)]), device)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        new = qkv.view(len(qkv), -1, self.head_dim)[:, self.heads :]  # (T, 2 kv, D)
        self.cache.layers[layer][self.slot, :, self.place] = new if self.chosen is None else new[self.chosen]
        return super().attend(layer, qkv)


class Decode:
    """The sight of one new token for each of the first `slots` slots: it becomes the last of the slot's `lengths` tokens.

    seen: how many places of each slot the attention walks over, at least the longest length. Triton reads what is there
    whatever it is; on CPU a smaller one is less work. Without it: the whole room.
    """

    def __init__(self, cache: KVCache, slots: int, seen: int | None = None):
        self.cache, self.slots = cache, slots
        self.heads, self.kv_heads, self.head_dim = cache.config.num_attention_heads, cache.config.num_key_value_heads, cache.config.head_dim
        self.lengths = cache.lengths[:slots]
        last = self.lengths - 1
        self.cos, self.sin = cache.cos[last], cache.sin[last]  # (slots, D / 2)
        self.seen = seen or cache.room
        self.mask = None if use_triton(last) else length_mask(self.lengths, self.seen, cache.layers[0].dtype)  # one for all layers

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        query, new = qkv.view(self.slots, -1, self.head_dim).split((self.heads, 2 * self.kv_heads), dim=1)
        held = self.cache.layers[layer][: self.slots]  # (slots, 2 kv, room, D)
        append_token(new, held, self.lengths)
        keys, values = held[:, :, : self.seen].chunk(2, dim=1)
        return decode_attention(query, keys, values, self.lengths, self.mask).view(self.slots, -1)
