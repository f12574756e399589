"""The reference against the oracle, in float64 unless a test says otherwise."""

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Sizes, prefix_sums

from mindspeed_nsa.ops import library, reference

SMALL = Sizes(window=4, stride=2, block=8, count=3)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
F64 = torch.float64


def rand(*shape, dtype=F64, grad=True):
    return torch.randn(shape, dtype=F64).to(dtype).requires_grad_(grad)


def qkv(q_tokens, kv_tokens, heads=4, kv_heads=2, dims=(6, 5), dtype=F64):
    return (
        rand(q_tokens, heads, dims[0], dtype=dtype),
        rand(kv_tokens, kv_heads, dims[0], dtype=dtype),
        rand(kv_tokens, kv_heads, dims[1], dtype=dtype),
    )


def windows(lengths, sizes=SMALL):
    return [len(oracle.window_starts(length, sizes)) for length in lengths]


def compress_attention(query, key, value, topk_mask, atten_mask, q_lengths, c_lengths, sizes=SMALL, scale=0.7):
    """By masks, as the operator has it."""
    blocks = [-(-c // (sizes.block // sizes.stride)) for c in c_lengths]
    lists = (prefix_sums(q_lengths), prefix_sums(c_lengths), prefix_sums(blocks), [0] * len(blocks))
    settings = (scale, *sizes, False, 0, 0, True, "ascend", *lists)
    return library.compress_attention(query, key, value, topk_mask, atten_mask, *settings, "reference")


def per_sample(row, ends):
    """[T, N1] in the memory order of compress attention: [N1, S_b, 8], sample after sample."""
    return torch.cat([row[start:stop].T[..., None].expand(-1, -1, 8).flatten() for start, stop in oracle.spans(ends)])


def same_gradients(actual, expected, inputs):
    """Both outputs give the inputs the same gradients."""
    weight = torch.randn_like(actual)
    got = torch.autograd.grad((actual * weight).sum(), inputs)
    # With nothing seen anywhere, the oracle's zeros know of no input.
    seen = expected.requires_grad
    wanted = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True) if seen else [None] * len(inputs)
    for a, b, x in zip(got, wanted, inputs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(x) if b is None else b, **CLOSE)


# ---- by hand


def test_compress_by_hand():
    tokens = torch.arange(1.0, 8.0, dtype=F64).reshape(7, 1, 1)  # 1 2 3 4 5 | 6 7
    weight = torch.tensor([[1.0], [10.0], [100.0]], dtype=F64)
    pooled = library.compress(tokens, weight, 3, 2, [5, 7], "reference")
    assert pooled.flatten().tolist() == [321.0, 543.0]


def test_importance_by_hand():
    """Windows of 2 strides, blocks of 4: 1, 2, 2, 2, 1 from the window that starts with the block."""
    probability = torch.tensor([0.5, 0.25, 0.0, 0.125, 0.0625, 0.0625], dtype=F64)
    query, key = torch.ones(1, 1, 1, dtype=F64), probability.clamp(min=1e-300).log().reshape(6, 1, 1)
    at = (1.0, 4, 2, 8, 0, True, 1, 2, True, "ascend", [100], [6], [2], [0])
    query = query.repeat(100, 1, 1)
    _, _, row_max, row_sum = library.compress_attention(query, key, key, None, None, *at, "reference")
    scores = library.block_scores(query, key, row_max, row_sum, 99, 100, *at, "reference")
    torch.testing.assert_close(scores.flatten().tolist(), [0.5 + 0.5 + 0.25 + 0.0625, 0.0625 + 0.125])
    paper = (*at[:9], "paper", *at[10:])
    scores = library.block_scores(query, key, row_max, row_sum, 99, 100, *paper, "reference")
    torch.testing.assert_close(scores.flatten().tolist(), [2 * 0.5 + 2 * 0.25 + 0.125, 0.125 + 2 * 0.0625 + 2 * 0.0625])


def test_select_by_hand():
    """Logits ln 1, ln 2, ln 3, ln 4 over blocks of 2; block 1 listed twice weighs twice."""
    key = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64).log().reshape(4, 1, 1)
    value = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=F64).reshape(4, 1, 1)
    query = torch.ones(1, 1, 1, dtype=F64)
    ids = torch.tensor([[[1, 0, 1]]], dtype=torch.int32)
    out, row_max, row_sum = library.select_attention(query, key, value, ids, 1.0, 2, False, False, [1], [4], [0], "reference")
    assert out.item() == pytest.approx((1 + 20 + 2 * 300 + 2 * 4000) / (1 + 2 + 2 * 3 + 2 * 4))
    assert row_max.flatten().tolist() == [math.log(4)] * 8
    assert row_sum.flatten().tolist() == pytest.approx([17 / 4] * 8)


def test_window_by_hand():
    value = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=F64).reshape(4, 1, 1)
    flat = torch.zeros(4, 1, 1, dtype=F64)
    out = library.window_attention(flat, flat, value, 1.0, 2, [3, 4], [3, 4], [0, 0], "reference")[0]
    assert out.flatten().tolist() == [1.0, 1.5, 3.0, 8.0]
    # One query, three keys: aligned at the end.
    out = library.window_attention(flat[:1], flat[:3], value[:3], 1.0, 2, [1], [3], [2], "reference")[0]
    assert out.item() == 3.0


def test_ties_go_to_the_lower_id_and_forced_blocks_first():
    """64 equal windows score alike: 8/64 a block, 7/64 the last, which loses a window."""
    flat = torch.zeros(64, 1, 2, dtype=F64)
    query, sizes = flat[:1], Sizes(4, 2, 8, 5)
    ids = compress_attention(query, flat, flat, None, None, [1], [64], sizes)[1]
    assert ids.flatten().tolist() == [0, 1, 2, 3, 4]
    topk_mask = torch.zeros(1, 16, dtype=torch.bool)
    topk_mask[0, [15, 3]] = True
    ids = compress_attention(query, flat, flat, topk_mask, None, [1], [64], sizes)[1]
    assert ids.flatten().tolist() == [3, 15, 0, 1, 2]


def test_last_block_loses_what_lies_past_the_windows():
    flat = torch.zeros(64, 1, 2, dtype=F64)
    ids = compress_attention(flat[:1], flat, flat, None, None, [1], [64], Sizes(4, 2, 8, 16))[1]
    assert ids.flatten().tolist() == list(range(16))
    key = flat.clone()
    key[60:] = 0.01  # windows 60 to 63, all of the last block, a little above the others
    ids = compress_attention(torch.ones(1, 1, 2, dtype=F64), key, flat, None, None, [1], [64], Sizes(4, 2, 8, 1))[1]
    # Block 14 holds windows 56 to 60 with weights 1 2 2 2 1: 8 and a little; block 15 has 7 and a little more.
    assert ids.item() == 14


# ---- against the oracle

PACKED = [1, 9, 3, 0, 16, 23]


@pytest.mark.parametrize("sizes", [SMALL, Sizes(4, 4, 8, 3), Sizes(5, 3, 9, 2), Sizes(6, 2, 6, 2)])
def test_compress(sizes):
    tokens, weight = rand(sum(PACKED), 3, 5), rand(sizes.window, 3)
    ends = prefix_sums(PACKED)
    out = library.compress(tokens, weight, sizes.window, sizes.stride, ends, "reference")
    expected = oracle.compress(tokens, weight, sizes, ends)
    torch.testing.assert_close(out, expected, **CLOSE)
    same_gradients(out, expected, (tokens, weight))


def test_compress_of_short_samples_is_empty():
    tokens, weight = rand(6, 2, 3), rand(4, 2)
    out = library.compress(tokens, weight, 4, 2, [3, 6], "reference")
    assert out.shape == (0, 2, 3)
    assert [g.abs().sum().item() for g in torch.autograd.grad(out.sum(), (tokens, weight))] == [0, 0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (2, 2), (32, 1)])
def test_compress_attention(masked, heads, kv_heads):
    c_lengths, q_lengths = [9, 14, 12], [4, 1, 7]
    query, key, value = qkv(sum(q_lengths), sum(c_lengths), heads, kv_heads)
    topk_mask = torch.rand(7, 4) < 0.3 if masked else None
    atten_mask = torch.rand(7, 14) < 0.5 if masked else None
    out, ids, row_max, row_sum = compress_attention(query, key, value, topk_mask, atten_mask, q_lengths, c_lengths)
    ends = prefix_sums(q_lengths)
    expected, expected_ids = oracle.compress_attention(
        query, key, value, 0.7, SMALL, topk_mask, atten_mask, ends, prefix_sums(c_lengths)
    )
    torch.testing.assert_close(out, expected.out, **CLOSE)
    assert ids.dtype == torch.int32
    assert ids.tolist() == expected_ids.tolist()
    torch.testing.assert_close(row_max.flatten(), per_sample(expected.highest, ends), **CLOSE)
    torch.testing.assert_close(row_sum.flatten(), per_sample(expected.total, ends), **CLOSE)
    same_gradients(out, expected.out, (query, key, value))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_fully_masked_row_is_uniform_and_moves_no_query_or_key(dtype):
    query, key, value = qkv(3, 9)
    atten_mask = torch.zeros(3, 9, dtype=dtype)
    atten_mask[1] = 1
    out, _, row_max, row_sum = compress_attention(query, key, value, None, atten_mask, [3], [9])
    torch.testing.assert_close(out[1], value.mean(dim=0).repeat_interleave(2, dim=0), **CLOSE)
    # One sample of three queries in memory: [N1, 3, 8].
    assert row_max.view(4, 3, 8)[:, 1].unique().tolist() == [torch.finfo(torch.float32).min]
    assert row_sum.view(4, 3, 8)[:, 1].unique().tolist() == [9.0]
    grad_query, grad_key, grad_value = torch.autograd.grad(out[1].sum(), (query, key, value))
    assert not grad_query.any()
    assert not grad_key.any()
    torch.testing.assert_close(grad_value, torch.full_like(value, 2 / 9), **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (32, 1)])
def test_select_attention(causal, heads, kv_heads):
    """Odd lengths, Sq != Skv, random lists with repeats; with `causal` some rows see nothing at all."""
    q_lengths, kv_lengths = [1, 20, 11], [5, 13, 24]
    query, key, value = qkv(sum(q_lengths), sum(kv_lengths), heads, kv_heads)
    blocks = torch.repeat_interleave(torch.tensor([2, 4, 6]), torch.tensor(q_lengths))
    ids = (torch.rand(32, kv_heads, 3) * blocks[:, None, None]).int()
    assert any(len(set(row)) < 3 for row in ids.flatten(0, 1).tolist())
    ends = (prefix_sums(q_lengths), prefix_sums(kv_lengths))
    out, row_max, row_sum = library.select_attention(query, key, value, ids, 0.7, 4, causal, False, *ends, [0] * 3, "reference")
    expected = oracle.select_attention(query, key, value, ids, 0.7, 4, causal, *ends)
    torch.testing.assert_close(out, expected.out, **CLOSE)
    torch.testing.assert_close(row_max, expected.highest[..., None].expand(-1, -1, 8), **CLOSE)
    torch.testing.assert_close(row_sum, expected.total[..., None].expand(-1, -1, 8), **CLOSE)
    same_gradients(out, expected.out, (query, key, value))


def test_select_is_aligned_at_the_first_token():
    """One query before many keys sees the first of them."""
    query, key, value = qkv(1, 8, 1, 1)
    ids = torch.zeros(1, 1, 1, dtype=torch.int32)
    out = library.select_attention(query, key, value, ids, 0.7, 4, True, False, [1], [8], [0], "reference")[0]
    torch.testing.assert_close(out[0, 0], value[0, 0], **CLOSE)


@pytest.mark.parametrize("window_size", [1, 3, 100])
@pytest.mark.parametrize("longer", ["keys", "queries", "neither"])
def test_window_attention(window_size, longer):
    q_lengths, kv_lengths = [1, 13, 7, 0], [3, 21, 7, 2]
    if longer == "queries":
        q_lengths, kv_lengths = kv_lengths, q_lengths
    elif longer == "neither":
        kv_lengths = q_lengths
    query, key, value = qkv(sum(q_lengths), sum(kv_lengths))
    ends = (prefix_sums(q_lengths), prefix_sums(kv_lengths))
    out, row_max, row_sum = library.window_attention(
        query, key, value, 0.7, window_size, *ends, reference.aligned_at_ends(*ends), "reference"
    )
    expected = oracle.window_attention(query, key, value, 0.7, window_size, *ends)
    torch.testing.assert_close(out, expected.out, **CLOSE)
    torch.testing.assert_close(row_max, expected.highest[..., None].expand(-1, -1, 8), **CLOSE)
    torch.testing.assert_close(row_sum, expected.total[..., None].expand(-1, -1, 8), **CLOSE)
    same_gradients(out, expected.out, (query, key, value))


SAMPLES = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(lambda lengths: sum(lengths) > 0)


@settings(max_examples=20, deadline=None)
@given(lengths=SAMPLES, group=st.integers(1, 5), importance=st.sampled_from(["ascend", "paper"]), per_window=st.integers(1, 4))
def test_causal_compress_attention(lengths, group, importance, per_window):
    """The rules by position stand in for the masks: windows that have ended, forced blocks, early rows."""
    torch.manual_seed(0)
    sizes = Sizes(2 * per_window, 2, 8, 3)
    c_lengths, ends = windows(lengths, sizes), prefix_sums(lengths)
    query, key, value = qkv(sum(lengths), sum(c_lengths), group, 1)
    lists = (ends, prefix_sums(c_lengths), prefix_sums([-(-length // 8) for length in lengths]))
    at = (0.7, *sizes, True, 1, 1, True, importance, *lists, [0] * len(lengths))
    out, ids, row_max, row_sum = library.compress_attention(query, key, value, None, None, *at, "reference")
    scores = library.block_scores(query, key, row_max, row_sum, 0, sum(lengths), *at, "reference")

    def seen(t, _):
        sample, position = oracle.place(t, ends)
        start, stop = oracle.spans(lists[1])[sample]
        return [(c, False) for c in range(start, stop) if (c - start) * 2 + sizes.window - 1 <= position]

    expected = oracle.attend(query, key, value, 0.7, seen)
    torch.testing.assert_close(out, expected.out, **CLOSE)
    torch.testing.assert_close(row_max.flatten(), per_sample(expected.highest, ends), **CLOSE)
    torch.testing.assert_close(row_sum.flatten(), per_sample(expected.total, ends), **CLOSE)
    same_gradients(out, expected.out, (query, key, value))
    of_head = oracle.operator_scores if importance == "ascend" else oracle.overlap_scores
    for t in range(sum(lengths)):
        sample, position = oracle.place(t, ends)
        blocks = -(-lengths[sample] // 8)
        wanted = torch.tensor([of_head(p.detach(), blocks, sizes) for p in expected.probability[t]], dtype=F64).sum(dim=0)
        torch.testing.assert_close(scores[t, 0, :blocks], wanted, **CLOSE)
        assert not scores[t, 0, blocks:].any()
        own = position // 8
        listed = [0, 1, 2] if position < 24 else oracle.best(wanted.tolist(), [0, own], 3)
        assert ids[t, 0].tolist() == listed


# ---- gradients by finite differences


def first(op, *arguments):
    out = op(*arguments, "reference")
    return out[0] if isinstance(out, tuple) else out


def test_gradcheck():
    tokens, weight = rand(11, 2, 2), rand(4, 2)
    assert torch.autograd.gradcheck(lambda *x: first(library.compress, *x, 4, 2, [1, 11]), (tokens, weight))
    query, key, value = qkv(4, 9, 2, 1, (3, 2))
    atten_mask = torch.rand(3, 5) < 0.4
    lists = [1, 4], [4, 9], [1, 3], [0, 0]
    at = (None, atten_mask, 0.7, 4, 2, 4, 1, False, 0, 0, True, "ascend", *lists)
    assert torch.autograd.gradcheck(lambda *x: first(library.compress_attention, *x, *at), (query, key, value))
    ids = torch.tensor([[[0, 1]], [[0, 0]], [[1, 2]], [[2, 0]]], dtype=torch.int32)
    for causal in (False, True):
        at = (ids, 0.7, 2, causal, False, [1, 4], [4, 9], [0, 0])
        assert torch.autograd.gradcheck(lambda *x, at=at: first(library.select_attention, *x, *at), (query, key, value))
    at = (0.7, 2, [1, 4], [4, 9], [3, 2])
    assert torch.autograd.gradcheck(lambda *x: first(library.window_attention, *x, *at), (query, key, value))


# ---- how it computes


def everything(seed=1):
    """Outputs and gradients of the three attentions on one packed input."""
    torch.manual_seed(seed)
    lengths = [70, 1, 130]
    ends, c_lengths = prefix_sums(lengths), windows(lengths)
    query, key, value = qkv(201, 201)
    blocks = prefix_sums([-(-length // 8) for length in lengths])
    at = (0.7, *SMALL, True, 1, 1, True, "ascend", ends, prefix_sums(c_lengths), blocks, [0] * 3)
    small_key, small_value = key[: sum(c_lengths)], value[: sum(c_lengths)]
    compressed, ids, *statistics = library.compress_attention(query, small_key, small_value, None, None, *at, "reference")
    scores = library.block_scores(query, small_key, *statistics, 30, 180, *at, "reference")
    selected = library.select_attention(query, key, value, ids, 0.7, 8, True, False, ends, ends, [0] * 3, "reference")
    window = library.window_attention(query, key, value, 0.7, 13, ends, ends, [0] * 3, "reference")
    gradients = torch.autograd.grad(sum(x.sin().sum() for x in (compressed, selected[0], window[0])), (query, key, value))
    return ids, (compressed, *statistics, scores, *selected, *window, *gradients)


@pytest.mark.parametrize("elements", [1, 1 << 30])
def test_chunk_size_does_not_matter(monkeypatch, elements):
    ids, results = everything()
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", elements)
    other_ids, other_results = everything()
    assert torch.equal(ids, other_ids)
    for a, b in zip(results, other_results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_types_are_within_a_rounding(dtype):
    """Sums are kept in float32 and rounded once, so a result is off by half a unit in the last place of its type."""
    query, key, value = qkv(40, 40, dtype=dtype)
    weight = rand(4, 2, dtype=dtype)
    ids = torch.tensor([0, 2, 4], dtype=torch.int32).repeat(40, 2, 1)

    def results(query, key, value, weight):
        pooled = library.compress(key, weight, 4, 2, [40], "reference")
        cmp = compress_attention(query, key, value, None, None, [40], [40])
        select = library.select_attention(query, key, value, ids, 0.7, 8, True, False, [40], [40], [0], "reference")
        window = library.window_attention(query, key, value, 0.7, 9, [40], [40], [0], "reference")
        outs = (pooled, cmp[0], select[0], window[0])
        grads = torch.autograd.grad(sum((out * out.detach().sign()).sum() for out in outs), (query, key, value, weight))
        return (*outs, *grads), (*cmp[2:], *select[1:], *window[1:])

    inputs = (query, key, value, weight)
    rounded, statistics = results(*inputs)
    exact, exact_statistics = results(*(x.detach().double().requires_grad_() for x in inputs))
    unit = torch.finfo(dtype).eps
    for a, b in zip(rounded[:4], exact[:4], strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=unit / 2 * 1.01 if unit > 1e-6 else 1e-5, atol=1e-5)
    for a, b in zip(rounded[4:], exact[4:], strict=True):
        # Three branches, each rounded.
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= 4 * unit * b.abs().max() + 1e-5
    for a, b in zip(statistics, exact_statistics, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_inputs_need_not_be_contiguous():
    tokens, weight = rand(11, 2, 3), rand(4, 2)
    query, key, value = qkv(11, 11)
    odd = [x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for x in (query, key, value, tokens)]
    for a, b in (
        (library.compress(tokens, weight, 4, 2, [11], "reference"), library.compress(odd[3], weight, 4, 2, [11], "reference")),
        *zip(
            library.window_attention(query, key, value, 0.7, 4, [11], [11], [0], "reference"),
            library.window_attention(*odd[:3], 0.7, 4, [11], [11], [0], "reference"),
            strict=True,
        ),
    ):
        torch.testing.assert_close(a, b, **CLOSE)


def test_seen_windows_are_counted():
    assert [reference.window_count(length, 32, 16) for length in (0, 31, 32, 47, 48, 1024)] == [0, 0, 1, 1, 2, 63]
    assert reference.lengths([3, 3, 10]) == [3, 0, 7]


# ---- queries that are a part of their sample


@pytest.mark.parametrize("cuts", [[100], [1, 23, 24, 64, 99, 100], [0, 50, 50, 100]])
def test_pieces_of_a_sample_are_the_whole(cuts):
    """Each piece against all keys: outputs, statistics, scores, ids and gradients of the sample that was not cut."""
    query, key, value = qkv(100, 100)
    small_key, small_value = (x[: windows([100])[0]] for x in (key, value))
    offsets = [0, *cuts[:-1]]

    def results(q_ends, copies, offsets):
        def ends(of_sample):
            return prefix_sums([of_sample] * copies)

        at = (0.7, *SMALL, True, 1, 1, True, "ascend", q_ends, ends(len(small_key)), ends(13), offsets)
        few = small_key.repeat(copies, 1, 1), small_value.repeat(copies, 1, 1)
        all_keys = key.repeat(copies, 1, 1), value.repeat(copies, 1, 1)
        compressed, ids, *statistics = library.compress_attention(query, *few, None, None, *at, "reference")
        scores = library.block_scores(query, few[0], *statistics, 30, 95, *at, "reference")
        lists = (q_ends, ends(100), offsets, "reference")
        selected = library.select_attention(query, *all_keys, ids, 0.7, 8, True, False, *lists)
        window = library.window_attention(query, *all_keys, 0.7, 13, *lists)
        outs = compressed, selected[0], window[0]
        gradients = torch.autograd.grad(sum(out.sin().sum() for out in outs), (query, key, value))
        return ids, (compressed, scores, *selected, *window, *gradients)

    ids, whole = results([100], 1, [0])
    piece_ids, pieces = results(cuts, len(cuts), offsets)
    assert torch.equal(ids, piece_ids)
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_window_past_the_last_key_is_empty():
    query, key, value = qkv(3, 5)
    out, row_max, row_sum = library.window_attention(query, key, value, 0.7, 4, [3], [5], [7], "reference")
    expected = library.window_attention(query[:1], key[4:], value[4:], 0.7, 1, [1], [1], [0], "reference")[0]
    torch.testing.assert_close(out[:1], expected, **CLOSE)  # token 7 sees tokens 4 to 7, of which 4 is there
    assert not any(x[1:].any() for x in (out, row_max, row_sum))


# ---- the gates


@pytest.mark.parametrize("gate_type", [torch.float32, F64])
def test_gated_sum(gate_type):
    gate, branches = rand(7, 4, 3, dtype=gate_type), [rand(7, 4, 5) for _ in range(3)]
    out = library.gated_sum(gate, *branches, "reference")
    expected = sum(torch.sigmoid(gate[..., i, None]) * branch for i, branch in enumerate(branches))
    close = CLOSE if gate_type == F64 else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(out, expected, **close)
    weight = torch.randn_like(out)
    gradients = (torch.autograd.grad(x, (gate, *branches), weight) for x in (out, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **close)
