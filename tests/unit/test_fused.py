"""Training and rendering on the fused kernels against plain PyTorch; and falling back to it.

Where there is a GPU the kernels run on it, in bf16. Elsewhere they run in Triton's interpreter, in
fp32, so that a step can be compared tightly: same rays, same random numbers, same Adam.
"""

import importlib.util
import logging
from dataclasses import replace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: no fused kernels", allow_module_level=True)

import triton_interpreter

triton_interpreter.use_interpreter_without_gpu()  # before anything imports Triton

from nerf import backends
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.pool import RayPool
from nerf.recipe import Recipe
from nerf.recovery import Recovery, RecoveryRecipe
from nerf.renderer import Renderer
from nerf.rendering import RenderSettings, render_colors
from nerf.training import Trainer
from tests.tiny_scene import tiny_scene

with triton_interpreter.unchecked_imports():
    from nerf import fused
    from nerf.kernels import mlp

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SHAPE = FieldShape((40, 66), skip=0, feature=20, view=17, point_octaves=4, direction_octaves=2)
SAMPLES = SampleCounts(8, 6)
# Two batches of the 24 rays are an epoch.
RECIPE = Recipe(iterations=5, rays=9, learning_rate=2e-3, decay_iterations=9,
                density_noise=0.5, precision="bfloat16")  # fmt: skip
FP32 = mlp.Launch(block=128, warps=4, stages=2, gradient_rows=64, gradient_stages=2,
                  dtype=torch.float32)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def exact_kernels():
    """In the interpreter, kernels that compute in fp32, and few programs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if not GPU:
            monkeypatch.setattr(mlp, "default_launch", lambda _device, _shape: FP32)
            monkeypatch.setattr(mlp, "programs", lambda _device: 1)
            monkeypatch.setattr(mlp, "GATHER_BLOCK", 2**16)
            monkeypatch.setattr(mlp, "REDUCE_BLOCK", 2**16)
            monkeypatch.setattr(fused, "CHECKED", SHAPE)
            monkeypatch.setattr(fused, "PARAMETERS_A_PROGRAM", 2**16)
        yield


@pytest.fixture(autouse=True)
def nothing_told():
    backends._told.clear()


def trainer_of(backend, recipe=RECIPE, white=False, seed=3):
    scene = tiny_scene(white_background=white, views=3, height=3, width=4)
    return Trainer(scene, SHAPE, SAMPLES, recipe, seed, DEVICE, backend)


def eager(**changes):
    return trainer_of("eager", replace(RECIPE, precision="float32"), **changes)


def weights_of(trainer):
    return {
        f"{network}.{name}": value.detach().clone()
        for network, field in trainer.model.networks().items()
        for name, value in field.named_parameters()
    }


def distance(one, other):
    """Of two sets of weights: relative, in the Euclidean norm."""
    flat = [torch.cat([w.flatten() for w in weights.values()]) for weights in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.fixture(scope="module")
def run(exact_kernels, tmp_path_factory):
    """A fused training step by step: its reports and weights, and its state after two steps."""
    trainer = trainer_of("fused")
    assert trainer.backend == "fused"
    weights, reports = [weights_of(trainer)], []
    state = tmp_path_factory.mktemp("run") / "state"
    while not trainer.done:
        reports.append(trainer.advance(1))
        weights.append(weights_of(trainer))
        if trainer.iteration == 2:
            trainer.save(state)
            moments = {n: (a.clone(), b.clone()) for n, (a, b) in trainer._steps.moments().items()}
    return reports, weights, state, moments


def test_training_is_the_eager_one(run):
    """Losses, moments and weights, over the ends of two epochs."""
    reports, weights, _, moments = run
    plain = eager()
    assert len(plain.pool) // RECIPE.rays == 2
    assert distance(weights[0], weights_of(plain)) == 0
    for step, found in enumerate(reports):
        expected = plain.advance(1)
        assert found.loss == pytest.approx(expected.loss, rel=2e-2 if GPU else 1e-4), step
        assert found.train_psnr == pytest.approx(expected.train_psnr, abs=0.2 if GPU else 1e-3)
        if plain.iteration == 2:
            for name, of_eager in plain._steps.moments().items():
                for one, other in zip(moments[name], of_eager, strict=True):
                    assert float(other.norm()) > 0, name
                    error = float((one - other).norm() / other.norm())
                    assert error < (0.2 if GPU else 2e-3), name
    moved = distance(weights_of(plain), weights[0])
    assert distance(weights[-1], weights_of(plain)) < (0.3 if GPU else 0.02) * moved


def test_a_white_background():
    kernels, plain = trainer_of("fused", white=True), eager(white=True)
    expected, found = plain.advance(1), kernels.advance(1)
    assert found.loss == pytest.approx(expected.loss, rel=2e-2 if GPU else 1e-4)
    for name, of_eager in plain._steps.moments().items():
        first = kernels._steps.moments()[name][0]
        error = float((first - of_eager[0]).norm() / of_eager[0].norm())
        assert error < (0.1 if GPU else 1e-3), name


def test_an_interrupted_training_is_the_undisturbed_one_bit_for_bit(run):
    """And steps in one report are the same as steps in several."""
    reports, weights, state, _ = run
    resumed = trainer_of("fused")
    resumed.load(state)
    assert resumed.iteration == 2
    report = resumed.advance(3)
    assert report.loss == pytest.approx(sum(r.loss for r in reports[2:]) / 3, rel=1e-5)
    found = weights_of(resumed)
    assert all(torch.equal(found[name], weights[-1][name]) for name in found)


def test_a_training_goes_on_with_another_backend(run, tmp_path):
    _, weights, state, _ = run
    plain = eager()
    plain.load(state)
    plain.advance(1)
    tolerance = 0.01 if GPU else 1e-4
    assert distance(weights_of(plain), weights[3]) < tolerance
    plain.save(tmp_path / "state")
    kernels = trainer_of("fused")
    kernels.load(tmp_path / "state")
    kernels.advance(1)
    plain.advance(1)
    assert distance(weights_of(kernels), weights_of(plain)) < tolerance


# Rendering


def a_model(shared=False):
    model = NerfModel.create(SHAPE, SAMPLES, 0)
    for field in model.networks().values():
        with torch.no_grad():
            field.density.weight.mul_(10)
    if shared:
        model.coarse = model.fine
    return model.to(DEVICE)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("chunk", [None, 5])
def test_pictures_are_the_eager_ones(shared, chunk):
    scene = tiny_scene(white_background=shared)
    rays = RayPool(scene, DEVICE).rays[:11]
    settings = RenderSettings(scene.near, scene.far, scene.white_background)
    model = a_model(shared)
    expected = render_colors(model, rays, settings)
    done = []
    renderer = Renderer(model, settings, "bfloat16", "fused")
    found = renderer.colors(rays, chunk, done.append)
    assert renderer.backend == "fused"
    assert done[-1] == 11
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03 if GPU else 1e-4)


# Recovery


@pytest.mark.parametrize(("source", "shared"), [("photos", True), ("both", False)])
def test_recovery_is_the_eager_one(source, shared):
    def recovery_on(backend):
        precision = "bfloat16" if backend == "fused" else "float32"
        recipe = RecoveryRecipe(4, source, 3e-3, rays=9, density_noise=0.5, precision=precision)
        recovery = Recovery(
            a_model(shared), a_model(), tiny_scene(), recipe, 0, None, None, backend
        )
        assert recovery.backend == backend
        return recovery

    def weights_now(recovery):
        return {name: value.detach().clone() for name, value in recovery._parameters}

    kernels, plain = recovery_on("fused"), recovery_on("eager")
    begun = weights_now(plain)
    for step in range(2):
        found, expected = kernels.advance(1), plain.advance(1)
        assert found.loss == pytest.approx(expected.loss, rel=2e-2 if GPU else 1e-4), step
    moved = distance(weights_now(plain), begun)
    assert moved > 1e-4
    assert distance(weights_now(kernels), weights_now(plain)) < (0.3 if GPU else 0.02) * moved


# Falling back


def test_a_failing_compiler_is_told_once_and_eager_takes_over(monkeypatch, caplog):
    def broken(_device):
        raise RuntimeError("PTX was not compiled\nand more lines")

    monkeypatch.setattr(fused, "check_kernels", broken)
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of("fused", replace(RECIPE, precision="float32"))
        trainer = trainer_of("fused")
        renderer = Renderer(a_model(), RenderSettings(0.0, 1.0, False), "bfloat16", "fused")
    assert (trainer.backend, renderer.backend) == ("eager", "eager")
    told = [r.message for r in caplog.records if "PTX was not compiled" in r.message]
    assert told == ["backend: eager instead of fused, which is slower: PTX was not compiled"]
    undisturbed = trainer_of("eager")
    for one in (trainer, undisturbed):
        one.advance(2)
    assert distance(weights_of(trainer), weights_of(undisturbed)) == 0


def test_kernels_that_compute_something_else_are_noticed(monkeypatch):
    fused._fault.cache_clear()
    forward = fused.FusedField.forward

    def wrong(self, *args):
        density, rgb = forward(self, *args)
        return density + 1.0, rgb

    monkeypatch.setattr(fused.FusedField, "forward", wrong)
    with pytest.raises(fused.NerfError, match="outputs in training wrongly"):
        fused.check_kernels(DEVICE)
    fused._fault.cache_clear()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "float32"}, "compute in bfloat16, and the precision is float32"),
        ({"shapes": [FieldShape((257, 8), skip=None)]}, "wider than 256"),
        ({"samples": SampleCounts(256, 128)}, "more samples"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(changes, said, caplog):
    given = {"precision": "bfloat16", "shapes": [SHAPE], "samples": SAMPLES, **changes}
    with caplog.at_level(logging.WARNING):
        chosen = backends.choose("fused", DEVICE, **given)
    assert chosen == "eager"
    assert said in caplog.text
