"""The layout for the kernels of one width, read as these read it (no Triton, no GPU needed)."""

import pytest
import torch

from nerf.encoding import encode
from nerf.field import Field, FieldShape
from nerf.kernels import hopper, uniform
from nerf.kernels.plan import Plan
from nerf.kernels.uniform import Uniform, Width

SHAPES = {
    "narrow": FieldShape(trunk=(64,) * 8, feature=64, view=32),
    "odd": FieldShape(trunk=(45, 13, 33), skip=1, feature=9, view=20),
    "wide view": FieldShape(trunk=(30, 31), skip=0, feature=9, view=32),
    "one layer": FieldShape(trunk=(16,), skip=None, feature=2, view=3, point_octaves=3),
    "streamed": FieldShape(trunk=(128, 120, 127), skip=1, feature=60, view=70),
}


def layout_of(shape):
    widest = max(*shape.trunk, shape.view)
    return Uniform(shape, Width(next(w for w in uniform.WIDTHS if w >= widest)))


class Panels:
    """Reads panels one after another, as wgmma does from its descriptor."""

    def __init__(self, flat):
        self.flat, self.at = flat, 0

    def matrix(self, outputs, inputs):
        """The next inputs / 16 panels as one matrix (outputs, inputs)."""
        n, k = torch.arange(outputs)[:, None], torch.arange(16)[None, :]
        # Numbers of two bytes: 8 outputs are 256 bytes further, 8 inputs 128, an output 16.
        place = n // 8 * 128 + k // 8 * 64 + n % 8 * 8 + k % 8
        columns = []
        for _ in range(inputs // 16):
            columns.append(self.flat[self.at + place])
            self.at += outputs * 16
        return torch.cat(columns, 1)


def columns_of(vector):
    """Undo the exchange as threads do: of 16, thread q holds columns 2q, 2q + 1, 2q + 8, 2q + 9."""
    found = torch.empty_like(vector)
    for j in range(0, vector.shape[-1], 16):
        for q in range(4):
            for i, column in enumerate((2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9)):
                found[..., j + column] = vector[..., j + 4 * q + i]
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_a_network_read_from_its_panels_is_the_network(name):
    shape = SHAPES[name]
    layout, width = layout_of(shape), layout_of(shape).width.width
    torch.manual_seed(0)
    field = Field(shape).double()
    weights = {n: p.detach() for n, p in field.named_parameters()}
    feature, direction = weights["view.weight"].split((shape.feature, shape.direction_features), 1)
    weights["mix.weight"] = feature @ weights["feature.weight"]
    constant = weights["view.bias"] + feature @ weights["feature.bias"]
    panels, vector = Panels(layout.panels(weights)), layout.vector(weights)
    assert len(panels.flat) * 2 == layout.weight_bytes
    assert len(vector) == layout.vector_size

    points, unit = torch.rand(5, 7, 3).double(), torch.rand(5, 3).double()
    expected = field(points, unit)
    encoded = torch.zeros(35, 64).double()
    encoded[:, : shape.point_features] = encode(points, shape.point_octaves).view(35, -1)
    padding = layout.view_columns - shape.view
    share = torch.nn.functional.pad(encode(unit, 4) @ direction.t() + constant, (0, padding))
    share = uniform.exchanged(share.t()).t().repeat_interleave(7, 0)

    h = None
    for layer in range(len(shape.trunk)):
        bias = columns_of(vector[layer * width : (layer + 1) * width])
        d = bias.expand(35, width)
        if layout.points >> layer & 1:
            d = d + encoded @ panels.matrix(width, 64).t()
        if layer:
            d = d + h @ panels.matrix(width, width).t()
        h = d.relu()
    at = len(shape.trunk) * width
    density = h @ columns_of(vector[at : at + width]) + vector[-4]
    v = (columns_of(share) + h @ panels.matrix(layout.view_columns, width).t()).relu()
    heads = columns_of(vector[at + width : -4].view(3, layout.view_columns))
    assert panels.at == len(panels.flat)
    torch.testing.assert_close(density.view(5, 7), expected[0])
    torch.testing.assert_close((v @ heads.t() + vector[-3:]).view(5, 7, 3), expected[1])


@pytest.mark.parametrize("width", uniform.WIDTHS)
def test_the_original_network_at_every_width_fits(width):
    shape = FieldShape(trunk=(width,) * 8, feature=width, view=width // 2)
    layout = uniform.uniform_for(Plan(shape))
    assert layout.width == Width(width)
    assert layout.shared_bytes <= uniform.SHARED_LIMIT
    assert layout.width.threads <= 1024
    registers = 65_536 // layout.width.threads // 8 * 8
    assert registers * layout.width.threads <= 65_536
    # Accumulators and activations of a thread, and 30 registers for everything else.
    needed = width // 2 + width // 4 + 30
    assert needed <= (registers if layout.width.resident else layout.width.registers)
    if not layout.width.resident:
        streaming = 128 * (layout.width.groups * layout.width.registers + 24)
        assert streaming <= 65_536


def test_what_padding_would_make_slower_is_left_to_the_chain():
    assert uniform.uniform_for(Plan(FieldShape())) is None  # no granularity to gain
    uneven = FieldShape(trunk=(224, *(20,) * 7), feature=20, view=10)
    assert uniform.uniform_for(Plan(uneven)) is None
    deep = FieldShape(trunk=(32,) * 40, skip=None, feature=8, view=8)
    assert uniform.uniform_for(Plan(deep)) is None
    many = FieldShape(trunk=(96,) * 14, skip=None, feature=8, view=8)
    assert uniform.uniform_for(Plan(many)) is None  # its weights do not fit


def test_a_kernels_name_tells_its_width():
    for width in (Width(64), Width(64, 4), Width(160)):
        assert uniform.width_of(width.name) == Width(width.width, width.groups)
        text = hopper.source(width.name, hopper.Build())
        assert f"#define WIDTH {width.width}\n" in text
        assert f"wgmma.mma_async.sync.aligned.m64n{width.width}k16" in text
        assert f"wgmma.mma_async.sync.aligned.m64n{width.half}k16" in text


def test_compiling_ahead_fills_the_cache_and_ends_at_an_error(monkeypatch):
    asked = []

    def cubin(module, _build):
        asked.append(module)
        if module == "b":
            raise RuntimeError("no compiler")
        return b""

    monkeypatch.setattr(hopper, "cubin", cubin)
    hopper.compile_ahead(hopper.Build(), ["a", "b", "c"]).join()
    assert asked == ["a", "b"]
