"""Ranks that were started differently stop at once and say which rank differs in what."""

import subprocess
import sys

import pytest
from jobs import arguments, environment

from mindspeed_nsa.pretrain.agreement import _differences

pytest.importorskip("megatron.core")

# Rank 1 of two gets other overrides than rank 0.
_DIFFERENTLY = """
import os, runpy, sys
common, other = sys.argv[1].split("|"), sys.argv[2].split("|")
sys.argv = ["mindspeed_nsa.pretrain", *common, *(other if os.environ["RANK"] == "1" else [])]
runpy.run_module("mindspeed_nsa.pretrain", run_name="__main__", alter_sys=True)
"""


def run_differently(text, tmp_path, common, other):
    script = tmp_path / "differently.py"
    script.write_text(_DIFFERENTLY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command += ["|".join(arguments(text, tmp_path / "run", common)), "|".join(other)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


def test_every_rank_that_differs_is_named():
    ranks = [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1}]
    assert list(_differences(ranks)) == ["rank 1 has b 3, rank 0 has 2", "rank 2 has b None, rank 0 has 2"]


@pytest.mark.parametrize(
    ("common", "other", "message"),
    [
        ((), ("training.seed=4",), "rank 1 has training.seed 4, rank 0 has 1234"),
        (
            ("parallel.tensor_model_parallel_size=2",),
            ("parallel.tensor_model_parallel_size=1",),
            "rank 1 has parallel.tensor_model_parallel_size 1, rank 0 has 2",
        ),
    ],
    ids=["seed", "layout"],
)
def test_a_rank_with_other_settings_is_named(text, tmp_path, common, other, message):
    done = run_differently(text, tmp_path, common, other)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_rank_with_other_data_is_named(text, tmp_path):
    done = run_differently(text, tmp_path, (), (f"data.data_path={text}_valid",))
    assert done.returncode != 0
    assert "rank 1 has contents of data.data_path" in done.stderr
