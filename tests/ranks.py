"""Starts the ranks of a test as processes of their own, and ends them whatever happens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(script: str, *words: str, world: int = 2, seconds: float = 240) -> list[subprocess.CompletedProcess]:
    """Runs `python script words...` as ranks 0 to world - 1 under the environment that torchrun would set; what each printed."""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **shared, "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, script, *words]
    ranks = []
    try:
        for rank in range(world):
            mine = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=mine, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        texts = [rank.communicate(timeout=seconds) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [subprocess.CompletedProcess(command, rank.returncode, *text) for rank, text in zip(ranks, texts, strict=True)]
