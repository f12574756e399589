from pathlib import Path

import pytest

from mindspeed_nsa.memory import RESERVE, estimate, mask_bytes, parameter_count
from mindspeed_nsa.pretrain.job import Job

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = ("model.swiglu=false", "model.v_head_dim=8", "training.bf16=true", "nsa.separate_kv=false", "nsa.gate=query")
VOCABULARY = 384
# 4 layers of hidden 128, 8 heads of 16 and 8 in 2 groups, feed-forward of 512: query, key and value; output; feed-forward.
NETWORK = 2 * 128 * 512
MATRICES = 128 * (8 * 16 + 2 * (16 + 8)) + 8 * 8 * 128 + NETWORK
# Pooling: a weight for keys and one for values, and a position for values; gates from the query.
POOLING, GATES, NORMS = 32 * 2 * (2 + 8), 3 * 8 * (16 + 1), 2 * 128
LAYER = MATRICES + POOLING + GATES + NORMS
ENDS = VOCABULARY * 128 + 128


def small(*overrides):
    return Job.read(CONFIGS / "tiny.yaml", [*SMALL, *overrides])


def test_parameters_of_a_gqa_layer():
    assert parameter_count(small(), VOCABULARY) == 4 * LAYER + ENDS
    untied = parameter_count(small("model.untie_embeddings_and_output_weights=true"), VOCABULARY)
    assert untied == 4 * LAYER + ENDS + VOCABULARY * 128
    branches = parameter_count(small("nsa.separate_kv=true", "nsa.gate=hidden"), VOCABULARY)
    assert branches == 4 * (LAYER - GATES + 128 * 2 * 2 * (16 + 8) + (128 + 1) * 3 * 8) + ENDS
    dense = 128 * (8 * 16 + 2 * 2 * 16) + 8 * 16 * 128 + NETWORK + NORMS
    assert parameter_count(small("nsa.layers=[1]"), VOCABULARY) == LAYER + 3 * dense + ENDS


def test_parameters_of_published_models():
    """Llama 3 8B has 8.03e9 of 128256 rows; DeepSeek-V2-Lite 15.7e9; NSA's projections come on top."""
    llama = Job.read(CONFIGS / "gqa_8b.yaml", ["nsa.enabled=false"])
    assert parameter_count(llama, 128256) == pytest.approx(8.03e9, rel=1e-3)
    assert parameter_count(Job.read(CONFIGS / "mla_16b.yaml"), 102400) == pytest.approx(15.7e9, rel=1e-3)
    assert parameter_count(Job.read(CONFIGS / "nsa_27b.yaml"), 129280) == pytest.approx(27e9, rel=0.05)


LATENT = ("model.multi_latent_attention=true", "model.num_query_groups=8", "model.q_lora_rank=64", "model.kv_channels=")
FROM_QUERY = ("nsa.gate=query", "nsa.separate_kv=false")
EXPERTS = ("model.num_experts=4", "model.moe_ffn_hidden_size=64", "model.moe_shared_expert_intermediate_size=64")


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.v_head_dim=8",),
        (*LATENT, *FROM_QUERY),
        (*LATENT, *FROM_QUERY, "model.qk_layernorm=true", "model.q_lora_rank="),
        ("model.add_bias_linear=true", "model.qk_layernorm=true", "model.normalization=LayerNorm"),
        ("model.add_qkv_bias=true", "model.swiglu=false", "model.position_embedding_type=learned_absolute"),
        (*EXPERTS, "nsa.layers=[1, 2]", "nsa.compression=mlp", "nsa.gate=query"),
        (*EXPERTS[:2], "model.add_bias_linear=true", "nsa.compression=mean", "model.untie_embeddings_and_output_weights=true"),
        ("nsa.enabled=false",),
    ],
    ids=lambda overrides: overrides[0].partition("=")[0],
)
def test_parameters_are_those_of_the_model_that_is_built(overrides):
    torch = pytest.importorskip("torch")
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state

    from mindspeed_nsa.patches import cpu_host
    from mindspeed_nsa.pretrain.model import build_models

    job = Job.read(CONFIGS / "tiny.yaml", overrides)
    cpu_host.install()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        parallel_state.initialize_model_parallel()
        model = build_models(job, 257)[0]
        built = sum(parameter.numel() for parameter in model.parameters())
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        cpu_host.uninstall()
    assert parameter_count(job, VOCABULARY) == built


def test_state_is_shared_by_tensor_pipeline_and_data_parallel_ranks():
    one = estimate(small(), 1, VOCABULARY)
    parameters = parameter_count(small(), VOCABULARY)
    assert (one.weights, one.gradients, one.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters)
    assert one.total == sum(one) + RESERVE
    split = estimate(small("parallel.tensor_model_parallel_size=2"), 4, VOCABULARY)
    norms = 4 * NORMS + 128
    held = (parameters - norms) // 2 + norms
    assert (split.weights, split.optimizer) == (2 * held, 12 * held)
    sharded = estimate(small("parallel.use_distributed_optimizer=true"), 4, VOCABULARY)
    assert (sharded.weights, sharded.optimizer) == (2 * parameters, 3 * parameters)
    stages = estimate(small("parallel.pipeline_model_parallel_size=2"), 2, VOCABULARY)
    assert stages.weights == 2 * (2 * LAYER + VOCABULARY * 128), "each end has its own table"
    single = estimate(small("training.bf16=false"), 1, VOCABULARY)
    assert (single.weights, single.optimizer) == (4 * parameters, 8 * parameters)


def test_experts_are_shared_by_expert_parallel_ranks():
    experts = ("model.num_experts=8", "model.moe_layer_freq=([0]*1+[1]*3)", "model.moe_ffn_hidden_size=64")
    shared = "model.moe_shared_expert_intermediate_size=32"
    dense = 4 * (LAYER - NETWORK) + NETWORK + 3 * (8 * 128 + 2 * 128 * 32) + ENDS
    routed = 3 * 8 * 2 * 128 * 64
    assert parameter_count(small(*experts, shared), VOCABULARY) == dense + routed
    layout = (
        "parallel.expert_model_parallel_size=4",
        "parallel.use_distributed_optimizer=true",
        "training.global_batch_size=8",
    )
    found = estimate(small(*experts, shared, *layout), 8, VOCABULARY)
    assert found.weights == 2 * (dense + routed / 4)
    assert found.optimizer == 12 * (dense / 8 + routed / 4 / 2)


def test_activations_of_a_dense_layer_by_hand():
    """Norms in and out, query, key and value, attention's output and statistics, the wide layer before and after GELU."""
    job = small("nsa.enabled=false")
    layer = 1536 * (2 * (4 * 128 + 8 * 16 + 2 * (16 + 8) + 8 * 8 + 8 * 8 + 2 * 512) + 8 * 64)
    assert estimate(job, 1, VOCABULARY).activations == 4 * layer + layer
    full = ("parallel.recompute_granularity=full", "parallel.recompute_num_layers=1")
    entry = 2 * 1536 * 128
    uniform = small("nsa.enabled=false", *full, "parallel.recompute_method=uniform")
    assert estimate(uniform, 1, VOCABULARY).activations == 4 * entry + 2 * layer
    block = small("nsa.enabled=false", *full, "parallel.recompute_method=block")
    assert estimate(block, 1, VOCABULARY).activations == entry + 3 * layer + 2 * layer
    selective = small("nsa.enabled=false", "parallel.recompute_granularity=selective")
    assert estimate(selective, 1, VOCABULARY).activations == 5 * (layer - 1536 * (2 * 8 * 8 + 8 * 64))


def test_activations_of_an_nsa_layer_are_as_wide_as_the_operators():
    sparse = 8 * 192 + 2 * (192 + 128) * (1 + 1 / 16) + 8 * 128 + 3 * 8
    inside = 3 * 8 * (2 * 128 + 64) + 4 * 2 * 16
    layer = 1536 * (2 * (4 * 128 + sparse + 2 * 512) + inside)
    assert estimate(small(), 1, VOCABULARY).activations == 5 * layer


def test_logits_and_masks():
    found = estimate(small(), 1, VOCABULARY)
    assert found.logits == 1536 * VOCABULARY * 8
    assert found.masks == mask_bytes(small().nsa, 1536) == 1536 * (95 + 24)
    assert estimate(small("nsa.enabled=false"), 1, VOCABULARY).masks == 0
