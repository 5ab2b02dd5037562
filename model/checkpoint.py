"""Hugging Face Llama folders in and out: config.json and safetensors, single or sharded, from disk or from the hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.config import LlamaConfig
from model.llama import LINEAR_NAMES, Llama
from model.quantized import Packed, check_quantize, pack, put_packed
from study.errors import LetheError
from study.folder import replacing

NANO = Path(__file__).resolve().parent.parent / "assets" / "nano"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "LICENSE*", "USE_POLICY*"]


def find_model(name: str) -> Path:
    """The folder of a model: "nano" (built in), a local folder, or a hub id, which is fetched into the hub's cache."""
    if name == "nano":
        return NANO
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise LetheError(f"{name} is a file; --model wants the folder that holds config.json and *.safetensors")
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        raise LetheError(f"no model folder {name!r} here, and it is no hub id (owner/name); give a folder, a hub id or 'nano'")
    return fetch_from_hub(name)


def fetch_from_hub(repo: str) -> Path:
    """Downloads a model's files (or finds them in the cache); every failure becomes one line that says what to do."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub

    try:
        return Path(snapshot_download(repo, allow_patterns=HUB_FILES, ignore_patterns=["original/*"]))
    except hub.GatedRepoError as error:  # before RepositoryNotFoundError, whose subclass it is
        raise LetheError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then `hf auth login` (or set HF_TOKEN); "
            "or give --model a local folder"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise LetheError(
            f"no model {repo!r}: no such folder here and no such repository on the hub (or it is private: `hf auth login`)"
        ) from error
    except hub.HFValidationError as error:
        raise LetheError(f"no model folder {repo!r} here, and it is no hub id ({str(error).splitlines()[0]})") from error
    except (OSError, getattr(hub, "HTTPError", OSError)) as error:  # offline, no connection, a proxy's refusal, the disk is full
        raise LetheError(
            f"{repo} is not in the cache ({constants.HF_HUB_CACHE}) and cannot be fetched from the hub ({type(error).__name__}); "
            f"on a machine with network run `hf download {repo}`, or give --model a local folder"
        ) from error


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise LetheError(f"{path} is missing; a model folder holds config.json, tokenizer.json and *.safetensors")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LetheError(f"{path} is no valid JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise LetheError(f"{path} holds a {type(content).__name__}, not an object; fetch the file again")
    return content


def load_config(folder: Path) -> LlamaConfig:
    return LlamaConfig.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of the index where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        if not files:
            raise LetheError(f"{index} names no file; fetch the model again")
        for file in files:
            if not file.is_file():
                raise LetheError(f"{file} is missing, though {index.name} names it; fetch the model again")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("consolidated*.pth")):
        raise LetheError(f"{folder} is in Meta's own layout (consolidated.*.pth); fetch the Hugging Face version (safetensors)")
    if any(folder.glob("pytorch_model*.bin")):
        raise LetheError(f"{folder} holds pickled weights (pytorch_model.bin), which are never opened; convert them to safetensors")
    raise LetheError(f"{folder} holds no model.safetensors; fetch the model again, or give --model another folder")


def open_safetensors(file: Path):
    """safe_open with one clear error for a cut or foreign file."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise LetheError(f"{file} is cut or no safetensors file ({error}); fetch it again") from error


def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", quantize: str = "none"
) -> Llama:  # fmt: skip
    """Loads a Hugging Face Llama folder, a hub id, or "nano", frozen and in eval mode.

    Tensors stream one at a time from the mapped file into their final dtype and device, so memory stays near the weights.
    quantize: "nf4" or "int8" keeps the linears of the layers so, see model.quantized; dtype is then that of all else.
    Raises LetheError for a missing, cut or ill-fitting file, naming the first tensors that do not fit.
    """
    folder = find_model(str(path))
    with torch.device("meta"):
        model = Llama(load_config(folder))
    packed: dict[str, Packed] = {}
    if quantize != "none":
        check_quantize(quantize)

    def put(name: str, tensor: torch.Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        module = model.get_submodule(module)
        if quantize != "none" and leaf == "weight" and name.split(".")[-2] in LINEAR_NAMES:
            packed[name] = pack(tensor.to(device), quantize, dtype)
            module.weight = None
        else:
            final = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
            setattr(module, leaf, torch.nn.Parameter(final, requires_grad=False))

    fill(model, folder, put)
    if quantize != "none":
        put_packed(model, packed, quantize)
    model.join()
    return model.eval()


def mapped_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of all that a folder's files hold. What was read of a file stays mapped until the next one."""
    for file in weight_files(folder):
        with open_safetensors(file) as tensors:
            for name in sorted(tensors.keys()):
                yield name, tensors.get_tensor(name)


def fill(
    model: Llama, folder: Path, put: Callable[[str, torch.Tensor], None], tensors: Iterable[tuple[str, torch.Tensor]] | None = None
) -> None:
    """Hands every weight of a folder to put(name, CPU tensor as in the file), one at a time, and sets the model's fingerprint.

    The model's parameters, on any device, "meta" too, say what there must be. tensors: of the folder, by other means than
    mapped_tensors. Raises LetheError as load_model does.
    """
    config, wanted = model.config, dict(model.named_parameters())
    unexpected, misshapen = [], []
    samples: dict[str, bytes] = {}
    for name, tensor in tensors or mapped_tensors(folder):
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue  # derived or doubled: some exports carry them
        if name not in wanted:
            unexpected.append(name)
            continue
        if tensor.shape != wanted[name].shape:
            misshapen.append(f"{name} {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}")
            continue
        samples[name] = sample_of(name, tensor)
        put(name, tensor)
    missing = [name for name in wanted if name not in samples and not any(name in text for text in misshapen)]
    for what, names in (("misses", missing), ("has unexpected", unexpected), ("has misshapen", misshapen)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise LetheError(f"{folder} {what} tensors: {', '.join(names[:3])}{more}; its config.json does not describe these weights")
    # By name, so that it does not matter how the weights are cut into files.
    content = json.dumps(config.__dict__, sort_keys=True).encode() + b"".join(samples[name] for name in sorted(samples))
    model.fingerprint = hashlib.sha256(content).hexdigest()[:16]
    model.source = folder


def sample_of(name: str, tensor: torch.Tensor, values: int = 64) -> bytes:
    """Name, shape and evenly spread values of a tensor: tells two models of one shape apart without reading all of them."""
    flat = tensor.flatten()
    picked = flat[:: max(1, flat.numel() // values)][: values + 1].float()
    return name.encode() + str(tuple(tensor.shape)).encode() + picked.numpy().tobytes()


def save_weights(model: Llama, file: Path, dtype: torch.dtype | None = None, metadata: dict[str, str] | None = None) -> None:
    """Writes the weights under Hugging Face's names (a tied head is not repeated), atomically."""
    if model.quantized:
        raise LetheError(f"the base is kept in {model.quantized}, so its weights cannot be written; load it without --quantize")
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items() if not name.startswith("adapter.")}
    write_tensors(file, {name: tensor.to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in weights.items()}, metadata)


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically. The same tensors give the same bytes; safetensors orders metadata at random."""
    with replacing(file) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # its text alone tells a full disk
            number = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error
        with open(temporary, "rb+") as handle:
            size = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(size))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            handle.seek(8)
            handle.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))
