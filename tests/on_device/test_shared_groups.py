"""Two ranks that share a key/value head, each on an emulated device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.emulated
ROOT = Path(__file__).parents[2]


def test_two_devices_choose_by_the_fused_operator_and_are_one():
    """By plan A with queries brought together and no scores; by plan B, where PyTorch chooses, with scores summed."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line += ["-m", "tests.emulated_cann", "-m", "tests.on_device.shared_group_rank"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
