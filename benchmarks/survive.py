"""Kills a study with SIGKILL at random moments, starts it again until it is done, and compares it with one that ran undisturbed.

    python benchmarks/survive.py [--kills 20] [--seed 0] [--optimizers] [--out FILE]

Compared bit for bit: adapters, outputs of every test item, results, perplexities, loss curves (without times), and what
TensorBoard shows, in which no curve may fold back. The study is small (a random Llama, two tasks, both stages, two masks or
two optimizers), on the CPU. A kill is planned for a phase (a step, a save, perplexity scoring, evaluation, or any moment at
all); the phase that it really hit is read from marks that the process leaves on entering and leaving each. Ends with 1 where
anything differs.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # runs as a script, from anywhere

from study.folder import read_json, read_jsonl, write_json  # noqa: E402

# phase -> the function that is that phase while it runs
PHASES = {
    "step": "train:forward_backward",
    "save": "train:save_checkpoint",
    "scoring": "masking.bench:score_examples",
    "evaluation": "eval:score_task",
    "report": "train:report",
}
TASKS = ("mini_svamp", "mini_simpleqa")
SETTINGS = ["--max_train", "32", "--max_test", "4", "--epochs", "3", "--batch_size", "8", "--gradient_accumulation", "1",
            "--max_length", "256", "--max_new_tokens", "8", "--learning_rate", "1e-2", "--log_steps", "2", "--save_steps", "3",
            "--keep", "2", "--device", "cpu", "--dtype", "float32"]  # fmt: skip
STUDY = ("--datasets", ",".join(TASKS), "--pairs", ":".join(TASKS), "--mask", "none,bottom10", *SETTINGS)  # four runs
OPTIMIZERS = ("--datasets", ",".join(TASKS), "--compare_optimizers", *SETTINGS)  # four runs, without masks
ONE_RUN = ("--datasets", TASKS[1], "--stage", "1", *SETTINGS)
PASSING = {"time", "seconds", "memory_gib", "train/tokens_per_s", "train/memory_gib"}  # what may differ: times and memory

# ----------------------------------------------------------------------------------------------------------------------
# One process that trains, and the hand that stops it


@dataclass
class Attempt:
    """How one start of the command ended. phases: what it was in, innermost last, when it was stopped; [] between phases."""

    status: int  # the exit status; -9: killed
    phases: list[str]
    output: str
    seconds: float
    entered: dict[str, list[float]] = field(default_factory=dict)  # phase -> seconds that each of its calls took


@dataclass(frozen=True)
class Place:
    """A moment of the process: on entering or leaving the number-th call of a function, or of a phase."""

    where: str  # a phase, or module:function as the caller sees it
    number: int = 1
    leaving: bool = False
    wait: bool = True  # hold still there until the signal comes; else go on, and it comes somewhere behind


def work(words: list[str], log: str, marks: str, place: Place | None, changes: str | None, reached: object) -> None:
    """The forked process: `python train.py {words}`, marking its phases, telling `reached` at the place."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    trace = os.open(marks, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def wrap(where: str, before, after) -> None:
        module, _, name = where.partition(":")
        module = importlib.import_module(module)
        function, calls = getattr(module, name), [0]

        def call(*args, **kwargs):
            calls[0] += 1
            before(calls[0])
            try:
                return function(*args, **kwargs)
            finally:
                after(calls[0])

        setattr(module, name, call)

    def at_place(number: int) -> None:
        if number == place.number:
            reached.send_bytes(b"here")
            while place.wait:
                time.sleep(0.05)  # a single long one would sleep through a signal that comes just before it begins

    def mark(sign: str, phase: str) -> None:
        os.write(trace, f"{time.perf_counter()} {sign} {phase}\n".encode())

    import study.report
    import train

    if place is not None:
        sides = (lambda _: None, at_place) if place.leaving else (at_place, lambda _: None)
        wrap(PHASES.get(place.where, place.where), *sides)
    for phase, where in PHASES.items():
        wrap(where, lambda _, phase=phase: mark(">", phase), lambda _, phase=phase: mark("<", phase))
    study.report.draw_all = lambda rows, folder: []  # pictures take longer than all the rest
    if changes:
        module, _, name = changes.partition(":")
        getattr(importlib.import_module(module), name)()
    status = train.main(words)
    sys.stdout.flush()
    os._exit(status)


class Bench:
    """Starts the command in processes that are forked from one which has imported everything: half a second a start, not four."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.context = multiprocessing.get_context("forkserver")
        # With what they import only when it is used, which would be most of a start.
        late = ["torch.utils.tensorboard", "torch._dynamo", "rouge_score.tokenizers", "rouge_score.rouge_scorer"]
        self.context.set_forkserver_preload(["train", *late, "benchmarks.survive"])
        self.model = toy_model(folder / "model")
        before = dict(os.environ)
        # One thread: the server that the processes are forked from must have started no other.
        os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), *filter(None, [before.get("PYTHONPATH")])])
        try:
            self.start(folder, "--print_config")  # brings up the server, which keeps this environment
        finally:
            os.environ.clear()
            os.environ.update(before)

    def start(
        self, out: Path, *more: str, study: tuple[str, ...] = STUDY, place: Place | None = None, after: float | None = None,
        number: int = signal.SIGKILL, changes: str | None = None,
    ) -> Attempt:  # fmt: skip
        """One start of the study in `out`, sent the signal `after` seconds behind its reaching the place, or behind the start.

        study, more: the words of the command. changes: "module:function", called in the process before it begins.
        """
        words = [*study, "--model", str(self.model), "--out", str(out), *more]
        log, marks = self.folder / "log.txt", self.folder / "marks.txt"
        here, there = self.context.Pipe(duplex=False)
        target = importlib.import_module("benchmarks.survive").work  # also where this file runs as __main__
        began = time.perf_counter()
        process = self.context.Process(target=target, args=(words, str(log), str(marks), place, changes, there))
        process.start()
        there.close()
        try:
            if place is not None:
                here.recv_bytes()
                time.sleep(after or 0)
            elif after is not None:
                process.join(after)
            if place is not None or after is not None:
                os.kill(process.pid, number)
            process.join(300)
        except (EOFError, ProcessLookupError):  # it was done before
            process.join(300)
        finally:
            here.close()
            if process.exitcode is None:
                process.kill()
        phases, entered = read_marks(marks)
        return Attempt(process.exitcode, phases, log.read_text(), time.perf_counter() - began, entered)


def read_marks(file: Path) -> tuple[list[str], dict[str, list[float]]]:
    """(phases that were entered and not left, seconds of every call of each)."""
    inside: list[tuple[str, float]] = []
    seconds: dict[str, list[float]] = {}
    for line in file.read_text().splitlines():
        at, sign, phase = line.split()
        if sign == ">":
            inside.append((phase, float(at)))
        else:
            _, entered = inside.pop()
            seconds.setdefault(phase, []).append(float(at) - entered)
    return [phase for phase, _ in inside], seconds


def toy_model(folder: Path) -> Path:
    """A Llama of one narrow layer with random weights and the built-in tokenizer."""
    from benchmarks.common import Shape
    from benchmarks.make_random_llama import make
    from model.checkpoint import NANO

    source = folder / "source"
    write_json(source / "config.json", {**Shape(32, 64, 1, 2, 1, 16, 2048).raw(), "initializer_range": 0.15})
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        shutil.copyfile(NANO / name, source / name)
    make(source, folder / "toy")
    return folder / "toy"


# ----------------------------------------------------------------------------------------------------------------------
# What must be equal


def outcome(out: Path) -> dict[str, object]:
    """Everything a study leaves that may not depend on how often it was killed."""
    found: dict[str, object] = {}
    weights = ("adapter_model.safetensors", "adapter_config.json", "model.safetensors")
    measured = ("drift.json", "dev.json", "logs/final_results.json")  # of a comparison of optimizers
    for pattern in (*weights, *measured, "eval/*.jsonl", "eval_results*.json", "perplexity/*.safetensors"):
        for file in out.rglob(pattern):
            if "checkpoints" not in file.parts:
                found[str(file.relative_to(out))] = file.read_bytes()
    for file in out.rglob("metrics.jsonl"):
        found[str(file.relative_to(out))] = [without(row) for row in read_jsonl(file)]
    for file in out.rglob("run.json"):
        found[str(file.relative_to(out))] = without(read_json(file))
    for folder in (out / "tensorboard").iterdir():
        found[str(folder.relative_to(out))] = board_of(folder)
    return found


def without(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in PASSING}


def board_of(folder: Path) -> dict[str, list]:
    """What TensorBoard shows of a run: tag -> (step, value), values of scalars only. AssertionError where a curve folds back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each purge
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0, "images": 0})
    board.Reload()
    tags, shown = board.Tags(), {}
    for kind, read in (("scalars", board.Scalars), ("tensors", board.Tensors), ("histograms", board.Histograms)):
        for tag in tags[kind]:
            events = read(tag)
            steps = [event.step for event in events]
            assert steps == sorted(set(steps)), f"{folder.name}: {tag} folds back: {steps}"
            values = [event.value if kind == "scalars" and tag not in PASSING else None for event in events]
            shown[tag] = list(zip(steps, values, strict=True))
    return shown


def unequal(one: dict, other: dict) -> list[str]:
    """Names of what differs between two outcomes."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


# ----------------------------------------------------------------------------------------------------------------------
# Kills


def planned(rng: random.Random, whole: Attempt, phases: list[str]) -> list[dict]:
    """A moment for each phase named that the study has: behind a random call's entry, by a random share of what such a call takes.

    whole: the study undisturbed. "any": behind a random share of the first half of it.
    """
    moments = []
    for phase in phases:
        if phase == "any":
            moments.append({"after": rng.random() * whole.seconds / 2})
        elif phase in whole.entered:
            usual = sorted(whole.entered[phase])[len(whole.entered[phase]) // 2]
            call = rng.randint(1, {"step": 5, "save": 3, "scoring": 1, "evaluation": 2, "report": 1}[phase])
            moments.append({"place": Place(phase, call, wait=False), "after": rng.random() * usual})
    return moments


# In the order in which a study comes to them, so that every kill finds what it is meant for.
ROUND = ["any", "step", "save", "step", "save", "scoring", "any", "save", "evaluation", "evaluation"]


def killed_study(bench: Bench, out: Path, moments: list[dict], study: tuple[str, ...] = STUDY) -> tuple[list[Attempt], Attempt]:
    """Starts a study again and again, killing it at each moment in turn -> (those that were cut, the one that came to its end)."""
    cut = []
    for moment in moments:
        attempt = bench.start(out, study=study, **moment)
        if attempt.status == 0:
            return cut, attempt
        assert attempt.status == -signal.SIGKILL, f"it ended with {attempt.status} and not by the kill:\n{attempt.output}"
        cut.append(attempt)
    last = bench.start(out, study=study)
    assert last.status == 0, f"it ended with {last.status}:\n{last.output}"
    return cut, last


def run(args: argparse.Namespace) -> dict:
    from benchmarks.common import machine_lines

    print(machine_lines("cpu"))
    rng, hits, differing, attempts = random.Random(args.seed), [], [], 0
    study = OPTIMIZERS if args.optimizers else STUDY
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        whole = bench.start(Path(folder) / "whole", study=study)
        assert whole.status == 0, whole.output
        reference = outcome(Path(folder) / "whole")
        print(f"undisturbed {whole.seconds:.1f} s; {len(reference)} things to compare; "
              + ", ".join(f"{len(times)} calls of {phase}" for phase, times in whole.entered.items()))  # fmt: skip
        wanted = {"step", "save", "scoring", "evaluation"} & set(whole.entered)
        while len(hits) < args.kills or not wanted <= set(hits):
            attempts += 1
            out = Path(folder) / f"study{attempts}"
            cut, _ = killed_study(bench, out, planned(rng, whole, ROUND), study)
            hits += [attempt.phases[-1] if attempt.phases else "between" for attempt in cut]
            wrong = unequal(outcome(out), reference)
            differing += [f"study{attempts}: {name}" for name in wrong]
            print(f"study {attempts}: killed {len(cut)} times, in {', '.join(hits[len(hits) - len(cut) :])}: "
                  + (f"DIFFERS in {', '.join(wrong)}" if wrong else "equal to the last bit"), flush=True)  # fmt: skip
            shutil.rmtree(out)
    counts = {phase: hits.count(phase) for phase in [*PHASES, "between"]}
    print("kills      " + ", ".join(f"{count} in {phase}" for phase, count in counts.items() if count))
    return {"kills": len(hits), "phases": counts, "studies": attempts, "compared": len(reference), "differing": differing}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizers", action="store_true", help="the study compares AdamW with Muon, instead of masks")
    parser.add_argument("--out", help="write the result there too (JSON)")
    args = parser.parse_args(argv)
    from benchmarks.common import finish

    result = run(args)
    finish({"benchmark": "survive", **result}, args.out)
    return 1 if result["differing"] else 0


if __name__ == "__main__":
    sys.exit(main())
