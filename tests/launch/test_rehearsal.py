"""Two "nodes" on the loopback, by the script that a cluster runs: real processes, real torchrun, this project's trainer."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mindspeed_nsa.pretrain.prepare import prepare
from mindspeed_nsa.pretrain.tokenizer import build_tokenizer

pytest.importorskip("megatron.core")

ROOT = Path(__file__).parents[2]
SMALL = ("nsa.enabled=false", "model.num_layers=2", "model.seq_length=256", "logging.tensorboard=false", "logging.run_dir=run")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "text"
    prepare([ROOT / "mindspeed_nsa"], prefix, build_tokenizer("ByteTokenizer", None), suffixes=[".py"], held_out=0)
    return f"{prefix}_train"


class Cluster:
    """Starts the nodes of a job, each in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = str(server.getsockname()[1])

    def start(self, rank, *overrides, nnodes=2):
        folder = self.folder / f"node{rank}"
        folder.mkdir()
        environment = os.environ | {"NNODES": str(nnodes), "NODE_RANK": str(rank), "NPUS_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port, "GLOO_SOCKET_IFNAME": "lo"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        line = ["bash", str(ROOT / "launch" / "pretrain_a3.sh"), "--trainer", "builtin"]
        line += ["--config", str(ROOT / "configs" / "tiny.yaml"), *SMALL, *overrides]
        return subprocess.Popen(line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def finish(*nodes):
    return [(*node.communicate(timeout=200), node.returncode) for node in nodes]


def losses(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_nodes_train_one_model(cluster, text):
    job = (f"data.data_path={text}", "training.train_iters=3")
    (out, _, code), (other, err, code_1) = finish(cluster.start(0, *job), cluster.start(1, *job))
    assert (code, code_1) == (0, 0), out + err
    assert "node 0 of 2, log in run/logs/node-0.log" in out and "data parallel 2" in out
    assert other == "node 1 of 2, log in run/logs/node-1.log\n"
    log = (cluster.folder / "node0" / "run" / "logs" / "node-0.log").read_text()
    assert log in out and "iteration 3/3" in log
    assert len(losses(cluster.folder / "node0" / "run")) == 3


def test_a_node_that_is_not_fit_stops_all_and_is_named(cluster, text):
    """The second node has other data: a path that is not there."""
    nodes = cluster.start(0, f"data.data_path={text}"), cluster.start(1, "data.data_path=absent")
    for _, err, code in finish(*nodes):
        assert code == 2
        named = f"node 1 ({socket.gethostname()}): data FAULT data.data_path: absent.bin: no such file"
        assert f"mindspeed-nsa: preflight failed, nothing was started: {named}" in err
    assert not list(cluster.folder.rglob("run"))


@pytest.mark.slow
def test_the_exit_code_of_a_job_that_fails_while_it_runs(cluster, text):
    """A dataset that is damaged: found by the ranks alone."""
    Path(f"{text}_short.idx").write_bytes(b"no index")
    Path(f"{text}_short.bin").touch()
    [(out, _, code)] = finish(cluster.start(0, f"data.data_path={text}_short", nnodes=1))
    assert code == 1
    assert "truncated" in out and "truncated" in (cluster.folder / "node0" / "run" / "logs" / "node-0.log").read_text()


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_saves(cluster, text):
    node = cluster.start(0, f"data.data_path={text}", "training.train_iters=100000", "checkpoint.save=saved", nnodes=1)
    metrics = cluster.folder / "node0" / "run" / "metrics.jsonl"
    until = time.monotonic() + 150
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < until and node.poll() is None:
        time.sleep(0.2)
    node.send_signal(signal.SIGTERM)
    [(out, err, _)] = finish(node)
    assert "stopped by a signal after iteration" in out, out + err
    assert (cluster.folder / "node0" / "saved" / "latest_checkpointed_iteration.txt").exists()
