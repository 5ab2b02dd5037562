"""Grows a random model and tells seconds, peak memory, and whether transformers agrees on what was grown.

    python benchmarks/growth.py [--preset 1b|cpu|toy] [--factor 2] [--order stack] [--zero_init] [--noise 0] [--dtype bfloat16] [--toy]

The growth runs in a process of its own; its peak is the resident set above what the interpreter and torch held before, mapped
pages included. Beside it: the bytes of two layers and the embedding. The grown folder is then loaded by transformers and by
this project, one after the other, and their logits on 16 random tokens are compared in --dtype. In bfloat16 the two round at
other places; float32 needs twice the memory and tells more.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks import common  # noqa: E402
from model import load_model  # noqa: E402

WORK = """
import json, sys, time
from model.growth import grow
from benchmarks.common import Memory
source, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
held, began = Memory("cpu"), time.perf_counter()
growth = grow(source, out, **options)
print(json.dumps({
    "seconds": time.perf_counter() - began, "peak_mib": held.extra_mib(), "layers": len(growth.map), "parameters": growth.parameters,
    "gigabytes": growth.nbytes / 1e9, "connection_rate": growth.connection_rate, "logit_difference": growth.logit_difference,
}))
"""


@torch.inference_mode()
def logits_of(folder: Path, theirs: bool, dtype: torch.dtype, tokens: torch.Tensor) -> torch.Tensor:
    """(T, V) float32, of a model that is gone afterwards."""
    if theirs:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        logits = model(tokens).logits[0].float()
    else:
        model = load_model(folder, dtype)
        logits = model(tokens)[0].float()
    del model
    gc.collect()
    return logits


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(common.SHAPES), default="1b")
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--order", default="stack")
    parser.add_argument("--zero_init", action="store_true")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="in which the logits are compared")
    parser.add_argument("--scratch", help="a folder with room for both models; default: the system's")
    parser.add_argument("--toy", action="store_true", help="a few seconds, for tests")
    parser.add_argument("--out", help="also write the last line there")
    args = parser.parse_args(argv)
    args.preset = "toy" if args.toy else args.preset
    shape = common.SHAPES[args.preset]
    print(common.machine_lines("cpu"), flush=True)
    layer = sum(out * inn for out, inn in shape.linears.values()) + 2 * shape.hidden
    bound = 2 * (2 * layer + shape.vocabulary * shape.hidden) / 2**20
    if args.scratch:
        Path(args.scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        source, grown = common.write_model(shape, Path(scratch)), Path(scratch) / "grown"
        options = {"factor": args.factor, "order": args.order, "zero_init": args.zero_init, "noise": args.noise}
        command = [sys.executable, "-c", WORK, source, grown, json.dumps(options)]
        done = subprocess.run(command, cwd=common.REPO, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        print(f"grown      {shape.layers} -> {found['layers']} layers, {found['parameters']:,} parameters, {found['gigabytes']:.2f} GB, "
              f"in {found['seconds']:.1f} s")  # fmt: skip
        print(f"memory     {found['peak_mib']:.0f} MiB above the interpreter's (two layers and the embedding: {bound:.0f} MiB)", flush=True)
        tokens = torch.randint(shape.vocabulary, (1, 16), generator=torch.Generator().manual_seed(0))
        theirs, ours = (logits_of(grown, which, getattr(torch, args.dtype), tokens) for which in (True, False))
        difference = (theirs - ours).abs().max().item()
        spread, agree = ours.std().item(), (theirs.argmax(-1) == ours.argmax(-1)).sum().item()
        print(f"agreement  transformers loads it; in {args.dtype} the logits differ by at most {difference:.2g} (their spread is "
              f"{spread:.2g}), the likeliest token is the same at {agree} of {tokens.numel()} positions")  # fmt: skip
    found |= {"bound_mib": bound, "max_logit_difference": difference, "logit_spread": spread, "argmax_same": agree, "dtype": args.dtype}
    common.finish({"benchmark": "growth", "preset": args.preset, **options, **found}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
