"""Fused kernels: a whole network in one launch, where Triton and a GPU allow it.

`import nerf.kernels` needs neither; `available` says whether the kernels can run, and
`nerf.kernels.mlp` holds the networks that use them. One operation a file:

- `plan`: how a network is laid out in chunks and tiles (no Triton);
- `encode`: the positional encoding inside a kernel;
- `chain`: forward and backward chains, plain Triton;
- `gradients`: weight gradients, their reduction, and packing, plain Triton;
- `volume`: what happens between the networks: a step's rays, sampling, compositing; `adam`: Adam;
- `hopper`: compiles and launches the same for compute capability 9.0, in CUDA
  (`hopper_chain.cu`, `hopper_gradients.cu`, `hopper_merge.cu`);
- `mlp`: `PackedField` (evaluation) and `FusedField` (training).
"""

import importlib.util
import os

import torch


def available(device: str | torch.device = "cuda") -> str | None:
    """Why the fused kernels cannot run on a device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # of use to tests alone: it is slow
    if torch.device(device).type != "cuda":
        return f"the fused kernels need a CUDA device, not {device}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the fused kernels need compute capability 8.0 or newer (bf16)"
    return None
