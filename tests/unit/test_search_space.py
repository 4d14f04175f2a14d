"""Parameters and the prunings that they stand for."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nerf.field import NerfModel, SampleCounts
from orchestrator.compress import Material, compress
from orchestrator.plan import CalibrationSet
from orchestrator.search.space import Choice, Range, Space, by_hand, uniform
from tests.unit.sweep_builder import sweep

SETS = (CalibrationSet(2, 16, 0), CalibrationSet(4, 16, 0))


def space_of(sets: tuple[CalibrationSet, ...] = SETS[:1], **search: Any) -> Space:
    made = sweep(prune=None, search={"criteria": "magnitude", "compensation": "none", **search})
    assert made.search is not None
    return Space(made.search, made.shape, sets)


def test_each_layer_of_each_network_has_a_ratio_of_its_own():
    space = space_of()
    layers = ["trunk.0", "trunk.1", "trunk.2", "feature", "view"]
    assert list(space.dimensions) == [f"{n}/{x}" for n in ("coarse", "fine") for x in layers]
    assert set(space.dimensions.values()) == {Range(0.0, 0.95)}
    assert list(space_of(networks="shared").dimensions) == [f"fine/{x}" for x in layers]


def test_what_the_sweep_names_several_of_is_searched_too():
    space = space_of(
        SETS, networks="fine", layers=[[0, 1], ["view"]], bits=["fp32", "int8"],
        criteria=["magnitude", "random"],
    )  # fmt: skip
    assert space.dimensions == {
        "fine/trunk.0+trunk.1": Range(0.0, 0.95),
        "fine/view": Range(0.0, 0.95),
        "criterion": Choice(("magnitude", "random")),
        "bits": Choice(("fp32", "int8")),
        "calibration_views": Choice((2, 4)),
    }


@given(ratio=st.floats(0, 0.95))
def test_a_pruning_has_one_set_of_parameters(ratio):
    space = space_of()
    rounded = space.rounded(dict.fromkeys(space.dimensions, ratio))
    assert space.rounded(rounded) == rounded
    for name, value in rounded.items():
        assert 0.0 <= value <= 0.95
        assert (value * space.layers[name]) == pytest.approx(round(value * space.layers[name]))
        assert value <= ratio + 1e-9 < value + 1 / space.layers[name] + 2e-9


@given(ratio=st.floats(0, 1), step=st.sampled_from([0.05, 0.1, 0.25]))
def test_ratios_keep_to_range_and_step(ratio, step):
    space = space_of(ratios={"low": 0.2, "high": 0.8, "step": step}, networks="fine")
    rounded = space.rounded(dict.fromkeys(space.dimensions, ratio))
    assert space.rounded(rounded) == rounded
    for name, value in rounded.items():
        assert 0.2 <= value <= 0.8
        config = space.config(rounded)
        ratios = dict(zip(config.layers, config.layer_ratios, strict=True))
        assert ratios[name] * space.layers[name] == pytest.approx(
            round(ratios[name] * space.layers[name])
        )


def test_the_model_has_the_widths_that_the_ratios_say(tmp_path):
    space = space_of()
    ratios = [0.5, 0.25, 0.0, 0.75, 0.5, 0.0, 0.125, 0.25, 0.5, 0.25]
    config = space.config(space.rounded(dict(zip(space.dimensions, ratios, strict=True))))
    dense = NerfModel.create(space.shape, SampleCounts(4, 4), 0)
    small = compress(tmp_path / "small", dense, config, Material(), {}).model
    coarse, fine = small.coarse.shape, small.fine.shape
    assert (*coarse.trunk, coarse.feature, coarse.view) == (4, 6, 8, 2, 2)
    assert (*fine.trunk, fine.feature, fine.view) == (8, 7, 6, 4, 3)
    assert config.ratio == pytest.approx(1 - (4 + 6 + 8 + 2 + 2 + 8 + 7 + 6 + 4 + 3) / 72)
    flat = config.flat()
    assert (flat["coarse_layer_0_ratio"], flat["fine_view_ratio"]) == (0.5, 0.25)


def test_layers_in_no_group_stay_whole_and_groups_go_together():
    space = space_of(networks="fine", layers=[[0, 2]])
    config = space.config({"fine/trunk.0+trunk.2": 0.5})
    assert config.layer_ratios == (0.5, 0.0, 0.5, 0.0, 0.0)


def test_uniform_and_hand_written_starts():
    space = space_of()
    assert set(uniform(space, 0.5).values()) == {0.5}
    found = by_hand(space, [0.5, 0.25, 0.0])
    assert [found[f"coarse/{x}"] for x in ("trunk.0", "trunk.1", "feature")] == [0.5, 0.25, 0.0]


def test_a_record_of_another_sweep_becomes_parameters():
    space = space_of(bits=["fp32", "int8"])
    config = space.config(space.from_ratios({"fine/trunk.1": 0.5}, {"bits": "int8"}))
    assert space.from_record(config.flat()) == {
        **dict.fromkeys(space.groups, 0.0), "fine/trunk.1": 0.5, "bits": "int8"
    }  # fmt: skip
    plain = {
        "networks": "both", "criterion": "magnitude", "compensation": "none", "bits": "fp32",
        **{f"layer_{i}_ratio": 0.25 for i in range(3)},
    }  # fmt: skip
    found = space.from_record(plain)
    assert found is not None
    assert [found[f"fine/{x}"] for x in ("trunk.0", "trunk.2", "view")] == [0.25, 0.25, 0.0]
    for strange in (
        {"networks": "fine"}, {"criterion": "random"}, {"layer_0_ratio": 0.99}, {"bits": "int4"},
    ):  # fmt: skip
        assert space.from_record({**plain, **strange}) is None
    by_size = {"networks": "both", "criterion": "magnitude", "compensation": "none", "size": 3}
    assert space.from_record(by_size) is None
