"""A sweep file: what it may say, and what it says.

`load` reads a YAML file and either returns a frozen `Sweep` or raises one `SpecError` that lists
every mistake. ``schema.py`` is the YAML edge (pydantic), ``mistakes.py`` turns its complaints into
sentences, ``sweep.py`` holds what the rest of the project works with.
"""

from orchestrator.spec.load import (
    check_scene_folder,
    cluster_part,
    given_scene_path,
    load,
    load_cluster,
    place_of,
    read_text,
    relocated,
)
from orchestrator.spec.sweep import (
    CalibrationAxes,
    PruneGrid,
    ReportSettings,
    Resources,
    StageResources,
    Sweep,
    TrackingSettings,
)

__all__ = [
    "CalibrationAxes",
    "PruneGrid",
    "ReportSettings",
    "Resources",
    "StageResources",
    "Sweep",
    "TrackingSettings",
    "check_scene_folder",
    "cluster_part",
    "given_scene_path",
    "load",
    "load_cluster",
    "place_of",
    "read_text",
    "relocated",
]
