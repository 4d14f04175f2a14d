"""Sizes and times as people write them."""

import re
import shlex
from pathlib import Path
from typing import Any

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "kib": 2**10, "mib": 2**20}
MAX_BYTES = 10**12
ALLOWED = "allowed are a whole number of bytes from 1, or a number with kB, MB, KiB or MiB"


def parse_bytes(value: Any) -> int:
    """Bytes, from a whole number or a text such as ``500kB``, ``1.2 MB`` (10³, 10⁶) or ``2.5MiB``.

    Raises:
        ValueError: it is neither; the message says what is allowed.
    """
    found: float = 0
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    elif isinstance(value, str):
        parts = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", value)
        if parts and parts[2].lower() in UNITS:
            found = float(parts[1]) * UNITS[parts[2].lower()]
    if not 1 <= found <= MAX_BYTES:
        raise ValueError(ALLOWED)
    return int(found)


def show_bytes(n_bytes: int) -> str:
    """Bytes for people, e.g. ``1,200 kB``; below 10 kB to the byte."""
    return f"{n_bytes / 1000:,.0f} kB" if n_bytes >= 10_000 else f"{n_bytes:,} bytes"


def counted(number: float, what: str) -> str:
    """A number of things, e.g. ``1 trial``, ``1,200 trials``, ``0.5 GPUs``; `what` is one."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {what}{'' if number == 1 else 's'}"


def typed(path: Path | str) -> str:
    """A path as it is typed into a shell, with quotes where it needs them."""
    return shlex.quote(str(path))


SECONDS = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400}
MAX_SECONDS = 10**9
TIMES = "allowed are a number of seconds above 0, or a number with s, min, h or d, e.g. 90s or 2h"


def parse_seconds(value: Any) -> float:
    """Seconds, from a number or a text such as ``90s``, ``30min``, ``2h``, ``7d``.

    Raises:
        ValueError: it is neither; the message says what is allowed.
    """
    found: float = 0
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = value
    elif isinstance(value, str):
        parts = re.fullmatch(r"\s*(\d{1,10}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", value)
        if parts and parts[2].lower() in SECONDS:
            found = float(parts[1]) * SECONDS[parts[2].lower()]
    if not 0 < found <= MAX_SECONDS:
        raise ValueError(TIMES)
    return float(found)


def show_seconds(seconds: float) -> str:
    """A time for people, in the largest unit that is not a fraction: ``90 s``, ``2 h``."""
    unit = next((u for u in ("d", "h", "min") if seconds % SECONDS[u] == 0), "s")
    return f"{seconds / SECONDS[unit]:g} {unit}"
