"""Finding a plug-in by the name that a sweep file gives it."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from pruning.errors import PruningError

Plugin = TypeVar("Plugin")


def lookup(registry: Mapping[str, Plugin], name: str, kind: str) -> Plugin:
    """The entry called `name`.

    Args:
        registry: entries by name.
        name: what was asked for.
        kind: what the entries are, for the message: "criterion", "allocation".

    Raises:
        PruningError: there is no such entry; names the nearest one and all of them.
    """
    if name in registry:
        return registry[name]
    near = difflib.get_close_matches(name, registry, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise PruningError(f"no {kind} {name!r}{hint} there are {', '.join(sorted(registry))}")
