"""Which model of a sweep to ship: the answer to one question, with its reasons.

Three questions: the best picture within a size, the smallest model with a picture that good, and
the knee of the front. Candidates are the trials with held-out scores and the dense models.

The answer is chosen on the **validation rays**, and told with its figures on the held-out views:
what is best of many by the very views that judge it looks better there than it is.
"""

import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nerf.checkpoints import load_model
from nerf.files import replacing
from orchestrator import pareto
from orchestrator.errors import SweepError
from orchestrator.export import export, form_of
from orchestrator.pareto import Point, Rays
from orchestrator.report.data import ReportData, render_command
from orchestrator.results import Record, method_of
from orchestrator.store import Store
from orchestrator.units import show_bytes

MODEL = "model.safetensors"
RAYS: dict[Rays, str] = {"validation": "validation rays", "held-out": "held-out views"}


@dataclass(frozen=True)
class Pick:
    """A model to ship.

    Attributes:
        record: the trial, or the training whose dense model it is.
        dense: the dense model it comes from, where it was evaluated.
        model: its file.
        rule: the question that it answers, in words.
        by: the rays whose PSNR it was chosen by.
        scene: folder of the scene it renders.
        view: a held-out view to look at, None where there is none.
    """

    record: Record
    dense: Record | None
    model: Path
    rule: str
    by: Rays
    scene: Path | None
    view: int | None

    @property
    def render_command(self) -> str:
        """The command that renders a held-out view with it."""
        return render_command(self.model, self.scene, self.view or 0)

    @property
    def sentence(self) -> str:
        """The answer."""
        metrics = self.record.metrics
        what = f"{metrics['psnr']:.2f} dB at {show_bytes(int(metrics['size_bytes']))}"
        why = f"{self.rule} on the {RAYS[self.by]}"
        if self.by == "validation":
            what = what.replace(" dB", " dB on the held-out views", 1)
            why += f", {metrics['validation_psnr']:.2f} dB there"
        if self.record.kind == "training":
            return f"Ship the dense model {self.record.training}: {what} ({why})."
        text = f"Ship trial {self.record.key} ({_method(self.record)}): {what}"
        if self.dense is not None:
            loss = self.dense.metrics["psnr"] - metrics["psnr"]
            times = self.dense.metrics["size_bytes"] / metrics["size_bytes"]
            side = f"{abs(loss):.2f} dB {'under' if loss >= 0 else 'above'}"
            text += f", {'level with' if abs(loss) < 0.005 else side} the dense model"
            text += f" and {times:.1f} times smaller" if times >= 1.05 else ""
        return f"{text} ({why})."

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "id": self.record.key,
            "kind": self.record.kind,
            "training": self.record.training,
            "rule": self.rule,
            "chosen_by": self.by,
            "sentence": self.sentence,
            "model": str(self.model),
            "render": self.render_command,
            "configuration": dict(self.record.config),
            "metrics": {k: v for k, v in self.record.metrics.items() if math.isfinite(v)},
        }


def pick(
    data: ReportData,
    max_size: int | None = None,
    min_psnr: float | None = None,
    scene: Path | None = None,
    by: Rays | None = None,
) -> Pick:
    """The model to ship: within a size, at least that good, or (neither given) at the knee.

    Args:
        data: the sweep.
        max_size: the most bytes that the model file may have; the best picture within it wins.
        min_psnr: the least PSNR in dB, on the rays that it is chosen by; the smallest model that
            reaches it wins.
        scene: folder of the scene, for the command that renders.
        by: what it is chosen by; None for the validation rays where all models were measured on
            them, else the held-out views.

    Raises:
        SweepError: no model fits; the message names the nearest. Or some were not measured on the
            validation rays that were asked for.
    """
    by, models = _candidates(data, by)
    there = f"on the {RAYS[by]}"
    if max_size is not None:
        rule = f"the best within {show_bytes(max_size)}"
        chosen = _best(
            (p for p in models if p.size_bytes <= max_size),
            lambda p: (-p.psnr, p.size_bytes, p.key),
        )
        nearest = min(models, key=lambda p: p.size_bytes)
    elif min_psnr is not None:
        rule = f"the smallest with at least {min_psnr:g} dB"
        chosen = _best(
            (p for p in models if p.psnr >= min_psnr), lambda p: (p.size_bytes, -p.psnr, p.key)
        )
        nearest = max(models, key=lambda p: p.psnr)
    else:
        rule = "the knee of the front of size and PSNR"
        largest = max(point.size_bytes for point in models)
        chosen = nearest = pareto.knee(pareto.front(models), largest)
    if chosen is None:
        raise SweepError(
            f"no model of the sweep {data.name} fits ({rule} {there}); the nearest is "
            f"{nearest.key} with {nearest.psnr:.2f} dB at {show_bytes(int(nearest.size_bytes))}"
        )
    record = data.by_key[chosen.key]
    views = [score.view for score in record.views]
    return Pick(
        record=record,
        dense=data.dense_of(record) if record.kind == "trial" else record,
        model=model_file(data.store, record),
        rule=rule,
        by=by,
        scene=scene,
        view=min(views, default=None),
    )


def model_file(store: Store, record: Record) -> Path:
    """Where the model file of a trial, a control, or of a training's dense model, is."""
    if record.kind == "training":
        return store.file("checkpoint", record.training, MODEL)
    return store.file(record.kind, record.key, MODEL)


def write_model(model: Path, out: Path) -> None:
    """Write a model file to where it is wanted, in the format that its name says.

    Args:
        model: our model file.
        out: ``.safetensors`` for a copy; ``.tar`` and ``.onnx`` as `export` writes them.

    Raises:
        CheckpointError: the format cannot hold networks of these shapes.
        OrchestratorError: another suffix.
    """
    form = form_of(out)
    if form == "safetensors":
        with replacing(out) as temporary:
            shutil.copyfile(model, temporary)
    else:
        export(out, *load_model(model), form)


def _candidates(data: ReportData, by: Rays | None) -> tuple[Rays, tuple[Point, ...]]:
    """What there is to choose from, with the quality that it is chosen by."""
    models = {rays: data.candidates(rays) for rays in RAYS}
    if not models["held-out"]:
        raise SweepError(f"no model of the sweep {data.name} has a size and a PSNR yet")
    by = by or data.chosen_by
    if missing := len(models["held-out"]) - len(models[by]):
        raise SweepError(
            f"{missing} of {len(models['held-out'])} models of the sweep {data.name} were not "
            "measured on validation rays (`train.validation: 0`, or an older version of "
            "prunefield); choose --by held-out"
        )
    return by, models[by]


def _best(fitting: Iterable[Point], order: Callable[[Point], Any]) -> Point | None:
    return min(fitting, key=order, default=None)


def _method(record: Record) -> str:
    config = record.config
    ratio = config.get("ratio")
    parts = [
        method_of(config),
        config.get("networks"),
        f"{100 * ratio:.0f} % removed" if isinstance(ratio, int | float) and ratio else None,
    ]
    return ", ".join(str(part) for part in parts if part) or "?"
