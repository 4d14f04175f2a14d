"""The YAML edge: which keys a sweep file may hold and what they may be.

Every field has a description, so that the reference of the sweep file can be made from here.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, LiteralString
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from nerf.recipe import PRESETS
from orchestrator.spec.mistakes import nearest
from orchestrator.units import parse_bytes, parse_seconds
from pruning import ALLOCATIONS, BUDGETED, COMPENSATIONS, CRITERIA, SCHEMES, SPARSE, PruningError
from pruning.sparsity import Pattern

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
MAX_SEED = 2**31 - 1
MAX_COUNT = 10**9
MAX_LAYERS = 64
TRACKING_KINDS = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
# Of a prefix, only what needs no escaping anywhere.
BUCKET_ADDRESS = re.compile(
    r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/(?!\.{1,2}(/|$))[A-Za-z0-9._=+-]+)*/?"
)


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _known(kind: str, names: Sequence[str]) -> Any:
    def check(value: Any) -> str:
        if isinstance(value, str) and value in names:
            return value
        raise PydanticCustomError(
            "unknown_name",
            "unknown {kind}; allowed are {names}{hint}",
            {"kind": kind, "names": ", ".join(names), "hint": nearest(value, names)},
        )

    return PlainValidator(check)


def _names(names: Iterable[str]) -> WithJsonSchema:
    return WithJsonSchema({"enum": list(names)})


def _ratio(what: LiteralString) -> PlainValidator:
    """A number from 0 up to 1; `what` one is, for the message."""

    def checked(value: Any) -> float:
        if not _is_ratio(value):
            raise PydanticCustomError("ratio", what + ": a number from 0 up to, but not, 1")
        return float(value) + 0.0  # −0 and 0 are one ratio and must have one key

    return PlainValidator(checked)


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number", "a number belongs here")
    return value


def _folder(value: str) -> str:
    try:
        os.fsencode(Path(value).expanduser())
    except (RuntimeError, ValueError) as error:
        raise PydanticCustomError(
            "folder", "not a path: {reason}", {"reason": str(error)}
        ) from error
    if not value or "\0" in value:
        raise PydanticCustomError("folder", "the path of a folder belongs here")
    return value


def _storage(value: str) -> str:
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        return _folder(value)
    if "@" in value.partition("://")[2].partition("/")[0] or holds_password(value):
        raise PydanticCustomError(
            "password",
            "an address here must not hold keys: give them in the environment, as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    if not BUCKET_ADDRESS.fullmatch(value):
        raise PydanticCustomError(
            "storage", "allowed are a folder, s3://BUCKET and s3://BUCKET/PREFIX"
        )
    return value


def _tracking_uri(value: str | None) -> str | None:
    if value is not None and holds_password(value):
        raise PydanticCustomError(
            "password",
            "an address here must not hold a password: give it in the environment, as PGPASSWORD "
            "or MLFLOW_TRACKING_PASSWORD, or the whole address as PRUNEFIELD_TRACKING_URI",
        )
    if value and value.partition("://")[0].partition("+")[0] not in TRACKING_KINDS:
        raise PydanticCustomError(
            "tracking",
            "allowed are http(s)://HOST:PORT of an MLflow server, sqlite:///FILE and "
            "postgresql://USER@HOST/DATABASE{hint}",
            {"hint": nearest(value.partition("://")[0], TRACKING_KINDS)},
        )
    return value


def _study_address(value: str | None) -> str | None:
    if value is not None and holds_password(value):
        raise PydanticCustomError(
            "password",
            "an address here must not hold a password: give it in the environment, as PGPASSWORD",
        )
    return value


def holds_password(value: str) -> bool:
    """Whether an address has a password in it, so that it must not be shown either."""
    try:
        parts = urlsplit(value)
    except ValueError:
        return "@" in value
    query = {name.lower() for name in parse_qs(parts.query)}
    return parts.password is not None or bool(query & {"password", "passwd", "sslpassword"})


def listed_schedules(value: Any) -> Any:
    """Schedules as a list, also from a lone name or the lone ratios of one explicit schedule."""
    lone = isinstance(value, list) and value and all(isinstance(v, int | float) for v in value)
    return [value] if isinstance(value, str) or lone else value


def _views(value: Any) -> int | None:
    if value == "all":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
        raise PydanticCustomError("views", "allowed are a whole number from 1, or `all`")
    return value


def _gpus(value: Any) -> float | None:
    if value == "auto":
        return None
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or not 0.0 <= value <= 1024 or (value > 1 and value != int(value)):
        raise PydanticCustomError(
            "gpus", "allowed are `auto`, a fraction from 0 to 1, or a whole number of GPUs"
        )
    return float(value)


def _schedule(value: Any) -> str | tuple[float, ...]:
    if isinstance(value, list):
        bad = [i for i, r in enumerate(value) if not _is_ratio(r)]
        if bad or not value:
            raise PydanticCustomError(
                "schedule",
                "a list of ratios, one a hidden layer, each from 0 up to, but not, 1 "
                "(wrong at places {bad})",
                {"bad": ", ".join(map(str, bad)) or "all: it is empty"},
            )
        return tuple(float(r) + 0.0 for r in value)
    if isinstance(value, str) and value in ALLOCATIONS:
        return value
    raise PydanticCustomError(
        "schedule",
        "unknown schedule; allowed are {names}, or a list with one ratio a hidden layer{hint}",
        {"names": ", ".join(ALLOCATIONS), "hint": nearest(value, list(ALLOCATIONS))},
    )


def _size(value: Any) -> int:
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise PydanticCustomError("size", "{reason}", {"reason": str(error)}) from error


def _coarse_weight(value: Any) -> float | str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "auto" or (number and 0 < value < float("inf")):
        return value if value == "auto" else float(value)
    raise PydanticCustomError("coarse_weight", "allowed are a number above 0, or `auto`")


def _mask(value: Any) -> float | str:
    try:
        if isinstance(value, str) or _is_ratio(value):
            Pattern.of(value)
            return value if isinstance(value, str) else float(value) + 0.0
    except PruningError:
        pass
    raise PydanticCustomError(
        "mask",
        "a mask is the fraction of weights to set to 0, from 0 up to, but not, 1; or N:M in "
        'quotes, such as "2:4"',
    )


def _seconds(value: Any) -> float | None:
    if value is None:
        return None
    try:
        return parse_seconds(value)
    except ValueError as error:
        raise PydanticCustomError("seconds", "{reason}", {"reason": str(error)}) from error


def _is_ratio(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value < 1.0


# What JSON Schema cannot take from the validators, for editors.
_RATIO = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
_VIEWS = {"anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_COUNT}, {"const": "all"}]}
_GPUS = {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1024}, {"const": "auto"}]}
_TIME = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}, {"type": "null"}]}
_SIZE = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([kKmM][iI]?)?[bB]?\s*$"},
    ]
}
_COARSE_WEIGHT = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "auto"}]}
_MASK = {"anyOf": [_RATIO, {"type": "string", "pattern": "^[0-9]+:[0-9]+$"}]}
_SCHEDULE = {
    "anyOf": [{"enum": list(ALLOCATIONS)}, {"type": "array", "items": _RATIO, "minItems": 1}]
}

Listed = BeforeValidator(_listed)
Ratio = Annotated[float, _ratio("a ratio is the fraction removed"), WithJsonSchema(_RATIO)]
Fraction = Annotated[float, _ratio("a fraction"), WithJsonSchema(_RATIO)]
Views = Annotated[int | None, PlainValidator(_views), WithJsonSchema(_VIEWS)]
Gpus = Annotated[float | None, PlainValidator(_gpus), WithJsonSchema(_GPUS)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT, strict=True)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED, strict=True)]
Criterion = Annotated[
    str, _known("criterion", sorted({*CRITERIA, *SPARSE})), _names(sorted({*CRITERIA, *SPARSE}))
]
Mask = Annotated[float | str, PlainValidator(_mask), WithJsonSchema(_MASK)]
Compensation = Annotated[str, _known("compensation", list(COMPENSATIONS)), _names(COMPENSATIONS)]
Allocation = Annotated[str, _known("allocation", list(BUDGETED)), _names(BUDGETED)]
Scheme = Annotated[str, _known("scheme", list(SCHEMES)), _names(SCHEMES)]
CHOSEN = ["auto", "rate"]
Bits = Annotated[str, _known("scheme", [*SCHEMES, *CHOSEN]), _names([*SCHEMES, *CHOSEN])]
Size = Annotated[int, PlainValidator(_size), WithJsonSchema(_SIZE)]
Seconds = Annotated[float | None, PlainValidator(_seconds), WithJsonSchema(_TIME)]
ScheduleEntry = Annotated[
    str | tuple[float, ...], PlainValidator(_schedule), WithJsonSchema(_SCHEDULE)
]
Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
PositiveFloat = Annotated[Number, Field(gt=0)]
CoarseWeight = Annotated[
    float | Literal["auto"], PlainValidator(_coarse_weight), WithJsonSchema(_COARSE_WEIGHT)
]
Folder = Annotated[str, AfterValidator(_folder)]
Storage = Annotated[str, AfterValidator(_storage)]
PrecisionName = Literal["float32", "tf32", "bfloat16"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SceneSection(_Section):
    """Which scene, and how it is read."""

    path: Annotated[
        Folder | None,
        Field(
            description="scene folder; a relative one is looked for in the working directory, its "
            "data/, $PRUNEFIELD_DATA and the sweep file's folder; `format: demo` needs none"
        ),
    ] = None
    format: Annotated[
        Literal["auto", "llff", "colmap", "blender", "demo"],
        Field(description="format of the folder"),
    ] = "auto"
    factor: Annotated[
        int | None,
        Field(ge=1, le=64, strict=True, description="downsampling; images_8 for 8"),
    ] = None
    holdout: Annotated[
        int,
        Field(
            ge=2,
            le=MAX_COUNT,
            strict=True,
            description="every n-th view is held out (LLFF, COLMAP, demo)",
        ),
    ] = 8
    ndc: Annotated[
        bool | None,
        Field(
            strict=True,
            description="rays in normalised device coordinates; by default yes for forward-facing "
            "scenes (LLFF, COLMAP, demo), no for Blender",
        ),
    ] = None
    white_background: Annotated[
        bool | None,
        Field(
            strict=True,
            description="whether rays that hit nothing are white; by default for Blender only",
        ),
    ] = None
    half_resolution: Annotated[bool, Field(strict=True, description="half size (Blender)")] = False
    test_skip: Annotated[
        int, Field(ge=1, le=MAX_COUNT, strict=True, description="every n-th test view (Blender)")
    ] = 1


class NetworkSection(_Section):
    """Widths of both networks before pruning; the default is the original NeRF's."""

    depth: Annotated[int, Field(ge=1, le=MAX_LAYERS, strict=True, description="hidden layers")] = 8
    width: Annotated[int, Field(ge=1, le=4096, strict=True, description="channels of each")] = 256
    skip: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_LAYERS,
            strict=True,
            description="hidden layer whose output is joined by the point",
        ),
    ] = 4
    view: Annotated[
        int | None,
        Field(ge=1, le=4096, strict=True, description="view branch; half the width by default"),
    ] = None
    point_octaves: Annotated[
        int, Field(ge=0, le=16, strict=True, description="frequencies of the encoding of points")
    ] = 10
    direction_octaves: Annotated[
        int,
        Field(
            ge=0, le=16, strict=True, description="frequencies of the encoding of view directions"
        ),
    ] = 4


class SamplesSection(_Section):
    """Samples a ray."""

    coarse: Annotated[
        int, Field(ge=4, le=1024, strict=True, description="evenly spaced, seen by both networks")
    ] = 64
    fine: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            strict=True,
            description="placed by the coarse network, seen by the fine one",
        ),
    ] = 64


class TrainSection(_Section):
    """How the NeRF is trained; lists fan out as a grid."""

    preset: Annotated[
        Literal["report", "large-batch", "fast"],
        Field(
            exclude=True,  # a sweep is what its values are, whoever named them
            description="a named recipe for what is not given here; `large-batch`: 50,000 steps of "
            "4,096 rays, learning rate 1e-3, decay in 62,500; `fast`: 20,000 steps of 2,048 rays "
            "by Muon, learning rate 2e-3, along a cosine",
        ),
    ] = "report"
    iterations: Annotated[
        list[Count], Listed, Field(min_length=1, description="optimiser steps")
    ] = [200_000]
    seeds: Annotated[
        list[Seed], Listed, Field(min_length=1, description="of the weights and the order of rays")
    ] = [0]
    rays: Annotated[list[Count], Listed, Field(min_length=1, description="rays a step")] = [1024]
    learning_rate: Annotated[
        list[PositiveFloat],
        Listed,
        Field(min_length=1, description="at the first step, or for a cosine at its highest"),
    ] = [5e-4]
    optimizer: Annotated[
        Literal["adam", "muon"],
        Field(description="`muon`: matrices by Muon, everything else by Adam"),
    ] = "adam"
    anneal: Annotated[
        Literal["exponential", "cosine"],
        Field(
            description="how the learning rate falls: by `decay`, or up over the first 2 % of the "
            "iterations and then to 0 along a cosine"
        ),
    ] = "exponential"
    decay: Annotated[
        PositiveFloat,
        Field(description="factor on the learning rate after `decay_iterations` (exponential)"),
    ] = 0.1
    decay_iterations: Annotated[
        Count, Field(description="steps in which the learning rate falls by `decay`")
    ] = 250_000
    density_noise: Annotated[
        Number,
        Field(ge=0, description="standard deviation of the noise on densities while training"),
    ] = 1.0
    precision: Annotated[
        PrecisionName, Field(description="arithmetic of the linear layers while training")
    ] = "float32"
    validation: Annotated[
        Fraction,
        Field(description="fraction of the training views' pixels kept for validation alone"),
    ] = 0.01
    network: Annotated[NetworkSection, Field(description="widths before pruning")] = (
        NetworkSection()
    )
    samples: Annotated[SamplesSection, Field(description="samples a ray")] = SamplesSection()

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, data: Any) -> Any:
        """What a preset says where the file says nothing."""
        name = data.get("preset") if isinstance(data, dict) else None
        return {**PRESETS[name], **data} if isinstance(name, str) and name in PRESETS else data


class CalibrationSection(_Section):
    """The calibration set: seeded training rays; lists fan out as a grid."""

    views: Annotated[
        list[Views], Listed, Field(min_length=1, description="how many training views, or `all`")
    ] = [None]
    rays: Annotated[list[Count], Listed, Field(min_length=1, description="rays of each view")] = [
        1024
    ]
    seeds: Annotated[
        list[Seed],
        Listed,
        Field(min_length=1, description="draw views and rays; sets of one seed are nested"),
    ] = [0]
    weighting: Annotated[
        list[Literal["uniform", "render", "detail"]],
        Listed,
        Field(
            min_length=1,
            description="of samples: all alike, by their render weights, or with rays drawn more "
            "often where the photos have detail",
        ),
    ] = ["uniform"]


class RecoverSection(_Section):
    """A short training after pruning; lists fan out as a grid."""

    iterations: Annotated[
        list[Annotated[int, Field(ge=0, le=MAX_COUNT, strict=True)]],
        Listed,
        Field(min_length=1, description="optimiser steps after pruning; 0 for none"),
    ] = [0]
    from_: Annotated[
        list[Literal["photos", "distill", "both"]],
        Listed,
        Field(
            min_length=1,
            alias="from",
            description="learn from photos, from the dense model (`distill`), or from both",
        ),
    ] = ["photos"]
    learning_rate: Annotated[
        list[PositiveFloat], Listed, Field(min_length=1, description="at its highest")
    ] = [5e-4]
    rays: Annotated[list[Count], Listed, Field(min_length=1, description="rays a step")] = [1024]
    rounding_from: Annotated[
        list[Annotated[Number, Field(ge=0, lt=1)]],
        Listed,
        Field(
            min_length=1,
            description="share of the iterations after which few-bit weights are trained rounded",
        ),
    ] = [0.3]
    steps: Annotated[
        list[Annotated[int, Field(ge=1, le=100, strict=True)]],
        Listed,
        Field(min_length=1, description="rounds of pruning a part of the way and recovering"),
    ] = [1]
    squeeze: Annotated[
        list[Annotated[Number, Field(ge=1, le=100)]],
        Listed,
        Field(
            min_length=1,
            description="prune to a file so many times as large, and train its codes to fit",
        ),
    ] = [1.0]
    density_noise: Annotated[
        list[Annotated[Number, Field(ge=0)]],
        Listed,
        Field(
            description="standard deviation of the noise added to raw densities; where it is not "
            "given, that of the training"
        ),
    ] = []
    optimizer: Annotated[
        list[Literal["adam", "muon"]],
        Listed,
        Field(min_length=1, description="of the matrices; biases and scales are Adam's"),
    ] = ["muon"]
    controls: Annotated[
        list[Literal["dense_longer", "narrow"]],
        Listed,
        Field(
            description="trained beside, for comparison: the dense model for the same extra "
            "iterations; with `sizes`, a narrow NeRF of the same file size from scratch"
        ),
    ] = ["dense_longer", "narrow"]
    control_iterations: Annotated[
        list[Count],
        Listed,
        Field(
            description="optimiser steps of the controls, e.g. for as much time as training and "
            "recovery take together; where it is not given, those of the recovery"
        ),
    ] = []
    control_learning_rate: Annotated[
        list[PositiveFloat],
        Listed,
        Field(description="of the controls; where it is not given, that of the recovery"),
    ] = []


METHOD = {
    *("networks", "criteria", "compensation", "allocations", "coarse_weight", "bits", "errors"),
    "recover",
}
"""What says something of the method, in a grid of sizes."""

BEST: dict[str, Any] = {
    "networks": "auto",
    "criteria": "obs",
    "compensation": "obs",
    "bits": "rate",
    "errors": "pixel",
}
"""The best method known without training again: docs/results/methods.md."""


class PruneSection(_Section):
    """One grid of prunings: every combination is a trial.

    A grid removes fractions of the channels (`ratios`, spread by `schedules`), prunes to the size
    of the model file (`sizes`, shared out by `allocations`), or sets single weights to 0 (`masks`).
    Where a grid of `sizes` says nothing of the method (none of `networks`, `criteria`,
    `compensation`, `allocations`, `coarse_weight`, `bits`, `errors`, `recover`), it has the best
    one known: `networks: auto`, `bits: rate`, `errors: pixel`. Where it says something, the rest is
    at the defaults below, with `obs` for `criteria` and `compensation`.
    """

    networks: Annotated[
        list[Literal["coarse", "fine", "both", "shared", "auto"]],
        Listed,
        Field(
            min_length=1,
            description="which are pruned; `shared`: the fine one alone, for both passes; `auto`, "
            "with sizes: both where the file holds them whole, else shared",
        ),
    ] = ["both"]
    criteria: Annotated[
        list[Criterion],
        Listed,
        Field(min_length=1, description="which channels go first; `obs` by default with sizes"),
    ] = ["activation"]
    ratios: Annotated[
        list[Ratio],
        Listed,
        Field(
            min_length=1,
            description="fractions of the channels to remove; a grid has `ratios` or `sizes`",
        ),
    ] = []
    schedules: Annotated[
        list[ScheduleEntry],
        BeforeValidator(listed_schedules),
        Field(
            min_length=1,
            description="how a ratio is spread over the hidden layers: a name, or a list with one "
            "ratio a layer",
        ),
    ] = ["uniform"]
    calibration: Annotated[
        CalibrationSection,
        Field(description="the training rays that criteria and compensations look at"),
    ] = CalibrationSection()
    compensation: Annotated[
        list[Compensation],
        Listed,
        Field(min_length=1, description="what replaces what was removed; `obs` with sizes"),
    ] = ["none"]
    sizes: Annotated[
        list[Size], Listed, Field(min_length=1, description="bytes of the model file, e.g. 500kB")
    ] = []
    allocations: Annotated[
        list[Allocation], Listed, Field(min_length=1, description="how a size is shared out")
    ] = ["chain"]
    coarse_weight: Annotated[
        list[CoarseWeight],
        Listed,
        Field(
            min_length=1,
            description="how much errors of the coarse network count, with sizes; `auto`: chosen "
            "on validation rays",
        ),
    ] = [0.001]
    bits: Annotated[
        list[Bits], Listed, Field(min_length=1, description="how the file stores its weights")
    ] = ["fp32"]
    masks: Annotated[
        list[Mask],
        Listed,
        Field(min_length=1, description='fractions of single weights to set to 0, or "2:4"'),
    ] = []
    errors: Annotated[
        list[Literal["layer", "pixel"]],
        Listed,
        Field(
            min_length=1,
            description="whose errors `obs` and allocations weigh: a layer's readers', or the "
            "pixel's",
        ),
    ] = ["layer"]
    recover: Annotated[RecoverSection, Field(description="a short training after pruning")] = (
        RecoverSection()
    )

    @model_validator(mode="before")
    @classmethod
    def _best_for_sizes(cls, data: Any) -> Any:
        """A grid of sizes that says nothing of the method gets the best one known."""
        if isinstance(data, dict) and "sizes" in data and not METHOD & data.keys():
            return {**BEST, **data}
        if isinstance(data, dict) and "sizes" in data:
            return {"criteria": "obs", "compensation": "obs", **data}
        if isinstance(data, dict) and "masks" in data:
            return {"criteria": "sparsegpt", **data}
        return data


class EvaluateSection(_Section):
    """How models are evaluated: held-out views, no jitter, no noise."""

    max_rays: Annotated[
        int | None,
        Field(
            ge=1, le=MAX_COUNT, strict=True, description="rays a view; whole pictures by default"
        ),
    ] = None
    precision: Annotated[
        PrecisionName, Field(description="arithmetic of the linear layers while evaluating")
    ] = "float32"
    renders: Annotated[
        int,
        Field(ge=0, le=MAX_COUNT, strict=True, description="held-out views kept as pictures"),
    ] = 1


class StageSection(_Section):
    """What one worker takes."""

    cpus: Annotated[
        Annotated[Number, Field(gt=0, le=1024)] | None,
        Field(description="CPU cores; 2 for a training, 1 for a pruning by default"),
    ] = None
    gpus: Annotated[
        Gpus,
        Field(
            description="GPUs or a fraction of one; `auto`: one for a training, a quarter for a "
            "pruning, none where there is none"
        ),
    ] = None


class ResourcesSection(_Section):
    """Where the work runs."""

    train: Annotated[StageSection, Field(description="each training")] = StageSection()
    prune: Annotated[StageSection, Field(description="each worker that calibrates and prunes")] = (
        StageSection()
    )
    retries: Annotated[
        int,
        Field(
            ge=0,
            le=100,
            strict=True,
            description="how often work is started again after its worker died",
        ),
    ] = 2
    checkpoint_seconds: Annotated[
        PositiveFloat, Field(description="how often a training saves its state")
    ] = 30.0
    backend: Annotated[
        Literal["auto", "eager", "compiled", "fused"],
        Field(description="how networks are run: how fast, not what comes out"),
    ] = "auto"


class LimitsSection(_Section):
    """How long work may take before its worker is ended and it counts as failed.

    A time is a number of seconds, or a text such as `90s`, `30min`, `2h`, `7d`; `null`: no limit.
    """

    train: Annotated[Seconds, Field(description="a whole training, from its (re)start")] = 604_800.0
    silence: Annotated[
        Seconds,
        Field(description="between two signs of life of a training, its evaluation included"),
    ] = 3600.0
    calibrate: Annotated[Seconds, Field(description="one pass over calibration rays")] = 7200.0
    prune: Annotated[
        Seconds, Field(description="one pruning, with its recovery and its evaluation")
    ] = 43_200.0


class TrackingSection(_Section):
    """Where runs are logged."""

    uri: Annotated[
        str | None,
        AfterValidator(_tracking_uri),
        Field(
            description="MLflow URI: a server, or a database such as "
            "`postgresql://USER@HOST/DATABASE`, without a password; SQLite in `storage` by "
            "default; $PRUNEFIELD_TRACKING_URI goes before it"
        ),
    ] = None
    experiment: Annotated[
        str, Field(min_length=1, max_length=200, description="name of the MLflow experiment")
    ] = "prunefield"
    patience: Annotated[
        Annotated[Number, Field(ge=0, le=86_400)],
        Field(description="seconds to wait at the end for a tracking store that does not answer"),
    ] = 60.0


class ReportSection(_Section):
    """What the report shows."""

    ratios: Annotated[list[Ratio] | None, Field(description="ratios in the grid of renders")] = None
    reference_psnr: Annotated[
        Number, Field(description="dB, of the hypervolume's reference point")
    ] = 10.0


class RatioRangeSection(_Section):
    """Between what each searched ratio lies."""

    low: Annotated[Ratio, Field(description="least fraction removed")] = 0.0
    high: Annotated[Ratio, Field(description="greatest fraction removed")] = 0.95
    step: Annotated[
        Ratio | None, Field(description="ratios are multiples of this; whole channels by default")
    ] = None


class StartSection(_Section):
    """What a search tries before it proposes anything itself."""

    uniform: Annotated[
        list[Ratio], Listed, Field(description="ratios, the same in every searched layer")
    ] = []
    schedules: Annotated[
        list[ScheduleEntry],
        BeforeValidator(listed_schedules),
        Field(description="lists of ratios, one a hidden layer, the same in each network"),
    ] = []
    allocations: Annotated[
        list[Allocation], Listed, Field(description="whose ratios at `sizes` are tried")
    ] = ["chain"]
    sizes: Annotated[list[Size], Listed, Field(description="of the model file")] = []
    coarse_weight: Annotated[
        PositiveFloat,
        Field(description="how much the coarse network's errors count for the allocations"),
    ] = 0.1
    store: Annotated[
        bool,
        Field(strict=True, description="try what other sweeps found best on the same model, too"),
    ] = True


class FidelitySection(_Section):
    """A first look at few validation rays, which stops a trial that is clearly dominated."""

    rays: Annotated[
        int,
        Field(ge=0, le=MAX_COUNT, strict=True, description="of the first look; 0: no first look"),
    ] = 2048
    margin: Annotated[
        Number,
        Field(ge=0, description="dB by which a trial that is not larger must be better"),
    ] = 0.5
    audit: Annotated[
        int,
        Field(
            ge=0,
            le=MAX_COUNT,
            strict=True,
            description="so many stopped trials, those nearest to the front, are measured in full "
            "when the search is over, to see whether the front would be another",
        ),
    ] = 16


class SearchSection(_Section):
    """An Optuna study: ratios layer by layer, chosen on validation rays.

    A list of criteria, compensations, bits or calibration sets is searched as well. Objectives and
    constraints on quality are measured on the validation rays; held-out views are rendered for the
    final front alone.
    """

    trials: Annotated[Count, Field(description="of the study; raise it to go on")] = 200
    seconds: Annotated[
        Seconds,
        Field(
            description="after so long (`8min`; all runs together) nothing more is proposed and "
            "the final front is rendered; raise it to go on"
        ),
    ] = None
    sampler: Annotated[
        Literal["gp", "tpe", "nsga2", "nsga3", "qmc", "random"],
        Field(description="Optuna's sampler"),
    ] = "gp"
    seed: Annotated[Seed, Field(description="of the sampler")] = 0
    batch: Annotated[
        int,
        Field(ge=1, le=1000, strict=True, description="trials proposed at once"),
    ] = 16
    objectives: Annotated[
        list[Literal["size_bytes", "psnr", "mse", "ssim", "render_seconds", "flops"]],
        Listed,
        Field(min_length=1, max_length=3, description="one to three"),
    ] = ["size_bytes", "psnr"]
    constraints: Annotated[
        list[str],
        Listed,
        Field(description="such as `size_bytes <= 500kB` or `psnr >= dense - 0.5`"),
    ] = []
    networks: Annotated[
        Literal["coarse", "fine", "both", "shared"],
        Field(description="which are pruned; `both`: each layer of each network by itself"),
    ] = "both"
    layers: Annotated[
        Literal["each"] | list[list[int | Literal["feature", "view"]]],
        Field(
            description="`each`, or groups of layers with one ratio: numbers of hidden layers, "
            "`feature`, `view`; what is in no group stays whole"
        ),
    ] = "each"
    ratios: Annotated[RatioRangeSection, Field(description="the range of each ratio")] = (
        RatioRangeSection()
    )
    criteria: Annotated[
        list[Criterion], Listed, Field(min_length=1, description="scoring rules")
    ] = ["obs"]
    compensation: Annotated[
        list[Compensation],
        Listed,
        Field(min_length=1, description="what replaces what was removed"),
    ] = ["obs"]
    bits: Annotated[
        list[Scheme], Listed, Field(min_length=1, description="how the file stores its weights")
    ] = ["fp32"]
    errors: Annotated[
        Literal["layer", "pixel"],
        Field(description="errors that `obs` weighs: of a layer's readers, or the pixel's"),
    ] = "layer"
    calibration: Annotated[CalibrationSection, Field(description="the calibration sets")] = (
        CalibrationSection()
    )
    start: Annotated[StartSection, Field(description="what is tried first")] = StartSection()
    fidelity: Annotated[FidelitySection, Field(description="the first look")] = FidelitySection()
    final: Annotated[
        Count, Field(description="the most points of the front whose held-out views are rendered")
    ] = 64
    storage: Annotated[
        str | None,
        AfterValidator(_study_address),
        Field(
            description="SQLAlchemy URL of the study, without a password; SQLite in the storage "
            "folder by default"
        ),
    ] = None


class SweepFile(_Section):
    """A sweep file."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"anyOf": [{"required": ["prune"]}, {"required": ["search"]}]},
    )

    name: Annotated[
        str, Field(pattern=NAME_PATTERN, description="of the sweep, its report and its MLflow run")
    ]
    description: Annotated[str, Field(description="a sentence for people")] = ""
    scene: Annotated[SceneSection, Field(description="which scene, and how it is read")]
    train: Annotated[TrainSection, Field(description="how the NeRF is trained")] = TrainSection()
    prune: Annotated[
        list[PruneSection],
        Listed,
        Field(min_length=1, description="one grid of prunings, or a list; optional with `search`"),
    ] = []
    search: Annotated[
        SearchSection | None, Field(description="a search instead of, or beside, the grids")
    ] = None
    evaluate: Annotated[EvaluateSection, Field(description="how models are measured")] = (
        EvaluateSection()
    )
    resources: Annotated[ResourcesSection, Field(description="what each worker takes")] = (
        ResourcesSection()
    )
    limits: Annotated[LimitsSection, Field(description="how long work may take")] = LimitsSection()
    tracking: Annotated[TrackingSection, Field(description="where runs are logged")] = (
        TrackingSection()
    )
    storage: Annotated[
        Storage, Field(description="where results are kept: a folder, or s3://BUCKET/PREFIX")
    ] = "prunefield-out"
    report: Annotated[ReportSection, Field(description="what the report shows")] = ReportSection()
