"""Recovery in a sweep: a short training after pruning, and the controls beside it."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from nerf.devices import Precision
from nerf.recipe import Optimizer, RecoveryRecipe, Source

ControlName = Literal["dense_longer", "narrow"]
"""``dense_longer``: the dense model trained for so many extra iterations. ``narrow``: a NeRF of the
same file size, trained from scratch. Both for as long as the recovery, or as a grid says."""

CONTROLS: tuple[ControlName, ...] = ("dense_longer", "narrow")


@dataclass(frozen=True)
class Recover:
    """How one trial is trained after it was pruned.

    Attributes:
        iterations: optimiser steps, over all rounds.
        source: learn from photos, from the dense model (``distill``), or from both.
        learning_rate: at its highest.
        rays: rays an iteration.
        rounding_from: share of the iterations after which few-bit weights are rounded in training.
        steps: rounds of pruning a part of the way and recovering from it.
        squeeze: pruned to a file so many times as large, whose codes are then trained to take no
            more bytes than the file may have.
        density_noise: standard deviation of the noise added to raw densities; None for that of
            the training that made the dense model.
        optimizer: ``adam``, or ``muon`` for the matrices.
    """

    iterations: int
    source: Source = "photos"
    learning_rate: float = 5e-4
    rays: int = 1024
    rounding_from: float = 0.3
    steps: int = 1
    squeeze: float = 1.0
    density_noise: float | None = None
    optimizer: Optimizer = "adam"

    def at(self, bits: str) -> "Recover":
        """The same, for weights stored so: where nothing is rounded, it never begins."""
        return replace(self, rounding_from=0.0, squeeze=1.0) if bits == "fp32" else self

    def identity(self) -> dict[str, Any]:
        """What goes into keys."""
        identity = asdict(self)
        if self.squeeze == 1.0:
            del identity["squeeze"]
        if self.density_noise is None:
            del identity["density_noise"]
        if self.optimizer == "adam":
            del identity["optimizer"]
        return identity

    def flat(self) -> dict[str, Any]:
        """As records and MLflow name it."""
        flat: dict[str, Any] = {
            "recover_iterations": self.iterations,
            "recover_from": self.source,
            "recover_learning_rate": self.learning_rate,
            "recover_rays": self.rays,
            "recover_rounding_from": self.rounding_from,
            "recover_steps": self.steps,
            "recover_squeeze": self.squeeze,
        }
        if self.density_noise is not None:
            flat["recover_density_noise"] = self.density_noise
        if self.optimizer != "adam":
            flat["recover_optimizer"] = self.optimizer
        return flat

    def recipe(self, density_noise: float, precision: Precision, last: bool) -> RecoveryRecipe:
        """The recipe of one round; only the last one rounds weights.

        Args:
            density_noise: of the training that made the dense model, where this says nothing.
            precision: of that training.
            last: whether it is the last round, which takes the iterations that do not divide.
        """
        count = self.iterations // self.steps
        if last:
            count = self.iterations - (self.steps - 1) * count
        return RecoveryRecipe(
            iterations=count,
            source=self.source,
            learning_rate=self.learning_rate,
            rays=self.rays,
            rounding_from=self.rounding_from,
            density_noise=density_noise if self.density_noise is None else self.density_noise,
            precision=precision,
            optimizer=self.optimizer,
        )


@dataclass(frozen=True)
class RecoverAxes:
    """Recoveries to compare; every combination is tried on every pruning of a grid.

    Attributes:
        iterations: numbers of optimiser steps; 0 for none.
        sources: what is learnt from.
        learning_rates: at their highest.
        rays: rays an iteration.
        rounding_from: when few-bit weights begin to be rounded.
        steps: numbers of rounds.
        squeezes: how much larger files are pruned to, before their codes are trained smaller.
        density_noises: added to raw densities; None for that of the dense model's training.
        optimizers: of the matrices.
        controls: what is trained beside, for comparison; a narrow NeRF only with sizes.
        control_iterations: optimiser steps of the controls; None for those of the recovery.
        control_learning_rates: of the controls; None for that of the recovery.
    """

    iterations: tuple[int, ...] = (0,)
    sources: tuple[Source, ...] = ("photos",)
    learning_rates: tuple[float, ...] = (5e-4,)
    rays: tuple[int, ...] = (1024,)
    rounding_from: tuple[float, ...] = (0.3,)
    steps: tuple[int, ...] = (1,)
    squeezes: tuple[float, ...] = (1.0,)
    density_noises: tuple[float | None, ...] = (None,)
    optimizers: tuple[Optimizer, ...] = ("adam",)
    controls: tuple[ControlName, ...] = CONTROLS
    control_iterations: tuple[int | None, ...] = (None,)
    control_learning_rates: tuple[float | None, ...] = (None,)

    def recoveries(self) -> Iterator[Recover | None]:
        """Every combination; None where there are no iterations."""
        for iterations in self.iterations:
            if iterations == 0:
                yield None
                continue
            for values in itertools.product(
                self.sources,
                self.learning_rates,
                self.rays,
                self.rounding_from,
                self.steps,
                self.squeezes,
                self.density_noises,
                self.optimizers,
            ):
                yield Recover(iterations, *values)

    def beside(self) -> Iterator[Recover]:
        """How controls are trained: always from photos, in one round, to the size itself.

        Recoveries that differ in other ways share their controls, so some come more than once.
        """
        for recover in self.recoveries():
            if recover is None:
                continue
            for iterations, rate in itertools.product(
                self.control_iterations, self.control_learning_rates
            ):
                yield replace(
                    recover,
                    iterations=recover.iterations if iterations is None else iterations,
                    source="photos",
                    learning_rate=recover.learning_rate if rate is None else rate,
                    steps=1,
                    squeeze=1.0,
                )
