"""Mistakes that a user can mend, and how commands tell them: one line, no traceback, a non-zero exit."""

import os
import signal
import sys
import threading
from collections.abc import Callable


class LetheError(Exception):
    """Says in one line what is wrong, where, and the mend. Commands print it and exit with 2."""


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device or of the host: torch words them differently."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def run_command(work: Callable[[], None]) -> int:
    """Runs a command's work; returns its exit status: 0, 2 after an error, 130 after Ctrl-C or SIGTERM."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # which raises KeyboardInterrupt
    try:
        work()
    except LetheError as error:
        message = str(error)
    except KeyboardInterrupt:
        print("\nstopped; what is done is kept, and the same command goes on with the rest", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a full disk, a folder that may not be read
        message = f"{error.filename or 'file system'}: {error.strerror or error}; what is done is kept"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = (
            f"out of memory ({(str(error) or type(error).__name__).splitlines()[0]}), also with the smallest passes; add "
            "--gradient_checkpointing, lower --max_length, or lower --evaluation.batch_size if it was scoring"
        )
    else:
        return 0
    print(f"error: {message}", file=sys.stderr)
    return 2
