"""The error tree.

::

    Exception
    ├── nerf.errors.NerfError
    │   ├── SceneError           a scene folder is missing, incomplete or inconsistent
    │   ├── CheckpointError      a checkpoint is missing, damaged, of another shape, or unsafe
    │   ├── DeviceError          a device or backend that this machine does not have
    │   ├── DownloadError        a public scene could not be fetched whole
    │   └── TrainingError        a training diverged
    ├── pruning.errors.PruningError
    │   ├── RatioError           a ratio out of range, a list of ratios of the wrong length
    │   └── StatisticsError      calibration statistics missing, NaN, or of another network
    └── orchestrator.errors.OrchestratorError
        ├── SpecError            mistakes in a sweep file, all of them
        ├── StoreError           the storage folder cannot be written, or holds a damaged entry
        ├── ClusterError         Ray cannot give what the sweep asks for
        ├── TrackingError        the tracking store cannot be used
        ├── SearchError          the database of a study cannot be used
        └── SweepError           a sweep that is unknown, or has no results to report yet

`nerf` and `pruning` do not know each other or the orchestrator, so the tree has three roots;
`PrunefieldError` is the tuple of them: ``except PrunefieldError`` catches every one. A message
says what happened, what was given, what is allowed and what to do; the console command prints it
without a traceback.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nerf.errors import (
    CheckpointError,
    DeviceError,
    DownloadError,
    NerfError,
    SceneError,
    TrainingError,
)
from pruning.errors import PruningError, RatioError, StatisticsError


class OrchestratorError(Exception):
    """A sweep cannot be read, run or reported; the message says what to do."""


@dataclass(frozen=True)
class Mistake:
    """One mistake in a sweep file.

    Attributes:
        path: where, e.g. ``prune.ratios[2]``.
        value: what stands there.
        message: what is allowed, and the nearest valid name where there is one.
    """

    path: str
    value: object
    message: str

    def __str__(self) -> str:
        shown = "" if self.value is None else f" (got {self.value!r})"
        return f"{self.path}: {self.message}{shown}"


class SpecError(OrchestratorError):
    """A sweep file holds mistakes.

    Attributes:
        source: the file.
        mistakes: every mistake found.
    """

    def __init__(self, source: str, mistakes: Sequence[Mistake]) -> None:
        self.source = source
        self.mistakes = tuple(mistakes)
        count = f"{len(mistakes)} mistake{'s' * (len(mistakes) != 1)}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  {m}" for m in mistakes)]))


class StoreError(OrchestratorError):
    """The storage folder cannot be written, or an entry in it is damaged."""


class ClusterError(OrchestratorError):
    """Ray cannot be reached or cannot give the resources that the sweep asks for."""


class TrackingError(OrchestratorError):
    """The tracking store cannot be used."""


class SearchError(OrchestratorError):
    """The database of a study cannot be used, or holds another study."""


class SweepError(OrchestratorError):
    """A sweep is unknown here, or has nothing to report yet."""


PrunefieldError = (NerfError, PruningError, OrchestratorError)

__all__ = [
    "CheckpointError",
    "ClusterError",
    "DeviceError",
    "DownloadError",
    "Mistake",
    "NerfError",
    "OrchestratorError",
    "PrunefieldError",
    "PruningError",
    "RatioError",
    "SceneError",
    "SearchError",
    "SpecError",
    "StatisticsError",
    "StoreError",
    "SweepError",
    "TrackingError",
    "TrainingError",
]
