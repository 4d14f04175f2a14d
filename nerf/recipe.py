"""How a NeRF is trained, and trained again once it was pruned, as plain data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from nerf.devices import PRECISIONS, Precision

Optimizer = Literal["adam", "muon"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
Anneal = Literal["exponential", "cosine"]
ANNEALS: tuple[Anneal, ...] = get_args(Anneal)
WARMUP = 0.02
"""Share of the iterations in which a learning rate that falls along a cosine rises first."""

# Named recipes, as what they change of the defaults below. `large-batch` sees as many rays in a
# quarter of the steps: the learning rate grows with the root of the batch (Adam), its decay keeps
# to the rays seen, and four times the rays take less than four times as long on a GPU. `fast` is
# what reached the report recipe's PSNR in the least time (docs/results/speed.md).
PRESETS: Mapping[str, Mapping[str, float | str]] = MappingProxyType(
    {
        "report": {},
        "large-batch": {
            "iterations": 50_000,
            "rays": 4096,
            "learning_rate": 1e-3,
            "decay_iterations": 62_500,
        },
        "fast": {
            "iterations": 20_000,
            "rays": 2048,
            "learning_rate": 2e-3,
            "optimizer": "muon",
            "anneal": "cosine",
        },
    }
)


@dataclass(frozen=True)
class Recipe:
    """How a NeRF is trained.

    Attributes:
        iterations: optimiser steps.
        rays: rays an iteration, drawn from all training views, each at most once an epoch.
        learning_rate: at the start, or for a cosine at its highest.
        decay: factor by which the learning rate falls every `decay_iterations`, exponentially.
        decay_iterations: see `decay`.
        density_noise: standard deviation of the noise added to the raw density.
        precision: arithmetic of the linear layers.
        validation: fraction of the pixels of each training view that is never drawn, see
            `nerf.validation`.
        optimizer: ``adam``, or ``muon`` for the matrices (see `nerf.muon`) and Adam for the rest.
        anneal: how the learning rate falls: ``exponential`` (by `decay`), or ``cosine``: linearly
            up over the first `WARMUP` of all iterations, then to 0 along a half cosine.

    Source: Mildenhall et al. 2020, section 5.3, with the numbers of its fern configuration.
    Loshchilov & Hutter 2017 (SGDR), eq. 5, for the cosine.
    """

    iterations: int = 200_000
    rays: int = 1024
    learning_rate: float = 5e-4
    decay: float = 0.1
    decay_iterations: int = 250_000
    density_noise: float = 1.0
    precision: Precision = "float32"
    validation: float = 0.0
    optimizer: Optimizer = "adam"
    anneal: Anneal = "exponential"

    def __post_init__(self) -> None:
        for name in ("iterations", "rays", "learning_rate", "decay", "decay_iterations"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if not self.density_noise >= 0:
            raise ValueError(f"density_noise must not be negative, got {self.density_noise!r}")
        if not 0.0 <= self.validation < 1.0:
            raise ValueError(f"validation must be a fraction in [0, 1), got {self.validation!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}")
        if self.anneal not in ANNEALS:
            raise ValueError(f"anneal must be one of {ANNEALS}, got {self.anneal!r}")

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0."""
        if self.anneal == "cosine":
            return cosine_rate(self.learning_rate, iteration, self.iterations, WARMUP)
        return self.learning_rate * self.decay ** (iteration / self.decay_iterations)


def cosine_rate(highest: float, iteration: int, iterations: int, warmup: float) -> float:
    """A learning rate that rises linearly, then falls to 0 along a half cosine.

    Args:
        highest: what it would be without the rise and the fall.
        iteration: counted from 0.
        iterations: in all.
        warmup: share of them in which it rises.

    Source: Loshchilov & Hutter 2017 (SGDR), eq. 5, for the cosine.
    """
    rising = max(1.0, warmup * iterations)
    cosine = 0.5 * (1.0 + math.cos(math.pi * iteration / iterations))
    return highest * min(1.0, (iteration + 1) / rising) * cosine


# --- recovery -----------------------------------------------------------------------------------

Source = Literal["photos", "distill", "both"]

SHARED_COARSE = 0.1
"""How much the coarse picture of a shared network counts: it only has to place samples."""
INVENTED_SHARE = 0.5
"""Share of an iteration's rays that are invented, where a teacher says what they look like."""
SQUEEZED_BY = 0.6
"""The part of the rounded iterations after which codes are to take no more bits than allowed."""
PRICE_RATE = 300.0
"""How fast the price follows the excess: by so much over all rounded iterations together."""
PRICE_GAIN = 50.0
"""How much of the excess the price answers at once."""
MOST_EXCESS = 0.1
"""No more than this is answered, up or down."""


@dataclass(frozen=True)
class RecoveryRecipe:
    """How a pruned model is trained again.

    The learning rate rises linearly over the first `warmup` of all iterations and falls to 0 along
    a half cosine, see `cosine_rate`.

    Attributes:
        iterations: optimiser steps.
        source: what is learnt from: ``photos``, ``distill`` (the dense model) or ``both``.
        learning_rate: of Adam, at its highest.
        rays: rays an iteration.
        warmup: share of the iterations in which the learning rate rises.
        rounding_from: share of the iterations after which weights that the file stores in few
            bits are rounded while they are trained.
        density_noise: standard deviation of the noise added to raw densities, where photos are
            rendered.
        precision: arithmetic of the linear layers.
        optimizer: ``adam``, or ``muon`` for the matrices (see `nerf.muon`) and Adam for the rest.
    """

    iterations: int
    source: Source = "photos"
    learning_rate: float = 5e-4
    rays: int = 1024
    warmup: float = 0.02
    rounding_from: float = 0.3
    density_noise: float = 0.0
    precision: Precision = "float32"
    optimizer: Optimizer = "adam"

    def __post_init__(self) -> None:
        for name in ("iterations", "learning_rate", "rays"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        for name in ("warmup", "rounding_from"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)!r}")
        if not self.density_noise >= 0:
            raise ValueError(f"density_noise must not be negative, got {self.density_noise!r}")
        if self.source not in ("photos", "distill", "both"):
            raise ValueError(f"source must be photos, distill or both, got {self.source!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}")

    @property
    def rounding_at(self) -> int:
        """The iteration at which rounding begins."""
        return round(self.rounding_from * self.iterations)

    def rate_at(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        return cosine_rate(self.learning_rate, iteration, self.iterations, self.warmup)

    @property
    def photo_rays(self) -> int:
        """Rays of an iteration that were photographed."""
        return self.rays - self.invented_rays

    @property
    def invented_rays(self) -> int:
        """Rays of an iteration that nobody photographed."""
        return 0 if self.source == "photos" else round(INVENTED_SHARE * self.rays)


@dataclass(frozen=True)
class Squeeze:
    """When the codes of rounded weights are to take no more bits than allowed.

    Attributes:
        first_iteration: at which the bits allowed begin to fall.
        falling: in how many iterations they do.
        rate: how fast the price follows the excess, an iteration.
    """

    first_iteration: int
    falling: float
    rate: float

    @classmethod
    def of(cls, recipe: RecoveryRecipe) -> "Squeeze":
        """That of a recipe."""
        rounded = max(1, recipe.iterations - recipe.rounding_at)
        return cls(recipe.rounding_at, max(1.0, SQUEEZED_BY * rounded), PRICE_RATE / rounded)

    def share(self, iteration: int) -> float:
        """How much of the way has been gone, from 0 to 1."""
        return min(1.0, (iteration - self.first_iteration) / self.falling)
