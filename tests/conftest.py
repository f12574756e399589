import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory (`torch.empty` and its kin) is filled with NaN, so that reading it before writing shows."""
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Each backend that runs on the CPU."""
    if request.param == "cpu":
        pytest.importorskip("mindspeed_nsa.ops.cpu", reason="the native kernels are not built", exc_type=ImportError)
    return request.param
