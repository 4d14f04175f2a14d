"""From a dense model to a pruned one and its file, of whatever size that has or may have.

`pruning` keeps to a budget of weights; a file also has a header, scales and checksums, and its
codes are shorter than their bits. What all that takes is measured on the file itself, and the
budget corrected until the file fits.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypedDict, cast

from nerf.checkpoints import load_model, model_size, save_model
from nerf.field import NerfModel
from nerf.packing import Packed
from orchestrator.bridge import field_of, network_of
from orchestrator.errors import OrchestratorError
from orchestrator.modelfile import (
    AUTO,
    AUTO_SCHEMES,
    RATE,
    TRAINED_SCHEMES,
    Bits,
    Samples,
    packed,
)
from orchestrator.plan import TrialConfig
from orchestrator.ratefit import LEAST_BITS, Stepped, fit_rate, price_at
from pruning import (
    BUDGETED,
    SCHEMES,
    Balance,
    Budget,
    BudgetError,
    CalibrationBatch,
    Choices,
    Joint,
    Network,
    OutputWeights,
    Price,
    Pruned,
    Ranking,
    Sizing,
    Statistics,
    Widths,
    choices,
    cost_of,
    curvature_weights,
    cut,
    jointly,
    price_of,
    prune,
    quantize,
    rank,
    select,
    shrink,
    sparsify,
    widths_within,
)
from pruning.selection import removed_count

ATTEMPTS = 6
LIGHT = frozenset({"mean", "square"})
"""Statistics of one number a channel."""
FULL = 0.995
"""A file that uses so much of its size is not searched for a better one."""
STEP_BACK = 0.002
"""A file that is too large gives way by at least so much of its size."""

COARSE_WEIGHTS = (0.001, 0.003, 0.01, 0.03, 0.1)
"""What `coarse_weight: auto` chooses from."""

USUAL_WEIGHT = 0.1

TRAINED_ROUNDING = 10.0
"""How much more the errors of rounding count where a recovery follows: training makes up for
removed channels far better than for rounded weights. 100 was worse (docs/results/recovery.md)."""

ROUNDING_WEIGHT = 0.1
"""How much rounding the coarse network counts in `bits: rate`: removing its channels harms less,
but where samples lie must not change at random (at 500 kB 0.001 loses 0.9 dB against it)."""


class Weighing(TypedDict, total=False):
    """How `pruning.rank` weighs errors."""

    output_weights: Mapping[str, OutputWeights]
    balance: Balance


class Reduced(Protocol):
    """What was done to one network: `pruning.Pruned`, `pruning.Sparsified`."""

    @property
    def network(self) -> Network:
        """The smaller network."""

    @property
    def nonzero_parameters(self) -> int:
        """By the report's count."""

    @property
    def removed(self) -> int:
        """Channels (or weights) that went."""

    @property
    def total(self) -> int:
        """Of how many."""

    @property
    def ratio(self) -> float:
        """The first over the second."""


@dataclass(frozen=True)
class Material:
    """What a pruning may look at beside the dense model.

    Attributes:
        statistics: calibration statistics of the dense networks, by name.
        samples: calibration samples by network.
        kept: what does not depend on a budget, by what it depends on: trials that differ in their
            budget share it.
        validate: PSNR (dB) of a model on the validation rays; None where there are none.
    """

    statistics: Mapping[str, Statistics] | None = None
    samples: Samples | None = None
    kept: dict[Any, Any] = field(default_factory=dict)
    validate: Callable[[NerfModel], float] | None = None

    def batches(self, names: Iterable[str]) -> dict[str, Iterable[CalibrationBatch]]:
        """The calibration samples of some networks; empty where there are none."""
        return {} if self.samples is None else {name: self.samples(name) for name in names}


@dataclass(frozen=True)
class Compressed:
    """A pruned model and its file.

    Attributes:
        model: what the file holds, on the dense model's device.
        pruned: what was done to each pruned network.
        size: of the file, in bytes.
        bits: how its weights are stored: what `auto` chose.
        few: what the file holds, where weights are stored in few bits.
        notes: what was chosen on the way, for the record.
    """

    model: NerfModel
    pruned: Mapping[str, Reduced]
    size: int
    bits: Bits
    few: Mapping[str, Packed] | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


def is_light(config: TrialConfig) -> bool:
    """Whether a pruning is no more than a few operations on weights and means.

    A CPU core does those sooner than a GPU that others share, where each of them waits its turn.
    """
    return (
        (config.control, config.recover, config.size, config.mask) == (None,) * 4
        and (config.compensation, config.bits, config.errors) == ("none", "fp32", "layer")
        and not config.layers
        and LIGHT.issuperset(config.needs.moments)
    )


def compress(
    path: Path,
    dense: NerfModel,
    config: TrialConfig,
    material: Material,
    info: Mapping[str, Any],
) -> Compressed:
    """Prune a model as a trial says and write its file.

    Args:
        path: the file.
        dense: the model; it is not changed.
        config: what is pruned, and how.
        material: what the method may look at.
        info: kept in the file.

    Returns:
        The model as its file holds it: few-bit weights are read back before they are measured.

    Raises:
        BudgetError: no network is small enough for the file's size.
    """
    if config.size is not None:
        return _shrink_to_file(path, dense, config, material, info)
    if config.mask is not None:
        model, masked = mask_model(dense, config, material.statistics)
        return _written(path, model, masked, config, material, info)
    if config.layers:
        model, pruned = _prune_by_layers(dense, config, material)
    elif config.errors == "pixel":
        model, pruned = _prune_by_pixels(dense, config, material)
    else:
        model, pruned = prune_model(
            dense,
            config.networks,
            config.criterion,
            config.layer_ratios,
            material.statistics,
            config.seed,
            config.compensation,
            material.batches(scope_of(config.networks)),
        )
    return _written(path, model, pruned, config, material, info)


# --- the model ---------------------------------------------------------------------------------


def scope_of(scope: str) -> tuple[str, ...]:
    """The networks that are pruned: ``shared`` prunes the fine one."""
    return {"both": ("coarse", "fine"), "shared": ("fine",)}.get(scope, (scope,))


def with_fields(dense: NerfModel, scope: str, pruned: Mapping[str, Reduced]) -> NerfModel:
    """The model with the pruned networks in their places; `shared` puts the fine one in both."""
    fields = dense.networks()
    for name, of in pruned.items():
        fields[name] = field_of(of.network, fields[name].shape)
    if scope == "shared":
        fields["coarse"] = fields["fine"]
    return NerfModel(fields["coarse"], fields["fine"], dense.samples)


def prune_model(
    dense: NerfModel,
    scope: str,
    criterion: str,
    layer_ratios: tuple[float, ...],
    statistics: Mapping[str, Statistics] | None,
    seed: int | None,
    compensation: str = "none",
    batches: Mapping[str, Iterable[CalibrationBatch]] | None = None,
) -> tuple[NerfModel, dict[str, Pruned]]:
    """Prune the networks of a model that a scope names; the others stay as they are.

    Args:
        dense: the model; it is not changed.
        scope: ``coarse``, ``fine``, ``both``, or ``shared``: the fine one, used for both passes.
        criterion: scoring rule.
        layer_ratios: requested fraction of each hidden layer.
        statistics: calibration statistics by network, where the criterion needs them.
        seed: where the criterion needs one.
        compensation: what the readers of removed channels do.
        batches: calibration samples by network, where the compensation needs them.

    Returns:
        The physically smaller model, and what was done to each pruned network.
    """
    fields = dense.networks()
    # Layers of both networks have the same names: without its own seed, the random criterion would
    # remove the same channels from both.
    seeds = {name: None if seed is None else 2 * seed + i for i, name in enumerate(fields)}
    pruned = {
        name: prune(
            network_of(fields[name]),
            layer_ratios,
            criterion,
            None if statistics is None else statistics[name],
            seeds[name],
            compensation=compensation,
            batches=(batches or {}).get(name),
        )
        for name in scope_of(scope)
    }
    return with_fields(dense, scope, pruned), pruned


def _prune_by_layers(
    dense: NerfModel, config: TrialConfig, material: Material
) -> tuple[NerfModel, dict[str, Pruned]]:
    """Remove from each layer of each network the fraction of its own; the others stay whole."""
    fields = dense.networks()
    networks = {name: network_of(fields[name], "all") for name in scope_of(config.networks)}
    ratios = dict(zip(config.layers, config.layer_ratios, strict=True))
    widths: Widths = {}
    for name, network in networks.items():
        for layer in network.graph.prunable():
            whole = network.width(layer)
            gone = removed_count(ratios.get(f"{name}/{layer}", 0.0), whole)
            widths.setdefault(name, {})[layer] = whole - gone
    # Of an allocation that ranks as the criterion does, whether or not errors are asked for.
    schedule = "chain" if config.criterion == "obs" else "uniform"
    ranking = _ranking(networks, replace(config, schedule=schedule), material)
    pruned = cut(
        networks,
        ranking.keep(widths),
        config.compensation,
        material.statistics,
        material.batches(networks),
    )
    return with_fields(dense, config.networks, pruned), pruned


def ratios_for_size(
    dense: NerfModel, config: TrialConfig, material: Material, info: Mapping[str, Any]
) -> dict[str, float]:
    """The ratios, by ``network/layer``, at which an allocation keeps to `config.size`, about.

    Nothing is pruned, so what the codes of the pruned weights take is not known to the byte.

    Raises:
        BudgetError: no network is small enough for the file's size.
    """
    fields = dense.networks()
    networks = {name: network_of(fields[name], "all") for name in scope_of(config.networks)}
    whole = {
        name: {layer: network.width(layer) for layer in network.graph.prunable()}
        for name, network in networks.items()
    }
    ranking = _ranking(networks, config, material)
    price, everything = price_in_files(with_fields(dense, config.networks, {}), config.bits, info)
    fixed = everything - cost_of(networks, Budget(0, price), whole)
    budget = Budget(float(config.size or 0) - fixed, price)
    widths = widths_within(
        config.schedule, Sizing(networks, budget, ranking.scores, ranking.paths, _omega(config))
    )
    return {
        f"{name}/{layer}": 1.0 - width / whole[name][layer]
        for name, layers in widths.items()
        for layer, width in layers.items()
    }


def _prune_by_pixels(
    dense: NerfModel, config: TrialConfig, material: Material
) -> tuple[NerfModel, dict[str, Pruned]]:
    """Remove channels in the order of elimination paths that weigh the pixel's errors."""
    fields = dense.networks()
    networks = {name: network_of(fields[name]) for name in scope_of(config.networks)}
    ranking = rank(
        networks,
        material.statistics or {},
        criterion=config.criterion,
        **_weighing(networks, config, material),
    )
    keep = {
        name: select(
            {layer: path.ranks() for layer, path in of_network.items()},
            dict(zip(networks[name].graph.prunable(), config.layer_ratios, strict=True)),
        )
        for name, of_network in (ranking.paths or {}).items()
    }
    pruned = cut(
        networks, keep, config.compensation, material.statistics, material.batches(networks)
    )
    return with_fields(dense, config.networks, pruned), pruned


def mask_model(
    dense: NerfModel, config: TrialConfig, statistics: Mapping[str, Statistics] | None
) -> tuple[NerfModel, dict[str, Reduced]]:
    """Set single weights of a model to zero; its shape stays."""
    if config.mask is None:
        raise ValueError("a pruning of channels has no mask")
    fields = dense.networks()
    masked: dict[str, Reduced] = {
        name: sparsify(
            network_of(fields[name]),
            config.mask,
            config.criterion,
            None if statistics is None else statistics[name],
        )
        for name in scope_of(config.networks)
    }
    return with_fields(dense, config.networks, masked), masked


# --- a file of a size --------------------------------------------------------------------------

Attempt = tuple[dict[str, Pruned], Bits]
"""What was pruned for a budget, and how its weights are to be stored."""


@dataclass(frozen=True)
class Fitted:
    """A pruned model that fits a file, before it is written.

    Attributes:
        size: of the file in bytes.
        model: the networks.
        few: in few bits, if they are.
        pruned: what was done to each.
        bits: how its weights are stored.
    """

    size: int
    model: NerfModel
    few: dict[str, Packed] | None
    pruned: dict[str, Pruned]
    bits: Bits


def _shrink_to_file(
    path: Path,
    dense: NerfModel,
    config: TrialConfig,
    material: Material,
    info: Mapping[str, Any],
) -> Compressed:
    """Prune a model so far that its file has at most `config.size` bytes, and write it."""
    if config.coarse_weight != AUTO:
        fitted, weight = _fit(dense, config, material, info), config.coarse_weight
    else:
        fitted, weight = _best_fit(path, dense, config, material, info)
    save_model(path, fitted.model, info, fitted.few)
    model = _read_back(path, fitted.model, config.bits)
    notes = {} if weight is None else {"coarse_weight": float(weight)}
    return Compressed(model, fitted.pruned, fitted.size, fitted.bits, fitted.few, notes)


def _best_fit(
    path: Path,
    dense: NerfModel,
    config: TrialConfig,
    material: Material,
    info: Mapping[str, Any],
) -> tuple[Fitted, float]:
    """The fit whose coarse weight does best on the validation rays, and that weight."""
    if material.validate is None:
        raise OrchestratorError(
            "coarse_weight `auto` is chosen on validation rays, and this model was trained without "
            "any; set `train.validation` above 0 or give a number"
        )
    best: tuple[float, Fitted, float] | None = None
    for weight in COARSE_WEIGHTS:
        fitted = _fit(dense, replace(config, coarse_weight=weight), material, info)
        save_model(path, fitted.model, info, fitted.few)
        score = material.validate(_read_back(path, fitted.model, config.bits))
        if best is None or score > best[0]:
            best = score, fitted, weight
    if best is None:
        raise ValueError("there are no coarse weights to choose from")
    return best[1], best[2]


def _fit(
    dense: NerfModel, config: TrialConfig, material: Material, info: Mapping[str, Any]
) -> Fitted:
    """Prune a model until its file fits."""
    if config.size is None:
        raise ValueError("a pruning by ratios has no size to keep to")
    fields = dense.networks()
    networks = {name: network_of(fields[name], "all") for name in scope_of(config.networks)}
    if config.bits == RATE:
        return _fit_by_rate(dense, networks, config, material, info)
    whole = with_fields(dense, config.networks, {})
    attempt, fixed = _attempts(networks, whole, config, material, info)
    best: Fitted | None = None
    size, before, budget = 0, None, config.size - fixed
    for _ in range(ATTEMPTS):
        try:
            pruned, bits = attempt(budget)
        except BudgetError as error:
            if best is not None:
                break
            raise BudgetError(
                f"a file of {config.size:,} bytes is too small: {config.size - budget:,.0f} bytes "
                f"of it are not the pruned weights; {error}"
            ) from error
        model = with_fields(dense, config.networks, pruned)
        few = packed(model, bits, material.samples)
        size = model_size(model, info, few)
        if size <= config.size and (best is None or size > best.size):
            best = Fitted(size, model, few, pruned, bits)
        now = {name: p.achieved for name, p in pruned.items()}, bits
        nothing_gone = config.bits != AUTO and all(not p.removed for p in pruned.values())
        if best is not None and (best.size >= FULL * config.size or nothing_gone or now == before):
            break
        before = now
        if size > config.size:
            # What the codes take is known only once they are made; too small a step back would
            # come to the same file, or one as large, until the attempts are used up.
            budget -= max(size - config.size, STEP_BACK * config.size)
        else:
            budget += (config.size - size) * 0.9
    if best is None:
        raise BudgetError(f"the file has {size:,} bytes where {config.size:,} are allowed")
    return best


def _fit_by_rate(
    dense: NerfModel,
    networks: Mapping[str, Network],
    config: TrialConfig,
    material: Material,
    info: Mapping[str, Any],
) -> Fitted:
    """Remove channels where the size leaves too few bits a weight, and round the rest to fit.

    How few is chosen on validation rays where there are some.
    """
    best: tuple[float, Fitted] | None = None
    tried: set[tuple[int, ...]] = set()
    for bits in LEAST_BITS if material.validate is not None else LEAST_BITS[:1]:
        found = _rounded_at(bits, dense, networks, config, material, info, tried)
        if found is None:
            continue
        stepped, pruned = found
        tried.add(_widths_left(pruned))
        fitted = Fitted(stepped.size, stepped.model, stepped.few, pruned, config.bits)
        if material.validate is None:
            return fitted
        score = material.validate(stepped.stored())
        if best is None or score > best[0]:
            best = score, fitted
    if best is None:
        raise ValueError("there are no rates to choose from")
    return best[1]


def _rounded_at(
    bits: float,
    dense: NerfModel,
    networks: Mapping[str, Network],
    config: TrialConfig,
    material: Material,
    info: Mapping[str, Any],
    tried: Collection[tuple[int, ...]],
) -> tuple[Stepped, dict[str, Pruned]] | None:
    """Prune to so many bits a weight, and round what is left to the size of the file.

    None where that leaves widths that were tried: rounding them again, the dear part, would come to
    the same file.
    """
    statistics = material.statistics or {}
    rounding = {"coarse": ROUNDING_WEIGHT, "fine": 1.0}
    size = budget = config.size or 0
    while True:
        try:
            pruned = shrink(
                networks,
                statistics,
                Budget(budget, price_at(bits)),
                criterion=config.criterion,
                allocation=config.schedule,
                compensation=config.compensation,
                error_weights=_omega(config),
                ranking=_ranking(networks, config, material),
                batches=material.batches(networks),
            )
        except BudgetError as error:
            raise BudgetError(
                f"a file of {size:,} bytes is too small; in bytes of its weights alone, {error}"
            ) from error
        if _widths_left(pruned) in tried:
            return None

        def assemble(
            found: Mapping[str, Network], pruned: Mapping[str, Pruned] = pruned
        ) -> NerfModel:
            parts = {name: replace(pruned[name], network=of) for name, of in found.items()}
            return with_fields(dense, config.networks, parts)

        try:
            return (
                fit_rate(
                    networks, pruned, statistics, material.samples, rounding, size, assemble, info
                ),
                pruned,
            )
        except BudgetError:
            # Too many biases, scales and tables for so small a file: fewer channels.
            budget = budget * 3 // 4


def _widths_left(pruned: Mapping[str, Pruned]) -> tuple[int, ...]:
    """How many channels each layer kept."""
    return tuple(int(k.sum()) for of in pruned.values() for k in of.keep.values())


def _attempts(
    networks: Mapping[str, Network],
    whole: NerfModel,
    config: TrialConfig,
    material: Material,
    info: Mapping[str, Any],
) -> tuple[Callable[[float], Attempt], float]:
    """How to prune to a budget of bytes, and the bytes of a file that are not in the budget."""
    ranking, statistics = _ranking(networks, config, material), material.statistics or {}
    widths = {
        name: {layer: network.width(layer) for layer in network.graph.prunable()}
        for name, network in networks.items()
    }
    omega = _omega(config)
    price, everything = price_in_files(whole, config.bits, info)
    fixed = everything - cost_of(networks, Budget(0, price), widths)
    if config.bits != AUTO:

        def by_width(budget: float) -> Attempt:
            pruned = shrink(
                networks,
                statistics,
                Budget(budget, price),
                criterion=config.criterion,
                allocation=config.schedule,
                compensation=config.compensation,
                error_weights=omega,
                ranking=ranking,
                batches=material.batches(networks),
            )
            return pruned, config.bits

        return by_width, fixed

    sizing = Sizing(networks, Budget(0), ranking.scores, ranking.paths, omega)
    joint = Joint(networks, sizing.curves(), _choices(networks, config, material), omega)

    def by_width_and_bits(budget: float) -> Attempt:
        found, schemes = jointly(joint, budget)
        batches = material.batches(networks)
        return cut(networks, ranking.keep(found), config.compensation, statistics, batches), schemes

    return by_width_and_bits, fixed


def _omega(config: TrialConfig) -> dict[str, float]:
    """How much the errors of each network count; `auto` stands for the usual weight here."""
    if config.coarse_weight is None:
        return {}
    auto = config.coarse_weight == AUTO
    return {"coarse": USUAL_WEIGHT if auto else float(config.coarse_weight), "fine": 1.0}


def _choices(
    networks: Mapping[str, Network], config: TrialConfig, material: Material
) -> dict[str, Choices]:
    """What each layer takes and loses in how many bits; the same for every budget, so kept."""
    trained = config.recover is not None
    key = "choices", config.calibration, (*networks,), config.errors, trained
    if key not in material.kept:
        weights = _weighing(networks, config, material).get("output_weights", {})
        statistics = material.statistics or {}
        material.kept[key] = {
            name: choices(
                network,
                statistics[name],
                TRAINED_SCHEMES if trained else AUTO_SCHEMES,
                weights.get(name),
                TRAINED_ROUNDING if trained else 1.0,
            )
            for name, network in networks.items()
        }
    return cast(dict[str, Choices], material.kept[key])


def price_in_files(whole: NerfModel, bits: str, info: Mapping[str, Any]) -> tuple[Price, int]:
    """What a weight takes in a file, coded, by the dense model's own file; and its size.

    Its rounding is the plain one of so many bits: what it looks at costs time and saves no bytes.
    """
    bits = "int8" if bits in (AUTO, RATE) else bits
    price, scheme = price_of(bits), SCHEMES[bits].stored_as
    if scheme == "fp32":
        return price, model_size(whole, info)
    few = {
        name: Packed(of.shape, scheme, quantize(network_of(of), scheme).tensors())
        for name, of in whole.stored().items()
    }
    saved = sum(len(p.row(entropy=False)) - len(p.row()) for p in few.values())
    weights = sum(spec.in_width * spec.out_width for p in few.values() for spec in p.shape.layers())
    return replace(price, weight=price.weight - saved / weights), model_size(whole, info, few)


def _ranking(networks: Mapping[str, Network], config: TrialConfig, material: Material) -> Ranking:
    """How channels rank; the same for every budget, so it is kept."""
    paths = BUDGETED[config.schedule].needs_paths
    method = config.criterion, config.errors, config.seed, paths
    key = "ranking", config.calibration, (*networks,), method
    if key not in material.kept:
        material.kept[key] = rank(
            networks,
            material.statistics or {},
            criterion=config.criterion,
            allocation=config.schedule,
            seed=config.seed,
            **_weighing(networks, config, material),
        )
    return cast(Ranking, material.kept[key])


def _weighing(networks: Mapping[str, Network], config: TrialConfig, material: Material) -> Weighing:
    """Whose errors are weighed: those of a layer's readers, or the pixel's."""
    if config.errors == "layer" or material.statistics is None:
        return {}
    statistics = material.statistics
    weights = {name: curvature_weights(n, statistics[name]) for name, n in networks.items()}
    return {"output_weights": weights, "balance": "none"}


# --- the file ----------------------------------------------------------------------------------


def _written(
    path: Path,
    model: NerfModel,
    pruned: Mapping[str, Reduced],
    config: TrialConfig,
    material: Material,
    info: Mapping[str, Any],
) -> Compressed:
    """Write a model as it is and read it back."""
    size = save_model(
        path, model, info, packed(model, config.bits, material.samples, config.mask is not None)
    )
    return Compressed(_read_back(path, model, config.bits), pruned, size, config.bits)


def _read_back(path: Path, model: NerfModel, bits: str) -> NerfModel:
    """The model as its file holds it, where that is not the model itself."""
    return model if bits == "fp32" else load_model(path)[0].to(model.device)
