import itertools

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import (
    CalibrationBatch,
    Cell,
    Layer,
    LayerGraph,
    NestedStatistics,
    Network,
    PruningError,
    Statistics,
    StatisticsError,
    cells,
    collect,
)
from tests.pruning_networks import NERF_WIDTHS, nerf_graph, random_inputs, random_network

VIEWS, RAYS = (1, 3, 5), (2, 4)
SMALL = {name: min(width, 7) for name, width in NERF_WIDTHS.items()}


def small_nerf(dtype: torch.dtype = torch.float64) -> Network:
    return random_network(nerf_graph(), SMALL, seed=0, dtype=dtype)


def rows(inputs: dict[str, torch.Tensor], chosen: slice | list[int]) -> dict[str, torch.Tensor]:
    return {name: values[chosen] for name, values in inputs.items()}


def slow_mean(
    network: Network, inputs: dict[str, torch.Tensor], w: torch.Tensor, layer: str
) -> torch.Tensor:
    """One sample at a time, in Python's own arithmetic."""
    total = [0.0] * network.width(layer)
    for i in range(len(w)):
        for spec, _, a in network.activations(rows(inputs, [i])):
            if spec.name == layer:
                total = [t + float(w[i]) * float(v) for t, v in zip(total, a[0], strict=True)]
    return torch.tensor(total, dtype=torch.float64) / float(w.sum())


@given(cuts=st.sets(st.integers(1, 29)), weighted=st.booleans())
@settings(deadline=None, max_examples=25)
def test_statistics_do_not_depend_on_chunks(cuts: set[int], weighted: bool) -> None:
    network = small_nerf()
    inputs = random_inputs(network, 30, seed=3)
    w = torch.rand(30, generator=torch.Generator().manual_seed(0)) if weighted else None
    edges = [0, *sorted(cuts), 30]
    chunks = [slice(a, b) for a, b in itertools.pairwise(edges)]
    chunked = collect(
        network, (CalibrationBatch(rows(inputs, c), None if w is None else w[c]) for c in chunks)
    ).subset()
    whole = collect(network, [CalibrationBatch(inputs, w)]).subset()
    assert chunked.rows == whole.rows == 30
    assert chunked.weight == pytest.approx(whole.weight, rel=1e-12)
    for name in network.graph.prunable():
        torch.testing.assert_close(
            chunked.average(name, "mean"), whole.average(name, "mean"), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_equals_a_slow_one(weighted: bool) -> None:
    network = small_nerf()
    inputs = random_inputs(network, 9, seed=5)
    w = torch.arange(9.0) if weighted else torch.ones(9)
    batch = CalibrationBatch(inputs, w if weighted else None)
    statistics = collect(network, [batch]).subset()
    for name in ("trunk.0", "trunk.5", "trunk.7"):
        torch.testing.assert_close(
            statistics.average(name, "mean"),
            slow_mean(network, inputs, w, name),
            rtol=1e-12,
            atol=0,
        )


def test_a_batch_counts_as_its_rows() -> None:
    network = small_nerf()
    inputs = random_inputs(network, 100, seed=1)
    uneven = [CalibrationBatch(rows(inputs, slice(0, 99))), CalibrationBatch(rows(inputs, [99]))]
    one = collect(network, [CalibrationBatch(inputs)]).subset()
    two = collect(network, uneven).subset()
    torch.testing.assert_close(two.average("trunk.4", "mean"), one.average("trunk.4", "mean"))


def test_float32_activations_are_summed_in_float64() -> None:
    graph = LayerGraph(
        {"x": 1},
        (
            Layer("hidden", ("x",), relu=True, prunable=True),
            Layer("head", ("hidden",), relu=False, prunable=False),
        ),
    )
    weights = {"hidden": torch.ones(1, 1), "head": torch.ones(1, 1)}
    network = Network(graph, weights, {"hidden": torch.zeros(1), "head": torch.zeros(1)})
    # In float32 the ones would vanish beside 2²⁵.
    values = torch.ones(65, 1)
    values[0] = 2.0**25
    total = collect(network, [CalibrationBatch({"x": values})]).subset().sums["hidden"]["mean"]
    assert total.dtype == torch.float64
    assert total.item() == 2**25 + 64


def nested(order: list[int] | None = None) -> tuple[Network, NestedStatistics, torch.Tensor]:
    """Statistics over a grid of views × rays, and the inputs that they came from."""
    network = small_nerf()
    points = torch.randn(5, 4, 63, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pieces = cells(VIEWS, RAYS)
    batches = []
    for i in order or range(len(pieces)):
        (v0, r0), (v1, r1) = pieces[i].start, pieces[i].stop
        batches.append(
            CalibrationBatch({"point": points[v0:v1, r0:r1].flatten(0, 1)}, None, pieces[i])
        )
    return network, collect(network, batches), points


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("rays", RAYS)
def test_one_pass_serves_every_nested_size(views: int, rays: int) -> None:
    network, statistics, points = nested()
    direct = collect(network, [CalibrationBatch({"point": points[:views, :rays].flatten(0, 1)})])
    subset = statistics.subset((views, rays))
    assert subset.rows == views * rays
    for name in network.graph.prunable():
        torch.testing.assert_close(
            subset.average(name, "mean"), direct.subset().average(name, "mean"), rtol=1e-12, atol=0
        )


def test_the_order_of_cells_does_not_change_a_bit() -> None:
    _, one, _ = nested()
    _, two, _ = nested([3, 0, 5, 2, 1, 4])
    for key, value in one.to_tensors().items():
        assert torch.equal(value, two.to_tensors()[key])


def test_sizes_that_were_not_collected_are_refused() -> None:
    _, statistics, _ = nested()
    assert statistics.sizes() == tuple((v, r) for v in VIEWS for r in RAYS)
    for size in ((2, 4), (5, 3), (6, 4), (5,), ()):
        with pytest.raises(StatisticsError, match=r"the sizes are \[\(1, 2\)"):
            statistics.subset(size)


def test_a_missing_cell_is_noticed() -> None:
    _, statistics, _ = nested()
    holed = NestedStatistics(
        {cell: s for cell, s in statistics.cells.items() if cell.start != (1, 0)}
    )
    assert holed.sizes() == ((1, 2), (1, 4))


def test_two_passes_merge() -> None:
    network, whole, points = nested()
    first, second = cells(VIEWS, RAYS)[::2], cells(VIEWS, RAYS)[1::2]
    parts = [
        collect(
            network,
            [
                CalibrationBatch(
                    {"point": points[c.start[0] : c.stop[0], c.start[1] : c.stop[1]].flatten(0, 1)},
                    None,
                    c,
                )
                for c in half
            ],
        )
        for half in (first, second)
    ]
    merged = parts[0] + parts[1]
    assert torch.equal(
        merged.subset((5, 4)).average("trunk.3", "mean"),
        whole.subset((5, 4)).average("trunk.3", "mean"),
    )


def test_tensors_round_trip_through_safetensors_and_read_only_arrays() -> None:
    _, statistics, _ = nested()
    tensors = statistics.to_tensors()
    arrays = {key: value.numpy() for key, value in tensors.items()}
    for array in arrays.values():
        array.flags.writeable = False
    for copy in (
        NestedStatistics.from_tensors(safetensors.torch.load(safetensors.torch.save(tensors))),
        NestedStatistics.from_tensors(arrays),
    ):
        again = copy.to_tensors()
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_statistics_without_cells_round_trip() -> None:
    network = small_nerf()
    statistics = collect(network, [CalibrationBatch(random_inputs(network, 3, seed=0))])
    again = NestedStatistics.from_tensors(statistics.to_tensors())
    assert again.sizes() == ((),)
    assert again.subset().rows == 3


@pytest.mark.parametrize(
    "tensors",
    [
        {"nonsense": np.zeros(3)},
        {"0-1/rows": np.zeros(2)},
        {"0-x/rows": np.array(1)},
        {"all/rows": np.array(1), "all/weight": np.array(1.0)},
    ],
)
def test_damaged_tensors_are_refused(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(StatisticsError, match="collect them again"):
        NestedStatistics.from_tensors(tensors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_weights_are_refused_by_layer(bad: float) -> None:
    network = small_nerf()
    network.weights["trunk.3"][2, 1] = bad
    with pytest.raises(StatisticsError, match=r"'trunk\.3'"):
        collect(network, [CalibrationBatch(random_inputs(network, 4, seed=0))])


def test_overflowing_activations_are_refused_by_layer() -> None:
    network = small_nerf(torch.float32)
    network.weights["trunk.1"].fill_(3e38)
    inputs = random_inputs(network, 4, seed=0, dtype=torch.float32)
    with pytest.raises(StatisticsError, match=r"activations of layer 'trunk\.1' are NaN"):
        collect(network, [CalibrationBatch(inputs)])


def test_bad_batches_are_refused() -> None:
    network = small_nerf()
    good = random_inputs(network, 4, seed=0)
    point = good["point"]
    w = torch.ones(4)
    for batch, message in [
        (CalibrationBatch({"direction": good["direction"]}), "lacks input 'point'"),
        (CalibrationBatch({"point": point[:, :5]}), r"must have shape \(samples, 63\)"),
        (CalibrationBatch({"point": point * float("nan")}), "input 'point' holds NaN"),
        (CalibrationBatch(good, w[:3]), "'weights': 3"),
        (CalibrationBatch(good, -w), "not negative"),
        (CalibrationBatch(good, w * float("inf")), "must be finite"),
        (CalibrationBatch({"point": point[:0]}), "no samples"),
    ]:
        with pytest.raises(StatisticsError, match=message):
            collect(network, [batch])
    with pytest.raises(StatisticsError, match="no samples"):
        collect(network, [])
    with pytest.raises(PruningError, match="did you mean 'mean'"):
        collect(network, [CalibrationBatch(good)], moments=("meen",))


def test_inputs_of_layers_after_the_last_prunable_one_may_be_left_out() -> None:
    network = small_nerf()
    inputs = random_inputs(network, 4, seed=0)
    without = collect(network, [CalibrationBatch({"point": inputs["point"]})])
    assert "trunk.7" in without.subset().sums
    assert "density" not in without.subset().sums


def test_averages_that_do_not_exist_are_refused() -> None:
    network = small_nerf()
    inputs = random_inputs(network, 4, seed=0)
    statistics = collect(network, [CalibrationBatch(inputs, torch.zeros(4))]).subset()
    with pytest.raises(StatisticsError, match=r"sum to 0\.0"):
        statistics.average("trunk.0", "mean")
    with pytest.raises(StatisticsError, match="no statistics of layer 'density'"):
        statistics.average("density", "mean")
    with pytest.raises(StatisticsError, match=r"'gram' of layer 'trunk\.0' was not collected"):
        statistics.average("trunk.0", "gram")
    with pytest.raises(StatisticsError, match="same layers and moments"):
        _ = statistics + Statistics(1, 1.0, {})


def test_cells_are_boxes_between_sizes() -> None:
    assert cells((4, 1), (64,)) == (Cell((0, 0), (1, 64)), Cell((1, 0), (4, 64)))
    assert cells() == (Cell(),)
    for sizes in ((0, 4), ()):
        with pytest.raises(StatisticsError, match="at least one size"):
            cells(sizes)
    with pytest.raises(StatisticsError, match="start < stop"):
        Cell((3,), (3,))
