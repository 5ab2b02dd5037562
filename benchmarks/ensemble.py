"""An ensemble of K adapters through one base against K separate evaluations: time, memory, and how far the probabilities are apart.

    python benchmarks/ensemble.py                                    # four adapters on nano, mini_aqua's 200 test items
    python benchmarks/ensemble.py --members 8 --task mini_openbookqa
    python benchmarks/ensemble.py --toy                              # seconds, to see that everything runs

All sides load the same adapter files (random factors of rank 16 on all linears, saved first) and score the same options. Each call begins
with the files and ends with probabilities. "merged" is what eval.py does K times: load an adapter, merge it, tokenise, score, take it
out again; "beside" leaves it beside the weights; "ensemble" loads all K and scores them in the same passes. Contenders take turns in one
process, round by round, in this order and the other way round; ratios are of one round's times. On CPU times are processor seconds of
this process, which other programs on the machine disturb less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks.common import finish, machine_lines, shown, spread, synchronize  # noqa: E402
from data.folder import find_task  # noqa: E402
from lora import add_lora, load_adapter, save_adapter  # noqa: E402
from lora.layers import lora_layers, merged  # noqa: E402
from lora.probabilistic import columns_of, predict, predict_members  # noqa: E402
from model import load_model, load_tokenizer  # noqa: E402
from study.errors import run_command  # noqa: E402
from study.logging import format_table  # noqa: E402


def measure(name: str, task_name: str, members: int, rounds: int, device: str, dtype: str, max_items: int | None, rank: int = 16) -> dict:
    model, tokenizer, task = load_model(name, getattr(torch, dtype), device), load_tokenizer(name), find_task(task_name)

    def column():
        return columns_of([task], [], tokenizer, 1024, max_items)[task_name]

    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(k) for k in range(members)]
        for k, folder in enumerate(folders):
            generator = torch.Generator().manual_seed(k)
            add_lora(model, rank, 2.0 * rank, generator=generator)
            for layer in lora_layers(model).values():
                layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.02)
            save_adapter(model, folder)

        def separate(merge: bool) -> np.ndarray:
            found = []
            for folder in folders:
                load_adapter(model, folder)
                if merge:
                    with merged(model):
                        found.append(predict(model, column().questions)[0])
                else:
                    found.append(predict(model, column().questions)[0])
            return np.stack(found)

        contenders = {
            "merged": lambda: separate(True), "beside": lambda: separate(False),
            "ensemble": lambda: predict_members(model, folders, [column()])[0],
        }  # fmt: skip
        clock = time.process_time if device == "cpu" else time.perf_counter
        found, times = {side: call() for side, call in contenders.items()}, {side: [] for side in contenders}  # this round is not counted
        for number in range(rounds):
            for side in list(contenders)[:: 1 if number % 2 else -1]:
                synchronize(device)
                began = clock()
                contenders[side]()
                synchronize(device)
                times[side].append(clock() - began)
    questions = column().questions
    return {
        "model": name, "task": task_name, "members": members, "rank": rank, "items": len(questions),
        "tokens": sum(len(q.prompt) for q in questions), "device": device, "dtype": dtype,
        "clock": "processor" if device == "cpu" else "wall", "rounds": rounds, "times": times,
        "differences": {side: float(np.abs(found[side] - found["ensemble"]).max()) for side in ("merged", "beside")},
    }  # fmt: skip


def report(result: dict) -> None:
    times = result["times"]
    rows = []
    for name, found in times.items():
        ratios = [ours / theirs for ours, theirs in zip(times["ensemble"], found, strict=True)]
        difference = result["differences"].get(name)
        fastest = min(times["ensemble"]) / min(found)  # what disturbs can only add time
        rows.append([name, shown(found, ".3f"), shown(ratios, ".3f"), f"{fastest:.3f}", "-" if difference is None else f"{difference:.1e}"])
        result.setdefault("ratios", {})[name] = spread(ratios) | {"fastest": fastest}
    print(f"{result['members']} adapters of rank {result['rank']} on {result['model']}, {result['task']}: {result['items']} items, "
          f"{result['tokens']} prompt tokens a member; {result['rounds']} rounds")  # fmt: skip
    headers = ["side", f"{result['clock']} seconds", "ensemble / side", "of the fastest", "largest difference of probabilities"]
    print(format_table(rows, headers))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--task", default="mini_aqua")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--items", type=int, help="at most so many items of the task")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--toy", action="store_true", help="two members, eight items, one round")
    parser.add_argument("--out", help="a file for the JSON of the last line")
    arguments = parser.parse_args(argv)
    if arguments.toy:
        arguments.members, arguments.items, arguments.rounds = 2, 8, 1

    def work() -> None:
        print(machine_lines(arguments.device))
        result = measure(arguments.model, arguments.task, arguments.members, arguments.rounds, arguments.device, arguments.dtype,
                         arguments.items, arguments.rank)  # fmt: skip
        report(result)
        finish({"benchmark": "ensemble", **result}, arguments.out)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
