"""Triton's interpreter for the kernel tests: switched on before any kernel is imported.

Two things in Triton 3.6's interpreter need help: it turns one-element arrays into integers with
`int(array)`, which NumPy 2.4 refuses, and it multiplies the bit patterns of bf16 operands in
`tl.dot` instead of their values.
"""

import os
from typing import Any

import numpy as np
import torch


def use_interpreter_without_gpu() -> None:
    """Run kernels in the interpreter where there is no GPU. Call before importing kernels."""
    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def values(handle: Any) -> np.ndarray:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        product = np.matmul(values(a), values(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = create_dot
