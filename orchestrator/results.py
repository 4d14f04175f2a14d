"""What a training or a trial leaves behind: one record each, the same for every reader.

Records are written by the worker that did the work, kept in the store, and read by the tracking
logger, the Pareto front and the report. They are plain JSON on disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["checkpoint", "training", "trial", "control"]


def method_of(config: Mapping[str, Any]) -> str:
    """How a trial was pruned, in a few words: ``activation``, ``obs + obs, render, int8``.

    Criterion, compensation, weighting of the calibration, stored bits, recovery; defaults are left
    out. A control is called by its name. Empty where there is no criterion.
    """
    if "control" in config:
        return f"{config['control']} {config.get('recover_iterations', 0)}"
    if "criterion" not in config:
        return ""
    words = [str(config["criterion"])]
    if config.get("compensation", "none") != "none":
        words[0] += f" + {config['compensation']}"
    for name, default in (("calibration_weighting", "uniform"), ("bits", "fp32")):
        if config.get(name, default) != default:
            words.append(str(config[name]))
    if config.get("recover_iterations"):
        words.append(f"recovered {config['recover_iterations']} iterations")
        if config.get("recover_from", "photos") != "photos":
            words[-1] += f" ({config['recover_from']})"
        if config.get("recover_steps", 1) != 1:
            words[-1] += f" in {config['recover_steps']} steps"
        if config.get("recover_squeeze", 1.0) != 1.0:
            words[-1] += f" squeezed {config['recover_squeeze']:g}"
        if "recover_density_noise" in config:
            words[-1] += f" with noise {config['recover_density_noise']:g}"
        if config.get("recover_optimizer", "adam") != "muon":
            words[-1] += " by Adam"
    return ", ".join(words)


@dataclass(frozen=True)
class ViewScore:
    """How one held-out view came out (MSE in linear [0, 1] RGB; PSNR in dB; SSIM up to 1).

    Attributes:
        view: its index in the scene.
        mse: of the whole view.
        psnr: of the whole view.
        ssim: None where the view has none.
        detail: PSNR of each fifth of its pixels, from the flattest of the photo to the most
            detailed; empty where it was not measured.
    """

    view: int
    mse: float
    psnr: float
    ssim: float | None
    detail: tuple[float, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why there is no result: the stage (train, calibrate, prune, evaluate, …) and the reason."""

    stage: str
    reason: str


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from.

    Attributes:
        commit: git commit of the code, "+dirty" behind it when files had changed; None outside git.
        hardware: the device that did the work, e.g. "NVIDIA H200" or the CPU's name.
        host: name of the machine.
        versions: of prunefield, torch and the like.
        started: UTC time, ISO 8601.
        seconds: wall time of each stage.
    """

    commit: str | None
    hardware: str
    host: str
    versions: Mapping[str, str]
    started: str
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Record:
    """The result of one training (its dense model evaluated) or one trial.

    Attributes:
        kind: "checkpoint" (a trained model), "training" (its evaluation, dense), "trial" (a
            pruning) or "control" (trained beside the recoveries, for comparison).
        key: content address; the same configuration has the same key everywhere.
        training: key of the trained model it rests on.
        config: flat configuration: names as in MLflow (``ratio``, ``criterion``, ``networks``,
            ``schedule``, ``compensation``, ``bits``, ``layer_0_ratio``, ``calibration_views``,
            ``calibration_rays``, ``calibration_weighting``, ``seed``; with a size instead of a
            ratio ``size``, ``allocation``, ``coarse_weight``; where it was trained after pruning
            ``recover_iterations``, ``recover_from``, ``recover_learning_rate``, ``recover_rays``,
            ``recover_rounding_from``, ``recover_steps``, ``recover_squeeze``,
            ``recover_density_noise``, ``recover_optimizer``). A control has ``control`` (its name).
        metrics: flat numbers: ``mse``, ``psnr`` (dB), ``ssim``, ``size_bytes``, ``nonzero_bytes``,
            ``params``, ``params_coarse`` (not of a shared network), ``params_fine``,
            ``flops_per_ray``, ``render_seconds``
            (mean of one held-out view), ``achieved_ratio``, ``validation_mse`` and
            ``validation_psnr`` (on the validation rays); trainings add ``train_seconds``,
            ``iterations``, ``train_psnr``; recoveries and controls ``recover_seconds``.
        views: scores of each held-out view.
        widths: channels of each hidden layer, by network.
        provenance: commit, hardware, times.
        failure: why it failed, or None.
        files: the files beside the record, with their SHA-256.
    """

    kind: Kind
    key: str
    training: str
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    views: tuple[ViewScore, ...]
    widths: Mapping[str, tuple[int, ...]]
    provenance: Provenance
    failure: Failure | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for `json.dump`."""
        return {  # field by field: `asdict` copies every leaf, which shows with 10,000 records
            **vars(self),
            "views": [dict(vars(view)) for view in self.views],
            "provenance": dict(vars(self.provenance)),
            "failure": None if self.failure is None else dict(vars(self.failure)),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Record":
        """The inverse of `to_json`.

        Raises:
            ValueError: the data is not a record.
        """
        try:
            failure = data.get("failure")
            return cls(
                kind=data["kind"],
                key=data["key"],
                training=data["training"],
                config=dict(data["config"]),
                metrics=dict(data["metrics"]),
                views=tuple(_view_score(view) for view in data["views"]),
                widths={name: tuple(w) for name, w in data["widths"].items()},
                provenance=Provenance(**data["provenance"]),
                failure=Failure(**failure) if failure else None,
                files=dict(data["files"]),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a record: {error}") from error


def _view_score(data: Mapping[str, Any]) -> ViewScore:
    return ViewScore(**{**data, "detail": tuple(data.get("detail", ()))})
