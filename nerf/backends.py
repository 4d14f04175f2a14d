"""How the networks are run: plain PyTorch, compiled, or the fused kernels.

    eager      plain PyTorch; on a GPU a training step is one CUDA graph
    compiled   the same through `torch.compile`; on a GPU one CUDA graph a step too
    fused      kernels of `nerf.kernels`, forward and backward: bf16 products, fp32 sums and weights
    auto       fused where it can be, else eager

A backend changes how fast numbers come, not what they are: the tests hold each to a tolerance. What
cannot run here, or fails while it is tried, is replaced by eager, with one note that says why.
"""

import logging
import os
import shutil
from collections.abc import Iterable
from typing import Literal, get_args

import torch

from nerf import kernels
from nerf.devices import Precision
from nerf.field import FieldShape, SampleCounts
from nerf.kernels import plan

log = logging.getLogger(__name__)

Backend = Literal["auto", "eager", "compiled", "fused"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
Resolved = Literal["eager", "compiled", "fused"]
# Pairs of samples that a program of the compositing kernel compares: its registers.
MAX_PAIRS = 128 * 128

_told: set[str] = set()


def tell(note: str) -> None:
    """Log a note, once a process."""
    if note not in _told:
        _told.add(note)
        log.warning("%s", note)


def choose(
    wanted: Backend,
    device: torch.device,
    precision: Precision,
    shapes: Iterable[FieldShape],
    samples: SampleCounts,
) -> Resolved:
    """The backend that will run networks; a note is logged where it is not the one expected.

    Args:
        wanted: the setting.
        device: where they run.
        precision: arithmetic of the linear layers.
        shapes: of the networks.
        samples: samples a ray.

    Raises:
        ValueError: there is no such backend.
    """
    if wanted not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {wanted!r}")
    if wanted == "eager" or (wanted == "auto" and device.type == "cpu"):
        return "eager"
    if wanted == "compiled":
        reason = why_not_compiled(device)
        if reason is None:
            return "compiled"
    else:
        reason = why_not_fused(device, precision, shapes, samples)
        if reason is None:
            return "fused"
        if wanted == "auto" and precision != "bfloat16":
            return "eager"  # as asked for: more digits than the kernels have
    fall_back("compiled" if wanted == "compiled" else "fused", reason)
    return "eager"


def fall_back(backend: str, reason: object) -> None:
    """Say that the eager backend takes the place of another."""
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    said = lines[0][:300] if lines else type(reason).__name__
    tell(f"backend: eager instead of {backend}, which is slower: {said}")


def why_not_fused(
    device: torch.device,
    precision: Precision,
    shapes: Iterable[FieldShape],
    samples: SampleCounts,
) -> str | None:
    """Why the fused kernels cannot run networks; None if they can."""
    reason = kernels.available(device)
    if reason is not None:
        return reason
    if precision != "bfloat16":
        return f"the fused kernels compute in bfloat16, and the precision is {precision}"
    for shape in shapes:
        reason = plan.supported(shape)
        if reason is not None:
            return reason
    if power_of_two(samples.coarse) * power_of_two(samples.fine) > MAX_PAIRS:
        return f"more samples a ray than the fused kernels sort ({samples})"
    return None


def why_not_compiled(device: torch.device) -> str | None:
    """Why `torch.compile` cannot make code here; None if it can."""
    if device.type == "cuda":
        return kernels.available(device)
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if not any(shutil.which(name) for name in compilers):
        return "there is no C++ compiler (g++ or clang++; CXX names another)"
    return None


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()
