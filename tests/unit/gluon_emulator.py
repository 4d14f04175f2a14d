"""Runs Gluon kernels on the CPU, slowly and literally, to check their logic without a GPU.

Triton's interpreter knows no Gluon. This emulates the part of it that our kernels use: a partition
of a warp-specialised kernel is a thread, an mbarrier is a condition variable with arrivals and
bytes, shared memory is a flat array in which a tile of 64 columns is contiguous (so views of one
buffer as 64 × 64, 256 × 64 or 64 × 256 tiles alias as they do on the chip), the copy engine and
wgmma finish at once. Layouts of registers are ignored, and so are races that fences prevent.
"""

import operator
import threading
import types
from typing import Any

import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

TYPES = {
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.int16: torch.int16,
    tl.int32: torch.int32,
    tl.int64: torch.int64,
}
PROGRAM = threading.local()


def raw(x: Any) -> Any:
    return x.t if isinstance(x, Value) else x


class Value:
    """A tensor (or scalar) in registers."""

    def __init__(self, t: torch.Tensor) -> None:
        self.t = t
        self.type = types.SimpleNamespace(layout=None)

    def __index__(self) -> int:
        return int(self.t)

    def __bool__(self) -> bool:
        return bool(self.t)

    def __getitem__(self, key: Any) -> "Value":
        return Value(self.t[key])

    def __neg__(self) -> "Value":
        return Value(-self.t)

    def to(self, dtype: Any, bitcast: bool = False) -> "Value":
        kind = TYPES[dtype]
        return Value(self.t.view(kind) if bitcast else self.t.to(kind))


def _operator(name: str) -> None:
    function = getattr(operator, name)

    def forward(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return Value(function(self.t, raw(other)))

    def backward(self: Value, other: Any) -> Any:
        return Value(torch.as_tensor(function(raw(other), self.t)))

    setattr(Value, f"__{name.strip('_')}__", forward)
    setattr(Value, f"__r{name.strip('_')}__", backward)


for _name in ("add", "sub", "mul", "floordiv", "mod", "and_", "or_", "xor", "lshift", "rshift"):
    _operator(_name)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _operator(_name)


class Pointer:
    """A pointer, or a tensor of pointers, into one tensor."""

    def __init__(self, base: torch.Tensor, offset: Any = 0) -> None:
        self.base, self.offset = base, torch.as_tensor(offset, dtype=torch.int64)

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.base, self.offset + raw(other))

    __radd__ = __add__


class Barrier:
    def __init__(self) -> None:
        self.condition = threading.Condition()

    def start(self, count: int) -> None:
        self.count = self.left = count
        self.bytes, self.phase = 0, 0

    def change(self, arrivals: int, size: int) -> None:
        with self.condition:
            self.left -= arrivals
            self.bytes += size
            assert self.left >= 0
            if self.left == 0 and self.bytes == 0:
                self.left, self.phase = self.count, self.phase ^ 1
                self.condition.notify_all()

    def wait(self, phase: int) -> None:
        with self.condition:
            done = self.condition.wait_for(lambda: self.phase != phase, timeout=20)
        assert done, "deadlock: a barrier was waited for 20 s"


class Shared:
    """Shared memory: a view of a flat array as tiles whose 64-column blocks are contiguous."""

    def __init__(self, flat: Any, shape: list[int], at: int = 0, turned: bool = False) -> None:
        self.flat, self.shape, self.at, self.turned = flat, list(shape), at, turned

    def index(self, i: Any) -> Any:
        i = int(raw(i))
        assert 0 <= i < self.shape[0], f"index {i} of {self.shape}"
        if isinstance(self.flat, list):
            return self.flat[i]
        size = self.shape[1] * self.shape[2]
        return Shared(self.flat, self.shape[1:], self.at + i * size)

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        assert dim == 0
        assert self.shape[1] == 64
        return Shared(self.flat, [length, 64], self.at + start * 64)

    def permute(self, order: tuple[int, int]) -> "Shared":
        assert order == (1, 0)
        return Shared(self.flat, self.shape, self.at, not self.turned)

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> "Shared":
        del dtype, layout
        assert self.at == 0
        assert torch.Size(shape).numel() <= len(self.flat)
        return Shared(self.flat, shape)

    def _blocks(self) -> torch.Tensor:
        rows, columns = self.shape
        return self.flat[self.at : self.at + rows * columns].view(columns // 64, rows, 64)

    def load(self, layout: Any = None) -> Value:
        del layout
        t = self._blocks().permute(1, 0, 2).reshape(self.shape)
        return Value(t.t() if self.turned else t.clone())

    def store(self, value: Value) -> None:
        rows, columns = self.shape
        assert value.t.dtype == self.flat.dtype
        self._blocks().copy_(value.t.view(rows, columns // 64, 64).permute(1, 0, 2))


class _Language:
    """Stands for `gl` (and for `tl` inside shared helpers)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tl, name)

    static_range = range
    SliceLayout = BlockedLayout = NVMMADistributedLayout = DotOperandLayout = staticmethod(
        lambda *_: None
    )

    @staticmethod
    def program_id(axis: int) -> int:
        del axis
        return PROGRAM.pid

    @staticmethod
    def num_programs(axis: int) -> int:
        del axis
        return PROGRAM.count

    @staticmethod
    def allocate_shared_memory(dtype: Any, shape: list[int], layout: Any) -> Shared:
        del layout
        if dtype == tl.int64:
            return Shared([Barrier() for _ in range(shape[0])], shape)
        garbage = torch.full((torch.Size(shape).numel(),), float("nan"), dtype=TYPES[dtype])
        return Shared(garbage, shape)

    @staticmethod
    def warp_specialize(parts: list[Any], warps: Any, registers: Any) -> None:
        del warps, registers
        failures: list[BaseException] = []
        pid, count = PROGRAM.pid, PROGRAM.count

        def run(function: Any, arguments: Any) -> None:
            PROGRAM.pid, PROGRAM.count = pid, count
            try:
                function(*arguments)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a partition did not finish"
        if failures:
            raise failures[0]

    @staticmethod
    def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
        offset, base = pointer.offset, pointer.base
        if mask is None:
            return Value(base[offset])
        offset, keep = torch.broadcast_tensors(offset, torch.as_tensor(raw(mask)))
        value = base[torch.where(keep, offset, 0)]
        return Value(torch.where(keep, value, torch.tensor(other, dtype=value.dtype)))

    @staticmethod
    def store(pointer: Pointer, value: Value, mask: Any = None) -> None:
        keep = torch.as_tensor(True if mask is None else raw(mask))
        offset, value, keep = torch.broadcast_tensors(pointer.offset, value.t, keep)
        pointer.base[offset[keep]] = value[keep].to(pointer.base.dtype)

    @staticmethod
    def arange(start: int, end: int, layout: Any = None) -> Value:
        del layout
        return Value(torch.arange(start, end, dtype=torch.int32))

    @staticmethod
    def zeros(shape: list[int], dtype: Any, layout: Any = None) -> Value:
        del layout
        return Value(torch.zeros(shape, dtype=TYPES[dtype]))

    @staticmethod
    def to_tensor(x: Any) -> Value:
        return Value(torch.tensor(x, dtype=torch.int32))

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if isinstance(condition, bool):
            return a if condition else b
        return Value(torch.where(raw(condition), raw(a), raw(b)))

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        if not isinstance(a, Value):
            return max(a, int(b) if isinstance(b, Value) else b)
        return Value(torch.maximum(a.t, torch.as_tensor(raw(b), dtype=a.t.dtype)))

    @staticmethod
    def minimum(a: Any, b: Any) -> Any:
        if not isinstance(a, Value):
            return min(a, int(b) if isinstance(b, Value) else b)
        return Value(torch.minimum(a.t, torch.as_tensor(raw(b), dtype=a.t.dtype)))

    @staticmethod
    def abs(a: Value) -> Value:
        return Value(a.t.abs())

    @staticmethod
    def fma(a: Value, b: Any, c: Any) -> Value:
        exact = raw(a).double() * raw(b) + raw(c)
        return Value(exact.float())

    @staticmethod
    def sum(a: Value, axis: int) -> Value:
        return Value(a.t.sum(axis, dtype=a.t.dtype))

    @staticmethod
    def broadcast(a: Value, b: Value) -> tuple[Value, Value]:
        return tuple(map(Value, torch.broadcast_tensors(a.t, b.t)))  # type: ignore[return-value]

    @staticmethod
    def expand_dims(a: Value, axis: int) -> Value:
        return Value(a.t.unsqueeze(axis))

    @staticmethod
    def reshape(a: Value, shape: list[int]) -> Value:
        return Value(a.t.reshape(shape))

    @staticmethod
    def convert_layout(a: Value, layout: Any, assert_trivial: bool = False) -> Value:
        del layout, assert_trivial
        return a

    @staticmethod
    def thread_barrier() -> None:
        return None

    @staticmethod
    def inline_asm_elementwise(asm: str, constraints: str, args: list[Value], **_: Any) -> Value:
        del constraints
        assert asm.startswith("cvt.rn.relu.bf16x2.f32")
        return Value(args[0].t.clamp(min=0).bfloat16())


class _Mbarrier:
    MBarrierLayout = staticmethod(lambda: None)

    @staticmethod
    def init(bar: Barrier, count: int) -> None:
        bar.start(count)

    @staticmethod
    def wait(bar: Barrier, phase: Any, pred: Any = True) -> None:
        if raw(pred):
            bar.wait(int(raw(phase)))

    @staticmethod
    def arrive(bar: Barrier, count: int = 1, pred: Any = True) -> None:
        if raw(pred):
            bar.change(count, 0)

    @staticmethod
    def expect(bar: Barrier, size: int, pred: Any = True) -> None:
        if raw(pred):
            bar.change(0, size)
            bar.change(1, 0)


class _Tma:
    @staticmethod
    def _rows(descriptor: Any, at: list[Any]) -> torch.Tensor:
        row = int(raw(at[0]))
        assert at[1] == 0
        height, width = descriptor.block_shape
        flat = descriptor.base.view(-1, width)
        assert 0 <= row <= len(flat) - height, f"rows {row} on of {len(flat)}"
        return flat[row : row + height]

    @classmethod
    def async_copy_global_to_shared(
        cls, descriptor: Any, at: list[Any], bar: Barrier, target: Shared, pred: Any = True
    ) -> None:
        if raw(pred):
            rows = cls._rows(descriptor, at)
            target.store(Value(rows))
            bar.change(0, -rows.numel() * rows.element_size())

    @classmethod
    def async_copy_shared_to_global(cls, descriptor: Any, at: list[Any], source: Shared) -> None:
        cls._rows(descriptor, at).copy_(source.load().t)

    @staticmethod
    def store_wait(pendings: int) -> None:
        del pendings


def _warpgroup_mma(a: Any, b: Shared, acc: Value, is_async: bool = False) -> Value:
    del is_async
    left = a.load() if isinstance(a, Shared) else a
    return Value(acc.t + left.t.float() @ b.load().t.float())


def _warpgroup_mma_wait(pending: int, deps: tuple[Value, ...]) -> Any:
    del pending
    return deps[0] if len(deps) == 1 else deps


def emulated(kernel: JITFunction) -> Any:
    """A kernel as `kernel[grid](…)` that runs here."""

    class Launcher:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*args: Any, num_warps: int, maxnreg: int) -> None:
                del num_warps, maxnreg
                function = _function(kernel)
                given = [_argument(x) for x in args]
                for PROGRAM.pid in range(grid[0]):
                    PROGRAM.count = grid[0]
                    function(*given)

            return run

    return Launcher()


def _argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return Pointer(x.view(-1))
    if isinstance(x, int) and not isinstance(x, bool):
        return Scalar(x)
    return x


class Scalar(int):
    """A scalar argument: an integer that can be cast, as a scalar tensor can."""

    def to(self, dtype: Any) -> "Scalar":
        del dtype
        return self

    def __add__(self, other: Any) -> Any:
        result = int.__add__(self, other) if isinstance(other, int) else NotImplemented
        return Scalar(result) if result is not NotImplemented else result


def _function(kernel: JITFunction) -> Any:
    """The Python function of a kernel, with our stand-ins for everything it names."""
    language = _Language()
    stand_ins = {
        "gl": language,
        "tl": language,
        "mbarrier": _Mbarrier,
        "tma": _Tma,
        "warpgroup_mma": _warpgroup_mma,
        "warpgroup_mma_wait": _warpgroup_mma_wait,
        "fence_async_shared": lambda: None,
        "accumulator_layout": lambda *_: None,
    }
    made: dict[Any, Any] = {}

    def make(function: Any) -> Any:
        if function not in made:
            space: dict[str, Any] = {}
            code, defaults = function.__code__, function.__defaults__
            made[function] = types.FunctionType(code, space, function.__name__, defaults)
            for name, value in function.__globals__.items():
                if isinstance(value, tl.constexpr):
                    space[name] = value.value
                elif isinstance(value, JITFunction):
                    space[name] = make(value.fn)
                else:
                    space[name] = value
            space |= stand_ins
        return made[function]

    return make(kernel.fn)
