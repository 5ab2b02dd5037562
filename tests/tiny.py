"""Toy models for the tests: folders in Hugging Face's format with random weights, made without transformers; and toy studies of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from data.batching import Examples
from model import Llama, load_model
from model.checkpoint import NANO
from model.config import LlamaConfig

VOCABULARY = 97
BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": True,
    "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
# With the built-in model's vocabulary, and narrower: studies of it take a second.
NARROW = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


def raw_config(**changes) -> dict:
    """A config.json of toy size, in the spelling of the released Llama 3 files."""
    return {**BASE, **changes}


def random_weights(raw: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint, large enough that attention is not flat and the logits tell tokens apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(LlamaConfig.from_dict(raw)).named_parameters()}
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = noise * (0.15 if len(shape) == 2 else 0.1) + (1.0 if name.endswith("norm.weight") else 0.0)
    return weights


def write_folder(
    folder: Path,
    raw: dict | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A model folder; with tokenizer, the built-in model's tokenizer files (its vocabulary is 2048)."""
    raw = raw or raw_config()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    weights = weights or random_weights(raw, seed)
    save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
            shutil.copyfile(NANO / name, folder / name)
    return folder


def tiny_model(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Llama:
    """A toy model by way of a folder, so that it has a fingerprint."""
    return load_model(write_folder(folder, raw_config(**changes), seed), dtype)


def random_examples(count: int, seed: int = 0, longest: int = 24, vocabulary: int = VOCABULARY) -> Examples:
    """Examples of ragged random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(0, vocabulary, (length,), generator=generator).tolist()

    return Examples.from_pairs([(ids(1, longest), ids(1, longest)) for _ in range(count)])


def train_some(model: Llama, seed: int = 0) -> None:
    """Gives every lora_B of the model random values, as if it had been trained."""
    from lora.layers import lora_layers

    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)


# Studies: what to type for a small one, and what one has left behind.

TASKS = ("mini_svamp", "mini_simpleqa")
SMALL = ["--max_train", "24", "--max_test", "6", "--epochs", "1", "--batch_size", "8", "--gradient_accumulation", "1",
         "--max_length", "256", "--max_new_tokens", "8", "--learning_rate", "1e-2", "--device", "cpu"]  # fmt: skip


def words(model, out, *more) -> list[str]:
    """Of train.py: a small study of two built-in tasks."""
    return ["--model", str(model), "--datasets", ",".join(TASKS), *SMALL, "--out", str(out), *map(str, more)]


def adapters(out) -> dict[str, bytes]:
    return {str(file.parent.relative_to(out)): file.read_bytes() for file in sorted(Path(out).glob("**/adapter_model.safetensors"))
            if "checkpoints" not in file.parts}  # fmt: skip


def cells(out) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(Path(out).rglob("eval/*.jsonl"))}


def times(out, pattern) -> dict[str, int]:
    return {str(file.relative_to(out)): file.stat().st_mtime_ns for file in Path(out).rglob(pattern)}


def one_line(command, capsys) -> str:
    """Runs train.py, which must end with 2 and a single line."""
    import train

    assert train.main(command) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1, told
    return told
