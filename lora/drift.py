"""How far training moved a model: the size of its weights' change, and how differently it now predicts (KL to the base).

The KL on the new task predicts forgetting better than the size of the change does (RL's Razor, arXiv 2509.04259).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.batching import Examples, collate, micro_tokens_of
from kernels.divergence import linear_kl
from lora.layers import Projection, lora_layers
from metrics.statistics import mean_interval
from model.attention import Pack
from model.checkpoint import open_safetensors, weight_files
from model.llama import LINEAR_NAMES, Llama
from study.errors import LetheError

EXACT = 512  # matrices of no more rows or columns get all their singular values
BLOCK, ROUNDS = 16, 20  # others: vectors and rounds of the block power iteration


@torch.no_grad()
def drift(model: Llama) -> dict:
    """Size of the adapter's change of the weights, dW = scale B A of every projection, without forming it.

    {"frobenius", "spectral", "relative_frobenius", "stable_rank", "matrices", "kinds": {"q_proj": the same, …}}.  frobenius is
    of all matrices together, sqrt(sum of squares); spectral the largest singular value of any; relative_frobenius over the
    base's norm of the same matrices; stable_rank the mean of frobenius² / spectral² over matrices: how many directions a
    change has.  With B = Qb Rb and A^T = Qa Ra the singular values of B A are those of the
    r x r matrix Rb Ra^T (float64, on the CPU).  Raises ValueError for a model without an adapter.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapter; full_drift compares whole weights")
    factors = {name: stack.detach().cpu().double() for name, stack in model.adapter.stacks.items()}
    triangles = {name: torch.linalg.qr(x.mT if name.startswith("A_") else x, mode="r")[1] for name, x in factors.items()}  # (n, ., r)
    groups: dict[tuple[str, str], list] = {}
    for layer in layers.values():
        groups.setdefault(layer.stacks, []).append(layer)
    found = {}
    for (a, b), members in groups.items():
        rows_a, rows_b = zip(*(layer.rows for layer in members), strict=True)
        cores = triangles[b][list(rows_b)] @ triangles[a][list(rows_a)].mT  # (n, r, r)
        values = torch.linalg.svdvals(cores) * torch.tensor([[layer.scale] for layer in members], dtype=torch.float64)
        for layer, own in zip(members, values, strict=True):
            base = float(torch.linalg.vector_norm(base_weight(model, layer), dtype=torch.float32))
            found[layer.name] = float(own.square().sum().sqrt()), float(own.max()), base
    return _summary(found)


def base_weight(model: Llama, layer: Projection) -> Tensor:
    """(out, in) of an adapted linear, dense also where the base is quantised."""
    if layer.linear.weight is not None:
        return layer.linear.weight
    block = model.get_submodule(layer.name.rpartition(".")[0])
    return block.elsewhere[layer.group].parts[block._groups[layer.group].index(layer.linear)].dense()


@torch.no_grad()
def full_drift(model: Llama, folder: str | Path) -> dict:
    """The same of a fully fine-tuned model against its base's files, read tensor by tensor: all matrices, norms and biases.

    Kinds other than the linears are named by their module (embed_tokens, norm …).  The spectral norm is exact where a matrix
    has at most 512 rows or columns; else it comes from 20 rounds of a block power iteration with 16 vectors, which
    is never above the true one and for a flat spectrum about 1 % below.  Raises LetheError for files of another model.
    """
    own, found = dict(model.named_parameters()), {}
    for file in weight_files(Path(folder)):
        with open_safetensors(file) as tensors:
            for name in sorted(set(tensors.keys()) & set(own)):
                before = tensors.get_tensor(name).to(own[name].device).float()
                if before.shape != own[name].shape:
                    raise LetheError(f"{file}: {name} is {tuple(before.shape)}, the model's {tuple(own[name].shape)}; it is not its base")
                # The base as it was trained on: rounded to the model's dtype, or the rounding would count as change.
                before = before.to(own[name].dtype).float()
                change = own[name].detach().float() - before
                size = float(torch.linalg.vector_norm(change))
                found[name.removesuffix(".weight")] = size, spectral_norm(change) if size else 0.0, float(torch.linalg.vector_norm(before))
    if left := [name for name in own if name.removesuffix(".weight") not in found and not name.startswith("adapter.")]:
        raise LetheError(f"{folder} misses tensors: {', '.join(left[:3])}; it is not this model's base")
    return _summary(found)


def spectral_norm(matrix: Tensor) -> float:
    """The largest singular value of a float32 matrix (a vector: its length); see full_drift for how exact it is."""
    if matrix.dim() < 2:
        return float(torch.linalg.vector_norm(matrix))
    if min(matrix.shape) <= EXACT:
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        return float(torch.linalg.svdvals(torch.linalg.qr(tall, mode="r")[1])[0])
    start = torch.randn(matrix.shape[1], BLOCK, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    block = torch.linalg.qr(start)[0]  # (columns, 16)
    for _ in range(ROUNDS):
        block = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ block)[0])[0]
    return float(torch.linalg.svdvals(torch.linalg.qr(matrix @ block, mode="r")[1])[0])


def _summary(found: dict[str, tuple[float, float, float]]) -> dict:
    """{name: (frobenius, spectral, frobenius of the base)} -> the totals, and those of each kind."""

    def total(members: list[tuple[float, float, float]]) -> dict:
        sizes, peaks, bases = (np.array(column) for column in zip(*members, strict=True))
        size, base = float(np.sqrt((sizes**2).sum())), float(np.sqrt((bases**2).sum()))
        moved = peaks > 0
        ranks = (sizes[moved] / peaks[moved]) ** 2
        return {"frobenius": size, "spectral": float(peaks.max()), "relative_frobenius": size / base if base else math.nan,
                "stable_rank": float(ranks.mean()) if len(ranks) else 0.0, "matrices": len(members)}  # fmt: skip

    kinds: dict[str, list] = {}
    for name, values in found.items():
        kinds.setdefault(name.removesuffix(".bias").rsplit(".", 1)[-1], []).append(values)
    order = [*(kind for kind in LINEAR_NAMES if kind in kinds), *sorted(kind for kind in kinds if kind not in LINEAR_NAMES)]
    return {**total(list(found.values())), "kinds": {kind: total(kinds[kind]) for kind in order}}


@torch.inference_mode()
def kl_to_base(model: Llama, examples: Examples, base: Llama | None = None, micro_tokens: int | None = None) -> np.ndarray:
    """KL(base || model) of every example, the mean over its completion tokens in nats: (N,) float64.

    Both models read the reference answers (so no text is sampled): rows are the positions that predict a completion token,
    its end among them.  base None: the model without its adapter.  For full fine-tuning the base is a model of its own.
    Dropout is off.  Raises ValueError where there is neither an adapter nor a base, LetheError for a KL that is not finite.
    """
    adapter, was_training = model.adapter, model.training
    if base is None and adapter is None:
        raise ValueError("the model has no adapter to take off; give the base as a model of its own")
    result = np.full(len(examples), np.nan)
    order = np.argsort(examples.lengths, kind="stable").tolist()
    budget = micro_tokens_of(micro_tokens, model.device)
    model.eval()
    try:
        for at in range(0, len(order), 256):
            for micro in collate(examples, order[at : at + 256], budget, None):
                micro = micro.to(model.device)
                sight = Pack(micro.lengths, model.config, model.device)
                states = model.hidden(micro.input_ids, sight, micro.rows)
                if base is None:
                    model.adapter = None
                other = base or model
                reference = other.hidden(micro.input_ids, sight, micro.rows)
                model.adapter = adapter
                kl = linear_kl(states, reference, model.head_weight, other.head_weight).double().cpu().numpy()
                for i, part in zip(micro.indices, np.split(kl, np.cumsum(micro.sizes)[:-1]), strict=True):
                    result[i] = part.mean()
    finally:
        model.adapter = adapter
        model.train(was_training)
    if not np.isfinite(result).all():
        raise LetheError(f"the KL to the base is not finite (example {int(np.argmin(np.isfinite(result)))}); try --dtype float32")
    return result


def drift_record(
    model: Llama, examples: dict[str, Examples], folder: Path | None = None, base: Llama | None = None, micro_tokens: int | None = None
) -> dict:
    """What drift.json holds: drift (full_drift where there is no adapter, against `folder`) and the KL on each task's examples.

    "kl": {task: {"mean", "low", "high", "n"}} in nats a token, 95 % over examples.  base: as for kl_to_base.
    """
    found = drift(model) if model.adapter is not None else full_drift(model, folder)
    values = {task: kl_to_base(model, chosen, base, micro_tokens) for task, chosen in examples.items()}
    found["kl"] = {task: dict(zip(("mean", "low", "high"), mean_interval(kl), strict=True)) | {"n": len(kl)} for task, kl in values.items()}
    return found
