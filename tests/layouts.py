"""Run `configs/tiny.yaml` on a layout and bring back what is compared: the losses, and the blocks that were chosen."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent


class Run(NamedTuple):
    losses: list[float]
    grad_norms: list[float]
    ids: list[torch.Tensor]  # one a layer and microbatch, in order: [T, all groups, blocks]


def run(folder: Path, data: Path, ranks: int, *overrides: str, spoiled: str = "nothing") -> Run:
    """Train on `ranks` processes; `spoiled` names a mistake to make on purpose (see `layout_worker`)."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(ROOT / "tests" / "layout_worker.py"), str(ROOT / "configs" / "tiny.yaml"), str(folder), spoiled]
    settings = [f"data.data_path={data}", f"logging.run_dir={folder / 'run'}", "logging.tensorboard=false"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *settings, *overrides], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["iteration"] > 0]
    return Run([row["loss"] for row in rows], [row["grad_norm"] for row in rows], _ids(folder))


def _ids(folder: Path) -> list[torch.Tensor]:
    by_head: dict[int, list[torch.Tensor]] = {}
    for file in sorted(folder.glob("rank*.pt")):
        rank = torch.load(file, weights_only=True)
        known = by_head.setdefault(rank["first_kv_head"], rank["ids"])
        assert all(torch.equal(a, b) for a, b in zip(known, rank["ids"], strict=True)), "ranks of one group chose differently"
    return [torch.cat(parts, dim=1) for parts in zip(*(by_head[head] for head in sorted(by_head)), strict=True)]
