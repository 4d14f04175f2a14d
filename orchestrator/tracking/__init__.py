"""Sweeps in MLflow: the only package that imports it.

::

    experiment                     one a project
    └── sweep (parent run)         the YAML, the report, system metrics, hypervolume
        ├── training (child run)   curves, dense metrics, renders, dense model
        └── trial (child run)      params, metrics, renders, pruned model, its training's run id

The store holds the truth and MLflow is a projection of it: every record has a key, a run is found
again by that key, and logging a record twice changes nothing. `TrackingLogger` is what a sweep
talks to, `RunWriter` does the writing, `serve` and `links` show the result in a browser.
"""

from orchestrator.tracking.logger import TrackingLogger
from orchestrator.tracking.names import SweepInfo, default_uri, tracking_uri
from orchestrator.tracking.ui import Links, links, serve, ui_command

__all__ = [
    "Links",
    "SweepInfo",
    "TrackingLogger",
    "default_uri",
    "links",
    "serve",
    "tracking_uri",
    "ui_command",
]
