"""What a search tries first: uniform ratios, hand-written ones, allocations, other sweeps' trials.

An allocation shares a size out among the layers; here its solution is turned into ratios, without
pruning anything. The errors of each layer at every width, which the chain and greedy allocations
weigh, are worked out once for all sizes.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from nerf.field import NerfModel
from orchestrator.compress import Material, ratios_for_size
from orchestrator.log import logger
from orchestrator.plan import TrialConfig
from orchestrator.results import Record
from orchestrator.search.space import Parameters, Space, by_hand, uniform
from orchestrator.units import show_bytes
from pruning import BUDGETED, PruningError, Ranking, Statistics

Start = tuple[str, Parameters]
"""Where a start comes from, and what it is."""

# Of another sweep's trials, so many of the best are tried: the rest is behind them anyway.
FROM_STORE = 32


def plain_starts(space: Space) -> Iterator[Start]:
    """Uniform ratios and hand-written schedules."""
    for ratio in space.settings.start_uniform:
        yield f"uniform {ratio:g}", uniform(space, ratio)
    for number, ratios in enumerate(space.settings.start_schedules):
        yield f"schedule {number}", by_hand(space, ratios)


def allocated_starts(
    space: Space,
    dense: NerfModel,
    statistics: Callable[[TrialConfig], Mapping[str, Statistics] | None],
    info: Mapping[str, Any],
) -> Iterator[Start]:
    """The ratios of allocations, for each size, criterion and way to store weights.

    A size that cannot be kept is passed over.

    Args:
        space: of the search.
        dense: the model.
        statistics: gives the calibration statistics that a pruning reads.
        info: what its file will say of itself, which takes some of the bytes.
    """
    settings = space.settings
    rankings: dict[Any, Ranking] = {}
    read: dict[Any, Mapping[str, Statistics] | None] = {}
    for criterion, bits, allocation, size in itertools.product(
        settings.criteria, settings.bits, settings.start_allocations, settings.start_sizes
    ):
        weighs = BUDGETED[allocation].needs_paths and settings.networks == "both"
        config = TrialConfig(
            networks=settings.networks,
            criterion=criterion,
            ratio=None,
            schedule=allocation,
            layer_ratios=(),
            calibration=space.sets[0],
            seed=space.sets[0].seed,
            compensation=settings.compensations[0],
            size=size,
            coarse_weight=settings.coarse_weight if weighs else None,
            bits=bits,
            errors=settings.errors,
        )
        try:
            which = config.needs.group
            if which not in read:
                read[which] = statistics(config)
            material = Material(read[which], None, rankings)
            ratios = ratios_for_size(dense, config, material, info)
        except PruningError as error:
            logger.info("no start from %s at %d bytes: %s", allocation, size, error)
            continue
        origin = f"{allocation} {show_bytes(size)}"
        yield origin, space.from_ratios(ratios, {"criterion": criterion, "bits": bits})


def starts_of_others(space: Space, records: Iterable[Record]) -> Iterator[Start]:
    """The best trials of other sweeps on the same model, as far as this space holds them.

    Best on the validation rays: what was learnt on held-out views must not find its way into a
    search. Of a long front, trials evenly spread over it.
    """
    found: list[tuple[float, float, str, Parameters]] = []
    for record in records:
        parameters = None if record.failure else space.from_record(record.config)
        if parameters is not None and "validation_psnr" in record.metrics:
            size, psnr = record.metrics["size_bytes"], record.metrics["validation_psnr"]
            found.append((size, -psnr, record.key, parameters))
    best = float("inf")
    kept = []
    for _, cost, key, parameters in sorted(found, key=lambda f: f[:3]):
        if cost < best:
            best = cost
            kept.append((f"trial {key}", parameters))
    step = max(1, -(-len(kept) // FROM_STORE))
    yield from kept[::step]
