import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_cann import build

ROOT = Path(__file__).parents[1]
BROKEN = "raise ImportError('libhccl.so: cannot open shared object file')"
WORKING = "import torch\nloaded = []\ndef _autoload():\n    loaded.append(torch.__version__)"
# What a user of the CPU does; a child process too has to get torch.
USE = """
import json, os, subprocess, sys
from mindspeed_nsa import autoload, ops
import torch
x, weight = torch.ones(64, 1, 16, dtype=torch.bfloat16), torch.ones(32, 1, dtype=torch.bfloat16)
out = ops.npu_nsa_compress(x, weight, 32, 16, actual_seq_len=[64])
child = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode
print(json.dumps({
    "failures": autoload.failures,
    "variable": os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD"),
    "out": out.unique().tolist(),
    "child": child,
    "loaded": len(getattr(sys.modules.get("torch_npu"), "loaded", [])),
}))
"""


def python(folder, *arguments, autoload=None):
    given = {"PYTHONPATH": str(folder)} | ({} if autoload is None else {"TORCH_DEVICE_BACKEND_AUTOLOAD": autoload})
    environment = {
        key: value for key, value in os.environ.items() if key not in ("TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONPATH")
    }
    return subprocess.run([sys.executable, *arguments], env=environment | given, cwd=ROOT, capture_output=True, text=True)


def use(folder, autoload=None):
    done = python(folder, "-c", USE, autoload=autoload)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture
def torch_npu(tmp_path):
    """Put a torch_npu of some source into a folder, as an installer would."""

    def install(source):
        for path, text in (
            ("torch_npu/__init__.py", source),
            ("torch_npu-2.13.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n"),
            ("torch_npu-2.13.0.dist-info/entry_points.txt", "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"),
        ):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(text)
        return tmp_path

    return install


def test_a_torch_npu_that_does_not_load_leaves_the_cpu_and_its_reason(torch_npu):
    folder = torch_npu(BROKEN)
    assert "Failed to load the backend extension: torch_npu" in python(folder, "-c", "import torch").stderr
    used, err = use(folder)
    reason = "libhccl.so: cannot open shared object file"
    assert used == {"failures": {"torch_npu": reason}, "variable": "0", "out": [32.0], "child": 0, "loaded": 0}
    assert err.count(f"torch_npu does not load and is not used: {reason}") == 1


@pytest.mark.parametrize(("autoload", "loaded"), [(None, 1), ("1", 1), ("0", 0)])
def test_a_torch_npu_that_loads_is_loaded_as_torch_would(torch_npu, autoload, loaded):
    used, err = use(torch_npu(WORKING), autoload)
    assert used == {"failures": {}, "variable": autoload, "out": [32.0], "child": 0, "loaded": loaded}
    assert "torch_npu" not in err


@pytest.mark.skipif(not (build.torch_npu_path() / "torch_npu").is_dir(), reason=f"no torch_npu in {build.torch_npu_path()}")
def test_the_real_torch_npu_without_cann_leaves_the_cpu_and_the_command():
    folder = build.torch_npu_path()
    used, _ = use(folder)
    assert (used["out"], used["child"]) == ([32.0], 0)
    assert "cannot open shared object file" in used["failures"]["torch_npu"]
    command = "from mindspeed_nsa.cli import main; main(['doctor'])"
    done = python(folder, "-c", command)
    assert done.returncode == 1
    assert "does not load" in done.stdout and "export TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.stdout
