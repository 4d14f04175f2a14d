"""What lives in the processes beside the driver.

They import what this module does, Ray and no more than Python's own, so that they are there at
once and take little memory: with PyTorch each would take three seconds and 240 MB.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import ray

REMEMBERED = 1000
SILENT_SECONDS = 15.0


class Desk:
    """Answers calls for an object, each once: one that is repeated gets the answer it got.

    Args:
        kind: class of the object.
        arguments: of its constructor.
    """

    def __init__(self, kind: type, *arguments: Any) -> None:
        self._object = kind(*arguments)
        self._answers: OrderedDict[str, Any] = OrderedDict()

    def do(self, call: str, method: str, *arguments: Any) -> Any:
        """Call a method, unless this very call was answered already."""
        if call not in self._answers:
            self._answers[call] = getattr(self._object, method)(*arguments)
            if len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)
        return self._answers[call]


class Board:
    """Holds statistics in the object store: who computed them may end."""

    def __init__(self) -> None:
        self._references: dict[str, Any] = {}

    def publish(self, key: str, tensors: Mapping[str, Any]) -> None:
        """Keep arrays under a key, unless it has some."""
        if key not in self._references:
            self._references[key] = ray.put(dict(tensors))

    def find(self, key: str) -> list[Any]:
        """A list of the reference to a key's arrays, or an empty one."""
        return [self._references[key]] if key in self._references else []


class Register:
    """Which drivers are there, without Ray."""

    def __init__(self) -> None:
        self._heard: dict[str, float] = {}

    def count(self, driver: str) -> int:
        """A driver says that it is there, and learns how many there are."""
        now = time.monotonic()
        self._heard[driver] = now
        self._heard = {d: t for d, t in self._heard.items() if now - t < SILENT_SECONDS}
        return len(self._heard)

    def leave(self, driver: str) -> None:
        """A driver is done."""
        self._heard.pop(driver, None)
