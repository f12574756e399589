"""Tests that need an NPU: a real one, or, where the environment is prepared for it, the emulated one."""

import os
import sys
from pathlib import Path

import pytest
import torch

EMULATED = "EMULATED_CANN" in os.environ
HAS_DEVICE = EMULATED or (hasattr(torch, "npu") and torch.npu.is_available())
collect_ignore_glob = [] if HAS_DEVICE else ["test_*.py"]

if EMULATED:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.emulated_cann import device

    device.start()


def pytest_collection_modifyitems(items):
    for item in items:
        if not EMULATED and item.get_closest_marker("emulated"):
            item.add_marker(pytest.mark.skip(reason="needs the emulated device"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Takes the place of the fixture of all other tests, which turns deterministic algorithms on: on the device, memory is
    poisoned anyway, and another backward kernel would run."""


@pytest.fixture(autouse=True)
def no_traps():
    """Fails a test in which an operator did what a chip would do wrong in silence, even if the error was swallowed."""
    yield
    if EMULATED:
        assert not (traps := device.take_traps()), "\n".join(traps)
