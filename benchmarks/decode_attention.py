"""Times the attention of decoding: one new token a sequence over a cache of fixed size, of which each sequence fills a part.

    python benchmarks/decode_attention.py [--device cpu|cuda] [--dtype float32|bfloat16] [--toy]

Beside ours (on CUDA Triton, on CPU its PyTorch twin): the formula written out, with keys and values repeated for the heads of a
group and a mask over the whole cache. GB/s counts the keys and values that the sequences hold. append: a token's keys and
values into their places.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks.kernel_table import Row, main  # noqa: E402
from kernels.decode_attention import append_token, decode_attention, length_mask  # noqa: E402

SIZES = {  # sequences, heads, key-value heads, head_dim, room, shortest and longest length
    "cpu": [(64, 8, 2, 32, 192, 16, 160), (16, 32, 8, 64, 512, 64, 400)],
    "cuda": [(8, 32, 8, 64, 768, 64, 500), (64, 32, 8, 64, 768, 64, 500), (256, 32, 8, 64, 768, 64, 500), (512, 32, 8, 64, 768, 64, 500)],
    "toy": [(4, 4, 2, 16, 64, 1, 60)],
}


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    keys, values = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (keys, values))
    z = (query[:, :, None] @ keys.mT) / math.sqrt(query.shape[2])
    z = z + length_mask(lengths, keys.shape[2], z.dtype)
    wide = z if z.dtype == torch.float64 else z.float()
    return (torch.softmax(wide, -1).to(values.dtype) @ values)[:, :, 0]


def rows(size: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Row]:
    B, heads, kv, D, room, shortest, longest = size
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    qkv, cache = draw(B, heads + 2 * kv, D), draw(B, 2 * kv, room, D)
    query, new = qkv.split((heads, 2 * kv), dim=1)
    keys, values = cache.chunk(2, dim=1)
    lengths = torch.randint(shortest, longest + 1, (B,), generator=generator, device=device)
    label = f"{B} x {heads}/{kv} x {D}, {shortest} to {longest} of {room}"
    held = 2 * kv * D * int(lengths.sum()) * dtype.itemsize
    place = (torch.arange(B, device=device), slice(None), lengths - 1)

    def append() -> Tensor:
        append_token(new, cache, lengths)
        return cache

    def plain_append() -> Tensor:
        cache[place] = new
        return cache

    def attend(function, *tensors: Tensor):
        return lambda: function(*tensors, lengths)

    wide = (query.double(), keys.double(), values.double())
    return [
        Row("decode_attention", label, held, attend(decode_attention, query, keys, values),
            attend(plain_attention, query, keys, values), attend(plain_attention, *wide)),
        Row("append", label, 2 * new.numel() * dtype.itemsize, append, plain_append, lambda: plain_append().double()),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(__doc__, "decode_attention", SIZES, rows))
