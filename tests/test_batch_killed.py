"""A batch of data sets that is killed again and again, or shared by two processes, ends in the same bits."""

import os
import signal
import sys
from pathlib import Path

import pytest
from ranks import free_port
from test_batch import SETTINGS, copied, lasting, made, result, write_chunk
from tiny import cells

import study.batch_result
import study.report
import train
from benchmarks.survive import Attempt, Bench, Place


def no_pictures() -> None:
    study.report.draw_general = lambda scored, column, folder: folder / "none.png"
    study.batch_result._save = lambda figure, path: path


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    return copied(write_chunk(folder / "all"), folder / "some", "alpaca.json", "broken.json", "messages.jsonl")


def words(files: Path) -> tuple[str, ...]:
    return ("--datasets_folder", str(files), *SETTINGS, "--save_steps", "1", "--keep", "1", "--dtype", "float32")


def start(bench: Bench, files: Path, out: Path, place: Place | None = None) -> Attempt:
    return bench.start(out, study=words(files), place=place, changes="test_batch_killed:no_pictures")


@pytest.fixture(scope="module")
def whole(bench, files) -> Path:
    """Undisturbed, in one process; to be looked at, not written to."""
    attempt = start(bench, files, bench.folder / "whole")
    assert attempt.status == 0, attempt.output
    assert set(made(bench.folder / "whole")) == {"alpaca", "messages"}
    return bench.folder / "whole"


def is_like(out: Path, whole: Path) -> bool:
    rows = [[lasting(row) for row in result(folder)["results"]] for folder in (out, whole)]
    assert [row["status"] for row in rows[0]] == ["ok", "failed", "ok"] and not list(out.rglob("*.tmp"))
    return rows[0] == rows[1] and made(out) == made(whole) and cells(out) == cells(whole)


# In an optimizer step, behind a checkpoint, in its scoring, between two data sets, and while a row is written.
PLACES = [
    Place("train:micro_nll", 2, leaving=True),
    Place("save", 1, leaving=True),
    Place("eval:write_jsonl", 1),
    Place("masking.attempts:attempt", 4),
    Place("study.batch_result:save", 1),
]


def test_killed_again_and_again(bench, files, whole, tmp_path):
    for place in PLACES:
        attempt = start(bench, files, tmp_path / "cut", place)
        assert attempt.status == -signal.SIGKILL, attempt.output
    attempt = start(bench, files, tmp_path / "cut")
    assert attempt.status == 0 and "2 of them done before" not in attempt.output, attempt.output
    assert is_like(tmp_path / "cut", whole)


def as_rank(words: list[str], rank: int, shared: dict[str, str], log: Path) -> None:
    """One of the processes that torchrun would start."""
    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    no_pictures()
    os._exit(train.main(words))


def test_two_processes_share_the_data_sets(bench, files, whole, tmp_path):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [*words(files), "--model", str(bench.model), "--out", str(tmp_path / "out"), "--shard", "runs"]
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    ranks = [bench.context.Process(target=as_rank, args=(command, rank, shared, log)) for rank, log in enumerate(logs)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(200)
        rank.kill()
    told = [log.read_text() for log in logs]
    assert [rank.exitcode for rank in ranks] == [0, 0], told
    assert "processes  2, which share the study's runs" in told[0] and "mini_mmlu before and after" in told[0]
    assert "mini_mmlu before" not in told[1]
    assert is_like(tmp_path / "out", whole)
