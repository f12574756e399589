"""The least time that a step can take by published peaks, and the operations that it makes."""

from importlib import resources
from typing import NamedTuple

import yaml

from mindspeed_nsa.flops import Flops, dense_flops, layer_flops
from mindspeed_nsa.memory import (
    Estimate,
    choosing_ranks,
    expert_width,
    gathers_queries,
    is_sparse,
    matrices,
    parameter_count,
)
from mindspeed_nsa.plan.wire import Message
from mindspeed_nsa.pretrain.job import Job


class Hardware(NamedTuple):
    """Published figures of a die and its links; `hardware.yaml` has their sources."""

    dies_per_node: int
    hbm_bytes: float
    hbm_bytes_per_second: float
    bf16_flops: float
    hccs_bytes_per_second: float
    roce_bytes_per_second: float
    superpod_nodes: int


class TokenFlops(NamedTuple):
    """Of a token in one forward pass, over the whole model; a training step takes three times as much.

    Attributes:
        nsa: of the layers with NSA.
        dense: of the attention of the layers without.
        matrices: all other products with parameters: two for each parameter that a token meets.
        all_dense: what attention would be were every layer dense.
        repeated: what ranks that share key/value groups compute of one another's attention to compressed tokens, in the forward
            pass alone.
    """

    nsa: Flops
    dense: float
    matrices: float
    all_dense: float
    repeated: float

    @property
    def total(self) -> float:
        """All of the model."""
        return sum(self.nsa) + self.dense + self.matrices


class Bound(NamedTuple):
    """Seconds of a step at published peaks, each as if nothing else took any.

    Attributes:
        compute: of the multiplications of a rank, recomputed ones and the pipeline's bubble included; None: of float32, for
            which no peak is published.
        memory: of reading weights, gradients and optimizer state, and of writing and reading activations, once each.
        hccs: of what a rank sends inside a superpod.
        roce: of what it sends between superpods.
    """

    compute: float | None
    memory: float
    hccs: float
    roce: float

    @property
    def least(self) -> float:
        """What a step takes at least: the largest that is known, were all hidden behind one another."""
        return max(part for part in self if part is not None)


def hardware() -> Hardware:
    """The published figures."""
    text = resources.files("mindspeed_nsa.plan").joinpath("hardware.yaml").read_text(encoding="utf-8")
    return Hardware(**yaml.safe_load(text))


def token_flops(job: Job, vocab_size: int) -> TokenFlops:
    """Count the operations of a token.

    Args:
        job: the job.
        vocab_size: rows of the embedding.
    """
    model, length = job.model, job.model.seq_length
    heads, groups, query, value = model.num_attention_heads, model.query_groups, model.head_width, model.value_width
    sparse = sum(is_sparse(job, number) for number in range(model.num_layers))
    one = layer_flops(job.nsa, length, heads, groups, query, value, model.hidden_size)
    nsa = Flops(*(part * sparse / length for part in one))  # type: ignore[arg-type]
    dense = dense_flops(length, heads, query, value) / length
    met = parameter_count(job, vocab_size) - _not_met(job) - vocab_size * model.hidden_size
    if not model.untie_embeddings_and_output_weights:
        met += vocab_size * model.hidden_size
    products = 2 * met - nsa.projections
    repeated = nsa.compress * (choosing_ranks(job) - 1) if gathers_queries(job) else 0.0
    return TokenFlops(nsa, dense * (model.num_layers - sparse), products, dense * model.num_layers, repeated)


def _not_met(job: Job) -> int:
    """Parameters of the routed experts that a token is not sent to."""
    model = job.model
    left = (model.num_experts or 0) - model.moe_router_topk if model.num_experts else 0
    return sum(model.expert_layers) * left * matrices(job) * model.hidden_size * expert_width(job)


def bound(job: Job, world_size: int, flops: TokenFlops, memory: Estimate, messages: list[Message], chip: Hardware) -> Bound:
    """Bound the time of a step from below, for a rank with this memory and these messages."""
    parallel, batches = job.parallel, job.micro_batches(world_size)
    again = parallel.recompute_granularity == "full"
    tokens = job.training.global_batch_size * job.model.seq_length
    stages = parallel.pipeline_model_parallel_size
    bubble = (stages - 1) / job.pipeline_runs / batches
    work = (3 + again) * flops.total + (1 + again) * flops.repeated
    compute = work * tokens / world_size / chip.bf16_flops * (1 + bubble) if job.training.bf16 else None
    # Weights once forward and once backward, gradients added to in each micro-batch; all of it around the optimizer.
    moved = batches * ((2 + again) * memory.weights + 2 * memory.gradients + 2 * memory.activations)
    moved += memory.weights + memory.gradients + 2 * memory.optimizer
    near = chip.superpod_nodes * chip.dies_per_node
    sent = [0.0, 0.0]
    for message in messages:
        sent[_span(job, world_size, message) > near] += message.sent
    return Bound(
        compute=compute,
        memory=moved / chip.hbm_bytes_per_second,
        hccs=sent[0] / chip.hccs_bytes_per_second,
        roce=sent[1] / chip.roce_bytes_per_second,
    )


def _span(job: Job, world_size: int, message: Message) -> int:
    """Ranks from the first to the last of a group, in Megatron's order: tensor, context, expert and data, pipeline."""
    if message.dimension == "pipeline":
        return world_size
    if message.dimension == "data":
        return world_size // job.parallel.pipeline_model_parallel_size
    return message.ranks * (job.parallel.tensor_model_parallel_size if message.dimension == "context" else 1)
