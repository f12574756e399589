"""What a job takes of an NPU's memory, estimated before it runs. docs/launch.md explains the formula.

The estimate follows from shapes and from what Megatron, MindSpeed and the operators keep; nothing of it was measured on a chip.
What it cannot know, `RESERVE`, is a guess: the runtime, communication buffers, workspaces of operators, gaps.
"""

from typing import NamedTuple

from .config import NSAConfig
from .ops.contract import SELECT_DIMS, takes_group
from .ops.reference import window_count
from .pretrain.job import Job

GB = 10**9
RESERVE = 6 * GB
# Attention operators return the softmax's maximum and sum, 8 float32 copies of each for every query and head.
_STATISTICS = 2 * 8 * 4


class Estimate(NamedTuple):
    """Bytes on the fullest rank.

    Attributes:
        weights: parameters in the type that is computed with.
        gradients: their float32 sums.
        optimizer: Adam's two averages, with bfloat16 the float32 parameters too.
        activations: what the backward pass needs of the forward pass, and what one layer needs while it runs.
        logits: of a micro-batch, on the last pipeline stage.
        masks: of the compressed branch, one set for all layers.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    masks: float

    @property
    def total(self) -> float:
        """All of it, and `RESERVE`."""
        return sum(self) + RESERVE


class Parameters(NamedTuple):
    """How many a rank holds.

    Attributes:
        shared: those that every rank of its stage holds or shares by tensor parallelism: all but the routed experts.
        experts: of the routed experts.
        summed: of `shared`, those whose gradients sequence parallelism leaves in parts on the tensor-parallel ranks.
    """

    shared: int
    experts: int
    summed: int


def estimate(job: Job, world_size: int, vocab_size: int) -> Estimate:
    """Estimate the memory of the fullest rank.

    Args:
        job: the job; `job.check_layout(world_size)` holds.
        world_size: its ranks.
        vocab_size: rows of the embedding.
    """
    stages = range(job.parallel.pipeline_model_parallel_size)
    return max((estimate_stage(job, world_size, vocab_size, stage) for stage in stages), key=lambda one: one.total)


def estimate_stage(job: Job, world_size: int, vocab_size: int, stage: int) -> Estimate:
    """Estimate the memory of a rank of one pipeline stage; arguments as `estimate`'s."""
    model, parallel, training = job.model, job.parallel, job.training
    held = stage_parameters(job, vocab_size, stage)
    state = 12 if training.bf16 else 8
    shards = optimizer_ranks(job, world_size) if parallel.use_distributed_optimizer else (1, 1)
    last = stage == parallel.pipeline_model_parallel_size - 1
    tokens = model.seq_length * training.micro_batch_size // parallel.context_parallel_size
    masks = mask_bytes(job.nsa, model.seq_length) if job.nsa.enabled else 0
    if parallel.cp_comm_type == "all_gather":
        masks //= parallel.context_parallel_size
    return Estimate(
        weights=bytes_of(job) * (held.shared + held.experts),
        gradients=4 * (held.shared + held.experts),
        optimizer=state * (held.shared / shards[0] + held.experts / shards[1]),
        activations=_activations(job, stage_layers(job, stage), _in_flight(job, world_size, stage)),
        # In the computing type, as float32 probabilities, and the gradient of the first.
        logits=last * tokens * vocab_size // parallel.tensor_model_parallel_size * (2 * bytes_of(job) + 4),
        masks=masks,
    )


def parameter_count(job: Job, vocab_size: int) -> int:
    """Parameters of the whole model."""
    whole = job.model_copy(update={"parallel": type(job.parallel)()})
    held = stage_parameters(whole, vocab_size, 0)
    return held.shared + held.experts


def stage_layers(job: Job, stage: int) -> list[int]:
    """The layers of a pipeline rank, counted from 0, in all of its runs."""
    stages, runs = job.parallel.pipeline_model_parallel_size, job.pipeline_runs
    count = job.model.num_layers // stages // runs
    return [count * (stages * run + stage) + i for run in range(runs) for i in range(count)]


def stage_parameters(job: Job, vocab_size: int, stage: int) -> Parameters:
    """Parameters of a rank of one pipeline stage."""
    model, stages = job.model, job.parallel.pipeline_model_parallel_size
    first, last, untied = stage == 0, stage == stages - 1, model.untie_embeddings_and_output_weights
    tables = first + (last and (untied or stages > 1))
    shared = tables * vocab_size * model.hidden_size // job.parallel.tensor_model_parallel_size
    if first and model.position_embedding_type == "learned_absolute":
        shared += (model.max_position_embeddings or model.seq_length) * model.hidden_size
    layers = stage_layers(job, stage)
    norms = _norm(job, model.hidden_size) * (2 * len(layers) + last)
    routers = sum(model.hidden_size * (model.num_experts or 0) for number in layers if model.expert_layers[number])
    shared += norms + sum(_layer_parameters(job, number) for number in layers)
    return Parameters(shared, sum(_expert_parameters(job, number) for number in layers), norms + routers)


def optimizer_ranks(job: Job, world_size: int) -> tuple[int, int]:
    """The ranks that hold the same parameters, and the same experts, on different data."""
    parallel = job.parallel
    tensor, ranks = parallel.tensor_model_parallel_size, world_size // parallel.pipeline_model_parallel_size
    return ranks // tensor, ranks // (parallel.expert_model_parallel_size * expert_tensor_ranks(job))


def expert_tensor_ranks(job: Job) -> int:
    """Ranks that share one expert."""
    return job.parallel.expert_tensor_parallel_size or job.parallel.tensor_model_parallel_size


def mask_bytes(nsa: NSAConfig, length: int) -> int:
    """Bytes of the masks of the compressed branch: a byte for each query with each window and each block."""
    windows = window_count(length, nsa.compress_block_size, nsa.compress_stride)
    return length * (windows + -(-length // nsa.select_block_size))


def pooling_parameters(job: Job, heads: int) -> tuple[int, int]:
    """Parameters of the pooling of the compressed branch: with an axis of `heads` key/value heads, and shared by all."""
    nsa, dims = job.nsa, (job.model.head_width, job.model.value_width)
    per_head = 2 if nsa.compression == "linear" else 0
    if nsa.intra_block_position:
        per_head += sum(dims) if nsa.compression == "mlp" else dims[1]
    shared = sum(dim * dim * (nsa.compress_block_size + 1) for dim in dims) if nsa.compression == "mlp" else 0
    return nsa.compress_block_size * per_head * heads, shared


def is_sparse(job: Job, number: int) -> bool:
    """Whether a layer, counted from 0, has NSA."""
    return job.nsa.enabled and number in job.nsa.nsa_layers(job.model.num_layers)


def _layer_parameters(job: Job, number: int) -> int:
    """Parameters of a layer on a tensor-parallel rank, without its two norms and its routed experts."""
    model, nsa, tensor = job.model, job.nsa, job.parallel.tensor_model_parallel_size
    hidden, heads, groups = model.hidden_size, model.num_attention_heads, model.query_groups
    query, value = model.head_width, model.value_width
    sparse = is_sparse(job, number)
    if not (sparse or model.multi_latent_attention):
        value = query  # Megatron's attention has one width for a head
    bias, qkv_bias = model.add_bias_linear, model.add_bias_linear or model.add_qkv_bias
    replicated, split = hidden * bias, heads * value * hidden
    if model.multi_latent_attention:
        rank = model.q_lora_rank
        replicated += hidden * (model.kv_lora_rank + model.qk_pos_emb_head_dim + (rank or 0))
        replicated += model.qk_layernorm * (_norm(job, model.kv_lora_rank) + (_norm(job, rank) if rank else 0))
        split += (rank or hidden) * heads * query + model.kv_lora_rank * heads * (model.qk_head_dim + value)
    else:
        branches = 3 if sparse and nsa.separate_kv else 1
        width = heads * query + branches * groups * (query + value)
        split += (hidden + qkv_bias) * width
        replicated += model.qk_layernorm * 2 * _norm(job, query)
        if sparse and nsa.gate == "hidden":
            split += (hidden + 1) * heads * 3
    if sparse:
        per_head, shared = pooling_parameters(job, job.held_heads.kv_head_num)
        replicated += per_head + shared
        if nsa.gate == "query":
            split += heads * 3 * (query + 1)
    if model.expert_layers[number]:
        replicated += (hidden + bias) * (model.num_experts or 0)
    width = feed_forward_width(job, number)
    replicated += hidden * bias * (width > 0)
    split += (matrices(job) * hidden + bias * (matrices(job) - 1)) * width
    return replicated + split // tensor


def _expert_parameters(job: Job, number: int) -> int:
    """Parameters of the routed experts of a layer on a rank."""
    model = job.model
    if not model.expert_layers[number]:
        return 0
    assert model.num_experts is not None
    split = (matrices(job) * model.hidden_size + model.add_bias_linear * (matrices(job) - 1)) * expert_width(job)
    here = split // expert_tensor_ranks(job) + model.add_bias_linear * model.hidden_size
    return model.num_experts // job.parallel.expert_model_parallel_size * here


def _norm(job: Job, width: int) -> int:
    return width * (2 if job.model.normalization == "LayerNorm" else 1)


def matrices(job: Job) -> int:
    """Matrices of a feed-forward network: a gate, values and what leads back, or the last two."""
    return 3 if job.model.swiglu else 2


def feed_forward_width(job: Job, number: int) -> int:
    """Width of what every token of a layer goes through: the network of a layer without experts, or the shared experts."""
    model = job.model
    return (model.moe_shared_expert_intermediate_size or 0) if model.expert_layers[number] else model.ffn_width


def expert_width(job: Job) -> int:
    """Width of one routed expert."""
    return job.model.moe_ffn_hidden_size or job.model.ffn_width


def _in_flight(job: Job, world_size: int, stage: int) -> float:
    """Micro-batches whose activations a stage keeps at once, of all of its layers."""
    stages, runs = job.parallel.pipeline_model_parallel_size, job.pipeline_runs
    most: float = stages - stage
    if runs > 1:  # interleaved: so many passes of a run go forward before the first goes backward
        most = ((stages - stage - 1) * 2 + (runs - 1) * stages + 1) / runs
    return min(most, job.micro_batches(world_size))


def _activations(job: Job, layers: list[int], in_flight: float) -> float:
    """Bytes that a stage keeps for the micro-batches in flight, and what its largest layer needs while it runs."""
    parallel, model = job.parallel, job.model
    whole = [_layer_bytes(job, number) for number in layers]
    largest = max(whole)
    running = max(largest, _gathered_bytes(job))  # its gradients in the backward pass; other ranks' heads in the forward pass
    if parallel.recompute_granularity != "full":
        return sum(whole) * in_flight + running
    assert parallel.recompute_num_layers is not None
    entry = own_tokens(job) * model.hidden_size * bytes_of(job)
    again = parallel.recompute_num_layers
    if parallel.recompute_method == "uniform":
        # What enters each run of layers is kept; one run at a time is computed again, whole.
        return -(-len(layers) // again) * entry * in_flight + again * largest + running
    of_run = len(layers) // job.pipeline_runs
    kept = [size for i, size in enumerate(whole) if i % of_run >= again]
    return ((len(layers) - len(kept)) * entry + sum(kept)) * in_flight + largest + running


def _layer_bytes(job: Job, number: int) -> float:
    """Bytes that a layer keeps for its backward pass."""
    model, own, width = job.model, own_tokens(job), bytes_of(job)
    # RMSNorm keeps its input and the normalised input in float32, LayerNorm its input; both their output.
    norm = 8 + width if model.normalization == "RMSNorm" else 2 * width
    kept = own * 2 * model.hidden_size * norm + _attention_bytes(job, number)
    # Gate and value, the gate's activation, the value with its offset, and the product.
    parts = 5 if model.swiglu else 2
    if model.expert_layers[number]:
        # There the product once more, with the expert's probability.
        kept += own * model.moe_router_topk * (2 * model.hidden_size + (parts + 1) * expert_width(job)) * width
    tokens = model.seq_length * job.training.micro_batch_size // job.parallel.context_parallel_size
    return kept + tokens * parts * feed_forward_width(job, number) // job.parallel.tensor_model_parallel_size * width


def _attention_bytes(job: Job, number: int) -> float:
    """Bytes that the attention of a layer keeps, its projections' inputs left out."""
    model, nsa, context = job.model, job.nsa, job.parallel.context_parallel_size
    heads, groups = job.run_heads.head_num, job.run_heads.kv_head_num
    sparse = is_sparse(job, number)
    # The chip's operators take these dims; what is smaller is padded.
    query, value = SELECT_DIMS if sparse else (model.head_width, model.value_width)
    branches = 3 if sparse else 1
    copies = 3 if sparse and nsa.separate_kv else 1
    inside, pooled = 0.0, 0.0
    if job.parallel.recompute_granularity != "selective":
        inside = branches * heads * (value * bytes_of(job) + _STATISTICS) + sparse * 4 * groups * nsa.select_block_count
        pooled = sparse * groups * (query + value) / nsa.compress_stride
    mixed = heads * value + (3 * heads if sparse else 0)
    tokens = model.seq_length * job.training.micro_batch_size
    queries = tokens if job.parallel.cp_comm_type == "a2a" else tokens // context
    of_a_query = (heads * query + mixed) * bytes_of(job) + inside
    of_a_key = (copies * groups * (query + value) + pooled) * bytes_of(job)
    return queries * of_a_query + tokens * of_a_key + model.seq_length // context * _rotary_bytes(job)


def _gathered_bytes(job: Job) -> float:
    """Bytes that a layer needs for the heads of ranks that share its key/value groups, where queries are brought together.

    The queries as they come and in order; then these, with attention and statistics of all heads.
    """
    if not gathers_queries(job):
        return 0.0
    model, heads = job.model, job.run_heads.head_num * choosing_ranks(job)
    query, result = model.head_width * bytes_of(job), model.value_width * bytes_of(job) + _STATISTICS
    return model.seq_length * job.training.micro_batch_size * heads * (query + max(query, result))


def _rotary_bytes(job: Job) -> float:
    """Cosine and sine of a position, for query and for key."""
    model = job.model
    if model.position_embedding_type != "rope":
        return 0.0
    dims = model.qk_pos_emb_head_dim if model.multi_latent_attention else model.head_width * model.rotary_percent
    return 4 * dims * bytes_of(job)


def choosing_ranks(job: Job) -> int:
    """Ranks that run query heads of one key/value group, and choose its blocks together."""
    over_context = len(job.run_heads.sharers) if job.parallel.cp_comm_type == "a2a" else 1
    return len(job.held_heads.sharers) * over_context


def gathers_queries(job: Job) -> bool:
    """Whether ranks that share a key/value group bring its query heads together to choose blocks, or else sum scores.

    They do on an NPU, where the operator chooses (`mindspeed_nsa.shared_groups`), and so does a job that is planned, unless its
    backend is another.
    """
    nsa, model = job.nsa, job.model
    on_npu = nsa.backend in ("auto", "ascend") and job.parallel.cp_comm_type != "all_gather"
    chosen_inside = nsa.importance == "ascend" and nsa.select_own_block is not False
    group = model.num_attention_heads // model.query_groups
    return choosing_ranks(job) > 1 and on_npu and chosen_inside and takes_group(group)


def rank_tokens(job: Job) -> float:
    """Tokens of a micro-batch that a context-parallel rank has."""
    return job.model.seq_length * job.training.micro_batch_size / job.parallel.context_parallel_size


def own_tokens(job: Job) -> float:
    """Tokens of a micro-batch that a rank holds between the layers."""
    parallel = job.parallel
    return rank_tokens(job) / parallel.tensor_model_parallel_size if parallel.sequence_parallel else rank_tokens(job)


def bytes_of(job: Job) -> int:
    """Bytes of a parameter and of an activation."""
    return 2 if job.training.bf16 else 4
