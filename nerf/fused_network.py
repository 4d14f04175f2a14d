"""One network on the fused kernels as a function that autograd knows (needs Triton).

What `nerf.fused` is to a plain training, this is to any other loss: the network runs on the
kernels, forward and backward; everything around it stays PyTorch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nerf.cameras import Rays
from nerf.devices import arithmetic
from nerf.encoding import encode
from nerf.field import Field, FieldShape
from nerf.fused import check_kernels
from nerf.kernels.mlp import FusedField, PackedField

Outputs = tuple[Float[Tensor, "rays samples"], Float[Tensor, "rays samples 3"]]


class FusedNetwork:
    """A network evaluated at so many samples along so many rays, with gradients of its weights.

    Its buffers are overwritten by the next call: a backward pass must come before it.

    Args:
        shape: of the network.
        rays: rays a call.
        samples: samples a ray.
        device: a GPU, or the CPU where Triton interprets.

    Raises:
        NerfError: the kernels do not compute what they should here.
    """

    def __init__(self, shape: FieldShape, rays: int, samples: int, device: torch.device) -> None:
        check_kernels(device)
        self.shape, self.device = shape, device
        self.fused = FusedField(shape, rays, samples, device)

    def __call__(
        self, rays: Rays, t: Float[Tensor, "rays samples"], weights: Mapping[str, Tensor]
    ) -> Outputs:
        """Raw density and raw colour at samples along rays.

        Args:
            rays: as many as the constructor was told.
            t: distances of the samples.
            weights: by the name of the `Field`'s parameter; gradients flow to them.
        """
        names = self.fused.plan.parameters
        density, rgb = _Evaluation.apply(self, rays, t, *(weights[name] for name in names))
        return density, rgb


class _Evaluation(torch.autograd.Function):
    """Forward and backward of a `FusedNetwork`."""

    @staticmethod
    def forward(
        ctx: Any, network: FusedNetwork, rays: Rays, t: Tensor, *weights: Tensor
    ) -> Outputs:
        fused = network.fused
        ctx.network = network
        with arithmetic("float32", network.device):
            torch.cat([weight.detach().reshape(-1) for weight in weights], out=fused.parameters)
            fused.pack()
            encoded = encode(rays.view_directions, network.shape.direction_octaves)
            density, rgb = fused.forward(
                rays.origins.contiguous(), rays.directions.contiguous(), t.contiguous(), encoded
            )
            return density.clone(), rgb.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        fused = ctx.network.fused
        g_density, g_rgb = (gradient.float().contiguous() for gradient in gradients)
        with arithmetic("float32", ctx.network.device):
            flat = fused.backward(g_density, g_rgb).clone()
        return None, None, None, *(fused.plan.view(flat, name) for name in fused.plan.parameters)


class FrozenNetwork:
    """A network that is only asked, on the fused kernels.

    Args:
        field: the network; its weights may not change afterwards.

    Raises:
        NerfError: the kernels do not compute what they should here.
    """

    def __init__(self, field: Field) -> None:
        self._device = field.rgb.weight.device
        check_kernels(self._device)
        self._packed = PackedField(field)

    def __call__(self, rays: Rays, t: Float[Tensor, "rays samples"]) -> Outputs:
        """Raw density and raw colour at samples along rays."""
        with arithmetic("float32", self._device):
            return self._packed(rays.origins, rays.directions, t, rays.view_directions)
