"""Adapters in PEFT's file format: adapter_model.safetensors and adapter_config.json, written for PEFT and read strictly.

A wrong adapter is an error that names the first offenders; the base is never served silently in its place.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch

from lora.layers import LoRALinear, add_layers, all_linears, lora_layers, remove_lora, target_names
from model.checkpoint import open_safetensors, read_json, write_tensors
from model.llama import LINEAR_NAMES, Llama
from study.errors import LetheError
from study.folder import write_json

PREFIX = "base_model.model."  # PEFT's name for the wrapped model


def save_adapter(model: Llama, folder: str | Path, base: str = "") -> None:
    """Writes the model's adapters. base: the name or path that adapter_config.json gives as base model.

    The base's fingerprint stands in the safetensors metadata, where PEFT does not look but load_adapter does.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapters to save; add_lora first")
    folder, tensors = Path(folder), {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().float().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().float().cpu().contiguous()
    write_tensors(folder / "adapter_model.safetensors", tensors, {"base_fingerprint": model.fingerprint})
    any_layer = next(iter(layers.values()))
    write_json(folder / "adapter_config.json", peft_config(layers, any_layer, base))


def peft_config(layers: dict[str, LoRALinear], any_layer: LoRALinear, base: str) -> dict:
    """The keys that PEFT reads (peft 0.21); ranks and alphas that differ go into its patterns."""
    return {
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != any_layer.alpha},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "lora_alpha": any_layer.alpha,
        "lora_dropout": any_layer.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": any_layer.rank,
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != any_layer.rank},
        "revision": None,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in layers}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": any_layer.rslora,
    }


def load_adapter(model: Llama, folder: str | Path, dropout: float | None = None) -> None:
    """Puts the adapter of a folder on the model, replacing any there is. dropout: other than the file's, for training on.

    Raises LetheError, naming the first offenders, for missing or foreign tensors, wrong shapes, an adapter made for
    another base, one whose B are all zero (it was never trained), and the PEFT features that are not LoRA proper.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LetheError(f"no adapter folder {folder}")
    config_file, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_file.is_file() or not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        hint = "it holds a pickled adapter_model.bin, which is never opened" if pickled else "is it a run folder whose training has ended?"
        raise LetheError(f"{folder} holds no adapter_config.json with adapter_model.safetensors; {hint}")
    config = read_json(config_file)
    _refuse_other_methods(config, config_file)
    shapes = _expected_shapes(model, config, config_file)
    with open_safetensors(file) as tensors:
        made_for = (tensors.metadata() or {}).get("base_fingerprint", "")
        if made_for and model.fingerprint and made_for != model.fingerprint:
            raise LetheError(
                f"{file} was trained on another base (fingerprint {made_for}, base {config.get('base_model_name_or_path') or 'unnamed'}); "
                f"this model's is {model.fingerprint}. Give the --model it was trained on"
            )
        loaded = {name: tensors.get_tensor(name).float() for name in tensors.keys()}
    wanted = {}
    for name, (rank, _) in shapes.items():
        linear = model.get_submodule(name)
        wanted[f"{PREFIX}{name}.lora_A.weight"] = (rank, linear.in_features)
        wanted[f"{PREFIX}{name}.lora_B.weight"] = (linear.out_features, rank)
    _refuse_misfits(wanted, loaded, file)
    remove_lora(model)
    add_layers(model, shapes, config.get("lora_dropout", 0.0) if dropout is None else dropout, config.get("use_rslora", False))
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_A.copy_(loaded[f"{PREFIX}{name}.lora_A.weight"])
            layer.lora_B.copy_(loaded[f"{PREFIX}{name}.lora_B.weight"])


def _refuse_other_methods(config: dict, file: Path) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise LetheError(f"{file}: peft_type {config['peft_type']!r} is not LORA, the only kind that can be loaded")
    refused = {"use_dora": False, "bias": "none", "modules_to_save": None, "layers_to_transform": None, "fan_in_fan_out": False}
    for key, plain in refused.items():
        if config.get(key, plain) not in (plain, None, [], False):
            raise LetheError(f"{file}: {key}={config[key]!r} is not supported; merge that adapter with PEFT and load the merged model")


def _expected_shapes(model: Llama, config: dict, file: Path) -> dict[str, tuple[int, float]]:
    """Which linears the config adapts, with their rank and alpha; PEFT's defaults and patterns honoured."""
    targets = config.get("target_modules") or ["q_proj", "v_proj"]
    names = all_linears(model)
    if isinstance(targets, str) and targets != "all-linear":
        chosen = [name for name in names if re.fullmatch(targets, name)]  # PEFT reads a string as a regular expression
    else:
        suffixes = target_names([t.rsplit(".", 1)[-1] for t in targets] if isinstance(targets, list) else "all")
        whole = [t for t in targets if t not in LINEAR_NAMES] if isinstance(targets, list) else []
        chosen = [n for n in names if n.rsplit(".", 1)[1] in suffixes and (not whole or any(n.endswith(t) for t in targets))]
    if not chosen:
        raise LetheError(f"{file}: target_modules {targets!r} match no linear of this model")

    def pattern(key: str, name: str, default: float) -> float:
        for wanted, value in (config.get(key) or {}).items():
            if re.fullmatch(rf"(.*\.)?({wanted})", name):
                return value
        return default

    return {n: (int(pattern("rank_pattern", n, config.get("r", 8))), pattern("alpha_pattern", n, config.get("lora_alpha", 8))) for n in chosen}


def _refuse_misfits(wanted: dict[str, tuple[int, int]], loaded: dict[str, torch.Tensor], file: Path) -> None:
    missing, foreign = sorted(set(wanted) - set(loaded)), sorted(set(loaded) - set(wanted))
    if missing or foreign:
        parts = [f"{word} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                 for word, names in (("misses", missing), ("has unexpected", foreign)) if names]  # fmt: skip
        hint = ""
        if foreign and not foreign[0].startswith(PREFIX + "model.layers."):
            hint = f"; keys should begin with {PREFIX}model.layers."
        raise LetheError(f"{file} does not fit this base: it {' and '.join(parts)}{hint}")
    wrong = [f"{name} is {tuple(loaded[name].shape)}, expected {shape}" for name, shape in wanted.items() if tuple(loaded[name].shape) != shape]
    if wrong:
        raise LetheError(f"{file} does not fit this base: {'; '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}")
    if not any(tensor.any() for name, tensor in loaded.items() if ".lora_B." in name):
        raise LetheError(f"{file}: every lora_B is zero, so the adapter would do nothing; it was saved before training")
    for name, tensor in loaded.items():
        if not torch.isfinite(tensor).all():
            raise LetheError(f"{file}: {name} holds NaN or infinity")


def adapter_fingerprint(folder: str | Path) -> str:
    """A hash of an adapter's weights and scaling."""
    digest = hashlib.sha256((Path(folder) / "adapter_model.safetensors").read_bytes())
    config = read_json(Path(folder) / "adapter_config.json")
    kept = {k: config.get(k) for k in ("r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern")}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()[:16]
