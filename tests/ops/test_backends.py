import importlib.util
import logging

import pytest
import torch

from mindspeed_nsa import NativeSparseAttention, NSAConfig, ops
from mindspeed_nsa.ops import backends, library


@pytest.fixture
def spied(monkeypatch):
    """The backends that operators were sent to."""
    seen = []

    def load(name, device_type):
        seen.append((name, device_type))
        return backends.load("reference", device_type)

    monkeypatch.setattr(library, "load", load)
    return seen


def window():
    x = torch.ones(2, 1, 16, dtype=torch.bfloat16, requires_grad=True)
    return ops.sliding_window_attention(x, x, x, 1.0, 1, 2, actual_seq_qlen=[2], actual_seq_kvlen=[2])


def test_use_backend_holds_inside_only(spied):
    window()
    with ops.use_backend("reference"):
        window()
        with ops.use_backend("auto"):
            window()
        window()
    window()
    assert [name for name, _ in spied] == ["auto", "reference", "auto", "reference", "auto"]


def test_use_backend_ends_with_an_error():
    with pytest.raises(RuntimeError, match="inside"), ops.use_backend("reference"):
        raise RuntimeError("inside")
    assert backends.resolve("auto") == "auto"


def test_backward_runs_where_forward_ran(spied):
    with ops.use_backend("reference"):
        out = window()
    out.sum().backward()
    assert spied == [("reference", "cpu")] * 2


def test_a_config_names_its_backend(spied):
    sizes = {"compress_block_size": 4, "compress_stride": 2, "select_block_size": 8, "select_block_count": 3}
    config = NSAConfig(**sizes, strict=False, backend="reference")
    x = torch.randn(9, 1, 4)
    NativeSparseAttention(config, 1, 1, 4, 4)(x, x, x, torch.zeros(9, 1, 3))
    assert {name for name, _ in spied} == {"reference"}


@pytest.fixture
def unbuilt(monkeypatch):
    """An installation without the native kernels."""
    monkeypatch.setitem(backends._MODULES, "cpu", "mindspeed_nsa.ops.absent")
    backends.load.cache_clear()
    yield
    backends.load.cache_clear()


def test_an_unknown_backend_is_refused():
    words = "there is no backend 'gpu'; allowed: auto, reference, cpu, ascend"
    with pytest.raises(ValueError, match=words), ops.use_backend("gpu"):
        pass
    assert backends.resolve("auto") == "auto"


def test_a_backend_that_is_not_there_is_refused(unbuilt):
    words = "backend 'cpu' cannot run here: No module named .*; `mindspeed-nsa doctor` says what to do"
    with pytest.raises(ValueError, match=words), ops.use_backend("cpu"):
        pass


def test_a_backend_that_does_not_load_says_why():
    if importlib.util.find_spec("torch_npu"):
        pytest.skip("torch_npu is here")
    words = "backend 'ascend' cannot run here: No module named 'torch_npu'"
    with pytest.raises(ValueError, match=words), ops.use_backend("ascend"):
        pass


def test_auto_says_once_that_it_falls_back(unbuilt, caplog):
    with caplog.at_level(logging.WARNING):
        assert {backends.load("auto", "cpu").__name__ for _ in range(3)} == {"mindspeed_nsa.ops.reference"}
    assert [record.getMessage() for record in caplog.records] == [
        "no native CPU kernels: No module named 'mindspeed_nsa.ops.absent'; the operators run on the reference, which is slow"
    ]


def test_auto_goes_by_device(monkeypatch):
    monkeypatch.setitem(backends._MODULES, "ascend", "mindspeed_nsa.ops.contract")  # stands in for it
    backends.load.cache_clear()
    assert backends.load("auto", "npu").__name__ == "mindspeed_nsa.ops.contract"
    assert backends.load("auto", "meta").__name__ == "mindspeed_nsa.ops.reference"
    backends.load.cache_clear()
