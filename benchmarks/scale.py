"""How long a study takes on N GPUs, by simulation; and what models of 1B to 70B need in memory and time, by arithmetic.

    python benchmarks/scale.py                         # five tasks, three arms: 65 runs, their seconds by arithmetic
    python benchmarks/scale.py --study out/nano        # the seconds of a study's own run.json, which leave out scoring
    python benchmarks/scale.py --runs seconds.json     # {"a": 50, "a_to_b": {"seconds": 60, "parent": "a"}}
    python benchmarks/scale.py --toy                   # few trials, to see that it runs

Nothing here was measured on N GPUs: it is for planning, and a rate of your own wins (--study, --tokens_per_s).

The simulation is train.py --shard runs on independent workers: a free one takes the first run of the queue whose parent is done.
Order "plan" is the study's own, "longest" takes the longest runs first. In each trial every worker is slow with probability --slow
(it takes --slow_factor times as long) and dies after a time from an exponential distribution of mean --mtbf hours. A run that dies
keeps what its last checkpoint holds, one every --save seconds of work, and is taken over after --timeout seconds of silence. The
worker is back after --restart seconds; --start seconds pass until it works, and --around seconds go before each run.
Efficiency is the runs' seconds over N times the median makespan. No schedule is shorter than max(sum / N, longest chain of parent and
child). The arithmetic stands at the head of benchmarks/roofline.py.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks.common import finish  # noqa: E402
from benchmarks.roofline import GIB, MODELS, Machine, Work, needs, plan_table  # noqa: E402
from benchmarks.study import EPOCHS, MOST_ROWS, TASKS  # noqa: E402
from study.errors import LetheError, run_command  # noqa: E402
from study.folder import is_done, read_json  # noqa: E402
from study.logging import format_table  # noqa: E402
from study.plan import plan_runs  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
# The simulation


@dataclass(frozen=True)
class Job:
    name: str
    seconds: float  # on an ordinary worker
    parent: str | None = None


@dataclass(frozen=True)
class Faults:
    """Seconds, see above; mtbf 0: workers do not die."""

    start: float = 0.0
    around: float = 0.0
    slow: float = 0.0
    slow_factor: float = 2.0
    mtbf: float = 0.0
    save: float = 300.0
    timeout: float = 60.0
    restart: float = 300.0


def makespan(jobs: list[Job], workers: int, faults: Faults = Faults(), seed: int = 0) -> float:  # noqa: B008
    """Seconds until the last job is done. jobs in the order of the queue; a parent that is none of them counts as done."""
    rng = random.Random(seed)
    rank = {job.name: i for i, job in enumerate(jobs)}
    waiting, done, saved = list(range(len(jobs))), set(), [0.0] * len(jobs)
    pace = [faults.slow_factor if rng.random() < faults.slow else 1.0 for _ in range(workers)]

    def lifetime() -> float:
        return rng.expovariate(1 / faults.mtbf) if faults.mtbf else float("inf")

    dies = [faults.start + lifetime() for _ in range(workers)]
    idle, events, number, now = list(range(workers)), [], 0, faults.start  # events: (time, number, what, worker, job)

    def at(time: float, what: str, worker: int, job: int) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (time, number, what, worker, job))

    while len(done) < len(jobs):
        for worker in sorted(idle):
            ready = (job for job in waiting if jobs[job].parent not in rank or rank[jobs[job].parent] in done)
            job, back = next(ready, None), dies[worker] + faults.restart + faults.start
            if dies[worker] <= now:  # it died while it had nothing to do
                idle.remove(worker)
                at(max(now, back), "back", worker, -1)
            elif job is not None:
                idle.remove(worker)
                waiting.remove(job)
                end = now + faults.around + (jobs[job].seconds - saved[job]) * pace[worker]
                if end <= dies[worker]:
                    at(end, "done", worker, job)
                else:
                    worked = saved[job] + max(0.0, dies[worker] - now - faults.around) / pace[worker]
                    saved[job] = max(saved[job], worked // faults.save * faults.save)
                    at(dies[worker] + faults.timeout, "free", worker, job)
                    at(back, "back", worker, -1)
        if not events:
            raise LetheError(f"the runs wait for one another: {', '.join(jobs[job].name for job in waiting[:4])}; mend their parents")
        if number > 1000 * (len(jobs) + workers):
            raise LetheError(f"runs die faster than they are saved, with {faults.save:g} s between checkpoints; lower --save")
        now = events[0][0]
        while events and events[0][0] == now:  # all of this moment, before anyone chooses
            _, _, what, worker, job = heapq.heappop(events)
            if what == "free":
                waiting = sorted([*waiting, job])
                continue
            idle.append(worker)
            if what == "done":
                done.add(job)
            else:
                dies[worker] = now + lifetime()
    return now


def longest_first(jobs: list[Job]) -> list[Job]:
    return sorted(jobs, key=lambda job: -job.seconds)


def least(jobs: list[Job], workers: int) -> float:
    """Seconds that no schedule can beat: all hands busy, or the longest chain."""
    by_name = {job.name: job for job in jobs}

    def chain(job: Job) -> float:
        return job.seconds + (chain(by_name[job.parent]) if job.parent in by_name else 0.0)

    return max(sum(job.seconds for job in jobs) / workers, *(chain(job) for job in jobs))


def simulate(jobs: list[Job], counts: list[int], faults: Faults, trials: int) -> list[dict]:
    found, work, calm = [], sum(job.seconds for job in jobs), replace(faults, slow=0.0, mtbf=0.0)
    for workers in counts:
        for order, queue in (("plan", jobs), ("longest", longest_first(jobs))):
            spans = sorted(makespan(queue, workers, faults, seed) for seed in range(trials))
            median, p95 = statistics.median(spans), spans[-(-95 * len(spans) // 100) - 1]
            found.append({"gpus": workers, "order": order, "median": median, "p95": p95, "without_faults": makespan(queue, workers, calm),
                          "efficiency": work / (workers * median), "least": least(jobs, workers)})  # fmt: skip
    return found


def jobs_of_study(folder: Path) -> list[Job]:
    """Finished runs by their run.json, stage 1 before stage 2, all seeds."""
    files = sorted(folder.rglob("run.json"))
    manifests = [(file, read_json(file)) for file in files if is_done(file.parent)]
    if not manifests:
        raise LetheError(f"{folder}: no finished run in it; give a study's folder, such as out/nano")
    jobs = []
    for file, manifest in sorted(manifests, key=lambda item: item[1]["run"]["stage"]):
        name, run = file.parent.relative_to(folder).as_posix(), manifest["run"]
        tree = name.removesuffix(run["folder"])  # seed0/ and so on
        jobs.append(Job(name, manifest["seconds"], tree + run["parent"] if run["parent"] else None))
    return jobs


def jobs_of_file(file: Path) -> list[Job]:
    jobs = []
    for name, value in read_json(file).items():
        value = value if isinstance(value, dict) else {"seconds": value}
        if not isinstance(value.get("seconds"), (int, float)) or value["seconds"] < 0:
            raise LetheError(f"{file}: {name} has no seconds; write a number, or {{'seconds': 60, 'parent': 'lora_base/a'}}")
        jobs.append(Job(name, value["seconds"], value.get("parent")))
    return jobs


def jobs_of_plan(tokens_per_s: float, arms: int) -> list[Job]:
    """The five tasks' study of configs/masking.yaml (benchmarks/study.py), every pair under this many arms."""
    seconds = {name: EPOCHS * min(task.rows, MOST_ROWS) * task.row_tokens / tokens_per_s for name, task in TASKS.items()}
    runs = plan_runs(list(TASKS), [f"arm{n}" for n in range(arms)])
    return [Job(run.folder, seconds[run.task], run.parent) for run in runs]


# ----------------------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--study", help="a study folder, whose runs' seconds count")
    made.add_argument("--runs", help="a JSON file of seconds")
    made.add_argument("--tokens_per_s", type=float, help="of training, instead of the arithmetic's for LoRA on a 1B model")
    made.add_argument("--arms", type=int, default=3, help="of the five tasks' study")
    made.add_argument("--gpus", default="1,2,4,8,16,32", help="numbers of GPUs")
    made.add_argument("--trials", type=int, default=200)
    made.add_argument("--start", type=float, default=20.0, help="seconds until a worker works: imports, the model")
    made.add_argument("--around", type=float, default=2.0, help="seconds around a run: tokens, adapters")
    made.add_argument("--slow", type=float, default=0.1, help="share of slow workers")
    made.add_argument("--slow_factor", type=float, default=2.0, help="how much longer they take")
    made.add_argument("--mtbf", type=float, default=24.0, help="hours until a worker dies, in the mean; 0: never")
    made.add_argument("--save", type=float, default=60.0, help="seconds of work between checkpoints: --save_steps times a step")
    made.add_argument("--timeout", type=float, default=60.0, help="seconds of silence until a run is taken over")
    made.add_argument("--restart", type=float, default=300.0, help="seconds until a dead worker is there again")
    made.add_argument("--flops", type=float, default=790.0, help="TFLOP/s of a 16-bit matmul (an H200's)")
    made.add_argument("--share", type=float, default=0.6, help="of --flops that training reaches: a goal, not a measurement")
    made.add_argument("--bandwidth", type=float, default=4.3, help="TB/s of memory, reads and writes together (an H200's)")
    made.add_argument("--memory", type=float, default=139.0, help="GiB of a GPU (an H200's)")
    made.add_argument("--link", type=float, default=0.35, help="TB/s that a GPU sends to the others of its machine (8 of them; NVLink 4)")
    made.add_argument("--network", type=float, default=0.04, help="TB/s that it sends to other machines (400 Gbit/s a GPU)")
    made.add_argument("--micro_tokens", type=int, default=16384, help="tokens in a pass of one GPU")
    made.add_argument("--toy", action="store_true", help="few trials")
    made.add_argument("--out", help="a file for the JSON of the last line")
    return made


def run(a: argparse.Namespace) -> None:
    counts, trials = [int(part) for part in a.gpus.split(",")], 5 if a.toy else a.trials
    if min(counts) < 1 or trials < 1 or a.save <= 0:
        raise LetheError("--gpus, --trials and --save must be above 0")
    machine = Machine(a.flops * 1e12, a.share, a.bandwidth * 1e12, a.memory * GIB, a.link * 1e12, a.network * 1e12)
    work = Work(tokens=a.micro_tokens, length=256, loss_share=0.5, rank=16)
    if a.study or a.runs:
        jobs, source = jobs_of_study(Path(a.study)) if a.study else jobs_of_file(Path(a.runs)), a.study or a.runs
    else:
        rate = a.tokens_per_s or needs(*MODELS["1B"], "LoRA", 1, False, work, machine)["tokens_per_s"]
        jobs, source = jobs_of_plan(rate, a.arms), f"five tasks' study at {rate / 1e3:.1f} k tokens/s"
    faults = Faults(a.start, a.around, a.slow, a.slow_factor, 3600 * a.mtbf, a.save, a.timeout, a.restart)
    total = sum(job.seconds for job in jobs)
    print(f"runs       {len(jobs)} of {total / 60:.1f} minutes together: {source}")
    slow = f"{a.slow:.0%} of the workers take {a.slow_factor:g} times as long"
    print(f"faults     {slow}, each dies once in {a.mtbf:g} h, a checkpoint every {a.save:g} s; {trials} trials\n")
    spans = simulate(jobs, counts, faults, trials)
    minutes = {key: [f"{found[key] / 60:.1f}" for found in spans] for key in ("median", "p95", "without_faults", "least")}
    columns = [[s["gpus"] for s in spans], [s["order"] for s in spans], minutes["median"], minutes["p95"],
               [f"{s['efficiency']:.0%}" for s in spans], minutes["without_faults"], minutes["least"]]  # fmt: skip
    headers = ["GPUs", "order", "minutes, median", "95 %", "efficiency", "without faults", "no less than"]
    print(format_table([list(row) for row in zip(*columns, strict=True)], headers))
    few = [n for n in counts if n <= 16]
    table, plans = plan_table(few, work, machine)
    passes = f"{work.tokens} tokens in a pass, LoRA of rank {work.rank}, {a.share:.0%} of {a.flops:g} TFLOP/s"
    print(f"\nmemory of a GPU and tokens/s of all, by arithmetic: {passes}")
    print("LoRA on several GPUs is --shard none, full is --shard model; *: with --gradient_checkpointing")
    print(format_table(table, ["model", "method", *(f"{n} GPU{'s' * (n > 1)}" for n in few)]))
    result = {"benchmark": "scale", "toy": a.toy, "source": source, "runs": len(jobs), "seconds": total, "trials": trials}
    finish({**result, "faults": asdict(faults), "makespans": spans, "machine": asdict(machine), "plans": plans}, a.out)


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
