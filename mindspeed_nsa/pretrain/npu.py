"""What a job needs of its NPUs, found out before its first iteration."""

from megatron.core import parallel_state

from mindspeed_nsa.heads import split_heads
from mindspeed_nsa.patches import npu_host
from mindspeed_nsa.pretrain.job import Job


def check(job: Job) -> None:
    """Check that the Ascend operators take the job's numbers.

    Raises:
        ValueError: they are float32, or keys are gathered over context-parallel ranks.
    """
    if npu_host.uses_ascend(job.nsa) and job.parallel.cp_comm_type == "all_gather":
        raise ValueError(
            "parallel.cp_comm_type: all_gather, but the Ascend operators mask by positions that start at the first query; "
            "allowed with NSA on an NPU: a2a"
        )
    if npu_host.uses_ascend(job.nsa) and not job.training.bf16:
        raise ValueError("training.bf16: false, but the Ascend operators take no float32; allowed with NSA on an NPU: true")


def agree_on_plan(job: Job) -> None:
    """Find out on each rank's NPU how attention stays causal. Every rank calls it; where there is none, nothing is done.

    Raises:
        ValueError: no plan holds on some rank's device, or the ranks differ; one line that names the ranks.
    """
    tensor = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    split = split_heads(job.model.num_attention_heads, job.model.query_groups, *tensor)
    if job.parallel.cp_comm_type == "a2a":
        context = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        split = split_heads(split.head_num, split.kv_head_num, *context, "context_parallel_size")
    # Ranks that share a group attend with their own heads of it, and choose with all.
    for group in sorted({split.head_num // split.kv_head_num, job.model.num_attention_heads // job.model.query_groups}):
        npu_host.agree_on_plan(job.nsa, group)
