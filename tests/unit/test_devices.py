"""Devices that are not there, and arithmetic that leaves no trace."""

import pytest
import torch

from nerf.devices import PRECISIONS, arithmetic, describe_device, resolve_device
from nerf.errors import DeviceError

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
