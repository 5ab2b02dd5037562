"""The shape of a Llama, as a Hugging Face config.json tells it, and its rotary positions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.dispatch import to_device
from study.errors import LetheError


@dataclass(frozen=True)
class LlamaConfig:
    """What a Hugging Face config.json says about the shape of a Llama."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = field(default_factory=dict)  # {} means none
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 2048

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config.json") -> LlamaConfig:
        """Reads both spellings of the rotary settings: rope_theta + rope_scaling, and rope_parameters (transformers 5).

        Raises LetheError for another architecture, a missing key, or a rotary scaling that is not implemented.
        """
        if raw.get("model_type", "llama") != "llama":
            raise LetheError(f"{where}: model_type is {raw['model_type']!r}, but only 'llama' can be loaded")
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [key for key in needed if not isinstance(raw.get(key), int)]
        if missing:
            raise LetheError(f"{where}: the key {missing[0]!r} is missing or no integer; copy the model's original config")
        if raw.get("hidden_act", "silu") != "silu":
            raise LetheError(f"{where}: hidden_act is {raw['hidden_act']!r}; a Llama's is 'silu'")
        heads = raw["num_attention_heads"]
        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
        kind = rope.get("rope_type") or rope.get("type") or "default"  # some files carry both spellings
        if kind not in ("default", "linear", "llama3"):
            raise LetheError(f"{where}: rotary scaling {kind!r} is unknown here; known: default, linear, llama3")
        wanted = {"llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        wanted = wanted.get(kind, ("factor",) if kind == "linear" else ())
        for key in wanted:
            if not isinstance(rope.get(key), (int, float)):
                raise LetheError(f"{where}: rotary scaling {kind!r} needs the key {key!r}, a number")
        config = cls(
            **{key: raw[key] for key in needed},
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            rope_scaling={} if kind == "default" else {"rope_type": kind, **{key: float(rope[key]) for key in wanted}},
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            attention_bias=raw.get("attention_bias", False),
            mlp_bias=raw.get("mlp_bias", False),
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
        )
        if heads % config.num_key_value_heads:
            raise LetheError(f"{where}: {heads} heads cannot share {config.num_key_value_heads} key-value heads evenly")
        return config


def training_flops(config: LlamaConfig, length: int) -> float:
    """FLOPs of training a token in rows of `length`, forward and backward, all weights: six for each weight that is multiplied by.

    With attention's products, of which half are masked; without the embedding, which is looked up (arXiv 2001.08361 counts so).
    """
    c = config
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = c.hidden_size * (2 * queries + 2 * keys + 3 * c.intermediate_size)
    return 6.0 * (c.num_hidden_layers * layer + c.vocab_size * c.hidden_size) + 6.0 * c.num_hidden_layers * queries * length


def rotary_frequencies(config: LlamaConfig) -> Tensor:
    """(head_dim / 2,) float32: theta^(-2i/d), stretched for long contexts as Llama 3.1 does where the config says so."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if not scaling:
        return frequency
    slow = frequency / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    # Fast waves stay, slow waves are stretched by the factor, those between are blended.
    wavelength = 2 * math.pi / frequency
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * slow + blend * frequency
    frequency = torch.where(wavelength > context / low, slow, frequency)
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(between, blended, frequency)


def rotary_phases(config: LlamaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (T, head_dim / 2) of positions (T,), in float32 even for other models, or long positions lose their phase."""
    angle = positions.float()[:, None] * to_device(rotary_frequencies(config), positions.device)
    return angle.cos(), angle.sin()
