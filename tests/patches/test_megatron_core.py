"""NSA in real Megatron-core layers, in one process: shapes, branches, gates, recompute, packed samples, refusals."""

import pytest
import torch
import torch.distributed

megatron = pytest.importorskip("megatron.core")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig  # noqa: E402

from mindspeed_nsa import NativeSparseAttention, NSAConfig  # noqa: E402
from mindspeed_nsa.patches import cpu_host, megatron_core  # noqa: E402

LENGTH = 1216  # past 1024 tokens blocks are chosen


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    cpu_host.install()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    cpu_host.uninstall()


def config(**changes):
    settings = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": 0.3,
    }
    return TransformerConfig(**settings | changes)


def self_attention(nsa=None, v_head_dim=None, **changes):
    torch.manual_seed(0)
    host = config(**changes)
    (layer,) = megatron_core.with_nsa([get_gpt_layer_local_spec()], nsa or NSAConfig(), v_head_dim=v_head_dim)
    return build_module(layer.submodules.self_attention, config=host, layer_number=1).train()


def hidden(length=LENGTH, batch=2):
    torch.manual_seed(1)
    return torch.randn(length, batch, 64)


def rotary(length=LENGTH, dim=16):
    angle = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(0, dim, 2) / dim)
    return torch.cat([angle, angle], dim=-1)[:, None, None]


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", [0, 1, 2, 3]), ([2], [2]), ("1::2", [1, 3]), ("-1:", [3]), ([0, 3], [0, 3])]
)
def test_layers_that_are_not_named_stay_as_they_were(layers, expected):
    dense = [get_gpt_layer_local_spec() for _ in range(4)]
    specs = megatron_core.with_nsa(dense, NSAConfig(layers=layers))
    replaced = [n for n, spec in enumerate(specs) if spec.submodules.self_attention.module is megatron_core.NSASelfAttention]
    assert replaced == expected
    assert all(specs[n] is dense[n] for n in range(4) if n not in expected)
    second_half = megatron_core.with_nsa(dense[2:], NSAConfig(layers=layers), num_layers=4, first_layer=2)
    assert [type(spec.submodules.self_attention.module) for spec in second_half] == [
        type(spec.submodules.self_attention.module) for spec in specs[2:]
    ]


def test_the_dense_projections_keep_their_shapes():
    dense = build_module(get_gpt_layer_local_spec().submodules.self_attention, config=config(), layer_number=1)
    shapes = {name: tuple(p.shape) for name, p in self_attention().named_parameters()}
    assert {name: tuple(p.shape) for name, p in dense.named_parameters()}.items() <= shapes.items()
    assert shapes["linear_branch_kv.weight"] == (2 * 2 * (16 + 16), 64)
    assert shapes["linear_gate.weight"] == (4 * 3, 64)
    narrow = {name: tuple(p.shape) for name, p in self_attention(v_head_dim=8).named_parameters()}
    assert narrow["linear_qkv.weight"] == (4 * 16 + 2 * (16 + 8), 64)
    assert narrow["linear_proj.weight"] == (64, 4 * 8)


@pytest.mark.parametrize("separate_kv", [True, False])
@pytest.mark.parametrize("v_head_dim", [None, 8])
def test_branches_and_gates_reach_the_block_as_projected(separate_kv, v_head_dim):
    layer, states = self_attention(NSAConfig(separate_kv=separate_kv), v_head_dim), hidden(batch=1)
    d2 = v_head_dim or 16
    qkv = layer.linear_qkv(states)[0].view(LENGTH, 2, 2 * 16 + 16 + d2)
    query, key, value = qkv[..., :32].reshape(LENGTH, 4, 16), qkv[..., 32:48], qkv[..., 48:]
    if separate_kv:
        branch_kv = layer.linear_branch_kv(states)[0].view(LENGTH, 2, 2 * (16 + d2))
        compress, window = branch_kv.split(16 + d2, dim=-1)
        key, value = (compress[..., :16], key, window[..., :16]), (compress[..., 16:], value, window[..., 16:])
    gate = layer.linear_gate(states)[0].view(LENGTH, 4, 3)
    attended = layer.core_attention.attention(query, key, value, gate)
    expected = layer.linear_proj(attended.flatten(1)[:, None])[0]
    torch.testing.assert_close(layer(states, None)[0], expected, rtol=0, atol=1e-6)


def test_samples_of_a_batch_do_not_mix():
    layer, states = self_attention(), hidden()
    together = layer(states, None, rotary_pos_emb=rotary())[0]
    alone = [layer(states[:, [b]], None, rotary_pos_emb=rotary())[0] for b in range(2)]
    assert torch.equal(together, torch.cat(alone, dim=1))


def test_packed_samples_are_as_they_are_alone():
    layer, states, lengths = self_attention(), hidden(batch=1), (1, 100, LENGTH - 101)
    ends = torch.tensor([0, 1, 101, LENGTH], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
    together = layer(states, None, rotary_pos_emb=rotary(), packed_seq_params=packed)[0]
    alone = [layer(part, None, rotary_pos_emb=rotary(len(part)))[0] for part in states.split(lengths)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4 * together.abs().max().item())


def test_bounds_of_packed_samples_may_begin_with_the_first_end():
    """As MindSpeed hands them over."""
    core = self_attention().core_attention
    shapes = [(LENGTH, heads, core.attention.qk_head_dim) for heads in (core.attention.head_num, core.split.kv_head_num * 3)]
    query, key = (torch.randn(shape) for shape in shapes)
    gate = torch.randn(LENGTH, 1, core.attention.head_num * 3)
    found = []
    for bounds in ([0, 700, LENGTH], [700, LENGTH]):
        packed = PackedSeqParams(cu_seqlens_q=torch.tensor(bounds), cu_seqlens_kv=torch.tensor(bounds))
        found.append(core(query, key, key.clone(), None, attention_bias=gate, packed_seq_params=packed))
    assert found[0].shape == (LENGTH, core.attention.head_num, core.attention.v_head_dim)
    assert torch.equal(*found)
    whole = PackedSeqParams(cu_seqlens_q=torch.tensor([LENGTH]))
    assert not torch.equal(found[0], core(query, key, key, None, attention_bias=gate, packed_seq_params=whole))


@pytest.mark.parametrize("gate", ["hidden", "query"])
def test_selective_recompute_changes_no_bit(gate):
    results = []
    for recompute in (None, "selective"):
        layer = self_attention(NSAConfig(gate=gate), recompute_granularity=recompute, recompute_modules=["core_attn"])
        states = hidden().requires_grad_()
        out = layer(states, None, rotary_pos_emb=rotary())[0]
        out.square().sum().backward()
        results.append([out, states.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 5
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("compression", ["linear", "mean", "mlp"])
def test_every_parameter_learns(compression):
    layer = self_attention(NSAConfig(compression=compression))
    layer(hidden(), None)[0].square().sum().backward()
    unused = {"linear_proj.bias"}  # handed back to the layer, which adds it
    assert {name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()} == unused


def test_statistics_are_of_the_layers_that_have_nsa():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            specs = megatron_core.with_nsa([get_gpt_layer_local_spec() for _ in range(2)], NSAConfig(layers=[1]))
            self.layers = torch.nn.ModuleList(build_module(s, config=config(), layer_number=n + 1) for n, s in enumerate(specs))

    model = Model()
    megatron_core.collect_statistics(model, True)
    model.layers[1](hidden(), attention_mask=None)
    statistics = megatron_core.nsa_statistics(model)
    assert list(statistics) == [1]
    assert statistics[1]["forced_share"] + statistics[1]["scored_share"] == pytest.approx(1)
    # 1216 tokens: 3 of the first 16 blocks are forced from the third block on, and 3 of 16 after token 1024.
    visible = sum(min(t // 64 + 1, 16) for t in range(LENGTH))
    forced = sum(min(t // 64 + 1, 3) for t in range(LENGTH))
    assert statistics[1]["forced_share"] == pytest.approx(forced / visible)
    assert 0 < statistics[1]["gate_compress"] < 1
    assert 128 <= statistics[1]["scored_distance"] <= LENGTH


def mla_config():
    return MLATransformerConfig(
        multi_latent_attention=True,
        num_layers=1,
        hidden_size=64,
        num_attention_heads=2,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_head_dim=128,
        qk_pos_emb_head_dim=64,
        v_head_dim=128,
        rope_type="rope",
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )


def test_mla_core_takes_the_dims_of_the_chip():
    nsa = NSAConfig(gate="query", separate_kv=False)
    (layer,) = megatron_core.with_nsa([get_gpt_layer_local_spec(multi_latent_attention=True)], nsa)
    attention = build_module(layer.submodules.self_attention, config=mla_config(), layer_number=1).train()
    core = attention.core_attention
    assert (core.attention.qk_head_dim, core.attention.v_head_dim, core.attention.head_num) == (192, 128, 2)
    states = hidden(batch=1).requires_grad_()
    attention(states, None)[0].square().sum().backward()
    assert core.gate_weight.grad.any() and core.attention.compress_key.weight.grad.any() and states.grad.any()


@pytest.mark.parametrize(
    ("changes", "nsa", "words"),
    [
        ({"attention_dropout": 0.1}, {}, "attention_dropout is 0.1; with NSA: 0"),
        ({"context_parallel_size": 2}, {}, "cp_comm_type is None; with NSA and context_parallel_size above 1: a2a, all_gather"),
        ({"kv_channels": 256}, {}, "take up to 192 and 128"),
        ({"num_attention_heads": 6, "num_query_groups": 2}, {}, "3 query heads a key/value head"),
    ],
)
def test_what_nsa_does_not_do_is_refused(changes, nsa, words):
    with pytest.raises(ValueError, match=words):
        self_attention(NSAConfig(**nsa), **changes)


def test_an_attention_that_is_not_causal_is_refused():
    core = megatron_core.NSACore
    with pytest.raises(ValueError, match="causal self-attention"):
        core(config(), 1, AttnMaskType.padding, "self", nsa=NSAConfig())


@pytest.mark.parametrize("nsa", [NSAConfig(), NSAConfig(gate="query"), NSAConfig(separate_kv=False)])
def test_mla_needs_gates_from_the_query_and_shared_keys(nsa):
    with pytest.raises(ValueError, match="`gate: query` and `separate_kv: false`"):
        megatron_core.with_nsa([get_gpt_layer_local_spec(multi_latent_attention=True)], nsa)


def test_one_whole_model_gives_each_rank_its_heads():
    """The parameters a rank draws are its part of the whole model's."""
    whole = self_attention().core_attention
    torch.manual_seed(0)
    again = self_attention().core_attention
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    assert isinstance(whole.attention, NativeSparseAttention)
    assert whole.attention.compress_key.weight.std(dim=0).min() > 0
