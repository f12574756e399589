"""Ranks that were started differently stop at once and say which rank differs in what."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jobs import ROOT, arguments, command, environment
from ports import free_ports

from mindspeed_nsa.pretrain.agreement import _differences

pytest.importorskip("megatron.core")

CASES = {
    "seed": "rank 1 has training.seed 4, rank 0 has 1234",
    "layout": "rank 1 has parallel.tensor_model_parallel_size 1, rank 0 has 2",
    "data": "rank 1 has contents of data.data_path",
    "order": "rank 1 has order of data.data_path",
    "checkpoint": "rank 1 has checkpoint.load 'iter_0000001', rank 0 has 'iter_0000002'",
}


@pytest.fixture(scope="module")
def nodes(run_job, tmp_path_factory):
    """A folder for each of two ranks, as nodes with disks of their own: the second's order of samples is another, and its
    latest checkpoint is one that the first has too."""
    first, second = (tmp_path_factory.mktemp("node") for _ in range(2))
    places = (f"data.data_cache_path={first / 'cache'}", f"checkpoint.save={first / 'saved'}")
    run_job(*places, "training.train_iters=2", "checkpoint.save_interval=1")
    run_job(places[0])
    for name in ("cache", "saved"):
        shutil.copytree(first / name, second / name)
    for index in second.rglob("*shuffle_index.npy"):
        np.save(index, np.load(index)[::-1])
    (second / "saved" / "latest_checkpointed_iteration.txt").write_text("1\n")
    return first, second


@pytest.fixture(scope="module")
def said(text, nodes, tmp_path_factory):
    """What both ranks said, by case, all in one start of torchrun."""
    tensor, cache = "parallel.tensor_model_parallel_size", "data.data_cache_path"
    overrides = {  # of each rank
        "seed": [(), ("training.seed=4",)],
        "layout": [(f"{tensor}=2",), (f"{tensor}=1",)],
        "data": [(), (f"data.data_path={text}_valid",)],
        "order": [(f"{cache}={node / 'cache'}",) for node in nodes],
        "checkpoint": [("checkpoint.load=saved",)] * 2,
    }
    folder = tmp_path_factory.mktemp("differing")
    cases = [
        {
            "port": port,
            "folders": list(map(str, nodes)),
            "overrides": [arguments(text, folder / name, rank)[2:] for rank in overrides[name]],
            "said": [str(folder / f"{name}.rank{rank}") for rank in range(2)],
        }
        for name, port in zip(CASES, free_ports(len(CASES)), strict=True)
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line += [str(Path(__file__).with_name("differing.py")), str(ROOT / "configs" / "tiny.yaml"), str(folder / "cases.json")]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert not list(folder.glob("*/metrics.jsonl")), "a job has begun"
    return {name: [Path(path).read_text() for path in case["said"]] for name, case in zip(CASES, cases, strict=True)}


def test_every_rank_that_differs_is_named():
    ranks = [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1}]
    assert list(_differences(ranks)) == ["rank 1 has b 3, rank 0 has 2", "rank 2 has b None, rank 0 has 2"]


@pytest.mark.parametrize("case", CASES)
def test_a_rank_that_differs_is_named(said, case):
    for rank in range(2):
        assert CASES[case] in said[case][rank]


def test_a_rank_that_alone_is_wrong_says_so(text, tmp_path):
    """Before the ranks have met: the others would wait for it."""
    script = tmp_path / "differently.py"
    script.write_text(
        "import os, runpy, sys\n"
        "sys.argv += ['training.sead=1'] * (os.environ['RANK'] == '1')\n"
        "runpy.run_module('mindspeed_nsa.pretrain', run_name='__main__', alter_sys=True)\n"
    )
    line = command(text, tmp_path / "run", (), ranks=2)
    line[line.index("-m", 3) : line.index("--config")] = [str(script)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "error: rank 1: " in done.stderr and "training.sead: unknown key" in done.stderr
    assert not (tmp_path / "run").exists()
