"""Settings of one grid of prunings that make no sense together, each with the reason."""

from collections.abc import Iterator
from typing import Any

from pruning import BUDGETED, CRITERIA, SCHEMES, SPARSE

"""Bits that a size is turned into, and what the file stores then."""

TARGETS = ("ratios", "sizes", "masks")


def combinations(grid: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The mistakes of a grid as it stands in the file: the key that is wrong, and why.

    Names that do not exist are left to the schema.
    """
    targets = [key for key in TARGETS if key in grid]
    if not targets:
        yield (
            "ratios",
            "this key is required (or `sizes`, in bytes of the model file, or `masks`)",
        )
    for extra in targets[1:]:
        yield extra, f"a grid has {' or '.join(TARGETS)}; put them into grids of their own"
    if len(targets) != 1:
        return
    found = {
        "ratios": _with_ratios,
        "sizes": _with_sizes,
        "masks": _with_masks,
    }[targets[0]](grid)
    yield from dict(found).items()
    yield from dict(_with_recovery(grid)).items()


def _names(grid: dict[str, Any], key: str, default: str) -> list[str]:
    """The names that a key lists, given or by default."""
    given = grid.get(key, default)
    return [name for name in (given if isinstance(given, list) else [given]) if type(name) is str]


def _with_ratios(grid: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("allocations", "coarse_weight"):
        if key in grid:
            yield key, "only a grid with `sizes` has this; ratios are spread by `schedules`"
    if "auto" in _names(grid, "bits", "fp32"):
        yield (
            "bits",
            "`auto` shares a size out among widths and bits; it goes with `sizes`",
        )
    if "rate" in _names(grid, "bits", "fp32"):
        yield "bits", "`rate` makes steps so fine that a file has its size; it goes with `sizes`"
    if "auto" in _names(grid, "networks", "both"):
        yield "networks", "`auto` goes by the size of the file: it is for a grid with `sizes`"
    yield from _of_channels(grid, "activation")
    if "pixel" in _names(grid, "errors", "layer") and "obs" not in _names(
        grid, "criteria", "activation"
    ):
        yield "errors", "nothing weighs errors here: that is for criterion `obs` and for `sizes`"


def _with_sizes(grid: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "schedules" in grid:
        yield (
            "schedules",
            "schedules spread a ratio and sizes have none; `allocations` share out a size",
        )
    if "coarse_weight" in grid and not {"both", "auto"} & {*_names(grid, "networks", "both")}:
        yield (
            "coarse_weight",
            "only `networks: both` (or `auto`) shares a size out between two networks",
        )
    if "auto" in _names(grid, "bits", "fp32") and {*_names(grid, "allocations", "chain")} != {
        "chain"
    }:
        yield "bits", "`auto` chooses widths and bits together along the chain: allocation `chain`"
    if "rate" in _names(grid, "bits", "fp32") and {"coarse", "fine"} & {
        *_names(grid, "networks", "both")
    }:
        yield "bits", "`rate` rounds all networks of a file: networks `both` or `shared`"
    yield from _of_channels(grid, "obs")
    criteria = _names(grid, "criteria", "obs")
    for name in _names(grid, "allocations", "chain"):
        only = BUDGETED[name].only_with if name in BUDGETED else None
        if only is not None and not {*criteria} <= {*only}:
            yield (
                "allocations",
                f"{name!r} is defined on the scores of criterion {' or '.join(only)} alone, "
                f"and the grid has {', '.join(criteria)}",
            )


def _with_masks(grid: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "auto" in _names(grid, "networks", "both"):
        yield "networks", "`auto` goes by the size of the file: it is for a grid with `sizes`"
    for key in ("schedules", "allocations", "coarse_weight", "compensation", "errors"):
        if key in grid:
            yield (
                key,
                "a mask sets the same fraction of single weights to 0 in each layer, so there are "
                "no channels to spread, weigh or make up for",
            )
    for name in _names(grid, "criteria", "sparsegpt"):
        if name in CRITERIA and name not in SPARSE:
            yield (
                "criteria",
                f"{name!r} scores channels; single weights are scored by {', '.join(SPARSE)}",
            )
    for name in _names(grid, "bits", "fp32"):
        if name in ("auto", "rate") or (name in SCHEMES and not SCHEMES[name].keeps_zeros):
            yield (
                "bits",
                f"{name!r} would move the zeros of a mask; fp32, fp16, bf16 and int2 to int8 keep "
                "them",
            )


def _of_channels(grid: dict[str, Any], criterion: str) -> Iterator[tuple[str, str]]:
    for name in _names(grid, "criteria", criterion):
        if name in SPARSE and name not in CRITERIA:
            yield "criteria", f"{name!r} scores single weights; it is for a grid with `masks`"


def _with_recovery(grid: dict[str, Any]) -> Iterator[tuple[str, str]]:
    recover = grid.get("recover")
    if not isinstance(recover, dict):
        return
    given = recover.get("iterations", 0)
    counts = given if isinstance(given, list) else [given]
    if all(type(count) is int and count == 0 for count in counts):
        if set(recover) - {"iterations"}:
            yield (
                "recover.iterations",
                "this key is required beside other settings of a recovery, above 0",
            )
        return
    if "masks" in grid:
        yield "recover", "weights that a mask set to 0 would grow back: only channels stay away"
    if "sizes" not in grid:
        if recover.get("steps", 1) not in (1, [1]):
            yield "recover.steps", "only a grid with `sizes` is pruned in several rounds"
        if "narrow" in _names(recover, "controls", ""):
            yield (
                "recover.controls",
                "a narrow NeRF of the same file size needs `sizes`; with ratios only "
                "'dense_longer' can be trained beside",
            )
    if recover.get("controls") == []:
        for key in ("control_iterations", "control_learning_rate"):
            if key in recover:
                yield f"recover.{key}", "`controls` is empty: nothing is trained beside"
    given = recover.get("squeeze", 1)
    squeezed = any(factor != 1 for factor in (given if isinstance(given, list) else [given]))
    if squeezed and "sizes" not in grid:
        yield "recover.squeeze", "only a grid with `sizes` has a size to squeeze to"
        squeezed = False
    yield from _recovered_bits(grid, recover, squeezed)


def _recovered_bits(
    grid: dict[str, Any], recover: dict[str, Any], squeezed: bool
) -> Iterator[tuple[str, str]]:
    for name in _names(grid, "bits", "fp32"):
        if squeezed and name in SCHEMES and not name.startswith("int"):
            yield "recover.squeeze", f"only int2 to int8 can be squeezed, not {name!r}"
        if name == "rate" and squeezed:
            yield (
                "recover.squeeze",
                "`rate` is fitted to the size, and trained to keep to it",
            )
        if name == "rate" and recover.get("steps", 1) not in (1, [1]):
            yield "recover.steps", "`rate` fits one file; it is recovered in one round"
        if name in SCHEMES and SCHEMES[name].needs_statistics:
            yield (
                "bits",
                f"{name!r} looks at data to round well, and a recovery trains the rounded weights "
                f"themselves; {SCHEMES[name].stored_as!r} is stored alike",
            )
