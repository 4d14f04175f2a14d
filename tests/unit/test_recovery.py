"""Recovery of a model on a tiny scene: the losses, rounded training, stopping and going on."""

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nerf.errors import CheckpointError, TrainingError
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.invented import InventedRays, invented_poses
from nerf.recipe import Squeeze
from nerf.recovery import (
    OPACITY_WEIGHT,
    Answer,
    Recovery,
    RecoveryRecipe,
    Source,
    ask,
    distillation_loss,
)
from nerf.rendering import RenderSettings
from nerf.rounding import RoundedLayer, coded_bits, geometric_entropy, round_network
from orchestrator.bridge import network_of
from pruning import SCHEMES, quantize
from tests.tiny_scene import tiny_scene

SHAPE = FieldShape((12, 11, 10), skip=1, feature=9, view=7, point_octaves=3, direction_octaves=1)
SAMPLES = SampleCounts(6, 5)
ROUNDED = ["int8", "int4", "int2", "uint4", "kmeans4", "kmeans1", "fp16", "bf16"]


def model_of(seed: int = 0, shared: bool = False) -> NerfModel:
    model = NerfModel.create(SHAPE, SAMPLES, seed)
    return NerfModel(model.fine, model.fine, SAMPLES) if shared else model


def recovery_of(
    source: Source = "photos",
    *,
    shared: bool = False,
    trained: tuple[str, ...] | None = None,
    **settings: float,
) -> Recovery:
    recipe = RecoveryRecipe(
        **{"iterations": 20, "rays": 24, "learning_rate": 3e-3, **settings, "source": source}
    )  # type: ignore[arg-type]
    return Recovery(model_of(1, shared), model_of(0), tiny_scene(), recipe, 0, trained)


def rounding_of(model: NerfModel, scheme: str) -> dict[str, dict[str, RoundedLayer]]:
    layers: dict[str, dict[str, RoundedLayer]] = {}
    for name, field in model.stored().items():
        network = network_of(field)
        tables = quantize(network, scheme).tables
        layers[name] = {
            layer: RoundedLayer.begin(scheme, weight, tables[layer])
            for layer, weight in network.weights.items()
        }
    return layers


def state_of(recovery: Recovery) -> dict[str, torch.Tensor]:
    return {
        f"{network}.{name}": tensor.clone()
        for network, field in recovery.student.stored().items()
        for name, tensor in field.state_dict().items()
    }


# --- the losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("white", [False, True])
def test_the_distillation_loss_is_that_of_its_formula(white: bool) -> None:
    scene = tiny_scene(white_background=white)
    rays = Recovery(model_of(1), None, scene, RecoveryRecipe(1), 0).pool.rays[torch.arange(5)]
    t = torch.linspace(1.0, 3.0, 7).expand(5, 7) ** 1.2
    settings = RenderSettings(scene.near, scene.far, white)
    with torch.no_grad():
        student, teacher = ask(model_of(1).fine, rays, t), ask(model_of(0).fine, rays, t)

    def slow(answer: Answer, ray: int) -> tuple[list[float], list[float], np.ndarray, np.ndarray]:
        length = float(np.linalg.norm(rays.directions[ray].numpy()))
        through, opacity, weights = 1.0, [], []
        colors = 1 / (1 + np.exp(-answer.raw_rgb[ray].double().numpy()))
        for i in range(7):
            delta = float(t[ray, i + 1] - t[ray, i]) if i < 6 else 1e10
            density = max(float(answer.density[ray, i]), 0.0)
            opacity.append(1 - math.exp(-density * delta * length))
            weights.append(through * opacity[-1])
            through *= 1 - opacity[-1]
        shown = sum(w * c for w, c in zip(weights, colors, strict=True))
        return opacity, weights, colors, shown + through * white

    losses = []
    for ray in range(5):
        alpha, _, colors, shown = slow(student, ray)
        alpha_t, weights_t, colors_t, shown_t = slow(teacher, ray)
        rendered = float(np.square(shown - shown_t).sum()) / 3
        of_samples = sum(
            weights_t[i] * float(np.square(colors[i] - colors_t[i]).sum()) / 3 for i in range(7)
        )
        of_opacity = sum((a - b) ** 2 for a, b in zip(alpha, alpha_t, strict=True)) / 7
        losses.append(rendered + of_samples + OPACITY_WEIGHT * of_opacity)
    loss = distillation_loss(student, teacher, rays, t, settings)
    assert float(loss) == pytest.approx(sum(losses) / 5, rel=1e-4)
    assert float(distillation_loss(teacher, teacher, rays, t, settings)) == 0.0


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    recipe = RecoveryRecipe(1000, learning_rate=1e-3, warmup=0.1)
    rates = [recipe.rate_at(i) for i in range(1000)]
    assert rates[0] == pytest.approx(1e-5)
    assert max(rates) == pytest.approx(recipe.rate_at(100), rel=0.01)
    assert rates[500] == pytest.approx(5e-4)
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[100:]))


@pytest.fixture(scope="module")
def teacher() -> NerfModel:
    """A model that has learnt the tiny scene a little."""
    recovery = recovery_of("photos", iterations=200)
    recovery.advance(200)
    recovery.advance(200)
    assert recovery.done
    return recovery.student


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("source", ["photos", "distill", "both"])
def test_every_way_repairs_a_damaged_model(
    source: Source, shared: bool, teacher: NerfModel
) -> None:
    student = copy.deepcopy(teacher)
    if shared:
        student = NerfModel(student.fine, student.fine, SAMPLES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for field in student.stored().values():
            for weight in field.parameters():
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    recipe = RecoveryRecipe(120, source, learning_rate=3e-3, rays=24, rounding_from=0.0)
    recovery = Recovery(student, teacher, tiny_scene(), recipe, 0)
    first = recovery.advance(5).loss
    recovery.advance(95)
    assert recovery.advance(20).loss < 0.5 * first


def test_a_shared_network_is_asked_once_at_each_sample() -> None:
    """What it says at the coarse samples serves both passes: the same as asking it anew."""
    recovery = recovery_of(shared=True)
    rays = recovery.pool.rays[torch.arange(8)]
    _, t_coarse, _, fine, t_fine, _ = recovery._passes(recovery._weights(), rays)
    again = ask(recovery.student.fine, rays, t_fine)
    assert torch.allclose(fine.density, again.density, atol=1e-5)
    assert torch.allclose(fine.raw_rgb, again.raw_rgb, atol=1e-5)
    assert t_fine.shape == (8, SAMPLES.coarse + SAMPLES.fine)
    assert bool((t_fine.diff(dim=1) >= 0).all())
    assert all(bool((t_fine[i] == t_coarse[i, j]).any()) for i in range(8) for j in range(6))


def test_networks_that_are_not_trained_stay_as_they_are() -> None:
    recovery = recovery_of("both", trained=("coarse",))
    before = state_of(recovery)
    recovery.advance(3)
    after = state_of(recovery)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if name.startswith("coarse.")}


def test_the_teacher_is_never_changed() -> None:
    teacher = model_of(0)
    before = copy.deepcopy(teacher.fine.state_dict())
    recipe = RecoveryRecipe(5, "both", rays=16)
    Recovery(model_of(1), teacher, tiny_scene(), recipe, 0).advance(5)
    assert all(torch.equal(before[n], v) for n, v in teacher.fine.state_dict().items())
    assert all(p.grad is None for p in teacher.fine.parameters())


def test_a_recovery_that_diverges_says_so() -> None:
    recovery = recovery_of("photos")
    with torch.no_grad():
        recovery.student.fine.density.bias.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"diverged.*after iteration 2.*learning rate"):
        recovery.advance(2)


def test_learning_from_a_teacher_needs_one() -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        Recovery(model_of(), None, tiny_scene(), RecoveryRecipe(1, "both"), 0)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"iterations": 0}, "iterations"),
        ({"iterations": 1, "learning_rate": 0.0}, "learning_rate"),
        ({"iterations": 1, "rounding_from": 1.0}, "rounding_from"),
        ({"iterations": 1, "density_noise": -1.0}, "density_noise"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(settings: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        RecoveryRecipe(**settings)  # type: ignore[arg-type]


def test_a_recipe_that_never_rounds_has_a_squeeze() -> None:
    recipe = RecoveryRecipe(10, rounding_from=0.99)
    assert recipe.rounding_at == recipe.iterations
    assert Squeeze.of(recipe).falling == 1.0


# --- rays that nobody photographed --------------------------------------------------------------


def test_invented_poses_lie_around_the_cameras_and_look_their_way() -> None:
    poses = tiny_scene(views=9).poses
    made = invented_poses(poses, 50, seed=3)
    assert made.shape == (50, 3, 4)
    assert np.allclose(made[:, :, :3].transpose(0, 2, 1) @ made[:, :, :3], np.eye(3), atol=1e-9)
    low, high = poses[:, :, 3].min(axis=0), poses[:, :, 3].max(axis=0)
    span = 0.2 * (high - low) + 1e-6
    assert bool(((made[:, :, 3] >= low - span) & (made[:, :, 3] <= high + span)).all())
    assert len(np.unique(made[:, 0, 3])) == 50
    assert np.array_equal(made, invented_poses(poses, 50, seed=3))
    assert np.allclose(invented_poses(poses[:1], 2, seed=0)[1][:, 3], poses[0][:, 3])


def test_invented_rays_never_end_and_depend_on_the_iteration_alone() -> None:
    scene, cpu = tiny_scene(), torch.device("cpu")
    there = InventedRays(scene, 0, cpu, poses=2, rays_a_pose=4)
    first = there.rays.origins.clone()
    seen = [there.rays[there.pick(i, 4)].directions.clone() for i in range(6)]
    assert not torch.equal(there.rays.origins, first)  # a new block, in the same memory
    back = InventedRays(scene, 0, cpu, poses=2, rays_a_pose=4)
    for i in (5, 0, 3):
        assert torch.equal(back.rays[back.pick(i, 4)].directions, seen[i])


# --- rounded training ---------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ROUNDED)
def test_rounding_begins_with_what_quantising_gives(scheme: str) -> None:
    network = network_of(model_of(0).fine)
    quantized = quantize(network, scheme)
    there = quantized.network()
    for layer, W in network.weights.items():
        rounded = RoundedLayer.begin(scheme, W, quantized.tables[layer])
        assert torch.equal(rounded.weight(W).detach(), there.weights[layer])
        assert torch.equal(rounded.bias(network.biases[layer]), there.biases[layer])


@pytest.mark.parametrize("scheme", ROUNDED)
def test_what_is_stored_is_what_was_trained_to_the_bit(scheme: str) -> None:
    recovery = recovery_of("photos", shared=True)
    recovery.advance(6)
    recovery.round_weights(rounding_of(recovery.student, scheme))
    before = {name: of.clone() for name, of in recovery.rounding["fine"]["trunk.1"].change.items()}
    recovery.advance(14)
    computed = recovery._weights()["fine"]
    network = network_of(recovery.student.fine)
    for layer, rounded in recovery.rounding["fine"].items():
        codes, tables = rounded.stored(network.weights[layer], network.biases[layer])
        if codes is None:
            weight = tables["weight"].float()
        elif "codebook" in tables:
            weight = tables["codebook"].float()[codes.long()]
        else:
            middle = 0 if "offset" in tables else 2 ** (SCHEMES[scheme].bits - 1) - 1
            weight = (codes.float() - middle) * tables["scale"].float()[:, None]
            if "offset" in tables:
                weight = weight + tables["offset"].float()[:, None]
        assert codes is None or int(codes.max()) < 2 ** SCHEMES[scheme].bits
        assert torch.equal(computed[f"{layer}.weight"].detach(), weight)
        assert torch.equal(computed[f"{layer}.bias"].detach(), tables["bias"].float())
    for name, change in recovery.rounding["fine"]["trunk.1"].change.items():
        assert not torch.equal(change, before[name]), f"{name} was not trained"


@pytest.mark.parametrize("scheme", ["int4", "int3 and int6", "uint3", "kmeans2", "fp16"])
def test_rounding_all_layers_together_is_rounding_each(scheme: str) -> None:
    model = model_of(0)
    several = [rounding_of(model, one)["fine"] for one in scheme.split(" and ")]
    layers = {name: several[i % len(several)][name] for i, name in enumerate(several[0])}
    parameters = dict(model.fine.named_parameters())
    leaves = [*parameters.values(), *(t for of in layers.values() for _, t in of.parameters())]
    targets = {name: torch.randn(p.shape) for name, p in parameters.items()}

    def gradients(rounded: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        loss = torch.stack([(rounded[name] * t).sum() for name, t in targets.items()]).sum()
        return list(torch.autograd.grad(loss, leaves))

    each = {}
    for name, layer in layers.items():
        each[f"{name}.weight"] = layer.weight(parameters[f"{name}.weight"])
        each[f"{name}.bias"] = layer.bias(parameters[f"{name}.bias"])
    together = round_network(layers, parameters)
    assert together.keys() == each.keys() == parameters.keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in each.items())
    for a, b in zip(gradients(together), gradients(each), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_scale_is_that_of_lsq() -> None:
    """Esser et al. 2020, eq. 3, by hand: round(w/s) − w/s inside the grid, ±Q beyond."""
    W = torch.tensor([[0.26, -0.9, 5.0, -5.0]])
    rounded = RoundedLayer.begin("int3", W, {"scale": torch.tensor([0.5]).half()})
    rounded.weight(W.requires_grad_()).sum().backward()
    by_hand = (1 - 0.52) + (-2 + 1.8) + 3 - 3
    gradient = rounded.change["scale"].grad
    assert gradient is not None
    assert float(gradient) == pytest.approx(0.5 * by_hand, rel=1e-5)  # dŴ/dd = s · dŴ/ds
    assert W.grad is not None
    assert W.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def advanced(recovery: Recovery, end: int, scheme: str) -> Recovery:
    """Advance to an iteration, rounding from where the recipe says."""
    while recovery.iteration < end:
        if recovery.iteration >= recovery.recipe.rounding_at and not recovery.rounding:
            recovery.round_weights(rounding_of(recovery.student, scheme))
        recovery.advance(end - recovery.iteration)
    return recovery


def test_training_rounded_beats_rounding_at_the_end() -> None:
    def mse(recovery: Recovery) -> float:
        picked = torch.arange(len(recovery.pool))
        with torch.no_grad():
            *_, shown = recovery._passes(recovery._weights(), recovery.pool.rays)
        return float((shown.rgb - recovery.pool.colors[picked]).square().mean())

    rounded = advanced(recovery_of("photos", iterations=150), 150, "int2")
    after = recovery_of("photos", iterations=150, rounding_from=0.99)
    after.advance(148)
    after.advance(2)
    after.round_weights(rounding_of(after.student, "int2"))
    assert mse(rounded) < 0.8 * mse(after)


def test_only_the_trained_networks_are_rounded_and_only_once() -> None:
    recovery = recovery_of("photos")
    layers = rounding_of(recovery.student, "int4")
    with pytest.raises(ValueError, match="rounding is for"):
        recovery.round_weights({"fine": layers["fine"]})
    recovery.round_weights(layers)
    with pytest.raises(ValueError, match="once"):
        recovery.round_weights(layers)


def test_an_unknown_scheme_or_a_missing_table_is_refused() -> None:
    W = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="int9"):
        RoundedLayer.begin("int9", W, {})
    with pytest.raises(ValueError, match="needs scale, offset"):
        RoundedLayer.begin("uint4", W, {})


# --- squeezing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [0.01, 0.3, 0.9])
def test_the_entropy_is_that_of_a_geometric_distribution(theta: float) -> None:
    k = np.arange(-2000, 2001)
    p = (1 - theta) / (1 + theta) * theta ** np.abs(k).astype(float)
    m = float((np.abs(k) * p).sum())
    entropy = -float((p * np.log2(np.maximum(p, 1e-300))).sum())
    assert float(geometric_entropy(torch.tensor(m))) == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize("scheme", ["int2", "int4", "int8"])
def test_codes_take_no_more_bits_than_estimated(scheme: str) -> None:
    model = model_of(0)
    layers = rounding_of(model, scheme)["fine"]
    bits = 0.0
    for name, weight in network_of(model.fine).weights.items():
        codes = layers[name].stored(weight, torch.zeros(len(weight)))[0]
        assert codes is not None
        counts = np.bincount(codes.flatten().numpy())
        p = counts[counts > 0] / counts.sum()
        bits -= float((p * np.log2(p)).sum()) * codes.numel()
    estimated = float(coded_bits(layers, dict(model.fine.named_parameters())).detach())
    assert bits <= estimated <= 1.6 * bits


def test_only_symmetric_grids_can_be_squeezed() -> None:
    model = model_of(0)
    with pytest.raises(ValueError, match="only int schemes"):
        coded_bits(rounding_of(model, "uint4")["fine"], dict(model.fine.named_parameters()))
    with pytest.raises(ValueError, match="round them first"):
        recovery_of().squeeze(100.0)


def test_squeezing_brings_the_codes_to_the_bits_allowed() -> None:
    recovery = advanced(recovery_of("photos", iterations=600, rounding_from=0.0), 1, "int4")
    before = recovery.bits()
    recovery.squeeze(0.5 * before)
    advanced(recovery, 600, "int4")
    assert 0.4 * before < recovery.bits() < 0.55 * before


# --- stopping and going on ----------------------------------------------------------------------


@pytest.mark.parametrize("stop", [5, 14])  # before and after rounding begins
def test_going_on_from_a_state_is_as_if_nothing_had_happened(tmp_path: Path, stop: int) -> None:
    settings = {"rounding_from": 0.5, "density_noise": 0.5}
    whole = advanced(recovery_of("both", **settings), 20, "int4")
    begun = advanced(recovery_of("both", **settings), stop, "int4")
    begun.save(tmp_path / "state.safetensors")
    resumed = recovery_of("both", **settings)
    resumed.load(tmp_path / "state.safetensors")
    assert resumed.iteration == stop
    assert resumed.seconds == begun.seconds
    advanced(resumed, 20, "int4")
    for (name, a), (_, b) in zip(whole._parameters, resumed._parameters, strict=True):
        assert torch.equal(a, b), name


def test_a_state_of_another_recovery_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    recovery_of().save(path)
    recipe = RecoveryRecipe(20, rays=24)
    with pytest.raises(CheckpointError, match="not a state of this recovery"):
        Recovery(model_of(1), None, tiny_scene(), recipe, seed=1).load(path)
    other = NerfModel.create(FieldShape((5, 5), skip=None, feature=4, view=3), SAMPLES, 0)
    with pytest.raises(CheckpointError, match="another shape"):
        Recovery(other, None, tiny_scene(), recipe, seed=0).load(path)
