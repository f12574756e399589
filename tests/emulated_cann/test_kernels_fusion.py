"""npu_fusion_attention on the emulated CANN, by cases whose answer is known by hand, and against float64."""

import pytest
import torch

from .kernels import Refused, Trap
from .kernels_testing import attention_outputs, call, close, gradient_outputs, oracle, statistics, true_order

TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
ALL = 2147483647


def forward(query, key, value, q_ends, kv_ends, sparse_mode=4, mask=TRIANGLE, window=512, variants="", **changes):
    given = {"query": query, "key": key, "value": value, "atten_mask": mask, "head_num": query.shape[1], "scale": 0.1}
    given |= {"keep_prob": 1.0, "pre_tokens": window - 1, "next_tokens": 0, "sparse_mode": sparse_mode}
    given |= {"actual_seq_qlen": q_ends, "actual_seq_kvlen": kv_ends} | attention_outputs(query, value)
    return call("aclnnFlashAttentionVarLenScore", variants, **given | changes)


def backward(out, grad, **changes):
    given = {name: value for name, value in vars(out).items() if name != "softmax_out"}
    given |= {"attention": out.attention.to(grad.dtype), "grad": grad, **gradient_outputs(out.query, out.key, out.value)}
    return call("aclnnFlashAttentionUnpaddingScoreGrad", **given | changes)


def zeros(tokens, heads=1, dim=16):
    return torch.zeros(tokens, heads, dim).bfloat16()


@pytest.mark.parametrize(
    ("sparse_mode", "seen"),
    [
        (2, lambda s: s + 1),
        (3, lambda s: s + 101),
        (4, lambda s: min(s + 101, 512)),
    ],
)
def test_keys_seen(sparse_mode, seen):
    """Queries of 0: the sum counts the keys seen. Modes 3 and 4 align the ends; the band counts the query's own token."""
    out = forward(zeros(600), zeros(700), zeros(700), [600], [700], sparse_mode)
    assert out.softmax_sum[:, 0, 0].tolist() == [seen(s) for s in range(600)]


def test_no_mask_disables_the_mode():
    assert (forward(zeros(600), zeros(700), zeros(700), [600], [700], mask=None).softmax_sum == 700).all()


def test_mode_0_is_mask_and_band():
    """Both from the first token on."""
    mask = torch.zeros(8, 10, dtype=torch.uint8)
    mask[5, 5] = 1
    settings = {"pre_tokens": 2, "next_tokens": 1}
    out = forward(zeros(8), zeros(10), zeros(10), [8], [10], 0, mask, **settings)
    assert out.softmax_sum[:, 0, 0].tolist() == [2, 3, 4, 4, 4, 3, 4, 4]


@pytest.mark.parametrize("sparse_mode", [1, 2, 3, 4])
def test_both_directions_against_float64(sparse_mode):
    """Packed samples, one empty, whose statistics lie by sample."""
    q_ends, kv_ends = [40, 40, 100, 0], [50, 50, 150, 0]
    query, key, value, grad = (
        torch.randn(n, h, d).half() for n, h, d in ((100, 6, 32), (150, 2, 32), (150, 2, 16), (100, 6, 16))
    )
    full = torch.rand(60, 100) < 0.5
    full[:, 3] = False
    out = forward(query, key, value, q_ends, kv_ends, sparse_mode, full if sparse_mode == 1 else TRIANGLE, window=20)
    got = backward(out, grad)
    exact = [x.double().requires_grad_() for x in (query, key, value)]
    parts, sums = [], []
    for rows, keys in ((slice(0, 40), slice(0, 50)), (slice(40, 100), slice(50, 150))):
        q, k = rows.stop - rows.start, keys.stop - keys.start
        ones = torch.ones(q, k)
        band = ones.tril(k - q) * ones.triu(k - q - 19)
        seen = {1: (~full[:q, :k]).float(), 2: ones.tril(), 3: ones.tril(k - q), 4: band}[sparse_mode]
        parts.append(oracle(exact[0][rows], exact[1][keys], exact[2][keys], 0.1, seen.expand(2, -1, -1)))
        logits = torch.einsum("qnd,knd->qnk", exact[0][rows], exact[1][keys].repeat_interleave(3, 1)) * 0.1
        sums.append((logits + seen.double().log()[:, None]).logsumexp(-1))
    attention = torch.cat(parts)
    close(out.attention, attention, 1e-5)
    close(true_order(out.softmax_max, [40, 100]) + true_order(out.softmax_sum, [40, 100]).log(), torch.cat(sums), 1e-5)
    for name, expected in zip(("query", "key", "value"), torch.autograd.grad(attention, exact, grad.double()), strict=True):
        close(getattr(got, f"{name}_grad"), expected, 1e-3)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (Refused, "sparse_mode 5", {"sparse_mode": 5}),
        (Refused, "dropout", {"keep_prob": 0.9}),
        (Refused, "pse", {"pse": torch.zeros(1)}),
        (Refused, "at least value's", {"value": zeros(10, dim=32)}),
        (Refused, "must be equal", {"value": zeros(10, dim=8), "variants": "refuses_unequal_dims"}),
        (Refused, "257 query heads", {"query": zeros(8, 257), "head_num": 257}),
        (Refused, r"must be \[8, 10\]", {"sparse_mode": 1}),
        (Refused, "one entry", {"kv_ends": [5, 10]}),
        (Refused, "BSH", {"layout": "BSH"}),
        (Trap, "upper triangle", {"mask": TRIANGLE.T}),
        (Trap, "upper triangle", {"mask": TRIANGLE[:1024, :1024]}),
        (Trap, "every key masked", {"sparse_mode": 1, "mask": torch.ones(8, 10, dtype=torch.bool)}),
        (Trap, "every key masked", {"kv_ends": [7]}),
        (Trap, "no keys", {"q_ends": [4, 8], "kv_ends": [10, 10]}),
    ],
)
def test_refusals_and_traps(error, message, changes):
    given = {"query": zeros(8), "key": zeros(10), "value": zeros(10), "q_ends": [8], "kv_ends": [10]}
    assert not forward(**given).attention.any()
    with pytest.raises(error, match=message):
        forward(**given | changes)


def test_backward_traps_a_row_with_everything_masked():
    mask = torch.zeros(8, 10, dtype=torch.bool)
    out = forward(zeros(8), zeros(10), zeros(10), [8], [10], 1, mask)
    assert not backward(out, zeros(8)).query_grad.any()
    mask[3] = True
    with pytest.raises(Trap, match="every key masked"):
        backward(out, zeros(8))
    mask[3, 9] = False
    with pytest.raises(Refused, match="softmax_sum"):
        backward(out, zeros(8), softmax_sum=statistics(zeros(9))["softmax_sum"])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_of_equal_sequences_is_packed_samples(batch):
    """SBH against TND: the same attention, statistics and gradients, moved to where each layout has them."""
    length, heads, kv_heads, dim = 40, 4, 2, 16
    query, key, value, grad = (torch.randn(length, batch, n * dim) for n in (heads, kv_heads, kv_heads, heads))

    def packed(tensor):
        return tensor.transpose(0, 1).reshape(batch * length, -1, dim)

    ends = [length * (b + 1) for b in range(batch)]
    expected = forward(packed(query), packed(key), packed(value), ends, ends, 2)
    expected_grads = backward(expected, packed(grad))
    given = {"query": query, "key": key, "value": value, "atten_mask": TRIANGLE, "head_num": heads, "scale": 0.1}
    given |= {"keep_prob": 1.0, "pre_tokens": ALL, "next_tokens": 0, "sparse_mode": 2, "layout": "SBH"}
    rooms = {name: torch.empty(batch, heads, length, 8) for name in ("softmax_max", "softmax_sum")}
    out = call("aclnnFlashAttentionScore", **given, **rooms, attention=torch.empty_like(query))
    assert torch.equal(packed(out.attention), expected.attention)
    assert torch.equal(out.softmax_sum.flatten(), expected.softmax_sum.flatten())
    saved = {name: getattr(out, name) for name in ("softmax_max", "softmax_sum", "attention")}
    gradients = {f"{name}_grad": torch.empty_like(x) for name, x in (("query", query), ("key", key), ("value", value))}
    grads = call("aclnnFlashAttentionScoreGrad", **given, **saved, **gradients, grad=grad)
    for name in gradients:
        assert torch.equal(packed(getattr(grads, name)), getattr(expected_grads, name)), name
