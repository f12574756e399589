"""What a job needs of its NPUs, found out before its first iteration."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state

from mindspeed_nsa.heads import split_heads
from mindspeed_nsa.patches.npu_host import has_npu
from mindspeed_nsa.pretrain.job import Job


def check(job: Job) -> None:
    """Check that the Ascend operators take the job's numbers.

    Raises:
        ValueError: they are float32, or keys are gathered over context-parallel ranks.
    """
    if _uses_ascend(job) and job.parallel.cp_comm_type == "all_gather":
        raise ValueError(
            "parallel.cp_comm_type: all_gather, but the Ascend operators mask by positions that start at the first query; "
            "allowed with NSA on an NPU: a2a"
        )
    if _uses_ascend(job) and not job.training.bf16:
        raise ValueError("training.bf16: false, but the Ascend operators take no float32; allowed with NSA on an NPU: true")


def agree_on_plan(job: Job) -> None:
    """Find out on each rank's NPU how attention stays causal. Every rank calls it; where there is none, nothing is done.

    Raises:
        ValueError: no plan holds on some rank's device, or the ranks differ; one line that names the ranks.
    """
    if not _uses_ascend(job):
        return
    from mindspeed_nsa.ops import ascend

    tensor = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    split = split_heads(job.model.num_attention_heads, job.model.query_groups, *tensor)
    context = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    split = split_heads(split.head_num, split.kv_head_num, *context, "context_parallel_size")
    found: list[Any] = [None] * torch.distributed.get_world_size()
    try:
        mine: Any = ascend.plan(split.head_num // split.kv_head_num)
    except (RuntimeError, ValueError) as error:  # the other ranks wait to hear of it
        mine = str(error)
    torch.distributed.all_gather_object(found, mine)
    if trouble := disagreement(found):
        raise ValueError(trouble)


def disagreement(found: Sequence[Any]) -> str:
    """What is wrong with the ranks' plans, in one line; empty if nothing is.

    Args:
        found: in the order of the ranks, a `mindspeed_nsa.ops.ascend.Plan`, or text that says why there is none.
    """
    ranks: dict[Any, list[int]] = {}
    for rank, plan in enumerate(found):
        ranks.setdefault(plan, []).append(rank)
    failures = [plan for plan in ranks if isinstance(plan, str)]
    if failures:
        return "; ".join(f"{text} ({_listed(ranks[text])})" for text in failures)
    if len(ranks) == 1:
        return ""
    plans = "; ".join(f"{_listed(who)}: plan {', '.join(map(str, plan))}" for plan, who in ranks.items())
    fields = ", ".join(next(iter(ranks))._fields)
    return (
        f"NSA on Ascend: the ranks found different plans ({fields}): {plans}; all ranks need the same CANN and torch_npu, "
        "and the same NSA_ASCEND_PLAN or none"
    )


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _uses_ascend(job: Job) -> bool:
    return has_npu() and job.nsa.enabled and job.nsa.backend in ("auto", "ascend")
