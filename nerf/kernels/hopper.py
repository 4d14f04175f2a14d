"""Compiling and launching the CUDA kernels (`hopper_*.cu`, compute capability 9.0).

The source is compiled once with NVRTC, which PyTorch brings along, and kept in the user's cache
directory; nothing needs a CUDA toolkit. Triton is not involved.
"""

import ctypes
import functools
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nerf.kernels import uniform
from nerf.kernels.plan import CHUNK, MAX_CHUNKS, Plan

log = logging.getLogger(__name__)

SHARED_LIMIT = uniform.SHARED_LIMIT  # bytes of shared memory a program may have
THREADS = 384
TILE = 8192  # bytes
VECTOR_LIMIT = 4096  # biases and heads that fit into shared memory behind the ring
STEP_LIMIT = 40
REST = 256 + STEP_LIMIT * 32 + VECTOR_LIMIT * 4  # bytes of barriers, table and vector of a chain


def unsupported(plan: Plan) -> str | None:
    """Why the kernels cannot run a network; None if they can."""
    if len(plan.forward) > STEP_LIMIT:
        return f"it has more than {STEP_LIMIT - 1} hidden layers"
    if plan.vector_size > VECTOR_LIMIT:
        return f"its biases and heads take {plan.vector_size} of {VECTOR_LIMIT} numbers"
    if plan.shape.feature > MAX_CHUNKS * CHUNK:
        return f"its feature layer is wider than {MAX_CHUNKS * CHUNK} channels"
    if plan.shape.direction_features > CHUNK:
        return f"its directions have more than {CHUNK} features"
    return None


@dataclass(frozen=True)
class Build:
    """Compile-time constants of the kernels.

    Attributes:
        stages: slots of the ring of weights, 32 KiB each, of the forward chain for rendering.
        turn: chunks of inputs after which the two warp groups take turns at the tensor cores there;
            0: they do not.
        train_stages: as `stages`, of the chains that keep activations or deltas.
        train_turn: as `turn`, of the forward chain that keeps activations.
        backward_turn: as `turn`, of the backward chain.
        gradient_stages: slots of the ring of the weight gradients, 48 KiB each.
        gradient_cluster: programs that share the activations they fetch for these, 1 or 2.
        watch: for debugging: polls after which a wait is reported and the kernel ended; 0 never.
    """

    stages: int = 6
    turn: int = 5
    train_stages: int = 4
    train_turn: int = 4
    backward_turn: int = 2
    gradient_stages: int = 4
    gradient_cluster: int = 1
    watch: int = 0

    @property
    def render_bytes(self) -> int:
        """Shared memory of the forward chain for rendering."""
        return (self.stages * 4 + 2) * TILE + REST

    @property
    def train_bytes(self) -> int:
        """Shared memory of the chains that keep activations or deltas."""
        return (self.train_stages * 4 + 2 + 8) * TILE + REST

    @property
    def limit(self) -> int:
        """Shared memory that the kernels of one width may take; each network says how much."""
        return SHARED_LIMIT

    @property
    def gradient_bytes(self) -> int:
        """Shared memory of the weight gradients."""
        return self.gradient_stages * 6 * TILE + 1024 + 16 * self.gradient_stages


def _wrapper(
    name: str,
    columns: int,
    operands: Sequence[tuple[str, str, str]],
    tail: str,
    size: int | None = None,
) -> str:
    """One wgmma instruction, m64 n`columns` k16, bf16 into fp32, as a function.

    Args:
        name: of the function.
        columns: of the accumulator.
        operands: declaration, constraint and register expressions of what it reads.
        tail: its immediates.
        size: numbers that the accumulator's array has, if more than are used.
    """
    count = columns // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    reads, inputs, at = [], [], count
    for _, constraint, expressions in operands:
        names = expressions.split(";")
        text = ", ".join(f"%{at + i}" for i in range(len(names)))
        reads.append(f"{{{text}}}" if len(names) > 1 else text)
        inputs += [f'"{constraint}"({x})' for x in names]
        at += len(names)
    arguments = ", ".join(x for x, _, _ in operands)
    return (
        f"{name}(float (&d)[{size or count}], {arguments}) {{\n"
        f'    asm volatile("wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 "\n'
        f'        "{{{registers}}}, {", ".join(reads)}, 1, 1, 1, {tail};"\n'
        f"        : {outputs} : {', '.join(inputs)});\n}}\n"
    )


_LEFT, _RIGHT = ("u64 a", "l", "a"), ("u64 b", "l", "b")
_FRAGMENT = ("u32 (&a)[4]", "r", "a[0];a[1];a[2];a[3]")
_KINDS = {
    # 64 rows of activations in registers, or in shared memory, times weights.
    "mma_registers": ((_FRAGMENT, _RIGHT), "0"),
    "mma_shared": ((_LEFT, _RIGHT), "0, 0"),
    # Both operands with the summed dimension across: deltas' transpose times activations.
    "mma_across": ((_LEFT, _RIGHT), "1, 1"),
}


def _wrappers(*kinds: str) -> str:
    start = "__device__ __forceinline__ void "
    text = []
    for name in kinds:
        operands, tail = _KINDS[name]
        arguments = ", ".join(x for x, _, _ in operands)
        text.append(f"template <int N> {start}{name}(float (&d)[128], {arguments});\n")
        for chunks in (1, 2, 3, 4):
            text.append(f"template <> {start}")
            text.append(_wrapper(f"{name}<{chunks}>", 64 * chunks, operands, tail, 128))
    return "".join(text)


def _wrappers_of(widths: Sequence[int], *kinds: str) -> str:
    """The same for any numbers of columns, which are the template's argument."""
    start = "__device__ __forceinline__ void "
    text = []
    for name in kinds:
        operands, tail = _KINDS[name]
        arguments = ", ".join(x for x, _, _ in operands)
        text.append(f"template <int N> {start}{name}(float (&d)[N / 2], {arguments});\n")
        for columns in sorted(set(widths)):
            text.append(f"template <> {start}")
            text.append(_wrapper(f"{name}<{columns}>", columns, operands, tail))
    return "".join(text)


@dataclass(frozen=True)
class _Module:
    """One file of kernels: the constants and the instructions it uses, and its kernels."""

    file: str
    constants: dict[str, str]
    wrappers: tuple[str, ...]
    kernels: tuple[str, ...]
    shared: str = ""


_CHAIN = ("mma_registers", "mma_shared")
MODULES = {
    "render": _Module(
        "chain", {"STAGES": "stages", "TURN": "turn"}, _CHAIN, ("forward_render",), "render_bytes"
    ),
    "train": _Module(
        "chain",
        {"STAGES": "train_stages", "TURN": "train_turn"},
        _CHAIN,
        ("forward_train",),
        "train_bytes",
    ),
    "backward": _Module(
        "chain",
        {"STAGES": "train_stages", "TURN": "backward_turn"},
        _CHAIN,
        ("backward",),
        "train_bytes",
    ),
    "gradients": _Module(
        "gradients",
        {"GRADIENT_STAGES": "gradient_stages", "GRADIENT_CLUSTER": "gradient_cluster"},
        ("mma_across",),
        ("weight_gradients",),
        "gradient_bytes",
    ),
    "merge": _Module("merge", {}, (), ("merge", "pack_weights", "ray_gradients", "unmerge")),
}
TRAINING = ("train", "backward", "gradients", "merge")


def _module(name: str) -> _Module:
    """A module; those of one width (`uniform.Width.name`) are made as they are asked for."""
    if name.startswith("uniform"):
        return _Module("uniform", {}, _CHAIN, (name,), "limit")
    return MODULES[name]


def source(module: str, build: Build) -> str:
    """The whole CUDA source of a module."""
    spec = _module(module)
    if spec.file == "uniform":
        return _uniform_source(uniform.width_of(module), build)
    definitions: dict[str, int | str] = {
        name: getattr(build, value) for name, value in spec.constants.items()
    }
    definitions["TRAIN"] = int(module in ("train", "backward"))
    definitions["BACKWARD"] = int(module == "backward")
    if build.watch:
        definitions["WATCH"] = build.watch
    instructions = _wrappers(*spec.wrappers)
    if module == "gradients":
        instructions += "__device__ __forceinline__ void " + _wrapper(
            "mma_ones", 8, (_LEFT, _RIGHT), "1, 0"
        )
    return _together(definitions, instructions, spec.file)


def _uniform_source(width: uniform.Width, build: Build) -> str:
    definitions = width.constants()
    if build.watch:
        definitions["WATCH"] = build.watch
    return _together(definitions, _wrappers_of((width.width, width.half), *_CHAIN), "uniform")


def _together(definitions: dict[str, int | str], instructions: str, file: str) -> str:
    text = "".join(f"#define {name} {value}\n" for name, value in definitions.items())
    text += "typedef unsigned int u32;\ntypedef unsigned long long u64;\n" + instructions
    files = resources.files("nerf.kernels")
    return text + "".join(
        files.joinpath(f"hopper_{name}.cu").read_text() for name in ("common", file)
    )


# Compiling.


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "prunefield" / "kernels"


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "").split(".")[0]
    for name in (f"libnvrtc.so.{major}", "libnvrtc.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError("NVRTC, which compiles the fused kernels, was not found")


def unavailable() -> str | None:
    """Why the kernels cannot be compiled here; None if they can."""
    try:
        _nvrtc()
    except OSError as error:
        return str(error)
    return None


def _compile(text: str) -> bytes:
    """Compile CUDA source for sm_90a to a cubin."""
    library = _nvrtc()
    program = ctypes.c_void_p()

    def check(code: int) -> None:
        if code != 0:
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"NVRTC: {library.nvrtcGetErrorString(code).decode()}")

    check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), text.encode(), b"hopper.cu", 0, None, None
        )
    )
    options = (b"--gpu-architecture=sm_90a", b"--std=c++17", b"--device-as-default-execution-space")
    array = (ctypes.c_char_p * len(options))(*options)
    size = ctypes.c_size_t()
    try:
        if library.nvrtcCompileProgram(program, len(options), array) != 0:
            check(library.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            check(library.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"the fused kernels do not compile: {log.value.decode()[:2000]}")
        check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(program, cubin))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


def cubin(module: str, build: Build) -> bytes:
    """A compiled module, from the cache if it was compiled before."""
    text = source(module, build)
    name = hashlib.sha256(f"{torch.version.cuda}\n{text}".encode()).hexdigest()[:32]
    path = _cache() / f"{name}.cubin"
    if path.is_file():
        return path.read_bytes()
    code = _compile(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
            part.write(code)
        Path(part.name).replace(path)
    except OSError:
        pass  # a cache that cannot be written costs a compile, nothing else
    return code


def compile_ahead(build: Build, modules: Sequence[str]) -> threading.Thread:
    """Compile modules into the cache, one after another, while the process does something else.

    A process that ends waits for the one under way.
    """

    def work() -> None:
        for module in modules:
            if not threading.main_thread().is_alive():
                return
            try:
                cubin(module, build)
            except (OSError, RuntimeError) as error:
                log.info("%s is not compiled ahead: %s", module, error)
                return

    thread = threading.Thread(target=work, name="kernels")
    thread.start()
    return thread


# Launching.


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _checked(code: int, what: str) -> None:
    if code != 0:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(message))
        text = message.value.decode() if message.value else f"error {code}"
        raise RuntimeError(f"CUDA, {what}: {text}")


class Kernels:
    """The kernels of one build on one device.

    Attributes:
        loaded: the modules that are ready to launch.
    """

    def __init__(self, build: Build, device: int) -> None:
        self.build = build
        self._device = device
        self.loaded: dict[str, ctypes.c_void_p] = {}
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._context = ctypes.c_void_p()

    def load(self, module: str, code: bytes) -> None:
        """Make a compiled module's kernels ready to launch (before a CUDA graph is captured)."""
        handle = ctypes.c_void_p()
        shared = _module(module).shared
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # there is a context now
            _checked(_driver().cuCtxGetCurrent(ctypes.byref(self._context)), "context")
            _checked(_driver().cuModuleLoadData(ctypes.byref(handle), code), "loading")
            for name in _module(module).kernels:
                function = ctypes.c_void_p()
                get = _driver().cuModuleGetFunction
                _checked(get(ctypes.byref(function), handle, name.encode()), name)
                if shared:
                    # 8: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    _checked(
                        _driver().cuFuncSetAttribute(function, 8, getattr(self.build, shared)), name
                    )
                self._functions[name] = function
        self.loaded[module] = handle

    def reports(self) -> list[tuple[int, ...]]:
        """What waited too long ("watch" builds): program, thread, place, 2 · barrier + parity."""
        found = []
        for module in self.loaded.values():
            address, size = ctypes.c_uint64(), ctypes.c_size_t()
            get = _driver().cuModuleGetGlobal_v2
            _checked(get(ctypes.byref(address), ctypes.byref(size), module, b"reports"), "reports")
            values = (ctypes.c_int * (size.value // 4))()
            torch.cuda.synchronize(self._device)
            _checked(_driver().cuMemcpyDtoH_v2(values, address, size), "reports")
            found += [tuple(values[1 + 4 * i : 5 + 4 * i]) for i in range(min(values[0], 64))]
        return found

    def launch(
        self, name: str, grid: tuple[int, int], threads: int, shared: int, *arguments: Any
    ) -> None:
        """Launch a kernel on PyTorch's current stream; tensors are passed as pointers."""
        values = [x if isinstance(x, ctypes.Structure) else _value(x) for x in arguments]
        array = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

        def attempt() -> int:
            return _driver().cuLaunchKernel(
                self._functions[name], *grid, 1, threads, 1, 1, shared, stream, array, None
            )

        code = attempt()
        if code == 201:  # a thread without a context yet, such as autograd's
            _checked(_driver().cuCtxSetCurrent(self._context), "context")
            code = attempt()
        _checked(code, name)


def _value(x: Any) -> Any:
    return ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int(x)


def structure(*values: Tensor | int) -> ctypes.Structure:
    """Tensors (as pointers) and integers as one C structure, in this order."""
    fields = [
        (f"f{i}", ctypes.c_void_p if isinstance(x, Tensor) else ctypes.c_int)
        for i, x in enumerate(values)
    ]
    kind = _structure_type(tuple(fields))
    return kind(*(x.data_ptr() if isinstance(x, Tensor) else x for x in values))


@functools.cache
def _structure_type(fields: tuple[tuple[str, Any], ...]) -> type[ctypes.Structure]:
    return type("Arguments", (ctypes.Structure,), {"_fields_": list(fields)})


@functools.cache
def _kernels(build: Build, device: int) -> Kernels:
    return Kernels(build, device)


def kernels(build: Build, device: int, *modules: str) -> Kernels:
    """The kernels of a build on a device; the named modules are compiled and loaded."""
    found = _kernels(build, device)
    missing = [module for module in modules if module not in found.loaded]
    if missing:
        with ThreadPoolExecutor() as pool:  # compiling releases Python's lock
            codes = list(pool.map(lambda module: cubin(module, build), missing))
        for module, code in zip(missing, codes, strict=True):
            found.load(module, code)
    return found
