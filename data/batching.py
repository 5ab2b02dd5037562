"""Records to token ids on disk, and token ids to the batches of an optimizer step.

Every data set, small or larger than memory, takes one way: its records are tokenised once into a flat file, which is then
mapped, not read. The batches of step s are a pure function of (data, seed, s).
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.records import Record, Report
from kernels.dispatch import to_device
from model.tokenizer import Tokenizer
from study.errors import LetheError
from study.folder import write_json


@dataclass(frozen=True)
class Examples:
    """Tokenised examples, mapped from disk. Example i is ids(i); its completion begins at starts[i] and includes the end token.

    The completion is what carries loss: the answer, or (tokenize on_source) all that follows the first token.
    """

    key: str  # names the content: data, tokenizer, template, lengths
    flat: np.ndarray  # (all tokens,) uint32
    offsets: np.ndarray  # (N + 1,) int64, into flat
    starts: np.ndarray  # (N,) int64, within the example
    report: dict

    def __len__(self) -> int:
        return len(self.starts)

    def ids(self, i: int) -> np.ndarray:
        return self.flat[self.offsets[i] : self.offsets[i + 1]]

    def completion(self, i: int) -> np.ndarray:
        return self.ids(i)[self.starts[i] :]

    @classmethod
    def from_pairs(cls, pairs: list[tuple[list[int], list[int]]]) -> Examples:
        """Examples in memory, from (prompt ids, completion ids). Raises ValueError where either of them is empty."""
        if not all(prompt and answer for prompt, answer in pairs):
            raise ValueError("a prompt or an answer is empty: each needs at least one token")
        flat = np.array([token for prompt, answer in pairs for token in (*prompt, *answer)], dtype=np.uint32)
        offsets = np.cumsum([0, *(len(prompt) + len(answer) for prompt, answer in pairs)])
        starts = np.array([len(prompt) for prompt, _ in pairs], dtype=np.int64)
        key = hashlib.sha256(flat.tobytes() + offsets.tobytes() + starts.tobytes()).hexdigest()[:16]
        return cls(key, flat, offsets, starts, {})

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @cached_property
    def completion_offsets(self) -> np.ndarray:
        """(N + 1,): where each example's completion begins in a flat array over all completions."""
        return np.concatenate(([0], np.cumsum(self.lengths - self.starts)))


@dataclass(frozen=True)
class Micro:
    """One forward pass: examples packed one behind the other, and the n positions that predict a token with a weight."""

    input_ids: Tensor  # (T,)
    lengths: list[int]  # of the packed examples, summing to T
    examples: Tensor  # (T,) index of each token's example, for its dropout mask
    rows: Tensor  # (n,) into T: the position before each completion token that carries loss
    targets: Tensor  # (n,)
    sizes: list[int]  # how many of these each example has, summing to n
    indices: list[int]  # which examples these are
    completions: int  # completion tokens in all, those without a weight included
    weights: Tensor | None  # (n,) loss weights above 0; None: all n, decided from this pass's own losses
    weight_sum: float | None = None  # known here, so that no step asks the device

    @property
    def tokens(self) -> int:
        """Of all examples, prompts and the last token (which predicts nothing and is not run) included."""
        return len(self.input_ids) + len(self.lengths)

    def to(self, device: torch.device) -> Micro:
        moved = {name: to_device(getattr(self, name), device) for name in ("input_ids", "examples", "rows", "targets")}
        return replace(self, **moved, weights=None if self.weights is None else to_device(self.weights, device))


def tokenize(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    max_length: int,
    fingerprint: str,
    cache: Path,
    limit: int | None = None,
    bad_rows: Report | None = None,
    on_source: bool = False,
) -> Examples:
    """Tokenises records into cache/{key}, or maps what an earlier call left there.

    A longer example loses its prompt's middle; one whose answer alone leaves no room for a prompt token is dropped. Both are
    counted. fingerprint: of the records' source; limit: at most so many records; bad_rows: what reading the records
    dropped, kept with the tokens' own report; on_source: the prompt carries loss too, but for its first token (BOS), which nothing
    predicts. Raises LetheError if nothing is left.
    """
    content = json.dumps([fingerprint, tokenizer.fingerprint, max_length, limit, *["on_source"] * on_source])
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    folder = cache / key
    if not (folder / "report.json").is_file():
        _write_tokens(records, tokenizer, max_length, folder, limit, bad_rows or Report(), on_source)
    report = json.loads((folder / "report.json").read_text())
    index = np.load(folder / "index.npy")
    if not report["rows"]:
        raise LetheError("there is not one record to train on; look at the file and at what its reading reported")
    if not len(index):
        raise LetheError(
            f"{report['source']}: of {report['rows']} examples none is left to train on: no answer fits into --max_length {max_length}"
        )
    flat = np.memmap(folder / "ids.bin", dtype=np.uint32, mode="r")
    return Examples(key, flat, np.concatenate(([0], index[:, 1])), index[:, 0], report)


def _write_tokens(
    records: Iterable[Record], tokenizer: Tokenizer, max_length: int, folder: Path, limit: int | None, bad_rows: Report, on_source: bool
) -> None:
    """ids.bin (uint32), index.npy (N, 2) of (completion start, end offset), and report.json, which is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    starts, ends = array("q"), array("q")
    rows = truncated = dropped = total = trainable = 0
    source = ""
    with open(folder / "ids.bin", "wb") as file:
        for record in records:
            if limit is not None and rows == limit:
                break
            rows += 1
            source = source or record.source.rsplit(":", 1)[0]
            answer = tokenizer.render_answer(record.answer)
            prompt = tokenizer.render_prompt(record.prompt)
            room = max_length - len(answer)
            if room < 1:
                dropped += 1
                continue
            if len(prompt) > room:
                truncated += 1
                prompt = cut_middle(prompt, room)
            ids = np.array(prompt + answer, dtype=np.uint32)
            file.write(ids.tobytes())
            start = 1 if on_source else len(prompt)
            total += len(ids)
            trainable += len(ids) - start
            starts.append(start)
            ends.append(total)
    index = np.array([starts, ends], dtype=np.int64).T  # (N, 2)
    np.save(folder / "index.npy", index)
    lengths = np.diff(np.concatenate(([0], index[:, 1])))
    spread = [int(x) for x in np.percentile(lengths, [50, 95, 100])] if len(lengths) else [0, 0, 0]
    write_json(
        folder / "report.json",
        {
            "source": source, "rows": rows, "examples": len(index), "truncated_prompts": truncated, "answers_too_long": dropped,
            "tokens": total, "trainable_tokens": trainable, "length_p50_p95_max": spread,
            "bad_rows": bad_rows.dropped_count, "bad_rows_shown": [f"{where}: {reason}" for where, reason in bad_rows.dropped],
        },
    )  # fmt: skip


def cut_middle(prompt: list[int], room: int) -> list[int]:
    """A prompt's first and last tokens, room of them: the question's end and the template's frame matter most."""
    head = room // 2
    return prompt[:head] + prompt[len(prompt) - (room - head) :]


def steps_of(examples: int, per_step: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimizer steps of a run; the last, smaller batch of an epoch is a step too."""
    steps = max(1, round(epochs * math.ceil(examples / per_step)))
    return steps if max_steps is None else min(steps, max_steps)


def step_indices(examples: int, per_step: int, seed: int, step: int) -> list[int]:
    """Which examples step number `step` sees: epoch e is a permutation drawn from (seed, e)."""
    per_epoch = math.ceil(examples / per_step)
    epoch, within = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(examples)
    return order[within * per_step : (within + 1) * per_step].tolist()


def micro_tokens_of(asked: int | None, device: torch.device) -> int:
    """Tokens in one forward pass: what was asked for, else enough to keep the device busy within an ordinary memory."""
    return asked or (16384 if device.type == "cuda" else 4096)


def collate(examples: Examples, indices: list[int], micro_tokens: int, weights: np.ndarray | None) -> list[Micro]:
    """The micro-batches of one step: its examples, longest first, packed into passes of at most micro_tokens tokens.

    An example longer than that has a pass of its own; the loss does not depend on the split. weights: flat over all
    completions (Examples.completion_offsets), or None where the loop decides them itself.
    """
    indices = sorted(indices, key=lambda i: (-int(examples.offsets[i + 1] - examples.offsets[i]), i))
    # As many passes as are needed, and even ones: a small last pass would run at a poor rate.
    lengths = [int(examples.offsets[i + 1] - examples.offsets[i]) - 1 for i in indices]  # the last token predicts nothing
    room = sum(lengths) / math.ceil(sum(lengths) / micro_tokens)
    groups: list[list[int]] = [[]]
    filled = 0
    for i, length in zip(indices, lengths, strict=True):
        if groups[-1] and (filled >= room or filled + length > micro_tokens):
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += length
    return [pack(examples, group, weights) for group in groups]


def pack(examples: Examples, indices: list[int], weights: np.ndarray | None) -> Micro:
    """These examples, in this order, as one forward pass."""
    ids = [examples.ids(i).astype(np.int64) for i in indices]
    lengths = [len(tokens) - 1 for tokens in ids]
    starts = [int(examples.starts[i]) for i in indices]
    begins = np.concatenate(([0], np.cumsum(lengths)))
    rows = [np.arange(begin + start - 1, begin + length) for begin, start, length in zip(begins, starts, lengths, strict=False)]
    completions, mine = sum(map(len, rows)), None
    if weights is not None:
        offsets = examples.completion_offsets
        own = [weights[offsets[i] : offsets[i + 1]] for i in indices]
        rows = [part[weight > 0] for part, weight in zip(rows, own, strict=True)]  # a dropped token needs no logits
        mine = np.concatenate([weight[weight > 0] for weight in own])
    flat, where = np.concatenate([tokens[:-1] for tokens in ids]), np.concatenate(rows)
    following = np.concatenate([tokens[1:] for tokens in ids])
    return Micro(
        torch.from_numpy(flat), lengths, torch.from_numpy(np.repeat(indices, lengths)), torch.from_numpy(where),
        torch.from_numpy(following[where]), [len(part) for part in rows], list(indices), completions,
        None if mine is None else torch.from_numpy(mine), None if mine is None else float(mine.sum(dtype=np.float64)),
    )  # fmt: skip
