import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import PruningError, merge_linear, narrow_linear, remove
from tests.pruning_networks import (
    NERF_WIDTHS,
    draw_network,
    heads,
    nerf_graph,
    random_inputs,
    random_network,
)

NERF = random_network(nerf_graph(), NERF_WIDTHS, seed=0)


def test_the_original_nerf_loses_its_feature_layer() -> None:
    merged = merge_linear(NERF)
    assert NERF.parameters() - merged.parameters() == 65_792
    assert [layer.name for layer in merged.graph.layers if layer.name == "feature"] == []
    assert merged.graph["view"].inputs == ("trunk.7", "direction")
    inputs = random_inputs(NERF, 5, seed=1)
    for head, values in heads(NERF, inputs).items():
        torch.testing.assert_close(heads(merged, inputs)[head], values, rtol=1e-10, atol=1e-10)


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_any_graph_computes_the_same(data: st.DataObject) -> None:
    network = draw_network(data)
    linear = [
        layer.name
        for layer in network.graph.layers
        if not layer.relu and any(network.graph.readers(layer.name))
    ]
    chosen = None if not linear else data.draw(st.none() | st.sets(st.sampled_from(linear)))
    merged = merge_linear(network, chosen)
    assert chosen is not None or merged.parameters() <= network.parameters()
    inputs = random_inputs(network, 4, seed=0)
    expected = heads(network, inputs)
    got = heads(merged, inputs)
    assert got.keys() == expected.keys()
    for head in expected:
        torch.testing.assert_close(got[head], expected[head], rtol=1e-9, atol=1e-9)


def test_a_narrow_layer_is_left_where_merging_would_cost() -> None:
    graph = nerf_graph(branch=True)
    network = random_network(graph, NERF_WIDTHS, seed=0)
    narrow = remove(network, {"feature": torch.arange(256) < 20})
    assert "feature" in {layer.name for layer in merge_linear(narrow).graph.layers}
    assert "feature" not in {layer.name for layer in merge_linear(narrow, ["feature"]).graph.layers}


def test_layers_that_cannot_be_merged_are_named() -> None:
    for name in ("trunk.3", "rgb"):
        with pytest.raises(PruningError, match=rf"'{name}' cannot be merged.*\['feature'\]"):
            merge_linear(NERF, [name])


def test_the_original_nerfs_feature_layer_gets_as_narrow_as_its_reader() -> None:
    narrow = narrow_linear(NERF)
    assert NERF.parameters() - narrow.parameters() == 2 * 128 * 128 + 128 * 128 + 128
    assert narrow.graph == NERF.graph
    torch.testing.assert_close(narrow.weights["view"][:, :128], torch.eye(128).double())
    inputs = random_inputs(NERF, 5, seed=1)
    for head, values in heads(NERF, inputs).items():
        torch.testing.assert_close(heads(narrow, inputs)[head], values, rtol=1e-10, atol=1e-10)


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_any_narrowed_graph_computes_the_same(data: st.DataObject) -> None:
    network = draw_network(data)
    narrow = narrow_linear(network)
    assert narrow.parameters() <= network.parameters()
    inputs = random_inputs(network, 6, seed=0)
    for head, values in heads(network, inputs).items():
        torch.testing.assert_close(heads(narrow, inputs)[head], values, rtol=1e-8, atol=1e-8)
