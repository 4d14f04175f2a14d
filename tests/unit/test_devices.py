"""Devices that are not there, and arithmetic that leaves no trace."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nerf.devices import (
    ALLOCATOR_VARIABLES,
    PRECISIONS,
    arithmetic,
    describe_device,
    give_memory_back,
    resolve_device,
    share_memory,
    spare_memory,
)
from nerf.errors import DeviceError
from nerf.rendering import memory_chunk

CPU = torch.device("cpu")


def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_auto_and_cpu(monkeypatch):
    no_gpu(monkeypatch)
    assert resolve_device() == resolve_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:one", "cuda:-2", "Cpu"])
def test_unknown_names_are_refused(name):
    with pytest.raises(DeviceError, match="allowed are auto, cpu, cuda and cuda:N") as refused:
        resolve_device(name)
    assert repr(name) in str(refused.value)


@pytest.mark.parametrize("name", ["meta", "mps", "xpu"])
def test_unsupported_kinds_are_refused(name):
    with pytest.raises(DeviceError, match="not supported"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch, name):
    no_gpu(monkeypatch)
    with pytest.raises(DeviceError, match=rf"'{name}' was asked for.*use `auto` or `cpu`"):
        resolve_device(name)


def test_a_gpu_too_many_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="only 2 GPUs"):
        resolve_device("cuda:2")


def test_the_cpu_has_a_name():
    assert f"({torch.get_num_threads()} threads)" in describe_device(CPU)


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_arithmetic_leaves_the_process_as_it_was(precision, before):
    kept = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(before)
        with arithmetic(precision, CPU):
            assert torch.get_float32_matmul_precision() == "highest"
            assert torch.is_autocast_enabled("cpu") == (precision == "bfloat16")
        with pytest.raises(KeyError), arithmetic(precision, CPU):
            raise KeyError
        assert torch.get_float32_matmul_precision() == before
        assert not torch.is_autocast_enabled("cpu")
    finally:
        torch.set_float32_matmul_precision(kept)


def test_bfloat16_is_for_linear_layers_alone():
    layer, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
    with arithmetic("bfloat16", CPU):
        assert layer(x).dtype == torch.bfloat16
        assert (x * 2).sin().dtype == torch.float32
    with arithmetic("tf32", CPU):
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_bfloat16_sees_weights_that_change():
    layer, x = torch.nn.Linear(1, 1, bias=False), torch.ones(1, 1)
    with arithmetic("bfloat16", CPU):
        for value in (1.0, 2.0):
            with torch.no_grad():
                layer.weight.fill_(value)
            assert layer(x).item() == value


def test_an_unknown_precision_is_refused(unchecked_types):
    with (
        pytest.raises(DeviceError, match="'float16'; allowed are float32, tf32, bfloat16"),
        arithmetic("float16", CPU),
    ):
        pass


# --- a part of a GPU ---------------------------------------------------------------------------

GB = 10**9
CUDA = torch.device("cuda:0")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A GPU of 100 GB in the words of PyTorch: what the driver says is free, and what is ours."""
    state = SimpleNamespace(free=100 * GB, reserved=0, allocated=0, emptied=0)

    def empty() -> None:
        state.emptied += 1
        state.free += state.reserved - state.allocated
        state.reserved = state.allocated

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (state.free, 100 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: state.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: state.allocated)
    properties = SimpleNamespace(total_memory=100 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    yield state
    share_memory(1.0)


def test_a_whole_gpu_is_taken_as_far_as_it_is_free(gpu):
    assert spare_memory(CUDA) == 100 * GB
    gpu.free, gpu.reserved, gpu.allocated = 60 * GB, 30 * GB, 10 * GB
    assert spare_memory(CUDA) == 80 * GB  # what this process keeps for later is its own
    assert memory_chunk(CUDA, 1000) == 24_000_000


def test_of_a_part_no_more_is_taken_by_choice_than_is_left_of_it(gpu):
    share_memory(0.25)
    assert spare_memory(CUDA) == 25 * GB
    gpu.free, gpu.reserved, gpu.allocated = 60 * GB, 12 * GB, 10 * GB
    assert spare_memory(CUDA) == 15.5 * GB  # a quarter of the 62 GB that are free
    gpu.free, gpu.allocated = 30 * GB, 5 * GB
    assert spare_memory(CUDA) == 20 * GB  # the rest of its own quarter
    gpu.free, gpu.reserved = 4 * GB, 5 * GB
    assert spare_memory(CUDA) == 4 * GB  # others hold more than their part
    gpu.free, gpu.allocated = 8 * GB, 40 * GB
    gpu.reserved = gpu.allocated
    assert spare_memory(CUDA) == 2 * GB  # more than its part is held, and work still goes on


@pytest.mark.parametrize("parts", [1, 2, 4, 10])
def test_workers_that_choose_at_the_same_moment_do_not_take_more_than_there_is(gpu, parts):
    share_memory(1 / parts)
    chosen = [memory_chunk(CUDA, 1000) * 1000 for _ in range(parts)]
    assert sum(chosen) <= 0.3 * 100 * GB
    assert memory_chunk(CUDA, 1000) * 1000 == int(0.3 * 100 * GB / parts) // 1000 * 1000


@pytest.mark.parametrize(("share", "unused", "emptied"), [
    (1.0, 3, 0), (1.0, 5, 1), (0.25, 5, 1), (0.1, 3, 1), (0.1, 2, 0),
])  # fmt: skip
def test_a_worker_keeps_little_of_a_small_part(gpu, share, unused, emptied):
    share_memory(share)
    gpu.allocated, gpu.reserved = GB, GB + unused * GB
    give_memory_back(4 * GB)
    assert gpu.emptied == emptied
    give_memory_back()
    assert gpu.reserved == gpu.allocated


CYCLES = """
import resource, torch
from nerf.devices import keep_freed_memory

def faults():
    def cycle():
        blocks = [torch.ones(2**20) for _ in range(24)]  # 4 MiB each
    cycle()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        cycle()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(torch.device("cpu")), faults())
"""


def cycles(**variables: str) -> tuple[int, bool, int]:
    """Page faults of what allocates the same again and again: before, whether it is kept, after."""
    done = subprocess.run(
        [sys.executable, "-c", CYCLES],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    before, kept, after = done.stdout.split()
    return int(before), kept == "True", int(after)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
def test_memory_that_is_freed_is_kept_for_what_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before, kept, after = cycles()
    assert kept
    assert after < before / 10


def test_who_sets_the_allocator_up_is_left_alone() -> None:
    _, kept, _ = cycles(MALLOC_TRIM_THRESHOLD_="1000000")
    assert not kept
