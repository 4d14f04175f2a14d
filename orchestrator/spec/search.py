"""The ``search:`` section: what lies between its keys, and the settings it stands for."""

import re
from collections.abc import Iterator
from typing import Any, cast

from orchestrator.errors import Mistake
from orchestrator.spec.mistakes import nearest
from orchestrator.spec.schema import SearchSection
from orchestrator.spec.sweep import CalibrationAxes, Constraint, Objective, SearchSettings
from orchestrator.units import parse_bytes

OBJECTIVES = ("size_bytes", "psnr", "mse", "ssim", "render_seconds", "flops")
# What a dense model's record says of itself.
RELATIVE = ("size_bytes", "psnr", "mse", "flops")
_BOUND = re.compile(
    r"\s*(?P<metric>\w+)\s*(?P<sense><=|>=)\s*"
    r"(?:(?:(?P<factor>[\d.]+(?:e[+-]?\d+)?)\s*\*\s*)?(?P<dense>dense)"
    r"(?:\s*(?P<sign>[+-])\s*(?P<shift>\S+))?|(?P<value>\S+(?:\s*[kKmM][iI]?B)?))\s*",
)


def parse_constraint(text: str) -> Constraint:
    """Read ``size_bytes <= 500kB``, ``psnr >= dense - 0.5`` or ``flops <= 0.3 * dense``.

    Raises:
        ValueError: it is none; the message says what is allowed.
    """
    match = _BOUND.fullmatch(text)
    if match is None:
        raise ValueError(
            "a constraint is METRIC <= VALUE or METRIC >= VALUE, where VALUE is a number, "
            "`dense`, `dense - 0.5` or `0.3 * dense`"
        )
    metric = match["metric"]
    if metric not in OBJECTIVES:
        raise ValueError(
            f"unknown metric {metric!r}; allowed are {', '.join(OBJECTIVES)}"
            f"{nearest(metric, OBJECTIVES)}"
        )
    if match["dense"] and metric not in RELATIVE:
        raise ValueError(
            f"{metric!r} cannot be compared with the dense model's here; allowed are "
            f"{', '.join(RELATIVE)}"
        )
    given = match["shift"] if match["dense"] else match["value"]
    offset = 0.0
    if given is not None:
        try:
            offset = float(parse_bytes(given)) if metric == "size_bytes" else float(given)
        except ValueError as error:
            raise ValueError(f"{given!r} is not a number: {error}") from error
        if not abs(offset) < float("inf"):
            raise ValueError(f"{given!r} is not a finite number")
    return Constraint(
        text=" ".join(text.split()),
        metric=cast(Objective, metric),
        sense="<=" if match["sense"] == "<=" else ">=",
        dense=(float(match["factor"] or 1.0) if match["dense"] else 0.0),
        offset=-offset if match["sign"] == "-" else offset,
    )


def search_mistakes(section: SearchSection, depth: int, validation: float) -> Iterator[Mistake]:
    """Mistakes between the keys of a search; places are relative to it."""
    for number, text in enumerate(section.constraints):
        try:
            parse_constraint(text)
        except ValueError as error:
            yield Mistake(f"constraints[{number}]", text, str(error))
    doubled = [name for name in section.objectives if section.objectives.count(name) > 1]
    if doubled:
        yield Mistake("objectives", doubled[0], "an objective is given twice")
    if section.ratios.low >= section.ratios.high:
        yield Mistake("ratios.low", section.ratios.low, "must be below `high`")
    if validation == 0.0:
        yield Mistake(
            "(section)",
            None,
            "a search chooses on validation rays: set `train.validation` above 0, e.g. 0.01",
        )
    for number, schedule in enumerate(section.start.schedules):
        if isinstance(schedule, str) or len(schedule) != depth:
            yield Mistake(
                f"start.schedules[{number}]",
                schedule,
                f"a list of {depth} ratios, one a hidden layer, belongs here; "
                "`uniform` takes single ratios",
            )
    yield from _group_mistakes(section, depth)


def _group_mistakes(section: SearchSection, depth: int) -> Iterator[Mistake]:
    if section.layers == "each":
        return
    seen: set[int | str] = set()
    for number, group in enumerate(section.layers):
        if not group:
            yield Mistake(f"layers[{number}]", None, "a group needs a layer")
        for layer in group:
            if isinstance(layer, int) and not 0 <= layer < depth:
                message = f"hidden layers are 0 to {depth - 1}"
                yield Mistake(f"layers[{number}]", layer, message)
            if layer in seen:
                yield Mistake(f"layers[{number}]", layer, "this layer is in two groups")
            seen.add(layer)
    if not section.layers:
        yield Mistake("layers", None, "at least one group belongs here, or `each`")


def search_settings(section: SearchSection, depth: int) -> SearchSettings:
    """A search section without mistakes, as settings."""
    if section.layers == "each":
        names = [f"trunk.{i}" for i in range(depth)] + ["feature", "view"]
        groups: tuple[tuple[str, ...], ...] = tuple((name,) for name in names)
    else:
        groups = tuple(
            tuple(f"trunk.{layer}" if isinstance(layer, int) else layer for layer in group)
            for group in section.layers
        )
    calibration, start = section.calibration, section.start
    return SearchSettings(
        trials=section.trials,
        seconds=section.seconds,
        sampler=section.sampler,
        seed=section.seed,
        batch=section.batch,
        objectives=tuple(section.objectives),
        constraints=tuple(parse_constraint(text) for text in section.constraints),
        networks=section.networks,
        groups=groups,
        low=section.ratios.low,
        high=section.ratios.high,
        step=section.ratios.step or None,
        criteria=tuple(dict.fromkeys(section.criteria)),
        compensations=tuple(dict.fromkeys(section.compensation)),
        bits=tuple(dict.fromkeys(section.bits)),
        errors=section.errors,
        calibration=CalibrationAxes(
            views=tuple(dict.fromkeys(calibration.views)),
            rays=tuple(dict.fromkeys(calibration.rays)),
            seeds=tuple(dict.fromkeys(calibration.seeds)),
            weightings=tuple(dict.fromkeys(calibration.weighting)),
        ),
        start_uniform=tuple(start.uniform),
        start_schedules=tuple(s for s in start.schedules if not isinstance(s, str)),
        start_allocations=tuple(dict.fromkeys(start.allocations)),
        start_sizes=tuple(start.sizes),
        coarse_weight=start.coarse_weight,
        start_store=start.store,
        first_rays=section.fidelity.rays,
        margin=section.fidelity.margin,
        audit=section.fidelity.audit,
        final=section.final,
        storage=section.storage,
    )


def search_identity(section: SearchSection) -> dict[str, Any]:
    """What decides the results of a search; how far it goes and where it is kept do not."""
    return section.model_dump(
        exclude={"trials": True, "seconds": True, "storage": True, "final": True}
        | {"fidelity": {"audit"}}
    )
