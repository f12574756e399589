"""What is found out on NPUs before a job runs; on an emulated device in tests/on_device."""

from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from mindspeed_nsa.pretrain import npu
from mindspeed_nsa.pretrain.job import Job

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.mark.parametrize(
    ("tensor", "context", "groups"),
    [(1, 1, [4]), (2, 1, [4]), (4, 1, [2, 4]), (8, 1, [1, 4]), (1, 2, [4]), (2, 4, [1, 4])],
)
def test_a_plan_is_sought_for_the_heads_that_attend_and_for_those_that_choose(monkeypatch, tensor, context, groups):
    """8 query heads in 2 groups. Ranks that share a group run its compressed attention whole."""
    for name, size in (("tensor_model", tensor), ("context", context)):
        monkeypatch.setattr(npu.parallel_state, f"get_{name}_parallel_world_size", lambda size=size: size)
        monkeypatch.setattr(npu.parallel_state, f"get_{name}_parallel_rank", lambda: 0)
    found = []
    monkeypatch.setattr(npu.npu_host, "agree_on_plan", lambda nsa, group: found.append(group))
    layout = [f"parallel.tensor_model_parallel_size={tensor}"]
    if context > 1:
        layout += [f"parallel.context_parallel_size={context}", "parallel.cp_comm_type=a2a"]
    npu.agree_on_plan(Job.read(CONFIG, layout))
    assert found == groups
