"""Small jobs on `configs/tiny.yaml`, for whoever starts them."""

import os
import sys
from pathlib import Path

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
