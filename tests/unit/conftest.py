"""What the unit tests share: a finished sweep that nobody had to run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from nerf.scenes import write_demo_scene
from orchestrator.plan import make_plan
from orchestrator.sweep import open_sweep
from tests.unit.record_builder import save, training_record, trial_record
from tests.unit.sweep_builder import mapping, text


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo scene, rendered once."""
    return write_demo_scene(tmp_path_factory.mktemp("scene") / "demo")


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A migrated, empty tracking store: making one takes two seconds, copying it nothing."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def write_results(tmp_path: Path, demo_folder: Path) -> Callable[..., Path]:
    """Writes a sweep file and synthetic results of all that it plans; gives the file's path."""

    def write(name: str = "tiny", shift: float = 0.0, **changes: Any) -> Path:
        settings = mapping(
            name=name,
            storage=str(tmp_path / "out"),
            scene={"path": str(demo_folder), "format": "llff", "holdout": 19},
            **changes,
        )
        path = tmp_path / f"{name}.yaml"
        path.write_text(text(settings))
        sweep, store = open_sweep(path)
        plan = make_plan(sweep, store)
        for training in plan.trainings:
            dense = training_record(training.seed, psnr=25.0 + shift)
            if not store.has("training", training.result):
                save(store, replace(dense, key=training.result, training=training.key))
            dense = store.read_record("training", training.result)
            for trial in plan.trials:
                if trial.training == training.key and not store.has("trial", trial.key):
                    config = trial.config
                    record = trial_record(dense, config.ratio or 0.5, config.criterion)
                    save(store, replace(record, key=trial.key, config=config.flat()))
        return path

    return write
