"""Named recipes of a sweep file."""

import pytest

from nerf.recipe import PRESETS, Recipe
from orchestrator.errors import SpecError
from orchestrator.plan import make_plan
from orchestrator.store import Store
from tests.unit.sweep_builder import sweep

EXPLICIT = {
    "train__iterations": None,
    "train__rays": None,
    "train__learning_rate": None,
    "train__decay_iterations": None,
}


def test_a_preset_fills_in_what_the_file_leaves_out():
    found = sweep(**EXPLICIT, train__preset="large-batch").recipes
    assert found == (
        Recipe(
            iterations=50_000,
            rays=4096,
            learning_rate=1e-3,
            decay_iterations=62_500,
            validation=0.01,
        ),
    )
    (mixed,) = sweep(**{**EXPLICIT, "train__rays": 8192}, train__preset="large-batch").recipes
    assert (mixed.rays, mixed.learning_rate) == (8192, 1e-3)


def test_a_sweep_is_its_values_whoever_named_them():
    plain = sweep(**EXPLICIT)
    assert sweep(**EXPLICIT, train__preset="report").hash == plain.hash
    named = sweep(**EXPLICIT, train__preset="large-batch")
    values = {f"train__{name}": value for name, value in PRESETS["large-batch"].items()}
    assert sweep(**values).hash == named.hash
    assert named.hash != plain.hash


def test_the_large_batch_sees_as_many_rays_and_decays_with_them():
    large, report = Recipe(**PRESETS["large-batch"]), Recipe()
    assert large.rays * large.iterations == report.rays * report.iterations
    assert large.rays * large.decay_iterations == report.rays * report.decay_iterations


def test_an_unknown_preset_is_refused_with_those_that_there_are():
    with pytest.raises(SpecError, match="large-batch"):
        sweep(train__preset="big-batch")


def test_the_fast_preset_is_by_muon_along_a_cosine():
    (found,) = sweep(**EXPLICIT, train__preset="fast").recipes
    assert (found.optimizer, found.anneal, found.rays) == ("muon", "cosine", 2048)
    assert found == Recipe(**PRESETS["fast"], validation=0.01)


def test_what_makes_no_difference_is_not_in_the_key_of_a_training(tmp_path):
    """Earlier sweeps keep theirs; a cosine has no decay."""

    def key_of(**changes):
        return make_plan(sweep(**changes), Store(tmp_path / "store")).trainings[0].key

    plain = key_of()
    assert key_of(train__optimizer="adam", train__anneal="exponential") == plain
    cosine = {key_of(train__anneal="cosine", train__decay=decay) for decay in (0.1, 0.2)}
    assert len({plain, *cosine, key_of(train__optimizer="muon")}) == 3
