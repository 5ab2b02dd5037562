"""The queue of runs: workers as threads and as processes, over each kind of store; some fail, fall silent or are killed.

Run as a script, this file is one worker process.
"""

import gc
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ranks import REPO, free_port
from torch.distributed import FileStore, HashStore, TCPStore

from study.errors import LetheError, run_command
from study.queue import RunQueue, open_store

NAMES = ["a", "b", "c", "a>b", "a>c", "b>a", "b>c", "c>a", "c>b", "a>b>c"]
PARENTS = {name: [name.rpartition(">")[0], "old"] for name in NAMES if ">" in name} | {"b>c": ["b", "c"]}
QUICK = {"heartbeat_seconds": 0.02, "timeout_seconds": 60.0}


def queue(store, rank=0, done=(), names=NAMES, **settings) -> RunQueue:
    return RunQueue(store, names, PARENTS, done, rank, **{**QUICK, **settings})


def stores(kind: str, folder: Path, count: int) -> list:
    """A store as `count` workers see it."""
    if kind == "hash":
        return [HashStore()] * count
    if kind == "file":
        return [FileStore(str(folder / "store"), -1) for _ in range(count)]
    host = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    return [host, *(TCPStore("127.0.0.1", host.port, None, False, wait_for_workers=False) for _ in range(count - 1))]


def in_threads(*works) -> list:
    """Runs them side by side; what each returned, or its exception."""
    results = [None] * len(works)

    def run(place, work):
        try:
            results[place] = work()
        except BaseException as error:  # noqa: BLE001
            results[place] = error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a worker waits for ever"
    return results


@pytest.mark.parametrize("kind", ["hash", "file", "tcp"])
def test_every_run_is_done_once_and_after_its_parents(kind, tmp_path):
    events, lock = [], threading.Lock()

    def worker(rank, store):
        mine = random.Random(rank)
        with queue(store, rank, done=["b"], hosts=rank == 0) as runs:
            while name := runs.take():
                with lock:
                    events.append(("begins", name))
                time.sleep(mine.random() * 0.01)
                runs.check()
                with lock:
                    events.append(("ends", name))
                runs.finish(name)

    seen = stores(kind, tmp_path, 3)
    assert in_threads(*(lambda rank=rank: worker(rank, seen[rank]) for rank in range(3))) == [None] * 3
    assert sorted(name for what, name in events if what == "begins") == sorted(set(NAMES) - {"b"})
    for name, parents in PARENTS.items():
        for parent in {*parents} & {*NAMES} - {"b"}:
            assert events.index(("ends", parent)) < events.index(("begins", name))


def test_the_order_is_the_plans():
    with queue(HashStore()) as runs:
        taken = []
        while name := runs.take():
            taken.append(name)
            runs.finish(name)
    assert taken == NAMES


def test_a_silent_workers_run_is_taken_over_by_one(capsys):
    store = HashStore()
    silent = queue(store, rank=7)
    assert silent.take() == "a"
    silent.leaving.set()  # it beats no more
    silent.beats.join()
    taken = []

    def worker(rank):
        with queue(store, rank, timeout_seconds=0.3) as runs:
            while name := runs.take():
                taken.append(name)
                runs.finish(name)

    assert in_threads(*(lambda rank=rank: worker(rank) for rank in range(3))) == [None] * 3
    assert sorted(taken) == sorted(NAMES)
    said = capsys.readouterr().err
    assert said.count("goes on with a\n") == 1 and "worker 1 (rank 7) has been silent for 0.3 s" in said


def test_one_that_wakes_up_learns_that_its_run_was_taken_over():
    store = HashStore()
    with pytest.raises(LetheError, match="another worker has taken over a; nothing is lost"), queue(store) as slow:
        assert slow.take() == "a"
        slow.check()
        assert store.compare_set("run/a", slow.me, "99") == b"99"
        with pytest.raises(LetheError, match="rank 0 was silent for more than 60 s"):
            slow.finish("a")
        for _ in range(3000):  # until its next beat
            slow.check()
            time.sleep(0.01)
    assert store.compare_set("run/a", "", "") == b"99" and store.compare_set("error", "", "") == b""


def test_an_error_stops_everybody_with_its_text():
    store, taken = HashStore(), threading.Event()

    def failing():
        with queue(store, rank=1) as runs:
            assert runs.take() == "a"
            taken.set()
            raise LetheError("the loss is nan at step 3")

    def busy():
        with queue(store, rank=2, names=NAMES) as runs:
            taken.wait(30)
            while name := runs.take():
                runs.finish(name)

    results = in_threads(failing, busy, busy)
    assert all(isinstance(r, LetheError) for r in results)
    assert [str(r) for r in results] == ["the loss is nan at step 3", *["rank 1 failed in a: the loss is nan at step 3"] * 2]
    with pytest.raises(LetheError, match="rank 1 failed in a"):  # those that come later too
        queue(store, rank=3).take()


def test_a_restart_by_torchrun_is_a_new_attempt(monkeypatch):
    store = HashStore()
    with pytest.raises(ValueError, match="unforeseen"), queue(store) as runs:
        runs.finish(runs.take())
        runs.take()
        raise ValueError("unforeseen\nand long")
    with pytest.raises(LetheError, match="rank 0 failed in b: ValueError: unforeseen$"):
        queue(store).take()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with queue(store, timeout_seconds=0.1) as runs:
        assert runs.take() == "c"  # b still counts as the dead worker's for a while, a is done
        runs.finish("c")


def test_ctrl_c_gives_the_run_back():
    store = HashStore()
    with pytest.raises(KeyboardInterrupt), queue(store) as runs:
        assert runs.take() == "a"
        raise KeyboardInterrupt
    with queue(store) as other:
        assert other.take() == "a"  # at once: the timeout is a minute


def test_other_runs_under_one_queue_are_refused():
    store = HashStore()
    with queue(store), pytest.raises(LetheError, match="rank 1 was started with other runs"):
        queue(store, rank=1, names=NAMES[:-1])


def test_the_host_leaves_last():
    """And does not wait for one that is dead."""
    store, left = HashStore(), []
    dead = queue(store, rank=3, names=["a"])
    dead.leaving.set()
    dead.beats.join()
    both = threading.Barrier(2)

    def worker(rank):
        with queue(store, rank, names=["a"], hosts=rank == 0, timeout_seconds=0.5) as runs:
            both.wait(30)
            while name := runs.take():
                runs.finish(name)
            if rank == 1:
                time.sleep(0.3)  # the host could be gone by now
                left.append(rank)
        if rank == 0:
            left.append(rank)

    assert in_threads(lambda: worker(0), lambda: worker(1)) == [None] * 2 and left == [1, 0]


def test_a_store_that_is_gone_is_told():
    host, client = stores("tcp", Path(), 2)
    runs = queue(client, rank=1)
    assert runs.take() == "a"
    del host
    gc.collect()
    with pytest.raises(LetheError, match="rank 1: the store of the queue is gone .* the same command goes on"), runs:
        runs.finish("a")
        runs.take()


def test_where_the_store_is(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(LetheError, match="MASTER_ADDR not set.*torchrun"):
        open_store(0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(LetheError, match="rank 1 cannot reach 127.0.0.1:[0-9]+ .*is rank 0 running"):
        open_store(1, seconds=1)
    store, hosts = open_store(0)
    other, too = open_store(1)
    assert hosts and not too and store.add("n", 1) == 1 and other.add("n", 1) == 2
    with pytest.raises(LetheError, match="rank 0 cannot open .*is the port free"):
        open_store(0, seconds=1)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    third, too = open_store(0)
    assert not too and third.add("n", 1) == 3


def worker_main(rank: int, folder: Path) -> None:
    """A worker process; rank 0 claims a run and works on it for ever."""
    with queue(open_store(rank)[0], rank, heartbeat_seconds=0.1, timeout_seconds=1.0) as runs:
        print("ready", flush=True)
        sys.stdin.readline()
        while name := runs.take():
            print(name, flush=True)
            if rank == 0:
                time.sleep(600)
            with open(folder / name, "x"):  # a second time would be an error
                runs.finish(name)


def test_a_killed_process_is_survived(tmp_path, monkeypatch):
    """Three processes and torchrun's kind of store; one is killed with a run in hand, the others finish all of them."""
    host = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(host.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **shared, "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = []
    try:
        for rank in range(3):
            workers.append(subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment, cwd=REPO, **pipes))
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        workers[0].stdin.write("\n")
        workers[0].stdin.flush()
        assert workers[0].stdout.readline() == "a\n"
        workers[0].kill()
        told = [worker.communicate("\n", timeout=120) for worker in workers[1:]]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            for stream in (worker.stdin, worker.stdout, worker.stderr):
                stream.close()
    assert [worker.returncode for worker in workers[1:]] == [0, 0], told
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    assert sorted("".join(out for out, _ in told).split()) == sorted(NAMES)
    assert "".join(err for _, err in told).count("goes on with a\n") == 1


if __name__ == "__main__":
    sys.exit(run_command(lambda: worker_main(int(sys.argv[1]), Path(sys.argv[2]))))
