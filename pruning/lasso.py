"""The LASSO of channel gates on a Gram matrix, for every penalty at once.

    minimise over β   ½ (1 − β)ᵀ Q (1 − β) + λ ‖β‖₁

Where the open gates A and their signs s are known, the minimum is linear in λ,

    β_A = Q_AA⁻¹ (q_A − λ s_A),    q = Q 1,    c = q − Q β

with c_j = λ s_j on A and |c_j| ≤ λ elsewhere. So the path from λ = max |q_j|, where all gates are
shut, down to 0 has corners: where a gate opens (|c_j| reaches λ) or shuts (β_j reaches 0). It takes
one linear system a corner.

Source: Osborne et al. 2000 (a new approach to variable selection), Efron et al. 2004 (LARS),
section 3.1: the homotopy, here on Q instead of data.

Letters: Q how much pairs of channels add to what is read, β_j a gate, λ the penalty, c_j how much
the error falls by opening gate j, A the open gates, s their signs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

RIDGE = 1e-9
"""Added to Q's diagonal, as a fraction of its mean: channels that are copies of others."""

CORNERS = 8
"""Corners followed at most, as a multiple of the channels."""


@dataclass(frozen=True)
class Corner:
    """A corner of the path.

    Attributes:
        penalty: λ.
        gates: β there.
        open: A from here down to the next corner.
    """

    penalty: float
    gates: Float[Tensor, " n"]
    open: Bool[Tensor, " n"]


def corners(Q: Float[Tensor, "n n"]) -> Iterator[Corner]:
    """The corners of the path, from all gates shut to no penalty.

    Args:
        Q: symmetric and positive semidefinite (float64).
    """
    n = len(Q)
    power = float(Q.diagonal().mean())
    Q = Q + RIDGE * power * torch.eye(n, dtype=Q.dtype)
    q = Q.sum(dim=1)
    penalty = float(q.abs().max()) if n else 0.0
    beta, is_open, signs = torch.zeros_like(q), torch.zeros(n, dtype=torch.bool), q.sign()
    smallest = 1e-10 * penalty
    if penalty <= 0 or power <= 0:
        return
    is_open[int(q.abs().argmax())] = True
    yield Corner(penalty, beta, is_open.clone())
    shut = -1  # the gate that has just shut may not open at once
    for _ in range(CORNERS * n):
        A = is_open.nonzero()[:, 0]
        both = torch.linalg.solve(Q[A][:, A], torch.stack((q[A], signs[A]), dim=1))
        at_zero, slope = both[:, 0], both[:, 1]  # β_A = at_zero − λ slope
        u = q - Q[:, A] @ at_zero
        v = Q[:, A] @ slope  # c = u + λ v
        rising = torch.where(v < 1, u / (1 - v), 0.0)
        falling = torch.where(v > -1, -u / (1 + v), 0.0)
        opens, sign = torch.where(rising >= falling, rising, falling), rising >= falling
        opens[is_open] = 0.0
        if shut >= 0:
            opens[shut] = 0.0
        opens[opens > penalty * (1 + 1e-9)] = 0.0
        shuts = torch.where(slope.abs() > 0, at_zero / slope, 0.0)
        shuts[(shuts >= penalty * (1 - 1e-12)) | (shuts < 0)] = 0.0
        following = max(float(opens.max()), float(shuts.max()), 0.0)
        beta = torch.zeros_like(q)
        beta[A] = at_zero - max(following, 0.0) * slope
        if following <= smallest:
            beta[A] = at_zero
            yield Corner(0.0, beta, is_open.clone())
            return
        penalty, shut = min(following, penalty), -1
        if float(opens.max()) >= float(shuts.max()):
            j = int(opens.argmax())
            is_open[j], signs[j] = True, 1.0 if sign[j] else -1.0
        else:
            shut = int(A[int(shuts.argmax())])
            is_open[shut] = False
            beta[shut] = 0.0
        yield Corner(penalty, beta, is_open.clone())


def opening_penalties(Q: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """For each gate, the λ below which it stays open; 0 where it never opens for good.

    Args:
        Q: symmetric and positive semidefinite (float64).
    """
    found = torch.zeros(len(Q), dtype=torch.float64)
    before = torch.zeros(len(Q), dtype=torch.bool)
    for corner in corners(Q):
        found[corner.open & ~before] = corner.penalty
        found[~corner.open] = 0.0
        before = corner.open
    return found
