"""Decoding of many ragged prompts: packed prefill, a cache of fixed size, one step for all sequences at once.

Prompts wait, longest first, for a slot of the cache. A finished sequence gives its slot to the next prompt; when none waits
the batch shrinks. Tokens, lengths and flags live on the device, and the host looks at them every POLL steps, not at every
token. On CUDA the step is a CUDA graph, one for each batch size in BUCKETS. Tokens are the likeliest ones; model.sampling
draws them instead, outside of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kernels import linear_nll
from kernels.linear import product
from model.cache import Decode, KVCache, Prefill
from model.llama import Llama
from study.errors import is_out_of_memory
from study.logging import say

BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512)  # batch sizes that are captured as CUDA graphs
POLL = {"cpu": 1, "cuda": 16}  # steps between two looks of the host; on CPU a look costs nothing
PREFILL_TOKENS = {"cpu": 2048, "cuda": 16384}  # of prompts in one pass
REFILL = {"cpu": 8, "cuda": 64}  # prompts wait until one slot in so many is free: a pass over one alone is dear
ROOM_STEP = 64  # sizes of the cache are multiples, so that it is seldom made anew


def generate(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int],
    batch_size: int = 64,
    on_done: Callable[[int], None] | None = None,
    decoder: Decoder | None = None,
) -> list[list[int]]:
    """Continues each prompt greedily; a stop id ends it and is not part of the result.

    batch_size: sequences at a time. on_done(n) hears of n finished prompts. decoder: keeps its cache and graphs from call
    to call. Dropout is off, also for a model in training mode, which it is again afterwards.
    Returns the new ids, in the prompts' order. Raises ValueError for an empty prompt.
    """
    return (decoder or Decoder(model, batch_size)).run(prompts, max_new_tokens, stop_ids, on_done=on_done)[0]


def generate_and_score(
    model: Llama,
    prompts: list[list[int]],
    answers: list[list[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int],
    batch_size: int = 64,
    on_done: Callable[[int], None] | None = None,
    decoder: Decoder | None = None,
) -> tuple[list[list[int]], list[float]]:
    """generate, and the mean nll in nats of each prompt's reference answer, from the same pass over the prompt."""
    return (decoder or Decoder(model, batch_size)).run(prompts, max_new_tokens, stop_ids, answers, on_done)


class Decoder:
    """A model with a cache of `slots` sequences; what it allocates and captures stays until it is dropped."""

    def __init__(self, model: Llama, slots: int = 64):
        if slots < 1:
            raise ValueError(f"at least one sequence at a time, not {slots}")
        self.model, self.slots = model, slots
        self.cache: KVCache | None = None
        self.captures = model.captures
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by how many slots they compute
        self.captured: tuple = ()  # the adapter and the weights' addresses that the graphs know
        self.draw: Any = None  # a model.sampling.Draw, which then chooses the tokens
        self.logits: dict[int, Tensor] = {}  # what it chooses from: those of the last step, by how many slots were computed

    @torch.inference_mode()
    def run(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        stop_ids: Iterable[int],
        answers: list[list[int]] | None = None,
        on_done: Callable[[int], None] | None = None,
        draw: Any = None,
    ) -> tuple[list[list[int]], list[float]]:
        """(the new ids of each prompt, the mean nll of each answer), see generate, generate_and_score and model.sampling."""
        if not all(prompts):
            raise ValueError("a prompt is empty: it needs at least one token (a BOS)")
        if answers is not None and (len(answers) != len(prompts) or not all(answers)):
            raise ValueError("each prompt needs an answer of at least one token")
        limit, stop_ids = max(0, max_new_tokens), sorted(set(stop_ids))
        outputs: list[list[int] | None] = [None] * len(prompts)
        losses = [0.0] * len(prompts)
        if (draw is None) != (self.draw is None):
            self.graphs, self.logits = {}, {}  # they end with another choice
        self.draw = draw
        was_training = self.model.training
        self.model.eval()
        try:
            while None in outputs:
                try:
                    self._run(prompts, answers, limit, stop_ids, outputs, losses, on_done)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or self.slots == 1:
                        raise
                    self.slots //= 2
                    self.cache, self.graphs, self.logits = None, {}, {}
                    say(f"out of memory while generating: from here on {self.slots} sequences at a time")
        finally:
            self.model.train(was_training)
        return outputs, losses

    def _run(self, prompts, answers, limit, stop_ids, outputs, losses, on_done) -> None:
        """Fills slots, steps and looks, until every prompt has its output."""
        waiting = sorted((i for i, output in enumerate(outputs) if output is None), key=lambda i: -len(prompts[i]))
        width = self._width(len(waiting))
        self._prepare(len(prompts[waiting[0]]), limit, stop_ids, width)
        running: dict[int, int] = {}  # slot -> its prompt
        ahead: dict[int, int] = {}  # slot -> its length less `step`
        step, poll, refill = 0, POLL[self.model.device.type], REFILL[self.model.device.type]
        while waiting or running:
            free = [slot for slot in range(width) if slot not in running]
            if waiting and len(free) * refill >= width:
                began = dict(zip(free, waiting, strict=False))
                waiting = waiting[len(began) :]
                self._fill(began, prompts, answers, losses)
                running |= began
                ahead |= {slot: len(prompts[i]) - step for slot, i in began.items()}
            if not waiting and (narrower := self._width(len(running))) < width:
                width = narrower
                moved = self._shrink(list(running), width)
                running, ahead = ({moved.get(slot, slot): x for slot, x in of.items()} for of in (running, ahead))
            # But for stop ids the host knows where each sequence is: none runs on beyond its limit until the next look.
            made = max(step + ahead[slot] + 1 - len(prompts[i]) for slot, i in running.items())
            for _ in range(min(poll, limit - made)):
                step += 1
                self._step(width, step + max(ahead.values()))
            runs, cuts = self.runs[:width].tolist(), self._cuts(list(running), poll)
            ended = [slot for slot in running if not runs[slot] or slot in cuts]
            if ended:
                if cuts:
                    self.runs[list(cuts)] = False
                self.cache.lengths[ended] = 1  # an idle slot is computed too until it is filled, as cheaply as can be
                for slot, count, ids in zip(ended, self.counts[ended].tolist(), self.emitted[ended].tolist(), strict=True):
                    outputs[running.pop(slot)] = ids[: cuts.get(slot, count)]
                    del ahead[slot]
                if on_done:
                    on_done(len(ended))

    def _width(self, count: int) -> int:
        """How many slots a step computes for `count` sequences: as many, or the next size that is captured."""
        if not self.captures:
            return min(count, self.slots)
        return min([size for size in BUCKETS if count <= size < self.slots], default=self.slots)

    def _prepare(self, longest: int, limit: int, stop_ids: list[int], width: int) -> None:
        """Makes or reuses the cache, the state on the device, and the graphs."""
        device = self.model.device
        if self.cache is None or self.cache.room < longest + limit or self.emitted.shape[1] <= limit:
            self.cache, self.graphs, self.logits = None, {}, {}  # freed before the next is made
            room, columns = (-(-size // ROOM_STEP) * ROOM_STEP for size in (longest + limit, limit + 1))
            self.cache = KVCache(self.model.config, self.slots, room, self.model.dtype, device)
            self.emitted = torch.zeros(self.slots, columns, dtype=torch.long, device=device)
            self.counts, self.tokens = torch.zeros(2, self.slots, dtype=torch.long, device=device)  # emitted so far, the last one
            self.runs = torch.zeros(self.slots, dtype=torch.bool, device=device)
            self.limit = torch.zeros((), dtype=torch.long, device=device)
            self.stop_ids = None
        if self.stop_ids != stop_ids:
            self.stop_ids, self.stops, self.graphs = stop_ids, torch.tensor(stop_ids, dtype=torch.long, device=device), {}
        self.runs.fill_(False)
        self.cache.lengths.fill_(1)
        self.limit.fill_(limit)
        if self.draw:
            self.draw.prepare(self.slots, limit, self.cache.room, self.model.config.vocab_size, device)
        if self.captures:
            self._capture(width)

    def _fill(self, began: dict[int, int], prompts, answers, losses) -> None:
        """Prompts (and their answers) into slots, in packs of about PREFILL_TOKENS, and the first new token of each."""
        device, head = self.model.device, self.model.head_weight
        whole = {slot: prompts[i] + (answers[i] if answers else []) for slot, i in began.items()}
        for slots in packs({slot: len(ids) for slot, ids in whole.items()}, PREFILL_TOKENS[device.type]):
            lengths, kept = [len(whole[slot]) for slot in slots], [len(prompts[began[slot]]) for slot in slots]
            ids = torch.tensor([token for slot in slots for token in whole[slot]])
            sight = Prefill(self.cache, slots, lengths, kept)
            starts = [0, *accumulate(lengths)]
            # A token's state predicts the next one: the prompt's last the first token of the answer, ours and the reference.
            sizes = [length - size for length, size in zip(lengths, kept, strict=True)] if answers else [1] * len(slots)
            rows = torch.cat([torch.arange(a + k - 1, a + k - 1 + n) for a, k, n in zip(starts, kept, sizes, strict=False)])
            states = self.model.hidden(ids.to(device), sight, rows.to(device))
            if answers:
                nll = linear_nll(states, head, ids[rows + 1].to(device))
                means = torch.stack([part.mean() for part in nll.double().split(sizes)]).tolist()
                for slot, mean in zip(slots, means, strict=True):
                    losses[began[slot]] = mean
                states = states[torch.tensor([0, *accumulate(sizes)][:-1]).to(device)]
            logits, slot = product(states, head), torch.tensor(slots).to(device)
            if self.draw:
                self.draw.begin(slots, [began[slot] for slot in slots], prompts)
            token = self.draw(logits, slot, torch.zeros_like(slot)) if self.draw else _likeliest(logits)
            goes = ~self._stops(token) & (self.limit > 0)
            self.cache.lengths[slot] = torch.tensor(kept).to(device)
            self.tokens[slot], self.emitted[slot, 0] = token, token
            self.counts[slot], self.runs[slot] = goes.long(), goes & (self.limit > 1)

    def _step(self, width: int, longest: int) -> None:
        """longest: what the running slots hold at most, with the token that this step appends."""
        if self.captures:
            self.graphs[width].replay()
        else:
            self._advance(width, longest)
        if self.draw:
            self._note(width, self.draw(self.logits[width], torch.arange(width, device=self.counts.device), self.counts[:width]))

    def _advance(self, width: int, seen: int | None = None) -> None:
        """One more token for each of the first `width` slots; one that has ended writes where nothing is read."""
        self.cache.lengths[:width] += self.runs[:width]
        states = self.model.hidden(self.tokens[:width], Decode(self.cache, width, seen))  # (width, H)
        logits = product(states, self.model.head_weight)
        if self.draw:
            self.logits[width] = logits  # where a graph is captured, the memory that it writes to
        else:
            self._note(width, _likeliest(logits))

    def _note(self, width: int, chosen: Tensor) -> None:
        """chosen (width,): the tokens of this step."""
        tokens, counts, runs = self.tokens[:width], self.counts[:width], self.runs[:width]
        tokens.copy_(chosen)
        self.emitted[:width].scatter_(1, counts[:, None], tokens[:, None])
        runs &= ~self._stops(tokens)
        counts += runs
        runs &= counts < self.limit

    def _stops(self, tokens: Tensor) -> Tensor:
        return (tokens[:, None] == self.stops).any(1)

    def _cuts(self, slots: list[int], poll: int) -> dict[int, int]:
        """{slot: tokens before it} of the sequences into which a stop text has come since the last look."""
        if not (self.draw and self.draw.stop_texts and slots):
            return {}
        counts = self.counts[slots]
        place = counts[:, None] + torch.arange(-(poll + self.draw.reach), 0, device=counts.device)  # (n, W)
        tails = self.emitted[slots].gather(1, place.clamp(min=0)).tolist()
        found = {}
        for slot, count, tail in zip(slots, counts.tolist(), tails, strict=True):
            if count and self.draw.stops_in(tail[-count:]):
                found[slot] = self.draw.cut(self.emitted[slot, :count].tolist())
        return {slot: at for slot, at in found.items() if at is not None}

    def _shrink(self, running: list[int], width: int) -> dict[int, int]:
        """Moves what runs in slots from `width` on into idle ones before it, and says where from and to."""
        sources = [slot for slot in running if slot >= width]
        moved = dict(zip(sources, (slot for slot in range(width) if slot not in running), strict=False))
        if moved:
            source, target = torch.tensor([list(moved), list(moved.values())]).to(self.model.device)
            self.cache.move(source, target)
            for state in (self.tokens, self.counts, self.runs, self.emitted, *(self.draw.states if self.draw else ())):
                state[target] = state[source]
        return moved

    def _capture(self, widest: int) -> None:
        """Captures the step for every size up to `widest` that has no graph yet. Nothing runs: what it writes is never read."""
        if self.captured != self._weights():
            self.graphs = {}  # they would read the old ones
        for width in sorted({*(size for size in BUCKETS if size < widest), widest} - set(self.graphs), reverse=True):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # kernels are compiled and libraries woken outside of the capture
                for _ in range(2):
                    self._advance(width)
            torch.cuda.current_stream().wait_stream(side)
            graph, first = torch.cuda.CUDAGraph(), next(iter(self.graphs.values()), None)
            with torch.cuda.graph(graph, pool=first.pool() if first else None):
                self._advance(width)
            self.graphs[width] = graph
        self.captured = self._weights()  # only now: the first pass may have joined weights into one block

    def _weights(self) -> tuple:
        # The adapter itself and not only its addresses, which another one may get after it.
        return self.model.adapter, [parameter.data_ptr() for parameter in self.model.parameters()]


def packs(sizes: dict[int, int], budget: int) -> list[list[int]]:
    """Keys in their order, cut so that the sizes of a pack stay within the budget where they can."""
    packs, total = [], budget
    for key, size in sizes.items():
        if total + size > budget:
            packs.append([])
            total = 0
        packs[-1].append(key)
        total += size
    return packs


def _likeliest(logits: Tensor) -> Tensor:
    """argmax of each row of logits (B, V) -> (B,), the first of equals."""
    if logits.is_cuda or logits.shape[1] % 64:
        return logits.argmax(-1)
    # On CPU amax is vectorised and argmax is not: the block that holds the largest, then the place in it, in a quarter of the
    # time. Along columns, as the product of few rows lies.
    blocks = logits.T.contiguous().view(-1, 64, len(logits))  # (V / 64, 64, B)
    block = blocks.amax(1).argmax(0)  # (B,)
    place = blocks[block, :, torch.arange(len(logits))].argmax(-1)
    return block * 64 + place
