"""Data parallel training on torch.distributed: every rank holds the model, takes its share of a step's examples, sums gradients.

    torchrun --nproc-per-node 4 train.py              # gloo on the CPU, NCCL on CUDA with rank i on the i-th device

A step's loss is sum(w * nll) / sum(w) over the examples of all ranks. So gradients are summed and never averaged, and the
one denominator comes from the summed weights: that a mask keeps little or nothing on some rank does not change the result.
Ranks begin equal, get the same bits from every sum and step alike, so they stay equal without being told.

A rank that runs out of memory takes its own share again in smaller passes while the others wait in the sum: its gradient
is the same, so there is nothing to agree on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 64 << 20  # gradient values in one sum, 256 MiB: all of LoRA's at once; of a whole model's only so many are held twice
JOIN = timedelta(minutes=10)  # until all ranks are there
# Long, because the others wait while the main rank scores or writes. A rank that died is noticed by gloo or torchrun, not by this.
TIMEOUT = timedelta(hours=24)


class RankLost(RuntimeError):
    """Another rank ended or cannot be reached."""


@dataclass(frozen=True)
class Ranks:
    """The processes of one training, seen from one of them. Ranks() is a process alone: its sums are what it has."""

    rank: int = 0
    world: int = 1
    device: torch.device | None = None  # of a process alone, whatever it was told

    @property
    def main(self) -> bool:
        """Whether this is the one rank that prints and writes."""
        return self.rank == 0

    def share(self, indices: Sequence[int], lengths: Sequence[int] | Mapping[int, int]) -> list[int]:
        """Which of a step's examples are this rank's: every example is some one rank's, and tokens are spread evenly.

        lengths[i]: tokens of example i. Longest first, each goes to the rank that has the fewest tokens so far. The same on
        all ranks without asking. With fewer examples than ranks some get none.
        """
        if self.world == 1:
            return list(indices)
        tokens, mine = [0] * self.world, []
        for i in sorted(indices, key=lambda i: (-int(lengths[i]), i)):
            rank = tokens.index(min(tokens))
            tokens[rank] += int(lengths[i])
            if rank == self.rank:
                mine.append(i)
        return mine

    def sum_(self, parameters: Sequence[nn.Parameter], sums: Tensor | None = None) -> None:
        """Sums the gradients of all ranks, as float32, and `sums` (any shape, float64), in place; one all-reduce for each.

        A missing gradient counts as zero, and the sum is there afterwards: a rank whose masks keep nothing has none of its
        own. inf and NaN of one rank reach all, so float16 loss scales move alike. Nothing waits for the device.
        """
        if self.world == 1:
            return
        for bucket in _buckets(parameters):
            flat = torch.zeros(sum(p.numel() for p in bucket), dtype=torch.float32, device=bucket[0].device)
            parts = flat.split([p.numel() for p in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                if parameter.grad is not None:
                    part.copy_(parameter.grad.flatten())
            self._reduce(flat)
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view(parameter.shape).to(parameter.dtype)
        if sums is not None:
            self._reduce(sums)

    def clip_(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """clip_grad_norm_ where each rank holds another part of the gradients (model/sharding.py): the norm is that of all parts."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        squared = torch.nn.utils.get_total_norm(gradients).to(self.device, torch.float64).square()
        self.sum_([], squared)
        norm = squared.sqrt().float()
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def totals(self, *values: float) -> list[float]:
        """Sums of host numbers over all ranks, in float64 (exact for counts), without a look at the device."""
        return self._of_all(values, dist.ReduceOp.SUM)

    def most(self, value: float) -> float:
        """The largest of a host number over all ranks: of flags, whether any rank has raised it."""
        return self._of_all([value], dist.ReduceOp.MAX)[0]

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        self.totals()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main rank does the block before the others do: what it writes (tokens, scores) they find and only read."""
        if not self.main:
            self.barrier()
        yield
        if self.main:
            self.barrier()

    def stop(self) -> None:
        """Leaves the group, at the end of a run that went well; after an error just end the process."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _of_all(self, values: Sequence[float], how: dist.ReduceOp) -> list[float]:
        if self.world == 1:
            return list(values)
        numbers = torch.tensor([*values, 0], dtype=torch.float64)  # on the CPU, so by gloo; one more, since gloo refuses none
        self._reduce(numbers, how)
        return numbers[:-1].tolist()

    def _reduce(self, tensor: Tensor, how: dist.ReduceOp = dist.ReduceOp.SUM) -> None:
        with self._together():
            dist.all_reduce(tensor, how)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Within it an error of the connection says what it means."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RankLost(
                f"rank {self.rank} of {self.world}: another rank has ended or cannot be reached ({why}); its own output says why, "
                "and the same command goes on from the last checkpoint"
            ) from error


ALONE = Ranks()


def environment() -> tuple[int, int, int]:
    """(rank, world, local rank) as torchrun or the user has set RANK, WORLD_SIZE, LOCAL_RANK; (0, 1, 0) without them.

    Raises ValueError, in one line, where they are half set or make no sense.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", "0"))
    except KeyError as error:
        raise ValueError(f"RANK and WORLD_SIZE go together, but {error.args[0]} is not set; start with torchrun, or unset both") from error
    except ValueError as error:
        raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK are whole numbers ({error}); start with torchrun, or unset them") from error
    if not 0 <= rank < world or local < 0:
        raise ValueError(
            f"RANK {rank} of WORLD_SIZE {world} with LOCAL_RANK {local} makes no sense: ranks count from 0; start with torchrun"
        )
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world > 1 and absent:
        raise ValueError(f"WORLD_SIZE is {world}, but {' and '.join(absent)} not set: ranks cannot find each other; start with torchrun")
    return rank, world, local


def device_of(asked: str, world: int, local: int) -> torch.device:
    """The device of one rank: "auto" and "cuda" give rank i of a machine its i-th GPU. Raises ValueError where it has too few."""
    if asked == "cpu" or asked == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {asked}: this torch sees no CUDA device; use --device cpu")
    if asked.startswith("cuda:"):
        if world > 1:
            raise ValueError(f"--device {asked} would put {world} ranks on one GPU; say --device cuda, and rank i takes the i-th")
        return torch.device(asked)
    if local >= torch.cuda.device_count():
        raise ValueError(f"local rank {local} has no GPU: there are {torch.cuda.device_count()}; lower --nproc-per-node")
    return torch.device("cuda", local)


def start(device: str = "auto") -> Ranks:
    """Joins the ranks that the environment tells of; a process alone joins nothing. device: auto, cpu, cuda, cuda:N.

    Raises ValueError for an environment or a device that makes no sense, and where the other ranks cannot be reached.
    """
    rank, world, local = environment()
    mine = device_of(device, world, local)
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    if world > 1:
        try:  # host numbers go by gloo in either case, so that no step waits for the device
            store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=JOIN))
            backend = "gloo" if mine.type == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ValueError(f"rank {rank} of {world} cannot join the others at {where}: {str(error).splitlines()[0]}") from error
    return Ranks(rank, world, mine)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Neighbours, of at most BUCKET values together; a larger one is alone."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
