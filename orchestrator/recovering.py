"""Recovery as a trial does it: prune, train, store in few bits; in one round or in several.

The state of a recovery under way is kept as that of a training is, so that a worker that died goes
on where it was. What is measured is always the file: its weights are the ones that were trained,
rounded as they were while they were trained.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nerf.checkpoints import load_model, model_size, save_model
from nerf.errors import CheckpointError
from nerf.field import Field, FieldShape, NerfModel, SampleCounts
from nerf.packing import Packed
from nerf.recovery import Recovery, RecoveryRecipe
from nerf.rounding import RoundedLayer
from nerf.scenes import Scene
from nerf.training import RayPool, Recipe
from orchestrator.bridge import network_of
from orchestrator.compress import (
    Compressed,
    Material,
    Reduced,
    compress,
    price_in_files,
    scope_of,
    with_fields,
)
from orchestrator.log import logger
from orchestrator.modelfile import AUTO, RATE, TRAINED_SCHEMES, Bits, packed, schemes_of
from orchestrator.plan import TrialConfig
from pruning import (
    SCHEMES,
    BudgetError,
    Pruned,
    Quantized,
    nonzero_parameters,
    quantize,
)

REPORT_SECONDS = 1.0

Calibrate = Callable[[NerfModel], Material]
"""What the pruning of a model between two rounds may look at."""

MARGIN = 0.02
"""Coded weights take other bytes once they are trained: files are pruned to so much less."""
COARSER = 1.01
"""Where that was too little, grids are made coarser by this factor, again and again."""
MOST_COARSER = 120
TOLD_FROM = 1.05
"""From this factor on it is said: such a model was not trained as its file has it."""
NARROW_BITS = "int6"
"""How the layers of a narrow control are stored where those of the pruned model choose their own:
the best single number of bits for a recovered fern at 250 and 100 kB."""
SQUEEZES, SLACK = 6, 0.005
"""How often a file that is squeezed is measured, and what is left free of it to be sure."""


@dataclass(frozen=True)
class Ground:
    """What a recovery stands on.

    Attributes:
        scene: whose training views are learnt from.
        pool: their rays, on the device.
        training: the recipe that trained the dense model: noise, arithmetic and validation rays
            are as there.
        running: folder of the state under way.
        checkpoint_seconds: how often the state is saved.
        saved: called when the state was written.
        during: times a block as a stage of the trial.
    """

    scene: Scene
    pool: RayPool
    training: Recipe
    running: Path
    checkpoint_seconds: float
    saved: Callable[[], None] = lambda: None
    during: Callable[[str], AbstractContextManager[None]] = lambda _stage: nullcontext()


@dataclass(frozen=True)
class Recovered:
    """A model after its recovery, and its file.

    Attributes:
        result: the model as its file holds it, what was pruned, the file's size.
        metrics: ``recover_seconds``, the wall time of the iterations.
    """

    result: Compressed
    metrics: Mapping[str, float]


# --- a pruned model -----------------------------------------------------------------------------


def recover_pruned(
    path: Path,
    dense: NerfModel,
    config: TrialConfig,
    material: Material,
    info: Mapping[str, Any],
    calibrate: Calibrate,
    ground: Ground,
) -> Recovered:
    """Prune a model and train it again, in as many rounds as the trial says; write its file.

    Args:
        path: the file.
        dense: the model, and the teacher; it is not changed.
        config: networks, method, bits and recovery.
        material: what the first round's pruning may look at.
        info: kept in the file.
        calibrate: gives that for later rounds.
        ground: the scene, and where the state is kept.

    Raises:
        TrainingError: the recovery diverged.
        BudgetError: no network is small enough for that file.
    """
    recover = config.recover
    if recover is None:
        raise ValueError("this trial has no recovery")
    sizes = round_sizes(dense, config, info)
    last = len(sizes) - 1
    begun = [ground.running / f"round-{number}.safetensors" for number in range(len(sizes))]
    first = max((number for number in range(len(sizes)) if begun[number].is_file()), default=0)
    pruned: dict[str, Pruned] = {}
    model, seconds = dense, 0.0
    bits: Bits = config.bits
    few: Mapping[str, Packed] | None = None
    for number in range(first, len(sizes)):
        if begun[number].is_file():
            model, pruned, seconds, bits = _begun(begun[number], dense, config.networks)
        else:
            if number:
                with ground.during("calibrate"):
                    material = calibrate(model)
            with ground.during("prune"):
                part = replace(config, size=sizes[number])
                small = compress(path, model, part, material, info)
            model = with_fields(model, config.networks, small.pruned)
            pruned, bits = _together(dense, pruned, small.pruned), small.bits
            if bits == RATE:  # its file has layers and scales of channels of its own
                model, few = small.model, small.few
            if number:
                _write_begun(begun[number], model, pruned, seconds, bits)
        recovery = _trained(
            model,
            dense,
            recover.recipe(
                ground.training.density_noise, ground.training.precision, last=number == last
            ),
            _seed_of(config, number),
            scope_of(config.networks),
            bits if number == last else "fp32",
            ground.running / f"state-{number}.safetensors",
            ground,
            _keeper(config.size, bits, info) if number == last else None,
            few,
        )
        model = recovery.student
        seconds += recovery.seconds
    return _written(path, recovery, config.size, bits, info, pruned, seconds)


def round_sizes(
    dense: NerfModel, config: TrialConfig, info: Mapping[str, Any]
) -> tuple[int | None, ...]:
    """The file size to prune to in each round: falling by the same factor from the dense model's.

    All are in the bits of the final file. One round, or a pruning by ratios, goes all the way.
    """
    steps = 1 if config.recover is None else config.recover.steps
    if config.size is None:
        return (None,) * steps
    # What `rate` is trained to is the size of the file itself.
    margin = MARGIN if _coded(config.bits) and config.bits != RATE else 0.0
    size = round(config.size * (1 - margin))
    if config.recover is not None and config.recover.squeeze > 1:
        size = round(config.size * config.recover.squeeze)
    if steps == 1:
        return (size,)
    whole = with_fields(dense, config.networks, {})
    largest = max(price_in_files(whole, config.bits, info)[1], size)
    factor = (size / largest) ** (1 / steps)
    return (*(round(largest * factor**k) for k in range(1, steps)), size)


def _coded(bits: str) -> bool:
    """Whether the bytes of a weight depend on its value."""
    return bits in (AUTO, RATE) or SCHEMES[bits].kind != "float"


def _together(
    dense: NerfModel, before: Mapping[str, Pruned], after: Mapping[str, Reduced]
) -> dict[str, Pruned]:
    """Two prunings, one after the other, as one of the dense model."""
    together = {}
    for name, of in after.items():
        if not isinstance(of, Pruned):
            raise TypeError("only channels stay away in a recovery; masked weights grow back")
        first = before.get(name)
        together[name] = of if first is None else _as_one(dense.networks()[name], first, of)
    return together


def _as_one(field: Field, before: Pruned, after: Pruned) -> Pruned:
    keep = {}
    for layer, kept in before.keep.items():
        keep[layer] = kept.clone().cpu()
        keep[layer][keep[layer].clone()] = after.keep[layer].cpu()
    return _pruned_to(field, keep, after)


def _pruned_to(field: Field, keep: Mapping[str, torch.Tensor], of: Pruned | None) -> Pruned:
    """The record of a pruning that left these channels of a dense field."""
    network = network_of(field, "all")
    achieved = {layer: int((~kept).sum()) / kept.numel() for layer, kept in keep.items()}
    return Pruned(
        network=network if of is None else of.network,
        keep=keep,
        requested=achieved,
        achieved=achieved,
        nonzero_parameters=nonzero_parameters(network, keep),
    )


def _write_begun(
    path: Path, model: NerfModel, pruned: Mapping[str, Pruned], seconds: float, bits: Bits
) -> None:
    """Keep the model with which a later round begins, and what was removed until then."""
    keep = {
        name: {layer: kept.int().tolist() for layer, kept in of.keep.items()}
        for name, of in pruned.items()
    }
    save_model(path, model, {"keep": keep, "seconds": seconds, "bits": bits})


def _begun(
    path: Path, dense: NerfModel, scope: str
) -> tuple[NerfModel, dict[str, Pruned], float, Bits]:
    """The inverse of `_write_begun`."""
    model, info = load_model(path)
    keep = info["keep"]
    pruned = {}
    for name in scope_of(scope):
        masks = {layer: torch.tensor(kept).bool() for layer, kept in keep[name].items()}
        pruned[name] = replace(
            _pruned_to(dense.networks()[name], masks, None),
            network=network_of(model.networks()[name], "all"),
        )
    return model.to(dense.device), pruned, float(info["seconds"]), info["bits"]


def _seed_of(config: TrialConfig, number: int = 0) -> int:
    """The seed of a recovery: that of the trial's calibration or criterion."""
    seed = config.seed if config.calibration is None else config.calibration.seed
    return (seed or 0) + 1_000 * number


# --- controls -----------------------------------------------------------------------------------


def train_control(
    path: Path,
    dense: NerfModel,
    config: TrialConfig,
    shape: FieldShape,
    info: Mapping[str, Any],
    ground: Ground,
) -> Recovered:
    """Train a control as a recovery is trained, from photos, and write its file.

    Args:
        path: the file.
        dense: the dense model; it is not changed.
        config: which control, its size, bits and iterations.
        shape: of the dense networks.
        info: kept in the file.
        ground: the scene, and where the state is kept.

    Raises:
        TrainingError: the training diverged.
        BudgetError: no network is small enough for that file.
    """
    if config.recover is None:
        raise ValueError("a control is trained as a recovery is; this one has none")
    bits = NARROW_BITS if config.bits in (AUTO, RATE) else config.bits
    if config.control == "dense_longer":
        student = copy.deepcopy(dense)
    else:
        narrow = narrow_shape(dense, shape, replace(config, bits=bits), info)
        student = fresh_model(narrow, dense.samples, config.networks == "shared", _seed_of(config))
    recovery = _trained(
        student.to(dense.device),
        None,
        config.recover.recipe(ground.training.density_noise, ground.training.precision, last=True),
        _seed_of(config),
        tuple(student.stored()),
        bits,
        ground.running / "state-0.safetensors",
        ground,
        _keeper(config.size, bits, info),
    )
    return _written(path, recovery, config.size, bits, info, {}, recovery.seconds)


def fresh_model(shape: FieldShape, samples: SampleCounts, shared: bool, seed: int) -> NerfModel:
    """Networks that were never trained; a shared one is the fine one of the pair."""
    model = NerfModel.create(shape, samples, seed)
    return NerfModel(model.fine, model.fine, samples) if shared else model


def narrow_shape(
    dense: NerfModel, shape: FieldShape, config: TrialConfig, info: Mapping[str, Any]
) -> FieldShape:
    """The widest shape of equal hidden layers whose file has about `config.size` bytes.

    It is never wider than the dense networks: where a file holds more than they are, the control
    is of their width. Depth, skip and encodings stay; the view branch has half the channels, as in
    the original. A coded weight is taken to need as many bytes as one of the dense model.

    Raises:
        BudgetError: even one channel a layer is too much.
    """
    if config.size is None:
        raise ValueError("a narrow NeRF of no given size")
    shared = config.networks == "shared"
    whole = with_fields(dense, config.networks, {})
    price, everything = price_in_files(whole, config.bits, info)

    def cost(of: FieldShape) -> float:
        weights = sum(layer.in_width * layer.out_width for layer in of.layers())
        outputs = sum(layer.out_width for layer in of.layers())
        return (price.weight * weights + price.output * outputs) * (1 if shared else 2)

    budget = config.size - (everything - cost(shape))
    if _coded(config.bits):
        budget -= MARGIN * config.size
    width = 1
    while width < max(shape.trunk) and cost(_uniform(shape, width + 1)) <= budget:
        width += 1
    if cost(_uniform(shape, width)) > budget:
        raise BudgetError(
            f"a file of {config.size:,} bytes is too small for {len(shape.trunk)} hidden layers: "
            f"{config.size - budget:,.0f} bytes of it are not weights"
        )
    return _uniform(shape, width)


def _uniform(shape: FieldShape, width: int) -> FieldShape:
    return replace(shape, trunk=(width,) * len(shape.trunk), feature=width, view=max(1, width // 2))


# --- training and writing -----------------------------------------------------------------------


def _trained(
    student: NerfModel,
    teacher: NerfModel | None,
    recipe: RecoveryRecipe,
    seed: int,
    trained: tuple[str, ...],
    bits: Bits,
    state: Path,
    ground: Ground,
    squeeze: Callable[[Recovery], None] | None = None,
    few: Mapping[str, Packed] | None = None,
) -> Recovery:
    """Train to the end, going on from a saved state where there is one.

    Rounding begins on the grids of `few`, where they are given.

    `squeeze` is called when rounding begins, and `SQUEEZES` times in all until it ends.
    """

    def begin() -> Recovery:
        model = copy.deepcopy(student)
        return Recovery(model, teacher, ground.scene, recipe, seed, trained, ground.pool)

    recovery = begin()
    if state.is_file():
        try:
            recovery.load(state)
            logger.info("going on with the recovery at iteration %d", recovery.iteration)
        except CheckpointError as error:
            logger.warning("cannot go on from %s (%s); recovering from the start", state, error)
            recovery = begin()
    saved, step = time.monotonic(), 10
    with ground.during("recover"):
        while not recovery.done:
            late = recovery.iteration >= recipe.rounding_at
            if late and not recovery.rounding and bits != "fp32":
                recovery.round_weights(_rounding(recovery.student, trained, bits, few))
            if squeeze is not None and recovery.rounding:
                every = max(1, (recipe.iterations - recipe.rounding_at) // SQUEEZES)
                place = (recovery.iteration - recipe.rounding_at) % every
                if place == 0:
                    squeeze(recovery)
                step = min(step, every - place)
            step = max(1, round(recovery.advance(step).rate * REPORT_SECONDS))
            if time.monotonic() - saved > ground.checkpoint_seconds:
                recovery.save(state)
                ground.saved()
                saved = time.monotonic()
        recovery.save(state)
        ground.saved()
        recovery.release()
    return recovery


def _keeper(
    size: int | None, bits: Bits, info: Mapping[str, Any]
) -> Callable[[Recovery], None] | None:
    """What holds the codes to the size of a file while they are trained; None if nothing has to.

    Without it they spread, and a file that was small enough at first is too large in the end.
    """
    schemes = {bits} if isinstance(bits, str) else {s for of in bits.values() for s in of.values()}
    if size is None or not all(scheme == RATE or scheme.startswith("int") for scheme in schemes):
        return None
    return partial(_squeeze, size=size, bits=bits, info=info)


def _squeeze(recovery: Recovery, size: int, bits: Bits, info: Mapping[str, Any]) -> None:
    """Say how many bits the codes may take, by what they take in the file that there would be now.

    Raises:
        BudgetError: everything but the codes is too large already.
    """
    contents = _contents(recovery, bits, 1.0)
    assert contents is not None
    now = model_size(recovery.student, info, contents)
    constant = {
        name: replace(
            of,
            arrays={
                array: torch.zeros_like(values) if array.endswith("/codes") else values
                for array, values in of.arrays.items()
            },
        )
        for name, of in contents.items()
    }
    fixed = model_size(recovery.student, info, constant)
    allowed = (1 - SLACK) * size - fixed
    if allowed <= 0:
        raise BudgetError(
            f"a file of {size:,} bytes is too small: {fixed:,} bytes of it are not codes; "
            "squeeze less, so that more channels are removed"
        )
    recovery.squeeze(recovery.bits() * allowed / max(now - fixed, 1))


def _rounding(
    model: NerfModel,
    trained: tuple[str, ...],
    bits: Bits,
    few: Mapping[str, Packed] | None = None,
) -> dict[str, dict[str, RoundedLayer]]:
    """How the layers are rounded from now on: beginning with what quantising them now gives.

    Where `few` is given, beginning with its tables: how finely each row is rounded was chosen when
    the file was fitted, and training moves the weights on those grids.
    """
    layers: dict[str, dict[str, RoundedLayer]] = {}
    for name in trained:
        network = network_of(model.stored()[name])
        if few is None:
            schemes = schemes_of(bits, name, network, TRAINED_SCHEMES[-1])
            tables = quantize(network, schemes).tables
        else:
            schemes = few[name].schemes()
            tables = {
                layer: {"scale": few[name].arrays[f"{layer}/scale"]} for layer in network.weights
            }
        layers[name] = {
            layer: RoundedLayer.begin(schemes[layer], weight, tables[layer])
            for layer, weight in network.weights.items()
        }
    return layers


def _written(
    path: Path,
    recovery: Recovery,
    most: int | None,
    bits: Bits,
    info: Mapping[str, Any],
    pruned: Mapping[str, Pruned],
    seconds: float,
) -> Recovered:
    """Write the file of a model that was trained, and read it back."""
    size = write_trained(path, recovery, bits, info, most)
    final = recovery.student
    if bits != "fp32":
        final = load_model(path)[0].to(recovery.device)
    return Recovered(Compressed(final, pruned, size, bits), {"recover_seconds": seconds})


def write_trained(
    path: Path, recovery: Recovery, bits: Bits, info: Mapping[str, Any], most: int | None = None
) -> int:
    """Write the model file, few-bit weights as they were trained; gives its size.

    Args:
        path: the file.
        recovery: the trained model and its rounding.
        bits: how weights are stored.
        info: kept in the file.
        most: bytes that the file may have. Where coded weights need more, their grids are made a
            little coarser, as little as is enough.

    Raises:
        BudgetError: the file is larger and cannot be made smaller so.
    """
    model, factor = recovery.student, 1.0
    for _ in range(MOST_COARSER):
        contents = _contents(recovery, bits, factor)
        size = model_size(model, info, contents)
        if most is None or size <= most:
            if factor > TOLD_FROM:
                logger.warning(
                    "the codes of %s did not fit %s bytes after training; their grids were made "
                    "%.2f times as coarse: recover for longer, or prune to less",
                    path.name,
                    f"{most:,}",
                    factor,
                )
            return save_model(path, model, info, contents)
        if not any(layer.start.get("scale") is not None for layer in _layers(recovery)):
            break
        factor *= COARSER
    raise BudgetError(f"the trained file has {size:,} bytes where {most:,} are allowed")


def _layers(recovery: Recovery) -> Iterator[RoundedLayer]:
    for of in recovery.rounding.values():
        yield from of.values()


def _contents(recovery: Recovery, bits: Bits, factor: float) -> dict[str, Packed] | None:
    """The stored networks: what was trained rounded as it was trained, the rest rounded now."""
    model = recovery.student
    if not recovery.rounding:
        return packed(model, bits)
    contents = {}
    for name, field in model.stored().items():
        network = network_of(field)
        if name not in recovery.rounding:
            schemes = schemes_of(bits, name, network, TRAINED_SCHEMES[-1])
            arrays = quantize(network, schemes).tensors()
        else:
            schemes = {layer: of.scheme for layer, of in recovery.rounding[name].items()}
            codes, tables = {}, {}
            for layer, trained in recovery.rounding[name].items():
                rounded = trained.coarser(factor)
                weight, bias = network.weights[layer], network.biases[layer]
                stored, tables[layer] = rounded.stored(weight, bias)
                if stored is not None:
                    codes[layer] = stored
            arrays = Quantized(network.graph, schemes, codes, tables).tensors()
        contents[name] = Packed.by_layer(field.shape, schemes, arrays)
    return contents
