"""Where the two halves meet: a radiance field as a network to prune, and rays as its samples.

`nerf` knows nothing of pruning and `pruning` nothing of NeRF; this module translates.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nerf.cameras import Rays, view_rays
from nerf.detail import detail, weighted_order
from nerf.encoding import encode
from nerf.field import Field, FieldShape, NerfModel
from nerf.rendering import RenderSettings, evaluate_pass, fine_samples, render_weights
from nerf.sampling import stratified
from nerf.scenes import Scene
from nerf.validation import training_pixels
from orchestrator.spec.sweep import Weighting
from pruning import (
    GRADIENT_MOMENTS,
    CalibrationBatch,
    Cell,
    Layer,
    LayerGraph,
    NestedStatistics,
    Network,
    Statistics,
    cells,
    collect,
    collect_gradients,
    probe,
)
from pruning.gradients import Loss

# Rays at once in a calibration pass: their samples' activations must fit the memory.
CPU_RAYS = 256
CUDA_RAYS = 1024


Prunable = Literal["trunk", "all"]
"""The layers that may lose channels: the hidden ones, or the feature layer and view branch too."""

HEADS = ("density", "rgb")


def graph_of(shape: FieldShape, prunable: Prunable = "trunk") -> LayerGraph:
    """A field's layers as pruning describes them; its outputs, density and rgb, always stay."""
    return LayerGraph(
        external={"point": shape.point_features, "direction": shape.direction_features},
        layers=tuple(
            Layer(
                spec.name,
                spec.inputs,
                spec.relu,
                prunable=spec.name.startswith("trunk.")
                or (prunable == "all" and spec.name not in HEADS),
            )
            for spec in shape.layers()
        ),
    )


def network_of(field: Field, prunable: Prunable = "trunk") -> Network:
    """A field as a network to prune; it shares the field's weights."""
    modules = dict(field.named_modules())
    names = [spec.name for spec in field.shape.layers()]
    return Network(
        graph_of(field.shape, prunable),
        {name: modules[name].weight.detach() for name in names},
        {name: modules[name].bias.detach() for name in names},
    )


def field_of(network: Network, dense: FieldShape) -> Field:
    """The field that a (physically smaller) network is, on the network's device.

    Args:
        network: what pruning made of a field.
        dense: the shape of that field: its skip and encodings stay.
    """
    shape = replace(
        dense,
        trunk=tuple(network.width(f"trunk.{i}") for i in range(len(dense.trunk))),
        feature=network.width("feature"),
        view=network.width("view"),
    )
    field = Field(shape).to(network.biases["rgb"].device)
    state = {f"{name}.weight": weight for name, weight in network.weights.items()}
    state |= {f"{name}.bias": bias for name, bias in network.biases.items()}
    field.load_state_dict(state)
    return field


@dataclass(frozen=True)
class RayBatch(CalibrationBatch):
    """Calibration samples in whole rays, with what a loss on the rays' colours needs.

    Attributes:
        t: distance of each sample (NDC or scene units).
        lengths: |d| of each ray.
        photo: colour of each ray's pixel.
    """

    t: Float[Tensor, "rays samples"] = field(kw_only=True)
    lengths: Float[Tensor, " rays"] = field(kw_only=True)
    photo: Float[Tensor, "rays 3"] = field(kw_only=True)


class CalibrationSamples:
    """The samples that one network sees on calibration rays; can be gone through again and again.

    Args:
        model: the dense model, which places the samples.
        network: ``coarse`` or ``fine``.
        scene: whose training views give the rays.
        wanted: the cells of the rank space.
        seed: of the set.
        weighting: of the samples.
        validation: the fraction of pixels that the training left out; no set draws them either.
    """

    def __init__(
        self,
        model: NerfModel,
        network: str,
        scene: Scene,
        wanted: Iterable[Cell],
        seed: int,
        weighting: Weighting = "uniform",
        validation: float = 0.0,
    ) -> None:
        self._arguments = (model, network, scene, tuple(wanted), seed, weighting, validation)

    def __iter__(self) -> Iterator[RayBatch]:
        return calibration_batches(*self._arguments)


def calibrate(
    model: NerfModel,
    scene: Scene,
    views: Iterable[int],
    rays: Iterable[int],
    seed: int,
    moments: tuple[str, ...],
    prunable: Prunable = "trunk",
    weighting: Weighting = "uniform",
    validation: float = 0.0,
) -> dict[str, NestedStatistics]:
    """Statistics of both networks over nested calibration sets.

    One pass over the rays for each network; a second one, forwards and backwards, where moments
    need the gradient of the training loss, and a third for ``curvature``.

    Args:
        model: the dense model.
        scene: whose training views give the rays; held-out views are never touched.
        views: set sizes in views.
        rays: set sizes in rays a view.
        seed: draws the order of views, and of the pixels of each.
        moments: what to collect.
        prunable: whose outputs to look at.
        weighting: how much each sample counts: all alike, or by its render weight.
        validation: the fraction of pixels that the training left out; no set draws them either.

    Returns:
        By network; ``subset((views, rays))`` gives the statistics of one set.
    """
    wanted = cells(sorted(set(views)), sorted(set(rays)))
    plain = tuple(m for m in moments if m not in GRADIENT_MOMENTS)
    of_photos = {m: m for m in moments if m in GRADIENT_MOMENTS and m != "curvature"}
    collected = {}
    for name, field_of_name in model.networks().items():
        network = network_of(field_of_name, prunable)
        samples = CalibrationSamples(model, name, scene, wanted, seed, weighting, validation)
        per_ray = model.samples.coarse + (model.samples.fine if name == "fine" else 0)
        passes = []
        if plain:
            passes.append(collect(network, samples, plain))
        if of_photos:
            found = collect_gradients(network, samples, photo_loss(scene), per_ray)
            passes.append(found.only(of_photos))
        if "curvature" in moments:
            found = collect_gradients(network, samples, probe_loss(scene, name, seed), per_ray)
            passes.append(found.only({"fisher": "curvature"}))
        collected[name] = reduce(NestedStatistics.joined, passes)
    return collected


def photo_loss(scene: Scene) -> Loss:
    """Σ over rays of the squared error against the photo, mean over colours: the training loss."""

    def loss(outputs: Mapping[str, Tensor], batch: CalibrationBatch) -> Tensor:
        colors, _ = _composited(outputs, batch, scene)
        return (colors - batch.photo).square().mean(dim=-1).sum()  # type: ignore[attr-defined]

    return loss


def probe_loss(scene: Scene, network: str, seed: int) -> Loss:
    """What a network is for, probed with random signs (see `pruning.probe`).

    The fine network is there for the pixels' colours. The coarse one only places samples, so what
    counts of it are its render weights.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def loss(outputs: Mapping[str, Tensor], batch: CalibrationBatch) -> Tensor:
        colors, weights = _composited(outputs, batch, scene)
        device = colors.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        return probe(colors if network == "fine" else weights, generators[device])

    return loss


def _composited(
    outputs: Mapping[str, Tensor], batch: CalibrationBatch, scene: Scene
) -> tuple[Float[Tensor, "rays 3"], Float[Tensor, "rays samples"]]:
    """Colours and render weights of the rays of a batch."""
    if not isinstance(batch, RayBatch):
        raise TypeError(f"a loss on colours needs whole rays, got a {type(batch).__name__}")
    rays, samples = batch.t.shape
    density = outputs["density"].view(rays, samples)
    weights = render_weights(density, batch.t, batch.lengths)
    raw = outputs["rgb"].view(rays, samples, 3)
    colors = (weights[..., None] * torch.sigmoid(raw)).sum(dim=1)
    if scene.white_background:
        colors = colors + (1 - weights.sum(dim=1, keepdim=True))
    return colors, weights


@torch.no_grad()
def calibration_batches(
    model: NerfModel,
    network: str,
    scene: Scene,
    wanted: Iterable[Cell],
    seed: int,
    weighting: Weighting = "uniform",
    validation: float = 0.0,
) -> Iterator[RayBatch]:
    """The samples that one network sees on the calibration rays, without jitter or noise.

    The coarse network sees the evenly spaced samples; the fine one those and the samples that the
    coarse network's render weights place. Weighted by `render`, each counts by the Tᵢαᵢ that the
    network itself gives it; by `detail`, rays are drawn more often where their photo has detail.
    """
    of_network = model.networks()[network]
    settings = RenderSettings(scene.near, scene.far, scene.white_background)
    for cell, rays, photo in _ray_chunks(scene, wanted, seed, model.device, weighting, validation):
        t = stratified(len(rays), model.samples.coarse, scene.near, scene.far, None, model.device)
        if network == "fine":
            t = fine_samples(model, evaluate_pass(model.coarse, rays, t, settings))
        weights = None
        if weighting == "render":
            weights = evaluate_pass(of_network, rays, t, settings).render_weights.flatten()
        points = rays.origins[:, None, :] + rays.directions[:, None, :] * t[..., None]
        directions = encode(rays.view_directions, of_network.shape.direction_octaves)
        yield RayBatch(
            {
                "point": encode(points.reshape(-1, 3), of_network.shape.point_octaves),
                "direction": directions.repeat_interleave(t.shape[1], dim=0),
            },
            weights,
            cell,
            t=t,
            lengths=rays.directions.norm(dim=-1),
            photo=photo,
        )


def _ray_chunks(
    scene: Scene,
    wanted: Iterable[Cell],
    seed: int,
    device: torch.device,
    weighting: Weighting = "uniform",
    validation: float = 0.0,
) -> Iterator[tuple[Cell, Rays, Float[Tensor, "rays 3"]]]:
    size = CUDA_RAYS if device.type == "cuda" else CPU_RAYS
    order = torch.randperm(len(scene.train), generator=torch.Generator().manual_seed(seed))
    pixel_orders: dict[int, Tensor] = {}
    for cell in wanted:
        parts, photos = [], []
        for rank in range(cell.start[0], cell.stop[0]):
            view = scene.train[int(order[rank])]
            if view not in pixel_orders:
                order_of_all = _pixel_order(scene, view, seed, weighting)
                free = training_pixels(scene, validation, view)
                pixel_orders[view] = order_of_all[free[order_of_all]]
            picked = pixel_orders[view][cell.start[1] : cell.stop[1]]
            photo = torch.from_numpy(scene.images[view].reshape(-1, 3))
            photos.append(photo[picked].float().to(device))
            pose = torch.as_tensor(scene.poses[view], dtype=torch.float32, device=device)
            parts.append(view_rays(scene.camera, pose, picked.to(device)))
        rays, colors = Rays.concatenate(parts), torch.cat(photos)
        for start in range(0, len(rays), size):
            yield cell, rays[start : start + size], colors[start : start + size]


def _pixel_order(scene: Scene, view: int, seed: int, weighting: Weighting) -> Tensor:
    """The order in which a view's pixels join the calibration set."""
    generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + view)
    if weighting == "detail":
        return weighted_order(detail(torch.from_numpy(scene.images[view]).float()), generator)
    return torch.randperm(scene.camera.height * scene.camera.width, generator=generator)


def as_one(statistics: Mapping[str, Statistics]) -> dict[str, torch.Tensor]:
    """Statistics of one calibration set, by network, as a flat dictionary of tensors."""
    return {
        f"{network}:{name}": tensor
        for network, of_network in statistics.items()
        for name, tensor in NestedStatistics({Cell(): of_network}).to_tensors().items()
    }


def from_one(tensors: Mapping[str, object]) -> dict[str, Statistics]:
    """The inverse of `as_one`; takes tensors or (read-only) numpy arrays."""
    by_network: dict[str, dict[str, object]] = {}
    for name, tensor in tensors.items():
        network, _, rest = name.partition(":")
        by_network.setdefault(network, {})[rest] = tensor
    return {
        network: NestedStatistics.from_tensors(of_network).subset()  # type: ignore[arg-type]
        for network, of_network in by_network.items()
    }
