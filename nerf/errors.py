"""What can go wrong with scenes, checkpoints and devices.

A message says what happened, what was given, what is allowed and what to do.
The whole tree of the project is drawn in `orchestrator.errors`.
"""


class NerfError(Exception):
    """Something the caller gave cannot be used; the message says what to do."""


class SceneError(NerfError):
    """A scene folder is missing, incomplete or inconsistent."""


class CheckpointError(NerfError):
    """A checkpoint is missing, damaged, of another shape, or unsafe to load."""


class DeviceError(NerfError):
    """A device or backend was asked for that this machine does not have."""


class DownloadError(NerfError):
    """A public scene could not be fetched whole."""


class TrainingError(NerfError):
    """A training diverged (NaN or infinite loss) or cannot be continued."""
