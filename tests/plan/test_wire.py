"""By hand; that the ranks really send this is counted in tests/patches/test_layouts.py."""

from pathlib import Path

import pytest

from mindspeed_nsa.plan.wire import Message, by_dimension, dispatcher, sent, step_messages
from mindspeed_nsa.pretrain.job import Job

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
ROWS = 384
HIDDEN = 1536 * 128 * 4  # of a micro-batch, of which a step has 2, over 4 layers
EXPERTS = ("model.num_experts=4", "model.moe_ffn_hidden_size=64", "model.moe_router_topk=2")


def messages(ranks, *overrides, stage=0):
    overrides = [override if "." in override else f"parallel.{override}" for override in overrides]
    return step_messages(Job.read(CONFIG, overrides), ranks, ROWS, stage)


def find(found, dimension, what, collective):
    (message,) = (x for x in found if (x.dimension, x.what, x.collective) == (dimension, what, collective))
    return message.ranks, message.payload, message.times


@pytest.mark.parametrize(
    ("collective", "share"),
    [("all-reduce", 1.5), ("all-gather", 0.75), ("reduce-scatter", 0.75), ("all-to-all", 0.75), ("send", 1)],
)
def test_what_a_rank_of_four_sends(collective, share):
    assert sent(collective, 4, 1000) == 1000 * share
    assert Message("data", "", collective, 4, 1000, 3).sent == 3000 * share


def test_one_rank_sends_nothing():
    assert messages(1) == []


def test_tensor_parallel():
    """Of a layer: 2 sums forward; 4 backward, of what enters qkv, keys of branches, gates and the network."""
    found = messages(2, "tensor_model_parallel_size=2")
    assert find(found, "tensor", "hidden states", "all-reduce") == (2, HIDDEN, 2 * (4 * 6 + 1))
    assert find(found, "tensor", "embeddings", "all-reduce") == (2, HIDDEN, 2)
    assert find(found, "tensor", "losses", "all-reduce") == (2, 1536 * 4, 2 * 3)
    assert {message.dimension for message in found} == {"tensor"}
    alone = messages(2, "tensor_model_parallel_size=2", "nsa.separate_kv=false", "nsa.gate=query")
    assert find(alone, "tensor", "hidden states", "all-reduce") == (2, HIDDEN, 2 * (4 * 4 + 1))


def test_sequence_parallel_and_recompute():
    found = messages(2, "tensor_model_parallel_size=2", "sequence_parallel=true")
    assert find(found, "tensor", "hidden states", "all-gather") == (2, HIDDEN, 2 * (4 * (4 + 4 + 2) + 2))
    assert find(found, "tensor", "hidden states", "reduce-scatter") == (2, HIDDEN, 2 * (4 * (2 + 4) + 1))
    norms = 4 * 128 * 9
    assert find(found, "tensor", "gradients of norms and routers", "all-reduce") == (2, norms, 1)
    full = ("recompute_granularity=full", "recompute_method=block", "recompute_num_layers=1")
    again = messages(2, "tensor_model_parallel_size=2", "sequence_parallel=true", *full)
    assert find(again, "tensor", "hidden states", "all-gather")[2] == 2 * (4 * 10 + 2 + 4)
    assert find(again, "tensor", "hidden states", "reduce-scatter")[2] == 2 * (4 * 6 + 1 + 2)


def test_ranks_that_share_a_group():
    """Of 4 tensor-parallel ranks two share each of 2 groups; tokens 1024 to 1535 have a choice, of 24 blocks."""
    found = messages(4, "tensor_model_parallel_size=4", "nsa.backend=cpu")
    assert find(found, "scores", "scores of blocks", "all-reduce") == (2, 512 * 1 * 24 * 4, 2 * 4)
    assert find(found, "scores", "gradients of the pooling", "all-reduce") == (2, 32 * (2 + 16) * 4, 2 * 4)
    gathered = [x for x in found if x.what == "projections of shared groups"]
    assert [(x.collective, x.payload, x.times) for x in gathered] == [
        ("all-gather", 1536 * (8 + 2 * 2) * 16 * 4, 8),
        ("reduce-scatter", 1536 * (8 + 2 * 2) * 16 * 4, 8),
        ("all-gather", 1536 * 2 * 4 * 16 * 4, 8),
        ("reduce-scatter", 1536 * 2 * 4 * 16 * 4, 8),
    ]
    assert by_dimension(messages(2, "tensor_model_parallel_size=2")).keys() == {"tensor"}


def test_scores_go_up_to_the_last_block_of_each_1024_queries():
    found = messages(4, "tensor_model_parallel_size=4", "nsa.backend=cpu", "model.seq_length=4608")
    queries_by_blocks = 1024 * 32 + 1024 * 48 + 1024 * 64 + 512 * 72
    assert find(found, "scores", "scores of blocks", "all-reduce") == (2, queries_by_blocks * 4, 2 * 4)
    laid = ("tensor_model_parallel_size=4", "context_parallel_size=2", "cp_comm_type=all_gather", "model.seq_length=4608")
    found = messages(8, *laid)  # pieces of 1152 queries, two of the four on each rank
    queries_by_blocks = 128 * 18 + 1024 * 34 + 128 * 36 + 1024 * 52 + 128 * 54 + 1024 * 70 + 128 * 72
    assert find(found, "scores", "scores of blocks", "all-reduce")[1] == queries_by_blocks * 4 / 2


@pytest.mark.parametrize("backend", ["auto", "ascend"])
def test_ranks_that_share_a_group_bring_its_queries_together_on_an_npu(backend):
    """The 4 heads of each group, 16 wide, of every token."""
    chip = ("tensor_model_parallel_size=4", "training.bf16=true", f"nsa.backend={backend}")
    found = messages(4, *chip)
    assert find(found, "scores", "queries of shared groups", "all-gather") == (2, 1536 * 4 * 16 * 2, 2 * 4)
    assert not [message for message in found if message.what == "scores of blocks"]
    one_group = messages(8, *chip, "model.num_query_groups=1", "context_parallel_size=2", "cp_comm_type=a2a")
    assert find(one_group, "scores", "queries of shared groups", "all-gather") == (8, 1536 * 8 * 16 * 2, 2 * 4)


@pytest.mark.parametrize(
    "unlike", ["nsa.select_own_block=false", "nsa.importance=paper", "model.num_attention_heads=24", "nsa.backend=reference"]
)
def test_scores_are_summed_where_the_operator_does_not_choose(unlike):
    found = messages(4, "tensor_model_parallel_size=4", "nsa.strict=false", unlike)
    names = {message.what for message in found if message.dimension == "scores"}
    assert names == {"scores of blocks", "gradients of the pooling"}


def test_context_parallel():
    a2a = messages(4, "context_parallel_size=4", "cp_comm_type=a2a", "nsa.backend=cpu")
    own = 384 * 4  # bytes of a number of each token
    assert find(a2a, "context", "queries and gates", "all-to-all") == (4, own * 8 * (16 + 3), 2 * 4 * 2)
    assert find(a2a, "context", "keys and values", "all-to-all") == (4, own * 4 * 3 * 32, 2 * 4 * 2)
    assert find(a2a, "context", "attention", "all-to-all") == (4, own * 8 * 16, 2 * 4 * 2)
    assert find(a2a, "scores", "scores of blocks", "all-reduce") == (2, 512 * 24 * 4, 2 * 4)
    selective = messages(4, "context_parallel_size=4", "cp_comm_type=a2a", "recompute_granularity=selective")
    assert find(selective, "context", "attention", "all-to-all")[2] == 2 * 4 * 3
    gather = messages(4, "context_parallel_size=4", "cp_comm_type=all_gather")
    assert find(gather, "context", "keys and values", "all-gather") == (4, 4 * own * 2 * 3 * 32, 2 * 4)
    assert find(gather, "context", "keys and values", "reduce-scatter") == (4, 4 * own * 2 * 3 * 32, 2 * 4)
    assert by_dimension(gather).keys() == {"context", "data"}


def test_pipeline():
    two = ("pipeline_model_parallel_size=2",)
    for stage in (0, 1):
        found = messages(2, *two, stage=stage)
        assert find(found, "pipeline", "hidden states", "send") == (2, HIDDEN, 2)
        assert find(found, "pipeline", "gradients of the embedding", "all-reduce") == (2, ROWS * 128 * 4, 1)
    interleaved = messages(2, *two, "num_layers_per_virtual_pipeline_stage=1")
    assert find(interleaved, "pipeline", "hidden states", "send")[2] == 2 * (2 + 1)
    middle = messages(4, "pipeline_model_parallel_size=4", stage=1)
    assert find(middle, "pipeline", "hidden states", "send") == (4, HIDDEN, 2 * 2)
    assert len(middle) == 1


def test_data_parallel():
    found = messages(2)
    (ranks, payload, times) = find(found, "data", "gradients of parameters", "all-reduce")
    assert (ranks, times) == (2, 1) and payload == 4 * 788192  # tests/test_memory.py counts parameters
    sharded = messages(2, "use_distributed_optimizer=true", "training.bf16=true")
    assert find(sharded, "data", "gradients of parameters", "reduce-scatter") == (2, 4 * 788192, 1)
    assert find(sharded, "data", "parameters", "all-gather") == (2, 2 * 788192, 1)


def test_experts():
    found = messages(2, *EXPERTS, "expert_model_parallel_size=2")
    tokens = 2 * 1536  # of both ranks, each of which has one micro-batch
    assert find(found, "expert", "tokens", "all-gather") == (2, tokens * 128 * 4, 4)
    assert find(found, "expert", "tokens", "reduce-scatter") == (2, tokens * 128 * 4, 4)
    assert find(found, "expert", "probabilities", "all-gather") == (2, tokens * 4 * 4, 4)
    assert find(found, "expert", "choices", "all-gather") == (2, tokens * 4, 4)
    assert find(found, "expert", "what experts return", "all-gather") == (2, tokens * 128 * 4, 4)
    assert not [x for x in found if x.what == "gradients of experts"], "no other rank has the same"
    alltoall = messages(2, *EXPERTS, "expert_model_parallel_size=2", "megatron.moe_token_dispatcher_type=alltoall")
    assert find(alltoall, "expert", "tokens, there and back", "all-to-all") == (2, 1536 * 2 * 128 * 4, 4 * 4)


def test_other_dispatchers_are_refused():
    job = Job.read(CONFIG, [*EXPERTS, "megatron.moe_token_dispatcher_type=flex"])
    with pytest.raises(
        ValueError, match=r"megatron\.moe_token_dispatcher_type: flex cannot be planned; allgather and alltoall"
    ):
        dispatcher(job)
