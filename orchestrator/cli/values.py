"""What values of options may be; argparse turns what they complain of into a message."""

import argparse
import math

from orchestrator.units import parse_bytes

LARGEST = 2**31 - 1


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
    return value


def count(text: str) -> int:
    """A whole number from 1."""
    return _whole(text, 1)


def holdout(text: str) -> int:
    """Every how-manieth view is held out: a whole number from 2."""
    return _whole(text, 2)


def seed(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 0)


def size(text: str) -> int:
    """Bytes, e.g. ``500kB``."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def _number(text: str) -> float:
    """The number, or NaN, which lies between no two others."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def finite(text: str) -> float:
    """A number that is one."""
    value = _number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def _positive(text: str) -> float:
    value = _number(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def coarse_weight(text: str) -> float | str:
    """A number above 0, or ``auto``."""
    return text if text == "auto" else _positive(text)


def ratio(text: str) -> float:
    """A fraction to remove, in [0, 1)."""
    value = _number(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a fraction to remove: a number from 0 up to, but not, 1"
        )
    return value
