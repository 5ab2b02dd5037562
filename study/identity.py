"""What a study is, so that it is never mixed with another: its identity; and under which circumstances it ran."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from study.config import Config, to_dict
from study.flags import leaves

# Leaves that choose within a study, or change how it runs but not what comes out: never part of the identity.
NOT_IDENTITY = {
    "datasets",
    "data_root",
    "pairs",
    "stage",
    "mask",
    "out",
    "seeds",
    "device",
    "micro_tokens",
    "strict",
    "inspect",
    "print_config",
    "model.name",
    "evaluation.batch_size",
    "evaluation.tasks",
    "evaluation.eval_items",
    "evaluation.mmlu",  # what a column is stands in its name and its fingerprint
    "evaluation.shots",
    "evaluation.mmlu_by",
    "evaluation.harness",
    "evaluation.harness_path",
    "evaluation.max_samples",
    "datasets_folder",
    "chunk",
    "salvage",
    "sequence",
    "rehearsal.arms",
    "keep",
    "max_memory",
    "compare_optimizers",
    "comparison",
    "resume_stage1",
    "resume_stage2",
    "skip_training",
    "shard",
}
APART = ("pretraining.", "growth.")  # these make models, and a model is known by its fingerprint
NOT_IDENTITY_STAGE = {"log_steps", "eval_steps", "save_steps", "gradient_checkpointing"}


def identity_of(config: Any, model: str, data: dict[str, str], seed: int | None = None) -> dict:
    """What a study is: model fingerprint, one fingerprint per task, every leaf that changes results, and the seed.

    `seed` overrides config.seed (several seeds are several trees).
    """
    tree, found = to_dict(config), {}
    for name in leaves(type(config)):
        value: Any = tree
        for part in name.split("."):
            value = value[part]
        if name in NOT_IDENTITY or name.startswith(APART) or name.startswith("training.") and name.split(".")[-1] in NOT_IDENTITY_STAGE:
            continue
        found[name] = value
    for stage in (name.removesuffix(".batch_size") for name in [*found] if name.startswith("training.") and name.endswith(".batch_size")):
        # How a step is split into micro-batches changes its memory, not its result.
        found[f"{stage}.examples_per_step"] = found.pop(f"{stage}.batch_size") * found.pop(f"{stage}.gradient_accumulation")
    if found.get("study") == "optimizers":
        # Optimizer and learning rate name the runs' folders; what all runs share is how the rates of the stages relate.
        del found["optimizer.name"]
        first, second = (found.pop(f"training.stage{n}.learning_rate") for n in (1, 2))
        found["training.stage2.rate_to_stage1"] = second / first
    if found.get("study") == "sequences":
        found["mask"] = config.mask  # one for all runs, so no folder's name tells it
    if seed is not None:
        found["seed"] = seed
    return {"model": model, "data": dict(data), "settings": found}


def differences(old: dict, new: dict) -> list[str]:
    """Lines "learning_rate: 0.001 in the folder, 0.003 asked".

    Tasks that only one side knows do not differ, nor does a leaf that the old record lacks and that has its default.
    """
    lines = []
    if old.get("model") != new.get("model"):
        lines.append(f"model fingerprint: {_short(old.get('model'))} in the folder, {_short(new.get('model'))} asked")
    for task, fingerprint in new.get("data", {}).items():
        before = old.get("data", {}).get(task, fingerprint)
        if before != fingerprint:
            lines.append(f"data of {task}: {_short(before)} in the folder, {_short(fingerprint)} asked")
    after = new.get("settings", {})
    # What an older record does not know was not there to be set: it had today's default.
    known = {name: f.default for name, (_, f) in leaves(Config).items() if name in after}
    before = {**known, **old.get("settings", {})}
    if before.get("study") != after.get("study"):  # its other settings cannot be compared
        return [*lines, f"study: {before.get('study')} in the folder, {after.get('study')} asked"]
    both = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    for name in [*after, *(n for n in before if n not in after)]:
        if name not in both:
            continue
        shown = name
        if name.startswith("training.stage"):
            twin = name.replace("stage1", "stage2") if "stage1" in name else name.replace("stage2", "stage1")
            same = (before.get(twin), after.get(twin)) == (before.get(name), after.get(name))
            if same and "stage2" in name:
                continue
            shown = name.split(".")[-1] if same else name.removeprefix("training.")
        lines.append(f"{shown}: {_value(before.get(name))} in the folder, {_value(after.get(name))} asked")
    return lines


def _short(fingerprint: Any) -> str:
    return str(fingerprint)[:12]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def circumstances(argv: list[str] | None = None) -> dict:
    """Command, versions, commit, hardware and time of this process, for study.json and results that are published."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "safetensors", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    words = list(sys.argv if argv is None else argv)
    return {
        "command": "python " + shlex.join(words),
        "versions": versions,
        "commit": commit(),
        "hardware": hardware(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def commit() -> dict | None:
    """{"hash", "dirty"} of this source tree; None when it is no git checkout or git is missing."""

    def git(*words: str) -> str:
        root = Path(__file__).resolve().parent.parent
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=20).stdout

    try:
        return {
            "hash": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no").strip()),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict:
    """Processor, cores, memory (GiB) and CUDA devices of this machine."""
    import torch

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1].strip() if found else name
    memory = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory,
        "gpus": gpus,
    }
