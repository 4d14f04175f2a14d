"""How long pruning takes on two networks of the original NeRF's shape, with random weights.

Usage: ``python -m benchmarks.pruning_cost [cpu|cuda] [views] [rays]``

Prints a table of seconds (the second of two runs). The default on CUDA is 17 views × 1,024 rays.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from nerf.field import Field, FieldShape
from orchestrator.bridge import network_of
from pruning import (
    Budget,
    CalibrationBatch,
    Network,
    Sizing,
    collect,
    collect_gradients,
    elimination_paths,
    quantize,
    sequential,
    shrink,
    widths_within,
)

SAMPLES = {"coarse": 64, "fine": 128}
RAYS_AT_ONCE = 4096
MOMENTS = ("mean", "absolute", "square", "firing", "gram")
Result = TypeVar("Result")


def main(device: str, views: int, rays: int) -> None:
    """Time each step and print it."""
    networks = {name: network(seed, device) for seed, name in enumerate(SAMPLES)}
    print(f"{device}: {views} views × {rays} rays, torch {torch.__version__}")
    statistics = {}
    for name, dense in networks.items():
        batches = samples(dense, SAMPLES[name], views * rays, device)
        nested = timed(f"collect {name}", device, lambda d=dense, b=batches: collect(d, b, MOMENTS))
        statistics[name] = nested.subset()
        timed(
            f"gradients {name}",
            device,
            lambda d=dense, b=batches, n=name: collect_gradients(
                d, b, lambda outputs, _: outputs["rgb"].square().sum(), SAMPLES[n]
            ),
        )
    paths = timed("elimination paths", device, lambda: elimination_paths(networks, statistics))
    budget = Budget.of("params", 300_000)
    sizing = Sizing(networks, budget, paths=paths)
    timed("chain allocation", device, lambda: widths_within("chain", sizing))
    pruned = timed("shrink", device, lambda: shrink(networks, statistics, budget))
    batches = samples(networks["fine"], SAMPLES["fine"], RAYS_AT_ONCE // 16, device)
    timed(
        f"sequential, {RAYS_AT_ONCE // 16} rays",
        device,
        lambda: sequential(networks["fine"], pruned["fine"].keep, batches),
    )
    for scheme in ("int8", "gptq4", "kmeans5"):
        timed(scheme, device, lambda s=scheme: quantize(networks["fine"], s, statistics["fine"]))


def network(seed: int, device: str) -> Network:
    """A field with PyTorch's initial weights, its view branch prunable too."""
    torch.manual_seed(seed)
    dense = network_of(Field(FieldShape()).to(device))
    layers = tuple(
        replace(layer, prunable=layer.prunable or layer.name in ("feature", "view"))
        for layer in dense.graph.layers
    )
    return Network(replace(dense.graph, layers=layers), dense.weights, dense.biases)


def samples(dense: Network, per_ray: int, rays: int, device: str) -> list[CalibrationBatch]:
    """Random inputs; every batch is the same memory."""
    at_once = min(rays, RAYS_AT_ONCE)
    inputs = {
        name: torch.randn(at_once * per_ray, width, device=device)
        for name, width in dense.graph.external.items()
    }
    whole = [CalibrationBatch(inputs)] * (rays // at_once)
    left = (rays % at_once) * per_ray
    return whole + [CalibrationBatch({n: v[:left] for n, v in inputs.items()})] * bool(left)


def timed(what: str, device: str, step: Callable[[], Result]) -> Result:
    """Run twice, print the seconds of the second time."""
    for _ in range(2):
        started = time.perf_counter()
        result = step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    print(f"{what:24} {seconds:8.3f} s", flush=True)
    return result


if __name__ == "__main__":
    given = sys.argv[1:]
    chosen = given[0] if given else "cuda" if torch.cuda.is_available() else "cpu"
    default = (17, 1024) if chosen == "cuda" else (1, 64)
    main(chosen, *(int(given[i + 1]) if len(given) > i + 1 else default[i] for i in range(2)))
