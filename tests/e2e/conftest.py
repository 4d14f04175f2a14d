"""A tiny sweep that touches every stage, small enough to run several times."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

SWEEP: dict[str, Any] = {
    "name": "tiny",
    "scene": {"format": "demo"},
    "train": {
        "iterations": 12,
        "rays": 32,
        "learning_rate": 4e-3,
        "density_noise": 0.0,
        "network": {"depth": 3, "width": 16, "skip": 1, "point_octaves": 4},
        "samples": {"coarse": 8, "fine": 8},
    },
    "prune": {
        "networks": "both",
        "criteria": ["activation", "magnitude"],
        "ratios": [0.25, 0.5],
        "calibration": {"views": [2, 4], "rays": 16},
    },
    "evaluate": {"max_rays": 64, "renders": 1},
}


@pytest.fixture
def write_sweep(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny sweep, changed as asked, and gives its path."""

    def write(**changes: Any) -> Path:
        sweep = json.loads(json.dumps(SWEEP)) | {"storage": str(tmp_path / "out")}
        for name, value in changes.items():
            section = sweep.get(name)
            sweep[name] = section | value if isinstance(section, dict) else value
        path = tmp_path / f"{sweep['name']}.yaml"
        path.write_text(yaml.safe_dump(sweep))
        return path

    return write
