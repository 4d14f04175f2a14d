"""Times as people write them."""

import math

import pytest

from orchestrator.units import parse_seconds, show_seconds


@pytest.mark.parametrize(
    ("written", "seconds"),
    [(90, 90.0), (0.5, 0.5), ("90s", 90.0), ("30min", 1800.0), ("2h", 7200.0), (" 1.5 d ", 129600)],
)
def test_times_are_read(written: object, seconds: float) -> None:
    assert parse_seconds(written) == seconds


@pytest.mark.parametrize(
    "written",
    [0, -1, True, "", "2 weeks", "0s", "1e3", "-2h", [], math.nan, math.inf, 1e12],
)
def test_what_is_no_time_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="allowed are a number of seconds above 0"):
        parse_seconds(written)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(1.5, "1.5 s"), (90, "90 s"), (1800, "30 min"), (7200, "2 h"), (604800, "7 d")],
)
def test_times_are_shown_in_the_largest_whole_unit(seconds: float, shown: str) -> None:
    assert show_seconds(seconds) == shown
