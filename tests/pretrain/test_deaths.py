"""A rank that dies ends the job: within a minute, with a report that names it, and no other rank goes on."""

import subprocess
import time

import psutil
import pytest
from jobs import command, environment

pytest.importorskip("megatron.core")

from mindspeed_nsa.pretrain.checkpoint import find

# What shows in a folder of checkpoints: a save has begun; one has ended, and the next iteration is under way.
MOMENTS = {"saving": ".iter_*", "training": "latest_checkpointed_iteration.txt"}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_rank_that_dies_ends_the_job(text, tmp_path, moment):
    saved = tmp_path / "checkpoints"
    settings = ("training.train_iters=100000", f"checkpoint.save={saved}", "checkpoint.save_interval=2")
    line = command(text, tmp_path / "run", (*settings, "parallel.tensor_model_parallel_size=2"), ranks=2)
    with (tmp_path / "stderr").open("w") as stderr:
        job = psutil.Popen(line, env=environment(), stdout=subprocess.DEVNULL, stderr=stderr)
    while not list(saved.glob(MOMENTS[moment])):
        assert job.poll() is None, (tmp_path / "stderr").read_text()[-6000:]
        time.sleep(0.01)
    ranks, started = job.children(), job.children(recursive=True)
    next(process for process in ranks if process.environ()["RANK"] == "1").kill()
    assert job.wait(timeout=60) != 0
    report = (tmp_path / "stderr").read_text()
    root_cause = report[report.index("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in root_cause and "Signal 9 (SIGKILL)" in root_cause
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not set(ranks) & set(alive)
    for process in alive:  # Megatron's helper for saving outlives the rank that it helped
        process.kill()
    if moment == "training":
        assert find(str(saved)).name >= "iter_0000002"
