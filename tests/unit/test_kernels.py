"""The fused kernels against a float64 reference: forward and every gradient, odd sizes included.

Where there is a GPU the kernels run on it. Elsewhere the plain ones run in Triton's interpreter, in
fp32 (exact enough for a tight comparison); the Hopper ones are skipped (`test_kernel_plan` checks
how they lay things out).

The reference computes in float64 and rounds to bf16 exactly where the kernels do (or nowhere), so
that a flipped ReLU is an error and not noise; without rounding it is compared with autograd.

Of fp32 kernels that asks for problems that fp32 can solve. sin(2⁹ x) is off by about 5e-5 where x
is off by its last bit, hence pre-activations by up to 1.1e-4 of their spread, and

- a ReLU within that of zero may be flipped, which alone is 1e-3 of a gradient: samples that have
  one (`decided`) get no gradients of their outputs;
- a gradient that rests on one small activation is off as much as that is: fields are those of seeds
  with which every layer is alive in most samples.
"""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: no fused kernels", allow_module_level=True)

import triton_interpreter

triton_interpreter.use_interpreter_without_gpu()  # before anything imports Triton

import triton
import triton.language as tl

from nerf.encoding import encode
from nerf.field import Field, FieldShape

with triton_interpreter.unchecked_imports():
    from nerf.kernels import encode as encode_kernel
    from nerf.kernels import mlp, uniform
    from nerf.kernels.mlp import HOPPER, FusedField, Launch, PackedField
    from nerf.kernels.plan import plan_for

# PyTorch's own remark about the thread in which autograd runs, on a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")

MARGIN = 3e-4  # of a pre-activation from zero, in units of its layer's spread, see above
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HOPPER_GPU = GPU and torch.cuda.get_device_capability() == (9, 0)

SHAPES = {
    "deep": FieldShape(trunk=(64, 40, 70, 65), skip=1, feature=30, view=20),
    "odd": FieldShape(trunk=(243, 13, 1, 170), skip=0, feature=33, view=119),
    "one layer": FieldShape(trunk=(40,), skip=None, view=3, feature=2, point_octaves=3),
    "wide": FieldShape(trunk=(256, 192), skip=0, feature=256, view=128),
}
LAUNCHES = {
    "triton fp32": Launch(block=64, warps=4, stages=2, gradient_rows=32, gradient_stages=2,
                          dtype=torch.float32),
    "triton bf16": Launch(),
    "hopper": HOPPER,
}  # fmt: skip


@pytest.fixture(params=LAUNCHES)
def launch(request, monkeypatch):
    chosen = LAUNCHES[request.param]
    if chosen.kind == "hopper" and not HOPPER_GPU:
        pytest.skip("the Hopper kernels need a GPU of compute capability 9.0")
    if not GPU:  # few programs, for the interpreter's sake
        monkeypatch.setattr(mlp, "GATHER_BLOCK", 2**16)
        monkeypatch.setattr(mlp, "REDUCE_BLOCK", 2**16)
    return chosen


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def rays(count, samples, seed=0):
    torch.manual_seed(seed)
    origins = torch.randn(count, 3) * 0.3
    directions = torch.randn(count, 3)
    distances = torch.rand(count, samples)
    unit = torch.nn.functional.normalize(directions, dim=-1)
    return [x.to(DEVICE) for x in (origins, directions, distances, unit)]


def exact(x):
    return x


def bf16(x):
    return x.float().bfloat16().double()


def reference(field, origins, directions, distances, unit, g_density, g_rgb, q):
    """Density, colour, gradients and pre-activations (of the trunk's layers and of view, each
    (samples, width)) of the merged network, in float64, rounded by `q`."""
    shape = field.shape
    w = {name: p.detach().double() for name, p in field.named_parameters()}
    a, d = w["view.weight"].split((shape.feature, shape.direction_features), 1)
    mix = a @ w["feature.weight"]
    points = origins[:, None] + distances[..., None] * directions[:, None]
    e = q(encode(points.double(), shape.point_octaves).flatten(0, 1))
    gamma = encode(unit.double(), shape.direction_octaves)
    share = gamma @ d.t() + w["view.bias"] + a @ w["feature.bias"]
    share = share.repeat_interleave(distances.shape[1], 0)
    inputs, h, z = [], e, []
    for i in range(len(shape.trunk)):
        inputs.append(torch.cat((e, h), 1) if i and i - 1 == shape.skip else h)
        z.append(inputs[i] @ q(w[f"trunk.{i}.weight"]).t() + w[f"trunk.{i}.bias"])
        h_raw = torch.relu(z[-1])
        h = q(h_raw)
    z.append(h @ q(mix).t() + share)
    v_raw = torch.relu(z[-1])
    v = q(v_raw)
    density = h_raw @ w["density.weight"][0] + w["density.bias"]
    rgb = v_raw @ w["rgb.weight"].t() + w["rgb.bias"]

    g = {}
    gs, gc = g_density.double().reshape(-1, 1), g_rgb.double().reshape(-1, 3)
    dv = q((gc @ w["rgb.weight"]) * (v > 0))
    g["rgb.weight"], g["rgb.bias"] = q(gc).t() @ v, q(gc).sum(0)
    g["density.weight"], g["density.bias"] = q(gs).t() @ h, q(gs).sum(0)
    d_mix, total = dv.t() @ h, dv.sum(0)
    per_ray = dv.view(*distances.shape, -1).sum(1)
    d_a = d_mix @ w["feature.weight"].t() + torch.outer(total, w["feature.bias"])
    g["view.weight"], g["view.bias"] = torch.cat((d_a, per_ray.t() @ gamma), 1), total
    g["feature.weight"], g["feature.bias"] = a.t() @ d_mix, a.t() @ total
    dh = dv @ q(mix) + gs @ w["density.weight"]
    for i in range(len(shape.trunk) - 1, -1, -1):
        here = h if i == len(shape.trunk) - 1 else inputs[i + 1][:, -shape.trunk[i] :]
        dz = q(dh * (here > 0))
        g[f"trunk.{i}.weight"], g[f"trunk.{i}.bias"] = dz.t() @ inputs[i], dz.sum(0)
        if i:
            dh = dz @ q(w[f"trunk.{i}.weight"])[:, -shape.trunk[i - 1] :]
    return density.view(distances.shape), rgb.view(*distances.shape, 3), g, z


def decided(z):
    """Samples none of whose pre-activations is near zero, of those of the reference."""
    return torch.stack([(layer.abs() / layer.std()).amin(1) for layer in z]).amin(0) > MARGIN


def alive(z):
    """The share of the samples in which a layer has a channel above zero, in the worst layer."""
    return min(float((layer > 0).any(1).double().mean()) for layer in z)


def error(x, y):
    assert torch.isfinite(x).all()
    return float((x.double() - y).norm() / y.norm().clamp_min(1e-12))


def fields(shape, seed=1):
    torch.manual_seed(seed)
    return Field(shape).to(DEVICE)


def tolerances(launch):
    """Forward, gradients. Kernels that round flip a few ReLUs that fp32 sums decide otherwise."""
    return (1e-5, 1e-4) if launch.dtype == torch.float32 else (2e-3, 2e-2)


def test_reference_is_autograd(shape):
    field = fields(shape)
    given = rays(7, 9)
    g_density, g_rgb = torch.randn(7, 9, device=DEVICE), torch.randn(7, 9, 3, device=DEVICE)
    density, rgb, gradients, _ = reference(field, *given, g_density, g_rgb, exact)
    wide = Field(shape).double().to(DEVICE)
    wide.load_state_dict(field.state_dict())
    origins, directions, distances, unit = given
    points = origins[:, None] + distances[..., None] * directions[:, None]
    outputs = wide(points.double(), unit.double())
    torch.autograd.backward(outputs, (g_density.double(), g_rgb.double()))
    assert error(density, outputs[0].detach()) < 1e-6  # directions of fp32 rays have length 1 ± ε
    assert error(rgb, outputs[1].detach()) < 1e-6
    for name, parameter in wide.named_parameters():
        assert error(gradients[name], parameter.grad) < 1e-6, name


@triton.jit
def _encode(points, out, octaves, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK), tl.arange(0, 64)
    x, y, z = (tl.load(points + row * 3), tl.load(points + row * 3 + 1),
               tl.load(points + row * 3 + 2))  # fmt: skip
    e = encode_kernel.encode_chunk(x, y, z, column, octaves)
    tl.store(out + row[:, None] * 64 + column[None, :], e)


@pytest.mark.parametrize("octaves", [0, 4, 10])
def test_encoding(octaves):
    points = (torch.rand(64, 3, device=DEVICE) * 2 - 1) * 10
    points[0] = 0
    out = torch.full((64, 64), float("nan"), device=DEVICE)
    _encode[(1,)](points, out, octaves, BLOCK=64)
    width = 3 + 6 * octaves
    expected = encode(points.double(), octaves)
    assert (out[:, :width] - expected).abs().max() < 2e-6
    assert (out[:, width:] == 0).all()


@pytest.mark.parametrize("count", [(1, 1), (5, 29), (3, 64)], ids=str)
def test_evaluation(shape, launch, count):
    field = fields(shape)
    given = rays(*count)
    zeros = torch.zeros(*count, device=DEVICE), torch.zeros(*count, 3, device=DEVICE)
    q = exact if launch.dtype == torch.float32 else bf16
    density, rgb, *_ = reference(field, *given, *zeros, q)
    out_density, out_rgb = PackedField(field, launch)(*given)
    tolerance, _ = tolerances(launch)
    assert error(out_density, density) < tolerance
    assert error(out_rgb, rgb) < tolerance


@pytest.mark.skipif(not HOPPER_GPU, reason="the kernels of one width need a Hopper GPU")
@pytest.mark.parametrize("wide_view", [False, True])
@pytest.mark.parametrize("width", uniform.WIDTHS)
def test_evaluation_at_one_width(width, wide_view):
    """Layers narrower than the kernel, rows that end within a tile, more tiles than programs."""
    shape = FieldShape(
        trunk=(width, width - 3, width - 7, width), skip=1, feature=9,
        view=width if wide_view else width // 2 - 1,
    )  # fmt: skip
    field = fields(shape)
    layout = uniform.Uniform(shape, uniform.Width(width))
    for count in ((1, 1), (5, 29), (701, 192)):
        given = rays(*count)
        zeros = torch.zeros(*count, device=DEVICE), torch.zeros(*count, 3, device=DEVICE)
        density, rgb, *_ = reference(field, *given, *zeros, bf16)
        out_density, out_rgb = PackedField(field, HOPPER, layout)(*given)
        assert error(out_density, density) < 2e-3
        assert error(out_rgb, rgb) < 2e-3


@pytest.mark.parametrize(("factor", "used"), [(1.0, True), (1.2, False), (float("nan"), False)])
def test_a_kernel_of_one_width_that_is_wrong_is_not_used(monkeypatch, caplog, factor, used):
    def launch_forward(packed, _origins, _directions, _distances, _share, density, rgb):
        density.fill_(1.0)
        rgb.fill_(1.0 if packed.uniform is None else factor)

    monkeypatch.setattr(mlp, "launch_forward", launch_forward)
    mlp._uniform_fault.cache_clear()
    plan = plan_for(FieldShape(trunk=(64,) * 8, feature=64, view=32))
    layout = mlp.uniform_layout(plan, HOPPER, torch.device(DEVICE))
    mlp._uniform_fault.cache_clear()
    assert (layout is not None) == used
    assert ("width 64 is not used" in caplog.text) != used


@pytest.mark.parametrize("count", [(5, 29), (1, 64), (70, 40)] if GPU else [(5, 29), (1, 64)],
                         ids=str)  # fmt: skip
def test_training(shape, launch, count):
    """Forward and every gradient, then again with other weights and rays."""
    fused = FusedField(shape, *count, DEVICE, launch)
    in_fp32 = launch.dtype == torch.float32
    q, seeds = (exact, (4, 7)) if in_fp32 else (bf16, (1, 2))
    for seed in seeds if GPU or shape is SHAPES["deep"] else seeds[:1]:
        field = fields(shape, seed)
        given = rays(*count, seed)
        g_density = torch.randn(*count, device=DEVICE)
        g_rgb = torch.randn(*count, 3, device=DEVICE)
        density, rgb, gradients, z = reference(field, *given, g_density, g_rgb, q)
        if in_fp32:
            counted = decided(z).view(count)
            assert min(alive(z), float(counted.double().mean())) > 0.5
            g_density, g_rgb = g_density * counted, g_rgb * counted[..., None]
            _, _, gradients, _ = reference(field, *given, g_density, g_rgb, q)
        fused.load(field)
        fused.activations.fill_(float("nan"))
        fused.partials.fill_(float("nan"))
        origins, directions, distances, unit = given
        encoded = encode(unit, shape.direction_octaves)
        out = fused.forward(origins, directions, distances, encoded)
        tolerance, gradient_tolerance = tolerances(launch)
        assert error(out[0], density) < tolerance
        assert error(out[1], rgb) < tolerance
        flat = fused.backward(g_density, g_rgb)
        found = fused.plan.views(fused.extended_gradients)
        for name, gradient in gradients.items():
            assert error(found[name], gradient) < gradient_tolerance, name
        again = flat.clone()
        assert torch.equal(fused.backward(g_density, g_rgb), again)


def test_autograd(launch):
    shape = SHAPES["deep"]
    field, given = fields(shape), rays(3, 10)
    fused = FusedField(shape, 3, 10, DEVICE, launch)
    fused.load(field)
    parameters = fused.parameters.clone().requires_grad_()
    encoded = encode(given[3], shape.direction_octaves)
    density, rgb = mlp.evaluate(parameters, fused, *given[:3], encoded)
    (density.square().sum() + rgb.square().sum()).backward()
    g_density, g_rgb = 2 * density.detach(), 2 * rgb.detach()
    q = exact if launch.dtype == torch.float32 else bf16
    _, _, gradients, _ = reference(field, *given, g_density, g_rgb, q)
    for name, gradient in gradients.items():
        offset, size = fused.plan.parameters[name]
        found = parameters.grad[offset : offset + gradient.numel()].view(size)
        assert error(found, gradient) < tolerances(launch)[1], name


def test_weights_return_to_a_field(launch):
    shape = SHAPES["odd"]
    field, other = fields(shape, 1), fields(shape, 2)
    fused = FusedField(shape, 1, 1, DEVICE, launch)
    fused.load(field)
    fused.store(other)
    for a, b in zip(field.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
