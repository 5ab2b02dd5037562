"""What a run leaves of a model, an adapter or (full fine-tuning) all weights: written to its folder, put on the base again."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch

from lora.adapter import adapter_fingerprint, load_adapter, save_adapter
from lora.layers import remove_lora
from model.checkpoint import open_safetensors, read_json, save_weights, weight_files
from model.config import LlamaConfig
from model.llama import Llama
from model.sharding import place
from study.errors import LetheError
from study.folder import read_json as read_json_file
from study.folder import write_json
from study.plan import nearest

# What a model folder holds beside its weights and config.json.
COPIED = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]


def save_state(model: Llama, folder: Path, name: str) -> None:
    """Writes the adapter in PEFT's format; for a model without one, all its weights as a Hugging Face folder. name: the base's."""
    if model.adapter is not None:
        save_adapter(model, folder, name)
    else:
        save_model(model, model.source, folder, model.dtype)


def save_model(model: Llama, source: Path, folder: Path, dtype: torch.dtype, changes: dict | None = None) -> None:
    """A Hugging Face folder of these weights in `dtype`, with the tokenizer, settings and licences of the folder `source`.

    changes: of its config.json; None takes a key away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in [*COPIED, *(p.name for p in source.glob("LICENSE*")), *(p.name for p in source.glob("USE_POLICY*"))]:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    written = {key: value for key, value in (read_json(source / "config.json") | (changes or {})).items() if value is not None}
    for key in {"torch_dtype", "dtype"} & set(written):
        written[key] = str(dtype).removeprefix("torch.")
    save_weights(model, folder / "model.safetensors", dtype, {"base_fingerprint": model.fingerprint})
    write_json(folder / "config.json", written)  # last


def fresh_model(source: Path, shape: dict[str, int], seed: int, folder: Path) -> Path:
    """Writes random weights of the source's shape, changed by `shape`, with its tokenizer, as a Hugging Face folder; or finds them there.

    Raises LetheError for a shape that no Llama has, and where the folder holds another.
    """
    known = [key for key, value in LlamaConfig.__dataclass_fields__.items() if value.type == "int"]
    for key in shape:
        if key not in known or key == "vocab_size":
            raise LetheError(f"--shape: {key!r} is not a number of a Llama's shape{nearest(key, [k for k in known if k != 'vocab_size'])}")
    changes: dict = dict(shape)
    if {"hidden_size", "num_attention_heads"} & set(shape) and "head_dim" not in shape:
        changes["head_dim"] = None  # which then follows from the two
    if "num_attention_heads" in shape and "num_key_value_heads" not in shape:
        changes["num_key_value_heads"] = shape["num_attention_heads"]
    if "num_hidden_layers" in shape:
        changes["layer_types"] = None
    raw = {key: value for key, value in (read_json(source / "config.json") | changes).items() if value is not None}
    for key, value in shape.items():
        if value < 1:
            raise LetheError(f"--shape: {key} must be 1 or more, not {value}")
    config = LlamaConfig.from_dict(raw, "--shape")
    if config.head_dim % 2:
        raise LetheError(f"--shape: a head's {config.head_dim} numbers cannot have rotary positions, which take pairs; give head_dim")
    if config.hidden_size % config.num_attention_heads and "head_dim" not in raw:
        raise LetheError(f"--shape: hidden_size {config.hidden_size} cannot be shared by {config.num_attention_heads} heads; give head_dim")
    made = {"seed": seed, "config": raw}
    if (found := read_json_file(folder / "fresh.json", None)) is not None:
        if found != made:
            raise LetheError(f"{folder} holds fresh weights of another shape or seed; choose another --out, or ask for the same")
        return folder
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    save_model(model, source, folder, torch.float32, changes)
    write_json(folder / "fresh.json", made)
    return folder


def put_on(model: Llama, folder: Path | None, dropout: float | None = None) -> None:
    """Makes the model what a run folder says: the base with its adapter, or its weights. None: the base alone.

    dropout: of the adapter, other than the file's, for training on. Raises LetheError for what does not fit this base.
    """
    weights = folder is not None and (folder / "model.safetensors").is_file()
    if weights:
        remove_lora(model)
        read_weights(model, folder)
        return
    if model.altered:
        read_weights(model, model.source)
    if folder is None:
        remove_lora(model)
    else:
        load_adapter(model, folder, dropout)


@torch.no_grad()
def read_weights(model: Llama, folder: Path) -> None:
    """Copies the weights of a folder over the model's own, in place: addresses that others know stay valid."""
    own, left = dict(model.named_parameters()), {name for name, _ in model.named_parameters() if not name.startswith("adapter.")}
    for file in weight_files(folder):
        with open_safetensors(file) as tensors:
            made_for = (tensors.metadata() or {}).get("base_fingerprint", "")
            if made_for and made_for != model.fingerprint and folder != model.source:
                raise LetheError(f"{file} was trained on another base (fingerprint {made_for}; this model's is {model.fingerprint})")
            for name in left & set(tensors.keys()):
                tensor = tensors.get_tensor(name)
                if tensor.shape != own[name].shape:
                    raise LetheError(f"{file}: {name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
                place(own[name], tensor)
                left.remove(name)
    if left:
        raise LetheError(f"{folder} misses tensors: {', '.join(sorted(left)[:3])}")
    model.altered = folder != model.source


def state_fingerprint(folder: Path) -> str:
    """A hash of what a run folder puts on its base."""
    if (folder / "adapter_model.safetensors").is_file():
        return adapter_fingerprint(folder)
    with open(folder / "model.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
