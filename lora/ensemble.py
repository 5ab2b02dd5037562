"""An ensemble of LoRA adapters on one base (deep ensembles, arXiv:1612.01474, of adapters: arXiv:2310.00035), all in one pass.

    ensemble = load_ensemble(model, [folder, folder, …])     # the model's adapter from here on; K members
    states = model.hidden(ids.repeat(K), sight)              # packed tokens K times over: member k reads the k-th copy

The base is there once, whatever K is. For inference; training knows one adapter. Members must be alike: the same linears, ranks and
scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from kernels.members import Members
from lora.adapter import load_adapter
from lora.layers import LoRA, lora_layers, remove_lora
from model.llama import Llama
from study.errors import LetheError


class Ensemble(nn.Module):
    """K adapters as a model's adapter. It keeps copies of their factors."""

    drops = False

    def __init__(self, members: Sequence[LoRA]):
        super().__init__()
        self.count, first = len(members), members[0]
        self._groups: dict[tuple[int, str], list] = {}
        for projection in first.projections.values():
            self._groups.setdefault((projection.layer, projection.group), []).append(projection.name)
        self.members = {
            key: Members(
                torch.stack([torch.cat([one.projections[name].lora_A.detach() for name in names]) for one in members]),
                tuple(
                    torch.stack([one.projections[name].lora_B.detach() * one.projections[name].scale for one in members])
                    for name in names
                ),
                [first.projections[name].columns for name in names],
            )
            for key, names in self._groups.items()
        }  # fmt: skip

    def additions(self, dtype: torch.dtype) -> dict[int, dict[str, Members]]:
        """As LoRA.additions: {layer: {group of linears: what the members add}} in the compute dtype."""
        if torch.is_grad_enabled():
            raise RuntimeError("an ensemble computes without gradients: put the pass under torch.no_grad() or inference_mode()")
        found: dict[int, dict[str, Members]] = {}
        for (layer, group), (A, B, columns) in self.members.items():
            found.setdefault(layer, {})[group] = Members(A.to(dtype), tuple(part.to(dtype) for part in B), columns)
        return found


def load_ensemble(model: Llama, folders: Sequence[str | Path]) -> Ensemble:
    """Puts the adapters of these folders on the model as one ensemble, replacing what it has, and returns it.

    Raises LetheError where members differ in their linears, ranks or scales, and as load_adapter does.
    """
    if len(folders) < 2:
        raise LetheError(f"an ensemble needs two adapters or more, got {len(folders)}")
    members, shapes = [], []
    for folder in folders:
        load_adapter(model, folder)
        members.append(model.adapter)
        shapes.append({name: (layer.rank, layer.scale) for name, layer in lora_layers(model).items()})
        if shapes[-1] != shapes[0]:
            raise LetheError(f"{folder} and {folders[0]} cannot be members of one ensemble: {_difference(shapes[0], shapes[-1])}")
    remove_lora(model)
    model.adapter = Ensemble(members)
    return model.adapter


def _difference(first: dict, other: dict) -> str:
    if set(first) != set(other):
        name = min(set(first) ^ set(other))
        return f"only {'the second' if name in first else 'the first'} adapts {name}"
    name = next(name for name in first if first[name] != other[name])
    told = " and ".join(f"rank {rank} with scale {scale:g}" for rank, scale in (other[name], first[name]))
    return f"{name} has {told}"


