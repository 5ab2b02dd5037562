"""What a run learns with, and its checkpoints: a run that was cut goes on from the newest one, with the same bits."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora.states import save_state
from model.llama import Llama
from model.sharding import is_sharded, read_shards, write_shard
from model.snapshot import (
    MANIFEST,
    checkpoint_name,
    newest_checkpoint,
    pack,
    prune,
    read_checkpoint,
    restore_rng,
    rng_state,
    unpack,
    write_checkpoint,
)
from optim.masters import make_masters, write_back
from optim.parallel import ALONE, Ranks
from study.config import Config
from study.errors import LetheError
from study.plan import Run


class Learner:
    """What a run learns with: float32 masters, the optimizers that step on them, the loss scale. Resuming needs no more."""

    def __init__(self, model: Llama, parameters: list[nn.Parameter], make_optimizers: Callable[[list[nn.Parameter]], list]):
        self.model, self.parameters, self.masters = model, parameters, make_masters(parameters)
        self.optimizers: list[torch.optim.Optimizer] = make_optimizers(self.masters)
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        # float16 gradients underflow without a loss scale; bfloat16 and float32 need none.
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        tensors, state = pack(self.optimizers, self.scaler)
        return tensors | {f"master.{i}": master.detach() for i, master in enumerate(self.masters)}, state

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], state: dict) -> None:
        for i, master in enumerate(self.masters):
            master.copy_(tensors.pop(f"master.{i}"))
        unpack(self.optimizers, tensors, state, self.scaler)
        write_back(self.parameters, self.masters)


@dataclass
class Tally:
    """What the steps of a run add up to. A checkpoint carries it, so that a resumed run reports as one that was never cut."""

    micro_tokens: int
    tokens: int = 0
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)
    kept: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # since the last logged line
    last_loss: float = math.nan  # the mean of those of the line before, there and in TensorBoard
    steps: list[Any] = field(default_factory=list)  # whose losses are still on the device

    def add(self, step: Any) -> None:
        self.micro_tokens, self.tokens = step.micro_tokens, self.tokens + step.tokens
        self.outcomes[step.outcome] = self.outcomes.get(step.outcome, 0) + 1
        self.kept.append(step.kept)
        self.steps.append(step)

    def read(self) -> None:
        """Brings the losses to the host, which waits for the device. Raises LetheError where one is not finite."""
        self.losses += [step.loss for step in self.steps]
        self.steps = []

    def close_line(self) -> None:
        self.read()
        self.last_loss, self.losses = float(np.mean(self.losses)), []

    def state(self) -> dict:
        self.read()
        return {name: value for name, value in self.__dict__.items() if name != "steps"}


def save_checkpoint(
    folder: Path, stage: int, epoch: float, step: int, learner: Learner, state: dict, keep: int, name: str, ranks: Ranks = ALONE
) -> None:  # fmt: skip
    """{folder}/checkpoints/stage1_checkpoint_epoch_0_step_120: the adapter for whoever wants it, and all that resuming needs.

    state: plain JSON, given back by resume. At most `keep` checkpoints stay. name: of the base, for the adapter's config.
    """
    target = folder / "checkpoints" / checkpoint_name(stage, int(epoch), step)
    if ranks.main and target.exists():  # what a kill left of it
        shutil.rmtree(target)
    tensors, optimizer_state = learner.state()
    if is_sharded(learner.model):
        ranks.barrier()  # the folder is cleared
        write_shard(target, tensors, ranks)
        tensors = {}
    if not ranks.main:
        return
    rng_tensors, rng = rng_state()
    if learner.model.adapter is not None:  # full weights are rounded masters
        save_state(learner.model, target, name)
    write_checkpoint(target, tensors | rng_tensors, {"step": step, "learner": optimizer_state, "rng": rng, **state})
    prune(target.parent, keep)


def resume(folder: Path, learner: Learner, same: dict, asked: Path | None, keep: int, ranks: Ranks = ALONE) -> dict | None:
    """Takes up the newest checkpoint of a run folder, else the one `asked` for; returns its state, None where there is none.

    same: what must be as it was (plain JSON). Without a checkpoint the folder is cleared (by the one rank that does it): the
    run begins anew, with the same bits. Raises LetheError for a checkpoint of another training, with the differences.
    """
    found = newest_checkpoint(folder / "checkpoints") or asked
    if found is None:
        if ranks.main and folder.exists():
            shutil.rmtree(folder)
        return None
    if ranks.main:
        prune(folder / "checkpoints", keep)  # a kill right after a save leaves one more
    tensors, state = read_checkpoint(found)
    refuse_other(found, state["same"], same)
    restore_rng({name: tensors.pop(name) for name in list(tensors) if name.startswith("rng.")}, state["rng"])
    learner.restore(read_shards(found, ranks if is_sharded(learner.model) else ALONE), state["learner"])
    return state


def refuse_other(found: Path, there: dict, asked: dict) -> None:
    """LetheError with the differences where what a folder holds was trained otherwise."""
    before, now = flat(there), flat(json.loads(json.dumps(asked)))
    lines = [f"{key}: {before.get(key)} there, {now.get(key)} asked" for key in {**before, **now} if before.get(key) != now.get(key)]
    if lines:
        raise LetheError("\n  ".join([f"{found} is of another training; ask for the same settings, or move it away:", *lines]))


def flat(tree: dict, above: str = "") -> dict:
    """{"optimizer": {"name": "adamw"}} -> {"optimizer.name": "adamw"}"""
    parts = [flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value} for key, value in tree.items()]
    return {key: value for part in parts for key, value in part.items()}


def asked_checkpoint(config: Config, run: Run) -> Path | None:
    """The checkpoint that --resume_stage1 or --resume_stage2 names, a checkpoint's or a run's folder, where it is this run's."""
    asked = config.resume_stage1 if run.stage == 1 else config.resume_stage2
    if asked is None:
        return None
    folder = Path(asked)
    if not (folder / MANIFEST).is_file():
        folder = newest_checkpoint(folder / "checkpoints") or folder
    who = read_checkpoint(folder)[1]["same"]["run"]
    return folder if all(who[key] == run.__dict__[key] for key in ("stage", "first", "second", "arm")) else None
