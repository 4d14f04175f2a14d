"""The radiance field: the network that gives density and colour at a point.

Source: Mildenhall et al. 2020, figure 7. One `Field` is one network; a `NerfModel` is the pair
(coarse, fine) that renders a picture, with the sample counts it was made for. Every layer's width
is free, so a physically pruned network is the same class with smaller numbers.
"""

from copy import deepcopy
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  PyTorch itself writes it so

from nerf.encoding import encode, encoded_width

NETWORKS = ("coarse", "fine")
ALIGNED = 128  # numbers: 512 bytes, as PyTorch aligns what it allocates on a GPU


@dataclass(frozen=True)
class FieldShape:
    """The widths of one network.

    Attributes:
        trunk: output channels of each hidden layer, in order.
        skip: index of the hidden layer whose output is joined by the encoded point
            (the layer after it reads [encoded point, output]); None for no skip.
        feature: channels of the linear layer between trunk and view branch.
        view: channels of the view branch.
        point_octaves: octaves of the point encoding.
        direction_octaves: octaves of the direction encoding.
    """

    trunk: tuple[int, ...] = (256,) * 8
    skip: int | None = 4
    feature: int = 256
    view: int = 128
    point_octaves: int = 10
    direction_octaves: int = 4

    def __post_init__(self) -> None:
        widths = (*self.trunk, self.feature, self.view)
        if not self.trunk or min(widths) < 1:
            raise ValueError(f"every layer needs at least one channel, got {self}")
        if self.skip is not None and not 0 <= self.skip < len(self.trunk) - 1:
            raise ValueError(
                f"skip must name a hidden layer before the last (0 to {len(self.trunk) - 2}), "
                f"got {self.skip}"
            )

    @property
    def point_features(self) -> int:
        """Width of an encoded point."""
        return encoded_width(self.point_octaves)

    @property
    def direction_features(self) -> int:
        """Width of an encoded direction."""
        return encoded_width(self.direction_octaves)

    def layers(self) -> tuple["LayerSpec", ...]:
        """The linear layers in the order of computation, as plain data."""
        specs = []
        previous, width = "point", self.point_features
        for index, channels in enumerate(self.trunk):
            inputs: tuple[str, ...] = (previous,)
            in_width = width
            if self.skip is not None and index == self.skip + 1:
                inputs, in_width = ("point", previous), width + self.point_features
            specs.append(LayerSpec(f"trunk.{index}", inputs, in_width, channels, relu=True))
            previous, width = f"trunk.{index}", channels
        specs += [
            LayerSpec("density", (previous,), width, 1, relu=False),
            LayerSpec("feature", (previous,), width, self.feature, relu=False),
            LayerSpec(
                "view",
                ("feature", "direction"),
                self.feature + self.direction_features,
                self.view,
                relu=True,
            ),
            LayerSpec("rgb", ("view",), self.view, 3, relu=False),
        ]
        return tuple(specs)

    def parameters(self) -> int:
        """Number of parameters (595,844 for the original network)."""
        return sum((layer.in_width + 1) * layer.out_width for layer in self.layers())

    def flops(self) -> int:
        """Floating-point operations of one evaluation (a multiply and an add count as two)."""
        return sum(2 * layer.in_width * layer.out_width for layer in self.layers())


@dataclass(frozen=True)
class LayerSpec:
    """One linear layer: what it reads (in order of concatenation), its widths, its activation.

    Attributes:
        name: dotted name of the `nn.Linear` inside `Field`.
        inputs: names of other layers, or the external inputs "point" and "direction"
            (both already encoded).
        in_width: input features.
        out_width: output channels.
        relu: whether a ReLU follows.
    """

    name: str
    inputs: tuple[str, ...]
    in_width: int
    out_width: int
    relu: bool


class Field(nn.Module):
    """One network: (point, direction) → (density before ReLU, colour before sigmoid).

    Parameters carry PyTorch's default initialisation, as nerf-pytorch's do.
    """

    def __init__(self, shape: FieldShape) -> None:
        super().__init__()
        self.shape = shape
        linear = {s.name: nn.Linear(s.in_width, s.out_width) for s in shape.layers()}
        self.trunk = nn.ModuleList(linear[f"trunk.{i}"] for i in range(len(shape.trunk)))
        self.density = linear["density"]
        self.feature = linear["feature"]
        self.view = linear["view"]
        self.rgb = linear["rgb"]

    def forward(
        self,
        points: Float[Tensor, "rays samples 3"],
        directions: Float[Tensor, "rays 3"],
    ) -> tuple[Float[Tensor, "rays samples"], Float[Tensor, "rays samples 3"]]:
        """Evaluate the field.

        Args:
            points: sample positions (scene units or NDC).
            directions: unit view directions, one a ray, shared by its samples.

        Returns:
            Raw density (apply ReLU; per scene unit) and raw colour (apply the sigmoid).
        """
        # One row an evaluation: of more dimensions a linear layer returns a view, and a ReLU in the
        # place of a view makes autograd copy each activation four times on the way back.
        encoded_points = _as_multiplied(encode(points.flatten(0, 1), self.shape.point_octaves))
        encoded_directions = encode(directions, self.shape.direction_octaves)
        h = encoded_points
        for index, layer in enumerate(self.trunk):
            if self.shape.skip is not None and index == self.shape.skip + 1:
                h = torch.cat((encoded_points, h), dim=-1)
            h = layer(h).relu_()
        per_ray = points.shape[:2]
        density = self.density(h)[..., 0].unflatten(0, per_ray)
        # The direction is the same along a ray: its share of the view layer is computed once.
        h, bias, from_direction = self._before_view(h)
        ray_share = F.linear(encoded_directions, from_direction, bias)
        h = h.unflatten(0, per_ray)
        h = (h + ray_share[:, None, :]).relu_()
        return density, self.rgb(h.flatten(0, 1)).unflatten(0, per_ray)

    def _before_view(
        self, h: Float[Tensor, "rows channels"]
    ) -> tuple[Float[Tensor, "rows view"], Float[Tensor, " view"], Float[Tensor, "view direction"]]:
        """What the features give the view layer; its bias and its weights for the direction.

        Nothing stands between `feature` and `view`, so they are one matrix: applied as such where
        that takes fewer FLOPs (11 % of those of the original network).
        """
        shape = self.shape
        from_feature, from_direction = self.view.weight.split(
            (shape.feature, shape.direction_features), dim=1
        )
        channels = h.shape[1]
        if channels * shape.view >= shape.feature * (channels + shape.view):
            return F.linear(self.feature(h), from_feature), self.view.bias, from_direction
        with torch.autocast(h.device.type, enabled=False):
            mix = from_feature @ self.feature.weight
            bias = torch.addmv(self.view.bias, from_feature, self.feature.bias)
        return F.linear(h, mix), bias, from_direction


def _as_multiplied(x: Float[Tensor, "rows features"]) -> Float[Tensor, "rows features"]:
    """In the arithmetic of matrix products, if that is another (autocast): rounded but once."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


@dataclass(frozen=True)
class SampleCounts:
    """Samples a ray: `coarse` for the coarse pass, `fine` more for the fine pass.

    The fine network is evaluated at all of them (coarse + fine).
    """

    coarse: int = 64
    fine: int = 64

    def __post_init__(self) -> None:
        if self.coarse < 2 or self.fine < 1:
            raise ValueError(f"need at least 2 coarse samples and 1 fine one, got {self}")


@dataclass
class NerfModel:
    """A coarse and a fine network with the sample counts they render with.

    They may be one and the same `Field`: a shared network, which both passes use and which is
    stored once.
    """

    coarse: Field
    fine: Field
    samples: SampleCounts = field(default_factory=SampleCounts)

    @classmethod
    def create(
        cls, shape: FieldShape, samples: SampleCounts, seed: int, device: str = "cpu"
    ) -> "NerfModel":
        """Fresh networks; the same seed gives the same weights on every device."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU alone
            model = cls(Field(shape), Field(shape), samples)
        return model.to(device)

    def networks(self) -> dict[str, Field]:
        """The networks by name, in the order they are evaluated."""
        return {"coarse": self.coarse, "fine": self.fine}

    @property
    def shared(self) -> bool:
        """Whether one network does both passes."""
        return self.coarse is self.fine

    def stored(self) -> dict[str, Field]:
        """The networks as a file holds them: each once, a shared one as ``fine``."""
        return {"fine": self.fine} if self.shared else self.networks()

    def to(self, device: str | torch.device) -> "NerfModel":
        """Move both networks to a device, in place."""
        self.coarse.to(device)
        self.fine.to(device)
        return self

    def copied_to(self, device: str | torch.device) -> "NerfModel":
        """A copy on another device, whose weights go there in one piece.

        On a GPU that others use too, each piece waits for its turn.
        """
        copy = deepcopy(self)
        networks = copy.stored().values()
        weights = [w.detach().flatten() for network in networks for w in network.parameters()]
        # As aligned as tensors of their own would be.
        sizes = [-(-len(w) // ALIGNED) * ALIGNED for w in weights]
        whole = torch.cat([F.pad(w, (0, n - len(w))) for w, n in zip(weights, sizes, strict=True)])
        parts = iter(whole.to(device).split(sizes))
        for network in networks:
            there = {
                name: next(parts)[: w.numel()].view(w.shape)
                for name, w in network.named_parameters()
            }
            network.load_state_dict(there, assign=True)
        return copy

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.coarse.rgb.weight.device

    def parameters(self) -> int:
        """Parameters of both networks; of a shared one, once."""
        return sum(field.shape.parameters() for field in self.stored().values())

    def flops_per_ray(self) -> int:
        """Floating-point operations for one ray, both passes."""
        n_all = self.samples.coarse + self.samples.fine
        return self.coarse.shape.flops() * self.samples.coarse + self.fine.shape.flops() * n_all
