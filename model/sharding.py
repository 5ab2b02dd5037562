"""Full fine-tuning of models that no single device can train: weights, gradients and optimizer states spread over ranks (FSDP2).

    model = load_sharded("meta-llama/Llama-3.1-8B", ranks, torch.bfloat16)      # no rank ever holds the whole model

Each parameter lies cut by rows over the ranks, in float32: rank r of N holds its r-th N-th of them, so no masters are needed
beside it. A layer's weights are gathered in the compute dtype just before it runs and freed after it, forward and backward;
gradients are summed in float32 and cut again (torch.distributed.fsdp.fully_shard; ZeRO-3, arXiv 1910.02054). Gradients are
sums over the ranks, not means: the loop divides by the weights of the whole step, as in optim/parallel.py.

What follows from the gathering: every rank runs the same number of passes (idle_pass), through Llama.nll or forward alone;
a pass that runs out of memory cannot be taken again by one rank; and an optimizer sees its rank's rows only, which is all
that AdamW needs, while Muon needs whole matrices and is refused. Checkpoints are safetensors, a file a rank, and go on with
any number of ranks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from model.attention import Pack
from model.checkpoint import fill, find_model, load_config, open_safetensors, write_tensors
from model.llama import Llama
from model.snapshot import TENSORS
from optim.parallel import Ranks
from study.errors import LetheError

SHARD = re.compile(r"training_state_(\d+)_of_(\d+)\.safetensors")


def load_sharded(path: str | Path, ranks: Ranks, dtype: torch.dtype = torch.bfloat16) -> Llama:
    """Loads a model as model.checkpoint.load_model does, trainable, each rank its own rows. dtype: of the computation.

    Raises LetheError for float16, whose loss scale would have to be agreed on, and as load_model does.
    """
    folder = find_model(str(path))
    with torch.device("meta"):
        model = Llama(load_config(folder))
    shard(model, ranks, dtype)
    model.to_empty(device=ranks.device)
    own = dict(model.named_parameters())
    fill(model, folder, lambda name, tensor: place(own[name], tensor))
    model.source = folder
    return model


def shard(model: Llama, ranks: Ranks, dtype: torch.dtype) -> None:
    """Cuts the parameters of a float32 model over the ranks, in place: every decoder layer is gathered by itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if ranks.world == 1:
        raise LetheError("--shard model spreads a model over several ranks, and this is one; start it with torchrun --nproc-per-node N")
    if dtype == torch.float16:
        raise LetheError("--shard model computes in bfloat16 or float32; give --dtype bfloat16")
    if model.adapter is not None or model.quantized or model.stream:
        raise LetheError("--shard model trains all weights, as they are: give --full, and neither --quantize nor --max_memory")
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        layer.self_attn.apart = layer.mlp.apart = True  # joined weights would outlive the gathered ones
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.computes_in = dtype
    register_fsdp_forward_method(model, "nll")
    model.nll = _scoring_too(model, model.nll)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums, also over gloo, which knows no means
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _scoring_too(model: Llama, nll: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Llama.nll as it may be called between steps, without gradients and under inference_mode, and leave nothing behind."""

    def wrapped(*arguments) -> Tensor:
        graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(graph):  # what is gathered in that mode could not be trained
            losses = nll(*arguments)
        if not graph:
            model.reshard()  # a backward pass would have
        return losses

    return wrapped


def is_sharded(model: Llama) -> bool:
    return hasattr(model, "unshard")


def check_optimizers(names: Iterable[str]) -> None:
    """Raises LetheError for those that would go wrong unseen: on a rank's rows Muon would make another update, and say nothing."""
    if "muon" in names:
        raise LetheError("--optimizer muon needs whole matrices, and --shard model cuts them by rows; use adamw or leave it out")


def idle_pass(model: Llama) -> None:
    """A pass without a loss, for a rank that has fewer of them in a step than another, which waits for its weights.

    How many a rank needs is asked before the first pass of a step: ranks.most(passes) - passes.
    """
    nothing = torch.zeros(0, dtype=torch.long, device=model.device)
    token = torch.zeros(1, dtype=torch.long, device=model.device)
    model.nll(token, Pack([1], model.config, model.device), nothing, nothing).sum().backward()


@torch.no_grad()
def place(parameter: Tensor, tensor: Tensor) -> None:
    """Copies a whole tensor into a parameter; of a sharded one, this rank's rows."""
    if hasattr(parameter, "to_local"):
        mesh = parameter.device_mesh
        parameter.to_local().copy_(tensor[rows_of(len(tensor), mesh.get_local_rank(), mesh.size())])
    else:
        parameter.copy_(tensor)


def rows_of(count: int, rank: int, world: int) -> slice:
    """Which of `count` rows are a rank's: as many as torch.chunk gives it; the last ranks may have fewer, or none."""
    size = math.ceil(count / world)
    return slice(min(count, size * rank), min(count, size * (rank + 1)))


@torch.no_grad()
def gathered(model: Llama, ranks: Ranks, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Llama | None:
    """The whole model on the main rank, in eval mode, to be saved or scored; None on the others. Every rank must call it.

    dtype: float32 where it is None. One parameter at a time, so that no other rank holds more than one of them whole.
    """
    with torch.device("meta"):
        whole = Llama(model.config)
    for name, parameter in model.named_parameters():
        tensor = parameter.full_tensor()
        if ranks.main:
            module, _, leaf = name.rpartition(".")
            tensor = tensor.to(device, dtype or tensor.dtype)
            setattr(whole.get_submodule(module), leaf, torch.nn.Parameter(tensor, requires_grad=False))
    if not ranks.main:
        return None
    whole.fingerprint, whole.source, whole.altered = model.fingerprint, model.source, model.altered
    whole.join()
    return whole.eval()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: what each rank's optimizer and masters hold, and these as rows of any other number of ranks


def write_shard(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Writes this rank's rows of a training state, and returns when all ranks have: then the main rank may write the manifest.

    tensors: the same names on every rank; those without rows (a step count) are the same on all.
    """
    write_tensors(folder / f"training_state_{ranks.rank}_of_{ranks.world}.safetensors", tensors)
    ranks.barrier()


def read_shards(folder: Path, ranks: Ranks) -> dict[str, Tensor]:
    """This rank's rows of a training state, on the CPU, whatever the number of ranks that wrote it, one included.

    Generators ("rng.…") are no part of it. Raises LetheError for a missing or a cut file.
    """
    files = sorted(((int(m[1]), int(m[2]), path) for path in folder.iterdir() if (m := SHARD.fullmatch(path.name))), key=lambda f: f[0])
    if [(rank, world) for rank, world, _ in files] != [(rank, len(files)) for rank in range(len(files))]:
        there = ", ".join(path.name for _, _, path in files)
        raise LetheError(f"checkpoint {folder} misses the files of some ranks (there are {there}); give an earlier one, or delete it")
    parts = [open_safetensors(path) for _, _, path in files] or [open_safetensors(folder / TENSORS)]
    found = {}
    try:
        for name in sorted(name for name in parts[0].keys() if not name.startswith("rng.")):
            pieces = [part.get_slice(name) for part in parts]
            if not pieces[0].get_shape():
                found[name] = parts[0].get_tensor(name)
                continue
            counts, wanted, at = [piece.get_shape()[0] for piece in pieces], [], 0
            rows = rows_of(sum(counts), ranks.rank, ranks.world)
            for piece, count in zip(pieces, counts, strict=True):
                wanted.append(piece[max(0, rows.start - at) : max(0, min(count, rows.stop - at))])
                at += count
            found[name] = torch.cat(wanted)
    except SafetensorError as error:
        raise LetheError(f"checkpoint {folder}: its files do not belong together ({error}); give an earlier one, or delete it") from error
    return found
