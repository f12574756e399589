"""Small jobs on `configs/tiny.yaml`, for whoever starts them."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
from ports import free_ports

ROOT = Path(__file__).parents[2]
# Dense and small enough that a run is little more than its start.
SMALL = (
    "nsa.enabled=false",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.kv_channels=8",
    "model.seq_length=256",
    "training.train_iters=4",
    "logging.tensorboard=false",
)


def command(text: Path, folder: Path, overrides: tuple[str, ...], ranks: int) -> list[str]:
    """The command line of a small job on `configs/tiny.yaml`; `ranks` 0 starts no torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return [sys.executable, *launcher, "-m", "mindspeed_nsa.pretrain", *arguments(text, folder, overrides)]


def arguments(text: Path, folder: Path, overrides: tuple[str, ...]) -> list[str]:
    """The job's own part of that command line."""
    data = [f"data.data_path={text}_train", f"data.valid_data_path={text}_valid", f"logging.run_dir={folder}"]
    return ["--config", str(ROOT / "configs" / "tiny.yaml"), *data, *SMALL, *overrides]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def rows(folder: Path) -> list[dict[str, Any]]:
    """What a run has written of its iterations."""
    metrics = folder / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


class JobServer:
    """Starts jobs, one at a time, without the seconds that importing torch and Megatron takes: see `forked.py`."""

    def __init__(self, folder: Path) -> None:
        self._outputs = [folder / "stdout", folder / "stderr"]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forked.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )

    def __enter__(self) -> "JobServer":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self.kill()
        self._process.stdin.close()
        self._process.wait()

    def start(self, arguments: list[str], ranks: int = 0) -> None:
        """Start a job: in a process as it is, or on `ranks`."""
        assert self._process.stdin
        stdout, stderr = map(str, self._outputs)
        request = {"arguments": arguments, "ranks": ranks, "port": free_ports(1)[0], "stdout": stdout, "stderr": stderr}
        print(json.dumps(request), file=self._process.stdin, flush=True)

    def wait(self) -> tuple[int, str, str]:
        """The job's exit code (-9 if it was killed), stdout and stderr, once it has ended."""
        assert self._process.stdout
        code = int(self._process.stdout.readline())
        return code, *(output.read_text() for output in self._outputs)

    def kill(self) -> None:
        """SIGKILL for the job and all that it has started."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
