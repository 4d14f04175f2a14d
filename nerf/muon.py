"""Muon: steps of matrices as near to orthogonal ones as their momentum allows.

    M ← β M + (1 − β) G,   U = (1 − β) G + β M,   W ← W − η · 0.2 √max(out, in) · orth(U)

orth(U) = A Bᵀ for the singular value decomposition U = A Σ Bᵀ: all directions that the gradient has
shown take steps of one length, the small ones, too. Five Newton–Schulz steps come near enough: they
bring every singular value to about 0.7 … 1.2. The factor gives steps the size that Adam's have, so
that one learning rate η suits both: biases, scales and the rows of the heads are left to Adam.

Source: Jordan et al. 2024 (Muon) for the steps and the coefficients of the Newton–Schulz iteration;
Liu et al. 2025 (Moonlight), eq. 4, for the factor 0.2 √max(out, in).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from nerf.devices import arithmetic

MOMENTUM = 0.95
"""β."""
STEP = 0.2
"""Root mean square of Adam's steps in units of the learning rate, about."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
HEADS = ("density", "rgb")
"""Layers of a few rows, whose columns are no directions of a space of channels."""
TINY = 1e-20


def for_muon(parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of the matrices that Muon trains; the rest is Adam's.

    Args:
        parameters: by ``….<layer>.weight`` or ``….<layer>.bias``.
    """
    return tuple(
        name
        for name, parameter in parameters.items()
        if parameter.ndim == 2 and name.split(".")[-2] not in HEADS
    )


def step_factor(shape: Sequence[int]) -> float:
    """0.2 √max(out, in)."""
    return STEP * math.sqrt(max(shape))


@torch.no_grad()
def orthogonalized(
    stack: Float[Tensor, "matrices out in"],
) -> Float[Tensor, "matrices out in"]:
    """orth(U) of several matrices, about; those that are smaller are filled up with zeros.

    Args:
        stack: the matrices. On a GPU bfloat16 is precise enough to compute in, and the fastest.
    """
    with arithmetic("float32", stack.device):
        norms = stack.flatten(1).norm(dim=1).clamp(min=TINY)[:, None, None]
        x = stack / norms
        if stack.device.type == "cuda":
            x = x.bfloat16()
        a, b, c = NEWTON_SCHULZ
        for _ in range(ITERATIONS):
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.float()


class Muon:
    """Momentum and steps of some matrices.

    Args:
        matrices: what is trained, by name; the gradients are read from them.
    """

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        self._matrices = dict(matrices)
        self.momentum = {name: torch.zeros_like(of) for name, of in self._matrices.items()}
        self._rows = max(len(of) for of in self._matrices.values())
        self._columns = max(of.shape[1] for of in self._matrices.values())

    @torch.no_grad()
    def step(self, rate: float | Tensor) -> None:
        """Move the matrices by their gradients.

        Args:
            rate: η.
        """
        parts = []
        for name, of in self._matrices.items():
            assert of.grad is not None
            momentum = self.momentum[name]
            momentum.lerp_(of.grad, 1.0 - MOMENTUM)
            parts.append(torch.lerp(of.grad, momentum, MOMENTUM))
        room = self._rows, self._columns
        stack = torch.stack([pad(u, (0, room[1] - u.shape[1], 0, room[0] - len(u))) for u in parts])
        for of, step in zip(self._matrices.values(), orthogonalized(stack), strict=True):
            of.sub_(step[: len(of), : of.shape[1]] * (step_factor(of.shape) * rate))
