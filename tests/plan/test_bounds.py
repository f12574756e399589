from pathlib import Path

import pytest

from mindspeed_nsa.flops import dense_flops, layer_flops
from mindspeed_nsa.memory import Estimate
from mindspeed_nsa.plan.bounds import Hardware, bound, hardware, token_flops
from mindspeed_nsa.plan.wire import Message
from mindspeed_nsa.pretrain.job import Job

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yaml"
ROWS = 384
CHIP = Hardware(2, 64e9, 1e9, 1e12, 1e8, 1e7, superpod_nodes=2)
MEMORY = Estimate(weights=1e6, gradients=2e6, optimizer=3e6, activations=4e6, logits=5e6, masks=6e6)


def job(*overrides):
    return Job.read(CONFIG, overrides)


def test_operations_of_a_token():
    """Two for each number of a matrix: query, key and value of all branches, gates, output, network, and the output layer."""
    found = token_flops(job(), ROWS)
    sparse = layer_flops(job().nsa, 1536, 8, 2, 16, 16, 128)
    assert found.nsa.select == 4 * sparse.select / 1536
    assert found.nsa.projections == 4 * 2 * 128 * (2 * 2 * 32 + 3 * 8)
    layer = 128 * (8 * 16 + 2 * 32) + 8 * 16 * 128 + 3 * 128 * 320
    # Norms, biases of gates and the pooling count as matrices here: 0.5 % of so small a model.
    assert found.matrices == pytest.approx(2 * (4 * layer + ROWS * 128), rel=0.01)
    assert found.dense == 0
    assert found.all_dense == 4 * dense_flops(1536, 8, 16, 16) / 1536
    half = token_flops(job("nsa.layers=[0, 1]"), ROWS)
    assert (half.nsa.select, half.dense) == (found.nsa.select / 2, found.all_dense / 2)


def test_ranks_that_share_a_group_repeat_one_another_s_compressed_attention():
    """In the forward pass: once, or twice where it is computed again."""
    shared = ("training.bf16=true", "parallel.tensor_model_parallel_size=8")
    found, alone = (token_flops(job(*shared, f"nsa.backend={backend}"), ROWS) for backend in ("ascend", "cpu"))
    assert found.repeated == 3 * found.nsa.compress
    assert (alone.repeated, alone.total) == (0, found.total)
    for again, overrides in enumerate(((), ("granularity=full", "method=uniform", "num_layers=1"))):
        laid = job(*shared, *(f"parallel.recompute_{key}" for key in overrides))
        more = bound(laid, 8, found, MEMORY, [], CHIP).compute - bound(laid, 8, alone, MEMORY, [], CHIP).compute
        assert more == pytest.approx((1 + again) * found.repeated * 2 * 1536 / 8 / 1e12)


def test_a_token_meets_the_experts_that_it_is_sent_to():
    experts = ("model.num_experts=4", "model.moe_ffn_hidden_size=64", "model.moe_router_topk=2")
    more = token_flops(job(*experts[:1], "model.num_experts=8", *experts[1:]), ROWS)
    assert more.matrices - token_flops(job(*experts), ROWS).matrices == 2 * 4 * 4 * 128, "the router alone grows"


def test_the_bound_of_a_step_by_hand():
    two = job("training.bf16=true", "parallel.pipeline_model_parallel_size=2")
    flops = token_flops(two, ROWS)
    found = bound(two, 2, flops, MEMORY, [], CHIP)
    # Two micro-batches over two stages take the time of three; weights twice, gradients and activations both ways in each.
    assert found.compute == pytest.approx(3 * flops.total * 2 * 1536 / 2 / 1e12 * 1.5)
    assert found.memory == pytest.approx((2 * (2e6 + 4e6 + 8e6) + 3e6 + 6e6) / 1e9)
    assert (found.hccs, found.roce) == (0, 0)
    assert found.least == found.memory
    again = [f"parallel.recompute_{key}" for key in ("granularity=full", "method=uniform", "num_layers=1")]
    full = bound(job("training.bf16=true", *again), 1, flops, MEMORY, [], CHIP)
    assert full.compute == pytest.approx(4 * flops.total * 2 * 1536 / 1e12)
    assert bound(job(), 1, flops, MEMORY, [], CHIP).compute is None, "no peak of float32 is published"


def test_links_within_a_superpod_and_beyond():
    """A superpod has 4 ranks here: 8 tensor-parallel ranks reach beyond, 4 do not; context-parallel ones lie 2 apart."""
    laid = job("training.bf16=true", "training.global_batch_size=8", "parallel.tensor_model_parallel_size=2")
    cases = [("tensor", 4, "hccs"), ("tensor", 8, "roce"), ("context", 2, "hccs"), ("context", 4, "roce"), ("data", 2, "roce")]
    for dimension, ranks, link in cases:
        message = Message(dimension, "", "send", ranks, 1e8, 3)
        found = bound(laid, 8, token_flops(laid, ROWS), MEMORY, [message], CHIP)
        other = {"hccs": "roce", "roce": "hccs"}[link]
        assert getattr(found, link) == 3e8 / getattr(CHIP, f"{link}_bytes_per_second")
        assert getattr(found, other) == 0


def test_the_published_figures_have_sources():
    text = (Path(__file__).parents[2] / "mindspeed_nsa" / "plan" / "hardware.yaml").read_text()
    assert hardware().hbm_bytes == 64e9 and hardware().dies_per_node == 16
    assert "arXiv 2506.12708" in text and "Huawei Connect 2025" in text
