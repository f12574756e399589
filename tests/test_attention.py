"""The block: what it computes, what it refuses, and what it never builds."""

import os
import shutil
import subprocess
import sys

import oracle
import pytest
import torch
from blocks import CHIP, SMALL, inputs_of, leaves, make, only
from oracle import prefix_sums
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_nsa import NativeSparseAttention, NSAConfig
from mindspeed_nsa.ops import library, reference

COMPRESSIONS = [("linear", True), ("linear", False), ("mean", True), ("mlp", True), ("mlp", False)]


def same(actual, expected, tensors, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(actual)
    got = torch.autograd.grad((actual * weight).sum(), tensors, allow_unused=True)
    wanted = torch.autograd.grad((expected * weight).sum(), tensors, allow_unused=True)
    for a, b, x in zip(got, wanted, tensors, strict=True):
        a, b = (torch.zeros_like(x) if grad is None else grad for grad in (a, b))
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


# ---- what it computes


@pytest.mark.parametrize("importance", ["ascend", "paper"])
@pytest.mark.parametrize(("compression", "position"), COMPRESSIONS)
def test_query_by_query(compression, position, importance):
    nsa = make(SMALL | {"compression": compression, "intra_block_position": position, "importance": importance})
    lengths = [1, 3, 0, 4, 75, 31, 33]
    inputs, ends = inputs_of(nsa, sum(lengths)), prefix_sums(lengths)
    expected, _ = oracle.block(nsa, *inputs, ends)
    same(nsa(*inputs, ends), expected, leaves(nsa, *inputs), 1e-10)


@pytest.mark.parametrize("importance", ["ascend", "paper"])
@pytest.mark.parametrize(("compression", "position"), COMPRESSIONS)
def test_dense_masks(compression, position, importance):
    """The chip's own sizes, packed, on both sides of the selection budget."""
    sizes = {"compression": compression, "intra_block_position": position, "importance": importance, "strict": False}
    nsa = make(CHIP | sizes)
    lengths = [1300, 1, 31, 32, 65]
    inputs, ends = inputs_of(nsa, sum(lengths)), prefix_sums(lengths)
    same(nsa(*inputs, ends), oracle.dense_block(nsa, *inputs, ends), leaves(nsa, *inputs), 1e-12)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 63, 64, 65, 1023, 1024, 1025])
def test_lengths(length):
    nsa = make(CHIP)
    inputs = inputs_of(nsa, length)
    same(nsa(*inputs), oracle.dense_block(nsa, *inputs, [length]), leaves(nsa, *inputs), 1e-12)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 16, 32])
def test_groups(group):
    nsa = make(SMALL, heads=2 * group, kv_heads=2, dims=(3, 7))
    inputs, ends = inputs_of(nsa, 47), [5, 47]
    expected, _ = oracle.block(nsa, *inputs, ends)
    same(nsa(*inputs, ends), expected, leaves(nsa, *inputs), 1e-10)


@pytest.mark.parametrize(
    "sizes",
    [
        {"init_blocks": 0, "local_blocks": 1},
        {"init_blocks": 2, "local_blocks": 2},
        {"init_blocks": 1, "local_blocks": 3, "select_block_count": 4},
        {"compress_block_size": 2, "compress_stride": 2},
        {"compress_block_size": 8, "compress_stride": 2},
        {"window_size": 1},
        {"window_size": 1000},
        {"select_block_count": 100},
    ],
)
def test_sizes(sizes):
    nsa = make(SMALL | {"local_blocks": 1} | sizes)
    inputs, ends = inputs_of(nsa, 90), [80, 90]
    expected, _ = oracle.block(nsa, *inputs, ends)
    same(nsa(*inputs, ends), expected, leaves(nsa, *inputs), 1e-10)


def test_gradcheck():
    nsa = make(SMALL | {"select_block_size": 4, "select_block_count": 2, "local_blocks": 1}, 2, 1, (2, 2))
    query, keys, values, gate = inputs_of(nsa, 13)

    def run(query, gate, *tensors):
        return nsa(query, tensors[:3], tensors[3:6], gate, [1, 13])

    assert torch.autograd.gradcheck(run, (query, gate, *keys, *values, *nsa.parameters()))


def test_a_short_sample_is_dense_in_the_select_branch():
    """A sample within the selection budget: plain causal attention."""
    nsa = make(CHIP)
    query, keys, values, gate = inputs_of(nsa, 700)
    out = nsa(query, keys, values, only(1, gate), [640, 700])
    causal = torch.ones(700, 700, dtype=torch.bool).tril()
    causal[640:, :640] = False
    dense, _ = oracle.dense_attention(query, keys[1], values[1], nsa.scale, causal)
    torch.testing.assert_close(out, dense, rtol=1e-12, atol=1e-12)


def test_rows_before_the_first_window_get_nothing_from_the_compressed_branch():
    nsa = make(CHIP)
    query, keys, values, gate = inputs_of(nsa, 40)
    out = nsa(query, keys, values, only(0, gate))
    assert not out[:31].any()
    assert out[31:].abs().amin() > 0
    gradients = torch.autograd.grad(out[:31].sum(), leaves(nsa, query, keys, values, gate)[:-1], allow_unused=True)
    assert not any(grad.any() for grad in gradients if grad is not None)


def test_gates_are_sigmoids_of_each_head_and_branch():
    """One token sees itself alone, and no window."""
    nsa = make(SMALL, 2, 1, (2, 1))
    query, keys, values, gate = inputs_of(nsa, 1)
    out = nsa(query, keys, values, gate)
    opened = 1 / (1 + torch.exp(-gate[0]))
    expected = opened[:, 1] * values[1].item() + opened[:, 2] * values[2].item()
    torch.testing.assert_close(out.flatten(), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("importance", ["ascend", "paper"])
def test_the_select_operator_gets_ascending_ids(monkeypatch, importance):
    """Its backward on the chip relies on the order; its forward does not show it."""
    nsa = make(SMALL | {"importance": importance})
    inputs, seen = inputs_of(nsa, 80), []
    select = library.select_attention
    monkeypatch.setattr(library, "select_attention", lambda *arguments: seen.append(arguments[3]) or select(*arguments))
    nsa(*inputs, [9, 80])
    assert torch.equal(seen[0], oracle.block(nsa, *inputs, [9, 80])[1].int())
    assert (seen[0].diff(dim=-1) > 0).all()


def test_one_key_and_value_serve_all_branches():
    nsa = make(SMALL)
    query, keys, values, gate = inputs_of(nsa, 50)
    out = nsa(query, keys[0], values[0], gate)
    assert torch.equal(out, nsa(query, (keys[0],) * 3, [values[0]] * 3, gate))
    assert not torch.equal(out, nsa(query, keys, values, gate))


def test_scale_is_the_head_dim_unless_given():
    config = NSAConfig(**SMALL)
    assert NativeSparseAttention(config, 2, 1, 16, 4).scale == 0.25
    assert NativeSparseAttention(config, 2, 1, 16, 4, scale=0.5).scale == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_types(dtype):
    """As close to float64 as its type allows, where the choice of blocks is the same."""
    nsa = make(SMALL | {"select_block_count": 100}, dtype=dtype)
    inputs = inputs_of(nsa, 60, dtype)
    out = nsa(*inputs)
    assert out.dtype == dtype
    exact = nsa.double()(*(x.double() if isinstance(x, torch.Tensor) else [y.double() for y in x] for x in inputs))
    unit = torch.finfo(dtype).eps
    assert (out.double() - exact).abs().max() < 8 * unit * exact.abs().max()


# ---- refusals


@pytest.mark.parametrize(
    ("heads", "dims", "words"),
    [
        ((5, 2), (64, 64), "head_num 5 is not a multiple of kv_head_num 2"),
        ((6, 2), (64, 64), "3 query heads a key/value head; .* 1, 2, 4, 8, 16 or 32; `strict: false`"),
        ((64, 1), (64, 64), "64 query heads a key/value head"),
        ((4, 2), (256, 128), "head dims 256 .* and 128 .* up to 192 and 128"),
        ((4, 2), (192, 192), "head dims 192 .* and 192"),
    ],
)
def test_heads_that_the_chip_does_not_take(heads, dims, words):
    with pytest.raises(ValueError, match=words):
        NativeSparseAttention(NSAConfig(), *heads, *dims)
    if "multiple" not in words:
        NativeSparseAttention(NSAConfig(strict=False), *heads, *dims)


@pytest.mark.parametrize(
    ("position", "change", "words"),
    [
        (0, lambda x: x[:, :3], r"query is \[9, 3, 6\]; allowed: \[9, 4, 6\]"),
        (1, lambda x: x[0][:8], r"key is \[8, 2, 6\]; allowed: \[9, 2, 6\]"),
        (1, lambda x: x[:2], "key has 2 tensors; allowed: one, or one for each of compress, select, window"),
        (1, lambda x: x[:1], "key has 1 tensors; allowed: one"),
        (2, lambda x: (x[0], x[1], x[2].float()), "value is torch.float32; allowed: one floating point type"),
        (2, lambda x: x[0][..., :4], r"value is \[9, 2, 4\]"),
        (3, lambda x: x[..., :2], r"gate is \[9, 4, 2\]; allowed: \[9, 4, 3\]"),
        (4, lambda x: [4, 8], r"actual_seq_len \[4, 8\] must be prefix sums that rise to the 9 tokens"),
        (4, lambda x: [5, 4, 9], "actual_seq_len"),
        (4, lambda x: [], "actual_seq_len"),
        (4, lambda x: [4.5, 9], "actual_seq_len"),
    ],
)
def test_inputs_that_do_not_fit(position, change, words):
    nsa = make(SMALL)
    arguments = [*inputs_of(nsa, 9), [9]]
    arguments[position] = change(arguments[position])
    with pytest.raises(ValueError, match=words):
        nsa(*arguments)


# ---- what it never builds


class LargestTensor(TorchDispatchMode):
    """The most elements that a tensor made inside had, inside the operators too."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mindspeed_nsa":
            with self:
                return getattr(reference, func._opname)(*args[:-1])
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_no_tensor_of_tokens_times_tokens():
    tokens, heads = 4096, 16
    nsa = make(CHIP, heads, 1, (8, 8), torch.float32)
    inputs = inputs_of(nsa, tokens, torch.float32)
    with LargestTensor() as spy:
        nsa(*inputs).sum().backward()
    # More than the input, as it sees inside; far less than [T, T] or [heads, T, T / 16].
    assert tokens * heads * 8 < spy.elements < tokens * tokens / 4


LONG = """
import torch
from mindspeed_nsa import NativeSparseAttention, NSAConfig
from mindspeed_nsa.bench.measure import peak_bytes
nsa = NativeSparseAttention(NSAConfig(backend="reference"), 2, 1, 32, 32)
shapes = ((2, 32), (1, 32), (1, 32), (2, 3))
inputs = [torch.randn(16384, *shape, requires_grad=True) for shape in shapes]
print(peak_bytes(lambda: nsa(*inputs).sum().backward()))
assert all(x.grad.isfinite().all() for x in inputs)
"""


@pytest.mark.slow
def test_long_samples_fit_in_memory():
    """One matrix of every query's scores, of both heads, would take 2.1e9 bytes."""
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 1e9


# ---- graphs


def test_compiled_equals_eager():
    nsa = make(SMALL, dtype=torch.float32)
    inputs, ends = inputs_of(nsa, 90, torch.float32), [1, 41, 90]
    compiled = torch.compile(nsa, backend="aot_eager", fullgraph=True)
    same(compiled(*inputs, ends), nsa(*inputs, ends), leaves(nsa, *inputs), 1e-6)


@pytest.mark.slow
def test_compiled_by_inductor():
    """Keys and values in another memory order, as a host that keeps [b, n, s, d] hands them over."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler on this machine")
    nsa = make(SMALL, dtype=torch.float32)
    query, keys, values, gate = inputs_of(nsa, 90, torch.float32)

    def run(query, key, value, gate):
        return nsa(query, key.transpose(0, 1), value.transpose(0, 1), gate)

    inputs = (query, keys[0].transpose(0, 1).contiguous(), values[0].transpose(0, 1).contiguous(), gate)
    inputs = [x.detach().requires_grad_() for x in inputs]
    same(torch.compile(run, fullgraph=True)(*inputs), run(*inputs), [*inputs, *nsa.parameters()], 1e-5)


def test_inference_leaves_nothing_behind_that_training_trips_over():
    """What a forward without autograd keeps for the next may not be a tensor that autograd refuses."""
    nsa = make(SMALL | {"compression": "mlp"})
    nsa.collect_statistics = True
    inputs = inputs_of(nsa, 37)
    with torch.inference_mode():
        expected = nsa(*inputs)
    out = nsa(*inputs)
    out.sum().backward()
    assert torch.equal(out, expected)


# ---- statistics


def test_statistics():
    """Gates open halfway; at the last of 96 tokens 3 of 4 blocks are forced."""
    nsa = make(SMALL)
    nsa.collect_statistics = True
    query, keys, values, gate = inputs_of(nsa, 96)
    nsa(query, keys, values, torch.zeros_like(gate))
    assert [nsa.statistics[f"gate_{name}"] for name in ("compress", "select", "window")] == [0.5] * 3
    visible, forced, distances = 0, 0, []
    _, ids = oracle.block(nsa, query, keys, values, gate, [96])
    for t in range(96):
        for row in ids[t].tolist():
            for block in (block for block in row if block <= t // 8):
                visible += 1
                is_forced = block == 0 or block >= t // 8 - 1
                forced += is_forced
                distances += [] if is_forced else [(t // 8 - block) * 8]
    assert nsa.statistics["forced_share"] == pytest.approx(forced / visible)
    assert nsa.statistics["scored_share"] == pytest.approx(1 - forced / visible)
    assert nsa.statistics["scored_distance"] == pytest.approx(sum(distances) / len(distances))
    nsa.collect_statistics, nsa.statistics = False, {}
    nsa(query, keys, values, gate)
    assert nsa.statistics == {}
