import pytest
import torch

from pruning import allocate, bytes_of, mebibytes, nonzero_parameters, prune
from tests.pruning_networks import NERF_WIDTHS, nerf_graph, random_network

# Report, Table 1: ratio → size in MB of one network.
PUBLISHED = {
    0.0: "2.273",
    0.15: "1.995",
    0.30: "1.717",
    0.50: "1.336",
    0.65: "1.058",
    0.80: "0.780",
    0.95: "0.495",
}


def test_the_original_network_has_its_parameters() -> None:
    network = random_network(nerf_graph(), NERF_WIDTHS, seed=0, dtype=torch.float32)
    assert network.parameters() == 595_844
    prunable = network.graph.prunable()
    assert sum(network.weights[name].numel() for name in prunable) == 491_008


@pytest.mark.parametrize(("ratio", "published"), PUBLISHED.items())
def test_the_reports_size_column_is_reproduced(ratio: float, published: str) -> None:
    network = random_network(nerf_graph(), NERF_WIDTHS, seed=0, dtype=torch.float32)
    pruned = prune(network, allocate("uniform", 8, ratio), "random", seed=0)
    assert f"{mebibytes(bytes_of(pruned.nonzero_parameters)):.3f}" == published


def test_nonzero_parameters_are_what_masking_leaves() -> None:
    from pruning import mask

    network = random_network(nerf_graph(), {**NERF_WIDTHS, "trunk.2": 10}, seed=0)
    keep = {"trunk.2": torch.arange(10) % 3 == 0, "trunk.5": torch.arange(256) < 20}
    masked = mask(network, keep)
    counted = sum(
        int(t.count_nonzero()) for t in (*masked.weights.values(), *masked.biases.values())
    )
    assert nonzero_parameters(network, keep) == counted


def test_parameters_kept_after_physical_removal() -> None:
    network = random_network(nerf_graph(), NERF_WIDTHS, seed=0, dtype=torch.float32)
    pruned = prune(network, allocate("uniform", 8, 0.5), "magnitude")
    n = 128
    trunk = (63 + 1) * n + 6 * (n + 1) * n + (63 + n + 1) * n
    rest = (n + 1) * 1 + (n + 1) * 256 + (256 + 27 + 1) * 128 + (128 + 1) * 3
    assert pruned.network.parameters() == trunk + rest


def test_bytes_at_a_precision() -> None:
    assert bytes_of(10) == 40
    assert bytes_of(10, torch.bfloat16) == 20
    assert bytes_of(10, torch.int8) == 10
