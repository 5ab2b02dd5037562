"""The Llama decoder, written by hand: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Reads like the architecture of arXiv 2302.13971 (Llama), 2307.09288 (grouped queries) and the llama3 rotary scaling of
Llama 3.1. Parameter names are Hugging Face's, so a checkpoint's tensors drop in by name.

    model = Llama(config)                     # B examples, T tokens, H hidden, V vocabulary
    logits = model(input_ids)                 # (B, T) -> (B, T, V)
    states = model.hidden(input_ids)          # (B, T, H), after the final norm and before the head
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from study.errors import LetheError

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the halves of each head (Hugging Face's layout). x (B, heads, T, D), cos and sin broadcast to it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Linear(nn.Linear):
    """nn.Linear whose weights are left as they are: they are loaded, or made by Llama.init_weights."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding, likewise."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # statistics in float32, whatever the compute dtype
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class KVCache:
    """Keys and values of every layer in one block each, and how many tokens each row holds.

    Rows are ragged: a prompt is written from slot 0, and decoding writes row b at slot lengths[b], over the padding that
    the prefill left there. Slots beyond a row's length are masked, so what they hold does not matter.
    """

    def __init__(self, config: LlamaConfig, batch: int, slots: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, slots, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)

    def keep_rows(self, rows: Tensor) -> None:
        """Drops all rows but these (finished sequences leave the batch)."""
        self.keys, self.values, self.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]

    def append_one(self, layer: int, key: Tensor, value: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """Writes one token a row, key and value (B, kv, 1, D). Returns keys, values (B, kv, slots, D), mask (B, 1, 1, slots)."""
        row = torch.arange(key.shape[0], device=key.device)
        self.keys[layer][row, :, self.lengths] = key[:, :, 0]
        self.values[layer][row, :, self.lengths] = value[:, :, 0]
        seen = torch.arange(slots, device=key.device) <= self.lengths[:, None]
        return self.keys[layer][:, :, :slots], self.values[layer][:, :, :slots], seen[:, None, None, :]


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer = layer
        bias = config.attention_bias
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, slots: int) -> Tensor:
        B, T, _ = x.shape
        query = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)  # (B, heads, T, D)
        key = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # (B, kv, T, D)
        value = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        group = self.heads // self.kv_heads
        if slots:  # one new token a row: the heads of a group are rows of one small attention, keys are not copied
            key, value, seen = cache.append_one(self.layer, key, value, slots)
            query = query.view(B, self.kv_heads, group, self.head_dim)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen).view(B, 1, -1)
            return self.o_proj(out)
        if cache is not None:
            cache.keys[self.layer][:, :, :T] = key
            cache.values[self.layer][:, :, :T] = value
        if group > 1:
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        # Padding is on the right, so the causal mask alone keeps it out of every real token's sight.
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(size, inner, bias=bias)
        self.up_proj = Linear(size, inner, bias=bias)
        self.down_proj = Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, slots: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, slots)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """A Llama for causal language modelling. A tied head has no parameter of its own, as in Hugging Face's files."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.fingerprint = ""  # names the base's weights; set by load_model, stored with adapters and scores
        self.gradient_checkpointing = False

    @property
    def head_weight(self) -> Tensor:
        """(V, H): the matrix that turns states into logits."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def init_weights(self, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        """Normal weights for training from scratch; the two projections into the residual stream shrink with depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = std / math.sqrt(2 * self.config.num_hidden_layers) if deep else std
                parameter.data.normal_(0.0, scale, generator=generator)
            else:
                parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)

    def hidden(self, input_ids: Tensor, cache: KVCache | None = None, decode_slots: int = 0, rows: Tensor | None = None) -> Tensor:
        """States after the final norm: (B, T, H), or (len(rows), H) for the given rows of the flattened B * T.

        Without a cache, or with an empty one, the tokens stand at positions 0 … T-1 (pad on the right). With
        decode_slots > 0 each row gets one token (T = 1) behind what the cache holds of it, and decode_slots is how many
        slots of the cache take part: at least the longest row's new length.
        """
        x = self.model.embed_tokens(input_ids)
        if decode_slots:
            positions = cache.lengths[:, None].float()  # (B, 1)
        else:
            positions = torch.arange(input_ids.shape[1], device=x.device).float()[None]  # (1, T)
        # Frequencies are made in float32 even when the model is not, or long positions lose their phase.
        angle = positions[..., None] * rotary_frequencies(self.config).to(x.device)
        angle = torch.cat((angle, angle), dim=-1)[:, None]  # (B or 1, 1, T, D)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for layer in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, None, 0, use_reentrant=False)
            else:
                x = layer(x, cos, sin, cache, decode_slots)
        if rows is not None:
            x = x.reshape(-1, x.shape[-1])[rows]
        return self.model.norm(x)

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.linear(self.hidden(input_ids), self.head_weight)
