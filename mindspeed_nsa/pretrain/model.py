"""A job's GPT: Megatron-core's own, with the modules that it lacks where there is no Transformer Engine."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from mindspeed_nsa.pretrain.job import Job
from mindspeed_nsa.pretrain.tokenizer import padded_vocabulary


def build_models(job: Job, vocab_size: int) -> list[GPTModel]:
    """Build this rank's parts of the model, one a run of layers, with weights that depend on the seed and not on the layout.

    Args:
        job: the model, its attention and its layout.
        vocab_size: of the tokenizer.
    """
    config, models = transformer_config(job), []
    for run in range(job.pipeline_runs):
        if job.pipeline_runs > 1:
            parallel_state.set_virtual_pipeline_model_parallel_rank(run)
        models.append(_build_run(job, config, vocab_size, run))
    return models


def _build_run(job: Job, config: TransformerConfig, vocab_size: int, run: int) -> GPTModel:
    rank, ranks = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    # Megatron-core before 0.13 asks parallel_state which run it builds.
    stage = {"vp_stage": run} if job.pipeline_runs > 1 and "vp_stage" in inspect.signature(GPTModel).parameters else {}
    torch.manual_seed(job.training.seed)
    return GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=_layer_specs(job, run), layer_norm=Norm),
        vocab_size=padded_vocabulary(vocab_size, job.parallel.tensor_model_parallel_size),
        max_sequence_length=job.model.max_position_embeddings or job.model.seq_length,
        pre_process=rank == 0 and run == 0,
        post_process=rank == ranks - 1 and run == job.pipeline_runs - 1,
        share_embeddings_and_output_weights=not job.model.untie_embeddings_and_output_weights,
        position_embedding_type=job.model.position_embedding_type,
        rotary_percent=job.model.rotary_percent,
        rotary_base=job.model.rotary_base,
        **stage,
    )


def transformer_config(job: Job) -> TransformerConfig:
    """Megatron's configuration of a job."""
    model, parallel = job.model, job.parallel
    dtype = torch.bfloat16 if job.training.bf16 else torch.float32
    settings: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_width,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_width,
        "normalization": model.normalization,
        "layernorm_epsilon": model.norm_epsilon,
        "gated_linear_unit": model.swiglu,
        "activation_func": F.silu if model.swiglu else F.gelu,
        "add_bias_linear": model.add_bias_linear,
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "init_method_std": model.init_method_std,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": job.pipeline_runs if job.pipeline_runs > 1 else None,
        "context_parallel_size": parallel.context_parallel_size,
        "cp_comm_type": parallel.cp_comm_type,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "recompute_granularity": parallel.recompute_granularity,
        "recompute_method": parallel.recompute_method,
        "recompute_num_layers": parallel.recompute_num_layers,
        "bf16": job.training.bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        # Each rank draws the whole weight from one seed and keeps its part.
        "use_cpu_initialization": True,
    }
    if model.num_experts is not None:
        settings |= {
            "num_moe_experts": model.num_experts,
            "moe_layer_freq": [int(has_experts) for has_experts in model.expert_layers],
            "moe_ffn_hidden_size": model.moe_ffn_hidden_size or model.ffn_width,
            "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
            "moe_router_topk": model.moe_router_topk,
            # Of Megatron's dispatchers the one that needs no stream of a device.
            "moe_token_dispatcher_type": "allgather",
        }
    if not model.multi_latent_attention:
        return TransformerConfig(**settings)
    return MLATransformerConfig(
        **settings,
        multi_latent_attention=True,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_head_dim=model.qk_head_dim,
        qk_pos_emb_head_dim=model.qk_pos_emb_head_dim,
        v_head_dim=model.value_width,
        rope_type="rope",
        # YaRN's factor scales the softmax even where positions are plain RoPE; 1 leaves 1 / sqrt(width of a head).
        rotary_scaling_factor=1.0,
        rotary_base=model.rotary_base,
        rotary_percent=model.rotary_percent,
    )


def _layer_specs(job: Job, run: int) -> list[ModuleSpec]:
    """Specs of one of this rank's runs of layers."""
    ranks = job.parallel.pipeline_model_parallel_size
    count = job.model.num_layers // ranks // job.pipeline_runs
    first = count * (ranks * run + parallel_state.get_pipeline_model_parallel_rank())
    specs = [_dense_layer_spec(job, number) for number in range(first, first + count)]
    if not job.nsa.enabled:
        return specs
    from mindspeed_nsa.patches.megatron_core import with_nsa

    return with_nsa(specs, job.nsa, num_layers=job.model.num_layers, first_layer=first, v_head_dim=job.model.v_head_dim)


def _dense_layer_spec(job: Job, number: int) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(
        num_experts=job.model.num_experts if job.model.expert_layers[number] else None,
        qk_layernorm=job.model.qk_layernorm,
        multi_latent_attention=job.model.multi_latent_attention,
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = Norm
    attention.core_attention = CausalAttention
    for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
        if getattr(attention, name, IdentityOp) is not IdentityOp:
            setattr(attention, name, Norm)
    if job.model.multi_latent_attention:
        layer.self_attention.module = MLASelfAttention
    if job.model.expert_layers[number]:
        layer.mlp.submodules.experts.module = SeededExperts
        networks = [layer.mlp.submodules.experts.submodules, layer.mlp.submodules.shared_experts.submodules]
    else:
        networks = [layer.mlp.submodules]
    for network in networks if job.model.swiglu else []:
        network.linear_fc1 = GatedColumnParallelLinear
    spec.module = SeededTransformerLayer
    spec.params = {"seed": job.training.seed + 1 + number}
    return spec


class SeededTransformerLayer(TransformerLayer):
    """A layer with weights from a seed of its own: the same whichever layers are built before it on this rank."""

    def __init__(self, config: TransformerConfig, *args: Any, seed: int, **kwargs: Any) -> None:
        torch.manual_seed(seed)
        super().__init__(config, *args, **kwargs)


class SeededExperts(SequentialMLP):
    """Experts with weights from a seed for each: the same whichever rank holds them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        seed = int(torch.randint(2**31, ()))
        super().__init__(*args, **kwargs)
        first = parallel_state.get_expert_model_parallel_rank() * self.num_local_experts
        for number, expert in enumerate(self.local_experts, start=first):
            torch.manual_seed(seed + number)
            _draw(expert.linear_fc1.weight, self.config.init_method)
            _draw(expert.linear_fc2.weight, self.config.output_layer_init_method)
        torch.manual_seed(seed)


def _draw(weight: Tensor, init_method: Callable[[Tensor], Any]) -> None:
    """Draw the whole weight of an expert, and keep this rank's part."""
    ranks, rank = (
        parallel_state.get_expert_tensor_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )
    dim, stride = weight.partition_dim, weight.partition_stride  # type: ignore[attr-defined]
    shape = list(weight.shape)
    shape[dim] *= ranks
    whole = torch.empty(shape)
    init_method(whole)
    with torch.no_grad():
        weight.copy_(torch.cat(whole.chunk(ranks * stride, dim)[rank::ranks], dim))


class Norm:
    """RMSNorm or LayerNorm that Megatron's sequence parallelism can use: it sums their gradients over the ranks."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """The torch module itself, of `hidden_size`."""
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010  torch's class has none
        return norm


class GatedColumnParallelLinear(ColumnParallelLinear):
    """The first layer of a gated MLP: its rows are gates, then values, and each rank keeps a part of both."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "stride": 2})


class MLASelfAttention(multi_latent_attention.MLASelfAttention):
    """Multi-Latent Attention whose rotary key, shared by all heads, gets its gradient from the heads of every rank.

    Megatron's own keeps the gradient of a rank's own heads.
    """

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Megatron's query, key, value and what it hands on beside them."""
        query, key, value, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        own, shared = key.split([self.config.qk_head_dim, self.config.qk_pos_emb_head_dim], dim=-1)
        if shared.requires_grad:
            shared.register_hook(_sum_over_tensor_parallel)
        return query, torch.cat([own, shared], dim=-1), value, *rest


def _sum_over_tensor_parallel(gradient: Tensor) -> Tensor:
    total = gradient.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return total


class CausalAttention(MegatronModule):
    """Dense causal attention that never builds a mask of [s, s], where Megatron's own does.

    Args:
        config: Megatron's configuration.
        softmax_scale: multiplies the scores, 1 / sqrt(width of a head) by default.
        unused: what Megatron hands to every core.
    """

    def __init__(self, config: TransformerConfig, *unused: Any, softmax_scale: float | None = None, **kwargs: Any):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend to what came before, in each sequence or in each packed sample.

        Args:
            query: `[s, b, heads, d]`, packed `[t, heads, d]`.
            key: the same with as many heads or fewer, each for a run of query heads.
            value: as key, of any width.
            attention_mask: unused, the attention is causal.
            attn_mask_type: unused.
            attention_bias: unused.
            packed_seq_params: the samples' bounds in `cu_seqlens_q`.

        Returns:
            `[s, b, heads * width of value]`, packed `[t, heads * width of value]`.
        """
        if packed_seq_params is None:
            return self._attend(query, key, value)
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        samples = zip(*(tensor.split(lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._attend(*sample) for sample in samples]).squeeze(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads, width = query.shape[2], value.shape[-1]
        key, value = (tensor.repeat_interleave(heads // tensor.shape[2], dim=2) for tensor in (key, value))
        # The kernel that builds no score matrix takes one width for all three.
        value = F.pad(value, (0, query.shape[-1] - width))
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.softmax_scale)
        return out[..., :width].permute(2, 0, 1, 3).flatten(2)
