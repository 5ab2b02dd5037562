"""Beam search over many prompts at once: the beams of a prompt are neighbouring slots of the key-value cache.

    beam_search(model, prompts, 64, tokenizer.stop_ids, num_beams=4, length_penalty=0.9, no_repeat_ngram_size=2)

The search is that of transformers 5 (`generate(num_beams=..., do_sample=False)`, `_beam_search`), prompt by prompt. In a step
every running beam is extended by every token; of the (1 + stop ids) * num_beams best of these, at least 2 * num_beams, those among the
first num_beams that end are finished hypotheses, and the best num_beams that do not end run on. A hypothesis of n new tokens, its stop
id counted, is worth the sum of its log-probabilities / n^length_penalty (arXiv 1609.08144 has the idea, not this form).

A prompt is prefilled once and its keys and values are copied to its other slots. Afterwards beams of a prompt differ only in what
they have added: where two beams come from one, the second takes the slot of a beam that died, and only the new tokens' keys and
values are copied. So the order of a prompt's slots is not that of its scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate

import torch
from torch import Tensor

from kernels.linear import product
from model.cache import Decode, KVCache, Prefill
from model.generate import POLL, PREFILL_TOKENS, REFILL, packs
from model.llama import Llama
from model.sampling import held, penalised, repeats
from study.errors import is_out_of_memory
from study.logging import say

NEVER = -1e9  # added to the score of what must not be chosen, as transformers does


@torch.inference_mode()
def beam_search(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int],
    *,
    num_beams: int,
    length_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    repetition_penalty: float = 1.0,
    early_stopping: bool | str = False,
    batch_size: int = 64,
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The best hypothesis of each prompt; a stop id ends it and is not part of the result.

    repetition_penalty and no_repeat_ngram_size: see model.sampling; here they change log-probabilities. early_stopping: True ends a
    prompt's search with num_beams finished hypotheses, "never" only when no running beam can become better than they are, False when
    none would at its present length. batch_size: sequences at a time, so batch_size / num_beams prompts, at least one.
    on_done(n) hears of n finished prompts. Returns the new ids, in the prompts' order. Raises ValueError for an empty prompt and
    for settings outside their ranges.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty: it needs at least one token (a BOS)")
    if num_beams < 2 or repetition_penalty <= 0 or no_repeat_ngram_size < 0:
        raise ValueError("num_beams is at least 2 (one is greedy), repetition_penalty above 0, no_repeat_ngram_size at least 0")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping is True, False or 'never', not {early_stopping!r}")
    stop_ids = sorted(set(stop_ids))
    if max_new_tokens < 1:
        return [[] for _ in prompts]
    outputs: list[list[int] | None] = [None] * len(prompts)
    groups, was_training = max(1, batch_size // num_beams), model.training
    model.eval()
    try:
        while None in outputs:
            try:
                search = Search(model, stop_ids, num_beams, length_penalty, no_repeat_ngram_size, repetition_penalty, early_stopping)
                search.run(prompts, max_new_tokens, groups, outputs, on_done)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or groups == 1:
                    raise
                groups //= 2
                say(f"out of memory while searching: from here on {groups} prompts at a time")
    finally:
        model.train(was_training)
    return outputs


class Search:
    """The state of a search, a row for each of the prompts that are searched at a time; N beams each, slot = row * N + beam."""

    def __init__(
        self, model: Llama, stop_ids: list[int], num_beams: int, length_penalty: float, no_repeat_ngram_size: int,
        repetition_penalty: float, early_stopping: bool | str,
    ):  # fmt: skip
        self.model, self.stop_ids, self.num_beams = model, stop_ids, num_beams
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.ngram, self.repetition_penalty = no_repeat_ngram_size, repetition_penalty

    def run(self, prompts: list[list[int]], limit: int, groups: int, outputs: list, on_done: Callable[[int], None] | None) -> None:
        """Fills rows, steps and looks, until every prompt has its output."""
        waiting = sorted((i for i, output in enumerate(outputs) if output is None), key=lambda i: -len(prompts[i]))
        width = min(groups, len(waiting))
        self._prepare(width, len(prompts[waiting[0]]), limit)
        running: dict[int, int] = {}  # row -> its prompt
        made: dict[int, int] = {}  # row -> its new tokens
        kind = self.model.device.type
        while waiting or running:
            free = [row for row in range(width) if row not in running]
            if waiting and len(free) * REFILL[kind] >= width:
                began = dict(zip(free, waiting, strict=False))
                waiting = waiting[len(began) :]
                self._fill(began, prompts)
                running |= began
                made |= dict.fromkeys(began, 1)
            if not waiting and len(running) < width:
                width = len(running)
                moved = self._shrink(list(running), width)
                running, made = ({moved.get(row, row): x for row, x in of.items()} for of in (running, made))
            for _ in range(min(POLL[kind], limit - max(made.values()))):
                self._step(width, max(len(prompts[i]) + made[row] for row, i in running.items()), max(made.values()))
                made = {row: n + 1 for row, n in made.items()}
            done = self.done[:width].tolist()
            if ended := [row for row in running if done[row]]:
                self.cache.lengths.view(-1, self.num_beams)[ended] = 1  # an idle row is computed too until it is filled, cheaply
                for row, n, ids in zip(ended, self.found_counts[ended, 0].tolist(), self.found[ended, 0].tolist(), strict=True):
                    outputs[running.pop(row)] = ids[: n - (ids[n - 1] in self.stop_ids)]
                    del made[row]
                if on_done:
                    on_done(len(ended))

    def _prepare(self, groups: int, longest: int, limit: int) -> None:
        device, N = self.model.device, self.num_beams

        def table(*shape: int, dtype=torch.long) -> Tensor:
            return torch.zeros(groups, *shape, dtype=dtype, device=device)

        room = longest + limit
        self.limit, self.stops = limit, torch.tensor(self.stop_ids, dtype=torch.long, device=device)
        self.cache = KVCache(self.model.config, groups * N, room, self.model.dtype, device)
        self.sizes, self.counts, self.done = table(), table(), table(dtype=torch.bool).fill_(True)  # of a prompt; of what is new
        self.history, self.tokens, self.scores = table(N, room), table(N), table(N, dtype=torch.float32)  # of running beams
        # Finished hypotheses, the best first; where finished is false there is none yet.
        self.found, self.found_counts, self.finished = table(N, limit), table(N), table(N, dtype=torch.bool)
        self.found_scores = table(N, dtype=torch.float32)
        self.states = (self.sizes, self.counts, self.done, self.history, self.tokens, self.scores, self.found, self.found_counts,
                       self.finished, self.found_scores)  # fmt: skip

    def _fill(self, began: dict[int, int], prompts: list[list[int]]) -> None:
        """Prompts into rows, in packs of about PREFILL_TOKENS, and the first new token of each beam."""
        device, N = self.model.device, self.num_beams
        for rows in packs({row: len(prompts[i]) for row, i in began.items()}, PREFILL_TOKENS[device.type]):
            pack = [prompts[began[row]] for row in rows]
            lengths = [len(ids) for ids in pack]
            sight = Prefill(self.cache, [row * N for row in rows], lengths)
            ids = torch.tensor([token for ids in pack for token in ids]).to(device)
            last = torch.tensor(list(accumulate(lengths))).to(device) - 1
            logits = product(self.model.hidden(ids, sight, last), self.model.head_weight)
            row, size, longest = torch.tensor(rows).to(device), torch.tensor(lengths).to(device), max(lengths)
            slots = row[:, None] * N + torch.arange(N, device=device)  # (n, N)
            self.cache.move(slots[:, :1].expand(-1, N - 1).flatten(), slots[:, 1:].flatten(), slice(longest))
            self.cache.lengths[slots] = size[:, None]
            padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in pack]).to(device)
            self.history[row, :, :longest] = padded[:, None]
            self.sizes[row], self.counts[row], self.done[row] = size, 0, False
            self.finished[row], self.found_scores[row] = False, NEVER
            self.scores[row] = torch.tensor([0.0] + [NEVER] * (N - 1), device=device)  # the beams are one still
            self._extend(row, logits.repeat_interleave(N, 0), longest, 0)

    def _step(self, width: int, longest: int, most: int) -> None:
        """One more token for each beam of the first `width` rows. longest: tokens of a beam at most; most: new ones among them."""
        slots = width * self.num_beams
        self.cache.lengths[:slots] += (~self.done[:width]).repeat_interleave(self.num_beams)
        states = self.model.hidden(self.tokens[:width].flatten(), Decode(self.cache, slots, longest))  # (width * N, H)
        self._extend(slice(width), product(states, self.model.head_weight), longest, most)

    def _extend(self, rows: Tensor | slice, logits: Tensor, longest: int, most: int) -> None:
        """The next token of each beam of these rows (g of them) from logits (g * N, V), and which hypotheses are finished by it."""
        N, V, device = self.num_beams, logits.shape[1], logits.device
        history, sizes, done = self.history[rows], self.sizes[rows], self.done[rows]  # (g, N, room), (g,), (g,)
        ends, counts = sizes + self.counts[rows], self.counts[rows] + 1  # tokens of a beam before; new tokens after (g,)
        log_probs = logits.float().log_softmax(-1)
        if self.repetition_penalty != 1 or self.ngram:
            past, lengths = history.flatten(0, 1)[:, :longest], ends.repeat_interleave(N)
            if self.repetition_penalty != 1:
                log_probs = penalised(log_probs, held(past, lengths, V), self.repetition_penalty)
            if self.ngram:
                log_probs = log_probs.masked_fill(repeats(past, lengths, self.ngram, V), -torch.inf)
        totals = (log_probs.view(-1, N, V) + self.scores[rows][:, :, None]).flatten(1)
        top, place = totals.topk(N * min(V, max(2, 1 + len(self.stop_ids))))  # (g, K), the best first
        parents, tokens = place // V, place % V
        hits = (tokens[..., None] == self.stops).any(-1) | (counts >= self.limit)[:, None]
        scores, chosen = (top + hits * NEVER).topk(N)  # (g, N): they run on
        worth = (counts.double() ** self.length_penalty).float()[:, None]

        # What ends among the first N may be better than what was found.
        ending = hits[:, :N] & ~done[:, None]
        fresh = history.gather(1, parents[:, :N, None].expand(-1, -1, history.shape[2]))
        new = (sizes[:, None] + torch.arange(self.limit, device=device))[:, None]
        last = (counts - 1).clamp(max=self.limit - 1)[:, None, None].expand(-1, N, 1)  # an idle row may be at its limit
        fresh = fresh.gather(2, new.expand(-1, N, -1)).scatter_(2, last, tokens[:, :N, None])
        merged = torch.cat([self.found_scores[rows], top[:, :N] / worth + ~ending * NEVER], 1)  # (g, 2 N)
        found_scores, best = merged.topk(N)
        finished = torch.cat([self.finished[rows], ending], 1).gather(1, best)
        self.found[rows] = torch.cat([self.found[rows], fresh], 1).gather(1, best[..., None].expand(-1, -1, self.limit))
        self.found_counts[rows] = torch.cat([self.found_counts[rows], counts[:, None].expand(-1, N)], 1).gather(1, best)
        self.found_scores[rows], self.finished[rows] = found_scores, finished

        # Can what runs on still become better?
        if self.early_stopping == "never" and self.length_penalty > 0:
            worth = self.limit**self.length_penalty
        hope = scores.amax(1, keepdim=True) / worth
        open_ = (hope > torch.where(finished, found_scores.amin(1, keepdim=True), NEVER)).any(1) & ~hits.all(1)
        if self.early_stopping is True:
            open_ &= ~finished.all(1)
        self.counts[rows] = counts - done.long()  # before `done` changes, which may be a view
        self.done[rows] = done | ~open_

        # Beams into slots.
        order = places_of(parents.gather(1, chosen)).argsort(1)
        chosen = chosen.gather(1, order)
        self.scores[rows] = scores.gather(1, order)
        self.tokens[rows], sources = tokens.gather(1, chosen), parents.gather(1, chosen)
        history, place = history.gather(1, sources[..., None].expand_as(history)), ends.clamp(max=history.shape[2] - 1)
        self.history[rows] = history.scatter_(2, place[:, None, None].expand(-1, N, 1), self.tokens[rows][..., None])
        if most:
            first = torch.arange(len(self.sizes), device=device)[rows][:, None] * N
            sources, targets = (first + sources).flatten(), (first + torch.arange(N, device=device)).flatten()
            places = (sizes[:, None] + torch.arange(most, device=device)).repeat_interleave(N, 0)  # (g * N, most)
            if device.type == "cpu":  # asking which have moved costs nothing here; elsewhere those that stay are copied to themselves
                moved = sources != targets
                sources, targets, places = sources[moved], targets[moved], places[moved]
            self.cache.move(sources, targets, places)

    def _shrink(self, running: list[int], width: int) -> dict[int, int]:
        """Moves what runs in rows from `width` on into idle ones before it, and says where from and to."""
        sources = [row for row in running if row >= width]
        moved = dict(zip(sources, (row for row in range(width) if row not in running), strict=False))
        if moved:
            source, target = torch.tensor([list(moved), list(moved.values())]).to(self.model.device)
            beams = torch.arange(self.num_beams, device=source.device)
            self.cache.move(*((rows[:, None] * self.num_beams + beams).flatten() for rows in (source, target)))
            for state in self.states:
                state[target] = state[source]
        return moved


def places_of(parents: Tensor) -> Tensor:
    """parents (g, N), each from 0 to N - 1 -> places (g, N), each row a permutation: the first child of a parent gets its
    parent's place, the others those of parents without a child."""
    N = parents.shape[1]
    same = parents[:, :, None] == parents[:, None]  # (g, N, N)
    later = same.tril(-1).any(2)  # an earlier child has the same parent
    childless = ~(parents[:, None] == torch.arange(N, device=parents.device)[:, None]).any(2)
    vacant = childless.int().argsort(dim=1, descending=True, stable=True)
    return torch.where(later, vacant.gather(1, (later.cumsum(1) - 1).clamp(min=0)), parents)
