"""A polite end: SIGTERM (`kill`, a batch system's time limit, `ray job stop`) is like Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def take_term_as_ctrl_c() -> None:
    """From now on; only in the main thread, others cannot say so."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _as_ctrl_c)


@contextmanager
def term_is_ctrl_c() -> Iterator[None]:
    """For the time of a block: with Ray come handlers that end the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    take_term_as_ctrl_c()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _as_ctrl_c(_number: int, frame: FrameType | None) -> None:
    """What Ctrl-C does at this moment; also where it is ignored, as in a script's background."""
    handler = signal.getsignal(signal.SIGINT)
    (handler if callable(handler) else signal.default_int_handler)(signal.SIGINT, frame)
