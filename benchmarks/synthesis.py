"""Synthesis of rehearsal items: how many a minute, in batches, one prompt at a time, and by transformers one at a time.

    python benchmarks/synthesis.py                                   # nano on mini_gsm8k
    python benchmarks/synthesis.py --model DIR --task superni/qa --data_root data --device cuda
    python benchmarks/synthesis.py --toy                             # seconds, to see that everything runs

Every contender begins with an empty file and makes the same number of valid items under the same settings. "same" is the share of
lines equal to those of the largest batch. transformers has other random numbers, and no stop text, as in the project
that the method comes from: each of its samples runs on until its own end or --peer_tokens, and gives its first pair. It makes
--peer_items of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks.common import finish, machine_lines, synchronize  # noqa: E402
from data.folder import find_task  # noqa: E402
from data.pairs import Limits, parse  # noqa: E402
from data.superni import definition_of, demonstrations  # noqa: E402
from data.synthesis import _Maker, synthesize  # noqa: E402
from model.generate import Decoder  # noqa: E402
from model.subject import load_subject  # noqa: E402
from study.errors import run_command  # noqa: E402
from study.logging import format_table  # noqa: E402


@torch.inference_mode()
def peer_items(peer, maker: _Maker, budget: int, most: int, new_tokens: int) -> tuple[int, int]:
    """(valid items, samples) of transformers' generate, a prompt at a time."""
    limits, tokenizer, items = maker.limits, maker.subject.tokenizer, 0
    torch.manual_seed(0)
    for index in range(most):
        prompt = torch.tensor([maker.prompt_of(index)[0]], device=peer.device)
        ids = peer.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=True, temperature=limits.temperature,
            top_p=limits.top_p, top_k=0, repetition_penalty=limits.repetition_penalty, eos_token_id=sorted(tokenizer.stop_ids),
            pad_token_id=0,
        )[0, prompt.shape[1] :].tolist()  # fmt: skip
        for question, answer in parse(tokenizer.decode(ids))[0][:1]:
            if not maker.judge.reason(question, answer):
                maker.judge.add(question)
                items += 1
        if items == budget:
            break
    return items, index + 1


def run(args: argparse.Namespace) -> dict:
    task, limits = find_task(args.task, args.data_root), Limits(repetition_penalty=args.repetition_penalty)
    subject = load_subject(args.model, args.device, args.dtype)
    definition, demos, device = definition_of(task), demonstrations(task), subject.model.device.type
    print(machine_lines(device))
    print(subject.about)
    found: dict[str, dict] = {}
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for batch in sorted({*args.batch_sizes, 1}, reverse=True):
            decoder, seconds = Decoder(subject.model, batch), 0.0
            for name in ("warm", str(batch)):  # the first is a few items, and not counted
                out, budget = Path(folder) / f"{batch}-{name}.jsonl", args.budget if name != "warm" else 2
                synchronize(device)
                began = time.perf_counter()
                report = synthesize(
                    subject, task.name, definition, demos, budget, limits=limits, out=out, batch_size=batch, decoder=decoder
                )  # fmt: skip
                synchronize(device)
                seconds = time.perf_counter() - began
            mine = out.read_text(encoding="utf-8").splitlines()
            lines = lines or mine
            same = sum(a == b for a, b in zip(mine, lines, strict=True)) / len(lines)
            found[f"batch {batch}"] = {"items": report.kept, "samples": report.attempts, "seconds": seconds, "same": same}
        if not args.alone:
            from transformers import LlamaForCausalLM

            peer = LlamaForCausalLM.from_pretrained(subject.model.source, dtype=subject.model.dtype).to(device).eval()
            maker, began = _Maker(subject, task.name, definition, demos, limits, 0), time.perf_counter()
            items, samples = peer_items(peer, maker, args.peer_items, limits.attempts * args.peer_items, args.peer_tokens)
            found["transformers"] = {"items": items, "samples": samples, "seconds": time.perf_counter() - began, "same": None}
    for row in found.values():
        row["items_per_minute"] = 60 * row["items"] / row["seconds"]
    rows = [[name, row["items"], row["samples"], f"{row['seconds']:.1f}", f"{row['items_per_minute']:.0f}",
             "-" if row["same"] is None else f"{row['same']:.1%}"] for name, row in found.items()]  # fmt: skip
    print(f"\n{task.name}, {limits}\n" + format_table(rows, ["", "items", "samples", "seconds", "items/minute", "same"]))
    ours = max(row["items_per_minute"] for name, row in found.items() if name != "transformers")
    ratios = {name: ours / row["items_per_minute"] for name, row in found.items()}
    return {"task": task.name, "model": args.model, "settings": vars(args), "contenders": found, "best_over": ratios}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--task", default="mini_gsm8k")
    parser.add_argument("--data_root", default="data")
    parser.add_argument("--budget", type=int, default=200, help="items (200)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64], help="beside one at a time (64)")
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--peer_items", type=int, default=10, help="of transformers (10)")
    parser.add_argument(
        "--peer_tokens", type=int, default=512, help="of a sample of transformers (512; the project: up to 2048 with the prompt)"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--toy", action="store_true", help="a few items")
    parser.add_argument("--out", help="a file for the JSON of the last line")
    args = parser.parse_args(argv)
    if args.toy:
        args.budget, args.batch_sizes, args.peer_items, args.peer_tokens = 6, [4], 1, 40

    return run_command(lambda: finish({"benchmark": "synthesis", **run(args)}, args.out))


if __name__ == "__main__":
    sys.exit(main())
