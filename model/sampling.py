"""Sampling in place of the likeliest token: temperature, top-k, top-p, penalties of repetition, a seed for each sequence, stop texts.

    sample(model, prompts, 128, tokenizer.stop_ids, temperature=0.9, top_p=0.6, seeds=range(len(prompts)),
           stop_texts=["Input:"], tokenizer=tokenizer)

Each sequence has its own row of uniform numbers, made from its seed alone, and its i-th token is the inverse of its distribution
function at the i-th of them. So what a sequence says does not depend on the batch, the slot or the order, but for
rounding: a batch of another size may round a probability's last bits otherwise, and a number that falls between the two takes
the neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from model.generate import Decoder
from model.llama import Llama
from model.tokenizer import Tokenizer


def sample(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    seeds: Sequence[int],
    stop_texts: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    batch_size: int = 64,
    on_done: Callable[[int], None] | None = None,
    decoder: Decoder | None = None,
) -> list[list[int]]:
    """Continues each prompt by tokens drawn with its seed; a stop id ends it and is not part of the result, nor is a stop text.

    In this order, as transformers has them: repetition_penalty (arXiv 1909.05858) divides the positive logits of tokens that the
    prompt or the continuation holds, and multiplies the negative ones; no_repeat_ngram_size n > 0 leaves out tokens that would
    repeat n tokens in a row of the prompt or the continuation; temperature divides logits, 0 takes the likeliest; top_k > 0 (arXiv
    1805.04833) keeps so many most likely tokens, and their equals; top_p (arXiv 1904.09751) keeps the fewest most likely tokens
    whose probabilities reach it. A sequence that comes to hold one of stop_texts (needs the tokenizer) is cut before it; a token in
    which it begins stays whole. Other arguments: see generate. Returns the new ids, in the prompts' order. Raises ValueError for
    settings outside their ranges.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, and {len(seeds)} seeds")
    if temperature < 0 or not 0 < top_p <= 1 or repetition_penalty <= 0:
        raise ValueError("temperature is at least 0, top_p in (0, 1], repetition_penalty above 0")
    if top_k < 0 or no_repeat_ngram_size < 0:
        raise ValueError("top_k and no_repeat_ngram_size are at least 0, which is: not at all")
    if stop_texts and (tokenizer is None or not all(stop_texts)):
        raise ValueError("stop texts need a tokenizer, and are not empty")
    draw = Draw(list(seeds), temperature, top_p, repetition_penalty, tuple(stop_texts), tokenizer, top_k, no_repeat_ngram_size)
    return (decoder or Decoder(model, batch_size)).run(prompts, max_new_tokens, stop_ids, on_done=on_done, draw=draw)[0]


class Draw:
    """Chooses the tokens of a Decoder's run, and finds stop texts in them. Its state lies beside the decoder's, a row a slot."""

    def __init__(
        self, seeds: list[int], temperature: float, top_p: float, repetition_penalty: float,
        stop_texts: tuple[str, ...] = (), tokenizer: Tokenizer | None = None, top_k: int = 0, no_repeat_ngram_size: int = 0,
    ):  # fmt: skip
        self.seeds, self.temperature, self.top_p, self.repetition_penalty = seeds, temperature, top_p, repetition_penalty
        self.top_k, self.ngram = top_k, no_repeat_ngram_size
        self.stop_texts, self.tokenizer = stop_texts, tokenizer
        self.reach = max((len(text.encode()) for text in stop_texts), default=0)  # tokens that a stop text has at most
        self.states: tuple[Tensor, ...] = ()

    def prepare(self, slots: int, limit: int, room: int, vocabulary: int, device: torch.device) -> None:
        """room: tokens of a sequence, its prompt included, at most."""
        self.uniforms = torch.zeros(slots, max(1, limit), dtype=torch.float64, device=device)
        self.states = (self.uniforms,)
        if self.repetition_penalty != 1:
            self.seen = torch.zeros(slots, vocabulary, dtype=torch.bool, device=device)  # tokens that a sequence holds
            self.states += (self.seen,)
        if self.ngram:
            self.history = torch.zeros(slots, room, dtype=torch.long, device=device)
            self.sizes = torch.zeros(slots, dtype=torch.long, device=device)  # of the prompts
            self.states += (self.history, self.sizes)

    def begin(self, slots: list[int], items: list[int], prompts: list[list[int]]) -> None:
        """Sequences items[i] go into slots[i]."""
        rows = [torch.rand(self.uniforms.shape[1], dtype=torch.float64, generator=_generator(self.seeds[item])) for item in items]
        self.uniforms[slots] = torch.stack(rows).to(self.uniforms.device)
        if self.repetition_penalty != 1:
            seen = torch.zeros(len(slots), self.seen.shape[1], dtype=torch.bool)
            for row, item in zip(seen, items, strict=True):
                row[prompts[item]] = True
            self.seen[slots] = seen.to(self.seen.device)
        if self.ngram:
            history = torch.zeros(len(slots), self.history.shape[1], dtype=torch.long)
            for row, item in zip(history, items, strict=True):
                row[: len(prompts[item])] = torch.tensor(prompts[item])
            self.history[slots] = history.to(self.history.device)
            self.sizes[slots] = torch.tensor([len(prompts[item]) for item in items]).to(self.sizes.device)

    def __call__(self, logits: Tensor, slots: Tensor, counts: Tensor) -> Tensor:
        """The next tokens (n,) from logits (n, V), of the sequences in slots (n,) that have counts (n,) new tokens so far."""
        scores = logits.float()
        if self.repetition_penalty != 1:
            scores = penalised(scores, self.seen[slots], self.repetition_penalty)
        if self.ngram:
            lengths = self.sizes[slots] + counts
            scores = scores.masked_fill(repeats(self.history[slots], lengths, self.ngram, scores.shape[1]), -torch.inf)
        if self.temperature == 0:
            tokens = scores.argmax(-1)
        else:
            place = counts.clamp(max=self.uniforms.shape[1] - 1)  # an idle slot is computed too, and may be at its limit
            tokens = draw_token(*nucleus(likeliest(scores / self.temperature, self.top_k), self.top_p), self.uniforms[slots, place])
        if self.repetition_penalty != 1:
            self.seen[slots, tokens] = True
        if self.ngram:
            self.history[slots, lengths.clamp(max=self.history.shape[1] - 1)] = tokens
        return tokens

    def stops_in(self, tail: list[int]) -> bool:
        """Whether these last tokens hold a stop text."""
        text = self.tokenizer.decode(tail)
        return any(stop in text for stop in self.stop_texts)

    def cut(self, ids: list[int]) -> int | None:
        """How many of the tokens lie before the stop text that is complete first, None where there is none."""
        text = self.tokenizer.decode(ids)
        found = [(at + len(stop), at) for stop in self.stop_texts if (at := text.find(stop)) >= 0]
        if not found:
            return None
        before, kept = text[: min(found)[1]], len(ids)
        while kept and self.tokenizer.decode(ids[: kept - 1]).startswith(before):
            kept -= 1
        return kept


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)  # on the host, whatever the device: the same numbers everywhere


def penalised(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """scores (n, V) with those of the tokens in seen (n, V) made less likely."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def held(history: Tensor, lengths: Tensor, vocabulary: int) -> Tensor:
    """(n, vocabulary) bool: the tokens among the first lengths (n,) of history (n, T)."""
    among = torch.arange(history.shape[1], device=history.device) < lengths[:, None]
    return _marked(history, among, vocabulary)


def repeats(history: Tensor, lengths: Tensor, size: int, vocabulary: int) -> Tensor:
    """(n, vocabulary) bool: the tokens that would make the last `size` tokens a repetition of some before.

    Of history (n, T) the first lengths (n,) count: the token of each window of `size` whose other tokens are the last ones.
    """
    if history.shape[1] < size:
        return torch.zeros(len(history), vocabulary, dtype=torch.bool, device=history.device)
    windows = history.unfold(1, size, 1)  # (n, W, size)
    steps = torch.arange(windows.shape[1] + size, device=history.device)
    last = history.gather(1, (lengths[:, None] - (size - 1) + steps[: size - 1]).clamp(0, history.shape[1] - 1))  # (n, size - 1)
    whole = steps[size - 1 : -1] < lengths[:, None]  # windows that lie within the sequence (n, W)
    return _marked(windows[..., -1], (windows[..., :-1] == last[:, None]).all(-1) & whole, vocabulary)


def _marked(tokens: Tensor, where: Tensor, vocabulary: int) -> Tensor:
    """(n, vocabulary) bool: tokens (n, m) that stand where `where` (n, m) is true."""
    marks = torch.zeros(len(tokens), vocabulary + 1, dtype=torch.bool, device=tokens.device)
    return marks.scatter_(1, tokens.where(where, vocabulary), True)[:, :vocabulary]  # the others in a column of their own


def likeliest(scores: Tensor, top_k: int) -> Tensor:
    """scores (n, V), minus infinity where top_k others are higher; 0: as they are."""
    if not 0 < top_k < scores.shape[1]:
        return scores
    return scores.masked_fill(scores < scores.topk(top_k)[0][:, -1:], -torch.inf)


def nucleus(scores: Tensor, top_p: float) -> tuple[Tensor, Tensor | None]:
    """(probabilities (n, k), 0 where a token is left out; which tokens these are (n, k), None for all in their order).

    scores (n, V). Kept are the tokens before which, from the most likely down, less than top_p lies.
    """
    probabilities = scores.softmax(-1)
    if top_p == 1:
        return probabilities, None
    if scores.is_cuda:
        probabilities, tokens = probabilities.sort(-1, descending=True)
    else:  # asking costs nothing here: tokens of at most (1 - p) / V are not more, all together, than what is cut off
        candidates = int((probabilities > (1 - top_p) / scores.shape[1]).sum(1).max())
        probabilities, tokens = probabilities.topk(max(1, candidates))
    before = probabilities.cumsum(-1) - probabilities
    return probabilities.where(before < top_p, 0.0), tokens


def draw_token(probabilities: Tensor, tokens: Tensor | None, uniforms: Tensor) -> Tensor:
    """(n,): the first place where the sum of probabilities (n, k) is above uniforms (n,) of the whole; or the token there."""
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    whole = sums[:, -1]
    aim = torch.minimum(uniforms * whole, whole.nextafter(torch.zeros_like(whole)))  # below the whole, however it is rounded
    place = torch.searchsorted(sums, aim[:, None], right=True)  # (n, 1)
    return (place if tokens is None else tokens.gather(1, place))[:, 0]
