"""The positional encoding inside a kernel, a chunk of 64 columns at a time.

sin and cos are computed in revolutions: r = 2ᵏx/2π − round(2ᵏx/2π) by a fused multiply-add, which
loses nothing to cancellation, then an odd polynomial of degree 9 on a quarter turn either side of
zero. The error is below 1e-6 for |2ᵏx| up to 1e5, far under the 4e-3 of the bf16 that the matrix
products read.
"""

import triton
import triton.language as tl

INVERSE_TURN = tl.constexpr(0.15915494)  # 1/2π rounded to fp32 ...
INVERSE_TURN_REST = tl.constexpr(6.4206384e-09)  # ... and what the rounding left out
ROUND = tl.constexpr(12582912.0)  # 1.5·2²³: adding and subtracting it rounds to an integer
# sin(2πr) ≈ r·(S1 + S3·r² + …), |r| ≤ ¼
S1 = tl.constexpr(6.283185)
S3 = tl.constexpr(-41.341656)
S5 = tl.constexpr(81.601006)
S7 = tl.constexpr(-76.54978)
S9 = tl.constexpr(39.536705)


@triton.jit
def encode_chunk(x, y, z, column, octaves):
    """Encode points.

    Args:
        x: first coordinate, (rows,) fp32; `y` and `z` the others.
        column: which features, (64,) int32, 0 to 63.
        octaves: frequencies L; columns from 3 + 6·L on are zero.

    Returns:
        (rows, 64) fp32, in the order of `nerf.encoding.encode`.
    """
    wave = tl.maximum(column - 3, 0)
    within = wave % 6
    dim = tl.where(column < 3, column, within % 3)
    scale = ((wave // 6 + 127) << 23).to(tl.float32, bitcast=True)
    phase = tl.where(within >= 3, 0.25, 0.0)
    is_y = (dim == 1)[None, :]
    is_z = (dim == 2)[None, :]
    value = tl.where(is_z, z[:, None], tl.where(is_y, y[:, None], x[:, None]))
    angle = value * scale[None, :]
    whole = (tl.fma(angle, INVERSE_TURN, phase[None, :]) + ROUND) - ROUND
    part = (tl.fma(angle, INVERSE_TURN, -whole) + phase[None, :]) + angle * INVERSE_TURN_REST
    size = tl.abs(part)
    folded = tl.minimum(size, 0.5 - size)
    r = tl.where(part < 0, -folded, folded)
    r2 = r * r
    sine = r * tl.fma(r2, tl.fma(r2, tl.fma(r2, tl.fma(r2, S9, S7), S5), S3), S1)
    used = (wave < 6 * octaves)[None, :]
    return tl.where((column < 3)[None, :], value, tl.where(used, sine, 0.0))
