"""Training and rendering on the fused kernels against plain PyTorch; and falling back to it.

Where there is a GPU the kernels run on it, in bf16. Elsewhere they run in Triton's interpreter, in
fp32, so that a step can be compared tightly: same rays, same random numbers, same Adam.
"""

import importlib.util
import logging
import math
from dataclasses import replace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: no fused kernels", allow_module_level=True)

import triton_interpreter

triton_interpreter.use_interpreter_without_gpu()  # before anything imports Triton

from triton.runtime.jit import KernelInterface

from nerf import backends
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.pool import RayPool
from nerf.recipe import Recipe
from nerf.recovery import Recovery, RecoveryRecipe
from nerf.renderer import Renderer
from nerf.rendering import RenderSettings, render_colors
from nerf.rounding import RoundedLayer
from nerf.shares import Share
from nerf.training import Trainer
from tests.tiny_scene import tiny_scene

with triton_interpreter.unchecked_imports():
    from nerf import fused, fused_recovery
    from nerf.kernels import mlp, rounded

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


def trainer_of(backend, recipe=RECIPE, white=False, seed=3, share=None):
    scene = tiny_scene(white_background=white, views=3, height=3, width=4)
    return Trainer(scene, SHAPE, SAMPLES, recipe, seed, DEVICE, backend, share)


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


@pytest.fixture
def untried(monkeypatch):
    """In the interpreter, recoveries that do not try their kernels first: it takes seconds, and
    `test_all_kernels_of_a_recovery_are_tried_and_nothing_else_happens` shows it changes nothing."""
    if not GPU:
        monkeypatch.setattr(fused_recovery.FusedRecovery, "_try", lambda _self: None)


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


MUON = replace(RECIPE, optimizer="muon", anneal="cosine", density_noise=0.0)


def test_training_by_muon_is_the_eager_one(tmp_path):
    """A step at a time, each from the same state: what no gradient has shown yet Muon leaves to
    rounding errors, so that two runs part after a while."""
    kernels = trainer_of("fused", MUON)
    plain = trainer_of("eager", replace(MUON, precision="float32"))
    assert kernels.backend == "fused"
    for step in range(3):
        before = weights_of(plain)
        found, expected = kernels.advance(1), plain.advance(1)
        assert found.loss == pytest.approx(expected.loss, rel=2e-2 if GPU else 1e-4), step
        moved = distance(weights_of(plain), before)
        assert distance(weights_of(kernels), weights_of(plain)) < (0.3 if GPU else 0.01) * moved
        moments = kernels._steps.moments()
        for name, (first, second) in plain._steps.moments().items():
            mine = moments[name]
            assert (mine[1] is None) == (second is None)
            error = float((mine[0] - first).norm() / first.norm().clamp_min(1e-12))
            assert error < (0.2 if GPU else 2e-3), name
        plain.save(tmp_path / "state")
        kernels.load(tmp_path / "state")


def test_an_interrupted_training_by_muon_is_the_undisturbed_one(tmp_path):
    whole = trainer_of("fused", MUON)
    whole.advance(1)
    whole.save(tmp_path / "state")
    whole.advance(1)
    resumed = trainer_of("fused", MUON)
    resumed.load(tmp_path / "state")
    resumed.advance(1)
    found, expected = weights_of(resumed), weights_of(whole)
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.skipif(GPU, reason="what NCCL sums on GPUs, benchmarks/two_gpus.py compares")
@pytest.mark.parametrize("recipe", [RECIPE, MUON])
def test_a_training_that_two_share_is_that_of_one(recipe, monkeypatch):
    """9 rays as 4 and 5, their gradients summed here instead of by NCCL: the same training."""
    monkeypatch.setattr(Share, "all_can", lambda _self, can, _device: can)
    alone = trainer_of("fused", recipe)
    pair = [trainer_of("fused", recipe, share=Share(rank, 2)) for rank in range(2)]
    parts = [trainer._steps for trainer in pair]
    assert [part._rays for part in parts] == [4, 5]
    for iteration in range(2):
        before = weights_of(alone)
        expected = alone.advance(1)
        for part in parts:
            part._sums.zero_()
            part._batches.prepare(iteration)
            part._losses_and_gradients()
        for network in ("coarse", "fine"):
            both = [part._fields[network].gradients for part in parts]
            whole = both[0] + both[1]
            for gradients in both:
                gradients.copy_(whole)
        for part in parts:
            part._update()
            part._batches.counted()
        loss = sum(float(part._sums.sum()) * part._rays / 9 for part in parts)
        assert loss == pytest.approx(expected.loss, rel=1e-5)
        moved = distance(weights_of(alone), before)
        for trainer in pair:
            assert distance(weights_of(trainer), weights_of(alone)) < 0.02 * moved


@pytest.mark.skipif(GPU, reason="on GPUs the others would be missing")
def test_processes_that_share_a_training_fall_back_together(monkeypatch, caplog):
    """If another one cannot run the kernels, this one does not either: their sums would differ."""
    monkeypatch.setattr(Share, "all_can", lambda _self, _can, _device: False)
    trainer = trainer_of("fused", share=Share(0, 2))
    assert trainer.backend == "eager"
    assert "another process of this training cannot run it" in caplog.text


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


def rounding_of(recovery, scheme):
    """Grids that one row in three outgrows, so that some weights are beyond their ends."""
    layers = {}
    top = 2 ** (int(scheme[-1]) - 1) - 1
    for layer in recovery.student.fine.shape.layers():
        weight = dict(recovery.student.fine.named_parameters())[f"{layer.name}.weight"].detach()
        scale = weight.abs().amax(dim=1) / top
        scale[::3] *= 0.6
        layers[layer.name] = RoundedLayer.begin(scheme, weight, {"scale": scale})
    return {"fine": layers}


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize(
    ("optimizer", "scheme", "noise"),
    [("adam", "int6", 0.0), ("muon", "int3", 0.5)],
)
def test_a_recovery_in_whole_steps_is_the_eager_one(optimizer, scheme, noise):
    runs = []
    for backend in ("fused", "eager"):
        precision = "bfloat16" if backend == "fused" else "float32"
        recipe = RecoveryRecipe(
            12, "photos", 2e-3, rays=9, rounding_from=0.25, density_noise=noise,
            precision=precision, optimizer=optimizer,
        )  # fmt: skip
        recovery = Recovery(a_model(True), None, tiny_scene(), recipe, 0, None, None, backend)
        assert (recovery._fused is not None) == (backend == "fused")
        runs.append(recovery)
    kernels, plain = runs

    def now(recovery):
        return {name: value.detach().clone() for name, value in recovery._parameters}

    def compare(steps):
        """From the same state on: directions that no gradient has shown yet are left to rounding
        errors by Muon, so that two runs part after a while."""
        with torch.no_grad():
            for (_, mine), (_, other) in zip(kernels._parameters, plain._parameters, strict=True):
                mine.copy_(other)
        kernels._restore(plain.iteration, plain._moments())
        begun = now(plain)
        found, expected = kernels.advance(steps), plain.advance(steps)
        assert found.loss == pytest.approx(expected.loss, rel=3e-2 if GPU else 1e-3)
        moved = distance(now(plain), begun)
        assert moved > 1e-4
        firsts = [{name: of[1] for name, of in run._moments().items()} for run in runs]
        length = distance(firsts[1], {name: 0 * of for name, of in firsts[1].items()})
        assert distance(*firsts) < (0.1 if GPU else 1e-3) * length
        if not GPU:
            assert distance(now(kernels), now(plain)) < 0.01 * moved

    compare(2)
    for recovery in (plain, kernels):
        recovery.round_weights(rounding_of(plain, scheme))
    compare(1)
    assert kernels.bits() == pytest.approx(plain.bits(), rel=5e-3)
    for recovery in runs:
        recovery.squeeze(0.7 * plain.bits())
    compare(3)
    assert float(kernels._price) == pytest.approx(float(plain._price), rel=1e-2)
    assert float(plain._price) > 3.1e-4
    assert kernels.bits() == pytest.approx(plain.bits(), rel=5e-3)


@pytest.mark.usefixtures("untried")
def test_an_interrupted_recovery_in_whole_steps_is_the_undisturbed_one(tmp_path):
    def fresh():
        recipe = RecoveryRecipe(
            4, "photos", 2e-3, rays=9, rounding_from=0.25, density_noise=0.5,
            precision="bfloat16", optimizer="muon",
        )  # fmt: skip
        return Recovery(a_model(True), None, tiny_scene(), recipe, 0, None, None, "fused")

    whole = fresh()
    whole.advance(1)
    whole.round_weights(rounding_of(whole, "int6"))
    whole.advance(1)
    whole.squeeze(0.8 * whole.bits())
    whole.advance(1)
    whole.save(tmp_path / "state.safetensors")
    whole.advance(1)
    again = fresh()
    again.load(tmp_path / "state.safetensors")
    assert again.advance(1).iteration == 4
    for (name, mine), (_, other) in zip(again._parameters, whole._parameters, strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.parametrize("since", [0, 3, 12])
def test_the_schedule_of_a_recovery_is_that_of_its_formulas(since):
    recipe = RecoveryRecipe(12, learning_rate=2e-3)
    steps = object.__new__(fused_recovery.FusedRecovery)
    steps.device, steps._rounded_since = DEVICE, since
    steps._rates = torch.tensor([recipe.rate_at(i) for i in range(12)], dtype=torch.float64)

    def corrections(step):
        if step < 1:
            return 0.0, 0.0
        return 1.0 / (1.0 - 0.9**step), 1.0 / math.sqrt(1.0 - 0.999**step)

    for iteration, found in enumerate(steps._planned().tolist()):
        rate = recipe.rate_at(iteration)
        m, v = corrections(iteration + 1)
        of_m, of_v = corrections(iteration + 1 - since)
        assert found == pytest.approx([rate * m, v, rate * of_m, of_v, rate], rel=1e-6)


@pytest.mark.usefixtures("untried")
def test_grids_that_the_kernels_do_not_know_are_trained_step_by_step():
    runs = []
    for backend in ("fused", "eager"):
        precision = "bfloat16" if backend == "fused" else "float32"
        recipe = RecoveryRecipe(
            2, "photos", 2e-3, rays=9, rounding_from=0.5, precision=precision, optimizer="muon"
        )
        recovery = Recovery(a_model(True), None, tiny_scene(), recipe, 0, None, None, backend)
        recovery.advance(1)
        weights = dict(recovery.student.fine.named_parameters())
        layers = {
            layer.name: RoundedLayer.begin("fp16", weights[f"{layer.name}.weight"], {})
            for layer in recovery.student.fine.shape.layers()
        }
        recovery.round_weights({"fine": layers})
        assert recovery._fused is None
        recovery.advance(1)
        runs.append({name: value.detach().clone() for name, value in recovery._parameters})
    moved = distance(runs[1], {name: torch.zeros_like(value) for name, value in runs[1].items()})
    assert distance(*runs) < (0.05 if GPU else 1e-4) * moved


# Trying the kernels of a recovery before its first step

SMALL = FieldShape((12, 9), skip=0, feature=5, view=6, point_octaves=3, direction_octaves=1)


def small_recovery(backend="fused", optimizer="muon"):
    model = NerfModel.create(SMALL, SampleCounts(5, 4), 0)
    model.coarse = model.fine
    recipe = RecoveryRecipe(
        3, "photos", 2e-3, rays=9, rounding_from=0.34, density_noise=0.5, precision="bfloat16",
        optimizer=optimizer,
    )  # fmt: skip
    return Recovery(model.to(DEVICE), None, tiny_scene(), recipe, 0, None, None, backend)


def all_kinds_of_steps(recovery):
    """Reports of a step of each kind, and all that they leave behind."""
    reports = [recovery.advance(1)]
    recovery.round_weights(rounding_of(recovery, "int6"))
    reports.append(recovery.advance(1))
    recovery.squeeze(0.8 * recovery.bits())
    reports.append(recovery.advance(1))
    left = {name: value.detach() for name, value in recovery._parameters}
    for name, (_, *moments) in recovery._moments().items():
        left |= {f"{name} {i}": of for i, of in enumerate(moments) if of is not None}
    left |= {"price": recovery._price, "generator": recovery._fused.generator.get_state()}
    return [(report.loss, report.train_psnr) for report in reports], left


def compiled_for(value):
    """All that Triton may distinguish an argument by, and more."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return type(value), value


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_all_kernels_of_a_recovery_are_tried_and_nothing_else_happens(optimizer, monkeypatch):
    launched = set()

    def recording(kernel, grid):
        def launch(*args, **kwargs):
            named = tuple((name, compiled_for(value)) for name, value in sorted(kwargs.items()))
            launched.add((kernel.fn.__name__, *map(compiled_for, args), *named))
            return kernel.run(*args, grid=grid, warmup=False, **kwargs)

        return launch

    monkeypatch.setattr(KernelInterface, "__getitem__", recording)
    tried = small_recovery(optimizer=optimizer)
    assert tried.backend == "fused"
    in_trial = set(launched)
    launched.clear()
    reports, left = all_kinds_of_steps(tried)
    assert launched <= in_trial
    names = [key[0] for key in launched]
    assert (names.count("row_gradients"), names.count("update_rows")) == (3, 6)
    assert "price_codes" in names
    monkeypatch.setattr(fused_recovery.FusedRecovery, "_try", lambda _self: None)
    untried_reports, untried = all_kinds_of_steps(small_recovery(optimizer=optimizer))
    assert reports == untried_reports
    assert left.keys() == untried.keys()
    for name, value in left.items():
        assert torch.equal(value, untried[name]), name


def test_a_recovery_of_which_a_kernel_fails_goes_on_in_pytorch(monkeypatch, caplog):
    class Broken:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                if kwargs["SQUEEZE"]:
                    raise RuntimeError("PTX was not compiled\nand more lines")
                return kernel[grid](*args, **kwargs)

            return launch

    kernel = rounded.row_gradients
    monkeypatch.setattr(rounded, "row_gradients", Broken())
    recovery, plain = small_recovery(), small_recovery("eager")
    assert (recovery.backend, recovery._fused) == ("eager", None)
    assert "eager instead of fused, which is slower: PTX was not compiled" in caplog.text
    assert torch.equal(recovery._generator.get_state(), plain._generator.get_state())
    for (name, mine), (_, other) in zip(recovery._parameters, plain._parameters, strict=True):
        assert torch.equal(mine, other), name
    for _ in range(2):  # on a GPU sums depend on how its weights lie in memory
        expected = plain.advance(1).loss
        assert recovery.advance(1).loss == pytest.approx(expected, rel=1e-2 if GPU else 1e-9)


def test_a_recovery_whose_kernels_give_no_numbers_goes_on_in_pytorch(monkeypatch, caplog):
    gradients = fused_recovery.FusedRecovery._gradients

    def broken(self):
        gradients(self)
        self._errors[-1] = math.nan

    monkeypatch.setattr(fused_recovery.FusedRecovery, "_gradients", broken)
    assert small_recovery().backend == "eager"
    assert "errors of a recovery that are not finite" in caplog.text


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
