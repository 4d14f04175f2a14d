"""Models as ONNX, for viewers and engines that know no Python.

The graph maps points and directions to what volume rendering needs, for both networks:

    points      float32 (samples, 3)    positions, in scene units or NDC
    directions  float32 (samples, 3)    unit view directions
    coarse_density, fine_density        σ ≥ 0, (samples)
    coarse_rgb, fine_rgb                colours in [0, 1], (samples, 3)

An engine computes only what is asked for, so asking for the coarse outputs costs the coarse network
alone. The positional encoding is part of the graph. Where the samples lie, and how their colours
become a pixel, is the business of whoever renders; the file's metadata say how many samples the
model was made for.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nerf.errors import CheckpointError
from nerf.field import Field, NerfModel
from nerf.files import replacing

OPSET = 17


def export_onnx(path: Path, model: NerfModel, info: Mapping[str, Any]) -> None:
    """Write a model as ONNX.

    Args:
        path: the file.
        model: the networks; a shared one is written once.
        info: plain data about where the model comes from, kept as metadata.

    Raises:
        CheckpointError: the package `onnx` is not installed, or the file cannot be written.
    """
    try:
        import onnx  # noqa: PLC0415  (optional)
    except ImportError as error:
        raise CheckpointError(
            "exporting to ONNX needs the package `onnx`: pip install prunefield[onnx]"
        ) from error
    graph = _Graph(onnx.helper)
    for name, field in model.stored().items():
        graph.field(name, field)
    outputs = []
    for name in ("coarse", "fine"):
        source = "fine" if model.shared else name
        for what in ("density", "rgb"):
            graph.node("Identity", [f"{source}/{what}"], f"{name}_{what}")
        outputs += [
            graph.value(f"{name}_density", ("samples",)),
            graph.value(f"{name}_rgb", ("samples", 3)),
        ]
    inputs = [graph.value("points", ("samples", 3)), graph.value("directions", ("samples", 3))]
    made = onnx.helper.make_model(
        onnx.helper.make_graph(graph.nodes, "nerf", inputs, outputs, graph.tensors),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        producer_name="prunefield",
        ir_version=10,
    )
    counts = {"coarse": model.samples.coarse, "fine": model.samples.fine}
    onnx.helper.set_model_props(
        made, {"samples": json.dumps(counts), "info": json.dumps(dict(info))}
    )
    onnx.checker.check_model(made, full_check=True)
    with replacing(path) as temporary:
        temporary.write_bytes(made.SerializeToString())


class _Graph:
    """Nodes and constants under construction.

    Args:
        helper: `onnx.helper`.
    """

    def __init__(self, helper: Any) -> None:
        self.helper = helper
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self._encoded: dict[tuple[str, int], str] = {}

    def value(self, name: str, shape: tuple[str | int, ...]) -> Any:
        """An input or output."""
        return self.helper.make_tensor_value_info(name, 1, shape)  # 1 is float32

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """An operation; gives the name of its output."""
        self.nodes.append(self.helper.make_node(operator, inputs, [output], **attributes))
        return output

    def constant(self, name: str, values: Tensor | np.ndarray) -> str:
        """A constant (integers stay integers, all else is float32)."""
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
        kind = 7 if array.dtype == np.int64 else 1
        array = np.ascontiguousarray(array if kind == 7 else array.astype(np.float32))
        self.tensors.append(
            self.helper.make_tensor(name, kind, array.shape, array.tobytes(), raw=True)
        )
        return name

    def encoded(self, source: str, octaves: int) -> str:
        """The positional encoding of an input: x, sin x, cos x, sin 2x, … (see `encoding`)."""
        key = (source, octaves)
        if key in self._encoded:
            return self._encoded[key]
        parts = [source]
        for octave in range(octaves):
            where = f"{source}/{octave}of{octaves}"
            factor = self.constant(f"{where}/factor", np.array([2.0**octave], dtype=np.float32))
            angle = self.node("Mul", [source, factor], f"{where}/angle")
            parts += [
                self.node("Sin", [angle], f"{where}/sin"),
                self.node("Cos", [angle], f"{where}/cos"),
            ]
        name = f"{source}/encoded{octaves}"
        self._encoded[key] = self.node("Concat", parts, name, axis=-1) if octaves else source
        return self._encoded[key]

    def field(self, name: str, field: Field) -> None:
        """One network, to ``NAME/density`` and ``NAME/rgb``."""
        shape, modules = field.shape, dict(field.named_modules())
        computed = {
            "point": self.encoded("points", shape.point_octaves),
            "direction": self.encoded("directions", shape.direction_octaves),
        }
        for spec in shape.layers():
            module = modules[spec.name]
            if not isinstance(module, torch.nn.Linear):
                raise TypeError(f"{spec.name} is no linear layer")
            where = f"{name}/{spec.name}"
            parts = [computed[source] for source in spec.inputs]
            x = parts[0] if len(parts) == 1 else self.node("Concat", parts, f"{where}/x", axis=-1)
            weight = self.constant(f"{where}/weight", module.weight)
            bias = self.constant(f"{where}/bias", module.bias)
            z = self.node("Gemm", [x, weight, bias], f"{where}/z", transB=1)
            computed[spec.name] = self.node("Relu", [z], f"{where}/a") if spec.relu else z
        axis = self.constant(f"{name}/axis", np.array([1], dtype=np.int64))
        density = self.node("Relu", [computed["density"]], f"{name}/sigma")
        self.node("Squeeze", [density, axis], f"{name}/density")
        self.node("Sigmoid", [computed["rgb"]], f"{name}/rgb")
