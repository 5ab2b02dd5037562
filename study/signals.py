"""SIGINT and SIGTERM while a run trains: they ask the loop to finish its step, save and end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 0.5  # seconds; torchrun passes on the Ctrl-C that its workers have had from the terminal already


class Interrupted(KeyboardInterrupt):
    """The loop was asked to stop, and has saved; as after any Ctrl-C a command ends with 130."""


class Stop:
    """`asked` turns True when a signal came."""

    asked = False


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Within it SIGINT and SIGTERM set `.asked`: the loop looks after each step, saves, and raises Interrupted.

    A second SIGINT (half a second later, or more) interrupts at once. A block that ends without having looked raises
    Interrupted itself, so that no signal is lost. The handlers before it come back. Signals that this process was told to
    ignore stay ignored, and off the main thread, where Python has no handlers, nothing happens.
    """
    stop, first = Stop(), 0.0

    def handle(number: int, _frame: object) -> None:
        nonlocal first
        if not stop.asked:
            stop.asked, first = True, time.monotonic()
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping: this step is finished and saved; Ctrl-C once more stops at once\n")
        elif number == signal.SIGINT and time.monotonic() - first > GRACE:
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if stop.asked:
        raise Interrupted
