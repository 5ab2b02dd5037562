"""Greedy decoding against transformers' generate: tokens/s, step time and whether the tokens are the same.

    python benchmarks/decode.py                        # the CPU configuration
    python benchmarks/decode.py --preset 1b            # the shape of Llama-3.2-1B on CUDA, bfloat16
    python benchmarks/decode.py --toy                  # seconds, to see that everything runs

Both sides load the same folder of seeded random weights, as they are after merging an adapter. Contenders take turns in one
process, round by round. transformers gets its prompts sorted by length and padded on the left; prompts and prefill count in
the time, new tokens alone in tokens/s.

    fixed    every prompt gets all its new tokens: no token ends a sequence
    stops    more prompts than slots, and ids that end sequences, picked from what the model says so that the mean length is
             half the limit: a finished sequence's slot takes the next prompt, where transformers waits for its batch's longest

On CUDA a step's time is that of a whole run less one with a single new token; its bound counts the weights and the cache at the
device's bandwidth, and the arithmetic at its rate (--bandwidth, --flops; an H200 by default):
max(weight bytes / bandwidth, batch * 2 * parameters / rate) + cache bytes / bandwidth.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks.common import SHAPES, Shape, finish, machine_lines, shown, spread, synchronize  # noqa: E402
from benchmarks.make_random_llama import make  # noqa: E402
from model import load_model  # noqa: E402
from model.generate import Decoder, generate  # noqa: E402
from study.folder import write_json  # noqa: E402
from study.logging import format_table  # noqa: E402


@dataclass(frozen=True)
class Settings:
    shape: Shape
    device: str
    dtype: str
    prompts: int
    prompt_tokens: tuple[int, int]  # shortest and longest
    new_tokens: int
    batch_sizes: tuple[int, ...]  # of ours; the last is the one that counts
    peer_batch_sizes: tuple[int, ...]  # the first is the reference, the best is sought among all
    stop_prompts: int  # of the part with stops
    rounds: int
    seed: int = 0


PRESETS = {
    "cpu": Settings(replace(SHAPES["cpu"], vocabulary=4096), "cpu", "float32", 64, (16, 96), 64, (64,), (16, 32, 64), 256, 5),
    "1b": Settings(SHAPES["1b"], "cuda", "bfloat16", 512, (128, 128), 128, (64, 256, 512), (64, 256), 512, 2),
    "toy": Settings(replace(SHAPES["toy"], vocabulary=512), "cpu", "float32", 8, (4, 12), 6, (8,), (4, 8), 32, 2),
}


def write_model(shape: Shape, folder: Path, seed: int) -> Path:
    """Seeded random weights, large enough that the layers outweigh the embedding: else a tied model repeats its last token."""
    write_json(folder / "source" / "config.json", {**shape.raw(), "initializer_range": 1.6 / math.sqrt(shape.hidden)})
    make(folder / "source", folder / "model", seed)
    return folder / "model"


def ragged_prompts(settings: Settings, count: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(settings.seed)
    low, high = settings.prompt_tokens
    lengths = torch.randint(low, high + 1, (count,), generator=g).tolist()
    return [torch.randint(0, settings.shape.vocabulary, (n,), generator=g).tolist() for n in lengths]


@torch.inference_mode()
def peer_generate(peer, prompts: list[list[int]], new: int, stops: list[int], batch: int, **more) -> list[list[int]]:
    """transformers' greedy generate in batches of prompts sorted by length, cut at the first stop id."""
    results: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for at in range(0, len(order), batch):
        chunk = order[at : at + batch]
        longest = max(len(prompts[i]) for i in chunk)
        padding = [longest - len(prompts[i]) for i in chunk]
        ids = torch.tensor([[0] * pad + prompts[i] for pad, i in zip(padding, chunk, strict=True)]).to(peer.device)
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding]).to(peer.device)
        out = peer.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=stops or None, pad_token_id=0, **more
        )
        for i, row in zip(chunk, out[:, longest:].tolist(), strict=True):
            results[i] = row[: next((k for k, token in enumerate(row) if token in stops), len(row))]
    return results


def scripted_stops(outputs: list[list[int]], new: int) -> list[int]:
    """Ids that end these outputs at about half of `new` tokens on average, at lengths as spread as the outputs allow.

    Each output in turn gives the id at a place drawn for it, until the mean is there; one that would end others early, and
    bring the mean far below, is passed over.
    """
    g = torch.Generator().manual_seed(0)
    places = torch.randint(1, new, (len(outputs),), generator=g).tolist()
    stops: set[int] = set()
    lengths = [len(ids) for ids in outputs]
    for ids, place in zip(outputs, places, strict=True):
        token = ids[place]
        cut = [min(n, other.index(token)) if token in other else n for n, other in zip(lengths, outputs, strict=True)]
        if sum(cut) >= 0.45 * new * len(outputs):
            stops.add(token)
            lengths = cut
        if sum(lengths) <= 0.5 * new * len(outputs):
            break
    return sorted(stops)


def take_turns(contenders: dict[str, Callable[[], object]], rounds: int, device: str) -> tuple[dict[str, list[float]], dict[str, list]]:
    """Seconds of each call, round by round, after one that is not counted; and what that one returned."""
    first: dict[str, list] = {}
    for name in list(contenders):
        first[name] = contenders[name]()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            synchronize(device)
            began = time.perf_counter()
            call()
            synchronize(device)
            times[name].append(time.perf_counter() - began)
    return times, first


def share_same(ours: list[list[int]], theirs: list[list[int]]) -> float:
    return statistics.mean(float(a == b) for a, b in zip(ours, theirs, strict=True))


def compare(title: str, contenders: dict[str, tuple[int, Callable]], rounds: int, device: str, reference: str) -> dict:
    """Times contenders {name: (prompts it takes, call)}; prints a table; returns the figures of each."""
    times, outputs = take_turns({name: call for name, (_, call) in contenders.items()}, rounds, device)
    figures, rows = {}, []
    for name, (count, _) in contenders.items():
        tokens = sum(map(len, outputs[name]))
        rates = [tokens / seconds for seconds in times[name]]
        same = share_same(outputs[reference][:count], outputs[name])
        figures[name] = {"tokens_per_s": spread(rates), "seconds": spread(times[name]), "tokens": tokens, "same_tokens": same}
        rows.append([name, count, tokens, shown(rates), f"{statistics.median(times[name]):.3f}", f"{same:.1%}"])
    print(f"\n{title}\n" + format_table(rows, ["", "prompts", "new tokens", "tokens/s", "seconds", "same as ours"]), flush=True)
    return figures


def rate(figures: dict, name: str) -> float:
    return figures[name]["tokens_per_s"]["median"]


def step_bound(shape: Shape, batch: int, context: float, bandwidth: float, flops: float) -> float:
    """Seconds of a step, 16-bit weights and cache, see above."""
    parameters = shape.layers * sum(out * inn for out, inn in shape.linears.values()) + shape.vocabulary * shape.hidden
    cache = batch * context * shape.layers * 2 * shape.kv_heads * shape.head_dim * 2
    return max(2 * parameters / bandwidth, batch * 2 * parameters / flops) + cache / bandwidth


def run(settings: Settings, arguments: argparse.Namespace) -> dict:
    device, new = settings.device, settings.new_tokens
    dtype = getattr(torch, settings.dtype)
    more = ragged_prompts(settings, max(settings.prompts, settings.stop_prompts))
    prompts, more = more[: settings.prompts], more[: settings.stop_prompts]
    peer = None
    with tempfile.TemporaryDirectory() as folder:
        weights = write_model(settings.shape, Path(folder), settings.seed)
        model = load_model(weights, dtype, device)
        if not arguments.alone:
            from transformers import LlamaForCausalLM

            peer = LlamaForCausalLM.from_pretrained(weights, dtype=dtype).to(device).eval()
    print(machine_lines(device))
    print(f"model      {settings.shape}, {device}, {settings.dtype}; {settings.prompts} prompts of {settings.prompt_tokens}, {new} new")
    # A peer's batch decides how many prompts it takes on CUDA: a run of one batch is long enough there.
    whole = device == "cpu"
    decoders = {batch: Decoder(model, batch) for batch in settings.batch_sizes}
    contenders: dict[str, tuple[int, Callable]] = {}
    for batch in settings.batch_sizes:
        mine = prompts if whole else prompts[:batch]
        contenders[f"ours {batch}"] = len(mine), lambda p=mine, b=batch: generate(model, p, new, [], decoder=decoders[b])
    for batch in settings.peer_batch_sizes if peer is not None else ():
        mine = prompts if whole else prompts[:batch]
        contenders[f"transformers {batch}"] = len(mine), lambda p=mine, b=batch: peer_generate(peer, p, new, [], b)
        if device == "cuda" and arguments.static:
            name = f"transformers static {batch}"
            contenders[name] = len(mine), lambda p=mine, b=batch: peer_generate(peer, p, new, [], b, cache_implementation="static")
    ours = f"ours {settings.batch_sizes[-1]}"
    fixed = compare("fixed lengths", contenders, settings.rounds, device, ours)
    result: dict = {"preset": arguments.preset, "settings": {**settings.__dict__, "shape": settings.shape.__dict__}, "fixed": fixed}

    batch = settings.batch_sizes[-1] if whole else min(256, settings.batch_sizes[-1])
    stops = scripted_stops(generate(model, more, new, [], decoder=decoders[settings.batch_sizes[-1]]), new)
    contenders = {f"ours {batch}": (len(more), lambda: generate(model, more, new, stops, decoder=decoders[batch]))}
    if peer is not None:
        for size in settings.peer_batch_sizes if whole else (batch,):
            contenders[f"transformers {size}"] = len(more), lambda b=size: peer_generate(peer, more, new, stops, b)
    result["stops"] = compare(f"scripted stops ({len(stops)} ids)", contenders, settings.rounds, device, f"ours {batch}")

    peers = {kind: [name for name in result[kind] if name.startswith("transformers")] for kind in ("fixed", "stops")}
    if peer is not None:
        theirs = f"transformers {settings.peer_batch_sizes[0]}"
        result["ratio"] = rate(fixed, ours) / rate(fixed, theirs)
        result["ratio_best"] = rate(fixed, ours) / max(rate(fixed, name) for name in peers["fixed"])
        result["ratio_stops"] = rate(result["stops"], f"ours {batch}") / max(rate(result["stops"], name) for name in peers["stops"])
        result["same_tokens"] = fixed[theirs]["same_tokens"]
        best, stopped = result["ratio_best"], result["ratio_stops"]
        print(f"\nours over {theirs}: {result['ratio']:.2f}x; over its best: {best:.2f}x, with stops {stopped:.2f}x")

    rows, result["steps"] = [], {}
    for batch in settings.batch_sizes:
        mine = prompts if whole else prompts[:batch]
        one, _ = take_turns({"one": lambda p=mine, b=batch: generate(model, p, 1, [], decoder=decoders[b])}, settings.rounds, device)
        per_step = (fixed[f"ours {batch}"]["seconds"]["median"] - statistics.median(one["one"])) / (new - 1) / -(-len(mine) // batch)
        found = {"prefill_ms": 1e3 * statistics.median(one["one"]), "step_ms": 1e3 * per_step, "tokens_per_s": batch / per_step}
        if device == "cuda":
            context = sum(map(len, mine)) / len(mine) + new / 2
            found["bound_ms"] = 1e3 * step_bound(settings.shape, batch, context, arguments.bandwidth * 1e12, arguments.flops * 1e12)
            found["share_of_bound"] = found["bound_ms"] / found["step_ms"]
        result["steps"][batch] = found
        rows.append([batch, *(f"{value:.3f}" if value < 100 else f"{value:.0f}" for value in found.values())])
    print("\nour steps\n" + format_table(rows, ["batch", *found]))
    if device == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--toy", action="store_true", help="the smallest preset")
    parser.add_argument("--device", help="instead of the preset's")
    parser.add_argument("--rounds", type=int, help="instead of the preset's")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--static", action="store_true", help="on CUDA, also transformers' static cache, which it compiles")
    parser.add_argument("--threads", type=int, help="of PyTorch on CPU")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s, reads and writes together (an H200's)")
    parser.add_argument("--flops", type=float, default=790.0, help="TFLOP/s of a 16-bit matmul (an H200's)")
    parser.add_argument("--out", help="a file for the JSON of the last line")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.preset = "toy" if arguments.toy else arguments.preset
    settings = PRESETS[arguments.preset]
    changes = {"device": arguments.device, "rounds": arguments.rounds}
    settings = replace(settings, **{name: value for name, value in changes.items() if value})
    if settings.device == "cuda" and not torch.cuda.is_available():
        print("error: this machine has no CUDA device", file=sys.stderr)
        return 2
    finish({"benchmark": "decode", **run(settings, arguments)}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
