"""Multiple-choice items as token ids: what a model's likelihoods are asked for."""

from __future__ import annotations

from dataclasses import dataclass

from data.batching import cut_middle
from data.benchmarks import Item
from model.choices import Question
from model.tokenizer import Tokenizer
from study.errors import LetheError

AT_ONCE = 512  # prompts that are encoded together


@dataclass
class Fit:
    """How many items did not fit as they are: lost_shots lost solved examples, cut lost their prompt's middle with none left."""

    lost_shots: int = 0
    cut: int = 0


def as_questions(items: list[Item], tokenizer: Tokenizer, max_length: int) -> tuple[list[Question], Fit]:
    """The items as token ids, in their order, and how many had to be shortened to max_length tokens.

    A prompt is BOS and its whole text encoded in one go, so its tokens do not depend on where its parts meet. Its first shots
    are left out one by one until it fits with its longest option (whose last token is never fed); where none is left its middle
    is cut. Questions of a subject with the same shots are a group. Raises LetheError for an option that cannot fit.
    """
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    number = list(range(tokenizer.vocab_size))  # one int object a token, not one an occurrence: a quarter of the memory
    questions, fit, known = [], Fit(), {}
    for start in range(0, len(items), AT_ONCE):
        part = items[start : start + AT_ONCE]
        encodings = tokenizer.hf.encode_batch_fast([_text(item, item.shots) for item in part], add_special_tokens=False)
        for item, encoding in zip(part, encodings, strict=True):
            ids, shots = encoding.ids, item.shots
            while True:
                options = [continuation(tokenizer, _text(item, shots), ids, option, known) for option in item.options]
                room = max_length - len(bos) - max(map(len, options)) + 1
                if not all(options) or room < 1:
                    raise LetheError(f"{item.source or item.subject}: an option has {'too many' if all(options) else 'no'} tokens")
                if len(ids) <= room or not shots:
                    break
                shots = shots[1:]
                ids = tokenizer.encode(_text(item, shots))
            fit.lost_shots += len(shots) < len(item.shots)
            fit.cut += len(ids) > room
            prompt = bos + [number[i] for i in (ids if len(ids) <= room else cut_middle(ids, room))]
            # Apart from the others of its subject, which would share no more than this one leaves them.
            group = item.subject if len(shots) == len(item.shots) else f"{item.subject}, {len(shots)} shots"
            questions.append(Question(prompt, options, group))
    return questions, fit


def _text(item: Item, shots: tuple[str, ...]) -> str:
    return item.header + "".join(shots) + item.question


def continuation(tokenizer: Tokenizer, text: str, ids: list[int], option: str, known: dict) -> list[int]:
    """The option's ids after a text whose ids are given: what text and option together have more (as lm-evaluation-harness does).

    Where together they begin with other ids than the text alone, the option is encoded apart. known: a dict that is kept from
    call to call. What follows a text can change its last words' tokens only, so its last line, where it has tokens of its own,
    answers for the whole, and most texts end with one that was seen before.
    """
    tail = text[text.rfind("\n") + 1 :]
    if tail not in known:
        known[tail] = tokenizer.encode(tail)
    if not tail or ids[len(ids) - len(known[tail]) :] != known[tail]:
        return _after(tokenizer, text, ids, option)
    if (tail, option) not in known:
        known[tail, option] = _after(tokenizer, tail, known[tail], option)
    return known[tail, option]


def _after(tokenizer: Tokenizer, text: str, ids: list[int], option: str) -> list[int]:
    both = tokenizer.encode(text + option)
    return both[len(ids) :] if both[: len(ids)] == ids and len(both) > len(ids) else tokenizer.encode(option)
