"""Native Sparse Attention in Megatron-core's transformer layers, by ModuleSpec: nothing of Megatron is replaced at run time.

`NSASelfAttention` stands in for SelfAttention (GQA): its extra projections feed the three branches and the gates. `NSACore`
alone stands in for the core attention, where the host hands it query, key and value only (MLA).

s: sequence (with context parallelism this rank's pieces of it), b: batch, n: query heads of this rank, g: key/value groups of
this rank, d: head dim, T = s * b.
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from mindspeed_nsa.attention import BRANCHES, NativeSparseAttention
from mindspeed_nsa.config import NSAConfig
from mindspeed_nsa.context_parallel import KINDS, Exchange, gather_sequence, own_pieces
from mindspeed_nsa.heads import split_heads
from mindspeed_nsa.samples import Samples

# `linear_qkv` keeps a dense layer's shape and feeds this branch, which equals dense attention on short samples.
_DENSE_BRANCH = BRANCHES.index("select")
# Parameters with an axis of key/value heads; the others are shared by all heads.
_HEAD_AXIS = {"weight": 1, "position": 1, "gate_weight": 0, "gate_bias": 0}
# Where the norm of a layer's input is in sharded checkpoints of layers that fuse it with `linear_qkv`.
_NORM_INSIDE = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def with_nsa(
    layer_specs: list[ModuleSpec],
    nsa: NSAConfig,
    *,
    num_layers: int | None = None,
    first_layer: int = 0,
    v_head_dim: int | None = None,
) -> list[ModuleSpec]:
    """Layer specs whose attention is NSA in the layers that `nsa.layers` names, and as it was in the others.

    Args:
        layer_specs: specs of TransformerLayer with a SelfAttention (GQA) or MLASelfAttention.
        nsa: settings.
        num_layers: layers of the whole model; default: as many as given.
        first_layer: number of the first given layer in the whole model, counted from 0.
        v_head_dim: dim of the values of a GQA layer; default: `kv_channels`. MLA brings its own.

    Raises:
        ValueError: a layer's attention is neither, or hands its core too little for these settings.
    """
    chosen = set(nsa.nsa_layers(num_layers or len(layer_specs)))
    return [
        _nsa_layer(spec, nsa, v_head_dim) if number in chosen else spec
        for number, spec in enumerate(layer_specs, start=first_layer)
    ]


def _nsa_layer(layer: ModuleSpec, nsa: NSAConfig, v_head_dim: int | None) -> ModuleSpec:
    attention = layer.submodules.self_attention
    if attention.module is SelfAttention:
        layer = _with_own_norm(layer)
        attention = layer.submodules.self_attention
        params = attention.params | {"nsa": nsa, "v_head_dim": v_head_dim}
        attention = dataclasses.replace(attention, module=NSASelfAttention, params=params)
    elif issubclass(attention.module, MLASelfAttention):
        check_latent(nsa)
        core = ModuleSpec(NSACore, params={"nsa": nsa})
        submodules = dataclasses.replace(attention.submodules, core_attention=core)
        attention = dataclasses.replace(attention, submodules=submodules)
    else:
        raise ValueError(f"attention is {attention.module.__name__}; NSA replaces SelfAttention or MLASelfAttention")
    return dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, self_attention=attention))


def check_latent(nsa: NSAConfig) -> None:
    """Check that settings need no more than multi-latent attention hands its core.

    Raises:
        ValueError: they do.
    """
    if nsa.gate != "query" or nsa.separate_kv:
        raise ValueError(
            f"nsa.gate is {nsa.gate} and nsa.separate_kv {nsa.separate_kv}: multi-latent attention hands its core "
            "query, key and value only; allowed: `gate: query` and `separate_kv: false`"
        )


def _with_own_norm(layer: ModuleSpec) -> ModuleSpec:
    """The layer with the norm of its input before its attention, where Transformer Engine's spec has it inside `linear_qkv`.

    The projections of an NSA layer then read the same normalised states, as they do in Megatron's own spec. In sharded
    checkpoints the norm keeps the name that it has inside.
    """
    fused = getattr(gpt_layer_specs, "TELayerNormColumnParallelLinear", None)
    attention = layer.submodules.self_attention
    if fused is None or attention.submodules.linear_qkv is not fused:
        return layer
    projections = dataclasses.replace(attention.submodules, linear_qkv=gpt_layer_specs.TEColumnParallelLinear)
    submodules = dataclasses.replace(
        layer.submodules,
        input_layernorm=gpt_layer_specs.TENorm,
        self_attention=dataclasses.replace(attention, submodules=projections),
        sharded_state_dict_keys_map=layer.submodules.sharded_state_dict_keys_map | _NORM_INSIDE,
    )
    return dataclasses.replace(layer, submodules=submodules)


class NSASelfAttention(SelfAttention):
    """Self-attention with a key and value for each branch of NSA, and gates from the hidden states.

    Beside SelfAttention's it has two projections, both column-parallel by head and of the class of `linear_qkv`:
    `linear_branch_kv`, to the keys and values of the compress and window branches (with `nsa.separate_kv`), and `linear_gate`,
    to the gate logits (with `nsa.gate: hidden`).

    Args:
        config: Megatron's.
        submodules: as SelfAttention's; its core attention is replaced.
        layer_number: counted from 1.
        nsa: settings.
        v_head_dim: dim of the values; default: `config.kv_channels`.
        rest: as SelfAttention's.

    Raises:
        ValueError: the layer is configured for something that NSA does not do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *rest: Any,
        nsa: NSAConfig,
        v_head_dim: int | None = None,
        **named: Any,
    ) -> None:
        _check_host(config)
        self.qk_dim, self.v_dim = config.kv_channels, v_head_dim or config.kv_channels
        tp_size, tp_rank = _tensor_parallel()
        split = split_heads(config.num_attention_heads, config.num_query_groups, tp_size, tp_rank)
        core_params = {"nsa": nsa, "num_query_groups": config.num_query_groups, "v_channels": self.v_dim}
        submodules = dataclasses.replace(submodules, core_attention=ModuleSpec(NSACore, params=core_params))
        super().__init__(config, submodules, layer_number, *rest, **named)
        self.split = split
        heads, groups = config.num_attention_heads, config.num_query_groups
        if self.v_dim != self.qk_dim:
            self.linear_qkv = self._column_parallel(submodules, heads * self.qk_dim + groups * (self.qk_dim + self.v_dim))
            self.linear_proj = self._row_parallel(submodules, heads * self.v_dim)
        self.linear_branch_kv = self.linear_gate = None
        if nsa.separate_kv:
            self.linear_branch_kv = self._column_parallel(submodules, groups * 2 * (self.qk_dim + self.v_dim))
        if nsa.gate == "hidden":
            self.linear_gate = self._column_parallel(submodules, heads * len(BRANCHES), bias=True)

    def _column_parallel(self, submodules: SelfAttentionSubmodules, width: int, bias: bool = False) -> nn.Module:
        tp_size = _tensor_parallel()[0]
        if width % tp_size:
            raise ValueError(f"a projection to {width} does not divide over tensor_model_parallel_size {tp_size}")
        return build_module(
            submodules.linear_qkv,
            self.config.hidden_size,
            width,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=bias or self.config.add_bias_linear or self.config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
        )

    def _row_parallel(self, submodules: SelfAttentionSubmodules, width: int) -> nn.Module:
        return build_module(
            submodules.linear_proj,
            width,
            self.config.hidden_size,
            config=self.config,
            init_method=self.config.output_layer_init_method,
            bias=self.config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *rest: Any,
        attention_bias: Tensor | None = None,
        **named: Any,
    ) -> tuple[Tensor, Tensor]:
        """As SelfAttention's. The gate logits travel as `attention_bias`, the one tensor that reaches the core untouched."""
        if attention_bias is not None or named.get("inference_context") is not None:
            raise ValueError("NSA takes no attention_bias and no inference_context: it trains only")
        gate = None if self.linear_gate is None else self.linear_gate(hidden_states)[0]
        exchange, packed = self.core_attention.exchange, named.get("packed_seq_params")
        if exchange is not None and packed is not None and named.get("rotary_pos_emb") is not None:
            named["rotary_pos_emb"] = _rotary_of_samples(named["rotary_pos_emb"], packed, exchange.group)
        return super().forward(hidden_states, attention_mask, *rest, attention_bias=gate, **named)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query [s, b, n, d]; key and value with the groups of the branches side by side: [s, b, 3 * g, d]."""
        assert key_value_states is None
        query_heads = self.config.num_attention_heads // self.config.num_query_groups
        query, key, value = self._own_groups(
            self.linear_qkv(hidden_states)[0], (query_heads * self.qk_dim, self.qk_dim, self.v_dim)
        )
        query = self._own_queries(query.unflatten(-1, (query_heads, self.qk_dim)))
        keys, values = [key], [value]
        if self.linear_branch_kv is not None:
            compress_key, compress_value, window_key, window_value = self._own_groups(
                self.linear_branch_kv(hidden_states)[0], (self.qk_dim, self.v_dim) * 2
            )
            keys, values = [compress_key, window_key], [compress_value, window_value]
            keys.insert(_DENSE_BRANCH, key)
            values.insert(_DENSE_BRANCH, value)
        key = torch.cat(keys, dim=2)
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, torch.cat(values, dim=2)

    def _own_groups(self, projected: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Split a projection, group after group in its last dim, into parts [s, b, g, dim]."""
        if len(self.split.sharers) > 1:  # a group is spread over ranks: bring all together, keep one
            projected = tensor_parallel.all_gather_last_dim_from_tensor_parallel_region(projected)
            first = self.split.first_kv_head * sum(dims)
            projected = projected[..., first : first + sum(dims)]
        return projected.unflatten(-1, (self.split.kv_head_num, sum(dims))).split(dims, dim=-1)

    def _own_queries(self, query: Tensor) -> Tensor:
        """This rank's heads of its groups: [s, b, g, heads of a group, d] to [s, b, n, d]."""
        if len(self.split.sharers) > 1:
            first = self.split.sharers.index(_tensor_parallel()[1]) * self.split.head_num
            query = query[:, :, :, first : first + self.split.head_num]
        return query.flatten(2, 3)

    def _checkpointed_attention_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """As SelfAttention's, which does not treat `attention_bias` as an input that gets a gradient."""

        def run(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
            return self.core_attention(query, key, value, None, attention_bias=gate, packed_seq_params=packed_seq_params)

        return tensor_parallel.checkpoint(run, False, query, key, value, attention_bias)


class NSACore(MegatronModule):
    """NSA as a core attention.

    Args:
        config: Megatron's.
        layer_number: counted from 1.
        attn_mask_type: must be causal; NSA is causal by position and reads no mask.
        attention_type: must be `self`.
        nsa: settings.
        num_query_groups: groups of the whole model, which Megatron-core does not tell where ranks share one.
        softmax_scale: factor of the logits; default `k_channels ** -0.5`.
        k_channels: dim of query and key; default `config.kv_channels`, or what `config` says of MLA.
        v_channels: dim of the values; the default likewise.
        cp_comm_type: with context parallelism, `a2a` or `all_gather` (see `mindspeed_nsa.context_parallel`).

    Attributes:
        attention: the block; its `head_num` is this rank's. With `a2a` that is a part of the heads of its parameters.
        gate_weight: [n, d, 3], and gate_bias [n, 3]: with `nsa.gate: query`, each head's gates are computed from its query.
            They start normal with Megatron's deviation, and at 0.

    Raises:
        ValueError: the layer is configured for something that NSA does not do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        nsa: NSAConfig,
        num_query_groups: int | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        _check_host(config)
        self.exchange = _exchange(config, cp_comm_type)
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"NSA is causal self-attention; this layer's mask is {attn_mask_type}, its type {attention_type}")
        mla = config.multi_latent_attention
        k_channels = k_channels or (config.qk_head_dim + config.qk_pos_emb_head_dim if mla else config.kv_channels)
        v_channels = v_channels or (config.v_head_dim if mla else config.kv_channels)
        groups = num_query_groups or config.num_query_groups
        tp_size, tp_rank = _tensor_parallel()
        self.split = split_heads(config.num_attention_heads, groups, tp_size, tp_rank)
        self.groups = groups
        self.run_split = self.split  # the heads that run here, among those that are held here
        if self.exchange is not None and self.exchange.kind == "a2a":
            held, group = self.split, self.exchange.group
            size, rank = group.size(), group.rank()
            self.run_split = split_heads(held.head_num, held.kv_head_num, size, rank, "context_parallel_size")
        self.attention, self.gate_weight, self.gate_bias = self._draw(nsa, k_channels, v_channels, softmax_scale)
        for name, parameter in self.named_parameters():
            _mark(parameter, _head_axis(name), counted=_is_per_query_head(name) or tp_rank == self.split.sharers[0])

    def _draw(
        self, nsa: NSAConfig, k_channels: int, v_channels: int, softmax_scale: float | None
    ) -> tuple[NativeSparseAttention, nn.Parameter | None, nn.Parameter | None]:
        """Draw the parameters of all heads, then keep this rank's: one seed gives one model on any layout."""
        split, heads = self.split, self.config.num_attention_heads
        seed = int(torch.randint(2**31, ()))
        state = torch.random.get_rng_state()
        torch.default_generator.manual_seed(seed)
        attention = NativeSparseAttention(
            nsa, split.head_num, split.kv_head_num, k_channels, v_channels, scale=softmax_scale, score_group=self._score_group()
        )
        torch.default_generator.manual_seed(seed)
        whole = NativeSparseAttention(nsa, heads, self.groups, k_channels, v_channels)
        gate_weight = torch.empty(heads, k_channels, len(BRANCHES)).normal_(std=self.config.init_method_std)
        torch.random.set_rng_state(state)
        with torch.no_grad():
            for name, parameter in attention.named_parameters():
                parameter.copy_(_own(whole.get_parameter(name), _head_axis(name), split.first_kv_head, split.kv_head_num))
        attention = attention.to(self.config.params_dtype)
        attention.head_num, attention.kv_head_num = self.run_split.head_num, self.run_split.kv_head_num
        if nsa.gate != "query":
            return attention, None, None
        gate_weight = gate_weight[_tensor_parallel()[1] * split.head_num :][: split.head_num]
        gate_weight = nn.Parameter(gate_weight.to(self.config.params_dtype, copy=True))
        return attention, gate_weight, nn.Parameter(gate_weight.new_zeros(split.head_num, len(BRANCHES)))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend: [s, b, n, d] to [s, b, n * d], or packed: [T, n, d] to [T, n, d].

        Args:
            query: [s, b, n, d].
            key: [s, b, g, d], or [s, b, 3 * g, d] with those of the branches side by side.
            value: likewise.
            attention_mask: not read.
            attn_mask_type: not read.
            attention_bias: gate logits [s, b, n * 3]; None: they are computed from the query.
            packed_seq_params: prefix sums of packed samples.
        """
        packed = query.dim() == 3 or (packed_seq_params is not None and self.exchange is None)
        if query.dim() == 3:
            query, key, value = (x[:, None] for x in (query, key, value))
        gate = self._gate(query) if attention_bias is None else attention_bias.view(*query.shape[:3], len(BRANCHES))
        keys, values, spans = self._branches(key), self._branches(value), None
        if self.exchange is not None:
            query, gate, keys, values = self.exchange.gather(query, gate, keys, values)
            spans = self.exchange.query_spans(*keys[0].shape[:2])
        length, batch = keys[0].shape[:2]
        ends = _prefix_sums(packed_seq_params) if packed_seq_params else [length * (i + 1) for i in range(batch)]
        out = self._attend(_pack(query), _packed(keys), _packed(values), _pack(gate), ends, spans)
        out = out.unflatten(0, (batch, -1)).transpose(0, 1)
        if self.exchange is not None:
            out = self.exchange.scatter(out)
        return out[:, 0] if packed else out.flatten(2).contiguous()

    def _gate(self, query: Tensor) -> Tensor:
        assert self.gate_weight is not None and self.gate_bias is not None
        return torch.einsum("sbnd,ndg->sbng", query, self.gate_weight) + self.gate_bias

    def _branches(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.split(self.split.kv_head_num, dim=2))

    def _attend(self, *inputs: Any) -> Tensor:
        """Run the block on the parameters of the heads that run here, whose gradients are those of all ranks that use them."""
        used = {name: self._used(name, parameter) for name, parameter in self.attention.named_parameters()}
        return torch.func.functional_call(self.attention, used, inputs)

    def _used(self, name: str, parameter: Tensor) -> Tensor:
        group = self._gradient_group(name)
        if group is not None:
            parameter = _SumGradient.apply(parameter, group)
        if self.run_split is self.split:
            return parameter
        return _own(parameter, _head_axis(name), self.run_split.first_kv_head, self.run_split.kv_head_num)

    def _score_group(self) -> torch.distributed.ProcessGroup | None:
        """The ranks that run query heads of the groups that run here, where there are others."""
        held = self.split.sharers
        if self.run_split is self.split:
            return _group_in(parallel_state.get_tensor_model_parallel_group(), held)
        size = _tensor_parallel()[0]
        ranks = tuple(cp_rank * size + tp_rank for cp_rank in self.run_split.sharers for tp_rank in held)
        return _group_in(parallel_state.get_tensor_and_context_parallel_group(), ranks)

    def _gradient_group(self, name: str) -> torch.distributed.ProcessGroup | None:
        if _head_axis(name) is not None:
            return _group_in(parallel_state.get_tensor_model_parallel_group(), self.split.sharers)
        return parallel_state.get_tensor_model_parallel_group() if _tensor_parallel()[0] > 1 else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Parameters with an axis of heads are split along it; where ranks share a group, one of them saves it."""
        sharded: dict[str, Any] = {}
        for name, parameter in self.state_dict(prefix="", keep_vars=True).items():
            axis = _head_axis(name)
            if axis is None:
                sharded |= make_sharded_tensors_for_checkpoint({name: parameter}, prefix, {}, sharded_offsets)
            else:
                sharded[prefix + name] = self._sharded(prefix + name, name, parameter, axis, sharded_offsets)
        return sharded

    def _sharded(
        self, key: str, name: str, parameter: Tensor, axis: int, offsets: tuple[tuple[int, int, int], ...]
    ) -> ShardedTensor:
        tp_size, tp_rank = _tensor_parallel()
        sharers = (tp_rank,) if _is_per_query_head(name) else self.split.sharers
        fragments, replica = tp_size // len(sharers), sharers.index(tp_rank)
        data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        return ShardedTensor.from_rank_offsets(
            key,
            parameter,
            *offsets,
            (axis + len(offsets), tp_rank // len(sharers), fragments),
            replica_id=(0, replica, data_rank),
            prepend_axis_num=len(offsets),
        )


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over a process group."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


def collect_statistics(model: nn.Module | Iterable[nn.Module], enabled: bool) -> None:
    """Whether forward passes note what `nsa_statistics` reports; it costs a little time and a wait for the device."""
    for core in _cores(model).values():
        core.attention.collect_statistics = enabled


def nsa_statistics(model: nn.Module | Iterable[nn.Module]) -> dict[int, dict[str, float]]:
    """What each NSA layer of this rank did in its last forward pass, by layer number counted from 0.

    Returns:
        `gate_compress`, `gate_select`, `gate_window`: mean gates; `forced_share`, `scored_share`, `scored_distance`:
        see `mindspeed_nsa.selection.statistics`.
    """
    return {number: dict(core.attention.statistics) for number, core in _cores(model).items()}


def gather_statistics(model: nn.Module | Iterable[nn.Module]) -> dict[int, dict[str, float]]:
    """`nsa_statistics` of every layer of the whole model, averaged over the ranks that hold it. Every rank calls it."""
    ranks: list[dict[int, dict[str, float]]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(ranks, nsa_statistics(model))
    layers = sorted({layer for rank in ranks for layer in rank})
    return {layer: _mean([rank[layer] for rank in ranks if layer in rank]) for layer in layers}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def check_swapped(model: nn.Module | Iterable[nn.Module], numbers: Collection[int]) -> None:
    """Check a model that a host has built: its layers have NSA where they should, and nowhere else.

    Args:
        model: a model, or the chunks of one.
        numbers: the layers of the whole model with NSA, counted from 0.

    Raises:
        ValueError: a layer has another core; one line that names it.
    """
    for number, core in _cores(model, nn.Module).items():
        if isinstance(core, NSACore) is not (number in numbers):
            raise ValueError(
                f"layer {number} has the attention core {type(core).__name__}, and nsa.layers wants "
                f"{'NSA' if number in numbers else 'none of NSA'} there: another plugin may have replaced it"
            )


def _cores(model: nn.Module | Iterable[nn.Module], kind: type = NSACore) -> dict[int, Any]:
    chunks = [model] if isinstance(model, nn.Module) else model
    found: dict[int, Any] = {}
    for chunk in chunks:
        for layer in chunk.modules():
            core = getattr(getattr(layer, "self_attention", None), "core_attention", None)
            if isinstance(core, kind):
                found[int(layer.layer_number) - 1] = core  # type: ignore[arg-type]
    return found


def _check_host(config: TransformerConfig) -> None:
    refused = {
        "attention_dropout": (config.attention_dropout, 0),
        "attention_output_gate": (getattr(config, "attention_output_gate", False), False),
        "fused_single_qkv_rope": (getattr(config, "fused_single_qkv_rope", False), False),
    }
    for name, (given, allowed) in refused.items():
        if given != allowed:
            raise ValueError(f"{name} is {given}; with NSA: {allowed}")


def _tensor_parallel() -> tuple[int, int]:
    return parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()


def _exchange(config: TransformerConfig, kind: str | None) -> Exchange | None:
    if config.context_parallel_size == 1:
        return None
    if kind not in KINDS:
        raise ValueError(f"cp_comm_type is {kind}; with NSA and context_parallel_size above 1: {', '.join(KINDS)}")
    return Exchange(kind, parallel_state.get_context_parallel_group())


def _group_in(group: torch.distributed.ProcessGroup, ranks: tuple[int, ...]) -> torch.distributed.ProcessGroup | None:
    """The group of these ranks of a group; None: there is but one."""
    if len(ranks) == 1:
        return None
    everyone = torch.distributed.get_process_group_ranks(group)
    return _group_of(tuple(everyone[rank] for rank in ranks))


@cache
def _group_of(ranks: tuple[int, ...]) -> torch.distributed.ProcessGroup:
    # Only the members call this, so that ranks whose groups are not split need not.
    return torch.distributed.new_group(list(ranks), use_local_synchronization=True)


def _head_axis(name: str) -> int | None:
    return _HEAD_AXIS.get(name.rpartition(".")[2])


def _is_per_query_head(name: str) -> bool:
    return name.startswith("gate_")


def _own(whole: Tensor, axis: int | None, first: int, count: int) -> Tensor:
    return whole if axis is None else whole.narrow(axis, first, count)


def _mark(parameter: nn.Parameter, axis: int | None, counted: bool) -> None:
    """Tell Megatron how a parameter is split, so that each of its elements counts once in the gradient norm."""
    parameter.tensor_model_parallel = axis is not None and counted  # type: ignore[attr-defined]
    parameter.partition_dim = -1 if axis is None else axis  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]


def _pack(tensor: Tensor) -> Tensor:
    """[s, b, ...] to [T, ...], sample after sample."""
    return tensor.transpose(0, 1).flatten(0, 1)


def _packed(branches: Sequence[Tensor]) -> Any:
    """One tensor for all branches, or one for each, packed."""
    packed = tuple(_pack(branch) for branch in branches)
    return packed if len(packed) > 1 else packed[0]


def _rotary_of_samples(rotary_pos_emb: Tensor, packed: PackedSeqParams, group: torch.distributed.ProcessGroup) -> Tensor:
    """This rank's rotary angles [s, 1, 1, d], counted from the start of each sample instead of the sequence."""
    angles = gather_sequence(rotary_pos_emb, group)
    position = Samples(tuple(_prefix_sums(packed))).whole.positions(angles.device)
    return angles[own_pieces(position, 0, group.size(), group.rank())]


def _prefix_sums(packed: PackedSeqParams) -> list[int]:
    bounds = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    first, *ends = bounds.tolist()
    return [first, *ends] if first else ends  # MindSpeed's begin with the first end, Megatron's with 0
