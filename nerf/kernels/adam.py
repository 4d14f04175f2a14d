"""Adam as one launch over a flat vector of parameters.

    m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  p ← p − s·m / (√v·r + ε),

with s = rate / (1 − β₁ᵗ) and r = 1 / √(1 − β₂ᵗ), which lie on the device, so that a captured step
reads them anew each time.

Source: Kingma & Ba 2015, algorithm 1.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count"])
def adam(
    parameters, gradients, first, second, schedule, count,
    BETA_1: tl.constexpr, BETA_2: tl.constexpr, EPSILON: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update parameters and moments in place.

    Args:
        parameters: (count,) fp32; `gradients`, `first` (m) and `second` (v) likewise.
        schedule: (≥ 2,) fp32, s and r first.
        count: parameters.
        BETA_1: β₁; `BETA_2`, `EPSILON` likewise.
        BLOCK: parameters a program updates.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    g = tl.load(gradients + i, mask=inside, other=0.0)
    m = tl.load(first + i, mask=inside, other=0.0)
    v = tl.load(second + i, mask=inside, other=0.0)
    m = m + (1.0 - BETA_1) * (g - m)
    v = v * BETA_2 + (1.0 - BETA_2) * g * g
    step = tl.load(schedule) * m / (tl.sqrt(v) * tl.load(schedule + 1) + EPSILON)
    tl.store(first + i, m, mask=inside)
    tl.store(second + i, v, mask=inside)
    tl.store(parameters + i, tl.load(parameters + i, mask=inside, other=0.0) - step, mask=inside)
