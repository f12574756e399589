"""npu_nsa_compress and npu_nsa_compress_attention on the emulated CANN, by cases whose answer is known by hand."""

import math
from typing import Any

import pytest
import torch

from .kernels import Refused, Trap
from .kernels_common import FLT_MAX, samples
from .kernels_compress import _importance
from .kernels_testing import attention_outputs, call, close, gradient_outputs, oracle, statistics, true_order


def test_samples():
    """Where prefix sums fall the sample is empty: unused entries at the end may be 0."""
    assert samples("ends", [5, 5, 8, 0, 0], 8) == [(0, 5), (5, 5), (5, 8), (8, 8), (0, 0)]


# ---- compress


def compress(tokens, weight, ends, rows, **changes):
    given = {"compress_block_size": weight.shape[0], "compress_stride": 16, "actual_seq_len_type": 0, "actual_seq_len": ends}
    given |= {"input": tokens, "weight": weight, "output": torch.empty(rows, *tokens.shape[1:])}
    return call("aclnnNsaCompress", **given | changes).output


def test_compress_by_hand():
    """One-hot weights pick a token of each window; short samples and tails give nothing; the leading 0 is an empty sample."""
    ends = [0, 31, 95, 95, 127, 228]  # lengths 0, 31, 64, 0, 32, 101: windows 0, 0, 3, 0, 1, 5
    tokens = torch.arange(228).half()[:, None, None].expand(-1, 2, 16)
    weight = torch.zeros(32, 2).half()
    weight[5, 0], weight[31, 1] = 1, 2
    starts = torch.tensor([31, 47, 63, 95, 127, 143, 159, 175, 191])
    output = compress(tokens, weight, ends, 9)
    assert torch.equal(output[:, 0, 0], starts + 5.0)
    assert torch.equal(output[:, 1, 15], 2 * (starts + 31.0))


def test_compress_grad_by_hand():
    """Ones: a token's gradient counts its windows, a weight's sums what it was multiplied with."""
    tokens, weight = torch.arange(80).half()[:, None, None].expand(-1, 1, 16), torch.ones(32, 1).half()
    sizes: dict[str, Any] = {
        "compress_block_size": 32,
        "compress_stride": 16,
        "actual_seq_len_type": 0,
        "actual_seq_len": [70, 80],
    }
    outputs: dict[str, Any] = {"input_grad": torch.empty(80, 1, 16), "weight_grad": torch.empty(32, 1)}
    got = call("aclnnNsaCompressGrad", grad=torch.ones(3, 1, 16).half(), input=tokens, weight=weight, **sizes, **outputs)
    assert got.input_grad[:, 0, 3].tolist() == [1] * 16 + [2] * 32 + [1] * 16 + [0] * 16
    assert got.weight_grad[:, 0].tolist() == [16 * (j + (j + 16) + (j + 32)) for j in range(32)]


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (Refused, "not be empty", {"ends": [31, 62], "rows": 0}),
        (Refused, "weight must be", {"weight": torch.ones(32, 2).half()}),
        (Refused, "one type", {"weight": torch.ones(32, 1).bfloat16()}),
        (Refused, "multiples of 16 to 128", {"weight": torch.ones(24, 1).half()}),
        (Refused, "to the block size", {"compress_stride": 48}),
        (Refused, "D = 24", {"tokens": torch.ones(64, 1, 24).half()}),
        (Refused, "129 heads", {"tokens": torch.ones(64, 129, 16).half(), "weight": torch.ones(32, 129).half()}),
        (Refused, "prefix sums", {"actual_seq_len_type": 1}),
        (Refused, "missing", {"ends": None}),
        (Trap, "past the 64 tokens", {"ends": [80], "rows": 4}),
    ],
)
def test_compress_refusals_and_traps(error, message, changes):
    given = {"tokens": torch.ones(64, 1, 16).half(), "weight": torch.ones(32, 1).half(), "ends": [64], "rows": 3}
    assert (compress(**given) == 32).all()
    with pytest.raises(error, match=message):
        compress(**given | changes)


# ---- compress attention


def attend(query, key, value, q_ends, c_ends, count=4, variants="", scale=1.0, **changes):
    blocks = [-(-(b - a) // 4) for a, b in zip([0, *c_ends[:-1]], c_ends, strict=True)]
    given = {"compress_block_size": 32, "compress_stride": 16, "select_block_size": 64, "select_block_count": count}
    given |= {"query": query, "key": key, "value": value, "scale": scale, "head_num": query.shape[1], "sparse_mode": 1}
    given |= {"actual_seq_qlen": q_ends, "actual_cmp_seq_kvlen": c_ends}
    given |= {"actual_sel_seq_kvlen": torch.tensor(blocks).cumsum(0).tolist()}
    given |= attention_outputs(query, value)
    given |= {"topk_indices": torch.empty(query.shape[0], key.shape[1], count, dtype=torch.int32)}
    return call("aclnnNsaCompressAttention", variants, **given | changes)


def zeros(tokens, heads=1, dim=16):
    return torch.zeros(tokens, heads, dim).half()


def ramp(tokens):
    return torch.arange(tokens).half()[:, None, None].expand(-1, 1, 16)


def test_uniform_weights_masks_and_the_order_of_statistics():
    """Queries of 0 see row + 1 windows: the sum counts them, the output is their mean; statistics lie by sample and head."""
    query, key, value = zeros(6, heads=2), zeros(128), torch.cat([ramp(64), ramp(64)])
    mask = torch.ones(4, 64, dtype=torch.bool).triu(1)
    mask[1] = True  # sees nothing, and so everything
    out = attend(query, key, value, [2, 6], [64, 128], atten_mask=mask)
    rows = torch.tensor([1.0, 64, 1, 64, 3, 4])
    assert torch.equal(true_order(out.softmax_sum, [2, 6]), rows[:, None].expand(-1, 2))
    assert out.softmax_sum.flatten()[:: 8 * 2][:2].tolist() == [1, 1]  # not [T, N1, 8]: head 0 and head 1 of sample 0
    lowest = torch.tensor([0, -FLT_MAX, 0, -FLT_MAX, 0, 0])
    assert torch.equal(true_order(out.softmax_max, [2, 6])[:, 1], lowest)
    torch.testing.assert_close(out.attention[:, 1, 7], torch.tensor([0, 31.5, 0, 31.5, 1, 1.5]))


def test_importance_by_hand():
    probability = torch.tensor([0.5, 0.25, 0.0, 0.125, 0.0625, 0.0625])[None, None]
    assert _importance(probability, 4, 2).flatten().tolist() == [0.5 + 2 * (0.25 + 0 + 0.125) + 0.0625, 0.0625 + 2 * 0.0625]
    assert _importance(probability, 4, 1).flatten().tolist() == [0.25 + 0 + 0.125 + 0.0625, 0.0625]  # window 0 counts nowhere
    first = 3 * 0.5 + 4 * 0.25 + 3 * 0 + 2 * 0.125 + 0.0625
    assert _importance(probability, 4, 4).flatten().tolist() == [first, 0 + 2 * 0.125 + 3 * 0.0625 + 4 * 0.0625]


@pytest.mark.parametrize(
    ("window", "forced", "variants", "ids"),
    [
        (20, (), "", [4, 5, 0, 1]),  # the last of block 4's windows and the first of block 5's: a tie
        (20, (), "ties_reversed", [5, 4, 15, 14]),
        (21, (), "", [5, 0, 1, 2]),
        (21, (9, 2), "", [2, 9, 5, 0]),
        (21, (9, 2), "ties_reversed", [9, 2, 5, 15]),
        (21, (3, 5, 7, 11, 13), "", [3, 5, 7, 11]),
    ],
)
def test_choice(window, forced, variants, ids):
    """All weight on one window, some blocks forced."""
    mask, topk_mask = torch.ones(1, 64, dtype=torch.uint8), torch.zeros(1, 16, dtype=torch.uint8)
    mask[0, window], topk_mask[0, list(forced)] = 0, 1
    out = attend(zeros(1), zeros(64), zeros(64), [1], [64], variants=variants, atten_mask=mask, topk_mask=topk_mask)
    assert out.topk_indices.flatten().tolist() == ids


def test_group_chooses_together():
    """Three of a group's four heads look at window 41, one at 21; the other group's all at 61."""
    query, key = zeros(1, heads=8), zeros(64, heads=2)
    query[0, :3, 0], query[0, 3, 1], query[0, 4:, 2] = 20, 20, 20
    key[41, 0, 0], key[21, 0, 1], key[61, 1, 2] = 20, 20, 20
    out = attend(query, key, key, [1], [64], count=2)
    assert out.topk_indices[0].tolist() == [[10, 5], [15, 0]]


def test_masks_are_read_by_an_assumed_stride():
    """A mask wider than the longest sample is misread from its second row on, one with fewer cells is read past its end."""
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[0, :64], mask[1, 10] = False, False
    out = attend(zeros(2), zeros(64), ramp(64), [2], [64], atten_mask=mask)
    assert out.attention[1, 0, 0] == 26  # what lies 64 places on, at row 1 column 10, is place 90 - 64
    with pytest.raises(Trap, match="past the end"):
        attend(zeros(2), zeros(64), zeros(64), [2], [64], atten_mask=mask[:, :60])
    with pytest.raises(Trap, match="past the end"):
        attend(zeros(2), zeros(64), zeros(64), [2], [64], topk_mask=mask[:, :15])
    # The stride is the longest sample's in every sample.
    mask = torch.ones(1, 64, dtype=torch.bool)
    mask[0, 50] = False
    out = attend(zeros(2), zeros(116), ramp(116), [1, 2], [64, 116], atten_mask=mask)
    assert out.attention[:, 0, 0].tolist() == [50, 114]


def test_gradient_is_fusion_attentions():
    """Two samples through the forward, and what it returned through npu_fusion_attention_grad, against float64."""
    q_ends, c_ends = [50, 120], [61, 130]
    query, key, value, grad = (
        torch.randn(n, h, d).half() for n, h, d in ((120, 4, 32), (130, 2, 32), (130, 2, 16), (120, 4, 16))
    )
    mask = torch.rand(70, 69) < 0.5
    mask[:, 0] = False
    out = attend(query, key, value, q_ends, c_ends, scale=0.3, atten_mask=mask, count=16)
    given = {"query": query, "key": key, "value": value, "grad": grad, "attention": out.attention.half(), "atten_mask": mask}
    given |= {name: getattr(out, name) for name in statistics(query)} | gradient_outputs(query, key, value)
    settings: dict[str, Any] = {
        "scale": 0.3,
        "keep_prob": 1.0,
        "pre_tokens": 1 << 31,
        "next_tokens": 1 << 31,
        "head_num": 4,
        "sparse_mode": 1,
    }
    lists: dict[str, Any] = {"actual_seq_qlen": q_ends, "actual_seq_kvlen": c_ends}
    got = call("aclnnFlashAttentionUnpaddingScoreGrad", **given, **settings, **lists)
    exact = [x.double().requires_grad_() for x in (query, key, value)]
    parts = []
    for rows, cells in ((slice(0, 50), slice(0, 61)), (slice(50, 120), slice(61, 130))):
        seen = ~mask[: rows.stop - rows.start, : cells.stop - cells.start]
        parts.append(oracle(exact[0][rows], exact[1][cells], exact[2][cells], 0.3, seen.expand(2, -1, -1)))
    attention = torch.cat(parts)
    close(out.attention, attention, 1e-5)
    for name, expected in zip(("query", "key", "value"), torch.autograd.grad(attention, exact, grad.double()), strict=True):
        close(getattr(got, f"{name}_grad"), expected, 1e-3)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (Refused, "15 blocks, fewer", {"c_ends": [60]}),
        (Refused, "sample 1 has 0 blocks", {"q_ends": [2, 2], "c_ends": [64, 64]}),
        (Refused, "14001", {"key": zeros(14001), "value": zeros(14001), "c_ends": [14001]}),
        (Refused, "must divide 128", {"query": zeros(2, heads=3), **attention_outputs(zeros(2, heads=3), zeros(1))}),
        (Refused, "one type", {"query": zeros(2).bfloat16()}),
        (Refused, "above 768", {"query": zeros(2, dim=784), "key": zeros(64, dim=784)}),
        (Refused, "at least value's", {"value": zeros(64, dim=32)}),
        (Refused, "must not fall", {"compress_block_size": 96}),
        (Refused, "compress_stride 80", {"compress_stride": 80}),
        (Refused, "1 to 32", {"count": 33}),
        (Refused, "bool or uint8", {"atten_mask": torch.zeros(2, 64)}),
        (Refused, "one entry", {"q_ends": [1, 2]}),
        (Trap, "more than 0 and 1", {"atten_mask": torch.full((2, 64), 255, dtype=torch.uint8)}),
        (Trap, "too few", {"c_ends": [60], "actual_sel_seq_kvlen": [16]}),
    ],
)
def test_refusals_and_traps(error, message, changes):
    given = {"query": zeros(2), "key": zeros(64), "value": zeros(64), "q_ends": [2], "c_ends": [64], "count": 16}
    assert sorted(attend(**given).topk_indices[1, 0].tolist()) == list(range(16))
    with pytest.raises(error, match=message):
        attend(**given | changes)


def test_scale_comes_before_the_mask():
    """A scale above 1 makes no infinity of what is masked."""
    mask = torch.ones(1, 64, dtype=torch.bool)
    out = attend(zeros(1), zeros(64), ramp(64), [1], [64], scale=4.0, atten_mask=mask)
    assert math.isfinite(out.attention[0, 0, 0]) and out.attention[0, 0, 0] == 31.5
