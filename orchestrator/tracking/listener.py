"""Between the scheduler and the tracking logger."""

from collections.abc import Mapping
from typing import Any

from orchestrator.plan import Training
from orchestrator.results import Record
from orchestrator.tracking.logger import TrackingLogger

CURVES = ("loss", "train_psnr", "rate")


class TrackingListener:
    """A listener of the scheduler that hands everything on to MLflow."""

    def __init__(self, tracking: TrackingLogger) -> None:
        self._tracking = tracking

    def started(self, total: int) -> None:
        """Nothing to log."""

    def running(self, nodes: int) -> None:
        """Nothing to log."""

    def progress(self, training: Training, report: Mapping[str, Any]) -> None:
        """A point on the training's curves."""
        curves = {name: float(report[name]) for name in CURVES if name in report}
        self._tracking.training_progress(training.result, int(report["iteration"]), curves)

    def ended(self, record: Record | None) -> None:
        """A record to log."""
        if record is not None:
            self._tracking.record(record)
