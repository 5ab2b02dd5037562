"""Starts the ranks of a test as processes of their own, and ends them whatever happens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(script: str, *words: str, world: int = 2, seconds: float = 200) -> list[subprocess.CompletedProcess]:
    """Runs `python script words...` as ranks 0 to world - 1 under the environment that torchrun would set; what each printed.

    A rank that fails ends the others after a while, as torchrun would; so does the end of the time.
    """
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **shared, "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}", "GLOO_SOCKET_IFNAME": "lo"}
    command, ranks, end, failed = [sys.executable, script, *words], [], time.monotonic() + seconds, False
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(world)]  # a pipe could fill up
        try:
            for rank, (out, err) in enumerate(files):
                mine = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                with open(out, "w") as stdout, open(err, "w") as stderr:
                    ranks.append(subprocess.Popen(command, env=mine, cwd=REPO, stdout=stdout, stderr=stderr))
            while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
                if not failed and any(rank.poll() for rank in ranks):
                    failed, end = True, min(end, time.monotonic() + 20)
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        texts = [(out.read_text(), err.read_text()) for out, err in files]
    return [subprocess.CompletedProcess(command, rank.returncode, *text) for rank, text in zip(ranks, texts, strict=True)]
