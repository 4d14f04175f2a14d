"""Content addresses: the same configuration has the same key everywhere."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def content_key(data: Mapping[str, Any]) -> str:
    """A short content address: the first 16 hex digits of the SHA-256 of canonical JSON."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
