"""New questions and answers of a task, made up by a base model from a few demonstrations.

    python -m data.synthesis --model nano --task mini_svamp --budget 200 --out svamp.jsonl

Step 1 of Self-Synthesized Rehearsal (arXiv 2403.01244). The model reads the task's definition and two demonstrations as raw text,

    {definition}

    Input: {question}
    Output: {answer}

    Input: {question}
    Output: {answer}

    Input:

and goes on with a pair of its own until its next "Input:". The paper runs through all pairs of demonstrations; here every sample
draws its own, until as many valid and different items are there as were asked for. Answers are often wrong or in another
form than the task's: data/refine.py writes them anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from data.folder import find_task
from data.pairs import ANSWER, QUESTION, Judge, Limits, parse, without
from data.records import Record
from data.superni import definition_of, demonstrations
from model.generate import Decoder
from model.sampling import sample
from model.subject import Subject, load_subject
from study.errors import LetheError, run_command
from study.folder import append_jsonl, read_jsonl
from study.logging import progress

PAPER = Limits()


@dataclass
class SynthesisReport:
    """What the samples gave. dropped: reason -> pairs (or samples without one)."""

    task: str
    budget: int
    kept: int = 0
    attempts: int = 0  # samples up to the last item that was kept
    dropped: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        told = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common()) or "nothing"
        return f"{self.task}: {self.kept} of {self.budget} items from {self.attempts} samples; dropped: {told}"


def synthesize(
    subject: Subject, task_name: str, definition: str, demos: Sequence[Record], budget: int, *, limits: Limits = PAPER,
    seed: int = 0, out: Path, batch_size: int = 64, answer_kind: str | None = None, avoid: Sequence[Record] = (),
    decoder: Decoder | None = None, quiet: bool = True,
) -> SynthesisReport:  # fmt: skip
    """Appends to `out` until it holds `budget` valid items, different from each other and from the demonstrations.

    A line: {"prompt": [["user", text]], "answer", "index" and "seed" of its sample, "demos" shown, "dropped" since the line before
    it: {reason: count}}. What lies there is taken, so that after a kill the file becomes bit for bit what it would have been.

    subject: the base, without an adapter. definition: what the demonstrations' prompts begin with, line breaks included (data.superni),
    and so do the new ones; one that they do not begin with is shown to the model only. answer_kind (metrics/answers.py): an answer
    that cannot be read so is not valid; the base seldom knows a task's form. avoid: test items, which are not to be made. Raises
    LetheError where the demonstrations are too few or no single questions, `out` is of other settings, or the model cannot do it:
    after limits.attempts * budget samples.
    """
    if subject.model.adapter is not None or subject.model.altered:
        raise ValueError("items are synthesized by the base: without an adapter, with its own weights")
    maker = _Maker(subject, task_name, definition, list(demos), limits, seed, answer_kind, avoid)
    report, rows = SynthesisReport(task_name, budget), _whole_lines(Path(out))
    maker.check(rows, Path(out))
    most, at, kept = limits.attempts * budget, 0, 0
    last = rows[-1]["index"] if rows else -1
    with progress(budget, f"synthesize {task_name}", "items", enabled=not quiet, start=min(len(rows), budget)) as bar:
        while len(rows) < budget and at < most:
            # How many samples are drawn together follows from what came before alone, so that a run that goes on has the same
            # batches: what a batch is made of may change the last bits of its probabilities.
            likely = -(-(budget - kept) * at // max(kept, 1)) if at else budget
            size = min(max(likely, 8), 2 * batch_size, most - at)
            if at + size <= last:  # they were judged, and later ones too
                for row in rows[kept:]:
                    if row["index"] < at + size:
                        maker.judge.add(without(row["prompt"][0][1], maker.prefix))
            else:
                decoder = decoder or Decoder(subject.model, batch_size)
                fresh = [row for row in maker.make(range(at, at + size), decoder) if row["index"] > last]
                fresh = fresh[: budget - len(rows)]
                append_jsonl(out, *fresh)
                bar.update(len(fresh))
                rows += fresh
            at += size
            kept = sum(row["index"] < at for row in rows)
    report.kept = min(len(rows), budget)
    report.attempts = rows[budget - 1]["index"] + 1 if report.kept == budget > 0 else at
    report.dropped = sum((Counter(row["dropped"]) for row in rows[:budget]), Counter(maker.dropped if report.kept < budget else {}))
    if report.kept < budget:
        mend = "ask for fewer, give more or other demonstrations, another temperature, or a larger model"
        raise LetheError(f"{report}. This model cannot make them so: {mend}; what was made is kept in {out}")
    return report


def read_items(out: Path, budget: int) -> list[Record]:
    """The first `budget` items of a file that synthesize wrote."""
    rows = read_jsonl(out)[:budget]
    return [Record(tuple(map(tuple, row["prompt"])), row["answer"], f"{out}:{n}") for n, row in enumerate(rows, 1)]


def _whole_lines(out: Path) -> list[dict]:
    """The rows that lie there. A line that a kill cut off goes, also one that lacks its line break alone."""
    if out.is_file() and not out.read_bytes().endswith(b"\n"):
        append_jsonl(out)
    return read_jsonl(out)


class _Maker:
    """Prompts, samples and verdicts of one task's items."""

    def __init__(
        self, subject: Subject, task: str, definition: str, demos: list[Record], limits: Limits, seed: int,
        answer_kind: str | None = None, avoid: Sequence[Record] = (),
    ):  # fmt: skip
        self.subject, self.limits, self.definition = subject, limits, definition.strip()
        if not 0 < limits.shown <= len(demos):
            raise LetheError(f"{task}: a prompt shows {limits.shown} demonstrations, and there are {len(demos)}; give more, or --shown")
        for demo in demos:
            if [role for role, _ in demo.prompt] != ["user"]:
                raise LetheError(f"{demo.source or task}: a demonstration is one question and its answer, not a conversation")
        asked = [demo.prompt[0][1] for demo in demos]
        self.prefix = definition if all(text.startswith(definition) for text in asked) else ""
        self.demos = [(without(text, self.prefix), demo.answer.strip()) for text, demo in zip(asked, demos, strict=True)]
        tokenizer, model, context = subject.tokenizer, subject.model, subject.model.config.max_position_embeddings
        texts = map(_written, self.demos), map(str.strip, asked), [answer for _, answer in self.demos]
        longest, question, answer = (max(len(tokenizer.encode(text)) for text in of) for of in texts)
        self.new_tokens = limits.new_tokens or min(2 * longest, context // 3)
        self.prompt_tokens = min(limits.prompt_tokens, context - self.new_tokens)
        avoided = [without(record.prompt[-1][1], self.prefix) for record in avoid]
        # What the demonstrations are is never too long: the paper's lengths are of another tokenizer.
        lengths = {"input_tokens": max(limits.input_tokens, question), "output_tokens": max(limits.output_tokens, answer)}
        self.judge = Judge([x for x, _ in self.demos], tokenizer, self.prefix, replace(limits, **lengths), answer_kind, avoided)
        settings = {name: value for name, value in asdict(limits).items() if name != "attempts"}  # that one changes no item
        content = [seed, task, definition, self.demos, avoided, settings, answer_kind, model.fingerprint, tokenizer.fingerprint]
        self.identity = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        self.dropped: Counter = Counter()  # since the last item

    def seed_of(self, index: int) -> int:
        """Of a sample, its demonstrations and its tokens: it tells items of other settings apart too."""
        return int.from_bytes(hashlib.sha256(f"{self.identity} {index}".encode()).digest()[:6], "big")

    def prompt_of(self, index: int) -> tuple[list[int], list[int]]:
        """(ids, the demonstrations shown): as many of those drawn as there is room for; none where not even the first fits."""
        tokenizer, definition = self.subject.tokenizer, self.definition + "\n\n" if self.definition else ""
        shown = random.Random(self.seed_of(index)).sample(range(len(self.demos)), self.limits.shown)
        while shown:
            text = definition + "".join(_written(self.demos[i]) for i in shown) + QUESTION
            ids = ([] if tokenizer.bos is None else [tokenizer.bos]) + tokenizer.encode(text)
            if len(ids) <= self.prompt_tokens:
                return ids, shown
            shown = shown[:-1]
        return [], []

    def check(self, rows: list[dict], out: Path) -> None:
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or row.get("seed") != self.seed_of(row.get("index", -1)):
                what = "its model, demonstrations, seed or settings are others"
                raise LetheError(f"{out}:{number} is no item of this synthesis ({what}); move the file away, or choose another --out")

    def make(self, indices: range, decoder: Decoder) -> list[dict]:
        """The lines of these samples. A sample ends at its second question, so that it gives one pair at most."""
        prompts = {index: self.prompt_of(index) for index in indices}
        fits = {index: ids for index, (ids, shown) in prompts.items() if shown}
        limits, tokenizer = self.limits, self.subject.tokenizer
        outputs = sample(
            self.subject.model, list(fits.values()), self.new_tokens, tokenizer.stop_ids, temperature=limits.temperature,
            top_p=limits.top_p, repetition_penalty=limits.repetition_penalty, seeds=[self.seed_of(index) for index in fits],
            stop_texts=[QUESTION], tokenizer=tokenizer, decoder=decoder,
        )  # fmt: skip
        outputs, rows = dict(zip(fits, outputs, strict=True)), []
        for index in indices:
            if index not in outputs:
                self.dropped["prompt too long"] += 1
                continue
            ids = outputs[index]
            pairs, reasons = parse(tokenizer.decode(ids), ended=len(ids) < self.new_tokens)
            self.dropped.update(reasons)
            for question, answer in pairs:
                if reason := self.judge.reason(question, answer):
                    self.dropped[reason] += 1
                    continue
                self.judge.add(question)
                rows.append({"prompt": [["user", self.prefix + question]], "answer": answer, "index": index, "seed": self.seed_of(index),
                             "demos": prompts[index][1], "dropped": dict(self.dropped)})  # fmt: skip
                self.dropped.clear()
        return rows


def _written(demo: tuple[str, str]) -> str:
    return f"{QUESTION} {demo[0]}\n{ANSWER} {demo[1]}\n\n"


# ----------------------------------------------------------------------------------------------------------------------
# The command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise LetheError(f"{message}; see python -m data.synthesis --help")


def _parse(argv: list[str]) -> argparse.Namespace:
    lines = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m data.synthesis", description=__doc__, formatter_class=lines, allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="M", help="the base: nano, a folder or a hub id")
    parser.add_argument("--task", required=True, metavar="NAME", help="a task's name, or name=file")
    parser.add_argument("--out", required=True, metavar="F", help="json lines; the same command again goes on with them")
    parser.add_argument("--budget", type=int, default=200, metavar="N", help="items to make (200)")
    parser.add_argument("--demos", type=int, default=20, metavar="N", help="demonstrations to draw from (20)")
    parser.add_argument("--data_root", default="data", metavar="DIR", help="prepared tasks (data)")
    parser.add_argument("--check", action="store_true", help="the task's scorer must find a final answer in an output")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--batch_size", type=int, default=64, metavar="N", help="sequences at a time (64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    for setting in fields(Limits):
        told = f"{setting.metadata['told']} ({setting.default:g})"
        parser.add_argument(f"--{setting.name}", type=type(setting.default), default=setting.default, metavar="X", help=told)
    args = parser.parse_args(argv)
    for name in ("budget", "demos", "batch_size", "shown", "prompt_tokens", "input_tokens", "output_tokens", "attempts"):
        if getattr(args, name) < 1:
            raise LetheError(f"--{name} {getattr(args, name)}: a whole number from 1 on")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.repetition_penalty <= 0 or args.near <= 0 or args.new_tokens < 0:
        raise LetheError("--temperature and --new_tokens are 0 or more, --top_p in (0, 1], --repetition_penalty and --near above 0")
    return args


def main(argv: list[str] | None = None) -> int:
    def work() -> None:
        args = _parse(sys.argv[1:] if argv is None else argv)
        task = find_task(args.task, args.data_root)
        subject = load_subject(args.model, args.device, args.dtype)
        print(subject.about)
        limits = Limits(**{setting.name: getattr(args, setting.name) for setting in fields(Limits)})
        demos, kind = demonstrations(task, args.demos, args.seed), task.answer_kind if args.check else None
        report = synthesize(
            subject, task.name, definition_of(task), demos, args.budget, limits=limits, seed=args.seed, out=Path(args.out),
            batch_size=args.batch_size, answer_kind=kind, avoid=task.test, quiet=False,
        )  # fmt: skip
        print(f"{report}\nwrote {args.out}")

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
