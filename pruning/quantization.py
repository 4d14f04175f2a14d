"""Fewer bits a weight: uniform grids, codebooks and half precision, as plain arrays and back.

``quantize(network, "int6")`` gives a `Quantized`, which holds small integers and scales;
`Quantized.network` is the network that they stand for, and `Quantized.tensors` the arrays that a
file holds. What a file looks like is the business of whoever writes it.

Uniform grids are per output channel. With c the stored code, s a row's scale and o its offset:

    symmetric    w ≈ s (c − 2^(b−1) + 1)     2^b − 1 levels, 0 among them
    asymmetric   w ≈ s c + o                 2^b levels

Biases, scales, offsets and codebooks are float16. Where calibration statistics are given, the
rounding of the weights is chosen for the layer's *output*: a grid is clipped where that helps,
the bias takes over the mean of what is left (b += (W − Ŵ) E[x]), and with ``gptq`` each column's
rounding error is made up for by the columns after it.

Letters: W a layer's weight (out × in), Ŵ what is stored, b bits, x what the layer reads.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pruning.budget import Price
from pruning.calibration import Statistics, check_weights
from pruning.errors import PruningError, StatisticsError
from pruning.network import LayerGraph, Network
from pruning.registry import lookup
from pruning.solving import DAMPING, damped, input_gram, inverse

CLIPS = 20
"""How many clippings of a grid are tried, from none down to 60 % of the largest weight."""

HALF = 2
"""Bytes of a bias, scale or offset."""

AWQ_GRID = 20
"""How many exponents α in [0, 1) the balancing tries."""

# --------------------------------------------------------------------------------------- schemes


@dataclass(frozen=True)
class Scheme:
    """How the weights of a layer are stored.

    Attributes:
        kind: ``float`` (as `dtype`), ``uniform`` or ``codebook``.
        bits: a weight.
        symmetric: of a uniform grid, whether 0 sits in its middle.
        gptq: of a uniform grid, whether later columns make up for the rounding of earlier ones
            (needs statistics).
        dtype: of a float.
        balanced: of a uniform grid, whether channels are scaled first so that those that matter
            lose less (`balance`; needs statistics).
    """

    kind: Literal["float", "uniform", "codebook"]
    bits: int
    symmetric: bool = True
    gptq: bool = False
    dtype: torch.dtype = torch.float32
    balanced: bool = False

    @property
    def needs_statistics(self) -> bool:
        """Whether rounding looks at what the layers read."""
        return self.gptq or self.balanced

    @property
    def keeps_zeros(self) -> bool:
        """Whether a weight of 0 stays 0."""
        exact = self.kind == "float" or (self.kind == "uniform" and self.symmetric)
        return exact and not self.needs_statistics

    @property
    def stored_as(self) -> str:
        """The name of the scheme that reads it back: how codes were found is not in the file."""
        if self.kind == "float":
            return {v: k for k, v in FLOATS.items()}[self.dtype]
        if self.kind == "codebook":
            return f"kmeans{self.bits}"
        return f"{'int' if self.symmetric else 'uint'}{self.bits}"


FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

SCHEMES: dict[str, Scheme] = {
    "fp32": Scheme("float", 32),
    "fp16": Scheme("float", 16, dtype=torch.float16),
    "bf16": Scheme("float", 16, dtype=torch.bfloat16),
    **{f"int{b}": Scheme("uniform", b) for b in range(2, 9)},
    **{f"uint{b}": Scheme("uniform", b, symmetric=False) for b in range(2, 9)},
    **{f"gptq{b}": Scheme("uniform", b, gptq=True) for b in range(2, 9)},
    **{f"awq{b}": Scheme("uniform", b, balanced=True) for b in range(2, 9)},
    **{f"awq-gptq{b}": Scheme("uniform", b, gptq=True, balanced=True) for b in range(2, 9)},
    **{f"kmeans{b}": Scheme("codebook", b) for b in range(1, 9)},
}
"""The schemes by the name that a sweep file uses: ``int`` symmetric, ``uint`` with an offset,
``gptq`` symmetric with error feedback, ``awq`` symmetric after balancing, ``awq-gptq`` both,
``kmeans`` a codebook a layer."""


def price_of(scheme: str) -> Price:
    """What a weight and an output of a layer take, in bytes, for a `Budget`.

    Checksums and codebooks (a fixed number of bytes a layer) are not in it.

    Raises:
        PruningError: no such scheme.
    """
    chosen = lookup(SCHEMES, scheme, "quantisation scheme")
    if chosen.kind == "float":
        return Price(chosen.bits / 8, chosen.bits / 8)
    if chosen.kind == "codebook":
        return Price(chosen.bits / 8, HALF)
    return Price(chosen.bits / 8, 2 * HALF if chosen.symmetric else 3 * HALF)


@dataclass(frozen=True)
class Quantized:
    """A network in few bits.

    Attributes:
        graph: who reads what.
        schemes: names in `SCHEMES`, by layer.
        codes: of each layer that is not stored as floats, one code a weight (out × in).
        tables: by layer, everything else by name: ``bias``, and of ``weight``, ``scale``,
            ``offset`` and ``codebook`` what its scheme has.
    """

    graph: LayerGraph
    schemes: Mapping[str, str]
    codes: Mapping[str, UInt8[Tensor, "_out _in"]]
    tables: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def network(self, dtype: torch.dtype = torch.float32) -> Network:
        """The network that the codes stand for, on the CPU."""
        weights, biases = {}, {}
        for layer in self.graph.layers:
            of_layer = self.tables[layer.name]
            scheme = SCHEMES[self.schemes[layer.name]]
            if scheme.kind == "float":
                W = of_layer["weight"].float()
            elif scheme.kind == "codebook":
                W = of_layer["codebook"].float()[self.codes[layer.name].long()]
            else:
                W = _levels(self.codes[layer.name], scheme) * of_layer["scale"].float()[:, None]
                if not scheme.symmetric:
                    W = W + of_layer["offset"].float()[:, None]
            weights[layer.name], biases[layer.name] = W.to(dtype), of_layer["bias"].to(dtype)
        return Network(self.graph, weights, biases)

    def tensors(self) -> dict[str, Tensor]:
        """A flat dictionary that safetensors can write: ``layer/codes``, ``layer/scale``, …."""
        tensors = {f"{layer}/codes": codes for layer, codes in self.codes.items()}
        for layer, of_layer in self.tables.items():
            tensors |= {f"{layer}/{name}": table for name, table in of_layer.items()}
        return tensors

    def n_bytes(self) -> int:
        """Bytes of all the arrays with b bits a code, without a file's header."""
        tables = sum(
            t.numel() * t.element_size() for of in self.tables.values() for t in of.values()
        )
        return tables + sum(
            math.ceil(codes.numel() * SCHEMES[self.schemes[layer]].bits / 8)
            for layer, codes in self.codes.items()
        )

    @classmethod
    def from_tensors(
        cls, graph: LayerGraph, schemes: Mapping[str, str], tensors: Mapping[str, Tensor]
    ) -> "Quantized":
        """What `tensors` gave.

        Raises:
            PruningError: a layer or an array is missing, damaged or of the wrong size.
        """
        codes: dict[str, Tensor] = {}
        tables: dict[str, dict[str, Tensor]] = {}
        widths = dict(graph.external)
        for layer in graph.layers:
            if layer.name not in schemes:
                raise PruningError(f"layer {layer.name!r} has no quantisation scheme")
            scheme = lookup(SCHEMES, schemes[layer.name], "quantisation scheme")
            names = _tables_of(scheme)
            missing = [n for n in names if f"{layer.name}/{n}" not in tensors]
            if missing:
                raise PruningError(
                    f"the quantised layer {layer.name!r} lacks {missing}; the file is damaged or "
                    "of another network"
                )
            of_layer = {n: tensors[f"{layer.name}/{n}"] for n in names}
            shape = (len(of_layer["bias"]), sum(widths[source] for source in layer.inputs))
            widths[layer.name] = shape[0]
            if "codes" in names:
                codes[layer.name] = _checked_codes(layer.name, scheme, of_layer.pop("codes"), shape)
            _check_tables(layer.name, scheme, of_layer, shape)
            tables[layer.name] = of_layer
        return cls(graph, dict(schemes), codes, tables)


def _tables_of(scheme: Scheme) -> tuple[str, ...]:
    """The arrays that a scheme needs."""
    if scheme.kind == "float":
        return ("bias", "weight")
    if scheme.kind == "codebook":
        return ("bias", "codes", "codebook")
    return ("bias", "codes", "scale") if scheme.symmetric else ("bias", "codes", "scale", "offset")


def _checked_codes(layer: str, scheme: Scheme, codes: Tensor, shape: tuple[int, int]) -> Tensor:
    """The codes, if they are what the layer asks for."""
    fits = codes.dtype == torch.uint8 and tuple(codes.shape) == shape
    if not fits or (codes.numel() and int(codes.max()) >= 2**scheme.bits):
        raise PruningError(
            f"the quantised layer {layer!r} must have {shape} codes of {scheme.bits} bits, got "
            f"{codes.dtype} {tuple(codes.shape)}; the file is damaged"
        )
    return codes


def _check_tables(
    layer: str, scheme: Scheme, tables: Mapping[str, Tensor], shape: tuple[int, int]
) -> None:
    """Raise unless each array has the size that its layer asks for and is finite."""
    expected = {
        "bias": shape[:1],
        "weight": shape,
        "scale": shape[:1],
        "offset": shape[:1],
        "codebook": (2**scheme.bits,) if scheme.kind == "codebook" else (),
    }
    for name, table in tables.items():
        if tuple(table.shape) != expected[name] or not bool(torch.isfinite(table).all()):
            raise PruningError(
                f"{name!r} of the quantised layer {layer!r} must be {expected[name]} finite "
                f"numbers, got shape {tuple(table.shape)}; the file is damaged"
            )


# -------------------------------------------------------------------------------------- quantize


def quantize(
    network: Network, scheme: str | Mapping[str, str], statistics: Statistics | None = None
) -> Quantized:
    """Store a network's weights in fewer bits.

    Args:
        network: it is not changed.
        scheme: a name in `SCHEMES` for all layers, or one for each.
        statistics: of this network, with the moment "gram": rounding is then judged by the
            layers' outputs, and biases make up for its mean. Needed by the ``gptq`` and ``awq``
            schemes; one layer of ``awq`` has the whole network balanced.

    Raises:
        PruningError: no such scheme, a layer without one, or a value that float16 cannot hold.
        StatisticsError: statistics are of another network, or missing where they are needed.
    """
    names = [layer.name for layer in network.graph.layers]
    schemes = dict.fromkeys(names, scheme) if isinstance(scheme, str) else dict(scheme)
    if schemes.keys() != set(names):
        raise PruningError(f"the layers are {names}, and the schemes are for {list(schemes)}")
    found = [lookup(SCHEMES, of, "quantisation scheme") for of in schemes.values()]
    if any(of.balanced for of in found):
        check_weights(network)
        network, statistics = balance(
            network, statistics, min(of.bits for of in found if of.balanced)
        )
    codes: dict[str, Tensor] = {}
    tables: dict[str, dict[str, Tensor]] = {}
    for layer in network.graph.layers:
        chosen = lookup(SCHEMES, schemes[layer.name], "quantisation scheme")
        W = network.weights[layer.name].detach().cpu().double()
        b = network.biases[layer.name].detach().cpu().double()
        if not bool(torch.isfinite(W).all() and torch.isfinite(b).all()):
            raise PruningError(f"the weights of layer {layer.name!r} are NaN or infinite")
        if chosen.kind == "float":
            stored = W.to(chosen.dtype)
            bias_dtype = chosen.dtype
            tables[layer.name] = {"weight": stored}
        else:
            gram = None
            if statistics is not None or chosen.gptq:
                gram = input_gram(network, layer, statistics).cpu()
            codes[layer.name], tables[layer.name], stored = _coded(W, chosen, gram)
            bias_dtype = torch.float16
            if gram is not None:
                b = b + (W - stored) @ gram[:-1, -1]
        tables[layer.name]["bias"] = b.to(bias_dtype)
        for table in tables[layer.name].values():
            if not bool(torch.isfinite(table).all()):
                raise PruningError(
                    f"layer {layer.name!r} has values beyond what {table.dtype} can hold "
                    f"(weights up to {float(W.abs().max()):g}, biases up to "
                    f"{float(b.abs().max()):g}); use 'fp32' or 'bf16' for it"
                )
    return Quantized(network.graph, schemes, codes, tables)


def _coded(
    W: Float[Tensor, "out in"], scheme: Scheme, gram: Float[Tensor, "n1 n1"] | None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Codes, tables and the weights that they stand for (float64)."""
    importance = torch.ones(W.shape[1], dtype=torch.float64)
    if gram is not None and bool((gram.diagonal()[:-1] > 0).any()):
        importance = gram.diagonal()[:-1] + 1e-6 * gram.diagonal()[:-1].mean()
    if scheme.kind == "codebook":
        centres = kmeans(W, scheme.bits, importance)
        codes = _nearest(W, centres.double())
        return codes, {"codebook": centres}, centres.double()[codes.long()]
    scale, offset = uniform_grid(W, scheme, importance)
    if scheme.gptq and gram is not None:
        codes = _gptq(W, scale, offset, scheme, gram)
    else:
        codes = _rounded(W, scale, offset, scheme)[0]
    stored = _levels(codes, scheme).double() * scale.double()[:, None]
    if scheme.symmetric:
        return codes, {"scale": scale}, stored
    return codes, {"scale": scale, "offset": offset}, stored + offset.double()[:, None]


# ----------------------------------------------------------------------------------- uniform grids


def uniform_grid(
    W: Float[Tensor, "out in"], scheme: Scheme, importance: Float[Tensor, " in"]
) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
    """Scale and offset of each row (float16), clipped where that lowers Σ_j h_j (w_j − ŵ_j)².

    Args:
        W: float64.
        scheme: bits, and whether the grid is symmetric.
        importance: h_j > 0, E[x_j²] or ones.

    Returns:
        Scales, rounded to float16 before anything is rounded by them, and offsets (0 if symmetric).
    """
    best = torch.full((len(W),), torch.inf, dtype=torch.float64)
    scale = torch.zeros(len(W), dtype=torch.float16)
    offset = torch.zeros(len(W), dtype=torch.float16)
    for clip in torch.linspace(1.0, 0.6, CLIPS).tolist():
        if scheme.symmetric:
            s = clip * W.abs().amax(dim=1) / (2 ** (scheme.bits - 1) - 1)
            o = torch.zeros_like(s)
        else:
            low, high = W.amin(dim=1), W.amax(dim=1)
            middle, half = (low + high) / 2, clip * (high - low) / 2
            s, o = 2 * half / (2**scheme.bits - 1), middle - half
        s, o = s.half(), o.half()
        error = ((_rounded(W, s, o, scheme)[1] - W).square() * importance).sum(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
    # Rows whose scale float16 cannot hold have no finite error; they are left to be noticed.
    return torch.where(best.isfinite(), scale, torch.inf), offset


def _rounded(
    W: Float[Tensor, "out columns"], scale: Tensor, offset: Tensor, scheme: Scheme
) -> tuple[UInt8[Tensor, "out columns"], Float[Tensor, "out columns"]]:
    """The nearest level of each row's grid: codes, and the values that those stand for.

    A row whose scale is 0 gets the code of its offset.
    """
    s, o = scale.double()[:, None], offset.double()[:, None]
    middle = 2 ** (scheme.bits - 1) - 1 if scheme.symmetric else 0
    top = 2**scheme.bits - 2 if scheme.symmetric else 2**scheme.bits - 1
    steps = torch.where(s > 0, (W - o) / s.where(s > 0, torch.ones_like(s)), 0.0)
    codes = (steps.round() + middle).clamp(0, top)
    return codes.to(torch.uint8), (codes - middle) * s + o


def _levels(codes: UInt8[Tensor, "out in"], scheme: Scheme) -> Float[Tensor, "out in"]:
    """Codes as multiples of the scale."""
    return codes.float() - (2 ** (scheme.bits - 1) - 1 if scheme.symmetric else 0)


def _gptq(
    W: Float[Tensor, "out in"],
    scale: Float[Tensor, " out"],
    offset: Float[Tensor, " out"],
    scheme: Scheme,
    gram: Float[Tensor, "n1 n1"],
) -> UInt8[Tensor, "out in"]:
    """Round column after column; what a column loses, those after it take over.

    With U the upper Cholesky factor of H⁻¹, H the damped *covariance* of x (the bias takes care of
    the mean), in the order of falling power:

        δ = (w_i − ŵ_i) / U_ii,    W_:,k ← W_:,k − δ U_ik  for the columns k after i

    Source: Frantar et al. 2023 (GPTQ), section 3.3, with their "act-order".
    """
    mean = gram[:-1, -1]
    H = damped(gram, DAMPING)[:-1, :-1] - torch.outer(mean, mean)
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    upper = upper_factor(inverse(H[order][:, order]))
    left = W[:, order].clone()
    codes = torch.zeros_like(left, dtype=torch.uint8)
    for i in range(left.shape[1]):
        code, value = _rounded(left[:, i : i + 1], scale, offset, scheme)
        codes[:, i] = code[:, 0]
        delta = (left[:, i] - value[:, 0]) / upper[i, i]
        left[:, i + 1 :] -= delta[:, None] * upper[i, i + 1 :]
    unordered = torch.empty_like(codes)
    unordered[:, order] = codes
    return unordered


def upper_factor(inverse_gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """U with UᵀU = H⁻¹; a little is added to the diagonal where rounding has made it indefinite."""
    ridge, n = 0.0, len(inverse_gram)
    scale = float(inverse_gram.diagonal().mean())
    for _ in range(40):
        eye = torch.eye(n, dtype=inverse_gram.dtype, device=inverse_gram.device)
        factor, failed = torch.linalg.cholesky_ex(inverse_gram + ridge * eye, upper=True)
        if int(failed) == 0:
            return factor
        ridge = max(10 * ridge, 1e-12 * scale)
    raise PruningError("a Gram matrix is too far from positive definite; use more damping")


# --------------------------------------------------------------------------------------- codebooks


def kmeans(
    W: Float[Tensor, "out in"], bits: int, importance: Float[Tensor, " in"]
) -> Float[Tensor, " centres"]:
    """2^b shared values by Lloyd's algorithm, started evenly between the smallest and the largest.

    Source: Han et al. 2016 (Deep Compression), section 3.1 and 3.2 (linear initialisation).

    Args:
        W: float64.
        bits: b.
        importance: how much a column's weights count.

    Returns:
        Rising, float16.
    """
    values, order = W.flatten().sort()
    h = importance.expand_as(W).flatten()[order]
    zero = torch.zeros(1, dtype=torch.float64)
    mass, moment = (torch.cat((zero, v.cumsum(0))) for v in (h, h * values))
    centres = torch.linspace(0, 1, 2**bits, dtype=torch.float64) * (values[-1] - values[0])
    centres += values[0]
    for _ in range(200):
        edges = torch.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        edges = torch.cat((torch.tensor([0]), edges, torch.tensor([len(values)])))
        in_cluster = mass[edges[1:]] - mass[edges[:-1]]
        means = (moment[edges[1:]] - moment[edges[:-1]]) / in_cluster
        moved = torch.where(in_cluster > 0, means, centres)
        if bool((moved == centres).all()):
            break
        centres = moved.sort().values
    return centres.half()


def _nearest(
    W: Float[Tensor, "out in"], centres: Float[Tensor, " centres"]
) -> UInt8[Tensor, "out in"]:
    """Index of the centre (rising) nearest to each weight."""
    return torch.searchsorted((centres[1:] + centres[:-1]) / 2, W.contiguous()).to(torch.uint8)


# ----------------------------------------------------------------------------------- AWQ balancing


def balance(
    network: Network, statistics: Statistics | None, bits: int = 4
) -> tuple[Network, Statistics]:
    """Scale channels so that those that matter lose less when their readers are rounded.

    Channel j of a layer is divided by s_j > 0 and its columns in every reader multiplied by it:
    the same function, since relu(z / s) = relu(z) / s, and readers that share a layer share s.
    s_j = (E[x_j²]^½)^α, scaled to have √(max·min) = 1; α is the one of 20 in [0, 1) with which
    rounding the readers to b bits changes their outputs least.

    Source: Lin et al. 2024 (AWQ), equations 4 and 5, with the root mean square for the mean |x|.

    Args:
        network: it is not changed.
        statistics: of this network, with the moment "gram".
        bits: of the symmetric grid that is in view.

    Returns:
        The balanced network (equal up to rounding) and its Gram matrices.

    Raises:
        StatisticsError: the moment was not collected, or on another network.
    """
    if statistics is None:
        raise StatisticsError("balancing needs calibration statistics; collect 'gram' first")
    scheme = replace(SCHEMES["int8"], bits=bits)
    weights, biases = dict(network.weights), dict(network.biases)
    grams = {
        layer.name: input_gram(network, layer, statistics).cpu().clone()
        for layer in network.graph.layers
    }
    for layer in network.graph.layers:
        readers = [
            (r, network.input_slices(r)[layer.name]) for r in network.graph.readers(layer.name)
        ]
        if not readers:
            continue
        first, part = readers[0]
        power = grams[first.name].diagonal()[part].clamp(min=0).sqrt()
        if not bool((power > 0).any()):
            continue
        power = power.clamp(min=1e-4 * float(power.max()))
        best, chosen = torch.inf, torch.ones_like(power)
        for step in range(AWQ_GRID):
            s = power ** (step / AWQ_GRID)
            s = s / (s.max() * s.min()).sqrt()
            error = sum(
                _output_error(weights[r.name], grams[r.name], p, s, scheme) for r, p in readers
            )
            if error < best:
                best, chosen = error, s
        W, b = weights[layer.name], biases[layer.name]
        weights[layer.name] = (W.double() / chosen.to(W.device)[:, None]).to(W.dtype)
        biases[layer.name] = (b.double() / chosen.to(b.device)).to(b.dtype)
        for r, p in readers:
            W = weights[r.name].double().clone()
            W[:, p] *= chosen.to(W.device)
            weights[r.name] = W.to(network.weights[r.name].dtype)
            inverse_s = torch.ones(len(grams[r.name]), dtype=torch.float64)
            inverse_s[p] = 1 / chosen
            grams[r.name] = inverse_s[:, None] * grams[r.name] * inverse_s
    balanced = Network(network.graph, weights, biases)
    sums = {name: {"gram": gram * statistics.weight} for name, gram in grams.items()}
    return balanced, Statistics(statistics.rows, statistics.weight, sums)


def _output_error(
    W: Tensor, gram: Tensor, part: slice, s: Float[Tensor, " channels"], scheme: Scheme
) -> float:
    """E‖(Ŵ_s s⁻¹ − W) x‖² over E‖W x‖², Ŵ_s the rounding of W with some columns times s."""
    W, H = W.detach().cpu().double(), gram[:-1, :-1]
    scaled = W.clone()
    scaled[:, part] *= s
    whole = (scaled.abs().amax(dim=1) / (2 ** (scheme.bits - 1) - 1)).half()
    error = _rounded(scaled, whole, torch.zeros_like(whole), scheme)[1] - scaled
    error[:, part] /= s
    energy = float(((W @ H) * W).sum())
    return float(((error @ H) * error).sum()) / energy if energy > 0 else 0.0


def entropy(codes: UInt8[Tensor, "..."]) -> float:
    """Bits a code that an ideal coder of single codes would take: −Σ p log₂ p.

    Source: Shannon 1948, section 6.
    """
    counts = torch.bincount(codes.flatten().long()).double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log2()).sum())
