"""Content addresses: the same configuration has the same key everywhere."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def content_key(data: Mapping[str, Any]) -> str:
    """A short content address: the first 16 hex digits of the SHA-256 of canonical JSON."""
    return hashlib.sha256(_CANONICAL.encode(data).encode()).hexdigest()[:16]
