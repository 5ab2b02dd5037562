"""Beam search against transformers' at its best batch: new tokens of the chosen hypotheses a second, and how many outputs are the same.

    python benchmarks/beam.py             # the CPU configuration: 32 ragged prompts, 32 new tokens, 4 beams
    python benchmarks/beam.py --toy       # seconds, to see that everything runs

Both sides load the same folder of seeded random weights, and take turns in one process, round by round: the ratio is the
median of the rounds' ratios. transformers gets its prompts sorted by length and padded on the left, at several batch sizes
of which the fastest counts; prompts and prefill count in the time. With --stops an id ends hypotheses, as texts do: the
commonest one of what the model says.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks.common import SHAPES, finish, machine_lines, shown, spread  # noqa: E402
from benchmarks.decode import PRESETS, peer_generate, ragged_prompts, share_same, take_turns, write_model  # noqa: E402
from model import load_model  # noqa: E402
from model.beam import beam_search  # noqa: E402
from study.logging import format_table  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a smaller model, fewer prompts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--length_penalty", type=float, default=1.0)
    parser.add_argument("--no_repeat_ngram_size", type=int, default=0)
    parser.add_argument("--stops", action="store_true", help="an id ends hypotheses")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="a file for the JSON of the last line")
    arguments = parser.parse_args(argv)
    device, dtype, count, new, batches = arguments.device, getattr(torch, arguments.dtype), 32, 32, (4, 8, 16, 32)
    settings = PRESETS["cpu"]
    if arguments.toy:
        settings, count, new, batches = replace(PRESETS["toy"], shape=replace(SHAPES["toy"], vocabulary=512)), 6, 6, (3, 6)
    prompts = ragged_prompts(settings, count)
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        weights = write_model(settings.shape, Path(folder), settings.seed)
        ours = load_model(weights, dtype, device)
        theirs = LlamaForCausalLM.from_pretrained(weights, dtype=dtype).to(device).eval()
    how = {"num_beams": arguments.beams, "length_penalty": arguments.length_penalty,
           "no_repeat_ngram_size": arguments.no_repeat_ngram_size}  # fmt: skip
    print(machine_lines(device))
    print(f"model      {settings.shape}, {device}, {arguments.dtype}; {count} prompts of {settings.prompt_tokens}, {new} new; {how}")
    stops: list[int] = []
    if arguments.stops:
        said = Counter(token for ids in beam_search(ours, prompts, new, [], **how) for token in ids[1:])
        stops = [said.most_common(1)[0][0]]
    contenders = {"ours": lambda: beam_search(ours, prompts, new, stops, batch_size=count * arguments.beams, **how)}
    for batch in batches:
        contenders[f"transformers {batch}"] = lambda b=batch: peer_generate(theirs, prompts, new, stops, b, **how)
    times, outputs = take_turns(contenders, arguments.rounds, device)

    best = min((name for name in contenders if name != "ours"), key=lambda name: statistics.median(times[name]))
    rows, figures = [], {}
    for name in contenders:
        tokens, same = sum(map(len, outputs[name])), share_same(outputs["ours"], outputs[name])
        rates = [tokens / seconds for seconds in times[name]]
        ratios = [theirs / ours for theirs, ours in zip(times[name], times["ours"], strict=True)]
        figures[name] = {"seconds": spread(times[name]), "tokens_per_s": spread(rates), "tokens": tokens, "same_outputs": same,
                         "times_ours": spread(ratios)}  # fmt: skip
        rows.append([name, tokens, f"{statistics.median(times[name]):.3f}", shown(rates), shown(ratios, ".2f"), f"{same:.1%}"])
    print("\n" + format_table(rows, ["", "new tokens", "seconds", "tokens/s", "time over ours", "same as ours"]))
    print(f"\nours over {best}, its best: {figures[best]['times_ours']['median']:.2f}x")
    finish({"benchmark": "beam", "how": how, "stops": len(stops), "best": best, "ratio": figures[best]["times_ours"]["median"],
            "contenders": figures}, arguments.out)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
