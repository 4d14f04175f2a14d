"""Where results are kept: `Store` is what the rest of the project sees of it.

``entries.py`` is the store, ``backends.py`` says what a place for it must be able to do and makes a
folder one, ``objects.py`` does so with an S3 bucket, ``leases.py`` lets one of several processes do
a thing.
"""

from orchestrator.store.backends import FOLDERS, RECORD, atomic_write
from orchestrator.store.entries import Store, file_hash, is_bucket
from orchestrator.store.leases import Held, Lease

__all__ = [
    "FOLDERS",
    "RECORD",
    "Held",
    "Lease",
    "Store",
    "atomic_write",
    "file_hash",
    "is_bucket",
]
