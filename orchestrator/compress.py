"""From a pruned model to its file, and to the size that a file may have.

`pruning.shrink` keeps to a budget of weights; a file also has a header, scales and checksums. What
they take is measured on the dense model's own file, whose header is never the shorter one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nerf.checkpoints import load_model, model_size, save_model
from nerf.field import NerfModel
from nerf.packing import Packed
from orchestrator.bridge import field_of, network_of
from orchestrator.plan import TrialConfig
from pruning import (
    Budget,
    BudgetError,
    Pruned,
    Statistics,
    cost_of,
    price_of,
    quantize,
    shrink,
)

ATTEMPTS = 2


@dataclass(frozen=True)
class Compressed:
    """A pruned model and its file.

    Attributes:
        model: what the file holds, on the dense model's device.
        pruned: what was done to each pruned network.
        size: of the file, in bytes.
    """

    model: NerfModel
    pruned: Mapping[str, Pruned]
    size: int


def scope_of(scope: str) -> tuple[str, ...]:
    """The networks that are pruned: ``shared`` prunes the fine one."""
    return {"both": ("coarse", "fine"), "shared": ("fine",)}.get(scope, (scope,))


def with_fields(dense: NerfModel, scope: str, pruned: Mapping[str, Pruned]) -> NerfModel:
    """The model with the pruned networks in their places; `shared` puts the fine one in both."""
    fields = dense.networks()
    for name, of in pruned.items():
        fields[name] = field_of(of.network, fields[name].shape)
    if scope == "shared":
        fields["coarse"] = fields["fine"]
    return NerfModel(fields["coarse"], fields["fine"], dense.samples)


def write_model(path: Path, model: NerfModel, bits: str, info: Mapping[str, Any]) -> int:
    """Write a model with its weights stored as a scheme says; gives the file's size."""
    return save_model(path, model, info, packed(model, bits))


def read_back(path: Path, model: NerfModel, bits: str) -> NerfModel:
    """The model as its file holds it, where that is not the model itself."""
    return model if bits == "fp32" else load_model(path)[0].to(model.device)


def shrink_to_file(
    path: Path,
    dense: NerfModel,
    config: TrialConfig,
    statistics: Mapping[str, Statistics] | None,
    info: Mapping[str, Any],
) -> Compressed:
    """Prune a model so far that its file has at most `config.size` bytes, and write it.

    Args:
        path: the file.
        dense: the model; it is not changed.
        config: the networks, the size and the method.
        statistics: calibration statistics by network, where the method needs them.
        info: kept in the file.

    Raises:
        BudgetError: no network is small enough for that file.
    """
    if config.size is None:
        raise ValueError("a pruning by ratios has no size to keep to")
    fields = dense.networks()
    networks = {name: network_of(fields[name], "all") for name in scope_of(config.networks)}
    widths = {
        name: {layer: network.width(layer) for layer in network.graph.prunable()}
        for name, network in networks.items()
    }
    whole = with_fields(dense, config.networks, {})
    price = price_of(config.bits)
    everything = model_size(whole, info, packed(whole, config.bits))
    fixed = everything - cost_of(networks, Budget(0, price), widths)
    for _ in range(ATTEMPTS):
        try:
            pruned = shrink(
                networks,
                statistics or {},
                Budget(config.size - fixed, price),
                criterion=config.criterion,
                allocation=config.schedule,
                compensation=config.compensation,
                error_weights={}
                if config.coarse_weight is None
                else {"coarse": config.coarse_weight, "fine": 1.0},
                seed=config.seed,
            )
        except BudgetError as error:
            raise BudgetError(
                f"a file of {config.size:,} bytes is too small: {fixed:,.0f} bytes of it are not "
                f"the pruned weights; {error}"
            ) from error
        model = with_fields(dense, config.networks, pruned)
        size = write_model(path, model, config.bits, info)
        if size <= config.size:
            return Compressed(read_back(path, model, config.bits), pruned, size)
        fixed += size - config.size
    raise BudgetError(f"the file has {size:,} bytes where {config.size:,} are allowed")


def packed(model: NerfModel, bits: str) -> dict[str, Packed] | None:
    """The stored networks in few bits, per output channel; None for plain float32."""
    if bits == "fp32":
        return None
    return {
        name: Packed(field.shape, bits, quantize(network_of(field), bits).tensors())
        for name, field in model.stored().items()
    }
