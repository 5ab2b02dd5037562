"""How commands end: the exit status, and one line on standard error."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from study.errors import LetheError, run_command


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    "error, status, words",
    [
        (LetheError("x.json is cut; fetch it again"), 2, "error: x.json is cut; fetch it again\n"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a"), 2, "error: out/a: No space left on device; what is done is kept\n"),
        (KeyboardInterrupt(), 130, "\nstopped; what is done is kept, and the same command goes on with the rest\n"),
    ],
)
def test_one_line(error, status, words, capsys):
    assert run_command(raising(error)) == status
    assert capsys.readouterr().err == words


def test_out_of_memory_names_the_flags(capsys):
    assert run_command(raising(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore"))) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--max_length" in err and "--gradient_checkpointing" in err


def test_a_defect_is_not_hidden():
    with pytest.raises(RuntimeError, match="a defect"):
        run_command(raising(RuntimeError("a defect")))
    assert run_command(lambda: None) == 0


def test_a_reader_that_stops_reading_is_no_error():
    code = "from study.errors import run_command\nraise SystemExit(run_command(lambda: [print('x' * 999) for _ in range(9999)]))"
    repository = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=repository)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0
