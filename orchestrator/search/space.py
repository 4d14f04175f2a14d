"""The space of a search: numbers and names that stand for a pruning, and back.

Every group of layers (of each network) has a ratio between `low` and `high`; criterion,
compensation, bits and what makes a calibration set are choices where the sweep names several. The
ratios are continuous to the sampler and rounded here to whole channels (or to multiples of `step`),
so one pruning has one set of **parameters**, whoever proposed it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from nerf.field import FieldShape
from orchestrator.bridge import graph_of
from orchestrator.compress import scope_of
from orchestrator.plan import CalibrationSet, TrialConfig
from orchestrator.spec.sweep import SearchSettings
from pruning import CRITERIA
from pruning.selection import removed_count

Parameters = dict[str, Any]
SCHEDULE = "searched"


@dataclass(frozen=True)
class Range:
    """A number between two others."""

    low: float
    high: float


@dataclass(frozen=True)
class Choice:
    """One of several names or numbers."""

    of: tuple[Any, ...]


@dataclass(frozen=True)
class Space:
    """The space of one search on one model.

    Attributes:
        settings: what is searched.
        shape: of the dense networks.
        sets: the calibration sets to choose among.
    """

    settings: SearchSettings
    shape: FieldShape
    sets: tuple[CalibrationSet, ...]

    @cached_property
    def layers(self) -> dict[str, int]:
        """Dense widths of all prunable layers, by ``network/layer``."""
        widths = {layer.name: layer.out_width for layer in self.shape.layers()}
        names = graph_of(self.shape, "all").prunable()
        return {
            f"{network}/{name}": widths[name]
            for network in scope_of(self.settings.networks)
            for name in names
        }

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Layers that share a ratio, by the name of their parameter."""
        return {
            f"{network}/{'+'.join(group)}": tuple(f"{network}/{layer}" for layer in group)
            for network in scope_of(self.settings.networks)
            for group in self.settings.groups
        }

    @cached_property
    def dimensions(self) -> dict[str, Range | Choice]:
        """Every parameter that is searched and what it may be."""
        found: dict[str, Range | Choice] = {
            name: Range(self.settings.low, self.settings.high) for name in self.groups
        }
        for name, options in self._choices().items():
            if len(options) > 1:
                found[name] = Choice(options)
        return found

    def _choices(self) -> dict[str, tuple[Any, ...]]:
        settings = self.settings
        return {
            "criterion": settings.criteria,
            "compensation": settings.compensations,
            "bits": settings.bits,
            "calibration_views": tuple(dict.fromkeys(s.views for s in self.sets)),
            "calibration_rays": tuple(dict.fromkeys(s.rays for s in self.sets)),
            "calibration_weighting": tuple(dict.fromkeys(s.weighting for s in self.sets)),
            "calibration_seed": tuple(dict.fromkeys(s.seed for s in self.sets)),
        }

    def rounded(self, parameters: Mapping[str, Any]) -> Parameters:
        """The parameters that stand for the same pruning, exactly.

        A ratio becomes the fraction that is really removed of the widest layer of its group, or a
        multiple of `step`.
        """
        found = {name: parameters[name] for name in self.dimensions}
        low, high, step = self.settings.low, self.settings.high, self.settings.step
        for name, layers in self.groups.items():
            ratio = min(max(float(parameters[name]), low), high)
            if step is None:
                width = max(self.layers[layer] for layer in layers)
                ratio = removed_count(ratio, width) / width
            else:
                least, most = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
                ratio = round(min(max(round(ratio / step), least), most) * step, 9)
            found[name] = min(max(ratio, low), high)
        return found

    def config(self, parameters: Mapping[str, Any]) -> TrialConfig:
        """The pruning that rounded parameters stand for."""
        said = {name: options[0] for name, options in self._choices().items()} | {
            name: parameters[name] for name in self._choices() if name in parameters
        }
        criterion = said["criterion"]
        calibration = CalibrationSet(
            said["calibration_views"],
            said["calibration_rays"],
            said["calibration_seed"],
            said["calibration_weighting"],
        )
        ratios = dict.fromkeys(self.layers, 0.0)
        for name, layers in self.groups.items():
            for layer in layers:
                width = self.layers[layer]
                ratios[layer] = removed_count(parameters[name], width) / width
        channels = sum(self.layers.values())
        removed = sum(ratios[layer] * width for layer, width in self.layers.items())
        config = TrialConfig(
            networks=self.settings.networks,
            criterion=criterion,
            ratio=removed / channels,
            schedule=SCHEDULE,
            layer_ratios=tuple(ratios.values()),
            calibration=calibration,
            seed=said["calibration_seed"] if CRITERIA[criterion].needs_seed else None,
            compensation=said["compensation"],
            bits=said["bits"],
            errors=self.settings.errors if criterion == "obs" else "layer",
            layers=tuple(self.layers),
        )
        return config if config.needs_data else replace(config, calibration=None)

    def from_ratios(
        self, ratios: Mapping[str, float], choices: Mapping[str, Any] | None = None
    ) -> Parameters:
        """Rounded parameters for ratios layer by layer; a group gets the mean of its layers.

        Args:
            ratios: by ``network/layer``; layers left out stay whole.
            choices: criterion and so on; the first of each where left out.
        """
        found: Parameters = {}
        for name, layers in self.groups.items():
            found[name] = sum(ratios.get(layer, 0.0) for layer in layers) / len(layers)
        for name, options in self._choices().items():
            if name in self.dimensions:
                found[name] = (choices or {}).get(name, options[0])
        return self.rounded(found)

    def from_record(self, config: Mapping[str, Any]) -> Parameters | None:
        """Rounded parameters for the configuration of a record of another sweep.

        None where the space does not hold it: other networks, another criterion, ratios that are
        unknown or out of range.
        """
        if config.get("networks") != self.settings.networks or "mask" in config:
            return None
        if config.get("errors", "layer") != self.settings.errors:
            return None
        choices = {}
        for name, options in self._choices().items():
            value = config.get("seed" if name == "calibration_seed" else name, options[0])
            if value not in options:
                return None
            choices[name] = value
        ratios: dict[str, float] = {}
        for layer in self.layers:
            network, _, name = layer.partition("/")
            short = name.replace("trunk.", "layer_")
            ratio = config.get(f"{network}_{short}_ratio", config.get(f"{short}_ratio"))
            if ratio is not None:
                ratios[layer] = float(ratio)
        grouped = {layer for layers in self.groups.values() for layer in layers}
        high = self.settings.high
        fits = all(r <= high if layer in grouped else r == 0.0 for layer, r in ratios.items())
        return self.from_ratios(ratios, choices) if ratios and fits else None


def uniform(space: Space, ratio: float) -> Parameters:
    """The same ratio in every searched layer."""
    return space.from_ratios(dict.fromkeys(space.layers, ratio))


def by_hand(space: Space, ratios: Sequence[float]) -> Parameters:
    """One ratio a hidden layer, the same in each network; feature and view branch stay whole."""
    return space.from_ratios(
        {
            f"{network}/trunk.{i}": ratio
            for network in scope_of(space.settings.networks)
            for i, ratio in enumerate(ratios)
        }
    )
