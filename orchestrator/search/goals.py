"""What a search compares: objectives, constraints, and when a trial is clearly dominated.

A trial's **costs** are its objectives, each turned so that less is better. Quality is that on the
validation rays: all of them, or those of the first look. Letters: c a trial's costs, b those of an
earlier trial, δ the margin in dB.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from orchestrator.plan import Look
from orchestrator.spec.sweep import Constraint, Objective

Costs = tuple[float, ...]

UP = frozenset({"psnr", "ssim"})
"""Objectives to be large; all others are to be small."""

MEASURED: Mapping[Objective, str] = {
    "size_bytes": "size_bytes",
    "flops": "flops_per_ray",
    "psnr": "validation_psnr",
    "mse": "validation_mse",
    "ssim": "validation_ssim",
    "render_seconds": "render_seconds",
}
"""Where a record keeps each objective."""

FIRST: Mapping[Objective, str] = {**MEASURED, "psnr": "first_psnr", "mse": "first_mse"}
"""Where it keeps what the first look saw."""

# Render times of one model on one machine differ by less.
TIMING_NOISE = 0.1


def values(
    metrics: Mapping[str, float], objectives: Iterable[Objective], first: bool = False
) -> tuple[float, ...]:
    """The objectives as a record has them; NaN for one that it has not.

    Args:
        metrics: of the record.
        objectives: which.
        first: as the first look saw them.
    """
    names = FIRST if first else MEASURED
    return tuple(float(metrics.get(names[objective], math.nan)) for objective in objectives)


def costs(found: Sequence[float], objectives: Sequence[Objective]) -> Costs:
    """Values turned so that less is better."""
    return tuple(-v if o in UP else v for v, o in zip(found, objectives, strict=True))


def dominates(b: Costs, c: Costs) -> bool:
    """Whether b is no worse than c in anything and better in something."""
    return b != c and all(x <= y for x, y in zip(b, c, strict=True))


def clearly_dominates(b: Costs, c: Costs, objectives: Sequence[Objective], margin: float) -> bool:
    """Whether b beats c by so much that more rays would hardly change it.

    In what is known exactly (size, FLOPs) b is no worse; in PSNR it is better by δ, in MSE by the
    factor 10^(δ/10), in render time by a tenth. Both must have been measured on the same rays.

    Args:
        b: the earlier trial.
        c: the one in question.
        objectives: what the costs are.
        margin: δ.
    """

    def beats(objective: Objective, ours: float, theirs: float) -> bool:
        if objective == "psnr":
            return theirs <= ours - margin
        if objective == "mse":
            return theirs * 10 ** (margin / 10) <= ours
        if objective == "render_seconds":
            return theirs * (1 + TIMING_NOISE) <= ours
        return theirs <= ours

    return all(beats(o, y, x) for o, x, y in zip(objectives, b, c, strict=True)) and b != c


def hopeless(metrics: Mapping[str, float], look: Look) -> str | None:
    """Why the first look stops a trial, in a few words; None if it goes on.

    A trial goes on unless it is clearly dominated or clearly breaks a constraint.
    """
    for metric, sense, bound in look.bounds:
        seen = values(metrics, [metric], first=True)[0]
        over = seen - bound if sense == "<=" else bound - seen
        slack = 0.0
        if metric == "psnr":
            slack = look.margin
        elif metric == "mse":
            slack = abs(bound) * (10 ** (look.margin / 10) - 1)
        elif metric == "render_seconds":
            slack = abs(bound) * TIMING_NOISE
        if over > slack:
            return "infeasible"
    own = costs(values(metrics, look.objectives, first=True), look.objectives)
    beaten = any(clearly_dominates(b, own, look.objectives, look.margin) for b in look.bar)
    return "dominated" if beaten else None


def violations(
    metrics: Mapping[str, float], bounds: Iterable[tuple[Objective, str, float]], first: bool
) -> tuple[float, ...]:
    """By how much each constraint is broken; zero or less where it is kept."""
    found = []
    for metric, sense, bound in bounds:
        value = values(metrics, [metric], first)[0]
        found.append(value - bound if sense == "<=" else bound - value)
    return tuple(found)


def corrected(
    first: Sequence[float],
    looked: Sequence[tuple[Sequence[float], Sequence[float]]],
    objectives: Sequence[Objective],
) -> tuple[float, ...]:
    """What a first look says about all rays: few rays are easier or harder than all of them.

    PSNR is moved by the mean difference between full measurement and first look of other trials,
    MSE by the same number of dB.

    Args:
        first: objectives at the first look.
        looked: first look and full measurement of other trials.
        objectives: what they are.
    """

    def of(place: int, objective: Objective, value: float) -> float:
        pairs = [(seen[place], full[place]) for seen, full in looked]
        if objective == "psnr" and pairs:
            return value + sum(full - seen for seen, full in pairs) / len(pairs)
        if objective == "mse" and pairs and all(min(pair) > 0 for pair in pairs):
            return value * math.exp(sum(math.log(full / seen) for seen, full in pairs) / len(pairs))
        return value

    return tuple(
        of(i, objective, value)
        for i, (objective, value) in enumerate(zip(objectives, first, strict=True))
    )


def bounds_of(
    constraints: Iterable[Constraint], dense: Mapping[str, float]
) -> tuple[tuple[Objective, str, float], ...]:
    """Constraints as plain bounds, once the dense model is known.

    Args:
        constraints: of the sweep file.
        dense: metrics of the dense model.
    """
    return tuple(
        (
            c.metric,
            c.sense,
            c.offset + (c.dense * values(dense, [c.metric])[0] if c.dense else 0.0),
        )
        for c in constraints
    )


def front(found: Mapping[str, Costs]) -> list[str]:
    """Keys of what nothing dominates, in the order given; of equals the first one."""
    kept: dict[str, Costs] = {}
    for key, c in found.items():
        if not any(b == c or dominates(b, c) for b in kept.values()):
            kept = {k: b for k, b in kept.items() if not dominates(c, b)}
            kept[key] = c
    return list(kept)


def spread(keys: Sequence[str], found: Mapping[str, Costs], most: int) -> list[str]:
    """At most so many of some trials, evenly spread over the first objective, its ends included."""
    ordered = sorted(keys, key=lambda key: found[key])
    if len(ordered) <= most:
        return ordered
    if most == 1:
        return [ordered[len(ordered) // 2]]
    picks = {round(i * (len(ordered) - 1) / (most - 1)) for i in range(most)}
    return [ordered[i] for i in sorted(picks)]


def nearest(found: Mapping[str, Costs], best: Iterable[Costs]) -> list[str]:
    """Keys of dominated trials, those nearest to a front first.

    How deep c lies behind the front: max over its b of min over the objectives of
    (c − b)/range, where the range is that of all these costs.

    Args:
        found: costs of the trials.
        best: those of the front.
    """
    front = list(best)
    columns = list(zip(*found.values(), *front, strict=True))
    ranges = [max(column) - min(column) or 1.0 for column in columns]

    def depth(c: Costs) -> float:
        return max(
            (min((x - y) / r for x, y, r in zip(c, b, ranges, strict=True)) for b in front),
            default=0.0,
        )

    return sorted(found, key=lambda key: (depth(found[key]), key))


def saved(trials: Iterable[tuple[Mapping[str, float], bool]]) -> dict[str, float]:
    """What the first look saved of the workers' time.

    Args:
        trials: seconds by stage of each, and whether the first look stopped it.

    Returns:
        The seconds that all trials ``spent``, those of their ``looks`` among them, and those
        ``saved``: for each that was stopped the mean rest of the others.
    """
    rests, spent, looks, stopped = [], 0.0, 0.0, 0
    for seconds, was_stopped in trials:
        spent += sum(seconds.values())
        looks += seconds.get("first look", 0.0)
        stopped += was_stopped
        if not was_stopped:
            rests.append(seconds.get("validate", 0.0))
    mean = sum(rests) / len(rests) if rests else 0.0
    return {"spent": spent, "looks": looks, "saved": mean * stopped}
