"""The deep pruning methods in a sweep: spec, keys, files of a size, few bits, shared networks."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nerf.checkpoints import load_model, model_size, save_model
from nerf.errors import CheckpointError
from nerf.evaluation import HeldOut
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.files import read_tensors, write_tensors
from nerf.packing import Packed
from nerf.scenes import write_demo_scene
from orchestrator.bridge import calibration_batches, graph_of, network_of
from orchestrator.cli import main
from orchestrator.compress import COARSE_WEIGHTS, compress
from orchestrator.errors import OrchestratorError, SpecError
from orchestrator.modelfile import packed
from orchestrator.plan import Needs, Plan, Trial, make_plan
from orchestrator.progress import describe
from orchestrator.provenance import Origin
from orchestrator.report.data import is_uniform
from orchestrator.results import Record, method_of
from orchestrator.spec import Sweep, read_text
from orchestrator.stages import MODEL, Stopwatch, Workbench
from orchestrator.store import Store
from orchestrator.tracking.names import params, run_name
from orchestrator.units import parse_bytes
from pruning import (
    COMPENSATIONS,
    SCHEMES,
    BudgetError,
    CalibrationBatch,
    StatisticsError,
    cells,
    collect,
    price_of,
    quantize,
)
from tests.tiny_scene import tiny_scene

SHAPE = FieldShape((9, 8, 7, 6), skip=1, feature=5, view=4, point_octaves=2, direction_octaves=1)
SCHEME_NAMES = ["fp16", "bf16", "int8", "int6", "int3", "uint4", "kmeans3", "gptq3", "awq5"]
SAMPLES = [CalibrationBatch({n: torch.randn(90, k) for n, k in graph_of(SHAPE).external.items()})]


def sweep_of(*grids: dict[str, Any], **sections: Any) -> Sweep:
    data = {
        "name": "tiny",
        "scene": {"format": "demo", "holdout": 19},
        "train": {
            "iterations": 6,
            "rays": 32,
            "learning_rate": 2e-3,
            "decay_iterations": 6,
            "network": {"depth": 3, "width": 24, "skip": 1, "point_octaves": 3},
            "samples": {"coarse": 4, "fine": 4},
        },
        "prune": list(grids),
        "evaluate": {"max_rays": 50, "renders": 0},
        **sections,
    }
    return read_text(yaml.safe_dump(data), Path("tiny.yaml"))


def trials_of(tmp_path: Path, *grids: dict[str, Any]) -> tuple[Trial, ...]:
    return make_plan(sweep_of(*grids), Store(tmp_path / "out")).trials


# --- the sweep file -----------------------------------------------------------------------------


def test_a_grid_of_sizes_gets_the_best_method_by_default(tmp_path: Path) -> None:
    small, large = trials_of(tmp_path, {"sizes": [1_000, 20_000]})
    # Both networks where the file holds both at 5 bits a weight, else the fine one for both passes.
    assert (small.config.networks, large.config.networks) == ("shared", "both")
    assert (small.config.coarse_weight, large.config.coarse_weight) == (None, 0.001)
    assert {(t.config.bits, t.config.errors) for t in (small, large)} == {("rate", "pixel")}
    assert large.config.needs.moments == ("curvature", "gram")


def test_a_grid_of_sizes_that_names_a_method_keeps_to_it(tmp_path: Path) -> None:
    (trial,) = trials_of(tmp_path, {"sizes": "20kB", "networks": "both"})
    config = trial.config
    assert (config.criterion, config.compensation, config.schedule) == ("obs", "obs", "chain")
    assert (config.size, config.coarse_weight, config.bits) == (20_000, 0.001, "fp32")
    assert config.ratio is None
    assert not config.layer_ratios
    flat = config.flat()
    assert flat["size"] == 20_000
    assert flat["allocation"] == flat["schedule"] == "chain"
    assert flat["compensation"] == "obs"
    assert "ratio" not in flat


def test_a_grid_of_ratios_keeps_the_reports_meaning(tmp_path: Path) -> None:
    (trial,) = trials_of(tmp_path, {"ratios": 0.5})
    config = trial.config
    assert (config.criterion, config.compensation, config.bits) == ("activation", "none", "fp32")
    assert config.needs == Needs()
    assert config.identity == {}


def test_every_new_axis_fans_out(tmp_path: Path) -> None:
    trials = trials_of(
        tmp_path,
        {
            "sizes": [16_000, "0.02MB"],
            "allocations": ["chain", "lamp"],
            "criteria": ["obs", "wanda"],
            "compensation": ["obs", "mean_fold"],
            "coarse_weight": [0.1, 1],
            "networks": ["both", "shared"],
            "bits": ["fp32", "int8"],
            "calibration": {"weighting": ["uniform", "render"], "views": 2, "rays": 8},
        },
    )
    # lamp does not weigh errors and a shared network has none to weigh against: no coarse weight.
    assert len(trials) == 2 * 2 * 2 * 2 * 2 * (2 + 1 + 1 + 1)
    assert len({t.key for t in trials}) == len(trials)
    logged = params(record_of(trials[0]))
    for name in ("size", "allocation", "compensation", "bits", "calibration_weighting"):
        assert name in logged


def test_a_method_is_named_by_what_is_not_at_its_default(tmp_path: Path) -> None:
    grids = (
        {"ratios": 0.5},
        {"ratios": 0.5, "criteria": "magnitude", "bits": "int8"},
        {"sizes": "20kB", "bits": "fp32", "calibration": {"weighting": "render"}},
    )
    trials = trials_of(tmp_path, *grids)
    assert [method_of(t.config.flat()) for t in trials] == [
        "activation",
        "magnitude, int8",
        "obs + obs, render",
    ]
    assert method_of({"iterations": 5}) == ""
    names = [run_name("trial", "0123456789", t.config.flat()) for t in trials]
    assert names[0] == "activation both 50% uniform 01234567"
    assert names[2] == "obs + obs, render both 20 kB chain 01234567"
    assert describe(record_of(trials[2])) == "obs + obs, render both 20 kB chain"
    assert not is_uniform(record_of(trials[2]))


def record_of(trial: Trial) -> Record:
    from tests.unit.record_builder import provenance

    return Record("trial", trial.key, trial.training, trial.config.flat(), {}, (), {}, provenance())


@pytest.mark.parametrize(
    ("grid", "path", "said"),
    [
        ({}, "prune[0].ratios", "required (or `sizes`"),
        ({"ratios": 0.5, "sizes": 9000}, "prune[0].sizes", "grids of their own"),
        ({"sizes": 9000, "schedules": ["uniform"]}, "prune[0].schedules", "`allocations`"),
        ({"ratios": 0.5, "allocations": "chain"}, "prune[0].allocations", "`schedules`"),
        ({"ratios": 0.5, "coarse_weight": 0.1}, "prune[0].coarse_weight", "only a grid"),
        (
            {"sizes": 9000, "networks": "shared", "coarse_weight": 0.1},
            "prune[0].coarse_weight",
            "both",
        ),
        ({"ratios": 0.5, "criteria": "ria"}, "prune[0].criteria", "a grid with `masks`"),
        ({"masks": 0.5, "criteria": "obs"}, "prune[0].criteria", "scores channels"),
        ({"masks": 0.5, "ratios": 0.5}, "prune[0].masks", "grids of their own"),
        ({"masks": 1.0}, "prune[0].masks", "2:4"),
        ({"masks": "4:2"}, "prune[0].masks", "2:4"),
        ({"masks": 0.5, "bits": "gptq4"}, "prune[0].bits", "move the zeros"),
        ({"masks": 0.5, "bits": "kmeans4"}, "prune[0].bits", "move the zeros"),
        ({"masks": 0.5, "compensation": "obs"}, "prune[0].compensation", "no channels"),
        ({"sizes": 9000, "allocations": "pfp"}, "prune[0].allocations", "sensitivity"),
        (
            {"sizes": 9000, "allocations": "aap", "criteria": ["activation", "obs"]},
            "prune[0].allocations",
            "criterion activation alone",
        ),
        ({"ratios": 0.5, "bits": "auto"}, "prune[0].bits", "it goes with `sizes`"),
        ({"masks": 0.5, "bits": "auto"}, "prune[0].bits", "move the zeros"),
        (
            {"sizes": 9000, "bits": ["int8", "auto"], "allocations": ["chain", "lamp"]},
            "prune[0].bits",
            "allocation `chain`",
        ),
        ({"ratios": 0.5, "networks": "auto"}, "prune[0].networks", "a grid with `sizes`"),
        ({"masks": 0.5, "networks": "auto"}, "prune[0].networks", "a grid with `sizes`"),
        ({"ratios": 0.5, "bits": "rate"}, "prune[0].bits", "it goes with `sizes`"),
        ({"masks": 0.5, "bits": "rate"}, "prune[0].bits", "move the zeros"),
        (
            {"sizes": 9000, "bits": "rate", "networks": "fine"},
            "prune[0].bits",
            "all networks of a file",
        ),
        (
            {"sizes": 9000, "bits": "rate", "recover": {"iterations": 5, "squeeze": 2}},
            "prune[0].recover.squeeze",
            "fitted to the size",
        ),
        (
            {"sizes": 9000, "bits": "rate", "recover": {"iterations": 5, "steps": 2}},
            "prune[0].recover.steps",
            "one round",
        ),
        (
            {"sizes": 9000, "bits": "gptq4", "recover": {"iterations": 5}},
            "prune[0].bits",
            "'int4' is stored alike",
        ),
        ({"sizes": 9000, "coarse_weight": "best"}, "prune[0].coarse_weight", "`auto`"),
        ({"sizes": 9000, "coarse_weight": 0}, "prune[0].coarse_weight", "above 0"),
        ({"ratios": 0.5, "errors": "pixel"}, "prune[0].errors", "criterion `obs`"),
        ({"ratios": 0.5, "bits": "int88"}, "prune[0].bits", "did you mean 'int8'?"),
        ({"ratios": 0.5, "compensation": "obss"}, "prune[0].compensation", "did you mean 'obs'?"),
        ({"sizes": 9000, "allocations": ["chian"]}, "prune[0].allocations[0]", "'chain'?"),
        ({"sizes": "5 apples"}, "prune[0].sizes", "kB, MB"),
        ({"sizes": 0}, "prune[0].sizes", "from 1"),
        ({"sizes": []}, "prune[0].sizes", "at least 1 item"),
        ({"ratios": []}, "prune[0].ratios", "at least 1 item"),
        ({"ratios": 0.5, "networks": "share"}, "prune[0].networks", "'shared'?"),
        (
            {"ratios": 0.5, "calibration": {"weighting": "rendered"}},
            "prune[0].calibration.weighting",
            "'render'?",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(
    grid: dict[str, Any], path: str, said: str
) -> None:
    with pytest.raises(SpecError) as caught:
        sweep_of(grid)
    (mistake,) = caught.value.mistakes
    assert mistake.path == path
    assert said in mistake.message


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [(12, 12), ("12", 12), ("500kB", 500_000), ("1.2 MB", 1_200_000), ("2.5MiB", 2_621_440)],
)
def test_sizes_are_written_in_bytes_or_with_a_unit(text: Any, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("bad", ["", "kB", "-1", -1, True, 1.5, "1e3", "1 GB", None, "9" * 20])
def test_other_sizes_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="whole number of bytes"):
        parse_bytes(bad)


# --- keys ---------------------------------------------------------------------------------------


def test_what_was_there_keeps_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of the demo sweep as they were before there were validation rays, sizes and masks."""
    path = Path(__file__).parents[2] / "sweeps" / "demo.yaml"
    sweep = read_text(path.read_text().replace("\ntrain:\n", "\ntrain:\n  validation: 0.0\n"), path)
    monkeypatch.chdir(tmp_path)
    plan = make_plan(sweep, Store(tmp_path / "out"))
    assert sweep.hash == "00ea2d49ca075147"
    assert plan.trainings[0].key == "93dd53e2268c964d"
    assert [t.key for t in plan.trials[:2]] == ["f8f85b84fe01446a", "85777cc46280323f"]
    assert plan.trials[-1].key == "e50d8df306101bb6"
    assert [*plan.calibrations[0].sets.values()] == ["46a317e071bf5999"]


def test_statistics_are_known_by_what_they_hold(tmp_path: Path) -> None:
    def statistics(*grids: dict[str, Any]) -> set[str | None]:
        return {t.statistics for t in trials_of(tmp_path, *grids)}

    mean, gram = {"ratios": 0.5}, {"ratios": 0.5, "compensation": "least_squares"}
    budget = {"sizes": 9000, "networks": "both"}
    each = [statistics(g) for g in (mean, gram, budget, {**budget, "criteria": "wanda"})]
    each.append(statistics({**gram, "calibration": {"weighting": "render"}}))
    assert all(len(keys) == 1 for keys in each)
    assert len(set.union(*each)) == len(each)
    # One pass serves what shares its rays.
    assert len(statistics(mean, gram, budget)) == 1


def test_passes_are_apart_by_weighting_and_collect_what_is_needed(tmp_path: Path) -> None:
    sweep = sweep_of(
        {"ratios": 0.5, "criteria": ["activation", "wanda"]},
        {"sizes": 9000, "networks": "both", "calibration": {"weighting": "render"}},
    )
    one, two = make_plan(sweep, Store(tmp_path / "out")).calibrations
    assert (one.weighting, one.needs) == ("uniform", Needs(("mean", "square"), "trunk"))
    assert (two.weighting, two.needs) == ("render", Needs(("gram",), "all"))
    assert one.key != two.key


def test_compensation_of_a_data_free_criterion_calls_for_calibration(tmp_path: Path) -> None:
    trials = trials_of(
        tmp_path,
        {"ratios": 0.5, "criteria": "magnitude", "compensation": [*COMPENSATIONS]},
        {"sizes": 9000, "criteria": "magnitude", "allocations": "uniform", "compensation": "none"},
    )
    assert [t.statistics is not None for t in trials] == [False, True, True, True, False, False]
    # Sequential solving needs the samples themselves.
    assert [t.config.calibration is not None for t in trials] == [False, *[True] * 4, False]


# --- calibration --------------------------------------------------------------------------------


def test_all_layers_but_the_outputs_can_lose_channels() -> None:
    assert graph_of(SHAPE).prunable() == tuple(f"trunk.{i}" for i in range(4))
    assert graph_of(SHAPE, "all").prunable() == (*graph_of(SHAPE).prunable(), "feature", "view")


def test_samples_count_by_their_render_weights() -> None:
    model, scene = NerfModel.create(SHAPE, SampleCounts(5, 4), 0), tiny_scene()
    with torch.no_grad():
        for field in model.networks().values():
            field.density.bias += 1.0
    for network, samples in (("coarse", 5), ("fine", 9)):
        (plain,) = calibration_batches(model, network, scene, cells((2,), (6,)), 0)
        (batch,) = calibration_batches(model, network, scene, cells((2,), (6,)), 0, "render")
        assert plain.weights is None
        assert batch.weights is not None
        assert torch.equal(batch.inputs["point"], plain.inputs["point"])
        of_rays = batch.weights.view(12, samples).sum(dim=1)
        assert bool((batch.weights >= 0).all())
        assert bool((of_rays <= 1 + 1e-6).all())
        assert bool((of_rays > 0).any())


# --- files --------------------------------------------------------------------------------------


def write_model(path: Path, model: NerfModel, bits: str, info: dict[str, Any]) -> int:
    return save_model(path, model, info, packed(model, bits, lambda _: SAMPLES))


def a_model(shared: bool = False) -> NerfModel:
    model = NerfModel.create(SHAPE, SampleCounts(5, 4), 0)
    smaller = replace(SHAPE, trunk=(3, 2, 1, 4), feature=3, view=1)
    fine = NerfModel.create(smaller, SampleCounts(), 1).fine
    return NerfModel(fine if shared else model.coarse, fine, model.samples)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bits", ["fp32", *SCHEME_NAMES])
def test_files_hold_what_quantisation_gives(tmp_path: Path, bits: str, shared: bool) -> None:
    path, model = tmp_path / "model.safetensors", a_model(shared)
    size = write_model(path, model, bits, {"note": "σ"})
    assert size == path.stat().st_size
    loaded, info = load_model(path)
    assert info == {"note": "σ"}
    assert loaded.shared == shared
    assert loaded.samples == model.samples
    assert loaded.parameters() == sum(f.shape.parameters() for f in model.stored().values())
    for name, field in model.stored().items():
        statistics = None
        if SCHEMES[bits].needs_statistics:
            statistics = collect(network_of(field), SAMPLES, ("gram",)).subset()
        expected = quantize(network_of(field), bits, statistics).network()
        got = network_of(loaded.networks()[name])
        assert loaded.networks()[name].shape == field.shape
        for layer in expected.weights:
            assert torch.equal(got.weights[layer], expected.weights[layer])
            assert torch.equal(got.biases[layer], expected.biases[layer])


def test_every_kind_of_scheme_can_be_written(tmp_path: Path) -> None:
    for bits in (n for n, scheme in SCHEMES.items() if scheme.bits in (2, 5, 8, 16)):
        write_model(tmp_path / bits, a_model(), bits, {})
        load_model(tmp_path / bits)


def test_schemes_that_look_at_samples_say_so(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="'awq4' look at what the pruned network"):
        packed(a_model(), "awq4")


def test_prices_are_those_of_files(tmp_path: Path) -> None:
    """A file is its header, some bytes a layer, and what `price_of` says of weights and outputs."""
    small, large = (NerfModel.create(replace(SHAPE, view=v), SampleCounts(), 0) for v in (4, 6))
    for bits in ("fp32", "fp16", "int8"):  # few of 8 bits are shorter when coded
        price = price_of(bits)
        grown = [model_size(m, {}, packed(m, bits)) for m in (small, large)]
        # Two more outputs of the view branch, of 14 inputs each, and 2 × 3 weights of rgb; twice.
        expected = 2 * (2 * (14 * price.weight + price.output) + 6 * price.weight)
        assert abs(grown[1] - grown[0] - expected) <= 12  # padding of bits and of the header


def test_a_shared_network_is_stored_once(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one", a_model(shared=True), "fp32", {})
    model = a_model(shared=True)
    assert set(read_tensors(tmp_path / "one")[0]) == {f"fine.{n}" for n in model.fine.state_dict()}
    twice = NerfModel(a_model().fine, a_model().fine, model.samples)
    assert one < write_model(tmp_path / "two", twice, "fp32", {})


def a_sparse_model() -> NerfModel:
    """Half of the weights at 0, an odd number of them in each layer but one."""
    generator = torch.Generator().manual_seed(0)
    model = a_model()
    with torch.no_grad():
        for field in model.networks().values():
            for name, weight in field.named_parameters():
                if name.endswith("weight"):
                    weight.mul_(torch.rand(weight.shape, generator=generator) < 0.5)
    return model


MIXED = {
    name: {la.name: f"int{3 + i % 5}" for i, la in enumerate(graph_of(SHAPE).layers)}
    for name in ("coarse", "fine")
}


def write_kind(path: Path, kind: str) -> NerfModel:
    """A file of each kind; gives what it must hold."""
    model = a_sparse_model() if kind.startswith("sparse") else a_model(kind == "shared")
    bits: Any = {"mixed": MIXED, "sparse16": "fp16", "sparse32": "fp32"}.get(kind, "int4")
    save_model(path, model, {}, packed(model, bits, sparse=kind.startswith("sparse")))
    return model


@pytest.mark.parametrize("kind", ["sparse32", "sparse16", "mixed"])
def test_sparse_and_mixed_files_come_back(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    model = write_kind(path, kind)
    loaded, _ = load_model(path)
    for name, field in model.stored().items():
        got = network_of(loaded.networks()[name])
        for layer, W in network_of(field).weights.items():
            if kind == "mixed":
                expected = quantize(network_of(field), MIXED[name]).network().weights[layer]
            else:
                expected = W if kind == "sparse32" else W.half().float()
            assert torch.equal(got.weights[layer], expected)


def test_a_sparse_file_pays_for_its_index(tmp_path: Path) -> None:
    model = NerfModel.create(replace(SHAPE, trunk=(96,) * 4), SampleCounts(), 0)
    weights = kept = biases = 0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for field in model.networks().values():
            for name, values in field.named_parameters():
                if name.endswith("bias"):
                    biases += values.numel()
                    continue
                values.mul_(torch.rand(values.shape, generator=generator) < 0.3)
                weights += values.numel()
                kept += int((values != 0).sum())
    p = kept / weights
    index = -weights * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8
    row = sum(len(of.row()) for of in (packed(model, "fp32", sparse=True) or {}).values())
    assert 4 * (kept + biases) + index < row < 4 * (kept + biases) + 1.03 * index + 16 * 45


@pytest.mark.parametrize("kind", ["plain", "shared", "mixed", "sparse32"])
def test_damaged_quantised_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    write_kind(path, kind)
    data = path.read_bytes()
    for position in range(0, len(data), 31):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged|truncated|not one that"):
            load_model(path)
        path.write_bytes(data[:position])
        with pytest.raises(CheckpointError, match="truncated"):
            load_model(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda _, m: m["schemes"].update(fine="int5"),
        lambda _, m: m["schemes"].update(fine="int99"),
        lambda _, m: m["schemes"].update(fine=4),
        lambda _, m: m["schemes"].pop("fine"),
        lambda _, m: m.update(schemes=None),
        lambda _, m: m["fine"].update(view=2),
        lambda t, _: t.update(fine=t["fine"][:-1]),
        lambda t, _: t.update(fine=torch.cat((t["fine"], t["fine"]))),
        lambda t, _: t.update(fine=t["fine"].float()),
        lambda t, _: t.update(fine=t["fine"].flip(0)),
        lambda t, _: t.pop("coarse"),
    ],
)
def test_quantised_files_of_another_content_are_refused(
    tmp_path: Path, change: Any, unchecked_types: None
) -> None:
    path = tmp_path / "model.safetensors"
    write_model(path, a_model(), "int4", {})
    tensors, metadata = read_tensors(path)
    change(tensors, metadata)
    write_tensors(path, tensors, metadata)
    with pytest.raises(CheckpointError, match="do not fit"):
        load_model(path)


def test_arrays_of_another_network_are_not_packed() -> None:
    field = a_model().fine
    arrays = quantize(network_of(field), "int4").tensors()
    for bad in (
        {n: a for n, a in arrays.items() if n != "rgb/scale"},
        {**arrays, "rgb/bias": arrays["rgb/bias"].float()},
        {**arrays, "rgb/codes": arrays["rgb/codes"][1:]},
        {**arrays, "rgb/codes": arrays["rgb/codes"].int()},
    ):
        with pytest.raises(CheckpointError, match="rgb/"):
            Packed(field.shape, "int4", bad).row()


# --- the stages ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


DEMO: dict[str, Any] = {"calibration": {"views": 3, "rays": 16}}
GRIDS: list[dict[str, Any]] = [
    {"sizes": [17_000, 12_000], "networks": ["both", "shared"], **DEMO},
    {"sizes": 24_000, "networks": "fine", **DEMO},
    {"sizes": 4500, "bits": ["int8", "fp16", "kmeans4"], "networks": ["both", "shared"], **DEMO},
    {"sizes": 15_000, "allocations": ["greedy", "global", "lamp", "uniform"], **DEMO},
    {"sizes": 15_000, "criteria": "wanda", "compensation": "mean_fold", **DEMO},
    {"sizes": 5000, "bits": "int8", "calibration": {**DEMO["calibration"], "weighting": "render"}},
    {
        "ratios": 0.5,
        "compensation": [*COMPENSATIONS],
        "networks": ["both", "shared"],
        "bits": ["fp32", "uint4"],
        **DEMO,
    },
    {
        "ratios": 0.5,
        "criteria": ["taylor", "taylor_fo2", "fisher", "thinet", "sensitivity"],
        **DEMO,
    },
    {"ratios": 0.5, "criteria": ["taylor", "fluctuation"], "compensation": "least_squares", **DEMO},
    {"ratios": 0.3, "bits": ["gptq4", "awq4"], **DEMO},
    {"sizes": 4500, "bits": ["gptq5", "auto"], "networks": "shared", **DEMO},
    {"sizes": 7000, "bits": "int8", "coarse_weight": "auto", **DEMO},
    {"sizes": [4500, 3500], "bits": "rate", "networks": ["both", "shared"], **DEMO},
    {"ratios": 0.5, "criteria": "lasso", "compensation": "least_squares", **DEMO},
    {"sizes": 15_000, "criteria": "sensitivity", "allocations": "pfp", **DEMO},
    {
        "sizes": 15_000,
        "criteria": "activation",
        "allocations": ["aap", "aap-iterative"],
        **DEMO,
    },
    {"sizes": 15_000, "errors": "pixel", **DEMO},
    {"ratios": 0.5, "criteria": "obs", "compensation": "obs", "errors": "pixel", **DEMO},
    {
        "sizes": 15_000,
        "networks": "both",
        "calibration": {**DEMO["calibration"], "weighting": "detail"},
    },
    {"sizes": 4600, **DEMO},
    {
        "masks": [0.5, "2:4"],
        "criteria": ["magnitude", "wanda", "ria", "sparsegpt"],
        "networks": ["both", "shared"],
        **DEMO,
    },
    {"masks": 0.5, "criteria": "magnitude", "bits": ["fp16", "int4"], **DEMO},
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workbench, Plan, Store]:
    folder = write_demo_scene(tmp_path_factory.mktemp("scenes") / "demo")
    sweep = sweep_of(*GRIDS)
    sweep = replace(sweep, scene=replace(sweep.scene, path=folder))
    store = Store(tmp_path_factory.mktemp("out") / "store")
    plan = make_plan(sweep, store)
    bench = Workbench(sweep, store, Origin("0", {"prunefield": "test"}), device="cpu")
    list(bench.train(plan.trainings[0], Stopwatch()))
    for calibration in plan.calibrations:
        bench.calibrate(calibration, Stopwatch())
    for trial in plan.trials:
        bench.prune(trial, Stopwatch())
    return bench, plan, store


Done = tuple[Workbench, Plan, Store]


def test_files_keep_to_their_size_and_use_it(done: Done) -> None:
    _, plan, store = done
    for trial in plan.trials:
        record = store.read_record("trial", trial.key)
        size = (store.folder("trial", trial.key) / MODEL).stat().st_size
        assert record.metrics["size_bytes"] == size
        if trial.config.size is None:
            continue
        assert size <= trial.config.size
        if trial.config.schedule != "uniform" and record.metrics["achieved_ratio"] > 0:
            assert size > 0.9 * trial.config.size


def test_a_trials_file_evaluates_to_the_recorded_scores(done: Done) -> None:
    bench, plan, store = done
    held_out = HeldOut(bench.scene(), torch.device("cpu"), 50)
    for trial in plan.trials:
        record = store.read_record("trial", trial.key)
        loaded, info = load_model(store.folder("trial", trial.key) / MODEL)
        assert loaded.shared == (trial.config.networks == "shared")
        again = held_out.evaluate(loaded)
        assert (again.psnr, again.mse) == (record.metrics["psnr"], record.metrics["mse"])
        assert record.metrics["params"] == loaded.parameters()
        assert ("params_coarse" in record.metrics) == (not loaded.shared)
        assert info["pruning"] == dict(record.config) == trial.config.flat()


def test_bits_are_chosen_layer_by_layer(done: Done) -> None:
    _, plan, store = done
    (trial,) = (t for t in plan.trials if t.config.bits == "auto")
    _, metadata = read_tensors(store.folder("trial", trial.key) / MODEL)
    (schemes,) = metadata["schemes"].values()  # type: ignore[attr-defined]
    assert len(schemes) == 7
    assert len(set(schemes)) > 1


def test_one_step_makes_files_of_their_sizes(done: Done) -> None:
    bench, plan, store = done
    trials = [t for t in plan.trials if t.config.bits == "rate"]
    assert len(trials) == 5
    for trial in trials:
        _, metadata = read_tensors(store.folder("trial", trial.key) / MODEL)
        assert {*metadata["schemes"].values()} == {"int8"}  # type: ignore[attr-defined]
        # The layer between trunk and view branch is as narrow as what reads it.
        model, _ = load_model(store.folder("trial", trial.key) / MODEL)
        assert all(field.shape.feature <= field.shape.view for field in model.networks().values())
    config = trials[0].config
    hopeless = replace(trials[0], key="0" * 16, config=replace(config, size=700))
    with pytest.raises(BudgetError, match="700 bytes is too small"):
        bench.prune(hopeless, Stopwatch())


def test_the_coarse_weight_is_chosen_on_validation_rays(done: Done) -> None:
    bench, plan, store = done
    (trial,) = (t for t in plan.trials if t.config.coarse_weight == "auto")
    record = store.read_record("trial", trial.key)
    chosen = record.metrics["coarse_weight"]
    assert chosen in COARSE_WEIGHTS
    assert record.config["coarse_weight"] == "auto"
    # The weight that was chosen is the one that does best on the validation rays.
    rays = bench.validation(trial.training)
    assert rays is not None
    scores = {}
    for weight in COARSE_WEIGHTS:
        path = store.folder("trial", trial.key).parent / f"{weight}.safetensors"
        config = replace(trial.config, coarse_weight=weight)
        model = bench.model(trial.training)
        info = load_model(store.folder("trial", trial.key) / MODEL)[1]
        scores[weight] = rays.score(
            compress(path, model, config, bench.material(trial), info).model
        ).psnr
        path.unlink()
    assert scores[chosen] == max(scores.values()) == record.metrics["validation_psnr"]


def test_without_validation_rays_there_is_nothing_to_choose_by(done: Done, tmp_path: Path) -> None:
    bench, plan, _ = done
    (trial,) = (t for t in plan.trials if t.config.coarse_weight == "auto")
    material = replace(bench.material(trial), validate=None)
    with pytest.raises(OrchestratorError, match=r"`train\.validation` above 0"):
        compress(tmp_path / "m", bench.model(trial.training), trial.config, material, {})


def test_only_what_is_asked_for_is_pruned(done: Done) -> None:
    bench, plan, store = done
    dense = bench.model(plan.trainings[0].key)
    for trial in plan.trials:
        if trial.config.networks == "fine":
            loaded, _ = load_model(store.folder("trial", trial.key) / MODEL)
            assert loaded.coarse.shape == dense.coarse.shape
            assert loaded.fine.shape != dense.fine.shape


def test_a_size_that_no_network_has_is_refused_with_the_numbers(done: Done, tmp_path: Path) -> None:
    bench, plan, _ = done
    trial = next(t for t in plan.trials if t.config.size)
    hopeless = replace(trial, key="0" * 16, config=replace(trial.config, size=1000))
    with pytest.raises(BudgetError, match="a file of 1,000 bytes is too small"):
        bench.prune(hopeless, Stopwatch())
    assert not bench.store.has("trial", hopeless.key)


# --- the command --------------------------------------------------------------------------------


def prune_command(done: Done, output: Path, *options: str) -> int:
    bench, plan, store = done
    model = store.folder("checkpoint", plan.trainings[0].key) / MODEL
    return main(
        [
            *("prune", str(model), "--scene", str(bench.sweep.scene.path), "-o", str(output)),
            *("--calibration-views", "3", "--calibration-rays", "16", "--device", "cpu"),
            *options,
        ]
    )


def test_a_size_alone_gives_the_best_method(done: Done, tmp_path: Path) -> None:
    output = tmp_path / "small.safetensors"
    assert prune_command(done, output, "--size", "4600") == 0
    said = load_model(output)[1]["pruning"]
    assert (said["bits"], said["errors"], said["networks"]) == ("rate", "pixel", "both")
    # It is what a sweep would have made, but for its header.
    _, plan, store = done
    trial = next(t for t in plan.trials if (t.config.size, t.config.errors) == (4600, "pixel"))
    assert trial.config.networks == "both"
    size = (store.folder("trial", trial.key) / MODEL).stat().st_size
    assert abs(output.stat().st_size - size) < 300


def test_a_size_and_networks_give_the_best_of_float32(done: Done, tmp_path: Path) -> None:
    output = tmp_path / "small.safetensors"
    assert prune_command(done, output, "--size", "12kB", "--networks", "both") == 0
    assert output.stat().st_size <= 12_000
    loaded, info = load_model(output)
    said = info["pruning"]
    assert (said["criterion"], said["allocation"], said["compensation"]) == ("obs", "chain", "obs")
    assert (said["coarse_weight"], said["size"]) == (0.001, 12_000)
    # It is what a sweep would have made.
    _, plan, store = done
    trial = next(
        t
        for t in plan.trials
        if (t.config.size, t.config.networks, t.config.bits) == (12_000, "both", "fp32")
    )
    of_sweep, _ = load_model(store.folder("trial", trial.key) / MODEL)
    assert abs(of_sweep.parameters() - loaded.parameters()) < 200  # their headers differ


def test_the_command_knows_bits_shared_networks_and_compensation(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "small.safetensors"
    options = ["--ratio", "0.5", "--compensation", "least_squares", "--bits", "int6"]
    assert prune_command(done, output, *options, "--networks", "shared", "--json") == 0
    loaded, info = load_model(output)
    assert loaded.shared
    assert info["pruning"]["bits"] == "int6"
    assert f'"size_bytes": {output.stat().st_size}' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--size", "3 apples"), "kB, MB"),
        (("--size", "9kB", "--ratio", "0.5"), "not allowed with"),
        ((), "required"),
        (("--size", "9kB", "--schedule", "uniform"), "--allocation"),
        (("--ratio", "0.5", "--allocation", "chain"), "--schedule"),
        (("--ratio", "0.5", "--coarse-weight", "1"), "--size"),
        (("--ratio", "0.5", "--bits", "int88"), "did you mean 'int8'?"),
        (("--ratio", "0.5", "--criterion", "taylr"), "did you mean 'taylor'?"),
        (("--ratio", "0.5", "--bits", "auto"), "goes with --size"),
        (("--ratio", "0.5", "--compensation", "obss"), "did you mean 'obs'?"),
        (("--size", "1000"), "1,000 bytes is too small"),
        (("--size", "1000", "--bits", "fp32"), "1,000 bytes is too small"),
        (("--ratio", "0.5", "--bits", "rate"), "goes with --size"),
        (("--size", "9kB", "--bits", "rate", "--networks", "fine"), "both or shared"),
        (("--ratio", "0.5", "--networks", "auto"), "give --size"),
    ],
)
def test_odd_options_are_refused(
    done: Done,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    said: str,
) -> None:
    output = tmp_path / "small.safetensors"
    try:
        status = prune_command(done, output, *options)
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    assert status != 0
    assert said in capsys.readouterr().err
    assert not output.exists()
