"""Adapters in PEFT's file format: adapter_model.safetensors and adapter_config.json, written for PEFT and read strictly.

A wrong adapter is an error that names the first offenders; the base is never served silently in its place.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch

from lora.layers import Projection, add_layers, all_linears, lora_layers, target_names
from model.checkpoint import open_safetensors, read_json, write_tensors
from model.llama import Llama
from study.errors import LetheError
from study.folder import write_json
from study.logging import say

PREFIX = "base_model.model."  # PEFT's name for the wrapped model

# What an adapter_config.json may say beyond LoRA proper, with the values (besides none, false and empty) that are plain.
# Most other init_lora_weights change the base before training, so A and B do not fit it as it is.
BEYOND_LORA = {
    "use_dora": (), "bias": ("none",), "modules_to_save": (), "layers_to_transform": (), "fan_in_fan_out": (), "lora_bias": (),
    "use_qalora": (), "use_bdlora": (), "alora_invocation_tokens": (), "layer_replication": (), "trainable_token_indices": (),
    "target_parameters": (), "arrow_config": (), "kasa_config": (), "monteclora_config": (),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal", "mica"),
}  # fmt: skip


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
    write_json(folder / "adapter_config.json", peft_config(layers, model.adapter.dropout, all_linears(model), base))


def peft_config(layers: dict[str, Projection], dropout: float, linears: list[str], base: str) -> dict:
    """The keys that PEFT reads (peft 0.21); ranks and alphas that differ go into its patterns. linears: all of the model."""
    any_layer = next(iter(layers.values()))
    kinds = {name.rsplit(".", 1)[1] for name in layers}
    whole = set(layers) == {name for name in linears if name.rsplit(".", 1)[1] in kinds}  # of these kinds, every one
    return {
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != any_layer.alpha},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "lora_alpha": any_layer.alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": any_layer.rank,
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != any_layer.rank},
        "revision": None,
        "target_modules": sorted(kinds if whole else layers),
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
        weights, _, kind = made_for.partition(":")  # a quantised base's fingerprint ends in its kind
        if made_for and made_for != model.fingerprint and weights == model.fingerprint.partition(":")[0]:
            here = model.quantized or "full"
            say(f"{file} was trained on this base in {kind or 'full'}; here it is in {here}: scores will differ a little")
        elif made_for and model.fingerprint and made_for != model.fingerprint:
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
    add_layers(model, shapes, config.get("lora_dropout", 0.0) if dropout is None else dropout, config.get("use_rslora", False))
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_A.copy_(loaded[f"{PREFIX}{name}.lora_A.weight"])
            layer.lora_B.copy_(loaded[f"{PREFIX}{name}.lora_B.weight"])


def _refuse_other_methods(config: dict, file: Path) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise LetheError(f"{file}: peft_type {config['peft_type']!r} is not LORA, the only kind that can be loaded")
    for key, plain in BEYOND_LORA.items():
        value = config.get(key)
        if value is None or value is False or value in ([], {}) or value in plain:
            continue
        raise LetheError(f"{file}: {key}={value!r} is not supported; merge that adapter with PEFT and load the merged model")


def _is_named(name: str, parts: str | list[str]) -> bool:
    """PEFT's way to choose modules: a string is a regular expression, a list holds whole names or what follows a dot."""
    if isinstance(parts, str):
        return re.fullmatch(parts, name) is not None
    return any(name == part or name.endswith("." + part) for part in parts)


def _expected_shapes(model: Llama, config: dict, file: Path) -> dict[str, tuple[int, float]]:
    """Which linears the config adapts, with their rank and alpha; PEFT's defaults and patterns honoured."""
    targets = config.get("target_modules") or ["q_proj", "v_proj"]
    names = all_linears(model)
    if isinstance(targets, list):
        target_names([target.rsplit(".", 1)[-1] for target in targets])  # refuses what is no linear of a Llama
    chosen = names if targets == "all-linear" else [name for name in names if _is_named(name, targets)]
    excluded = config.get("exclude_modules")
    chosen = [name for name in chosen if not excluded or not _is_named(name, excluded)]
    if not chosen:
        raise LetheError(f"{file}: target_modules {targets!r} match no linear of this model")

    def pattern(key: str, name: str, default: float) -> float:
        for wanted, value in (config.get(key) or {}).items():
            if re.fullmatch(rf"(.*\.)?({wanted})", name):
                return value
        return default

    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    return {name: (int(pattern("rank_pattern", name, rank)), pattern("alpha_pattern", name, alpha)) for name in chosen}


def _refuse_misfits(wanted: dict[str, tuple[int, int]], loaded: dict[str, torch.Tensor], file: Path) -> None:
    missing, foreign = sorted(set(wanted) - set(loaded)), sorted(set(loaded) - set(wanted))
    if missing or foreign:
        parts = [f"{word} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                 for word, names in (("misses", missing), ("has unexpected", foreign)) if names]  # fmt: skip
        hint = ""
        if foreign and not foreign[0].startswith(PREFIX + "model.layers."):
            hint = f"; keys should begin with {PREFIX}model.layers."
        raise LetheError(f"{file} does not fit this base: it {' and '.join(parts)}{hint}")
    found = {name: tuple(loaded[name].shape) for name in wanted}
    wrong = [f"{name} is {found[name]}, expected {shape}" for name, shape in wanted.items() if found[name] != shape]
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
