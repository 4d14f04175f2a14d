"""How a NeRF is trained, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nerf.devices import PRECISIONS, Precision

# Named recipes, as what they change of the defaults below. `large-batch` sees as many rays in a
# quarter of the steps: the learning rate grows with the root of the batch (Adam), its decay keeps
# to the rays seen, and four times the rays take less than four times as long on a GPU.
PRESETS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "report": {},
        "large-batch": {
            "iterations": 50_000,
            "rays": 4096,
            "learning_rate": 1e-3,
            "decay_iterations": 62_500,
        },
    }
)


@dataclass(frozen=True)
class Recipe:
    """How a NeRF is trained.

    Attributes:
        iterations: optimiser steps.
        rays: rays an iteration, drawn from all training views, each at most once an epoch.
        learning_rate: of Adam, at the start.
        decay: factor by which the learning rate falls every `decay_iterations`, exponentially.
        decay_iterations: see `decay`.
        density_noise: standard deviation of the noise added to the raw density.
        precision: arithmetic of the linear layers.
        validation: fraction of the pixels of each training view that is never drawn, see
            `nerf.validation`.

    Source: Mildenhall et al. 2020, section 5.3, with the numbers of its fern configuration.
    """

    iterations: int = 200_000
    rays: int = 1024
    learning_rate: float = 5e-4
    decay: float = 0.1
    decay_iterations: int = 250_000
    density_noise: float = 1.0
    precision: Precision = "float32"
    validation: float = 0.0

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

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0."""
        return self.learning_rate * self.decay ** (iteration / self.decay_iterations)
