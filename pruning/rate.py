"""Rounding for rate and distortion: one step for all weights, in the unit of what the end loses.

Coded weights take as many bits as their grid is fine, so a file of some size should not spend the
same bits on every weight. To first order, rounding a layer's weights with later columns making up
for earlier ones (`quantization`, GPTQ) moves what the network is for by

    Σ_r s_r Σ_j δ_rj² / U_jj²        δ_rj up to half the step t_rj of weight r, j

and a coded weight takes log₂(1/t_rj) bits and a constant. The least of one for a given sum of the
other has all terms alike (reverse water-filling):

    t_rj = D U_jj / √s_r

with one D for all layers and networks, bisected until the file has its size. A grid has one step
a row, but ReLUs let a channel be scaled: multiplied by a_j > 0 where it is made and divided by it
where it is read, the function stays. With a_j = U_jj / κ the steps are those above. The columns of
external inputs cannot be scaled; their steps are alike.

Source: Cover and Thomas 2006, section 10.3.3 (reverse water-filling); Frantar et al. 2023 (GPTQ)
for the feedback; Lin et al. 2024 (AWQ) for scaling channels, there with powers of their size.

Letters: W a layer's weight (out × in), r an output, j an input, s_r how much an error in output r
counts, U the upper Cholesky factor of H⁻¹ in the order of falling power, H the damped covariance of
what the layer reads, a_j what a channel is multiplied by, κ the geometric mean of a layer's U_jj
(of its external inputs, where it has some), D the step.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pruning.calibration import Statistics, check_weights
from pruning.elimination import OutputWeights
from pruning.errors import PruningError
from pruning.network import Layer, Network
from pruning.quantization import HALF, Quantized, entropy, upper_factor
from pruning.solving import DAMPING, damped, input_gram, inverse

TOP = 127
"""The largest multiple of a step that an int8 code can say."""

COARSE = 4.0
"""A row's step is at most so many times its largest weight."""

SMALLEST = 1e-4
"""s_r counts at least so much of its layer's mean: what never reached the end may yet."""

WIDEST = 100.0
"""a_j lies within this factor of 1: a dead channel needs no coarser grid than that."""


@dataclass(frozen=True)
class _Scaled:
    """One layer with its inputs scaled, ready to be rounded at any step.

    Attributes:
        layer: who it is.
        weight: W / a_j, columns in the order of rounding.
        order: that order.
        exact: how many of them come first and are a diagonal matrix, which stays as it is.
        feedback: U_ik / U_ii for k after i, 0 elsewhere, of the scaled inputs in that order.
        step: κ / √s_r: row r's step is D times this.
        mean: E[x_j] of the scaled inputs in that order.
    """

    layer: Layer
    weight: Float[Tensor, "out in"]
    order: Int[Tensor, " in"]
    exact: int
    feedback: Float[Tensor, "in in"]
    step: Float[Tensor, " out"]
    mean: Float[Tensor, " in"]


class RateNetwork:
    """A network that can be rounded at any step D.

    Args:
        network: it is not changed. A layer that reads another one, without a ReLU, through a
            diagonal matrix (see `simplify.narrow_linear`) keeps that matrix exactly.
        statistics: of it, with the moment "gram".
        output_weights: s_r by layer, comparable between layers; 1 where a layer is left out.
        damping: of H, as a fraction of the mean power.

    Raises:
        PruningError: weights are not finite, or s_r do not fit their layer.
        StatisticsError: statistics are missing or of another network.
    """

    def __init__(
        self,
        network: Network,
        statistics: Statistics,
        output_weights: OutputWeights | None = None,
        damping: float = DAMPING,
    ) -> None:
        check_weights(network)
        self.network = network
        self._diagonal = dict(_diagonals(network))
        factors = {
            layer.name: _factor(
                input_gram(network, layer, statistics),
                network.input_slices(layer).get(self._diagonal.get(layer.name, "")),
                damping,
            )
            for layer in network.graph.layers
        }
        self._scales = self._channel_scales(factors)
        self._layers = [
            self._scaled(layer, factors[layer.name], (output_weights or {}).get(layer.name))
            for layer in network.graph.layers
        ]

    def _channel_scales(self, factors: Mapping[str, "_Factor"]) -> dict[str, Tensor]:
        """a_j of each layer that others read; their mean where several do."""
        graph, scales = self.network.graph, {}
        for source in graph.layers:
            logs = []
            for reader in graph.readers(source.name):
                u = factors[reader.name].power
                columns = self.network.input_slices(reader)[source.name]
                logs.append((u[columns] / self._typical(reader, u)).log())
            if logs:
                mean = torch.stack(logs).mean(dim=0).clamp(-math.log(WIDEST), math.log(WIDEST))
                exact = source.name in self._diagonal.values()
                scales[source.name] = torch.ones_like(mean) if exact else mean.exp()
        return scales

    def _typical(self, layer: Layer, u: Float[Tensor, " in"]) -> Float[Tensor, ""]:
        """κ of a layer: over its external inputs where it has some."""
        slices = self.network.input_slices(layer)
        fixed = [u[c] for name, c in slices.items() if name in self.network.graph.external]
        return torch.cat(fixed or [u]).log().mean().exp()

    def _scaled(self, layer: Layer, factor: "_Factor", weights: Tensor | None) -> _Scaled:
        W = self.network.weights[layer.name].double()
        s = torch.ones_like(W[:, 0]) if weights is None else weights.to(W)
        if s.shape != (len(W),) or not bool((torch.isfinite(s) & (s >= 0)).all()):
            raise PruningError(
                f"the output weights of layer {layer.name!r} must be {len(W)} finite numbers from "
                "0 up"
            )
        s = s.clamp(min=SMALLEST * float(s.mean())) if bool((s > 0).any()) else torch.ones_like(s)
        a = torch.ones_like(W[0])
        for source, columns in self.network.input_slices(layer).items():
            if source in self._scales:
                a[columns] = self._scales[source]
        order = factor.order
        upper = factor.upper / a[order]
        return _Scaled(
            layer,
            (W / a)[:, order],
            order,
            factor.exact,
            (upper / upper.diagonal()[:, None]).triu(1),
            self._typical(layer, factor.power) / s.sqrt(),
            (factor.mean * a)[order],
        )

    def quantize(self, step: float) -> Quantized:
        """The network on the grids of one step, as ``int8`` is stored.

        Args:
            step: D > 0. Where a row would need more levels than a code has, its own is coarser.

        Raises:
            PruningError: the step is no positive number, or a scale or bias is beyond float16.
        """
        if not 0 < step < math.inf:
            raise PruningError(f"a step must be a number above 0, got {step!r}")
        scales, grids, weights = dict(self._scales), {}, {}
        tables: dict[str, dict[str, Tensor]] = {}
        # Readers first: what is read through a diagonal matrix is scaled by the reader's grid.
        for of in reversed(self._layers):
            name, W = of.layer.name, of.weight.clone()
            a = scales.get(name, torch.ones_like(of.step))
            rest = torch.nn.functional.pad(W[:, of.exact :], (0, 1)).abs().amax(dim=1)
            rest = torch.where(rest > 0, rest, W.abs().amax(dim=1))
            # Coarser than what rounds all of a row to 0 says no more.
            stored = ((step * of.step).clamp(max=COARSE * rest, min=rest / TOP) * a).half()
            grid = stored.double() / a
            if name in self._diagonal:
                # A whole number of steps, near what it is: the channel is scaled by little. The
                # only entry of a column is in the row that its channel is of.
                entries, at = W[:, : of.exact].max(dim=0)
                whole = (entries / grid[at]).round().clamp(1, TOP) * grid[at]
                scales[self._diagonal[name]] = (entries / whole)[at.argsort()]
                W[:, : of.exact] *= whole / entries
            tables[name], grids[name], weights[name] = {"scale": stored.cpu()}, grid, W
        codes = self._rounded(weights, grids)
        for of in self._layers:
            name = of.layer.name
            a = scales.get(name, torch.ones_like(of.step))
            lost = weights[name] - codes[name] * grids[name][:, None]
            lost[:, : of.exact] = 0
            b = (self.network.biases[name].double() + lost @ of.mean) * a
            tables[name]["bias"] = b.half().cpu()
            for what, table in tables[name].items():
                if not bool(torch.isfinite(table).all()):
                    raise PruningError(
                        f"layer {name!r} has a {what} beyond what float16 can hold; use 'fp32'"
                    )
            unordered = torch.empty_like(codes[name])
            unordered[:, of.order] = codes[name]
            codes[name] = (unordered + TOP).to(torch.uint8).cpu()
        return Quantized(self.network.graph, dict.fromkeys(codes, "int8"), codes, tables)

    def _rounded(
        self, weights: Mapping[str, Tensor], grids: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Multiples of the steps: all layers column after column, side by side."""
        rows = max(len(of.weight) for of in self._layers)
        columns = max(of.weight.shape[1] for of in self._layers)
        like = self._layers[0].weight
        left = like.new_zeros(len(self._layers), rows, columns)
        feedback = like.new_zeros(len(self._layers), columns, columns)
        for i, of in enumerate(self._layers):
            n, m = of.weight.shape
            grid = grids[of.layer.name][:, None]
            # A row that float16 gave no step has nothing to say.
            steps = torch.where(grid > 0, weights[of.layer.name] / grid, 0.0)
            left[i, :n, :m] = steps
            feedback[i, :m, :m] = of.feedback
        codes = torch.zeros_like(left)
        for i in range(columns):
            codes[:, :, i] = left[:, :, i].round().clamp(-TOP, TOP)
            lost = left[:, :, i] - codes[:, :, i]
            left[:, :, i + 1 :] -= lost[:, :, None] * feedback[:, None, i, i + 1 :]
        return {
            of.layer.name: codes[i, : of.weight.shape[0], : of.weight.shape[1]].clone()
            for i, of in enumerate(self._layers)
        }


@dataclass(frozen=True)
class _Factor:
    """Of what a layer reads: the order of rounding and U.

    Attributes:
        order: columns, those of a diagonal matrix first, then by falling power.
        exact: how many those are.
        upper: U in that order.
        power: U_jj, unordered.
        mean: E[x_j], unordered.
    """

    order: Int[Tensor, " in"]
    exact: int
    upper: Float[Tensor, "in in"]
    power: Float[Tensor, " in"]
    mean: Float[Tensor, " in"]


def _factor(gram: Float[Tensor, "n1 n1"], exact: slice | None, damping: float) -> _Factor:
    mean = gram[:-1, -1]
    H = damped(gram, damping)[:-1, :-1] - torch.outer(mean, mean)
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    first = torch.zeros_like(mean, dtype=torch.bool)
    if exact is not None:
        first[exact] = True
    order = torch.cat((order[first[order]], order[~first[order]]))
    upper = upper_factor(inverse(H[order][:, order]))
    power = torch.empty_like(mean)
    power[order] = upper.diagonal()
    return _Factor(order, int(first.sum()), upper, power, mean)


def _diagonals(network: Network) -> Iterator[tuple[str, str]]:
    """The layers that read another one, without a ReLU, through a diagonal matrix alone."""
    for layer in network.graph.layers:
        for source, columns in network.input_slices(layer).items():
            if source in network.graph.external or network.graph[source].relu:
                continue
            part = network.weights[layer.name][:, columns]
            alone = len(list(network.graph.readers(source))) == 1
            square = part.shape[0] == part.shape[1] and alone
            if square and bool((part.diagonal() > 0).all() and (part != 0).sum() == len(part)):
                yield layer.name, source


def coded_bytes(quantized: Quantized) -> float:
    """About what a file takes for codes and tables: entropies, and a byte for each code used."""
    total = 0.0
    for codes in quantized.codes.values():
        total += codes.numel() * entropy(codes) / 8 + int(codes.max()) - int(codes.min()) + 1
    return total + HALF * sum(
        table.numel() for tables in quantized.tables.values() for table in tables.values()
    )
