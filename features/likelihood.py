"""How likely a data set is to the model, before any training: perplexities of its answers, with and without their questions.

All are of completion tokens (the answer and its end token) in the model's own template, from float32 losses, N items packed.
A value that cannot be had is None, and the dictionary then has a "reason" beside its columns.
"""

from __future__ import annotations

import math
from itertools import takewhile

import numpy as np
import torch

from data.batching import Examples, collate, cut_middle
from data.records import Record
from features.dataset import Sample
from masking.score import micro_nll
from model.llama import Llama
from model.subject import Subject
from model.tokenizer import Tokenizer

LIKELIHOOD_COLUMNS = (
    "answer_perplexity", "base_model_perplexity", "base_perplexity_std", "unconditional_perplexity", "ifd", "prompt_perplexity",
)  # fmt: skip
LONGEST = 2048  # tokens of an example, or what the model has positions for; as train.py's --max_length


def likelihood_features(subject: Subject, sample: Sample, batch_size: int) -> dict:
    """The columns of LIKELIHOOD_COLUMNS. nll_i: mean loss of item i's completion tokens given its prompt, in nats.

        answer_perplexity          exp(mean loss of all completion tokens): long answers count more
        base_model_perplexity      mean over items of exp(nll_i); nothing is clamped, so one absurd item shows
        base_perplexity_std        standard deviation (of the N items, ddof 0) of exp(nll_i)
        unconditional_perplexity   as answer_perplexity, with an empty question in the same template
        ifd                        mean over items of exp(nll_i - nll_i with an empty question): Instruction-Following
                                   Difficulty (arXiv 2308.12032); 1: the question does not help
        prompt_perplexity          exp(mean loss of the prompts' tokens but for the template around them)

    Items whose answer does not fit the model are left out, and the "reason" counts them. batch_size: examples in a pass, which
    changes memory and not the values. The model is as it was afterwards.
    """
    model, tokenizer = subject.model, subject.tokenizer
    pairs, found = encode(tokenizer, sample.records, longest(model)), dict.fromkeys(LIKELIHOOD_COLUMNS)
    unfit = len(sample.records) - len(pairs)
    said = [f"likelihood: {unfit} of {len(sample.records)} answers do not fit into {longest(model)} tokens"] if unfit else []
    if not pairs:
        return found | {"reason": "; ".join(said)}
    frame = tokenizer.render_prompt((("user", ""),))
    # The whole text in one pass: its first token alone is given.
    whole = token_nll(model, Examples.from_pairs([((prompt + answer)[:1], (prompt + answer)[1:]) for prompt, answer in pairs]), batch_size)
    alone = token_nll(model, Examples.from_pairs([(frame, answer) for _, answer in pairs]), batch_size)
    answers = [nll[len(prompt) - 1 :] for nll, (prompt, _) in zip(whole, pairs, strict=True)]
    prompts = [nll[content_of(prompt, frame)] for nll, (prompt, _) in zip(whole, pairs, strict=True)]
    items, bare = (np.array([nll.mean() for nll in part]) for part in (answers, alone))  # (N,) each
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite becomes None
        found |= {
            "answer_perplexity": np.exp(np.concatenate(answers).mean()),
            "base_model_perplexity": np.exp(items).mean(),
            "base_perplexity_std": np.exp(items).std(),
            "unconditional_perplexity": np.exp(np.concatenate(alone).mean()),
            "ifd": np.exp(items - bare).mean(),
        }
        if sum(map(len, prompts)):
            found["prompt_perplexity"] = np.exp(np.concatenate(prompts).mean())
    return checked(found, "likelihood", said)


def encode(tokenizer: Tokenizer, records: list[Record], length: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of the records whose answer leaves room for a prompt token, as training has them.

    A longer example loses its prompt's middle. A record without a prompt is a document: text to go on with, from its first
    word, between the tokenizer's begin and end; without a begin token its first word is the prompt.
    """
    pairs = []
    for record in records:
        if record.prompt:
            prompt, answer = tokenizer.render_prompt(record.prompt), tokenizer.render_answer(record.answer)
        else:
            ids = [*([] if tokenizer.bos is None else [tokenizer.bos]), *tokenizer.encode(record.answer), tokenizer.end_id]
            prompt, answer = ids[:1], ids[1:length]
        room = length - len(answer)
        if room > 0 and answer:
            pairs.append((cut_middle(prompt, room) if len(prompt) > room else prompt, answer))
    return pairs


def content_of(prompt: list[int], frame: list[int]) -> slice:
    """Which losses of a text's tokens 1, 2, … are of what a prompt says, not of the template: frame is the empty one's ids."""
    same = lambda a, b: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))  # noqa: E731
    start = same(prompt, frame)
    end = len(prompt) - same(prompt[start:][::-1], frame[start:][::-1])
    return slice(max(start - 1, 0), max(end - 1, 0))


def longest(model: Llama) -> int:
    return min(LONGEST, model.config.max_position_embeddings)


def budget(examples: Examples, batch_size: int) -> int:
    """Tokens in a pass for which batch_size examples always fit."""
    return batch_size * int(examples.lengths.max())


@torch.inference_mode()
def token_nll(model: Llama, examples: Examples, batch_size: int) -> list[np.ndarray]:
    """Losses of each example's completion tokens, in nats, (n_i,) float64 each. Dropout is off."""
    found: list = [None] * len(examples)
    was_training = model.training
    model.eval()
    try:
        for micro in collate(examples, list(range(len(examples))), budget(examples, batch_size), None):
            nll = micro_nll(model, micro.to(model.device)).double().cpu().numpy()
            for i, part in zip(micro.indices, np.split(nll, np.cumsum(micro.sizes)[:-1]), strict=True):
                found[i] = part
    finally:
        model.train(was_training)
    return found


def mean_nll(model: Llama, examples: Examples, batch_size: int) -> float:
    """Over all completion tokens, in nats."""
    return float(np.concatenate(token_nll(model, examples, batch_size)).mean())


def checked(found: dict, part: str, said: list[str] | None = None) -> dict:
    """The features as plain numbers, None where one is missing or not finite; "reason" joins what is said and which those are."""
    plain = {name: None if value is None or not math.isfinite(value) else float(value) for name, value in found.items()}
    missing = [name for name, value in plain.items() if value is None]
    said = [*(said or []), *([f"{part}: no {', '.join(missing)}"] if missing else [])]
    return plain | ({"reason": "; ".join(said)} if said else {})
