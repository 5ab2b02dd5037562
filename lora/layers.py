"""Low-rank adapters on the linears of a Llama (LoRA, arXiv 2106.09685), with PEFT's semantics.

    y = x W^T + scale * (dropout(x) A^T) B^T,     scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)

A (rank, in) starts Kaiming-uniform and B (out, rank) zero, so a fresh adapter changes nothing. Every projection draws a
dropout mask of its own. Masks are a hash of (row key, projection, column), not a stream: a token's mask depends on the
seed, the step, its example and its position alone, so a step has the same gradient however it is split into
micro-batches, and a recomputed layer sees the same mask without anything being stored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.llama import LINEAR_NAMES, Linear, Llama
from study.errors import LetheError


class LoRALinear(nn.Linear):
    """A frozen linear with a trainable low-rank addition. It is the linear: same parameter names, plus lora_A and lora_B."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float, rslora: bool, salt: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=torch.float32, device=linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=linear.weight.device))
        self.rank, self.alpha, self.dropout, self.rslora = rank, alpha, dropout, rslora
        self.salt = salt  # tells this projection's dropout masks from the others'
        self.row_keys: Tensor | None = None  # (B * T,) int32, set by dropout_rows

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self) -> Tensor:
        """(out, in) float32: what the adapter adds to the weight."""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout if self.training else 0.0
        keys, rows = self.row_keys, x.shape[:-1].numel()
        if p and (keys is None or keys.numel() != rows):  # plain use outside the training loop
            keys = torch.randint(-(2**31), 2**31 - 1, (rows,), dtype=torch.int32, device=x.device)
        factors = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return _LowRank.apply(x, self.weight, self.bias, *factors, self.scale, p, keys, self.salt)


class _LowRank(torch.autograd.Function):
    """x W^T + scale * (dropout(x) A^T) B^T with W frozen. Keeps x and the thin product; masks are made again in backward.

    The rank-r products come first, so neither B A nor a gradient of W is ever formed.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, p, keys, salt):
        flat = x.reshape(-1, x.shape[-1])  # (M, in)
        thin = (drop(flat, p, keys, salt) @ A.T) * scale  # (M, rank)
        out = F.linear(flat, weight, bias).addmm_(thin, B.T)  # (M, out)
        ctx.save_for_backward(flat, weight, A, B, thin, keys)
        ctx.settings = scale, p, salt
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        flat, weight, A, B, thin, keys = ctx.saved_tensors
        scale, p, salt = ctx.settings
        shape, grad = grad.shape, grad.reshape(-1, grad.shape[-1])  # (M, out)
        grad_thin = (grad @ B) * scale  # (M, rank)
        grad_B = grad.T @ thin
        grad_A = grad_thin.T @ drop(flat, p, keys, salt)
        grad_x = None
        if ctx.needs_input_grad[0]:
            if p:
                grad_x = (grad @ weight).add_(drop(grad_thin @ A, p, keys, salt))
            else:
                grad_x = (grad @ weight).addmm_(grad_thin, A)
            grad_x = grad_x.view(*shape[:-1], -1)
        return grad_x, None, None, grad_A, grad_B, None, None, None, None


def _mix(x: Tensor) -> Tensor:
    """A full-avalanche hash of int32 values (the finaliser of MurmurHash3), wrapping as int32 does."""
    for shift, factor in ((16, -2048144789), (13, -1028477387), (16, 1)):
        x = (x ^ ((x >> shift) & (0x7FFFFFFF >> (shift - 1)))) * factor  # logical shift, since int32 is signed
    return x


def drop(x: Tensor, p: float, row_keys: Tensor | None, salt: int) -> Tensor:
    """Inverted dropout of x (M, N): element (row, column) survives if a hash of (row key, salt, column) says so.

    row_keys (M,) int32. The same keys and salt give the same mask to whatever x. p = 0 gives x itself.
    """
    if not p:
        return x
    row = _mix(row_keys ^ _to_int32(salt * 0x9E3779B1))[:, None]
    column = _mix(torch.arange(1, x.shape[-1] + 1, dtype=torch.int32, device=x.device))
    # xor joins two well-mixed words; the odd factor breaks its linearity. Three cheap passes over x, nothing stored.
    keep = (row ^ column).mul_(-1640531535) >= _to_int32(-(2**31) + int(p * 2**32))
    return torch.where(keep, x, 0.0).mul_(1.0 / (1.0 - p))


def _to_int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def dropout_keys(seed: int, step: int, examples: Tensor, length: int) -> Tensor:
    """(B * length,) int32 row keys for one micro-batch: a hash of (seed, step, example, position). examples (B,) integers."""
    start = torch.tensor([_to_int32(seed * 0x85EBCA6B + 1)], dtype=torch.int32, device=examples.device)
    key = _mix(_mix(start ^ _to_int32(step * 0xC2B2AE35 + 1))[:, None] ^ examples.to(torch.int32)[:, None])  # (B, 1)
    return _mix(key * 31 + torch.arange(length, dtype=torch.int32, device=examples.device)).flatten()


@contextmanager
def dropout_rows(model: Llama, keys: Tensor) -> Iterator[None]:
    """Within it, dropout masks follow these row keys (of the flattened B * T tokens), the backward pass included."""
    layers = lora_layers(model)
    for layer in layers.values():
        layer.row_keys = keys
    try:
        yield
    finally:
        for layer in layers.values():
            layer.row_keys = None


def lora_layers(model: Llama) -> dict[str, LoRALinear]:
    """The adapted linears by their full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_parameters(model: Llama) -> list[nn.Parameter]:
    return [parameter for layer in lora_layers(model).values() for parameter in (layer.lora_A, layer.lora_B)]


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
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in LINEAR_NAMES]


def add_layers(model: Llama, shapes: dict[str, tuple[int, float]], dropout: float, rslora: bool) -> None:
    """Replaces the named linears by LoRALinear with their (rank, alpha); A is left uninitialised."""
    model.requires_grad_(False)
    order = {name: index for index, name in enumerate(all_linears(model))}
    for name, (rank, alpha) in shapes.items():
        parent, _, leaf = name.rpartition(".")
        layer = LoRALinear(model.get_submodule(name), rank, alpha, dropout, rslora, salt=order[name] + 1)
        setattr(model.get_submodule(parent), leaf, layer.train(model.training))


def init_lora(model: Llama, generator: torch.Generator | None = None) -> None:
    """A Kaiming-uniform with a = sqrt(5), which is uniform in ±1/sqrt(in); B zero. A CPU generator gives every device the same."""
    for layer in lora_layers(model).values():
        bound = 1 / math.sqrt(layer.in_features)
        layer.lora_A.data.copy_(torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator))
        layer.lora_B.data.zero_()


def remove_lora(model: Llama) -> None:
    """Takes the adapters off; the base's weights are as they were."""
    for name, layer in lora_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        linear = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = layer.weight, layer.bias
        setattr(model.get_submodule(parent), leaf, linear.train(layer.training))


@torch.no_grad()
def merge_adapter(model: Llama) -> None:
    """Adds the adapters into the weights (summed in float32, rounded once to the weights' dtype) and takes them off.

    The model is another base afterwards, and its fingerprint says so: the adapter does not fit it a second time.
    """
    layers = lora_layers(model)
    if layers and model.fingerprint:
        content = b"".join(tensor.cpu().numpy().tobytes() for layer in layers.values() for tensor in (layer.lora_A[0], layer.lora_B[0]))
        model.fingerprint = hashlib.sha256(model.fingerprint.encode() + content).hexdigest()[:16]
    for layer in layers.values():
        layer.weight = nn.Parameter((layer.weight.float() + layer.delta()).to(layer.weight.dtype), requires_grad=False)
    remove_lora(model)


@contextmanager
def merged(model: Llama) -> Iterator[None]:
    """Within it the model runs with its adapters merged; afterwards weights and adapters are back, bit for bit."""
    layers = lora_layers(model)
    weights = {name: layer.weight for name, layer in layers.items()}
    fingerprint = model.fingerprint
    merge_adapter(model)
    try:
        yield
    finally:
        model.fingerprint = fingerprint
        for name, layer in layers.items():
            layer.weight = weights[name]
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.train(model.training))
