"""Writes a Llama folder of real shape with random weights, for measuring speed and memory where the real ones are not at hand.

    python benchmarks/make_random_llama.py --config DIR --out DIR [--seed 0]

DIR of --config holds config.json and the tokenizer's files (any released Llama folder; its weights are not read). The weights are
bfloat16, drawn per tensor from (seed, name): the same seed gives the same bytes, however they are cut into files. One file
of at most --shard_mib is in memory at a time. Speed does not depend on what the weights are; scores mean nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script, from anywhere

from model.checkpoint import load_config, read_json, write_tensors  # noqa: E402
from model.llama import Llama  # noqa: E402
from study.errors import LetheError  # noqa: E402
from study.folder import write_json  # noqa: E402

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


def random_tensor(name: str, shape: torch.Size, seed: int, std: float) -> torch.Tensor:
    """bfloat16 noise of a tensor's own generator; ones for a norm."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, std, generator=generator)


def make(source: Path, out: Path, seed: int = 0, shard_mib: int = 1024) -> list[str]:
    """Writes the folder and returns the names of its weight files. LetheError where out already holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LetheError(f"--out {out} is not empty; give a new folder")
    config, raw = load_config(source), read_json(source / "config.json")
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama(config).named_parameters()}
    shards, size = [[]], 0
    for name, shape in shapes.items():
        nbytes = 2 * shape.numel()
        if shards[-1] and size + nbytes > shard_mib * 2**20:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    out.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    files = [f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        write_tensors(out / file, {name: random_tensor(name, shapes[name], seed, raw.get("initializer_range", 0.02)) for name in names})
    if len(files) > 1:
        total = sum(2 * shape.numel() for shape in shapes.values())
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    raw.pop("dtype", None)
    write_json(out / "config.json", {**raw, "torch_dtype": "bfloat16"})
    return files


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a folder with config.json and the tokenizer's files")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard_mib", type=int, default=1024, help="most MiB in one file (default 1024)")
    args = parser.parse_args(argv)
    try:
        files = make(Path(args.config), Path(args.out), args.seed, args.shard_mib)
    except LetheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: {', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
