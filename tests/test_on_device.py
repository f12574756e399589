"""Each file of `tests/on_device` in a process of its own, with the real torch_npu over an emulated CANN."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_cann import build

TESTS = Path(__file__).parent
REASON = build.why_not(build.torch_npu_path())


@pytest.mark.skipif("EMULATED_CANN" in os.environ, reason="runs inside the emulation already")
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("file", sorted(file.name for file in (TESTS / "on_device").glob("test_*.py")))
def test_under_emulation(file):
    environment = os.environ | build.environment(build.torch_npu_path())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "on_device" / file)]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"pytest {file} under emulation:\n{done.stdout[-20000:]}\n{done.stderr[-5000:]}", pytrace=False)
