import subprocess
import sys

import pytest
import torch

pytest.importorskip("megatron.core")

from mindspeed_nsa.patches import cpu_host

pytestmark = pytest.mark.skipif(cpu_host.has_accelerator(), reason="this host has an accelerator")


@pytest.fixture
def installed():
    cpu_host.install()
    yield
    cpu_host.uninstall()


def test_nothing_happens_on_import():
    program = "import torch; before = torch.cuda.current_device; import mindspeed_nsa.patches.cpu_host; "
    program += "assert torch.cuda.current_device is before; import mindspeed_nsa.pretrain.trainer; "
    program += "assert torch.cuda.current_device is before"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_cuda_tensors_are_made_on_the_cpu(installed):
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty(2, device=torch.device("cuda", 0), pin_memory=True).device.type == "cpu"
    assert torch.ones(2).cuda().device.type == "cpu"
    assert torch.ones(2).to("cuda", torch.float64).dtype == torch.float64
    assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"


def test_only_megatron_is_told_that_tensors_are_on_cuda(installed):
    assert torch.zeros(1).type() == "torch.FloatTensor"
    asked_by_megatron = {"__name__": "megatron.core.optimizer", "tensor": torch.zeros(1, dtype=torch.bfloat16)}
    assert eval("tensor.type()", asked_by_megatron) == "torch.cuda.BFloat16Tensor"


def test_the_generator_of_the_device_is_the_cpus(installed):
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), first)


def test_forks_of_the_tracker_do_not_move_the_generator_nor_warn(installed, caplog):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 7)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with tracker.fork():
        inside = torch.rand(4)
    assert torch.equal(torch.rand(4), expected)
    assert not torch.equal(inside, expected)
    assert not caplog.records


def test_uninstall_gives_everything_back():
    names = ("current_device", "synchronize", "get_rng_state", "manual_seed")
    before = [getattr(torch.cuda, name) for name in names]
    cpu_host.install()
    cpu_host.install()
    assert [getattr(torch.cuda, name) for name in names] != before
    cpu_host.uninstall()
    assert [getattr(torch.cuda, name) for name in names] == before
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


def test_refuses_to_hide_an_accelerator(monkeypatch):
    monkeypatch.setattr(cpu_host, "has_accelerator", lambda: True)
    with pytest.raises(RuntimeError, match="this host has one"):
        cpu_host.install()
