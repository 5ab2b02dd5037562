"""How new tokens are chosen: greedily, drawn, or searched by beams; and the one function that does as it is told.

    decode(model, prompts, 64, tokenizer.stop_ids, Decoding(num_beams=4, no_repeat_ngram_size=2))
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from model.beam import beam_search
from model.generate import Decoder, generate
from model.llama import Llama
from model.sampling import sample
from study.errors import LetheError


@dataclass(frozen=True)
class Decoding:
    """Settings under transformers' names. One beam and temperature 0: the likeliest token each time, greedily.

    Raises LetheError where one setting would silence another.
    """

    num_beams: int = 1
    length_penalty: float = 1.0  # of beams
    no_repeat_ngram_size: int = 0  # 0: anything may be repeated
    temperature: float = 0.0  # 0: nothing is drawn
    top_p: float = 1.0  # of what is drawn
    top_k: int = 0  # of what is drawn; 0: all
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for wrong, line in (
            (self.num_beams > 1 and self.temperature,
             f"num_beams {self.num_beams} searches and temperature {self.temperature} draws; give one of them"),
            (self.num_beams == 1 and self.length_penalty != 1, "length_penalty is of beams; give num_beams above 1 too"),
            (not self.temperature and (self.top_p != 1 or self.top_k), "top_p and top_k are of drawing; give a temperature above 0 too"),
        ):  # fmt: skip
            if wrong:
                raise LetheError(line)

    @property
    def greedy(self) -> bool:
        """Whether model.generate does all of it."""
        return self == GREEDY


GREEDY = Decoding()


def decode(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int],
    how: Decoding,
    *,
    seeds: Sequence[int] | None = None,
    batch_size: int = 64,
    on_done: Callable[[int], None] | None = None,
    decoder: Decoder | None = None,
) -> list[list[int]]:
    """Continues each prompt as `how` says; a stop id ends it and is not part of the result.

    seeds: one for each prompt, needed where tokens are drawn. decoder: see model.generate; beams have a cache of their own, of as
    many slots. Other arguments and errors: see model.generate, model.sampling and model.beam.
    """
    batch_size = decoder.slots if decoder else batch_size
    if how.greedy:
        return generate(model, prompts, max_new_tokens, stop_ids, batch_size, on_done, decoder)
    if how.num_beams > 1:
        return beam_search(
            model, prompts, max_new_tokens, stop_ids, num_beams=how.num_beams, length_penalty=how.length_penalty,
            no_repeat_ngram_size=how.no_repeat_ngram_size, repetition_penalty=how.repetition_penalty, batch_size=batch_size,
            on_done=on_done,
        )  # fmt: skip
    if seeds is None and how.temperature:
        raise ValueError("tokens are drawn, which needs a seed for each prompt")
    return sample(
        model, prompts, max_new_tokens, stop_ids, temperature=how.temperature, top_p=how.top_p, top_k=how.top_k,
        repetition_penalty=how.repetition_penalty, no_repeat_ngram_size=how.no_repeat_ngram_size,
        seeds=[0] * len(prompts) if seeds is None else seeds, batch_size=batch_size, on_done=on_done, decoder=decoder,
    )  # fmt: skip


def seed_of(seed: int, *item: str) -> int:
    """The seed of an item, below 2^48: that of the study and what the item says decide, not its place or its batch."""
    return int.from_bytes(hashlib.sha256("\0".join([str(seed), *item]).encode()).digest()[:6], "big")
