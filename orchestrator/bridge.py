"""Where the two halves meet: a radiance field as a network to prune, and rays as its samples.

`nerf` knows nothing of pruning and `pruning` nothing of NeRF; this module translates.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch

from nerf.cameras import Rays, view_rays
from nerf.encoding import encode
from nerf.field import Field, FieldShape, NerfModel
from nerf.rendering import RenderSettings, evaluate_pass, fine_samples
from nerf.sampling import stratified
from nerf.scenes import Scene
from nerf.validation import training_pixels
from orchestrator.spec.sweep import Weighting
from pruning import (
    CalibrationBatch,
    Cell,
    Layer,
    LayerGraph,
    NestedStatistics,
    Network,
    Statistics,
    cells,
    collect,
)

# Rays at once in a calibration pass: their samples' activations must fit the memory.
CPU_RAYS = 256
CUDA_RAYS = 4096


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
    """Statistics of both networks over nested calibration sets, in one pass over each.

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
    return {
        name: collect(
            network_of(field, prunable),
            calibration_batches(model, name, scene, wanted, seed, weighting, validation),
            moments,
        )
        for name, field in model.networks().items()
    }


@torch.no_grad()
def calibration_batches(
    model: NerfModel,
    network: str,
    scene: Scene,
    wanted: Iterable[Cell],
    seed: int,
    weighting: Weighting = "uniform",
    validation: float = 0.0,
) -> Iterator[CalibrationBatch]:
    """The samples that one network sees on the calibration rays, without jitter or noise.

    The coarse network sees the evenly spaced samples; the fine one those and the samples that the
    coarse network's render weights place. Weighted by `render`, each counts by the Tᵢαᵢ that the
    network itself gives it.
    """
    field = model.networks()[network]
    settings = RenderSettings(scene.near, scene.far, scene.white_background)
    for cell, rays in _ray_chunks(scene, wanted, seed, model.device, validation):
        t = stratified(len(rays), model.samples.coarse, scene.near, scene.far, None, model.device)
        if network == "fine":
            t = fine_samples(model, evaluate_pass(model.coarse, rays, t, settings))
        weights = None
        if weighting == "render":
            weights = evaluate_pass(field, rays, t, settings).render_weights.flatten()
        points = rays.origins[:, None, :] + rays.directions[:, None, :] * t[..., None]
        directions = encode(rays.view_directions, field.shape.direction_octaves)
        yield CalibrationBatch(
            {
                "point": encode(points.reshape(-1, 3), field.shape.point_octaves),
                "direction": directions.repeat_interleave(t.shape[1], dim=0),
            },
            weights,
            cell=cell,
        )


def _ray_chunks(
    scene: Scene,
    wanted: Iterable[Cell],
    seed: int,
    device: torch.device,
    validation: float = 0.0,
) -> Iterator[tuple[Cell, Rays]]:
    size = CUDA_RAYS if device.type == "cuda" else CPU_RAYS
    order = torch.randperm(len(scene.train), generator=torch.Generator().manual_seed(seed))
    pixels = scene.camera.height * scene.camera.width
    pixel_orders: dict[int, torch.Tensor] = {}
    for cell in wanted:
        parts = []
        for rank in range(cell.start[0], cell.stop[0]):
            view = scene.train[int(order[rank])]
            if view not in pixel_orders:
                generator = torch.Generator().manual_seed((seed + 1) * 1_000_003 + view)
                order_of_all = torch.randperm(pixels, generator=generator)
                free = training_pixels(scene, validation, view)
                pixel_orders[view] = order_of_all[free[order_of_all]]
            picked = pixel_orders[view][cell.start[1] : cell.stop[1]].to(device)
            pose = torch.as_tensor(scene.poses[view], dtype=torch.float32, device=device)
            parts.append(view_rays(scene.camera, pose, picked))
        rays = Rays.concatenate(parts)
        for start in range(0, len(rays), size):
            yield cell, rays[start : start + size]


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
