"""Answers written anew by the model as it is: what rehearsal trains on instead of the answers that were there.

Step 2 of Self-Synthesized Rehearsal (arXiv 2403.01244): greedy outputs of the model that has just learned a task, for inputs of
that task. Most of the method's gain is said to lie here, also for real inputs. How sure the model was of what it wrote is kept
beside each answer, so that doubtful ones can be left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.batching import Examples, collate, cut_middle, micro_tokens_of
from data.records import Record, as_row
from metrics.answers import extract_answer
from model.attention import Pack
from model.generate import Decoder
from model.llama import Llama
from model.subject import Subject
from study.errors import LetheError
from study.folder import append_jsonl, read_jsonl
from study.logging import progress

AT_ONCE = 256  # records between two writes; what is computed together does not depend on where a run was cut short


@dataclass
class Refinement:
    """What became of the records. empty, below: left out; unreadable, cut: kept. logprob: mean over those kept, in nats a token."""

    records: int = 0
    kept: int = 0
    empty: int = 0  # the model wrote nothing
    below: int = 0  # less sure of it than the floor
    unreadable: int = 0  # an answer that the task's scorer finds no answer in
    cut: int = 0  # at max_new_tokens, before its end
    changed: int = 0  # kept, with another answer than was there
    logprob: float = math.nan

    def __str__(self) -> str:
        counts = {"empty": self.empty, "below the floor": self.below}
        left_out = "".join(f", {n} {what}" for what, n in counts.items() if n)
        counts = {"unreadable": self.unreadable, "cut off": self.cut, "changed": self.changed}
        kept = ", ".join(f"{n} {what}" for what, n in counts.items() if n) or "none changed"
        return f"{self.kept} of {self.records} answers kept{left_out}; of them {kept}; log p a token {self.logprob:.3f}"


def refine(
    subject: Subject, records: Sequence[Record], *, max_new_tokens: int, out: Path, batch_size: int = 64, floor: float | None = None,
    decoder: Decoder | None = None, max_length: int = 2048, answer_kind: str = "text", quiet: bool = True,
    report: Refinement | None = None,
) -> list[Record]:  # fmt: skip
    """The records with the model's own greedy answers, in their order, without those that are empty or below the floor.

    out gets a line for every record, those left out too: its row with the new answer, "was" (the old one), "mean_logprob" (of the
    tokens written, without the one that ends them; nats, null for none), "tokens", and "ended" (before max_new_tokens). What
    lies there already is taken, and the rest is made: bit for bit what an undisturbed run writes. The floor is laid over it at every call.

    floor: on mean_logprob; equal is kept. answer_kind: see metrics/answers.py. A prompt loses its middle beyond max_length tokens.
    The model is taken as it is: merge an adapter before, with lora.layers.merged, as for scores. decoder: see model.generate.
    Raises LetheError where `out` holds other records, or the model gives NaN.
    """
    model, tokenizer, done = subject.model, subject.tokenizer, _read(out, records)
    max_length = max(1, min(max_length, model.config.max_position_embeddings - max_new_tokens))
    first = len(done) - len(done) % AT_ONCE  # a chunk that is written in part is computed again, as a whole
    chunks = range(first, len(records), AT_ONCE) if len(done) < len(records) else ()
    decoder = decoder or Decoder(model, batch_size)
    with progress(len(records), "refine", "items", enabled=not quiet, start=first) as bar:
        for at in chunks:
            part = records[at : at + AT_ONCE]
            prompts = [tokenizer.render_prompt(record.prompt) for record in part]
            prompts = [ids if len(ids) <= max_length else cut_middle(ids, max_length) for ids in prompts]
            outputs, _ = decoder.run(prompts, max_new_tokens, tokenizer.stop_ids, on_done=bar.update)
            scores = mean_logprobs(model, prompts, outputs)
            rows = [
                as_row(record) | {"answer": tokenizer.decode(ids).strip(), "was": record.answer, "mean_logprob": score,
                                  "tokens": len(ids), "ended": len(ids) < max_new_tokens}
                for record, ids, score in zip(part, outputs, scores, strict=True)
            ]  # fmt: skip
            append_jsonl(out, *rows[len(done) - at :])
            done += rows[len(done) - at :]
    return _kept(records, done, out, floor, answer_kind, report)


@torch.inference_mode()
def mean_logprobs(model: Llama, prompts: list[list[int]], outputs: list[list[int]]) -> list[float | None]:
    """Mean log-probability in nats of each output's tokens after its prompt, None for no token. Dropout is off.

    One packed pass over what was written: beside the steps that wrote it, cheap. LetheError for NaN.
    """
    found: list[float | None] = [None] * len(outputs)
    some = [i for i, ids in enumerate(outputs) if ids]
    if not some:
        return found
    examples, was_training = Examples.from_pairs([(prompts[i], outputs[i]) for i in some]), model.training
    model.eval()
    try:
        for micro in collate(examples, list(range(len(some))), micro_tokens_of(None, model.device), None):
            micro = micro.to(model.device)
            nll = model.nll(micro.input_ids, Pack(micro.lengths, model.config, model.device), micro.rows, micro.targets)
            for k, part in zip(micro.indices, nll.double().cpu().split(micro.sizes), strict=True):
                found[some[k]] = -part.mean().item()
    finally:
        model.train(was_training)
    if not np.isfinite([found[i] for i in some]).all():
        raise LetheError("the model gives NaN or infinite losses for what it wrote; try --dtype float32")
    return found


def _read(out: Path, records: Sequence[Record]) -> list[dict]:
    """The rows that lie there. LetheError unless they are of the first of these records."""
    if not out.exists():
        return []
    done = read_jsonl(out)[: out.read_bytes().count(b"\n")]  # a line without its end will be removed, also where it is whole JSON
    if len(done) > len(records):
        raise LetheError(f"{out} holds {len(done)} answers for {len(records)} records; move it away and run the same command again")
    for number, (row, record) in enumerate(zip(done, records, strict=False), 1):
        if as_row(record)["prompt"] != row.get("prompt") or row.get("was") != record.answer:
            raise LetheError(f"{out}:{number} is the answer to another record; move it away and run the same command again")
    return done


def _kept(
    records: Sequence[Record], rows: list[dict], out: Path, floor: float | None, answer_kind: str, report: Refinement | None
) -> list[Record]:
    report = Refinement() if report is None else report
    kept, scores = [], []
    for number, (record, row) in enumerate(zip(records, rows, strict=True), 1):
        report.records += 1
        if not row["answer"]:
            report.empty += 1
        elif floor is not None and row["mean_logprob"] < floor:
            report.below += 1
        else:
            kept.append(Record(record.prompt, row["answer"], f"{out}:{number}", record.group))
            scores.append(row["mean_logprob"])
            report.unreadable += extract_answer(answer_kind, row["answer"]) is None
            report.cut += not row["ended"]
            report.changed += row["answer"] != row["was"]
    report.kept += len(kept)
    report.logprob = float(np.mean(scores)) if scores else math.nan
    return kept
