"""Dropout masks that are stored nowhere: whether an element survives is a hash of (row key, salt, column).

    hash = row word * column word (mod 2^32), row word = mix(row key ^ salt * 0x9E3779B1) | 1, column word = mix(column + 1) | 1
    dropped are the n = p * 2^32 values  LAST - n < hash <= LAST  (mod 2^32)

The words are hashed per row and per column, an element costs one product. That of two random odd numbers is a random odd
number, and for two rows (or columns) the pairs of products fill the square evenly unless the rows' words stand in a ratio of
small numbers, which two of 2^31 hardly ever do. (An xor of the words with one factor after it is not as good: one pair of
columns in some thousands is then correlated by a quarter.) The backward pass makes the mask again, and so does Triton, bit for bit.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

LAST = -(1 << 23)  # the highest hash, as int32, that is dropped; above it lie the NaNs, see masked_


class Span(NamedTuple):
    """Rows start to stop of a stacked A: one projection, whose masks differ from the others' by the salt."""

    start: int
    stop: int
    salt: int


def drop(x: Tensor, p: float, row_keys: Tensor | None, salt: int) -> Tensor:
    """Inverted dropout of x (M, N): element (row, column) survives if a hash of (row key, salt, column) says so.

    row_keys (M,) int32. The same keys and salt give the same mask to whatever x. p = 0 gives x itself.
    """
    if not p:
        return x
    of_rows, of_columns = words(row_keys, [salt], x.shape[1])
    hashes = of_rows[0, :, None] * of_columns
    return torch.where(kept(hashes, p), x, 0.0).mul_(1 / (1 - p))


def words(row_keys: Tensor, salts: list[int], columns: int) -> tuple[Tensor, Tensor]:
    """(salts, M) int32 of the rows (M,) under every salt, and (columns,) int32."""
    raw = [row_keys ^ to_int32(salt * 0x9E3779B1) for salt in salts]
    mixed = mix(torch.cat([*raw, torch.arange(1, columns + 1, dtype=torch.int32, device=row_keys.device)])) | 1  # all at once
    of_rows, of_columns = mixed.split([len(raw) * len(row_keys), columns])
    return of_rows.view(len(raw), -1), of_columns


def dropped_hashes(p: float) -> int:
    """How many of the 2^32 hashes are dropped."""
    return max(1, min(int(p * 2**32), 2**32 - 1))


def mix(x: Tensor) -> Tensor:
    """A full-avalanche hash of int32 values (the finaliser of MurmurHash3), wrapping as int32 does."""
    for shift, factor in ((16, -2048144789), (13, -1028477387), (16, 1)):
        x = (x ^ ((x >> shift) & (0x7FFFFFFF >> (shift - 1)))) * factor  # logical shift, since int32 is signed
    return x


def to_int32(value: int) -> int:
    """value modulo 2^32 as int32 has it."""
    return (value + 2**31) % 2**32 - 2**31


def kept(hashes: Tensor, p: float) -> Tensor:
    """Which elements survive, bool."""
    n = dropped_hashes(p)
    return hashes + to_int32(n - 1 - LAST - 2**31) >= to_int32(n - 2**31)


def masked_(hashes: Tensor, x: Tensor, p: float) -> Tensor:
    """x (m, K) with zeros where its hashes (m, K) say so, in float32 or x's wider dtype. It may lie in the memory of hashes.

    A comparison and a selection are one pass each, the selection a slow one. But as the bits of floats the dropped
    hashes are just those up to some negative number: LAST is minus infinity, what lies above it is NaN and never
    compares. So the backward of a threshold, which PyTorch has as one vectorised pass, is the whole of it.
    """
    n, wide = dropped_hashes(p), torch.promote_types(x.dtype, torch.float32)
    if n > 2**31 + LAST:  # p beyond 0.498: more than the negative numbers
        return torch.where(kept(hashes, p), x, 0.0).to(wide)
    threshold = struct.unpack("f", struct.pack("i", LAST - n + 1))[0]
    as_floats = hashes.view(torch.float32)
    if x.dtype == torch.float64:
        return torch.ops.aten.threshold_backward(x, as_floats.double(), threshold)
    return torch.ops.aten.threshold_backward.grad_input(x, as_floats, threshold, grad_input=as_floats)
