"""Which layer of a small model becomes which of a grown one, and when to grow: arXiv 2405.15319. The orders: see model.growth."""

from __future__ import annotations

import math
import re

from study.errors import LetheError


def layer_map(layers: int, target: int | None, order: str) -> list[int]:
    """The source layer, from 0, of every layer of the grown model.

    layers: of the source. target: of the grown model; None only for partial, whose notation tells it. A target that is no
    multiple of layers is possible: stack cuts its last copy short, interpolate spreads the copies evenly.
    Raises LetheError for an order that is unknown or does not fit.
    """
    name, _, notation = order.partition(":")
    if name == "partial":
        found = partial_map(layers, notation)
        if target is not None and target != len(found):
            raise LetheError(f"--order {order} gives {len(found)} layers, not {target}; leave --layers and --factor out")
    elif name not in ("stack", "interpolate", "gradual") or notation:
        raise LetheError(f"--order {order!r} is unknown; known: stack, interpolate, gradual, partial:BLOCKS such as partial:12-345*7-6")
    elif target is None:
        raise LetheError(f"--order {order} needs --layers or --factor")
    elif name == "stack":
        found = [i % layers for i in range(target)]
    elif name == "interpolate":
        found = [i * layers // target for i in range(target)]
    else:
        found = list(range(layers))
        while len(found) < target:
            found += found[-min(len(found), target - len(found)) :]
    if len(found) <= layers:
        raise LetheError(f"--order {order} gives {max(len(found), target or 0)} layers; growth wants more than the source's {layers}")
    return found


def partial_map(layers: int, notation: str) -> list[int]:
    """Blocks of layers, from 1, behind each other: "12-345*7-6", "123456*4", "1..8-9..12*3-13,14,15..16"."""
    found: list[int] = []
    where = f"--order partial:{notation}"
    for block in notation.split("-"):
        match = re.fullmatch(r"([\d.,]+?)(?:\*(\d+))?", block)
        if not match or match[2] and int(match[2]) < 1:
            raise LetheError(f"{where}: the block {block!r} is no list of layers with a count, such as 345*7; blocks are parted by -")
        content, members = match[1], []
        for part in filter(None, content.split(",")) if "," in content or "." in content else content:
            ends = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", part)
            first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
            if last < first:
                raise LetheError(f"{where}: {part!r} is no layer and no range of layers such as 9..12")
            members += range(first, last + 1)
        if wrong := [member for member in members if not 1 <= member <= layers]:
            hint = f"; digits are single layers, so layer {content} is written {content}," if content.isdigit() and len(content) > 1 else ""
            raise LetheError(f"{where}: there is no layer {wrong[0]}; the source's layers are 1 to {layers}{hint}")
        found += [member - 1 for member in members] * int(match[2] or 1)
    return found


def connection_rate(layers: list[int]) -> float:
    """The share of neighbours in a map that were neighbours in the source: #{i : map[i+1] = map[i] + 1} / (N - 1)."""
    return sum(b == a + 1 for a, b in zip(layers, layers[1:], strict=False)) / max(1, len(layers) - 1)


def new_layers(layers: list[int]) -> list[int]:
    """The layers of a grown model whose source occurred before in the map; the others are the originals."""
    return [i for i, source in enumerate(layers) if source in layers[:i]]


def growth_timing(parameters: float, flops: float) -> float:
    """Tokens to train the small model on before it is stacked: log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74.

    parameters: N, of the grown model. flops: C, of the whole training, 6 N D for D tokens. The law (arXiv 2405.15319) is a fit to
    large models: for small ones it gives more tokens than the whole training has.
    """
    if not (parameters >= 1 and flops > 1):
        raise LetheError(f"the growth-timing law wants parameters and FLOPs, not {parameters} and {flops}")
    return 10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74)
