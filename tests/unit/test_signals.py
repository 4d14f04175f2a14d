"""SIGTERM ends a process as Ctrl-C does."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.signals import take_term_as_ctrl_c, term_is_ctrl_c


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN])
def test_a_term_interrupts_even_where_ctrl_c_is_ignored(ctrl_c: Any) -> None:
    signal.signal(signal.SIGINT, ctrl_c)
    take_term_as_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_a_term_does_what_ctrl_c_does_at_the_moment() -> None:
    """Ray Tune handles Ctrl-C itself while it runs, so that trainings save their state."""
    said: list[int] = []
    take_term_as_ctrl_c()
    signal.signal(signal.SIGINT, lambda number, _frame: said.append(number))
    signal.raise_signal(signal.SIGTERM)
    assert said == [signal.SIGINT]


def test_a_handler_that_was_there_comes_back() -> None:
    said: list[int] = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray Tune leaves its own
    signal.signal(signal.SIGTERM, lambda number, _frame: said.append(number))
    with term_is_ctrl_c(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert said == [signal.SIGTERM]
