"""Small sweeps of the demo scene for tests: a mapping to change, and the Sweep it makes."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from orchestrator.spec import Sweep, read_text

HOLDOUT = 19  # of the demo scene's 20 views: two are held out

TINY: dict[str, Any] = {
    "name": "tiny",
    "scene": {"format": "demo", "holdout": 8},
    "train": {
        "iterations": 6,
        "rays": 32,
        "learning_rate": 2.0e-3,
        "decay_iterations": 6,
        "network": {"depth": 3, "width": 8, "skip": 1, "point_octaves": 3, "direction_octaves": 1},
        "samples": {"coarse": 4, "fine": 4},
    },
    "prune": [
        {
            "networks": "both",
            "criteria": ["activation", "magnitude", "random"],
            "ratios": [0.25, 0.5],
            "calibration": {"views": 2, "rays": 16},
        }
    ],
    "evaluate": {"renders": 1},
}


def mapping(**changes: Any) -> dict[str, Any]:
    """`TINY` with other values; ``train__network__depth=4`` reaches inside. None removes a key."""
    data = copy.deepcopy(TINY)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = data
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return data


def text(data: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(data), sort_keys=False)


def sweep(**changes: Any) -> Sweep:
    return read_text(text(mapping(**changes)), Path("tiny.yaml"))


def with_scene(made: Sweep, folder: Path) -> Sweep:
    """The same sweep, its demo scene in a folder that outlives one load."""
    return replace(made, scene=replace(made.scene, path=folder))
