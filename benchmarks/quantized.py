"""Times and weighs a base in full, in 8 and in 4 bits, held whole and streamed from host memory.

    python benchmarks/quantized.py [--preset cpu|1b|toy] [--device cpu|cuda] [--dtype float32|bfloat16] [--streamed 0.5] [--toy]

The base's MiB (embeddings and head included, on the device and in all); a training pass over --tokens tokens with LoRA, forward
and backward; greedy decoding of 16 sequences; and how far the losses of random tokens move from those of the base in full.
--streamed: the share of the layers that waits in host memory in the second half of the table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from benchmarks import common  # noqa: E402
from data.batching import collate  # noqa: E402
from lora import add_lora  # noqa: E402
from masking.score import micro_nll  # noqa: E402
from model import generate, load_model  # noqa: E402
from model.offload import Layout, stream_layers  # noqa: E402
from model.quantized import base_size  # noqa: E402


def row(folder: Path, kind: str, share: float, args: argparse.Namespace) -> dict:
    """The figures of one base. share: of its layers, streamed."""
    model = load_model(folder, getattr(torch, args.dtype), "cpu" if share else args.device, kind)
    size = on_device = base_size(model)[1]
    if share:
        one, layers = Layout.of(model.model.layers[0]).size, model.config.num_hidden_layers
        away = round(share * layers)
        on_device = size - (away - 2) * one
        stream_layers(model, args.device, on_device + 2**16)  # a little more, for what is padded
    add_lora(model, 16, 16.0, generator=torch.Generator().manual_seed(0))
    examples = common.random_examples(256, model.config.vocab_size, shrink=8 if args.preset == "toy" else 1)
    count = next(n for n in range(1, 257) if examples.lengths[:n].sum() >= args.tokens or n == 256)
    micro = collate(examples, list(range(count)), 2**30, None)[0].to(model.device)
    tokens = len(micro.input_ids)
    memory = common.Memory(args.device)

    def train() -> None:
        model.train()
        micro_nll(model, micro).sum().backward()

    seconds = common.seconds_of(train, args.device, args.repeats)
    extra = memory.extra_mib()
    model.eval()
    prompts = [list(range(1, 33))] * 16
    decoding = common.seconds_of(lambda: generate(model, prompts, args.new, [], batch_size=16), args.device, 1)
    with torch.no_grad():
        nll = micro_nll(model, micro).cpu()
    return {
        "base": kind, "streamed": share, "device_mib": on_device / 2**20, "base_mib": size / 2**20, "tokens": tokens,
        "train_tokens_per_s": tokens / seconds, "extra_mib": extra, "decode_tokens_per_s": 16 * args.new / decoding, "nll": nll,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(common.SHAPES), default="cpu")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, float32 on CPU")
    parser.add_argument("--tokens", type=int, default=2000, help="at least so many in a training pass")
    parser.add_argument("--new", type=int, default=32, help="tokens that each sequence is given")
    parser.add_argument("--streamed", type=float, default=0.75)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="a few seconds, for tests")
    parser.add_argument("--out", help="also write the last line there")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.toy:
        args.preset, args.tokens, args.new, args.repeats = "toy", 100, 4, 1
    print(common.machine_lines(args.device))
    head = f"base   streamed  on device    in all {'train tok/s':>12} {'extra MiB':>10} {'decode tok/s':>13} {'loss off':>9}"
    print(f"{args.preset}, {args.dtype}; MiB of the base\n{head}\n{'-' * len(head)}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = common.write_model(common.SHAPES[args.preset], Path(scratch))
        layers = common.SHAPES[args.preset].layers
        for share in (0.0, args.streamed):
            if share and round(share * layers) < 3:
                print(f"streamed   {layers} layers are too few: two of them are always on the device")
                continue
            for kind in ("none", "int8", "nf4"):
                found = row(folder, kind, share, args)
                rows.append(found)
                found["nll_moves_by"] = (found["nll"] - rows[0]["nll"]).abs().mean().item()
                print(
                    f"{kind:6} {share:8.0%} {found['device_mib']:10.1f} {found['base_mib']:9.1f} {found['train_tokens_per_s']:12.0f} "
                    f"{found['extra_mib']:10.1f} {found['decode_tokens_per_s']:13.0f} {found['nll_moves_by']:9.2g}",
                    flush=True,
                )
    rows = [{key: value for key, value in found.items() if key != "nll"} for found in rows]
    common.finish({"benchmark": "quantized", "preset": args.preset, "dtype": args.dtype, "device": args.device, "rows": rows}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
