"""The weights of a model as its file stores them: floats, few bits, or sparse."""

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from operator import add
from typing import Literal

from nerf.field import NerfModel
from nerf.packing import Packed
from orchestrator.bridge import network_of
from pruning import (
    SCHEMES,
    CalibrationBatch,
    Network,
    Statistics,
    StatisticsError,
    collect,
    quantize,
)

AUTO = "auto"
"""Bits a layer, chosen together with the widths."""

RATE = "rate"
"""One step for all weights, sought until the file has its size."""

AUTO_SCHEMES = tuple(f"gptq{bits}" for bits in range(2, 9))
"""What `auto` chooses from."""

TRAINED_SCHEMES = tuple(f"int{bits}" for bits in range(3, 9))
"""What it chooses from where the rounded weights are trained."""

GOOD_BITS = 5.0
"""Bits a weight at which `auto` and `rate` lose little."""

SPARSE_FLOATS = {"fp32": "sparse32", "fp16": "sparse16"}

Samples = Callable[[str], Iterable[CalibrationBatch]]
"""The calibration samples of a network by its name; they can be gone through again and again."""

Bits = str | Mapping[str, Mapping[str, str]]
"""A name in `pruning.SCHEMES`, or by network one for each layer."""


def looks_at_samples(bits: str) -> bool:
    """Whether rounding looks at what the pruned network computes on calibration samples."""
    return bits in (AUTO, RATE) or SCHEMES[bits].needs_statistics


def networks_for(size: int, bits: str, parameters: int) -> Literal["both", "shared"]:
    """Both networks where a file holds both whole, else the fine one for both passes.

    Sharing costs less than taking much away from two networks.

    Args:
        size: of the file, in bytes.
        bits: how it stores weights.
        parameters: of one dense network.
    """
    each = GOOD_BITS if bits in (AUTO, RATE) else SCHEMES[bits].bits
    return "both" if 2 * parameters * each / 8 <= size else "shared"


def packed(
    model: NerfModel, bits: Bits, samples: Samples | None = None, sparse: bool = False
) -> dict[str, Packed] | None:
    """The stored networks in few bits; None for plain float32.

    Args:
        model: the networks.
        bits: how they are stored; a network that is not named keeps the most bits of `auto`.
        samples: calibration samples by network, for schemes that look at them.
        sparse: whether weights of 0 are left out where the scheme is a float.

    Raises:
        StatisticsError: a scheme needs samples and there are none.
    """
    if bits == "fp32" and not sparse:
        return None
    few = {}
    for name, field in model.stored().items():
        network = network_of(field)
        schemes = schemes_of(bits, name, network, AUTO_SCHEMES[-1])
        statistics = None
        if any(SCHEMES[scheme].needs_statistics for scheme in schemes.values()):
            named = ", ".join(dict.fromkeys(schemes.values()))
            statistics = seen(network, name, named, samples)
        arrays = quantize(network, schemes, statistics).tensors()
        stored = {layer: SCHEMES[scheme].stored_as for layer, scheme in schemes.items()}
        if sparse:
            stored = {layer: SPARSE_FLOATS.get(of, of) for layer, of in stored.items()}
        few[name] = Packed.by_layer(field.shape, stored, arrays)
    return few


def schemes_of(bits: Bits, name: str, network: Network, unnamed: str) -> Mapping[str, str]:
    """How each layer of a network is stored.

    Args:
        bits: how networks are.
        name: of the network.
        network: its layers.
        unnamed: the scheme where `bits` does not name the network: it was not pruned.
    """
    found = bits if isinstance(bits, str) else bits.get(name, unnamed)
    return dict.fromkeys(network.weights, found) if isinstance(found, str) else found


def seen(network: Network, name: str, wanted: str, samples: Samples | None) -> Statistics:
    """What the layers of a pruned network read."""
    if samples is None:
        raise StatisticsError(
            f"bits {wanted!r} look at what the pruned network computes; give calibration samples"
        )
    return reduce(add, collect(network, samples(name), ("gram",)).cells.values())
