"""`--shard runs`: processes that train the runs of one study side by side, from a queue in a torch.distributed store.

    torchrun --nproc-per-node 8 --max-restarts 3 train.py --shard runs
    RANK=0 WORLD_SIZE=2 MASTER_ADDR=host MASTER_PORT=29500 python train.py --shard runs      # and RANK=1 elsewhere

Every run is trained by one process alone; nothing but the study folder and the store is shared. A run is free, claimed or
done. A worker claims one whose parents are done, and beats while it works; when a worker has been silent for too long, one
of the others takes its run over. torchrun ends all workers when one dies and, with --max-restarts, starts them again;
processes started by hand go on without it. The store lives in torchrun, or else in rank 0: when that dies the others end with
an error. In each case checkpoints and finished runs are kept, and the same command goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from optim.parallel import ALONE, Ranks, device_of, environment, start
from study.config import Config
from study.errors import LetheError
from study.logging import say

DONE, GONE = "done", "gone"


class QueueError(LetheError):
    """Of the queue itself: another worker's failure, a store that is gone, a run that another worker has taken over."""


def open_store(rank: int, seconds: float = 300) -> tuple[Any, bool]:
    """(the store at MASTER_ADDR:MASTER_PORT, whether this process is its host). seconds: to wait for the host, and for an answer.

    Raises LetheError where it cannot be reached, or where rank 0 cannot open the port.
    """
    from torch.distributed import PrefixStore, TCPStore

    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if absent:
        raise LetheError(f"--shard runs: {' and '.join(absent)} not set, so that ranks cannot find each other; start with torchrun")
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        port = int(os.environ["MASTER_PORT"])
        store = TCPStore(os.environ["MASTER_ADDR"], port, None, hosts, timedelta(seconds=seconds), wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        mend = "is the port free?" if hosts else "is rank 0 running?"
        raise LetheError(f"--shard runs: rank {rank} cannot {'open' if hosts else 'reach'} {where} ({_line(error)}); {mend}") from error
    return PrefixStore("lethe", store), hosts


class RunQueue:
    """The runs of a study, as one worker sees them.

        with RunQueue(store, names, parents, done, rank, hosts=hosts) as queue:
            while name := queue.take():
                ...                        # the run, unless its folder says that it is done; queue.check() now and then
                queue.finish(name)

    names: of all runs, in the order in which they are begun. parents: what must be done before a name can begin; a parent
    that is no name of the queue counts as done. done: the names that the study folder says are done. rank: for messages.
    hosts: whether this process holds the store, and so must leave last. A block that ends by an error tells the others, who
    end with its text once the runs that they are at are done; one that ends by Ctrl-C gives its run back.

    Raises LetheError for a worker that was started with other runs than the first one.
    """

    def __init__(
        self, store: Any, names: Sequence[str], parents: Mapping[str, Sequence[str]], done: Iterable[str], rank: int,
        heartbeat_seconds: float = 5.0, timeout_seconds: float = 60.0, hosts: bool = False,
    ):  # fmt: skip
        self.store, self.names, self.rank, self.hosts = store, list(names), rank, hosts
        self.parents = {name: sorted({*parents.get(name, ())} & {*names}) for name in names}
        self.heartbeat, self.timeout = heartbeat_seconds, timeout_seconds
        self.attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives the workers that it starts again
        self.claim = ""  # the run that this worker is at
        self.taken_over = ""  # why it may not go on with it
        self.done: set[str] = set()
        self.seen: dict[str, tuple[int, float]] = {}  # worker -> its last beat, and since when: no two clocks are compared
        plan = hashlib.sha256(json.dumps([self.names, self.parents]).encode()).hexdigest()
        if self._swap("plan", "", plan) != plan:
            raise QueueError(f"rank {rank} was started with other runs than the first worker; give all ranks the same command")
        self.me = str(self._add("workers", 1))  # for life: what is started again, be it under the same rank, is another worker
        self._swap(f"rank/{self.me}", "", str(rank))
        for name in sorted({*done} & {*names}):
            while self._swap(f"run/{name}", self._read(f"run/{name}"), DONE) != DONE:
                pass
        self._add(f"beat/{self.me}", 1)
        self.leaving = threading.Event()
        self.beats = threading.Thread(target=self._beat, daemon=True)
        self.beats.start()

    def take(self) -> str | None:
        """Claims the next run and returns its name; None when all are done. Waits while others work on what is left.

        Raises QueueError with the text of a worker that failed, or where the store is gone.
        """
        while True:
            failure = self._read("error")
            if failure and json.loads(failure)["attempt"] == self.attempt:
                raise QueueError(json.loads(failure)["text"])
            for name in self.names:
                state = DONE if name in self.done else self._read(f"run/{name}")
                if state == DONE:
                    self.done.add(name)
                elif self.done.issuperset(self.parents[name]) and (not state or self._is_silent(state)):
                    if self._swap(f"run/{name}", state, self.me) != self.me:
                        continue  # another was faster
                    if state:
                        say(f"{self._who(state)} has been silent for {self.timeout:g} s: {self._who(self.me)} goes on with {name}")
                    self.claim = name
                    return name
            if len(self.done) == len(self.names):
                return None
            time.sleep(min(1.0, self.heartbeat / 2))

    def check(self) -> None:
        """Raises QueueError where this worker was silent (suspended, say) for so long that another has taken its run over."""
        if self.taken_over:
            raise QueueError(self.taken_over)

    def finish(self, name: str) -> None:
        """Says that the run is done. Raises QueueError where another worker has taken it over, or where the store is gone."""
        state = self._swap(f"run/{name}", self.me, DONE)
        if state != DONE:
            raise QueueError(self._story(name, state))
        self.claim = ""
        self.done.add(name)

    def __enter__(self) -> RunQueue:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        failed = isinstance(error, Exception)
        try:
            if failed and not isinstance(error, QueueError):
                text = f"rank {self.rank} failed{f' in {self.claim}' if self.claim else ''}: {_line(error)}"
                self._swap("error", self._read("error"), json.dumps({"attempt": self.attempt, "text": text}))
            elif self.claim:
                self._swap(f"run/{self.claim}", self.me, "")
            self._swap(f"rank/{self.me}", str(self.rank), GONE)
            if self.hosts and (failed or error is None):  # after an error only so long that those who wait can read it
                self._stay(2 * self.heartbeat if failed else float("inf"))
        except QueueError:
            pass  # the store is gone, and nobody can be told
        finally:
            self.leaving.set()
            self.beats.join()

    def _stay(self, seconds: float) -> None:
        """Returns when every other worker has left or fallen silent, or when the time is over."""
        end = time.monotonic() + seconds

        def still_here(worker: str) -> bool:
            return worker != self.me and self._read(f"rank/{worker}") != GONE and not self._is_silent(worker)

        while time.monotonic() < end and any(still_here(str(n + 1)) for n in range(self._add("workers", 0))):
            time.sleep(min(1.0, self.heartbeat / 2))

    def _beat(self) -> None:
        while not self.leaving.wait(self.heartbeat):
            try:
                self._add(f"beat/{self.me}", 1)
                name = self.claim
                state = self._read(f"run/{name}") if name else self.me
            except QueueError:
                return  # the run goes on: it can be finished, and then take says what is wrong
            if name == self.claim and state not in (self.me, DONE):
                self.taken_over = self._story(name, state)

    def _is_silent(self, worker: str) -> bool:
        beats, now = self._add(f"beat/{worker}", 0), time.monotonic()
        if worker not in self.seen or self.seen[worker][0] != beats:
            self.seen[worker] = beats, now
        return now - self.seen[worker][1] > self.timeout

    def _who(self, worker: str) -> str:
        rank = self._read(f"rank/{worker}")
        return f"worker {worker}" + (f" (rank {rank})" if rank.isdigit() else "")

    def _story(self, name: str, state: str) -> str:
        return f"rank {self.rank} was silent for more than {self.timeout:g} s, and another worker has taken over {name}; nothing is lost"

    def _read(self, key: str) -> str:
        return self._swap(key, "", "")  # the one way to read that does not wait for the key

    def _swap(self, key: str, expected: str, desired: str) -> str:
        """Sets the key where it is what is expected ("": nothing yet), in one piece; returns what it is afterwards."""
        return self._ask(lambda: self.store.compare_set(key, expected, desired)).decode()

    def _add(self, key: str, number: int) -> int:
        return self._ask(lambda: self.store.add(key, number))

    def _ask(self, question: Callable[[], Any]) -> Any:
        return _asked(self.rank, question)


def _asked(rank: int, question: Callable[[], Any]) -> Any:
    """An answer of the store, or one line that says that it is gone."""
    try:
        return question()
    except RuntimeError as error:
        raise QueueError(
            f"rank {rank}: the store of the queue is gone ({_line(error)}), and with it rank 0 or torchrun; "
            "what is done is kept, and the same command goes on"
        ) from error


def _line(error: BaseException) -> str:
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, LetheError) else f"{type(error).__name__}: {text}"


class Job(NamedTuple):
    """One piece of a study's work: the training of a run, or its scoring."""

    name: str
    parents: list[str]  # jobs that come before it
    done: bool  # as the study folder says
    work: Callable[[], None]


class Workers:
    """The processes that share a study's runs, as one of them sees them; or, world 1, a process alone."""

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world, self.shared = rank, world, world > 1
        self.store, self.hosts = open_store(rank) if self.shared else (None, False)
        self.queue: RunQueue | None = None

    @property
    def main(self) -> bool:
        """Whether this is the one worker that opens the study and reports on it."""
        return self.rank == 0

    @contextlib.contextmanager
    def main_first(self, key: str) -> Iterator[None]:
        """The main worker does the block before the others do: what it writes they find."""
        while self.store is not None and not self.main and not _asked(self.rank, lambda: self.store.check([f"open/{key}"])):
            time.sleep(0.2)
        yield
        if self.store is not None and self.main:
            _asked(self.rank, lambda: self.store.set(f"open/{key}", "1"))

    def do(self, key: str, jobs: list[Job]) -> None:
        """Does all jobs that are not done: one after the other, or each by the worker that takes it. Returns when all are done."""
        if self.store is None:
            for job in jobs:
                if not job.done:
                    job.work()
            return
        from torch.distributed import PrefixStore

        work, parents = {job.name: job.work for job in jobs}, {job.name: job.parents for job in jobs}
        done = [job.name for job in jobs if job.done]
        with RunQueue(PrefixStore(key, self.store), list(work), parents, done, self.rank, hosts=self.hosts) as self.queue:
            while name := self.queue.take():
                work[name]()
                self.queue.finish(name)
        self.queue = None

    def check(self) -> None:
        """Raises QueueError where another worker has taken over what this one is at."""
        if self.queue is not None:
            self.queue.check()


def gather(config: Config) -> tuple[Ranks, Workers]:
    """This process's place among torchrun's: ranks that share every step, or (--shard runs) workers that share the runs."""
    try:
        rank, world, local = environment()
        if config.shard == "runs" and world > 1:
            return Ranks(device=device_of(config.device, world, local)), Workers(rank, world)
        return start(config.device) if world > 1 else ALONE, Workers()
    except ValueError as error:
        raise LetheError(str(error)) from error
