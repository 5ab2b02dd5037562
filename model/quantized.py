"""A frozen base in 4 or 8 bits: the linears of the decoder layers are kept small and made dense for each product anew.

    nf4    4 bits a weight, one scale for 64 weights in a row, the scales in 8 bits themselves ("double quantisation"):
           4.13 bits in all. QLoRA, arXiv 2305.14314; by bitsandbytes, and the same numbers as transformers' load_in_4bit.
    int8   8 bits a weight, one float32 scale a row: round(127 w / max |row|), the weights of LLM.int8(), arXiv 2208.07339.
           The product is in the compute dtype, so nothing is rounded but the weights.

Embeddings, head, norms and biases stay in the compute dtype. Do not use it for speed: making the matrix costs more than it
saves, most of all with few tokens a pass, as in generation. It saves memory, and the base is a little worse.

An adapter trained on it says so: the base's fingerprint ends in ":nf4" or ":int8". It cannot be merged into it, since
rounding the sum would swallow most of the adapter; scoring and generation run with the adapter beside the weights. To export
it, merge it into the base in its own dtype: there it meets weights that differ by what the rounding had taken.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from model.llama import Llama
from study.errors import LetheError

KINDS = ("nf4", "int8")
BLOCK, SCALES_BLOCK = 64, 256  # weights with one scale; scales with one scale of theirs


def library() -> ModuleType:
    """bitsandbytes.functional, imported where it is used: it is an optional extra."""
    # It looks for a hub package named as this house's own `kernels`, and warns that it is another.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional as functional
    except (ImportError, OSError) as error:  # OSError: its binary does not fit this machine
        raise LetheError(
            f"--quantize nf4 needs bitsandbytes ({str(error).splitlines()[0]}); pip install -r requirements-extra.txt, "
            "or use --quantize int8"
        ) from error
    return functional


def check_quantize(kind: str) -> None:
    """Raises LetheError for an unknown kind, or where what it needs is not installed."""
    if kind not in KINDS:
        raise LetheError(f"--quantize {kind!r} is unknown; known: none, {', '.join(KINDS)}")
    if kind == "nf4":
        library()


class Packed(NamedTuple):
    """One weight (out, in), small. tensors: of nf4, the codes (two a byte), the scales' codes, the scales' scales, their mean and
    the 256 values of a scale's code; of int8, the values (out, in) and the scales (out, 1)."""

    kind: str
    tensors: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype  # of the dense matrix

    def dense(self, out: Tensor | None = None) -> Tensor:
        """(out, in) in dtype; into `out` where that is given."""
        if self.kind == "int8":
            values, scales = self.tensors  # the product is taken in float32 and rounded once
            out = torch.empty(self.shape, dtype=self.dtype, device=values.device) if out is None else out
            return torch.mul(values, scales, out=out)
        functional = library()
        codes, scale_codes, scales, mean, values = self.tensors
        scales = functional.dequantize_blockwise(scale_codes, absmax=scales, code=values, blocksize=SCALES_BLOCK).add_(mean)
        state = functional.QuantState(absmax=scales, shape=self.shape, blocksize=BLOCK, quant_type="nf4", dtype=self.dtype)
        if out is None or out.is_cuda:
            return functional.dequantize_4bit(codes, state, out=out)
        return out.copy_(functional.dequantize_4bit(codes, state))  # on CPU it takes no out


def pack(weight: Tensor, kind: str, dtype: torch.dtype) -> Packed:
    """weight (out, in) of any float dtype, rounded from its own values whatever the compute dtype."""
    weight = weight.float()
    if kind == "int8":
        most = weight.abs().amax(1, keepdim=True)
        values = (weight * (127.0 / most.clamp(min=1e-30))).round_().to(torch.int8)  # a row of zeros stays one
        return Packed(kind, (values, most / 127.0), weight.shape, dtype)
    codes, state = library().quantize_4bit(weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    tensors = (codes, state.absmax, state.state2.absmax, state.offset, state.state2.code)
    return Packed(kind, tensors, weight.shape, dtype)


class Rows(NamedTuple):
    """The weights of linears that are multiplied as one, packed each for itself, as other tools pack them."""

    parts: tuple[Packed, ...]

    def dense(self) -> Tensor:
        """(sum of out, in)"""
        first = self.parts[0]
        if len(self.parts) == 1:
            return first.dense()
        sizes = [part.shape[0] for part in self.parts]
        whole = torch.empty(sum(sizes), first.shape[1], dtype=first.dtype, device=first.tensors[0].device)
        for part, rows in zip(self.parts, whole.split(sizes), strict=True):
            part.dense(out=rows)
        return whole

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part.tensors]

    def holding(self, tensors: list[Tensor]) -> Rows:
        """The same weights whose memory is `tensors`, in the order of self.tensors."""
        rest = iter(tensors)
        return Rows(tuple(part._replace(tensors=tuple(next(rest) for _ in part.tensors)) for part in self.parts))


def put_packed(model: Llama, packed: dict[str, Packed], kind: str) -> None:
    """Makes the packed weights, by parameter name, those of the model's linears."""
    names = {module: name for name, module in model.named_modules()}
    for layer in model.model.layers:
        for block, group in layer.groups():
            block.elsewhere[group] = Rows(tuple(packed[f"{names[linear]}.weight"] for linear in block._groups[group]))
    model.quantized = kind
    model.fingerprint += f":{kind}"


def base_size(model: Llama) -> tuple[int, int]:
    """(parameters, bytes) of the base, wherever they lie; adapters not counted."""
    weights = [p for name, p in model.named_parameters() if not name.startswith("adapter.")]
    count, size = sum(p.numel() for p in weights), sum(p.nbytes for p in weights)
    for layer in model.model.layers:
        for block, group in layer.groups():
            packed = getattr(block.elsewhere.get(group), "parts", ())
            count += sum(part.shape.numel() for part in packed)
            size += sum(tensor.nbytes for part in packed for tensor in part.tensors)
    return count, size


def refuse_merging(model: Llama) -> None:
    """Raises LetheError for a quantised base."""
    if model.quantized:
        raise LetheError(
            f"an adapter cannot be merged into a base in {model.quantized}: rounding the sum would swallow most of it. "
            "Score with the adapter beside the weights (--no_merge), or load the base without --quantize and merge it there"
        )
