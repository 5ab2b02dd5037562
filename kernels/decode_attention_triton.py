"""The Triton kernels of decode_attention.

part_kernel: one program for each (sequence, key-value head, part of the slots); it walks its part in blocks with the online
softmax of arXiv 1805.02867, all heads of the group at once as the rows of a matrix product (padded to the 16 that one
needs), and leaves the normalised sum and the logarithm of its softmax's denominator. join_kernel: one program a head;
weighs the parts by these. With one part there is nothing to join. append_kernel writes a token's keys and values.
Sums are float32, whatever the cache holds.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # slots at a time
PROGRAMS_PER_CORE = 4  # parts are cut so that about as many programs run on each multiprocessor
LOG2E = 1.4426950408889634


@triton.jit
def part_kernel(
    query_ptr, keys_ptr, values_ptr, lengths_ptr, out_ptr, log_total_ptr,
    query_row, keys_row, keys_head, keys_slot, values_row, values_head, values_slot,
    slots, part_slots, parts, scale_log2,
    KV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out (B, heads, parts, D), log_total (B, heads, parts) in base 2. ROWS >= GROUP and COLUMNS >= D are the padded sizes.

    WIDEN multiplies in float32: Triton's interpreter takes the bits of bfloat16 for integers there.
    """
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, head = pair // KV, pair % KV
    length = tl.minimum(tl.load(lengths_ptr + row).to(tl.int32), slots)
    begin = part * part_slots
    end = tl.minimum(begin + part_slots, length)
    if begin < end:
        member, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        real = (member < GROUP)[:, None] & (column < D)[None, :]
        inside = (column < D)[None, :]
        query = tl.load(query_ptr + row * query_row + (head * GROUP + member)[:, None] * D + column[None, :], mask=real, other=0.0)
        if WIDEN:
            query = query.to(tl.float32)
        keys_ptr += row * keys_row + head * keys_head
        values_ptr += row * values_row + head * values_head
        top = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        summed = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(begin, end, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            held = (slot < end)[:, None]
            key = tl.load(keys_ptr + slot[:, None] * keys_slot + column[None, :], mask=held & inside, other=0.0)
            if WIDEN:
                key = key.to(tl.float32)
            z = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2  # (ROWS, BLOCK)
            z = tl.where((slot < end)[None, :], z, -float("inf"))
            new_top = tl.maximum(top, tl.max(z, axis=1))
            p = tl.exp2(z - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, axis=1)
            value = tl.load(values_ptr + slot[:, None] * values_slot + column[None, :], mask=held & inside, other=0.0)
            p = p.to(value.dtype)
            if WIDEN:
                p, value = p.to(tl.float32), value.to(tl.float32)
            summed = summed * shrink[:, None] + tl.dot(p, value, input_precision="ieee")
            top = new_top
        to = (pair * GROUP + member) * parts + part
        out = (summed / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + to[:, None] * D + column[None, :], out, mask=real)
        tl.store(log_total_ptr + to, top + tl.log2(total), mask=member < GROUP)


@triton.jit
def join_kernel(
    parts_ptr, log_total_ptr, lengths_ptr, out_ptr, slots, part_slots, parts,
    HEADS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """parts (B, heads, parts, D) and log_total (B, heads, parts), as part_kernel leaves them -> out (B, heads, D)."""
    which = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(lengths_ptr + which // HEADS).to(tl.int32), slots)
    part, column = tl.arange(0, PARTS), tl.arange(0, COLUMNS)
    written = (part < parts) & (part * part_slots < length)  # the others hold whatever was there before
    log_total = tl.load(log_total_ptr + which * parts + part, mask=written, other=-float("inf"))
    share = tl.exp2(log_total - tl.max(log_total, axis=0))
    share = share / tl.sum(share, axis=0)
    mask = written[:, None] & (column < D)[None, :]
    values = tl.load(parts_ptr + (which * parts + part)[:, None] * D + column[None, :], mask=mask, other=0.0)
    out = tl.sum(values * share[:, None], axis=0)
    tl.store(out_ptr + which * D + column, out.to(out_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def append_kernel(
    new_ptr, cache_ptr, lengths_ptr, new_row, cache_row, cache_head, cache_slot, N: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // N, pair % N
    slot = tl.load(lengths_ptr + row).to(tl.int64) - 1
    column = tl.arange(0, COLUMNS)
    new = tl.load(new_ptr + row * new_row + head * D + column, mask=column < D)
    tl.store(cache_ptr + row * cache_row + head * cache_head + slot * cache_slot + column, new, mask=column < D)


def attend(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, parts: int | None = None) -> Tensor:
    """See decode_attention. parts: into how many the S slots are cut, by default as many as fill the device."""
    (B, heads, D), (kv, slots) = query.shape, keys.shape[1:3]
    query, keys, values = _rows_of_heads(query), _last_dense(keys), _last_dense(values)
    if parts is None:
        cores = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 1
        parts = PROGRAMS_PER_CORE * cores // (B * kv)
    parts = max(1, min(parts, triton.cdiv(slots, BLOCK)))
    part_slots = triton.cdiv(triton.cdiv(slots, parts), BLOCK) * BLOCK
    parts = triton.cdiv(slots, part_slots)
    out = torch.empty(B, heads, D, dtype=query.dtype, device=query.device)
    partial = out if parts == 1 else torch.empty(B, heads, parts, D, dtype=torch.float32, device=query.device)
    log_total = torch.empty(B, heads, parts, dtype=torch.float32, device=query.device)
    group, columns = heads // kv, max(16, triton.next_power_of_2(D))
    part_kernel[(B * kv, parts)](
        query, keys, values, lengths, partial, log_total,
        query.stride(0), *keys.stride()[:3], *values.stride()[:3],
        slots, part_slots, parts, LOG2E / math.sqrt(D),
        KV=kv, GROUP=group, D=D, ROWS=max(16, triton.next_power_of_2(group)), COLUMNS=columns, BLOCK=BLOCK,
        WIDEN=not query.is_cuda, num_warps=4,
    )  # fmt: skip
    if parts > 1:
        join_kernel[(B * heads,)](
            partial, log_total, lengths, out, slots, part_slots, parts,
            HEADS=heads, D=D, PARTS=triton.next_power_of_2(parts), COLUMNS=columns, num_warps=1,
        )  # fmt: skip
    return out


def append(new: Tensor, cache: Tensor, lengths: Tensor) -> None:
    """See append_token."""
    B, N, D = new.shape
    if cache.stride(3) != 1:
        raise ValueError("the cache's last dimension must be dense")  # a copy would be written to, and lost
    new = _rows_of_heads(new)
    append_kernel[(B * N,)](
        new, cache, lengths, new.stride(0), *cache.stride()[:3], N=N, D=D, COLUMNS=triton.next_power_of_2(D), num_warps=1
    )  # fmt: skip


def _rows_of_heads(x: Tensor) -> Tensor:
    """x (B, heads, D) with the heads of a row side by side; rows may lie apart, as in a slice of fused projections."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
