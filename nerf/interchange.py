"""Checkpoints of nerf-pytorch (``.tar``), read and written.

Such a file is a `torch.save` of ``network_fn_state_dict`` (coarse), ``network_fine_state_dict``
(fine), ``global_step`` and the optimiser's state. It is a pickle, so it is only ever loaded with
``weights_only=True``: tensors and plain containers, no code.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nerf.encoding import encoded_width
from nerf.errors import CheckpointError
from nerf.field import Field, FieldShape, NerfModel, SampleCounts
from nerf.files import replacing

THEIR_NAMES = {
    "trunk": "pts_linears",
    "density": "alpha_linear",
    "feature": "feature_linear",
    "view": "views_linears.0",
    "rgb": "rgb_linear",
}
MAX_OCTAVES = 32
THEIR_SKIP = 4


def import_tar(path: Path, samples: SampleCounts) -> tuple[NerfModel, dict[str, Any]]:
    """Read a nerf-pytorch checkpoint.

    Args:
        path: the ``.tar`` file.
        samples: sample counts to render with; the file does not tell.

    Returns:
        The model, and ``{"source": "nerf-pytorch", "iterations": global_step}``. A file without a
        fine network gives its coarse network in both places.

    Raises:
        CheckpointError: the file is unreadable, unsafe, or of another shape.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it holds more than tensors and plain containers, so loading it "
            "could run code (or it is damaged); export the weights alone, or copy it again"
        ) from error
    except Exception as error:  # whatever a damaged pickle leads its reader into
        raise CheckpointError(
            f"{path} is not a readable PyTorch checkpoint ({type(error).__name__}: {error}); it "
            "may be truncated or of another program: copy it again"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("network_fn_state_dict"), dict):
        raise CheckpointError(
            f"{path} has no network_fn_state_dict, so it is not a nerf-pytorch checkpoint"
        )
    coarse = _read_field(content["network_fn_state_dict"], f"{path}: network_fn_state_dict")
    fine_state = content.get("network_fine_state_dict")
    fine = (
        _read_field(fine_state, f"{path}: network_fine_state_dict")
        if isinstance(fine_state, dict)
        else _read_field(content["network_fn_state_dict"], str(path))
    )
    step = content.get("global_step", 0)
    if not isinstance(step, int):
        raise CheckpointError(f"{path}: global_step must be a whole number, got {step!r:.80}")
    return NerfModel(coarse, fine, samples), {"source": "nerf-pytorch", "iterations": step}


def export_tar(path: Path, model: NerfModel, iterations: int) -> None:
    """Write a nerf-pytorch checkpoint.

    nerf-pytorch does not start without an optimiser state, so the file holds that of a fresh Adam.

    Args:
        path: the ``.tar`` file.
        model: networks whose hidden layers all have one width W, with W feature channels and
            W // 2 in the view branch, and whose skip is after layer 4 (none in networks of up to
            4 layers): all that nerf-pytorch can build.
        iterations: kept as ``global_step``.

    Raises:
        CheckpointError: the networks have another shape, or the file cannot be written.
    """
    content = {
        "global_step": iterations,
        "network_fn_state_dict": _write_field(model.coarse, "coarse"),
        "network_fine_state_dict": _write_field(model.fine, "fine"),
        "optimizer_state_dict": torch.optim.Adam(
            [*model.coarse.parameters(), *model.fine.parameters()], lr=5e-4
        ).state_dict(),
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)


def _their_name(ours: str) -> str:
    module, _, rest = ours.partition(".")
    return f"{THEIR_NAMES[module]}.{rest}"


def _read_field(state: Mapping[str, Any], where: str) -> Field:
    shape = _infer_shape(state, where)
    field = Field(shape)
    ours = {name: state.get(_their_name(name)) for name in field.state_dict()}
    wrong = [
        f"{_their_name(name)} {tuple(found.shape) if isinstance(found, Tensor) else 'missing'}"
        f" instead of {tuple(wanted.shape)}"
        for name, wanted in field.state_dict().items()
        if not isinstance(found := ours[name], Tensor) or found.shape != wanted.shape
    ]
    extra = sorted(str(name) for name in state.keys() - {_their_name(name) for name in ours})
    if wrong or extra:
        raise CheckpointError(
            f"{where} has another shape than NeRF's network: "
            + "; ".join([*wrong, *(f"unknown {name}" for name in extra)])
        )
    field.load_state_dict({name: t.float() for name, t in ours.items() if t is not None})
    return field


def _infer_shape(state: Mapping[str, Any], where: str) -> FieldShape:
    def size(name: str) -> tuple[int, int]:
        tensor = state.get(f"{name}.weight")
        if not isinstance(tensor, Tensor) or tensor.ndim != 2 or min(tensor.shape) < 1:
            raise CheckpointError(
                f"{where} lacks a 2-D {name}.weight; needed is NeRF's network with view "
                "directions (use_viewdirs)"
            )
        return int(tensor.shape[0]), int(tensor.shape[1])

    depth = 0
    while f"pts_linears.{depth}.weight" in state:
        depth += 1
    if depth == 0:
        raise CheckpointError(f"{where} has no pts_linears, so it is not a nerf-pytorch network")
    sizes = [size(f"pts_linears.{i}") for i in range(depth)]
    point_features = sizes[0][1]
    joined = [i for i in range(1, depth) if sizes[i][1] == sizes[i - 1][0] + point_features]
    feature, view = size("feature_linear")[0], size("views_linears.0")
    octaves = []
    for what, features in (("point", point_features), ("direction", view[1] - feature)):
        matching = [n for n in range(MAX_OCTAVES) if encoded_width(n) == features]
        if not matching:
            raise CheckpointError(
                f"{where}: {features} {what} features are not a positional encoding "
                "(3 + 6 × octaves)"
            )
        octaves.append(matching[0])
    if len(joined) > 1:
        raise CheckpointError(
            f"{where} has skips into layers {joined}; supported is one skip at most"
        )
    return FieldShape(
        trunk=tuple(out for out, _ in sizes),
        skip=joined[0] - 1 if joined else None,
        feature=feature,
        view=view[0],
        point_octaves=octaves[0],
        direction_octaves=octaves[1],
    )


def _write_field(field: Field, network: str) -> dict[str, Tensor]:
    shape, width, depth = field.shape, field.shape.trunk[0], len(field.shape.trunk)
    if set(shape.trunk) != {width} or shape.feature != width or shape.view != width // 2:
        raise CheckpointError(
            f"the {network} network has hidden widths {shape.trunk}, {shape.feature} feature and "
            f"{shape.view} view channels; nerf-pytorch can only hold one width W everywhere, W "
            "features and W // 2 view channels: export safetensors instead"
        )
    if shape.skip != (THEIR_SKIP if depth > THEIR_SKIP else None):
        raise CheckpointError(
            f"the {network} network has {depth} hidden layers and joins the point again after "
            f"layer {shape.skip}; nerf-pytorch does so after layer {THEIR_SKIP}, in networks of 6 "
            f"layers or more, and not at all in those of up to {THEIR_SKIP}: export safetensors "
            "instead"
        )
    return {_their_name(name): t.detach().cpu().clone() for name, t in field.state_dict().items()}
