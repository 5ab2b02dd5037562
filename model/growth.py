"""Growth: makes a deeper Llama of a trained one by repeating its layers (arXiv 2405.15319).

    python -m model.growth --source DIR --out DIR [--factor 2 | --layers N] --order stack|interpolate|gradual|partial:12-345*7-6
                           [--zero_init] [--noise 0.2] [--seed 0] [--shard_size 5GB] [--tokens 300e9]

The embedding, the final norm and the head are copied; layer i of the grown model takes every tensor of layer map[i] of the
source, in the dtype it has there. Orders, with L layers in the source:
    stack        0 .. L-1, again 0 .. L-1, ...: the paper's G_stack
    interpolate  each layer beside its copies: 0 0 1 1 2 2
    gradual      the top layers are repeated on top, at most as many as there are, until the target is reached (6 -> 8: 0..5 4 5)
    partial:...  layers from 1, as the paper writes them: 12-345*7-6 is 1 2, then 3 4 5 seven times, then 6. A digit is a layer; in a
                 block with a comma or .. whole numbers are: 1..8-9..12*3-13..16; a single layer above 9 is written 10,
A stacked model does not compute what its source did; with --zero_init it does: the copies add nothing until they are trained.

Weights are streamed, at most one tensor in memory; the folder is built under another name, read again and compared, and renamed.
growth.json tells where it comes from.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from model.checkpoint import fill, find_model, load_config, load_model, read_json
from model.config import LlamaConfig
from model.layer_map import connection_rate, growth_timing, layer_map, new_layers
from model.llama import LINEAR_NAMES, Llama
from model.stream import Piece, chunks, pieces_of, same_bytes, tensor_at, write_stream, zeros
from study.errors import LetheError, run_command
from study.folder import write_error, write_json
from study.logging import progress

# What a model folder holds beside its weights and config.json.
COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "generation_config.json",
          "chat_template*", "LICENSE*", "USE_POLICY*", "NOTICE*")  # fmt: skip
OUTPUTS = ("o_proj", "down_proj")  # what a layer adds to the residual stream goes through these
LOADED_GIB = 4.0  # logits are compared where source and grown model, in float32 and one at a time, stay below it
TOLERANCE = 1e-5  # of the logits after --zero_init

# ----------------------------------------------------------------------------------------------------------------------
# The content of a grown tensor


@dataclass(frozen=True)
class Recipe:
    """How a tensor of the grown model comes from the source: copied, zero, or noised."""

    name: str
    piece: Piece  # of the source
    zero: bool
    noise: float  # the share of it
    variance: float  # of the noise
    seed: int

    def content(self) -> Iterator[bytes | memoryview]:
        if self.noise:
            return self.noised()
        return zeros(self.piece.nbytes) if self.zero else chunks(self.piece)

    def noised(self) -> Iterator[memoryview]:
        """(1 - a) W + a eps, in float32 and rounded once; eps comes from the tensor's own generator, so no order matters."""
        digest = hashlib.sha256(f"{self.seed} {self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        for block in tensor_at(self.piece).flatten().split(2**20):
            mixed = torch.empty(block.shape).normal_(0, self.noise * math.sqrt(self.variance), generator=generator)
            if not self.zero:
                mixed.add_(block, alpha=1 - self.noise)
            yield memoryview(mixed.to(block.dtype).view(torch.uint8).numpy())


def recipes(source: Path, config: LlamaConfig, layers: list[int], zero_init: bool, noise: float, seed: int) -> list[Recipe]:
    """One for every tensor of the grown model, in its order. config: of the grown model."""
    pieces, fresh, found = pieces_of(source), set(new_layers(layers)), []
    with torch.device("meta"):
        names = [name for name, _ in Llama(config).named_parameters()]
    for name in names:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if not match:
            found.append(Recipe(name, pieces[name], False, 0.0, 0.0, seed))
            continue
        index, rest = int(match[1]), match[2]
        linear, leaf = rest.split(".")[-2:]
        piece = pieces[f"model.layers.{layers[index]}.{rest}"]
        deep = linear in OUTPUTS
        variance = 1 / (config.hidden_size * len(layers) ** 2) if deep else 2 / (5 * config.hidden_size)
        share = noise if linear in LINEAR_NAMES and leaf == "weight" else 0.0
        found.append(Recipe(name, piece, zero_init and deep and index in fresh, share, variance, seed))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Growing a folder


@dataclass(frozen=True)
class Growth:
    """What was grown; growth.json holds it."""

    source: str
    source_fingerprint: str  # as load_model tells it
    fingerprint: str  # of the grown model
    order: str
    map: list[int]
    connection_rate: float
    zero_init: bool
    noise: float
    seed: int
    parameters: int  # of the grown model
    tensors: int
    zeroed: int  # tensors that are zero by zero_init
    noised: int
    nbytes: int  # of the weights
    logit_difference: float | None  # largest, between source and grown model, after --zero_init where both could be loaded


def grow(
    source: str | Path, out: str | Path, *, factor: int | None = None, layers: int | None = None, order: str = "stack",
    zero_init: bool = False, noise: float = 0.0, seed: int = 0, shard_size: str | int = "5GB",
) -> Growth:  # fmt: skip
    """Writes the grown model of a Hugging Face Llama folder (a hub id, "nano") to the folder `out` and compares it with its source.

    factor or layers: how deep, by default factor 2; a partial order tells it itself. zero_init: the output projections (o_proj,
    down_proj) of the layers that are copies are zero, so that the logits stay. noise: a in W <- (1 - a) W + a eps (arXiv
    2405.15319), for the linears of all layers as the authors do, for in a stack no copy is newer than another; eps is normal
    with variance 1 / (d l^2) for o_proj and down_proj and 2 / (5 d) for the others, d the hidden size and l the layers of the
    grown model, as the grown model would be initialised. It is told by seed and name of the tensor alone, and ends what
    zero_init keeps. shard_size: most bytes in one file, as "5GB" or a number.

    The same growth again finds its folder and leaves it. Raises LetheError for a source that is none, an `out` that holds
    something else, an order that does not fit, too little space.
    """
    folder, out = find_model(str(source)).resolve(), Path(out).expanduser().resolve()
    most = read_size(shard_size)
    if out == folder or folder in out.parents:
        raise LetheError(f"--out {out} is the source or lies in it; give another folder")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise LetheError(f"{folder} is an adapter, and adapters are not grown; merge it into its base first (python -m lora.merge)")
    if not 0 <= noise < 1:
        raise LetheError(f"--noise must be at least 0 and below 1, not {noise}")
    raw, config = read_json(folder / "config.json"), load_config(folder)
    plan = layer_map(config.num_hidden_layers, depth(config.num_hidden_layers, factor, layers, order), order)
    check_zero_init(plan, config.num_hidden_layers, zero_init)
    source_fingerprint = fingerprint_of(folder)
    told = {"source_fingerprint": source_fingerprint, "map": plan, "zero_init": zero_init, "noise": noise, "seed": seed}
    if found := read_growth(out):
        if any(getattr(found, key) != value for key, value in told.items()):
            raise LetheError(f"--out {out} holds another growth (see its growth.json); give a new folder")
        fingerprint_of(out)  # LetheError where it has been damaged
        return found
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LetheError(f"--out {out} is {'not empty' if out.is_dir() else 'a file'}; give a new folder")

    grown = grown_config(raw, plan)
    work = recipes(folder, LlamaConfig.from_dict(grown, str(folder / "config.json")), plan, zero_init, noise, seed)
    total = sum(recipe.piece.nbytes for recipe in work)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep(out)
        if (free := shutil.disk_usage(out.parent).free) < total + 2**20:
            raise LetheError(f"no space left for {out}: it takes {total / 1e9:.1f} GB and {free / 1e9:.1f} are free; free some")
        making = out.with_name(f".{out.name}.{os.getpid()}.growing")
        with made_whole(making, out):
            write_weights(making, work, most, total)
            verify(making, work)
            for pattern in COPIED:
                for file in folder.glob(pattern):
                    if file.is_file():
                        shutil.copyfile(file, making / file.name)
            write_json(making / "config.json", grown)
            growth = Growth(
                str(folder), source_fingerprint, fingerprint_of(making), order, plan, connection_rate(plan), zero_init, noise, seed,
                sum(math.prod(recipe.piece.shape) for recipe in work), len(work),
                sum(recipe.zero and not recipe.noise for recipe in work), sum(recipe.noise > 0 for recipe in work), total,
                compare_logits(folder, making, work, seed) if zero_init and not noise else None,
            )  # fmt: skip
            write_json(making / "growth.json", asdict(growth))
    except OSError as error:
        raise write_error(out, error) from error
    return growth


def depth(source: int, factor: int | None, layers: int | None, order: str) -> int | None:
    """Layers of the grown model; None where a partial order tells them."""
    if factor is not None and layers is not None:
        raise LetheError("give --factor or --layers, not both")
    if factor is not None and factor < 2:
        raise LetheError(f"--factor must be 2 or more, not {factor}")
    if layers is not None and layers <= source:
        raise LetheError(f"--layers {layers}: growth wants more than the source's {source}")
    if factor is None and layers is None:
        return None if order.startswith("partial") else 2 * source
    return layers or source * factor


def check_zero_init(plan: list[int], layers: int, zero_init: bool) -> None:
    """With the copies silent the model is its originals in their order: only all of them, in the source's order, compute the same."""
    originals = [source for i, source in enumerate(plan) if source not in plan[:i]]
    if zero_init and originals != list(range(layers)):
        shown = " ".join(str(source + 1) for source in originals)
        raise LetheError(f"--zero_init cannot keep the function: the layers first occur as {shown}, not as 1 to {layers}")


def grown_config(raw: dict, plan: list[int]) -> dict:
    """config.json of the grown model: its depth, and lists with one entry a layer (layer_types), by the map; the rest as it was."""
    layers, grown = raw["num_hidden_layers"], {**raw, "num_hidden_layers": len(plan)}
    for key, value in raw.items():
        if "layer" in key and isinstance(value, list) and len(value) == layers:
            grown[key] = [value[source] for source in plan]
    return grown


def fingerprint_of(folder: Path) -> str:
    """A model's fingerprint without its weights in memory; LetheError where tensors are missing, unexpected or misshapen."""
    with torch.device("meta"):
        model = Llama(load_config(folder))
    fill(model, folder, lambda name, tensor: None, ((name, tensor_at(piece)) for name, piece in pieces_of(folder).items()))
    return model.fingerprint


def read_growth(folder: Path) -> Growth | None:
    """What a folder's growth.json tells; None where it has none."""
    if not (folder / "growth.json").is_file():
        return None
    try:
        return Growth(**read_json(folder / "growth.json"))
    except TypeError as error:
        raise LetheError(f"{folder / 'growth.json'} is not as growth writes it; give a new folder with --out") from error


def read_size(text: str | int) -> int:
    """Bytes of "5GB", "200MB", "1GiB" or a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(text), re.IGNORECASE)
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " ")) if match else 0
    if size < 1:
        raise LetheError(f"--shard_size {text!r} is no size; write 5GB or 200MB")
    return size


@contextlib.contextmanager
def made_whole(making: Path, out: Path) -> Iterator[None]:
    """A folder under a name that no one takes for a model; renamed to `out` when the block ends well, else removed."""
    try:
        making.mkdir()
        yield
        os.replace(making, out)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def sweep(out: Path) -> None:
    """Removes what growths to `out` left behind that were killed, as their process numbers tell."""
    for folder in out.parent.glob(f".{out.name}.*.growing"):
        pid = folder.name.split(".")[-2]
        if os.name != "posix" or not pid.isdecimal():  # elsewhere signal 0 is no question
            continue
        try:
            os.kill(int(pid), 0)
            alive = int(pid) != os.getpid()
        except OSError as error:
            alive = not isinstance(error, ProcessLookupError)
        if not alive:
            shutil.rmtree(folder, ignore_errors=True)


def write_weights(folder: Path, work: list[Recipe], most: int, total: int) -> None:
    """The tensors as one file, or as several of at most `most` bytes (or one tensor) with Hugging Face's index."""
    shards: list[list[Recipe]] = [[]]
    for recipe in work:
        if shards[-1] and sum(r.piece.nbytes for r in shards[-1]) + recipe.piece.nbytes > most:
            shards.append([])
        shards[-1].append(recipe)
    names = [f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    with progress(len(work), "writing", "tensors") as bar:
        for name, shard in zip(names, shards, strict=True):
            write_stream(folder / name, [(r.name, r.piece, r.content) for r in shard], bar.update)
    if len(shards) > 1:
        weight_map = {recipe.name: name for name, shard in zip(names, shards, strict=True) for recipe in shard}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def verify(folder: Path, work: list[Recipe]) -> None:
    """Reads the written files again: every tensor has its name, shape and dtype, and the bytes that its source tells."""
    written = pieces_of(folder)
    if wrong := sorted(set(written) ^ {recipe.name for recipe in work}):
        raise LetheError(f"{folder} does not hold what was written ({wrong[0]}); the disk or the memory of this machine is at fault")
    for recipe in progress(work, "comparing", "tensors"):
        piece = written[recipe.name]
        same = (piece.shape, piece.dtype) == (recipe.piece.shape, recipe.piece.dtype)
        if not same or not same_bytes(piece, recipe.content()):
            raise LetheError(f"{piece.file}: {recipe.name} is not as it was written; the disk or the memory of this machine is at fault")


def compare_logits(source: Path, grown: Path, work: list[Recipe], seed: int) -> float | None:
    """The largest difference of their logits, in float32, on random tokens; None where they are too large to load.

    Raises LetheError above TOLERANCE.
    """
    if 4 * sum(math.prod(recipe.piece.shape) for recipe in work) > LOADED_GIB * 2**30:
        return None
    generator = torch.Generator().manual_seed(seed)
    logits = []
    for folder in (source, grown):
        model = load_model(folder)
        if not logits:
            tokens = torch.randint(model.config.vocab_size, (4, 16), generator=generator)
        with torch.inference_mode():
            logits.append(model(tokens))
        del model
        gc.collect()
    difference = (logits[0] - logits[1]).abs().max().item()
    if not difference <= TOLERANCE:  # NaN too
        raise LetheError(f"{source}: the grown model's logits differ by {difference:.1e} from the source's, though its copies are zero")
    return difference


# ----------------------------------------------------------------------------------------------------------------------
# The command


def report(growth: Growth, out: Path, tokens: float | None) -> str:
    plan, config = growth.map, load_config(out)
    layers = max(plan) + 1
    files = sorted(out.glob("*.safetensors"))
    lines = [
        f"source           {growth.source} ({growth.source_fingerprint})",
        f"grown            {out} ({growth.fingerprint})",
        f"layers           {len(plan)} by {growth.order}: {shown_map(plan)}",
        f"connection rate  {growth.connection_rate:.3f}",
        f"parameters       {growth.parameters:,}, hidden {config.hidden_size}, {growth.nbytes / 1e9:.2f} GB in "
        f"{len(files)} file{'s' * (len(files) > 1)}",
    ]
    if growth.noise:
        lines.append(f"noise            {growth.noise} in the linears of all layers, seed {growth.seed}")
    parts = [f"{growth.tensors - growth.zeroed - growth.noised} equal to their source"]
    parts += [f"{count} {how}" for count, how in ((growth.zeroed, "zero"), (growth.noised, "noised as told")) if count]
    lines.append(f"read again       all {growth.tensors} tensors: {', '.join(parts)}")
    if growth.zero_init:
        count = len(new_layers(plan))
        kept = "not compared: noise changes them" if growth.noise else "not compared: too large to load in float32 here"
        if growth.logit_difference is not None:
            kept = f"kept to {growth.logit_difference:.1e} on random tokens"
        lines.append(f"zero init        o_proj and down_proj of {count} copies; logits {kept}")
    if unused := sorted(set(range(layers)) - set(plan)):
        lines.append(f"unused           layers of the source, from 1: {' '.join(str(i + 1) for i in unused)}")
    if tokens is not None:
        timing = growth_timing(growth.parameters, 6 * growth.parameters * tokens)
        said = f"train the source on {timing:.3g} tokens, then grow" if timing < tokens else "says nothing: this is below its range"
        lines.append(f"timing law       for {tokens:.3g} tokens in all: {said}")
    return "\n".join(lines)


def shown_map(plan: list[int]) -> str:
    """Runs of neighbours, from 1: "1-16 1-16"."""
    runs: list[list[int]] = []
    for source in plan:
        if runs and source == runs[-1][-1] + 1:
            runs[-1].append(source)
        else:
            runs.append([source])
    return " ".join(f"{run[0] + 1}-{run[-1] + 1}" if len(run) > 1 else str(run[0] + 1) for run in runs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m model.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="a Hugging Face Llama folder, a hub id or 'nano'")
    parser.add_argument("--out", required=True, help="a new folder for the grown model")
    parser.add_argument("--factor", type=int, help="how many times as deep (default 2)")
    parser.add_argument("--layers", type=int, help="how many layers, instead of --factor")
    parser.add_argument("--order", default="stack", help="stack (default), interpolate, gradual or partial:BLOCKS, see above")
    parser.add_argument("--zero_init", "--zero-init", action="store_true", help="silence the copies, so that the logits stay")
    parser.add_argument("--noise", type=float, default=0.0, help="share of noise in the linears of the layers (default 0; the paper: 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--shard_size", "--shard-size", default="5GB", help="most bytes in one file (default 5GB)")
    parser.add_argument("--tokens", type=float, help="tokens of the whole training: tells when the growth-timing law would grow")
    args = parser.parse_args(argv)

    def work() -> None:
        growth = grow(
            args.source, args.out, factor=args.factor, layers=args.layers, order=args.order, zero_init=args.zero_init,
            noise=args.noise, seed=args.seed, shard_size=args.shard_size,
        )  # fmt: skip
        print(report(growth, Path(args.out).expanduser().resolve(), args.tokens))
        if (Path(growth.source) / "adapter_config.json").is_file():
            print(f"note: {growth.source} holds an adapter too; adapters are not grown, so merge it first", file=sys.stderr)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
