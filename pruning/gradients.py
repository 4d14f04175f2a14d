"""Statistics that need the gradient of a loss: first-order Taylor terms and Fisher diagonals.

They come from a pass of their own (forward and backward), over the same batches and cells as
`calibration.collect`, and are put beside its moments with `Statistics.joined`.

Letters: a a layer's output after the activation, z before it, g = ∂L/∂a, L the loss, w a sample's
weight (1 unless given). A *run* is a number of consecutive samples that the loss sees together,
such as the samples on one ray.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from pruning.calibration import (
    CalibrationBatch,
    Cell,
    NestedStatistics,
    Statistics,
    check_weights,
    checked_batch,
    finite_on_cpu,
)
from pruning.errors import StatisticsError
from pruning.network import Network

Loss = Callable[[Mapping[str, Tensor], CalibrationBatch], Tensor]
"""(output of each layer that nothing reads, the batch) → the *sum* of the loss over its runs.
Whatever else the loss needs, photos and sample positions say, a subclass of `CalibrationBatch`
can carry."""


def collect_gradients(
    network: Network,
    batches: Iterable[CalibrationBatch],
    loss: Loss,
    run_length: int = 1,
) -> NestedStatistics:
    """Run the calibration samples forward and the loss backward once.

    Args:
        network: computed in its own precision, on its own device; its weights get no gradients.
        batches: consumed one at a time; all external inputs are needed.
        loss: gives the summed loss of a batch. Samples must not influence each other's outputs but
            through their own run's term, or the averages depend on the batches.
        run_length: consecutive samples that make a run; each batch holds whole runs.

    Returns:
        By layer: ``taylor`` E[a·g] and ``taylor_square`` E[(Σ_run a·g)²] (mean over runs) of the
        prunable layers, ``fisher`` E[(∂L/∂z)²] (mean over samples) of all. A run counts with the
        mean weight of its samples.

    Raises:
        StatisticsError: there are no samples, a batch does not fit, or a value is NaN or infinite.
    """
    check_weights(network)
    last = network.graph.layers[-1].name
    heads = {x.name for x in network.graph.layers if not any(network.graph.readers(x.name))}
    totals: dict[Cell, Statistics] = {}
    for batch in batches:
        inputs, w = checked_batch(network, batch, last)
        n_rows = len(next(iter(inputs.values())))
        if n_rows == 0:
            continue
        if n_rows % run_length:
            raise StatisticsError(
                f"a calibration batch of {n_rows} samples does not hold whole runs of {run_length}"
            )
        outputs = _backward(network, inputs, heads, lambda o, b=batch: loss(o, b))  # type: ignore[misc]
        sums = {}
        for layer in network.graph.layers:
            a, g = outputs[layer.name]
            gz = g * (a > 0) if layer.relu else g
            sums[layer.name] = {"fisher": _weighted(gz.square(), w)}
            if layer.prunable:
                runs = (a * g).unflatten(0, (-1, run_length)).sum(dim=1)
                of_run = None if w is None else w.unflatten(0, (-1, run_length)).mean(dim=1)
                sums[layer.name] |= {
                    "taylor": _weighted(a * g, w),
                    "taylor_square": run_length * _weighted(runs.square(), of_run),
                }
        weight = float(n_rows) if w is None else float(w.sum())
        seen = Statistics(n_rows, weight, finite_on_cpu(sums))
        totals[batch.cell] = totals[batch.cell] + seen if batch.cell in totals else seen
    if not totals:
        raise StatisticsError("the calibration set holds no samples; give at least one")
    return NestedStatistics({cell: totals[cell] for cell in sorted(totals)})


def probe(
    values: Float[Tensor, "*shape"], generator: torch.Generator | None = None
) -> Float[Tensor, ""]:
    """Σ_k ε_k f_k with random signs ε: a loss whose ``fisher`` is E[Σ_k (∂f_k/∂z)²] on average.

    That is how far a small error in z moves f (in squares), whatever the targets are. Ask for the
    moment under the name ``curvature``.

    Args:
        values: f, such as the pixels that a batch renders to.
        generator: draws the signs, on the device of `values`.

    Source: Hutchinson 1990, for the signs; Schraudolph 2002, for the Gauss-Newton matrix.
    """
    signs = torch.rand(values.shape, generator=generator, device=values.device) < 0.5
    return torch.where(signs, values, -values).sum()


def _backward(
    network: Network,
    inputs: Mapping[str, Tensor],
    heads: set[str],
    loss: Callable[[Mapping[str, Tensor]], Tensor],
) -> dict[str, tuple[Tensor, Tensor]]:
    """(a, ∂L/∂a) of each layer, float64."""
    with torch.enable_grad():
        # Biases that ask for gradients are what ties every output to the graph.
        traced = Network(
            network.graph,
            {name: W.detach() for name, W in network.weights.items()},
            {name: b.detach().clone().requires_grad_() for name, b in network.biases.items()},
        )
        outputs = {}
        for layer, _, a in traced.activations(inputs):
            a.retain_grad()
            outputs[layer.name] = a
        value = loss({name: outputs[name] for name in heads})
        if value.ndim or not bool(torch.isfinite(value)):
            raise StatisticsError(
                f"the loss must be one finite number, the sum over a batch; got {value}"
            )
        value.backward()
    return {
        name: (
            a.detach().double(),
            torch.zeros_like(a).double() if a.grad is None else a.grad.double(),
        )
        for name, a in outputs.items()
    }


def _weighted(
    values: Float[Tensor, "rows channels"], w: Float[Tensor, " rows"] | None
) -> Float[Tensor, " channels"]:
    return values.sum(dim=0) if w is None else w @ values
