"""The Llama decoder, written by hand: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Reads like the architecture of arXiv 2302.13971 (Llama), 2307.09288 (grouped queries) and the llama3 rotary scaling of
Llama 3.1. Parameter names are Hugging Face's, so a checkpoint's tensors drop in by name.

    model = Llama(config)                          # T tokens, H hidden, V vocabulary
    logits = model(input_ids)                      # (B, T) -> (B, T, V)
    states = model.hidden(input_ids)               # (B, T, H), after the final norm and before the head
    states = model.hidden(packed_ids, sight)       # (T, H): examples one behind the other; the sight knows who sees whom
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import linear_nll
from kernels.linear import Addition, Joined, linear, norm, norm_linear, rotate, swiglu_linear
from model.attention import Pack
from model.config import LlamaConfig

GROUPS = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
LINEAR_NAMES = tuple(name for names in GROUPS.values() for name in names)


class Linear(nn.Linear):
    """nn.Linear whose weights are left as they are: they are loaded, or made by Llama.init_weights."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding, likewise."""

    def reset_parameters(self) -> None:
        pass


class Apart(NamedTuple):
    """Weights that stay where they are, and are joined for each product anew."""

    parts: tuple[nn.Parameter, ...]

    def dense(self) -> Tensor:
        weights = [part.detach() for part in self.parts]
        return torch.cat(weights) if len(weights) > 1 else weights[0]


class Block(nn.Module):
    """The linears of attention or of the MLP under Hugging Face's names; those with one input are multiplied as one."""

    apart = False  # the weights come and go (FSDP2 gathers them for a pass and frees them): nothing of them may be kept

    def __init__(self, bias: bool, **shapes: tuple[int, int]):
        super().__init__()
        for name, (inputs, outputs) in shapes.items():
            self.add_module(name, Linear(inputs, outputs, bias=bias))
        names = {group: [name for name in members if name in shapes] for group, members in GROUPS.items()}
        self._groups = {group: [getattr(self, name) for name in members] for group, members in names.items() if members}
        self._joined: dict[str, tuple[list[int], Joined]] = {}
        self.elsewhere: dict[str, Any] = {}  # group -> what makes its matrix, if quantised (model.quantized) or streamed (model.offload)

    def joined(self, group: str) -> Joined:
        """The weights of a group as one matrix whose rows they are. Where they lie apart (just loaded or moved) they are joined."""
        linears = self._groups[group]
        if group in self.elsewhere:
            found = Joined(self.elsewhere[group], (), None)
        elif self.apart:
            parts = tuple(module._parameters["weight"] for module in linears)
            found = Joined(Apart(parts), parts, None)
        else:
            found = self._in_one(group, linears)
        return found if linears[0].bias is None else found._replace(bias=torch.cat([module.bias for module in linears]))

    def _in_one(self, group: str, linears: list[Linear]) -> Joined:
        places = [module._parameters["weight"].data_ptr() for module in linears]
        if group not in self._joined or self._joined[group][0] != places:
            with torch.inference_mode(False), torch.no_grad():
                whole = linears[0].weight.detach()
                if len(linears) > 1:
                    whole = torch.cat([module.weight.detach() for module in linears])
                    for module, rows in zip(linears, whole.split([module.out_features for module in linears]), strict=True):
                        module.weight.data = rows
            places = [module.weight.data_ptr() for module in linears]
            self._joined[group] = places, Joined(whole, tuple(module.weight for module in linears), None)
        return self._joined[group][1]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig, index: int):
        super().__init__()
        H, inner, D = config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        self.index, self.rotated = index, heads + kv
        self.self_attn = Block(config.attention_bias, q_proj=(H, heads * D), k_proj=(H, kv * D), v_proj=(H, kv * D), o_proj=(heads * D, H))
        self.mlp = Block(config.mlp_bias, gate_proj=(H, inner), up_proj=(H, inner), down_proj=(inner, H))
        self.input_layernorm = RMSNorm(H, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(H, config.rms_norm_eps)

    def groups(self) -> Iterator[tuple[Block, str]]:
        """The linears that are multiplied as one, in the order of their products."""
        return ((block, group) for block in (self.self_attn, self.mlp) for group in block._groups)

    def forward(
        self, x: Tensor, residual: Tensor | None, sight: Pack, added: dict[str, Addition], row_keys: Tensor | None, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (T, H), what the layer before adds to the residual stream, and the stream -> the same two of this layer.

        With rows (n,) both come out for these rows alone, (n, H): only keys and values are needed of the others.
        """
        attention, mlp, before, after = self.self_attn, self.mlp, self.input_layernorm, self.post_attention_layernorm
        qkv, residual = norm_linear(x, residual, before.weight, before.eps, attention.joined("qkv"), added.get("qkv"), row_keys)
        x = sight.attend(self.index, rotate(qkv, self.rotated, sight.cos, sight.sin))
        if rows is not None:
            x, residual = x.index_select(0, rows), residual.index_select(0, rows)
            row_keys = None if row_keys is None else row_keys[rows]
        x = linear(x, attention.joined("o"), added.get("o"), row_keys)
        gate_up, residual = norm_linear(x, residual, after.weight, after.eps, mlp.joined("gate_up"), added.get("gate_up"), row_keys)
        return swiglu_linear(gate_up, mlp.joined("down"), added.get("down"), row_keys), residual


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
        self.adapter: nn.Module | None = None  # lora.layers.LoRA; its additions(dtype) are what it adds to each layer's linears
        self.fingerprint = ""  # names the base's weights; set by load_model, stored with adapters and scores
        self.source: Path | None = None  # the folder they were loaded from
        self.altered = False  # full fine-tuning has changed them since
        self.gradient_checkpointing = False
        self.computes_in: torch.dtype | None = None  # where it is not the type that the weights lie in (model.sharding)
        self.quantized = ""  # "nf4" or "int8" where the layers' linears are kept so (model.quantized); they cannot be merged into
        self.stream: Any = None  # brings layers from host memory, where some are there (model.offload)

    @property
    def head_weight(self) -> Tensor:
        """(V, H): the matrix that turns states into logits."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.computes_in or self.model.embed_tokens.weight.dtype

    @property
    def captures(self) -> bool:
        """Whether a decoding step can be a CUDA graph: it would replay a streamed layer's copy out of turn, and nf4 is not known to do."""
        return self.device.type == "cuda" and self.stream is None and self.quantized != "nf4"

    def init_weights(self, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        """Normal weights for training from scratch; the two projections into the residual stream shrink with depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = std / math.sqrt(2 * self.config.num_hidden_layers) if deep else std
                parameter.data.normal_(0.0, scale, generator=generator)
            else:
                parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)

    def join(self) -> None:
        """Joins the weights that are multiplied as one, so that their memory no longer moves. Otherwise the first pass does."""
        for layer in self.model.layers:
            for block, group in layer.groups():
                if not block.apart:
                    block.joined(group)

    def hidden(self, input_ids: Tensor, sight: Pack | None = None, rows: Tensor | None = None, row_keys: Tensor | None = None) -> Tensor:
        """States after the final norm. input_ids (B, T) -> (B, T, H); or packed (T,) with its sight (model.attention) -> (T, H).

        rows (n,) of the flattened tokens: the states of these alone, (n, H). row_keys (T,) int32: which dropout masks the
        adapters draw (lora.layers.dropout_keys); without them they are drawn anew.
        """
        if sight is None:
            sight = Pack([input_ids.shape[1]] * input_ids.shape[0], self.config, input_ids.device)
        x, residual, added = self.model.embed_tokens(input_ids.flatten()), None, {}
        if self.adapter is not None:
            added = self.adapter.additions(x.dtype)
            if row_keys is None and self.adapter.drops:
                row_keys = torch.randint(-(2**31), 2**31 - 1, (len(x),), dtype=torch.int32, device=x.device)
        streamed = self.stream.begin() if self.stream else ()
        for index, layer in enumerate(self.model.layers):
            saves = (self.gradient_checkpointing or index in streamed) and torch.is_grad_enabled()
            run = partial(checkpoint, layer, use_reentrant=False) if saves else layer
            last = index + 1 == len(self.model.layers)
            x, residual = run(x, residual, sight, added.get(index, {}), row_keys, rows if last else None)
        states = norm(x, residual, self.model.norm.weight, self.model.norm.eps)  # of all layers' sum
        return states if rows is not None else states.view(*input_ids.shape, -1)

    def nll(self, input_ids: Tensor, sight: Pack, rows: Tensor, targets: Tensor, row_keys: Tensor | None = None) -> Tensor:
        """Losses (n,) float32 of targets (n,), which the states of rows (n,) predict: the whole way from tokens in one method.

        input_ids (T,) packed, with their sight; rows of them; row_keys (T,) as for hidden.
        """
        return linear_nll(self.hidden(input_ids, sight, rows, row_keys), self.head_weight, targets)

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.linear(self.hidden(input_ids), self.head_weight)
