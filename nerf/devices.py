"""Which device does the work, and in which arithmetic."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch

from nerf.errors import DeviceError

Precision = Literal["float32", "tf32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def resolve_device(name: str = "auto") -> torch.device:
    """The device of a name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        DeviceError: the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(
            f"unknown device {name!r}; allowed are auto, cpu, cuda and cuda:N"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {name!r} is not supported; allowed are auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device {name!r} was asked for, but PyTorch sees no CUDA GPU on this machine; "
            "use `auto` or `cpu`, or check the driver and that this PyTorch build has CUDA"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device {name!r} was asked for, but there are only {torch.cuda.device_count()} GPUs"
        )
    return device


KEPT_OF_SHARE = 0.25


@dataclass
class _Process:
    """What is known of this process: its share of the memory of a GPU."""

    share: float = 1.0


_process = _Process()


def share_memory(share: float) -> None:
    """Say which share of a GPU is this process's; others may have the rest.

    It bounds what a process takes where it has the choice (`spare_memory`, `give_memory_back`), not
    what it needs: PyTorch's own limit would fail work that fits beside the others.

    Args:
        share: in (0, 1]; whole GPUs are 1.
    """
    _process.share = share


def spare_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process may take where it has the choice.

    What is free, as far as it is left of the process's share. One that holds more than its share
    already may still take its share of what is free.
    """
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - used
    return int(min(free, max(_process.share * total - used, _process.share * free)))


def give_memory_back(keep: int = 0) -> None:
    """Return the GPU memory that nothing uses any more, so that other processes can have it.

    Args:
        keep: bytes below which it is kept: this process needs some again, and asking takes time.
            At most a quarter of its share.
    """
    if not torch.cuda.is_initialized():
        return
    for device in range(torch.cuda.device_count()):
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        total = torch.cuda.get_device_properties(device).total_memory
        if unused > min(keep, KEPT_OF_SHARE * _process.share * total):
            torch.cuda.empty_cache()
            return


# Numbers of glibc's `mallopt`, and what asks for something else in the environment.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = (2**30, 2**25)  # older versions of glibc map what is above 32 MiB by itself
ALLOCATOR_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@lru_cache(maxsize=8)
def keep_freed_memory(device: torch.device) -> bool:
    """Let a process that works on a CPU keep what it frees, up to 1 GiB, for what comes next.

    Each step there allocates and frees hundreds of MB in pieces of a few. glibc gives them back
    to the system and asks anew, and every page of them is cleared and cold again: a quarter of a
    training step (docs/results/speed.md). Where the environment sets the allocator up, or there is
    another one than glibc's, nothing is done.

    Returns:
        Whether it does from now on.
    """
    chosen = any(name in os.environ for name in ALLOCATOR_VARIABLES)
    if device.type != "cpu" or chosen or platform.libc_ver()[0] != "glibc":
        return False
    set_option = ctypes.CDLL(None).mallopt
    # Either threshold alone would fix the other at what it is at first, which is far too low.
    mapped = next((size for size in KEPT_BYTES if set_option(M_MMAP_THRESHOLD, size)), None)
    return mapped is not None and bool(set_option(M_TRIM_THRESHOLD, KEPT_BYTES[0]))


def describe_device(device: torch.device) -> str:
    """The hardware's name, e.g. "NVIDIA H200" or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model} ({torch.get_num_threads()} threads)"


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run matrix products in a precision, and leave the process as it was.

    ``float32`` is exact single precision; ``tf32`` rounds the factors of a product to 10 bits of
    mantissa on GPUs that can (elsewhere it is float32); ``bfloat16`` runs linear layers in
    bfloat16 through autocast, everything else in float32.

    Raises:
        DeviceError: the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise DeviceError(f"unknown precision {precision!r}; allowed are {', '.join(PRECISIONS)}")
    before = torch.get_float32_matmul_precision()
    tf32 = precision == "tf32" and device.type == "cuda"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        # Without the cache: it would keep rounded weights until the block ends, and a training
        # step inside the block would go on with those from before it.
        with torch.autocast(
            device.type,
            dtype=torch.bfloat16,
            enabled=precision == "bfloat16",
            cache_enabled=False,
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
