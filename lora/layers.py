"""Low-rank adapters on the linears of a Llama (LoRA, arXiv 2106.09685), with PEFT's semantics.

    y = x W^T + scale * (dropout(x) A^T) B^T,     scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)

A (rank, in) starts Kaiming-uniform and B (out, rank) zero, so a fresh adapter changes nothing. Factors of one shape are
rows of one parameter, so clipping, the optimizer and the cast to the compute dtype are a handful of kernels and not
hundreds. They are float32; a pass computes with copies in the model's dtype.

Every projection draws a dropout mask of its own. Masks are a hash of (row key, projection, column), not a stream: a
token's mask depends on the seed, the step, its example and its position alone, so a step has the same gradient however it
is split into micro-batches, and a recomputed layer sees the same mask without anything being stored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn

from kernels.dropout import Span, mix, to_int32
from kernels.linear import Addition
from model.llama import GROUPS, LINEAR_NAMES, Linear, Llama
from model.quantized import refuse_merging
from study.errors import LetheError


class Projection:
    """One adapted linear: where it is, and its factors, which are rows of a LoRA's stacks."""

    def __init__(self, model: Llama, name: str, rank: int, alpha: float, rslora: bool, salt: int):
        self.name, self.rank, self.alpha, self.rslora = name, rank, alpha, rslora
        self.salt = salt  # tells this projection's dropout masks from the others'
        parent, _, leaf = name.rpartition(".")
        self.linear: Linear = model.get_submodule(name)
        self.layer = int(parent.split(".")[2])
        self.group = next(group for group, names in GROUPS.items() if leaf in names)
        names = GROUPS[self.group]
        start = sum(model.get_submodule(f"{parent}.{other}").out_features for other in names[: names.index(leaf)])
        self.columns = start, start + self.linear.out_features  # of the group's joined output
        self.stacks = f"A_{rank}x{self.linear.in_features}", f"B_{self.linear.out_features}x{rank}"
        self.rows = 0, 0  # of lora_A and lora_B in their stacks
        self.owner: LoRA | None = None

    @property
    def lora_A(self) -> Tensor:
        """(rank, in) float32"""
        return self.owner.stacks[self.stacks[0]][self.rows[0]]

    @property
    def lora_B(self) -> Tensor:
        """(out, rank) float32"""
        return self.owner.stacks[self.stacks[1]][self.rows[1]]

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self) -> Tensor:
        """(out, in) float32: what the adapter adds to the weight."""
        return self.scale * (self.lora_B @ self.lora_A)


class LoRA(nn.Module):
    """All adapters of a model. Its parameters: stacks "A_16x2048" (n, 16, 2048), "B_512x16" (n, 512, 16) …, float32."""

    def __init__(self, projections: list[Projection], dropout: float, device: torch.device):
        super().__init__()
        self.dropout, self.projections = dropout, {p.name: p for p in projections}
        counts: dict[str, int] = {}
        self._groups: dict[tuple[int, str], list[Projection]] = {}
        for projection in projections:
            projection.owner, projection.rows = self, tuple(counts.get(stack, 0) for stack in projection.stacks)
            for stack in projection.stacks:
                counts[stack] = counts.get(stack, 0) + 1
            self._groups.setdefault((projection.layer, projection.group), []).append(projection)
        self._fixed = {}  # spans, columns and scales of an Addition
        for key, members in self._groups.items():
            ends = [0, *accumulate(p.rank for p in members)]
            spans = [Span(a, b, p.salt) for a, b, p in zip(ends, ends[1:], members, strict=False)]
            self._fixed[key] = spans, [p.columns for p in members], [p.scale for p in members]
        shapes = {stack: (count, *map(int, stack[2:].split("x"))) for stack, count in sorted(counts.items())}
        self.stacks = nn.ParameterDict({stack: torch.zeros(shape, device=device) for stack, shape in shapes.items()})

    @property
    def drops(self) -> bool:
        return self.training and self.dropout > 0

    def additions(self, dtype: torch.dtype) -> dict[int, dict[str, Addition]]:
        """What one pass adds, {layer: {group of linears: Addition}}, with factors in the compute dtype."""
        factors = {name: stack.to(dtype).unbind(0) for name, stack in self.stacks.items()}  # one cast a stack
        dropout, found = self.dropout if self.training else 0.0, {}
        for (layer, group), members in self._groups.items():
            mine = tuple(factors[stack][row] for p in members for stack, row in zip(p.stacks, p.rows, strict=True))
            found.setdefault(layer, {})[group] = Addition(mine, *self._fixed[layer, group], dropout)
        return found


def dropout_keys(seed: int, step: int, examples: Tensor, positions: Tensor) -> Tensor:
    """(T,) int32 row keys for one micro-batch: a hash of (seed, step, example, position) of each of its T tokens."""
    start = torch.full((1,), to_int32(seed * 0x85EBCA6B + 1), dtype=torch.int32, device=examples.device)
    key = mix(mix(start ^ to_int32(step * 0xC2B2AE35 + 1)) ^ examples.to(torch.int32))
    return mix(key * 31 + positions.to(torch.int32))


def lora_layers(model: Llama) -> dict[str, Projection]:
    """The adapted linears by their full name."""
    return model.adapter.projections if model.adapter is not None else {}


def lora_parameters(model: Llama) -> list[nn.Parameter]:
    return list(model.adapter.parameters()) if model.adapter is not None else []


def target_names(targets: str | list[str]) -> tuple[str, ...]:
    """ "all", "q_proj,v_proj" or a list → names of linears. Raises LetheError for an unknown one."""
    names = LINEAR_NAMES if targets in ("all", "all-linear") else targets.split(",") if isinstance(targets, str) else targets
    names = tuple(name.strip() for name in names)
    for name in names:
        if name not in LINEAR_NAMES:
            raise LetheError(f"LoRA target {name!r} is unknown; a Llama's linears are {', '.join(LINEAR_NAMES)}")
    if not names:
        raise LetheError("LoRA needs at least one target")
    return names


def add_lora(
    model: Llama,
    rank: int = 16,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: str | list[str] = "all",
    rslora: bool = False,
    generator: torch.Generator | None = None,
) -> None:
    """Puts fresh adapters on the chosen linears, replacing any there are. Only they are trainable afterwards."""
    if rank < 1:
        raise LetheError(f"LoRA rank must be at least 1, got {rank}")
    if not 0 <= dropout < 1:
        raise LetheError(f"LoRA dropout must lie in [0, 1), got {dropout}")
    remove_lora(model)
    names = target_names(targets)
    add_layers(model, {name: (rank, alpha) for name in all_linears(model) if name.rsplit(".", 1)[1] in names}, dropout, rslora)
    init_lora(model, generator)


def all_linears(model: Llama) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Linear) and name.rsplit(".", 1)[-1] in LINEAR_NAMES]


def add_layers(model: Llama, shapes: dict[str, tuple[int, float]], dropout: float, rslora: bool) -> None:
    """Puts adapters of the given (rank, alpha) on the named linears; their factors are zero."""
    model.requires_grad_(False)
    projections = [
        Projection(model, name, *shapes[name], rslora, salt=index + 1) for index, name in enumerate(all_linears(model)) if name in shapes
    ]
    model.adapter = LoRA(projections, dropout, model.device).train(model.training)


@torch.no_grad()
def init_lora(model: Llama, generator: torch.Generator | None = None) -> None:
    """A Kaiming-uniform with a = sqrt(5), which is uniform in ±1/sqrt(in); B zero. A CPU generator gives every device the same."""
    for projection in lora_layers(model).values():
        bound = 1 / math.sqrt(projection.linear.in_features)
        projection.lora_A.copy_(torch.empty(projection.lora_A.shape).uniform_(-bound, bound, generator=generator))
        projection.lora_B.zero_()


def remove_lora(model: Llama) -> None:
    """Takes the adapters off; the base's weights are as they were."""
    model.adapter = None


@torch.no_grad()
def merge_adapter(model: Llama) -> None:
    """Adds the adapters into the weights (summed in float32, rounded once to the weights' dtype) and takes them off.

    The weights change in place: what was captured with their addresses stays valid. The model is another base afterwards,
    and its fingerprint says so: the adapter does not fit it a second time. Raises LetheError for a quantised base.
    """
    refuse_merging(model)
    if model.stream:
        model.stream.forget()
    projections = lora_layers(model).values()
    if projections and model.fingerprint:
        content = b"".join(tensor.cpu().numpy().tobytes() for p in projections for tensor in (p.lora_A[0], p.lora_B[0]))
        model.fingerprint = hashlib.sha256(model.fingerprint.encode() + content).hexdigest()[:16]
    for projection in projections:
        weight = projection.linear.weight.data
        weight.copy_(weight.float() + projection.delta().to(weight.device))  # a streamed layer's weight is in host memory
    remove_lora(model)


@contextmanager
def merged(model: Llama) -> Iterator[None]:
    """Within it the model runs with its adapters merged; afterwards weights and adapters are back, bit for bit."""
    refuse_merging(model)
    adapter, fingerprint = model.adapter, model.fingerprint
    kept = [(p.linear, p.linear.weight.detach().clone()) for p in lora_layers(model).values()]
    merge_adapter(model)
    try:
        yield
    finally:
        if model.stream:
            model.stream.forget()
        for linear, before in kept:
            linear.weight.data.copy_(before)
        if adapter is not None:
            model.fingerprint, model.adapter = fingerprint, adapter.train(model.training)
