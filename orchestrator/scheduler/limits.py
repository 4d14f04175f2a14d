"""Time limits of stages, enforced by ending the worker: what hangs cannot be asked to stop."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from orchestrator.units import show_seconds

GRACE_SECONDS = 5.0
"""The kernel ends the worker so much later, if no thread of it could run to say why."""


@contextlib.contextmanager
def limited(seconds: float | None, overdue: Callable[[], None]) -> Iterator[None]:
    """End this process if the block takes too long.

    Usually a thread tells first: anything that waits lets it run. A block that holds Python's lock
    for ever is ended by the kernel's alarm, and then counts as a worker that died.

    Args:
        seconds: the limit; None for none.
        overdue: called just before the end.
    """
    if seconds is None:
        yield
        return
    timer = threading.Timer(max(seconds, 0.0), _end, args=(overdue,))
    timer.daemon = True
    timer.start()
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.0) + GRACE_SECONDS)
    try:
        yield
    finally:
        timer.cancel()
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _end(overdue: Callable[[], None]) -> None:
    try:
        overdue()
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def reason(what: str, seconds: float, setting: str) -> str:
    """Why a worker was ended, e.g. ``took longer than 2 h (`limits.prune`)``."""
    return f"{what} {show_seconds(seconds)} (`limits.{setting}`); its worker was ended"
