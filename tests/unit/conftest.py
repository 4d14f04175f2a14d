"""What the unit tests share: a finished sweep that nobody had to run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from nerf.checkpoints import save_model
from nerf.field import FieldShape, SampleCounts
from nerf.interchange import export_tar
from nerf.scenes import SceneSettings, load_scene, write_demo_scene
from nerf.training import Recipe, Trainer
from orchestrator.plan import make_plan
from orchestrator.sweep import open_sweep
from tests.unit.record_builder import save, training_record, trial_record
from tests.unit.sweep_builder import HOLDOUT, mapping, text

# Square after the first layer and without a skip: what a nerf-pytorch .tar can hold.
SHAPE = FieldShape((8, 8, 8), None, 8, 4, point_octaves=3, direction_octaves=1)


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
            scene={"path": str(demo_folder), "format": "llff", "holdout": HOLDOUT},
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


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo scene and one model of it in both formats, trained for a moment."""
    folder = tmp_path_factory.mktemp("cli")
    scene = write_demo_scene(folder / "demo")
    loaded = load_scene(SceneSettings(path=scene, holdout=HOLDOUT))
    trainer = Trainer(loaded, SHAPE, SampleCounts(8, 8), Recipe(iterations=5, rays=32), seed=0)
    trainer.advance(5)
    model, tar = folder / "model.safetensors", folder / "model.tar"
    save_model(model, trainer.model, {"scene": {"holdout": HOLDOUT, "ndc": True, "factor": None}})
    export_tar(tar, trainer.model, 5)
    return {"scene": scene, "model": model, "tar": tar}
