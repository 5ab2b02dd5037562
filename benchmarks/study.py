"""Where the time of a study goes, and what the big study costs at measured rates.

    python benchmarks/study.py --toy                                  # one small pair of the built-in study
    python benchmarks/study.py --model DIR --datasets gsm8k,svamp --pairs gsm8k:svamp --data_root DIR      # any flags of train.py
    python benchmarks/study.py --extrapolate --train_step FILE --decode FILE      # JSON of train_step.py and decode.py

The first two run train.py's own study in a temporary folder, one pair and two arms unless the flags say otherwise, and print the
seconds of its parts. With --peer, transformers + peft then train the pair's two runs of the plain arm on the same examples and
score the same test items: random batches padded to the longest, generate at the same batch size with the adapter merged, and a
second pass for the loss of the reference answers. At toy size a peer's time is that of its overheads, and so is ours.

--extrapolate trains nothing: it writes out the arithmetic of the five tasks' study of configs/masking.yaml (5 + 60 runs, at most
3000 rows and 3 epochs each) with the tokens/s that the other benchmarks measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from benchmarks import common  # noqa: E402
from data.batching import Examples, step_indices, tokenize  # noqa: E402
from data.folder import Task  # noqa: E402
from model.checkpoint import find_model  # noqa: E402
from study.config import Config, parse, stage_config  # noqa: E402
from study.errors import LetheError  # noqa: E402
from study.logging import format_table  # noqa: E402

SMALL = ["--pairs", "mini_gsm8k:mini_svamp", "--mask", "none,bottom10"]
TOY = ["--max_train", "32", "--max_test", "8"]
ARMS, EPOCHS, MOST_ROWS = 3, 3, 3000


class TaskSize(NamedTuple):
    """Of a prepared task under the Llama-3.2-1B-Instruct tokenizer: rows and items, and mean tokens."""

    rows: int  # to train on, before MOST_ROWS
    row_tokens: float  # prompt and answer, of the first MOST_ROWS rows
    items: int  # to test on
    prompt_tokens: float
    answer_tokens: float  # of the reference answers, end token included
    most_tokens: int  # the task's limit of new tokens


TASKS = {
    "aqua_cot": TaskSize(2701, 162.5, 250, 123.6, 73.2, 320),
    "gsm8k": TaskSize(7473, 207.8, 1319, 111.0, 103.8, 320),
    "openbookqa": TaskSize(4936, 95.9, 500, 88.9, 7.0, 32),
    "simpleQA": TaskSize(3894, 62.8, 432, 58.2, 5.4, 32),
    "svamp": TaskSize(700, 106.0, 299, 84.9, 21.6, 64),
}

# ----------------------------------------------------------------------------------------------------------------------
# The parts of a study that runs


class Clock:
    """Seconds spent inside named functions, which it wraps."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.undo = []

    def wrap(self, part: str, place, name: str) -> None:
        function = getattr(place, name)

        def timed(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - began

        setattr(place, name, timed)
        self.undo.append(lambda: setattr(place, name, function))

    def close(self) -> None:
        for undo in self.undo:
            undo()


def run_parts(flags: list[str]) -> dict:
    """Runs the study that the flags describe in a temporary folder."""
    clock = Clock()
    clock.wrap("load", train, "load_subject")
    clock.wrap("runs", train, "train_run")
    clock.wrap("perplexities", train.Bench, "scores")
    clock.wrap("scoring", evaluation, "score_run")
    clock.wrap("tables and pictures", train, "report")
    with tempfile.TemporaryDirectory(prefix="lethe_bench_") as folder:
        began = time.perf_counter()
        try:
            train.run_study(parse([*flags, "--out", str(Path(folder) / "study")]), ["benchmarks/study.py", *flags])
        finally:
            clock.close()
        total = time.perf_counter() - began
        found = {file: json.loads(file.read_text()) for file in sorted(Path(folder).rglob("run.json"))}
        by_folder = {file.parent.relative_to(Path(folder) / "study").as_posix(): manifest for file, manifest in found.items()}
        cells = [file.read_text().splitlines() for file in sorted(Path(folder).rglob("eval/*.jsonl"))]
    manifests = list(by_folder.values())
    seconds, steps = clock.seconds, sum(manifest["seconds"] for manifest in manifests)
    parts = {
        "load": seconds["load"],
        "training steps": steps,
        "perplexities": seconds["perplexities"],
        "rest of the runs": seconds["runs"] - steps - seconds["perplexities"],
        "scoring": seconds["scoring"],
        "tables and pictures": seconds["tables and pictures"],
    }
    parts["rest"] = total - sum(parts.values())
    tokens, items = sum(manifest["tokens"] for manifest in manifests), sum(map(len, cells))
    print("\n" + format_table([[part, f"{s:.2f}", f"{s / total:.1%}"] for part, s in parts.items()], ["part", "seconds", "share"]))
    print(f"total      {total:.1f} s: {len(manifests)} runs of {tokens} tokens at {tokens / steps:.0f} tokens/s, "
          f"{len(cells)} cells of {items} items at {items / seconds['scoring']:.1f} items/s")  # fmt: skip
    return {
        "mode": "parts", "seconds": total, "parts": parts, "runs": len(manifests), "cells": len(cells), "train_tokens": tokens,
        "train_tokens_per_s": tokens / steps, "items": items, "items_per_s": items / seconds["scoring"], "flags": flags,
        "manifests": {name: {key: manifest[key] for key in ("steps", "tokens", "seconds")} for name, manifest in by_folder.items()},
    }  # fmt: skip


class Peer:
    """transformers + peft on the tasks of a study: a plain loop and generate."""

    def __init__(self, config: Config, dropout: float):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        warnings.filterwarnings("ignore", category=FutureWarning)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        subject = evaluation.load_subject(config.model.name, config.device, config.dtype, config.template)
        self.config, self.tokenizer, self.device = config, subject.tokenizer, subject.model.device
        model = AutoModelForCausalLM.from_pretrained(find_model(config.model.name), dtype=subject.model.dtype).to(self.device)
        model.config.use_cache = False
        lora = LoraConfig(
            r=config.lora.rank, lora_alpha=config.lora.alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.model = get_peft_model(model, lora)

    def batch(self, rows: list[tuple[list[int], list[int]]], left: bool = False) -> dict[str, Tensor]:
        """(prompt, answer) ids -> padded input_ids, attention_mask and labels (B, T); left: padded on the left."""
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids, mask, labels = (torch.full((len(rows), longest), fill) for fill in (0, 0, -100))
        for row, (prompt, answer) in enumerate(rows):
            length = len(prompt) + len(answer)
            at = slice(longest - length, longest) if left else slice(0, length)
            ids[row, at], mask[row, at] = torch.tensor(prompt + answer), 1
            labels[row, at] = torch.tensor([-100] * len(prompt) + answer)
        return {name: x.to(self.device) for name, x in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}

    def train(self, examples: Examples, stage: int, steps: int) -> float:
        """Seconds of a run."""
        settings, _ = stage_config(self.config, stage)
        per_step = settings.batch_size * settings.gradient_accumulation
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
        self.model.train()
        began = time.perf_counter()
        for step in range(steps):
            indices = step_indices(len(examples), per_step, self.config.seed, step)
            rows = [(examples.ids(i)[: examples.starts[i]].tolist(), examples.completion(i).tolist()) for i in indices]
            count = sum(len(answer) for _, answer in rows)
            for at in range(0, len(rows), settings.batch_size):
                self.model(**self.batch(rows[at : at + settings.batch_size]), num_items_in_batch=count).loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        common.synchronize(self.device.type)
        return time.perf_counter() - began

    @torch.inference_mode()
    def score(self, task: Task) -> tuple[float, int]:
        """(seconds, items) of a cell."""
        records, size = task.test[: self.config.max_test], self.config.evaluation.batch_size
        stops, new = self.tokenizer.stop_ids, self.config.evaluation.max_new_tokens or task.max_new_tokens
        self.model.eval()
        began = time.perf_counter()
        self.model.merge_adapter()
        for at in range(0, len(records), size):
            rows = [(self.tokenizer.render_prompt(r.prompt), self.tokenizer.render_answer(r.answer)) for r in records[at : at + size]]
            prompts = self.batch([(prompt, []) for prompt, _ in rows], left=True)
            del prompts["labels"]
            settings = dict(max_new_tokens=new, do_sample=False, eos_token_id=list(stops), pad_token_id=0, use_cache=True)
            self.model.generate(**prompts, **settings)
            self.model(**self.batch(rows)).loss.item()
        self.model.unmerge_adapter()
        return time.perf_counter() - began, len(records)


def peer_parts(flags: list[str], ours: dict) -> dict:
    """The two runs of the first pair's plain arm and their three cells, by transformers + peft."""
    config = parse(flags)
    first, second = (config.pairs or "").split(",")[0].split(":")
    tasks = evaluation.choose_tasks(config.datasets, config.data_root, config.model.name == "nano", config.strict)
    tokens = seconds = cell_seconds = items = 0.0
    peer = Peer(config, config.lora.dropout)
    with tempfile.TemporaryDirectory(prefix="lethe_bench_") as folder:
        for stage, name, cells in ((1, first, [first]), (2, second, [first, second])):
            max_train = stage_config(config, stage)[1]
            examples = tokenize(tasks[name].train(), peer.tokenizer, config.max_length, tasks[name].fingerprint, Path(folder), max_train)
            manifest = ours["manifests"][f"lora_base/{first}" if stage == 1 else f"lora_transfer/{first}_to_{second}"]
            seconds += peer.train(examples, stage, manifest["steps"])
            tokens += manifest["tokens"]
            for cell in cells:
                spent, count = peer.score(tasks[cell])
                cell_seconds, items = cell_seconds + spent, items + count
    mine = [m for name, m in ours["manifests"].items() if name in (f"lora_base/{first}", f"lora_transfer/{first}_to_{second}")]
    my_rate = sum(m["tokens"] for m in mine) / sum(m["seconds"] for m in mine)
    found = {
        "train_tokens_per_s": tokens / seconds, "items_per_s": items / cell_seconds,
        "ratio_training": my_rate * seconds / tokens, "ratio_scoring": ours["items_per_s"] * cell_seconds / items,
    }  # fmt: skip
    print(f"peer       transformers + peft: {tokens:.0f} tokens at {found['train_tokens_per_s']:.0f} tokens/s (ours {my_rate:.0f}, "
          f"{found['ratio_training']:.2f} x), {items:.0f} items at {found['items_per_s']:.1f} items/s (ours {ours['items_per_s']:.1f}, "
          f"{found['ratio_scoring']:.2f} x)")  # fmt: skip
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The big study at measured rates


def rate_of(file: str | None, given: float | None, kind: str) -> float:
    """tokens/s: given, or of ours from a result's JSON (its last line, or a file that holds it alone)."""
    if given:
        return given
    if not file:
        raise LetheError(f"--extrapolate needs --{kind} FILE, or --{kind}_tokens_per_s")
    try:
        result = json.loads(Path(file).read_text().strip().splitlines()[-1] if Path(file).suffix != ".json" else Path(file).read_text())
        if kind == "train_step":
            return result["tokens_per_s"]["ours"]["median"]
        found = {name: figures for name, figures in result["stops"].items() if name.startswith("ours")}
        return max(figures["tokens_per_s"]["median"] for figures in found.values())
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise LetheError(f"{file} holds no result of benchmarks/{kind}.py ({error!r})") from error


def extrapolate(training: float, decoding: float, forward: float, run_seconds: float) -> dict:
    """Prints and returns the seconds of the five tasks' study. training, decoding, forward: tokens/s."""
    names = list(TASKS)
    pairs = len(names) * (len(names) - 1)
    runs = len(names) + ARMS * pairs
    # A task is trained on once in stage 1, and in stage 2 as the second of 4 pairs in each arm.
    times_trained = 1 + ARMS * (len(names) - 1)
    row_tokens = {name: min(task.rows, MOST_ROWS) * task.row_tokens for name, task in TASKS.items()}
    train_tokens = EPOCHS * times_trained * sum(row_tokens.values())
    # Perplexities under each start model, shared by the arms: a task is second of 4 pairs.
    perplexity_tokens = (len(names) - 1) * sum(row_tokens.values())
    # A task is scored under the base, every stage-1 adapter, and each run whose first or second it is.
    times_scored = 1 + len(names) + ARMS * 2 * (len(names) - 1)
    prompts = times_scored * sum(task.items * (task.prompt_tokens + task.answer_tokens) for task in TASKS.values())
    answers = times_scored * sum(task.items * task.answer_tokens for task in TASKS.values())
    most = times_scored * sum(task.items * task.most_tokens for task in TASKS.values())
    parts = {
        "training": train_tokens / training,
        "perplexities": perplexity_tokens / forward,
        "scoring: prompts": prompts / forward,
        "scoring: answers": answers / decoding,
        "around the runs": runs * run_seconds,
    }
    total = sum(parts.values())
    worst = total + (most - answers) / decoding
    print(
        f"rates      training {training:.0f}, forward {forward:.0f}, decoding {decoding:.0f} tokens/s; {run_seconds:g} s around each run\n"
    )
    rows = [
        [name, min(t.rows, MOST_ROWS), f"{t.row_tokens:.1f}", t.items, f"{t.prompt_tokens:.1f}", f"{t.answer_tokens:.1f}", t.most_tokens]
        for name, t in TASKS.items()
    ]
    print(format_table(rows, ["task", "rows", "tokens a row", "test items", "prompt tokens", "answer tokens", "at most"]))
    one, cells = sum(row_tokens.values()), len(names) * times_scored

    def spent(part: str, tokens: float, rate: float) -> str:
        return f"= {tokens / 1e6:.1f} M tokens / {rate:.0f} = {parts[part]:.0f} s"

    lines = [
        f"runs       {len(names)} tasks + {pairs} pairs x {ARMS} arms = {runs}; cells: {len(names)} tasks x {times_scored} = {cells}",
        f"training   sum of rows x tokens = {one / 1e6:.2f} M; x {times_trained} runs a task x {EPOCHS} epochs "
        + spent("training", train_tokens, training),
        f"perplexity {one / 1e6:.2f} M x {len(names) - 1} start models " + spent("perplexities", perplexity_tokens, forward),
        f"prompts    sum of items x (prompt + answer) x {times_scored} " + spent("scoring: prompts", prompts, forward),
        f"answers    sum of items x answer x {times_scored} " + spent("scoring: answers", answers, decoding),
        f"around     {runs} runs x {run_seconds:g} s = {parts['around the runs']:.0f} s",
        f"total      {total:.0f} s = {total / 60:.1f} minutes; {worst / 60:.1f} if no answer ever ends before its task's limit "
        f"({most / 1e6:.1f} M tokens)",
    ]
    print("\n" + "\n".join(lines))
    return {
        "mode": "extrapolate", "seconds": total, "seconds_if_no_answer_ends": worst, "parts": parts, "runs": runs,
        "train_tokens": train_tokens, "answer_tokens": answers,
        "rates": {"training": training, "forward": forward, "decoding": decoding, "seconds_around_a_run": run_seconds},
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help=" ".join(TOY))
    parser.add_argument("--peer", action="store_true", help="the plain arm's two runs by transformers + peft too")
    parser.add_argument("--extrapolate", action="store_true", help="the time of the five tasks' study, by arithmetic")
    parser.add_argument("--train_step", help="JSON of benchmarks/train_step.py")
    parser.add_argument("--decode", help="JSON of benchmarks/decode.py")
    parser.add_argument("--train_step_tokens_per_s", type=float, help="instead of --train_step")
    parser.add_argument("--decode_tokens_per_s", type=float, help="instead of --decode")
    parser.add_argument("--forward_tokens_per_s", type=float, help="of passes without gradient; default: twice the training rate")
    parser.add_argument("--run_seconds", type=float, default=3.0, help="around a run: reading, writing, logging (default 3)")
    parser.add_argument("--json", help="write the result there too")
    args, flags = parser.parse_known_args(argv)
    if args.extrapolate and flags:
        parser.error(f"unknown with --extrapolate: {' '.join(flags)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(common.machine_lines(device))
    try:
        if args.extrapolate:
            training = rate_of(args.train_step, args.train_step_tokens_per_s, "train_step")
            decoding = rate_of(args.decode, args.decode_tokens_per_s, "decode")
            # A pass without gradient is half of forward and dX.
            result = extrapolate(training, decoding, args.forward_tokens_per_s or 2 * training, args.run_seconds)
        else:
            chosen = any(flag.split("=")[0] in ("--pairs", "--datasets", "--config") for flag in flags)
            flags = [*([] if chosen else SMALL), *(TOY if args.toy else []), "--mmlu", "null", *flags]  # the peer has no such column
            result = run_parts(flags)
            if args.peer:
                result["peer"] = peer_parts(flags, result)
    except LetheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print()
    common.finish({"benchmark": "study", **result}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
