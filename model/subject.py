"""A model with its tokenizer, loaded as the settings say."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.attention import kernels_in_use
from model.checkpoint import load_model
from model.llama import Llama
from model.offload import parse_memory, stream_layers, told
from model.quantized import base_size
from model.tokenizer import Tokenizer, load_tokenizer
from study.errors import LetheError


@dataclass
class Subject:
    """A base model with its tokenizer: what a study is about."""

    name: str
    model: Llama
    tokenizer: Tokenizer
    about: str  # three lines: shape, device and dtype; memory of the weights; which kernels run


def resolve(device: str, dtype: str) -> tuple[str, str, str]:
    """(device, dtype, why that dtype). auto: CUDA where there is one; bfloat16 there (float16 on older ones), float32 on CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise LetheError(f"--device {device}: this machine has no CUDA device that torch can use; give --device cpu")
    if dtype != "auto":
        return device, dtype, "as asked"
    if device == "cpu":
        return device, "float32", "CPU"
    name = torch.cuda.get_device_name(device)
    return (device, "bfloat16", name) if torch.cuda.is_bf16_supported() else (device, "float16", f"{name} has no bfloat16")


def load_subject(
    name: str, device: str = "auto", dtype: str = "auto", template: str = "auto", quantize: str = "none",
    max_memory: str | None = None, model: Llama | None = None,
) -> Subject:  # fmt: skip
    """Loads model and tokenizer. device and dtype: see resolve.

    quantize: see model.quantized. max_memory: layers beyond it stay on the host, see model.offload. model: where it is loaded.
    """
    device, dtype, why = resolve(device, dtype)
    tokenizer = load_tokenizer(name, template)
    model = model or load_model(name, getattr(torch, dtype), "cpu" if max_memory else device, quantize)
    where = stream_layers(model, device, parse_memory(max_memory)) if max_memory else ""
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"its tokenizer has {tokenizer.vocab_size} tokens, its model only {model.config.vocab_size}"
        raise LetheError(f"{name}: {sizes}; they do not belong together")
    count, size = base_size(model)
    about = f"{name}: {count / 1e6:.2f} M parameters, {device}, {dtype} ({why}), template {tokenizer.template}"
    about += f"\n{where or f'weights    {told(size)}'}" + (f", the layers' linears in {quantize}" if quantize != "none" else "")
    about += f"\nkernels    {kernels_in_use(model)}"
    return Subject(name, model, tokenizer, about)
