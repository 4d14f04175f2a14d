"""Weights that are trained in the few bits that their file will hold (straight-through).

Every step rounds the float weights to what the file can say and computes with those; the gradient
goes straight through the rounding to the float weights, and on to the scales, offsets or codebook
of the layer, which are trained too. At the end the codes are written as they are: the model that
was trained is, to the bit, the one that the file holds.

Letters: W the float weight, Ŵ the rounded one, c a code, b its bits, s a row's scale, o its offset,
Q = 2^(b−1) − 1. The arrays are those of `nerf.packing`:

    int8     Ŵ = s (c − Q)      c − Q = round(clamp(W / s, −Q, Q))
    uint8    Ŵ = s c + o        c = round(clamp((W − o) / s, 0, 2^b − 1))
    kmeans8  Ŵ = codebook[c]    c the nearest entry
    fp16     Ŵ = W, rounded

Source: Bengio et al. 2013 for the straight-through gradient; Esser et al. 2020 (LSQ), eq. 1–3, for
that of the scale, here one a row and trained by its logarithm.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

from nerf.packing import FLOATS

SMALLEST_SCALE = 1e-6
"""Below it float16 is too coarse to train a scale; a row of zeros gets it."""

TABLES = {"int": ("scale",), "uint": ("scale", "offset"), "kmeans": ("codebook",)}
"""What a kind of scheme trains beside the weights."""


@dataclass
class RoundedLayer:
    """How one layer is rounded while it is trained.

    A table is what it began as and a trained change d, zero at first: a scale s₀ exp(d), an offset
    or entry v₀ + r d with r the spread of the layer's weights. So one learning rate suits them all.

    Attributes:
        scheme: as in `nerf.packing`.
        start: the tables at the beginning, float32, by name.
        spread: r.
        change: d of each table, to be trained.
        ends: the lowest and the highest multiple of each row's scale; of grids alone.
    """

    scheme: str
    start: dict[str, Tensor]
    spread: Tensor
    change: dict[str, Tensor]
    ends: Float[Tensor, "out 2"] = field(init=False)

    def __post_init__(self) -> None:
        kind, bits = parse_scheme(self.scheme)
        if bits is not None and "scale" in self.start:
            ends = torch.tensor(levels(kind, bits), device=self.start["scale"].device)
            self.ends = ends.float().expand(len(self.start["scale"]), 2)

    @classmethod
    def begin(
        cls, scheme: str, weight: Float[Tensor, "out in"], tables: Mapping[str, Tensor]
    ) -> "RoundedLayer":
        """Rounding of a layer from the tables that quantising it as it is gave.

        Args:
            scheme: name of the scheme.
            weight: W, whose device is used.
            tables: ``scale``, ``offset``, ``codebook``: those that the scheme has.

        Raises:
            ValueError: the scheme is unknown or a table is missing.
        """
        kind, _ = parse_scheme(scheme)
        names = TABLES.get(kind, ())
        missing = [name for name in names if name not in tables]
        if missing:
            raise ValueError(f"rounding to {scheme!r} needs {', '.join(missing)} to begin with")
        start = {name: tables[name].to(weight.device, torch.float32).clone() for name in names}
        if "scale" in start:
            start["scale"].clamp_(min=SMALLEST_SCALE)
        if "codebook" in start:
            start["codebook"] = start["codebook"].sort().values
        spread = weight.detach().float().std(unbiased=False).clamp(min=SMALLEST_SCALE)
        change = {name: torch.zeros_like(table).requires_grad_() for name, table in start.items()}
        return cls(scheme, start, spread, change)

    def coarser(self, factor: float) -> "RoundedLayer":
        """The same with every scale so much larger: fewer levels are used, and coded shorter."""
        start = {n: t * factor if n == "scale" else t for n, t in self.start.items()}
        return replace(self, start=start)

    def table(self, name: str) -> Tensor:
        """A table as the file will hold it (rounded to float16), with its gradient."""
        return trained_table(name, self.start, self.change, self.spread)

    def weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Ŵ, with the gradient straight through."""
        kind, bits = parse_scheme(self.scheme)
        if bits is None:
            return straight(weight, FLOATS[kind])
        if kind == "kmeans":
            entries = self.table("codebook")
            places = torch.arange(len(entries), device=weight.device)
            one_hot = (self._nearest(weight)[..., None] == places).to(weight.dtype)
            return (one_hot * entries).sum(dim=-1) + (weight - weight.detach())
        scale = self.table("scale")[:, None]
        offset = self.table("offset")[:, None] if kind == "uint" else torch.zeros_like(scale)
        low, high = self.ends.split(1, dim=1)
        return on_grid(weight, scale, offset, low, high)

    def bias(self, bias: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """The bias as the file will hold it, with the gradient straight through."""
        kind, bits = parse_scheme(self.scheme)
        return straight(bias, FLOATS[kind] if bits is None else torch.float16)

    @torch.no_grad()
    def stored(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"]
    ) -> tuple[UInt8[Tensor, "out in"] | None, dict[str, Tensor]]:
        """What the file holds, on the CPU: codes (None for floats), and every other array."""
        kind, bits = parse_scheme(self.scheme)
        if bits is None:
            return None, {
                "weight": weight.to(FLOATS[kind]).cpu(),
                "bias": bias.to(FLOATS[kind]).cpu(),
            }
        arrays = {name: self.table(name).half().cpu() for name in self.start}
        arrays["bias"] = bias.half().cpu()
        if kind == "kmeans":
            return self._nearest(weight).to(torch.uint8).cpu(), arrays
        low, high = levels(kind, bits)
        offset = self.table("offset")[:, None] if kind == "uint" else 0.0
        steps = ((weight - offset) / self.table("scale")[:, None]).clamp(low, high).round()
        return (steps - low).to(torch.uint8).cpu(), arrays

    def _nearest(self, weight: Tensor) -> Tensor:
        entries = self.table("codebook").detach()
        return torch.searchsorted((entries[1:] + entries[:-1]) / 2, weight.detach().contiguous())

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """What is trained, by name."""
        yield from self.change.items()


def trained_table(
    name: str, start: Mapping[str, Tensor], change: Mapping[str, Tensor], spread: Tensor
) -> Tensor:
    """See `RoundedLayer.table`."""
    if name == "scale":
        scale = (start[name] * change[name].exp()).clamp(min=SMALLEST_SCALE)
        return straight(scale, torch.float16)
    value = straight(start[name] + spread * change[name], torch.float16)
    return value.sort().values if name == "codebook" else value


def round_network(
    layers: Mapping[str, RoundedLayer], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All weights and biases of a network as its file will hold them.

    Layers on grids of one kind are rounded as one matrix, rows below rows and filled up with zeros:
    the same numbers, in a tenth of the kernels, which take longer to start than to run.

    Args:
        layers: how each layer is rounded.
        parameters: ``<layer>.weight`` and ``<layer>.bias`` of each.
    """
    kinds = {parse_scheme(layer.scheme)[0] for layer in layers.values()}
    rounded: dict[str, Tensor] = {}
    if len(kinds) != 1 or not kinds <= {"int", "uint"}:
        for name, layer in layers.items():
            rounded[f"{name}.weight"] = layer.weight(parameters[f"{name}.weight"])
            rounded[f"{name}.bias"] = layer.bias(parameters[f"{name}.bias"])
        return rounded
    weights = [parameters[f"{name}.weight"] for name in layers]
    rows, columns = [len(w) for w in weights], [w.shape[1] for w in weights]
    whole = torch.cat([pad(w, (0, max(columns) - w.shape[1])) for w in weights])
    kind = next(iter(kinds))
    start = {n: torch.cat([layer.start[n] for layer in layers.values()]) for n in TABLES[kind]}
    change = {n: torch.cat([layer.change[n] for layer in layers.values()]) for n in TABLES[kind]}
    spread = torch.cat(
        [layer.spread.expand(n) for layer, n in zip(layers.values(), rows, strict=True)]
    )
    biases = straight(torch.cat([parameters[f"{n}.bias"] for n in layers]), torch.float16)
    scale = trained_table("scale", start, change, spread)[:, None]
    offset = torch.zeros_like(scale)
    if kind == "uint":
        offset = trained_table("offset", start, change, spread)[:, None]
    low, high = torch.cat([layer.ends for layer in layers.values()]).split(1, dim=1)
    parts = on_grid(whole, scale, offset, low, high).split(rows)
    for name, part, bias, width in zip(layers, parts, biases.split(rows), columns, strict=True):
        rounded[f"{name}.weight"], rounded[f"{name}.bias"] = part[:, :width], bias
    return rounded


def on_grid(
    weight: Float[Tensor, "out in"],
    scale: Float[Tensor, "out 1"],
    offset: Float[Tensor, "out 1"],
    low: Float[Tensor, "out 1"],
    high: Float[Tensor, "out 1"],
) -> Float[Tensor, "out in"]:
    """The nearest s·k + o, k whole from `low` to `high`; the gradient goes straight through."""
    steps = torch.clamp((weight - offset) / scale, low, high)
    return (steps + (steps.round() - steps).detach()) * scale + offset


def coded_bits(
    layers: Mapping[str, RoundedLayer], parameters: Mapping[str, Tensor]
) -> Float[Tensor, ""]:
    """About how many bits the codes of a network take, coded by their entropy; differentiable.

    Of all whole numbers k with the same mean |k| = m, those of a two-sided geometric distribution
    have the most entropy, so a code takes at most

        H(m) = log₂((1 + θ) / (1 − θ)) − m log₂ θ,    θ = (√(1 + m²) − 1) / m

    m is the mean of a layer's |c − Q|; its gradient is that of |W / s|, which also pushes at
    weights that are rounded to 0.

    Args:
        layers: how each layer is rounded, all symmetrically (``int``).
        parameters: ``<layer>.weight`` of each.

    Raises:
        ValueError: a layer is stored otherwise.
    """
    bits = []
    for name, layer in layers.items():
        kind, b = parse_scheme(layer.scheme)
        if kind != "int" or b is None:
            raise ValueError(f"only int schemes can be squeezed, not {layer.scheme!r}")
        weight = parameters[f"{name}.weight"]
        steps = (weight / layer.table("scale")[:, None]).abs()
        codes = steps.detach().clamp(max=levels(kind, b)[1]).round()
        m = (steps + (codes - steps).detach()).mean()
        bits.append(weight.numel() * geometric_entropy(m))
    return torch.stack(bits).sum()


def geometric_entropy(m: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """H(m) in bits, see `coded_bits`."""
    m = m.clamp(min=1e-4)
    theta = m / (1.0 + (1.0 + m.square()).sqrt())  # the same, without cancellation near 0
    return torch.log2((1.0 + theta) / (1.0 - theta)) - m * torch.log2(theta)


def straight(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values rounded to a type and back, with the gradient straight through.

    >>> straight(torch.tensor([1.0001]), torch.float16).item()
    1.0
    """
    return values + (values.to(dtype).to(values.dtype) - values).detach()


def levels(kind: str, bits: int) -> tuple[int, int]:
    """The lowest and the highest multiple of the scale."""
    if kind == "int":
        return -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def parse_scheme(scheme: str) -> tuple[str, int | None]:
    """Kind and bits of a scheme; None for floats.

    Raises:
        ValueError: no such scheme.
    """
    if scheme in FLOATS:
        return scheme, None
    found = re.fullmatch(r"(int|uint|kmeans)([1-8])", scheme)
    if not found:
        raise ValueError(f"weights cannot be trained as {scheme!r}")
    return found[1], int(found[2])
