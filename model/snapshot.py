"""Checkpoints of a training run: what is needed to go on with the same bits, in safetensors and JSON, never pickled.

    {run}/checkpoints/stage1_checkpoint_epoch_2_step_500/
      …                             the weights (an adapter or a whole model), written by the caller first
      training_state.safetensors    optimizer state, generators, whatever tensors the loop needs
      manifest.json                 {"state", "files": {name: {"bytes", "sha256"}}, "sha256" of those two}; written last

A folder without a manifest does not exist for anyone, so a kill at any moment leaves a whole checkpoint or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint import write_tensors
from study.errors import LetheError
from study.folder import read_json, write_error, write_text
from study.logging import say

MANIFEST, TENSORS = "manifest.json", "training_state.safetensors"
NAME = re.compile(r"stage\d+_checkpoint_epoch_\d+_step_(\d+)")


def checkpoint_name(stage: int, epoch: int, step: int) -> str:
    """The name of a checkpoint's folder; step counts the optimizer steps that are done."""
    return f"stage{stage}_checkpoint_epoch_{epoch}_step_{step}"


def checkpoints_in(parent: Path) -> list[Path]:
    """The folders of `parent` that are named as checkpoints, whole or not, earliest step first."""
    if not parent.is_dir():
        return []
    found = [(int(match[1]), path) for path in parent.iterdir() if (match := NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """Completes a checkpoint whose weights the caller has put into `folder`: the tensors, then the manifest.

    state: plain JSON (NaN may occur and stays NaN). Raises LetheError where the disk refuses; the folder then has no
    manifest, and the checkpoints before it stand.
    """
    write_tensors(folder / TENSORS, tensors)
    for leftover in folder.glob(".*.tmp"):  # of a writer that was killed here before
        leftover.unlink(missing_ok=True)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in names if name != MANIFEST}
    content = {"state": state, "files": files}
    write_text(folder / MANIFEST, json.dumps({**content, "sha256": content_sha256(content)}, indent=1) + "\n")


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(content: dict) -> str:
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict:
    """The manifest of a whole and undamaged checkpoint. Raises LetheError naming the first file that is not, and why."""
    manifest = read_json(folder / MANIFEST)
    content = {name: manifest.get(name) for name in ("state", "files")} if isinstance(manifest, dict) else {}
    if not content or content_sha256(content) != manifest.get("sha256"):
        raise LetheError(f"{folder / MANIFEST} is not as it was written")
    for name, wanted in content["files"].items():
        file = folder / name
        try:
            size = file.stat().st_size
            if size != wanted["bytes"]:
                raise LetheError(f"{file} has {size} bytes instead of {wanted['bytes']}")
            if file_sha256(file) != wanted["sha256"]:
                raise LetheError(f"{file} is not as it was written")
        except OSError as error:
            raise LetheError(f"{file}: {error.strerror or error}") from error
    return content


def newest_checkpoint(parent: Path) -> Path | None:
    """The latest whole and undamaged checkpoint in `parent`; None where there is none.

    A damaged one is told once, and its manifest is set aside as manifest.damaged.json: it does not count from then on.
    """
    damaged: dict[Path, str] = {}
    found = None
    for folder in reversed(checkpoints_in(parent)):
        if not (folder / MANIFEST).is_file():
            continue
        try:
            read_manifest(folder)
        except LetheError as error:
            damaged[folder] = str(error)
            continue
        found = folder
        break
    for folder, reason in damaged.items():
        reason = reason.removeprefix(f"{folder}/").partition("; ")[0]
        say(f"checkpoint {folder} is damaged ({reason}): going on from {found.name if found else 'the beginning'}")
        with contextlib.suppress(OSError):  # a read-only folder
            (folder / MANIFEST).rename(folder / "manifest.damaged.json")
    return found


def read_checkpoint(folder: str | Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, on the CPU, state) of a checkpoint. Raises LetheError naming what is missing or damaged, and the mend."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        what = "was never finished" if folder.is_dir() else "is not there"
        raise LetheError(f"checkpoint {folder} {what} (no {MANIFEST}); give another one")
    try:
        manifest = read_manifest(folder)
    except LetheError as error:
        raise LetheError(f"checkpoint {folder} is damaged ({error}); give an earlier one, or delete it and run again") from error
    if TENSORS not in manifest["files"]:
        raise LetheError(f"checkpoint {folder} has no {TENSORS}; give another one")
    return load_file(folder / TENSORS), manifest["state"]


def prune(parent: Path, keep: int) -> None:
    """Leaves the `keep` latest whole checkpoints; earlier and unfinished ones go, and nothing else in `parent` does."""
    folders = checkpoints_in(parent)
    whole = [folder for folder in folders if (folder / MANIFEST).is_file()]
    stay = whole[max(0, len(whole) - keep) :]
    for folder in folders:
        if folder not in stay:
            try:
                (folder / MANIFEST).unlink(missing_ok=True)  # first: a kill in between leaves an unfinished folder, not a false one
            except OSError as error:
                raise write_error(folder / MANIFEST, error) from error
            shutil.rmtree(folder, ignore_errors=True)  # what stays costs space and no more


# ----------------------------------------------------------------------------------------------------------------------
# What goes into the tensors and the state


def pack(optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler | None = None) -> tuple[dict[str, Tensor], dict]:
    """The state of optimizers: tensors "{optimizer}.{key}.{parameter}" (0.exp_avg.3), and the rest as plain JSON.

    Learning rates and other settings of the groups are left out: they come from the configuration.
    """
    tensors: dict[str, Tensor] = {}
    records = []
    for k, optimizer in enumerate(optimizers):
        content, plain = optimizer.state_dict(), {}
        for index, values in content["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{k}.{key}.{index}"] = own_memory(value)
                else:
                    plain[f"{key}.{index}"] = value
        count = sum(len(group["params"]) for group in content["param_groups"])
        records.append({"kind": type(optimizer).__name__, "parameters": count, "plain": plain})
    return tensors, {"optimizers": records, "scaler": scaler.state_dict() if scaler is not None else {}}


def own_memory(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, a copy where it is a view: safetensors refuses tensors that share memory."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def unpack(
    optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor], state: dict, scaler: torch.amp.GradScaler | None = None
) -> None:
    """Puts back what `pack` took, bit for bit. Raises LetheError where it belongs to other optimizers or parameters."""
    records = state["optimizers"]
    kinds = [(record["kind"], record["parameters"]) for record in records]
    wanted = [(type(o).__name__, sum(len(group["params"]) for group in o.param_groups)) for o in optimizers]
    if kinds != wanted:
        raise LetheError(f"the checkpoint holds the state of {listed(kinds)}, this run has {listed(wanted)}; train it from the beginning")
    for k, (optimizer, record) in enumerate(zip(optimizers, records, strict=True)):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        values: dict[int, dict] = {}
        for name, value in record["plain"].items():
            key, _, index = name.rpartition(".")
            values.setdefault(int(index), {})[key] = value
        for name, value in tensors.items():
            if not name.startswith(f"{k}."):
                continue
            key, _, index = name.removeprefix(f"{k}.").rpartition(".")
            if not int(index) < len(parameters) or value.ndim and value.shape != parameters[int(index)].shape:
                shape = tuple(parameters[int(index)].shape) if int(index) < len(parameters) else "nothing"
                raise LetheError(f"the checkpoint's {name} has shape {tuple(value.shape)}, its parameter {shape}; train from the beginning")
            values.setdefault(int(index), {})[key] = value.clone()  # the loaded ones may still be the mapped file
        optimizer.load_state_dict({**optimizer.state_dict(), "state": values})
    if scaler is not None and scaler.is_enabled():
        if not state["scaler"]:
            raise LetheError("the checkpoint was trained without a loss scale, this run has one (float16); train from the beginning")
        scaler.load_state_dict(state["scaler"])


def listed(kinds: list[tuple[str, int]]) -> str:
    return " and ".join(f"{kind} on {count} parameters" for kind, count in kinds) or "no optimizer"


def rng_state() -> tuple[dict[str, Tensor], dict]:
    """The generators of Python, NumPy, torch and every CUDA device: tensors "rng.…" and plain JSON."""
    version, words, python_gauss = random.getstate()
    kind, keys, position, has_gauss, numpy_gauss = np.random.get_state()
    tensors = {"rng.python": torch.tensor(words), "rng.numpy": torch.from_numpy(keys.astype(np.int64)), "rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"rng.cuda.{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {"python": [version, python_gauss], "numpy": [kind, position, has_gauss, numpy_gauss]}


def restore_rng(tensors: dict[str, Tensor], state: dict) -> None:
    """Puts back what `rng_state` took; CUDA devices that are not here are passed over."""
    (version, python_gauss), (kind, position, has_gauss, numpy_gauss) = state["python"], state["numpy"]
    random.setstate((version, tuple(tensors["rng.python"].tolist()), python_gauss))
    np.random.set_state((kind, tensors["rng.numpy"].numpy().astype(np.uint32), position, has_gauss, numpy_gauss))
    torch.set_rng_state(tensors["rng.torch"].clone())
    for index in range(torch.cuda.device_count()):
        if f"rng.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"], index)
