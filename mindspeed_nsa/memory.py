"""What a job takes of an NPU's memory, estimated before it runs. docs/launch.md explains the formula.

The estimate follows from shapes and from what Megatron, MindSpeed and the operators keep; nothing of it was measured on a chip.
What it cannot know, `RESERVE`, is a guess: the runtime, communication buffers, workspaces of operators, gaps.

t: tokens of a micro-batch, h: hidden_size, n: query heads of a rank, g: key/value heads of a rank.
"""

from typing import NamedTuple

from .config import NSAConfig
from .heads import split_heads
from .ops.contract import SELECT_DIMS
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


def estimate(job: Job, world_size: int, vocab_size: int) -> Estimate:
    """Estimate the memory of the fullest rank.

    Args:
        job: the job; `job.check_layout(world_size)` holds.
        world_size: its ranks.
        vocab_size: of the tokenizer.
    """
    stages = range(job.parallel.pipeline_model_parallel_size)
    return max((_stage(job, world_size, vocab_size, stage) for stage in stages), key=lambda one: one.total)


def parameter_count(job: Job, vocab_size: int) -> int:
    """Parameters of the whole model, norms and the pooling of the compressed branch left out."""
    layers = [
        _dense_parameters(job, 1, number) + _expert_parameters(job, 1, 1, number) for number in range(job.model.num_layers)
    ]
    return sum(layers) + vocab_size * job.model.hidden_size * (1 + job.model.untie_embeddings_and_output_weights)


def mask_bytes(nsa: NSAConfig, length: int) -> int:
    """Bytes of the masks of the compressed branch: a byte for each query with each window and each block."""
    windows = window_count(length, nsa.compress_block_size, nsa.compress_stride)
    return length * (windows + -(-length // nsa.select_block_size))


def _stage(job: Job, world_size: int, vocab_size: int, stage: int) -> Estimate:
    model, parallel, training = job.model, job.parallel, job.training
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    expert_tensor = parallel.expert_tensor_parallel_size or tensor
    count = model.num_layers // pipeline
    layers = range(stage * count, (stage + 1) * count)
    dense = sum(_dense_parameters(job, tensor, number) for number in layers)
    experts = sum(_expert_parameters(job, parallel.expert_model_parallel_size, expert_tensor, number) for number in layers)
    tables = [stage == 0, stage == pipeline - 1]
    tied = pipeline == 1 and not model.untie_embeddings_and_output_weights
    dense += vocab_size * model.hidden_size // tensor * (1 if tied else sum(tables))
    width = 2 if training.bf16 else 4
    state = 12 if training.bf16 else 8
    shards = (1, 1)
    if parallel.use_distributed_optimizer:
        ranks = world_size // pipeline
        shards = (ranks // tensor, ranks // (parallel.expert_model_parallel_size * expert_tensor))
    tokens = model.seq_length * training.micro_batch_size
    return Estimate(
        weights=width * (dense + experts),
        gradients=4 * (dense + experts),
        optimizer=state * (dense / shards[0] + experts / shards[1]),
        activations=_activations(job, list(layers), in_flight=pipeline - stage),
        # In the computing type, as float32 probabilities, and the gradient of the first.
        logits=tables[1] * tokens * vocab_size // tensor * (2 * width + 4),
        masks=mask_bytes(job.nsa, model.seq_length) if job.nsa.enabled else 0,
    )


def _dense_parameters(job: Job, tensor: int, number: int) -> int:
    """Parameters of a layer on a tensor-parallel rank, without routed experts."""
    model, nsa = job.model, job.nsa
    hidden, heads, groups = model.hidden_size, model.num_attention_heads, model.query_groups
    query, value = model.head_width, model.value_width
    replicated, split = 0, heads * value * hidden
    if model.multi_latent_attention:
        rank = model.q_lora_rank
        replicated += hidden * (model.kv_lora_rank + model.qk_pos_emb_head_dim + (rank or 0))
        split += (rank or hidden) * heads * query + model.kv_lora_rank * heads * (model.qk_head_dim + value)
    else:
        split += hidden * (heads * query + groups * (query + value))
        if _is_sparse(job, number):
            split += hidden * groups * 2 * (query + value) * nsa.separate_kv
            split += hidden * heads * 3 * (nsa.gate == "hidden")
    matrices = 3 if model.swiglu else 2
    if model.expert_layers[number]:
        replicated += hidden * (model.num_experts or 0)
        split += matrices * hidden * (model.moe_shared_expert_intermediate_size or 0)
    else:
        split += matrices * hidden * model.ffn_width
    return replicated + split // tensor


def _expert_parameters(job: Job, expert_parallel: int, expert_tensor: int, number: int) -> int:
    """Parameters of the routed experts of a layer on a rank."""
    model = job.model
    if not model.expert_layers[number]:
        return 0
    assert model.num_experts is not None
    matrices = 3 if model.swiglu else 2
    return model.num_experts // expert_parallel * matrices * model.hidden_size * _expert_width(job) // expert_tensor


def _expert_width(job: Job) -> int:
    return job.model.moe_ffn_hidden_size or job.model.ffn_width


def _is_sparse(job: Job, number: int) -> bool:
    return job.nsa.enabled and number in job.nsa.nsa_layers(job.model.num_layers)


def _activations(job: Job, layers: list[int], in_flight: int) -> float:
    """Bytes that a stage keeps for the micro-batches in flight, and the gradients of its largest layer."""
    parallel, model = job.parallel, job.model
    whole = [_layer_bytes(job, number) for number in layers]
    largest = max(whole)
    if parallel.recompute_granularity != "full":
        return sum(whole) * in_flight + largest
    assert parallel.recompute_num_layers is not None
    entry = _own_tokens(job) * model.hidden_size * _width(job)
    again = parallel.recompute_num_layers
    if parallel.recompute_method == "uniform":
        # What enters each run of layers is kept; one run at a time is computed again, whole.
        return -(-len(layers) // again) * entry * in_flight + again * largest + largest
    kept = sorted(whole[again:], reverse=True)
    return (min(again, len(layers)) * entry + sum(kept)) * in_flight + 2 * largest


def _layer_bytes(job: Job, number: int) -> float:
    """Bytes that a layer keeps for its backward pass."""
    parallel, model = job.parallel, job.model
    own, tokens = _own_tokens(job), model.seq_length * job.training.micro_batch_size
    # What enters the two norms, and what leaves them.
    kept = own * 4 * model.hidden_size * _width(job) + _attention_bytes(job, number)
    # A gate and a value, and their product.
    parts = 3 if model.swiglu else 2
    if model.expert_layers[number]:
        sent = own * model.moe_router_topk
        kept += sent * (2 * model.hidden_size + parts * _expert_width(job)) * _width(job)
        feed_forward = model.moe_shared_expert_intermediate_size or 0
    else:
        feed_forward = model.ffn_width
    return kept + tokens * parts * feed_forward // parallel.tensor_model_parallel_size * _width(job)


def _attention_bytes(job: Job, number: int) -> float:
    """Bytes that the attention of a layer keeps, its projections' inputs left out."""
    model, nsa, tensor = job.model, job.nsa, job.parallel.tensor_model_parallel_size
    split = split_heads(model.num_attention_heads, model.query_groups, tensor, 0)
    heads, groups = split.head_num, split.kv_head_num
    sparse = _is_sparse(job, number)
    # The chip's operators take these dims; what is smaller is padded.
    query, value = SELECT_DIMS if sparse else (model.head_width, model.value_width)
    branches = 3 if sparse else 1
    copies = 3 if sparse and nsa.separate_kv else 1
    inputs: float = heads * query + copies * groups * (query + value)
    if sparse:
        inputs += groups * (query + value) / nsa.compress_stride
    inside = 0.0
    if job.parallel.recompute_granularity != "selective":
        inside = branches * heads * (value * _width(job) + _STATISTICS) + sparse * 4 * groups * nsa.select_block_count
    mixed = heads * value + (3 * heads if sparse else 0)
    return model.seq_length * job.training.micro_batch_size * ((inputs + mixed) * _width(job) + inside)


def _own_tokens(job: Job) -> float:
    """Tokens that a rank holds between the layers."""
    parallel = job.parallel
    tokens = job.model.seq_length * job.training.micro_batch_size
    return tokens / parallel.tensor_model_parallel_size if parallel.sequence_parallel else tokens


def _width(job: Job) -> int:
    return 2 if job.training.bf16 else 4
