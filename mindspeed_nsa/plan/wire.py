"""What the ranks of a job send to one another in a training step; docs/plan.md has the formulas.

Counted for the messages that Megatron-core and this project send in the forward and the backward pass, and around the
optimizer. Left out is what does not grow with the model or the sequence: norms of gradients, losses, agreements.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from mindspeed_nsa.memory import (
    bytes_of,
    choosing_ranks,
    expert_tensor_ranks,
    feed_forward_width,
    gathers_queries,
    is_sparse,
    optimizer_ranks,
    own_tokens,
    pooling_parameters,
    rank_tokens,
    stage_layers,
    stage_parameters,
)
from mindspeed_nsa.pretrain.job import Job
from mindspeed_nsa.shared_groups import score_parts

DIMENSIONS = ("tensor", "scores", "context", "pipeline", "expert", "data")

# The share of a payload that one of n ranks sends, as rings do it, and all-to-all directly.
SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "send": lambda n: 1.0,
}
_LOSSES = 3  # of float32 a token: the maximum of the logits, the one of the label, the sum


class Message(NamedTuple):
    """Messages of one kind that a rank takes part in, in one step.

    Attributes:
        dimension: one of `DIMENSIONS`.
        what: is sent.
        collective: a key of `SENT`.
        ranks: of the group.
        payload: bytes of one message: the result of an all-gather, what enters the other collectives.
        times: in a step.
    """

    dimension: str
    what: str
    collective: str
    ranks: int
    payload: float
    times: int

    @property
    def sent(self) -> float:
        """Bytes that the rank sends."""
        return sent(self.collective, self.ranks, self.payload) * self.times


def sent(collective: str, ranks: int, payload: float) -> float:
    """Bytes that one of `ranks` sends in a collective of `payload` bytes."""
    return SENT[collective](ranks) * payload


def by_dimension(messages: list[Message]) -> dict[str, float]:
    """Bytes that a rank sends in a step, for each dimension that sends any."""
    totals = {name: sum(message.sent for message in messages if message.dimension == name) for name in DIMENSIONS}
    return {name: total for name, total in totals.items() if total}


def step_messages(job: Job, world_size: int, vocab_size: int, stage: int) -> list[Message]:
    """The messages of a rank of one pipeline stage in one step.

    Args:
        job: the job; `job.check_layout(world_size)` holds.
        world_size: its ranks.
        vocab_size: rows of the embedding.
        stage: of the rank.
    """
    batches = job.micro_batches(world_size)
    layers = stage_layers(job, stage)
    of_run = len(layers) // job.pipeline_runs
    each = [message for i, number in enumerate(layers) for message in _layer(job, i % of_run, number)]
    each += [*_ends(job, stage), *_pipeline(job, stage)]
    times: Counter[Message] = Counter()
    for message in each:
        times[message._replace(times=0)] += message.times * batches
    for message in _gradients(job, world_size, vocab_size, stage):
        times[message._replace(times=0)] += message.times
    return [
        message._replace(times=count) for message, count in times.items() if message.ranks > 1 and count and message.payload
    ]


def _layer(job: Job, place: int, number: int) -> Iterator[Message]:
    """Of one layer and micro-batch; `place` is that in its run of layers."""
    parallel, model = job.parallel, job.model
    full = parallel.recompute_granularity == "full"
    covered = full and (parallel.recompute_method == "uniform" or place < (parallel.recompute_num_layers or 0))
    forwards = 2 if covered else 1
    core_forwards = 2 if covered or parallel.recompute_granularity == "selective" else 1
    has_network = feed_forward_width(job, number) > 0
    projections = 1
    if is_sparse(job, number) and not model.multi_latent_attention:
        projections += job.nsa.separate_kv + (job.nsa.gate == "hidden")
    yield from _tensor(job, projections + has_network, 1 + has_network, forwards)
    if is_sparse(job, number):
        yield from _shared_groups(job, forwards, core_forwards)
        yield from _context(job, core_forwards)
    if model.expert_layers[number]:
        yield from _experts(job, forwards)


def _tensor(job: Job, into: int, out: int, forwards: int) -> Iterator[Message]:
    """Around `into` projections that split the hidden states by columns, and `out` that bring them together."""
    ranks, payload = job.parallel.tensor_model_parallel_size, _hidden_bytes(job)
    if not job.parallel.sequence_parallel:
        yield Message("tensor", "hidden states", "all-reduce", ranks, payload, out * forwards + into)
        return
    # The inputs of the first are gathered anew for the gradients of their weights.
    yield Message("tensor", "hidden states", "all-gather", ranks, payload, into * (forwards + 1) + out)
    yield Message("tensor", "hidden states", "reduce-scatter", ranks, payload, out * forwards + into)


def _shared_groups(job: Job, forwards: int, core_forwards: int) -> Iterator[Message]:
    """Where ranks share key/value groups: projections brought together, blocks chosen, gradients of the pooling summed."""
    model, nsa, ranks = job.model, job.nsa, job.parallel.tensor_model_parallel_size
    held = job.held_heads
    query, value, groups = model.head_width, model.value_width, model.query_groups
    sharers = len(held.sharers)
    if sharers > 1:
        widths = [model.num_attention_heads * query + groups * (query + value)]
        widths += [2 * groups * (query + value)] * nsa.separate_kv
        for width in widths:
            payload = rank_tokens(job) * width * bytes_of(job)
            yield Message("tensor", "projections of shared groups", "all-gather", ranks, payload, forwards)
            yield Message("tensor", "projections of shared groups", "reduce-scatter", ranks, payload, 1)
        pooling = pooling_parameters(job, held.kv_head_num)[0] * bytes_of(job)
        yield Message("scores", "gradients of the pooling", "all-reduce", sharers, pooling, 1)
    yield Message("tensor", "gradients of the pooling", "all-reduce", ranks, pooling_parameters(job, 0)[1] * bytes_of(job), 1)
    together, batch = choosing_ranks(job), job.training.micro_batch_size
    if gathers_queries(job):
        heads = job.run_heads.head_num * together
        payload = model.seq_length * batch * heads * query * bytes_of(job)
        yield Message("scores", "queries of shared groups", "all-gather", together, payload, core_forwards)
    else:
        payload = batch * job.run_heads.kv_head_num * _scores(job) * 4
        yield Message("scores", "scores of blocks", "all-reduce", together, payload, core_forwards)


def _scores(job: Job) -> float:
    """Scores that a rank sums for a key/value group of one sequence."""
    length, pieces, ranks = job.model.seq_length, 1, 1
    if job.parallel.cp_comm_type == "all_gather":
        ranks = job.parallel.context_parallel_size
        pieces = 2 * ranks
    spans = ((length * piece // pieces, length * (piece + 1) // pieces) for piece in range(pieces))
    parts = (part for span in spans for part in score_parts(*span, job.nsa.select_block_size, job.nsa.select_block_count))
    return sum((last - first) * blocks for first, last, blocks in parts) / ranks


def _context(job: Job, core_forwards: int) -> Iterator[Message]:
    parallel, model = job.parallel, job.model
    ranks, heads, groups = parallel.context_parallel_size, job.held_heads.head_num, job.held_heads.kv_head_num
    query, value = model.head_width, model.value_width
    branches = 3 if job.nsa.separate_kv else 1
    a_token = rank_tokens(job) * bytes_of(job)
    of_keys = branches * (query + value)
    if parallel.cp_comm_type == "all_gather":
        payload = ranks * a_token * groups * of_keys
        yield Message("context", "keys and values", "all-gather", ranks, payload, core_forwards)
        yield Message("context", "keys and values", "reduce-scatter", ranks, payload, 1)
        return
    both_ways = core_forwards + 1
    yield Message("context", "queries and gates", "all-to-all", ranks, a_token * heads * (query + 3), both_ways)
    yield Message("context", "keys and values", "all-to-all", ranks, a_token * max(groups, ranks) * of_keys, both_ways)
    yield Message("context", "attention", "all-to-all", ranks, a_token * heads * value, both_ways)


def _experts(job: Job, forwards: int) -> Iterator[Message]:
    """Tokens to the experts and back, by the dispatcher that the job says, of Megatron's."""
    model, parallel = job.model, job.parallel
    own, hidden = own_tokens(job), model.hidden_size * bytes_of(job)
    split = expert_tensor_ranks(job)
    if dispatcher(job) == "allgather":
        ranks = split * parallel.expert_model_parallel_size
        for what, width in (("tokens", hidden), ("probabilities", (model.num_experts or 0) * bytes_of(job))):
            yield Message("expert", what, "all-gather", ranks, ranks * own * width, forwards)
            yield Message("expert", what, "reduce-scatter", ranks, ranks * own * width, 1)
        yield Message("expert", "choices", "all-gather", ranks, ranks * own * (model.num_experts or 0), forwards)
        yield Message("expert", "what experts return", "reduce-scatter", ranks, ranks * own * hidden, forwards)
        yield Message("expert", "what experts return", "all-gather", ranks, ranks * own * hidden, 1)
        return
    copies = own * model.moe_router_topk * hidden
    # There and back, were experts chosen alike; each with its gradient.
    ranks = parallel.expert_model_parallel_size
    yield Message("expert", "tokens, there and back", "all-to-all", ranks, copies, 2 * (forwards + 1))
    yield Message("expert", "tokens of a split expert", "all-gather", split, split * copies, forwards + 1)
    yield Message("expert", "tokens of a split expert", "reduce-scatter", split, split * copies, forwards + 1)


def dispatcher(job: Job) -> str:
    """Which of Megatron's dispatchers of tokens a job uses: `megatron.moe_token_dispatcher_type`, else `allgather`.

    Raises:
        ValueError: it is one whose messages are not known here.
    """
    named = job.megatron.get("moe_token_dispatcher_type", "allgather")
    if named not in ("allgather", "alltoall"):
        raise ValueError(f"megatron.moe_token_dispatcher_type: {named} cannot be planned; allgather and alltoall can")
    return named


def _ends(job: Job, stage: int) -> Iterator[Message]:
    """The embedding of the first stage; output layer and loss of the last."""
    parallel = job.parallel
    ranks, hidden, sequence = parallel.tensor_model_parallel_size, _hidden_bytes(job), parallel.sequence_parallel
    if stage == 0:
        yield Message("tensor", "embeddings", "reduce-scatter" if sequence else "all-reduce", ranks, hidden, 1)
        yield Message("tensor", "embeddings", "all-gather", ranks, hidden, int(sequence))
    if stage == parallel.pipeline_model_parallel_size - 1:
        yield from _tensor(job, 1, 0, 1)
        yield Message("tensor", "losses", "all-reduce", ranks, rank_tokens(job) * 4, _LOSSES)


def _pipeline(job: Job, stage: int) -> Iterator[Message]:
    """Hidden states to the next stage and their gradients to the one before, for each run of layers."""
    stages, runs = job.parallel.pipeline_model_parallel_size, job.pipeline_runs
    payload = own_tokens(job) * job.model.hidden_size * bytes_of(job)
    forward, backward = runs - (stage == stages - 1), runs - (stage == 0)
    yield Message("pipeline", "hidden states", "send", stages, payload, forward + backward)


def _gradients(job: Job, world_size: int, vocab_size: int, stage: int) -> Iterator[Message]:
    """Once a step: float32 gradients, and the parameters that the distributed optimizer has changed."""
    parallel, model = job.parallel, job.model
    held = stage_parameters(job, vocab_size, stage)
    kinds = zip(("parameters", "experts"), (held.shared, held.experts), optimizer_ranks(job, world_size), strict=True)
    for what, count, ranks in kinds:
        if parallel.use_distributed_optimizer:
            yield Message("data", f"gradients of {what}", "reduce-scatter", ranks, 4 * count, 1)
            yield Message("data", what, "all-gather", ranks, bytes_of(job) * count, 1)
        else:
            yield Message("data", f"gradients of {what}", "all-reduce", ranks, 4 * count, 1)
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if parallel.sequence_parallel:
        yield Message("tensor", "gradients of norms and routers", "all-reduce", tensor, 4 * held.summed, 1)
    if stages > 1 and not model.untie_embeddings_and_output_weights and stage in (0, stages - 1):
        table = 4 * vocab_size * model.hidden_size // tensor
        yield Message("pipeline", "gradients of the embedding", "all-reduce", 2, table, 1)


def _hidden_bytes(job: Job) -> float:
    return rank_tokens(job) * job.model.hidden_size * bytes_of(job)
