"""Which optimizer steps on which parameter, and what that looks like in a line each.

adamw takes everything. muon takes the matrices between hidden states: weights of two dimensions, without embed_tokens and lm_head, and
LoRA's stacks of factors ("A_16x2048", "B_512x16"), both or one kind of them; AdamW takes what is left.
"""

from __future__ import annotations

import torch
from torch import nn

from optim.muon import SCALES, Muon, lr_scale

OPTIMIZERS = ("adamw", "muon")
FACTORS = ("both", "A", "B")


def optimizers_of(
    names: list[str],
    parameters: list[nn.Parameter],
    *,
    name: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
    nesterov: bool,
    ns_steps: int,
    muon_scale: str,
    muon_factors: str,
    adamw_rate: float | None = None,
) -> list[torch.optim.Optimizer]:
    """The optimizers of these parameters, one or two: betas and eps are AdamW's, the rest Muon's; rate and decay are of both.

    adamw_rate: beside Muon, of what AdamW takes, without decay: embedding, head and norms.

    Raises ValueError for unknown words, and for muon where it has no matrix to step on.
    """
    matrices, rest = partition(names, name, [p.ndim for p in parameters], muon_factors)
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(
            Muon([parameters[i] for i in matrices], lr=learning_rate, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
                 ns_steps=ns_steps, scale=muon_scale)
        )  # fmt: skip
    if rest:
        rate, decay = (learning_rate, weight_decay) if adamw_rate is None or not matrices else (adamw_rate, 0.0)
        found.append(torch.optim.AdamW([parameters[i] for i in rest], lr=rate, betas=betas, eps=eps, weight_decay=decay))
    return found


def partition(names: list[str], name: str, dims: list[int], muon_factors: str) -> tuple[list[int], list[int]]:
    """(indices of Muon's parameters, of AdamW's). dims: the dimensions of each parameter."""
    for word, known, what in ((name, OPTIMIZERS, "optimizer"), (muon_factors, FACTORS, "muon_factors")):
        if word not in known:
            raise ValueError(f"{what} {word!r} is unknown; known: {', '.join(known)}")
    if name == "adamw":
        return [], list(range(len(names)))
    kinds = ("A", "B") if muon_factors == "both" else (muon_factors,)

    def is_matrix(parameter: str, ndim: int) -> bool:
        parts = parameter.split(".")
        if parts[-1][:2] in ("A_", "B_"):
            return parts[-1][0] in kinds
        return ndim >= 2 and not {"embed_tokens", "lm_head"} & set(parts)

    matrices = [i for i, (parameter, ndim) in enumerate(zip(names, dims, strict=True)) if is_matrix(parameter, ndim)]
    if not matrices:
        raise ValueError(f"muon has no matrix to step on among {', '.join(names[:4])}; use adamw")
    return matrices, [i for i in range(len(names)) if i not in set(matrices)]


def partition_lines(names: list[str], parameters: list[nn.Parameter], *, name: str, muon_scale: str, muon_factors: str) -> list[str]:
    """A line for each optimizer and kind of parameter: count, shape, and what the learning rate is multiplied with."""
    if muon_scale not in SCALES:
        raise ValueError(f"muon_scale {muon_scale!r} is unknown; known: {', '.join(SCALES)}")
    matrices = set(partition(names, name, [p.ndim for p in parameters], muon_factors)[0])
    counts: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for i, (parameter, p) in enumerate(zip(names, parameters, strict=True)):
        parts = parameter.split(".")
        stack = p.ndim == 3
        kind = parts[-1] if stack or len(parts) == 1 else ".".join(parts[-2:])  # q_proj.weight, of every layer
        key = "muon" if i in matrices else "adamw", kind, tuple(p.shape[1:] if stack else p.shape)
        counts[key] = counts.get(key, 0) + (len(p) if stack else 1)
    lines, width = [], max(len(kind) for _, kind, _ in counts)
    for (optimizer, kind, shape), count in sorted(counts.items(), key=lambda item: item[0][0] != "muon"):
        noun = ("matrix" if count == 1 else "matrices") if len(shape) == 2 else "tensor" + "s" * (count > 1)
        line = f"{optimizer:6} {kind:{width}}  {count:4} {noun} {' x '.join(map(str, shape))}"
        lines.append(f"{line}  lr x {scale_text(muon_scale, *shape)}" if optimizer == "muon" else line)
    return lines


def scale_text(scale: str, rows: int, cols: int) -> str:
    value = f"{lr_scale(scale, rows, cols):.4g}"
    if scale == "match_rms_adamw":
        return f"0.2·√{max(rows, cols)} = {value}"
    return value if rows <= cols else f"√({rows}/{cols}) = {value}"
