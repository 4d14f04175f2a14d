"""Table 1 of the report that prunefield implements, as it was published.

Source: "Activation-Aware Weight Pruning for Efficient 3D Reconstruction", Table 1 (LLFF fern,
factor 8, 200,000 iterations). Its size is the coarse network's nonzero parameters only, in fp32
and units of 2^20 bytes. Its PSNR compares the render of one view with the photo of another, so it
stays near 14.5 dB whatever is pruned, and its MSE is a training loss on random training rays.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRow:
    """One row: requested ratio (0 for the original), size in 2^20 bytes, MSE, PSNR in dB."""

    ratio: float
    size: str
    mse: str
    psnr: str


TABLE_1 = (
    PublishedRow(0.00, "2.273", "0.0859", "14.4434"),
    PublishedRow(0.15, "1.995", "0.0695", "14.9187"),
    PublishedRow(0.30, "1.717", "0.0714", "14.9187"),
    PublishedRow(0.50, "1.336", "0.0847", "14.5010"),
    PublishedRow(0.65, "1.058", "0.0883", "14.6097"),
    PublishedRow(0.80, "0.780", "0.0998", "14.5723"),
    PublishedRow(0.95, "0.495", "0.1034", "15.038"),
)
