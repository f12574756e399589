"""The block on the ascend backend against the block on the reference, through the real torch_npu."""

import logging

import pytest
import torch

from mindspeed_nsa import NativeSparseAttention, NSAConfig
from mindspeed_nsa.ops import ascend, library
from mindspeed_nsa.ops.ascend import packing

try:
    from tests.emulated_cann import device
except ImportError:
    device = None

BF16 = torch.bfloat16
WIDE = (192, 128)
RAGGED = [5, 45, 1045, 2122, 3622, 4646]
# Lengths' ends, heads, key/value heads, dims: each operator's limits, and every kernel that a group size picks.
MATRIX = {
    "one list": ([1024], 2, 2, WIDE),
    "4096 tokens": ([4096], 2, 1, (64, 64)),
    "packed": ([1024, 3072, 4096], 4, 1, (128, 128)),
    "short and ragged": (RAGGED, 4, 2, (64, 128)),
    "16 heads a group": ([1160], 16, 1, WIDE),
    "32 heads a group": ([1100], 32, 1, (64, 64)),
}
ODD = {
    "3 heads a group": ([1300], 3, 1, (32, 24), {}),
    "33 heads a group": ([1100], 33, 1, (32, 32), {}),
    "the paper's importance": ([1300], 4, 2, (64, 64), {"importance": "paper"}),
    "no sample has a choice": ([40, 400, 900], 4, 2, (64, 64), {}),
    "no sample has a window": ([5, 20], 2, 1, (64, 64), {}),
    "pooled by a network": ([1300], 2, 1, (64, 64), {"compression": "mlp"}),
}


@pytest.fixture(autouse=True)
def fresh():
    """What is said once is said in every test; every test probes."""
    ascend._plan.cache_clear()
    packing.say_once.cache_clear()


@pytest.fixture
def listed(monkeypatch):
    """The block ids of each call of the select operator."""
    seen, select = [], library.select_attention
    monkeypatch.setattr(library, "select_attention", lambda *a: seen.append(a[3].cpu()) or select(*a))
    return seen


def blocks(heads, kv_heads, dims, **config):
    """The same block on the reference and on the device."""
    config = {"strict": False, **config}
    on_reference = NativeSparseAttention(NSAConfig(**config, backend="reference"), heads, kv_heads, *dims).to(BF16)
    on_device = NativeSparseAttention(NSAConfig(**config), heads, kv_heads, *dims).to(BF16)
    on_device.load_state_dict(on_reference.state_dict())
    return on_reference, on_device.npu()


def inputs(tokens, heads, kv_heads, dims):
    """Query, three keys, three values, gate. Long queries: scores are then far from one another."""
    shapes = [(heads, dims[0]), *[(kv_heads, dims[0])] * 3, *[(kv_heads, dims[1])] * 3, (heads, 3)]
    query, *others = (torch.randn(tokens, *shape) for shape in shapes)
    return [x.to(BF16) for x in (3 * query, *others)]


def run(nsa, tensors, ends):
    leaves = [x.detach().to(next(nsa.parameters()).device).requires_grad_() for x in tensors]
    return nsa(leaves[0], leaves[1:4], leaves[4:7], leaves[7], ends), [*leaves, *nsa.parameters()]


def rows_that_differ(found, expected):
    """Rows further apart than one bfloat16 rounding, of the value and of terms as large as the largest value."""
    found, expected = found.detach().cpu().float(), expected.detach().float()
    apart = (found - expected).abs() > 2**-8 * (expected.abs() + expected.abs().max())
    return apart.flatten(1).any(dim=1).sum().item() + (~found.isfinite()).sum().item()


def check(listed, ends, heads, kv_heads, dims, longer=1, **config):
    """Forward and every gradient, every row."""
    tensors = inputs(ends[-1], heads, kv_heads, dims)
    tensors[0] *= longer
    pairs = [run(nsa, tensors, ends) for nsa in blocks(heads, kv_heads, dims, **config)]
    (expected, wanted), (found, leaves) = pairs
    same = (listed[0] == listed[1]).flatten(1).all(dim=1)
    assert (~same).sum() <= 2, "blocks differ, and not because two scores are equal but for rounding"
    assert rows_that_differ(found.cpu()[same], expected[same]) == 0
    grad = torch.randn(expected.shape).to(BF16) * same[:, None, None]
    wanted, gradients = torch.autograd.grad(expected, wanted, grad), torch.autograd.grad(found, leaves, grad.npu())
    assert [rows_that_differ(*pair) for pair in zip(gradients, wanted, strict=True)] == [0] * len(wanted)


@pytest.mark.parametrize("case", MATRIX)
def test_plan_a_is_the_reference(listed, case):
    check(listed, *MATRIX[case])
    assert ascend.plan().name == "A"


@pytest.mark.emulated
@pytest.mark.parametrize("case", MATRIX)
def test_plan_b_is_the_reference(monkeypatch, listed, case):
    """On a device that masks nothing: the reference leaves out the own block too."""
    monkeypatch.setenv("NSA_ASCEND_PLAN", "B")
    with device.use_variants(forward_ignores_mask=True):
        check(listed, *MATRIX[case], select_own_block=False)


@pytest.mark.emulated
def test_plan_b_with_logits_far_apart(monkeypatch, listed):
    """Early rows are in the operator's backward with the statistics of another attention: exp(logit - max) may overflow."""
    monkeypatch.setenv("NSA_ASCEND_PLAN", "B")
    check(listed, [1300], 2, 1, (64, 64), longer=100, select_own_block=False)


@pytest.mark.parametrize("case", ODD)
def test_what_the_operators_do_not_take_goes_another_way(listed, case):
    *arguments, config = ODD[case]
    check(listed, *arguments, **config)


def test_deterministic_mode(listed):
    """It runs the select operator's other backward kernel."""
    torch.use_deterministic_algorithms(True)
    try:
        check(listed, [1300], 4, 2, WIDE)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- causality


EDGES = [0, 30, 31, 63, 511, 512, 1022, 1023, 1024, 1087, 1088, 1199]


@pytest.mark.parametrize("plan", ["A", "B"])
def test_nothing_after_a_token_reaches_it(monkeypatch, plan):
    """To the bit: neither its result nor, from its result, a gradient to what comes later. Nor across samples."""
    monkeypatch.setenv("NSA_ASCEND_PLAN", plan)
    start, ends = 100, [100, 1300, 1340]
    _, nsa = blocks(2, 1, (64, 64))
    tensors = inputs(1340, 2, 1, (64, 64))
    whole, leaves = run(nsa, tensors, ends)
    for edge in EDGES:
        at = start + edge
        changed = [torch.cat([x[:start].flip(0), x[start : at + 1], torch.randn_like(x[at + 1 :])]) for x in tensors]
        assert torch.equal(run(nsa, changed, ends)[0][start : at + 1], whole[start : at + 1])
        for grad in torch.autograd.grad(whole[start : at + 1].float().sum(), leaves[:8], retain_graph=True):
            assert not grad[at + 1 :].any()
            assert not grad[:start].any()


# ---- what the probe finds


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("variants", "plan"),
    [
        ([], ("A", True, False)),
        (["forward_ignores_mask"], ("B", False, False)),
        (["backward_compares_ids"], ("A", True, False)),
        (["forward_reads_mask"], ("A", True, False)),
        (["ties_reversed"], ("A", False, False)),
        (["refuses_unequal_dims"], ("A", True, True)),
        (["refuses_shortest_keys"], ("A", True, False)),
        (["refuses_unequal_dims", "forward_ignores_mask"], ("B", False, True)),
    ],
)
def test_each_variant_is_noticed_or_does_not_matter(listed, caplog, variants, plan):
    """And with the plan that the probe then picks, the block is the reference."""
    with device.use_variants(**dict.fromkeys(variants, True)), caplog.at_level(logging.WARNING):
        assert tuple(ascend.plan(2)) == plan
        assert f"plan {plan[0]}" in caplog.text
        assert "torch_npu" in caplog.text
        check(listed, [1024, 2324], 2, 1, WIDE, select_own_block=plan[0] == "A")


@pytest.mark.emulated
def test_ties_reversed_would_be_felt(listed):
    """Most scores are 0 where attention is peaked: such a device's own choice lists future blocks."""
    heads, dims = (2, 1), (64, 64)
    tensors = inputs(1300, *heads, dims)
    tensors[0] *= 1000
    for chooses in (True, False):
        with device.use_variants(ties_reversed=True), pytest.MonkeyPatch.context() as patch:
            patch.setitem(ascend.PLANS, "A", ascend.Plan("A", chooses, False))
            patch.setenv("NSA_ASCEND_PLAN", "A")
            ascend._plan.cache_clear()
            run(blocks(*heads, dims)[1], tensors, [1300])
    own = torch.arange(1300)[:, None, None] // 64
    assert (listed[0] > own)[1024:].any()
    assert not (listed[1] > own)[1024:].any()


def test_no_plan_no_run(monkeypatch):
    """A device whose backward cannot be trusted either way is refused, with what was found."""
    gradients = ascend.operators.select_attention_grad
    monkeypatch.setattr(ascend.operators, "select_attention_grad", lambda *a: tuple(1.1 * x for x in gradients(*a)))
    words = "no plan keeps attention causal: npu_nsa_select_attention, masked: the gradient differs from the reference"
    with pytest.raises(RuntimeError, match=words):
        ascend.plan()


# ---- what is refused, and what is said


def test_refusals(monkeypatch):
    reference, nsa = blocks(2, 1, (64, 64))
    with pytest.raises(ValueError, match=r"take bfloat16 or float16, not torch.float32"):
        run(nsa.float(), [x.float() for x in inputs(64, 2, 1, (64, 64))], [64])
    nsa.to(BF16)
    with pytest.raises(ValueError, match="1200 packed samples, the longest of 1 tokens, 1200 in all; the Ascend operators"):
        run(nsa, inputs(1200, 2, 1, (64, 64)), list(range(1, 1201)))
    with pytest.raises(ValueError, match=r"head dims 256 \(query, key\) and 64"):
        run(blocks(1, 1, (256, 64))[1], inputs(64, 1, 1, (256, 64)), [64])
    with pytest.raises(ValueError, match=r"select_block_count are .*8.*; the Ascend operators take"):
        run(blocks(2, 1, (64, 64), select_block_count=8)[1], inputs(1024, 2, 1, (64, 64)), [1024])
    monkeypatch.setenv("NSA_ASCEND_PLAN", "C")
    with pytest.raises(ValueError, match="NSA_ASCEND_PLAN is 'C'; allowed: A, B"):
        run(nsa, inputs(64, 2, 1, (64, 64)), [64])
    monkeypatch.setenv("NSA_ASCEND_PLAN", "B")
    with pytest.raises(ValueError, match="select_own_block: true cannot run on this device"):
        run(blocks(2, 1, (64, 64), select_own_block=True)[1], inputs(64, 2, 1, (64, 64)), [64])
    with pytest.raises(ValueError, match="backend ascend takes tensors on npu, not on cpu"):
        reference.config = NSAConfig(backend="ascend")
        run(reference, inputs(64, 2, 1, (64, 64)), [64])


def test_queries_that_start_within_their_sample_are_refused():
    query, key, value = (torch.randn(64, 1, 64).to(BF16).npu() for _ in range(3))
    ids = torch.arange(16, dtype=torch.int32).repeat(64, 1, 1).npu()
    few = key[:11], value[:11]
    at = (1.0, *packing.SIZES, True, 1, 2, True, "ascend", [64], [11], [4], [128], "ascend")
    with pytest.raises(ValueError, match=r"q_offset is \[128\]; the Ascend operators take queries from the start"):
        library.compress_attention(query, *few, None, None, *at)
    with pytest.raises(ValueError, match=r"q_offset is \[128\]"):
        library.select_attention(query, key, value, ids, 1.0, 64, True, True, [64], [64], [128], "ascend")
    with pytest.raises(ValueError, match=r"q_offset is \[1\]; npu_fusion_attention takes .*: \[0\]"):
        library.window_attention(query, key, value, 1.0, 512, [64], [64], [1], "ascend")


def test_each_detour_is_said_once(caplog):
    _, nsa = blocks(2, 1, (64, 64))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run(nsa, inputs(1300, 2, 1, (64, 64)), [100, 1300])
    said = [record.getMessage() for record in caplog.records if "plan" not in record.getMessage()]
    assert len(said) == len(set(said)) == 4
    for words in ("head dims 64/64", "places for more compressed keys", "places for more keys", "attend densely"):
        assert sum(words in message for message in said) == 1
