"""A model larger than its device: some decoder layers wait in host memory and are brought just before they run.

    stream_layers(model, "cuda", parse_memory("6GiB"))        # model: loaded on the CPU, quantised or not

As many layers as fit stay on the device, and the streamed ones lie evenly between them, so that the others' arithmetic hides
their copies. A streamed layer's linears are one block of pinned memory, copied in one piece on a side stream into one of two
slots: while one layer computes, the next one is on its way; backwards too. In training they recompute their activations.

It is for a frozen base with adapters. One pass of many tokens costs little more than on a device that holds all; generation,
a pass for each token, costs the whole copy each time. If a quantised base fits, it is the faster choice.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from model.llama import Layer, Llama
from model.quantized import Rows
from study.errors import LetheError

ALIGNED = 256  # bytes
UNITS = {"": 2**30, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_memory(text: str | int | float) -> int:
    """ "6GiB", "500MB", or a number of GiB -> bytes. Raises LetheError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    size = float(found[1]) * UNITS.get(found[2].upper(), 0) if found else 0
    if size < 1:
        raise LetheError(f"--max_memory {text!r} is no amount of memory; write it as 6GiB, 500MB or a number of GiB")
    return int(size)


def told(size: float) -> str:
    """Bytes as people say them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def stream_layers(model: Llama, device: torch.device | str, max_memory: int) -> str:
    """Moves a frozen model from the CPU to the device, where its weights take at most max_memory bytes; says what lies where.

    Adapters and what a pass makes come on top. Merging into the base, if it is not quantised, is done in host memory.
    Raises LetheError where max_memory is too small, naming the least that works, and for a base that is trained.
    """
    if any(p.requires_grad for name, p in model.named_parameters() if not name.startswith("adapter.")):
        raise LetheError("--max_memory streams a frozen base; all weights of this model are trained: leave out --full, or --max_memory")
    if model.device.type != "cpu" or model.stream:
        raise ValueError("the model must lie on the CPU, and whole")
    layers = list(model.model.layers)
    layout = Layout.of(layers[0])
    every = {id(p): p.nbytes for p in model.model.parameters()} | {id(model.head_weight): model.head_weight.nbytes}
    linears = {id(linear.weight) for layer in layers for block, group in layer.groups() for linear in block._groups[group]}
    fixed = sum(size for key, size in every.items() if key not in linears)  # embeddings, head, norms, biases
    total, least = fixed + len(layers) * layout.size, fixed + min(2, len(layers)) * layout.size
    if max_memory < least:
        raise LetheError(
            f"--max_memory {told(max_memory)} is too small for this model: its embeddings and head take {told(fixed)} and two layers "
            f"{told(2 * layout.size)}; the least is {least / 2**20 + 0.1:.1f}MiB"
            + ("" if model.quantized else ", or less with --quantize nf4")
        )
    count = 0 if max_memory >= total else len(layers) - (max_memory - fixed - 2 * layout.size) // layout.size
    streamed = [i for i in range(len(layers)) if (i + 1) * count // len(layers) > i * count // len(layers)]
    with torch.inference_mode(False), torch.no_grad():
        for module in (model.model.embed_tokens, model.model.norm, *([] if model.config.tie_word_embeddings else [model.lm_head])):
            module.to(device)
        stream = Stream(layout, torch.device(device), streamed)
        for index, layer in enumerate(layers):
            if index in streamed:
                stream.take(index, layer)
            for block, group in layer.groups():
                rows = block.elsewhere.get(group)
                if isinstance(rows, Rows):
                    block.elsewhere[group] = rows.holding([tensor.to(device) for tensor in rows.tensors])
            for module in layer.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if not (index in streamed and name == "weight" and isinstance(module, torch.nn.Linear)):
                        parameter.data = parameter.data.to(device)
        if model.adapter is not None:
            model.adapter.to(device)
    model.join()
    model.stream = stream if streamed else None
    return (
        f"weights    {told(total - count * layout.size)} on {device}, {count} of {len(layers)} layers ({told(count * layout.size)}) "
        f"streamed from host memory" + (f" through {told(2 * layout.size)}" if count else "")
    )


class Layout(NamedTuple):
    """How the linears of a layer, which are alike in all layers, lie in one block of memory."""

    groups: dict[str, list[tuple[int, torch.dtype, torch.Size]]]  # of each group's tensors: offset, dtype, shape
    forms: dict[str, Rows | None]  # of quantised groups: what to hold the tensors in
    size: int  # bytes

    @staticmethod
    def of(layer: Layer) -> Layout:
        groups, forms, size = {}, {}, 0
        for block, group in layer.groups():
            rows = forms[group] = block.elsewhere.get(group)
            places = groups[group] = []
            for tensor in [block.joined(group).whole] if rows is None else rows.tensors:
                places.append((size, tensor.dtype, tensor.shape))
                size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        return Layout(groups, forms, size)

    def views(self, memory: Tensor) -> dict[str, list[Tensor]]:
        """Each group's tensors in memory (size,) uint8."""
        return {
            group: [memory[at : at + shape.numel() * dtype.itemsize].view(dtype).view(shape) for at, dtype, shape in places]
            for group, places in self.groups.items()
        }


class Slot:
    """Room for one layer on the device. used: after what last read it; ready: after the copy into it."""

    def __init__(self, layout: Layout, device: torch.device):
        self.memory = torch.empty(layout.size, dtype=torch.uint8, device=device)
        self.layer: int | None = None
        views = layout.views(self.memory)
        self.wholes = {group: views[group][0] if form is None else form.holding(views[group]) for group, form in layout.forms.items()}
        if device.type == "cuda":
            self.used, self.ready = torch.cuda.Event(), torch.cuda.Event()
            self.used.record(torch.cuda.current_stream(device))  # by whoever had this memory before


class Stream:
    """Layers in host memory, and two slots on the device through which they go."""

    def __init__(self, layout: Layout, device: torch.device, streamed: list[int]):
        self.layout, self.device, self.order = layout, device, {layer: place for place, layer in enumerate(streamed)}
        self.host: dict[int, Tensor] = {}  # (size,) uint8 of each streamed layer
        self.slots = [Slot(layout, device) for _ in range(2 if streamed else 0)]
        self.current: Slot | None = None  # the one that computes
        self.step, self.last = 1, -1  # forwards or backwards through the layers; the place in the order where we are
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(self, index: int, layer: Layer) -> None:
        """Puts a layer's linears into host memory. Parameters stay parameters there: they can be read, and written after forget()."""
        memory = self.host[index] = torch.empty(self.layout.size, dtype=torch.uint8, pin_memory=self.side is not None)
        for group, views in self.layout.views(memory).items():
            block = layer.self_attn if group in layer.self_attn._groups else layer.mlp
            rows = block.elsewhere.get(group)
            for view, tensor in zip(views, [block.joined(group).whole] if rows is None else rows.tensors, strict=True):
                view.copy_(tensor)
            if rows is None:
                linears = block._groups[group]
                for linear, part in zip(linears, views[0].split([linear.out_features for linear in linears]), strict=True):
                    linear.weight.data = part
                block._joined.pop(group)
            block.elsewhere[group] = Streamed(self, index, group, () if rows is None else rows.holding(views).parts)

    def begin(self) -> dict[int, int]:
        """At the start of a forward pass: the first layer sets out. Returns the streamed layers."""
        self._leave()
        self.step, self.last = 1, -1
        self._send(0)
        return self.order

    def whole(self, layer: int, group: str) -> Tensor | Rows:
        """A group's weights on the device, and the next layer on its way there."""
        if self.current is None or self.current.layer != layer:
            place = self.order[layer]
            self.step = -1 if place < self.last else 1
            self._leave()
            self._send(place)
            self.current, self.last = next(slot for slot in self.slots if slot.layer == layer), place
            if self.side is not None:
                torch.cuda.current_stream(self.device).wait_event(self.current.ready)
            self._send(place + self.step)
        return self.current.wholes[group]

    def forget(self) -> None:
        """Before host memory is written: waits for copies under way, and what lies in the slots no longer counts."""
        self._leave()
        if self.side is not None:
            self.side.synchronize()
        for slot in self.slots:
            slot.layer = None

    def _leave(self) -> None:
        if self.current is not None and self.side is not None:
            self.current.used.record(torch.cuda.current_stream(self.device))
        self.current = None

    def _send(self, place: int) -> None:
        """Copies the layer at a place of the order into the slot that does not compute, if it is not here yet."""
        layers = list(self.order)
        if not 0 <= place < len(layers) or any(slot.layer == layers[place] for slot in self.slots):
            return
        self._copy(layers[place], next(slot for slot in self.slots if slot is not self.current))

    def _copy(self, layer: int, slot: Slot) -> None:
        slot.layer = layer
        if self.side is None:
            slot.memory.copy_(self.host[layer])
            return
        self.side.wait_event(slot.used)
        with torch.cuda.stream(self.side):
            slot.memory.copy_(self.host[layer], non_blocking=True)
        slot.ready.record(self.side)


class Streamed(NamedTuple):
    """A group's weights, wherever its layer lies when they are wanted."""

    stream: Stream
    layer: int
    group: str
    parts: tuple  # of a quantised group: its weights, in host memory

    def dense(self) -> Tensor:
        """(sum of out, in) in a slot, valid until the next streamed layer but one; or made of what lies there."""
        whole = self.stream.whole(self.layer, self.group)
        return whole if isinstance(whole, Tensor) else whole.dense()
