"""Greedy decoding of a batch of ragged prompts with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from model.llama import KVCache, Llama


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: frozenset[int] | set[int] | list[int],
    batch_size: int = 64,
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continues each prompt greedily; a stop id ends it and is not part of the result.

    Prompts are sorted by length into batches; a finished row leaves its batch. on_done(n) hears of n finished prompts.
    Dropout is off, also for a model in training mode, which it is again afterwards.
    Returns the new ids, in the prompts' order. Raises ValueError for an empty prompt.
    """
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt is empty: it needs at least one token (a BOS)")
    results: list[list[int]] = [[] for _ in prompts]
    if max_new_tokens < 1:
        return results
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=model.device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for index, ids in zip(batch, _decode_batch(model, [prompts[i] for i in batch], max_new_tokens, stops), strict=True):
            results[index] = ids
        if on_done:
            on_done(len(batch))
    model.train(was_training)
    return results


def _decode_batch(model: Llama, prompts: list[list[int]], max_new_tokens: int, stops: torch.Tensor) -> list[list[int]]:
    device = model.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, : len(prompt)] = torch.tensor(prompt)
    cache = KVCache(model.config, len(prompts), longest + max_new_tokens, model.dtype, device)
    # Only the last real token of each row decides the first new one.
    last = torch.arange(len(prompts)) * longest + lengths - 1
    states = model.hidden(input_ids.to(device), cache=cache, rows=last.to(device))
    cache.lengths = lengths.to(device)
    token = F.linear(states, model.head_weight).argmax(-1)  # (B,)
    emitted: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    for step in range(max_new_tokens):
        running = torch.isin(token, stops, invert=True)
        for row, value, runs in zip(alive, token.tolist(), running.tolist(), strict=True):
            if runs:
                emitted[row].append(value)
        if not running.all():
            keep = running.nonzero()[:, 0]
            alive = [alive[i] for i in keep.tolist()]
            if not alive:
                break
            cache.keep_rows(keep)
            token = token[keep]
        if step + 1 == max_new_tokens:
            break
        states = model.hidden(token[:, None], cache=cache, decode_slots=longest + step + 1)[:, 0]
        cache.lengths = cache.lengths + 1
        token = F.linear(states, model.head_weight).argmax(-1)
    return emitted
