"""npu_nsa_select_attention on the emulated CANN, by cases whose answer is known by hand, and against float64."""

import math
import random

import pytest
import torch

from .kernels import Refused, Trap
from .kernels_common import FLT_MAX
from .kernels_testing import attention_outputs, call, close, gradient_outputs, oracle

MASK = torch.ones(2, 3, dtype=torch.bool)  # any will do
BLOCK, COUNT = 64, 16
SIZES = {"select_block_size": BLOCK, "select_block_count": COUNT, "sparse_mode": 2}


def forward(query, key, value, ids, q_len, kv_len, mask=MASK, scale=0.1, variants="", **changes):
    given = {"head_num": query.shape[1], "atten_mask": mask, "scale": scale, **SIZES, **attention_outputs(query, value)}
    given |= {"query": query, "key": key, "value": value, "topk_indices": ids}
    given |= {"actual_seq_qlen": q_len, "actual_seq_kvlen": kv_len}
    return call("aclnnNsaSelectedAttention", variants, **given | changes)


def backward(query, key, value, ids, q_len, kv_len, grad, seen=None, scale=0.1, variants="", deterministic=False, **changes):
    """`seen`: what the forward returned; else statistics that make the probability of each visible slot 1, if query is 0."""
    flat = {"attention": torch.zeros_like(grad), "softmax_max": torch.zeros(*query.shape[:2], 8)}
    flat["softmax_sum"] = torch.ones_like(flat["softmax_max"])
    if seen is not None:
        flat = {name: getattr(seen, name) for name in flat} | {"attention": seen.attention.to(grad.dtype)}
    given = {"head_num": query.shape[1], "scale": scale, **SIZES, **flat, **gradient_outputs(query, key, value)}
    given |= {"query": query, "key": key, "value": value, "topk_indices": ids, "grad": grad}
    given |= {"actual_seq_qlen": q_len, "actual_seq_kvlen": kv_len}
    return call("aclnnNsaSelectedAttentionGrad", variants, deterministic, **given | changes)


def zeros(tokens, heads=1, dim=192):
    return torch.zeros(tokens, heads, dim, dtype=torch.bfloat16)


def block_numbers(keys):
    """Values that hold the id of their block."""
    return (torch.arange(keys) // BLOCK).bfloat16()[:, None, None].expand(-1, 1, 128)


def as_list(*ids):
    return torch.tensor(ids, dtype=torch.int32)[None, None]


# ---- forward


def test_mask_is_a_switch_and_aligns_at_the_first_token():
    """Uniform weights: with a mask of any shape query s sees s + 1 keys, without one all."""
    query, key, value, ids = zeros(66), zeros(1088), block_numbers(1088), as_list(*range(16)).repeat(66, 1, 1)
    out = forward(query, key, value, ids, [66], [1088])
    assert out.softmax_sum[:, 0, 0].tolist() == list(range(1, 67))
    assert out.softmax_sum.unique(dim=-1).shape[-1] == 1
    assert not out.softmax_max.any()
    assert out.attention[65, 0, 0].item() == pytest.approx(2 / 66)
    for other in (
        forward(*(query, key, value, ids, [66], [1088]), mask=None),
        forward(*(query, key, value, ids, [66], [1088]), variants="forward_ignores_mask"),
    ):
        assert (other.softmax_sum == 1024).all()
        torch.testing.assert_close(other.attention, torch.full_like(other.attention, 7.5))
    assert torch.equal(out.attention, forward(query, key, value, ids, [66], [1088], mask=~MASK).attention)


def test_masks_by_block_id_and_counts_repeats():
    """Query 200 of a list in any order: block 2 twice and the own block 3 up to the query; later blocks not at all."""
    query, key, value = zeros(201), zeros(2048), block_numbers(2048)
    ids = as_list(*range(16)).repeat(201, 1, 1)
    ids[200, 0] = torch.tensor([30, 2, 3, 2, *range(18, 30)])
    out = forward(query, key, value, ids, [201], [2048])
    assert out.softmax_sum[200, 0, 0] == 64 + 64 + 9
    assert out.attention[200, 0, 0].item() == pytest.approx((2 * 128 + 3 * 9) / 137)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_row_with_only_future_blocks(scale):
    """All logits equal: uniform over the future. Replaced before scaling, so a scale above 1 overflows."""
    out = forward(zeros(1), zeros(2048), block_numbers(2048), as_list(*range(16, 32)), [1], [2048], scale=scale)
    attention, row_max = out.attention[0, 0, 0].item(), out.softmax_max[0, 0, 0].item()
    if scale > 1:
        assert math.isnan(attention)
    else:
        assert (attention, row_max, out.softmax_sum[0, 0, 0].item()) == (23.5, -FLT_MAX * scale, 1024)


def test_list_is_read_as_memory():
    """A list for each query head is taken for the lists of other rows."""
    query, key, value = zeros(2, heads=2), zeros(2048), block_numbers(2048)
    lists = torch.stack([torch.arange(first, first + 16) for first in (0, 1, 2, 3)]).view(2, 2, 16).int()
    out = forward(query, key, value, lists, [2], [2048], mask=None)
    assert out.attention[:, 0, 0].tolist() == [7.5, 8.5]
    with pytest.raises(Trap, match="past the end"):
        forward(query, key, value, lists[:, :1, :8], [2], [2048])


# ---- forward and backward together


def right_lists(tokens, kv_heads):
    """What makes the two directions agree: 0 to 15 before token 1024, then sorted with 0 and the own block."""
    rows = []
    for s in range(tokens):
        for _ in range(kv_heads):
            past = sorted(random.sample(range(1, s // BLOCK), 14)) if s >= 1024 else []
            rows.append([0, *past, s // BLOCK] if past else list(range(16)))
    return torch.tensor(rows, dtype=torch.int32).view(tokens, kv_heads, COUNT)


def counts(ids, keys):
    """How often a query sees each key, [N2, S, keys]."""
    listed = torch.zeros(ids.shape[1], ids.shape[0], keys // BLOCK)
    listed.scatter_add_(-1, ids.transpose(0, 1).long(), torch.ones(ids.shape[1], ids.shape[0], COUNT))
    return listed.repeat_interleave(BLOCK, -1).tril()


@pytest.mark.parametrize(("deterministic", "variants"), [(False, ""), (True, ""), (False, "backward_compares_ids")])
def test_both_directions_against_float64(deterministic, variants):
    """Two samples, with the basic kernel and the general one."""
    random.seed(0)
    heads, kv_heads = 4, 2
    lengths, ends = (1088, 1024), [1088, 2112]
    query, key, value, grad = (
        torch.randn(ends[-1], n, d).half() for n, d in ((heads, 192), (kv_heads, 192), (kv_heads, 128), (heads, 128))
    )
    ids = torch.cat([right_lists(length, kv_heads) for length in lengths])
    if variants:  # then any order will do
        ids = ids[..., torch.randperm(COUNT)]
    out = forward(query, key, value, ids, ends, ends)
    got = backward(query, key, value, ids, ends, ends, grad, out, variants=variants, deterministic=deterministic)
    exact = [x.double().requires_grad_() for x in (query, key, value)]
    parts = []
    for start, stop in ((0, 1088), (1088, 2112)):
        q, k, v = (x[start:stop] for x in exact)
        parts.append(oracle(q, k, v, 0.1, counts(ids[start:stop], stop - start)))
    attention = torch.cat(parts)
    close(out.attention, attention, 1e-5)
    wanted = torch.autograd.grad(attention, exact, grad.double())
    for actual, expected in zip((got.query_grad, got.key_grad, got.value_grad), wanted, strict=True):
        close(actual, expected, 1e-3)  # the attention that goes back in was rounded


def test_what_comes_later_changes_no_bit():
    """Other keys, values and lists from token 1100 on leave the outputs before it as they were."""
    query, key, value = torch.randn(1536, 2, 192).half(), torch.randn(1536, 1, 192).half(), torch.randn(1536, 1, 128).half()
    before = forward(query, key, value, right_lists(1536, 1), [1536], [1536])
    ids = right_lists(1536, 1)
    ids[:1100] = before.topk_indices[:1100]
    key[1100:], value[1100:] = 3, -3
    after = forward(query, key, value, ids, [1536], [1536])
    assert torch.equal(before.attention[:1100], after.attention[:1100])
    assert not torch.equal(before.attention[1100:], after.attention[1100:])


def visible(lists, first, mask, tokens=4096):
    """Sums of random marks of the slots that each direction sees, row by row [rows, 127] each.

    The marks ride on values forward and on keys backward, where every probability is 1 and so is its gradient.
    """
    query = zeros(tokens)
    marks = torch.randint(0, 16, (tokens, 1, 127))
    value = torch.cat([torch.ones(tokens, 1, 1), marks], dim=-1).bfloat16()
    key = torch.cat([value, torch.zeros(tokens, 1, 64)], dim=-1).bfloat16()
    ids = as_list(*range(16)).repeat(tokens, 1, 1)
    ids[first : first + len(lists), 0] = torch.tensor(lists, dtype=torch.int32)
    out = forward(query, key, value, ids, [tokens], [tokens], mask)
    grad = zeros(tokens, dim=128)
    grad[..., 0] = 1
    back = backward(query, key, value, ids, [tokens], [tokens], grad, scale=1.0)
    rows = slice(first, first + len(lists))
    return (out.attention * out.softmax_sum[..., :1])[rows, 0].round(), back.query_grad[rows, 0, :128]


def ascending(s):
    return list(range(16)) if s < 1024 else [0, *sorted(random.sample(range(1, s // BLOCK), 14)), s // BLOCK]


def best_first(s):
    """As compress attention returns it: block 0, the own one, the past by score, the future by id."""
    own, ids = s // BLOCK, ascending(s)
    past = random.sample([b for b in ids if 0 < b < own], sum(0 < b < own for b in ids))
    return [*dict.fromkeys((0, own)), *past, *(b for b in ids if b > own)]


def shuffled(s):
    return random.sample(ascending(s), 16)


def past(s):
    return sorted(random.sample(range(s // BLOCK), 16))


def past_repeated(s):
    ids = list(range(min(s // BLOCK, 16)))
    return (ids + ids[-1:] * 16)[:16]


@pytest.mark.parametrize(
    ("mask", "lists", "first", "last", "differ"),
    [
        (MASK, ascending, 0, 4096, lambda s: False),
        (MASK, best_first, 0, 4096, lambda s: 128 <= s < 1023),
        (MASK, shuffled, 1023, 4096, lambda s: False),
        (None, ascending, 0, 4096, lambda s: s < 1023 or s % 64 != 63),
        (None, past, 1024, 4096, lambda s: False),
        (MASK, past, 1024, 4096, lambda s: False),
        (None, past_repeated, 64, 512, lambda s: True),
        (None, past_repeated, 512, 1024, lambda s: False),
        (MASK, past_repeated, 512, 1024, lambda s: False),
    ],
)
def test_rows_in_which_the_directions_differ(mask, lists, first, last, differ):
    """The basic kernel's rules by place in the list against the forward's by id (section 6.3)."""
    random.seed(0)
    forth, back = visible([lists(s) for s in range(first, last)], first, mask)
    assert (forth != back).any(-1).tolist() == [differ(s) for s in range(first, last)]


# ---- the general backward


@pytest.mark.parametrize(("group", "deterministic", "first_token"), [(1, True, 0), (17, False, 0), (16, False, 64)])
def test_general_backward_takes_a_prefix_for_the_list(group, deterministic, first_token):
    """Query 70 with its block 1 first: tokens 0 to 6 are taken, and their gradient goes to tokens 64 to 70.

    The basic kernel, of up to 16 heads a group, takes tokens 64 to 70.
    """
    query, key, value, grad = zeros(71, group), zeros(1024), zeros(1024, dim=128), zeros(71, group, 128)
    key[:, 0, 0] = torch.arange(1024)
    value[..., 0], grad[70] = 1, 1
    ids = as_list(*range(16)).repeat(71, 1, 1)
    ids[70, 0, :2] = torch.tensor([1, 0])
    got = backward(query, key, value, ids, [71], [1024], grad, deterministic=deterministic, scale=1.0)
    assert got.value_grad[:, 0, 0].nonzero().flatten().tolist() == list(range(64, 71))
    assert (got.query_grad[70, :, 0] == sum(range(first_token, first_token + 7))).all()


def test_general_backward_reads_a_stale_workspace():
    """The own block not where it is looked for: nothing is masked, and what was not gathered is anything."""
    query, key, value = zeros(2), zeros(1024), zeros(1024, dim=128)
    ids = as_list(*reversed(range(16))).repeat(2, 1, 1)
    ids[0, 0] = torch.arange(16)
    got = backward(query, key, value, ids, [2], [1024], zeros(2, dim=128), deterministic=True)
    assert not got.query_grad[0].any()
    assert got.query_grad[1].isnan().all()
    # Slots 0 and 1 are tokens 960 and 961; the other slots of the list are stale.
    assert (~got.key_grad[:, 0, 0].isnan()).nonzero().flatten().tolist() == [960, 961]


# ---- what is refused, and what is a trap


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (Refused, "float32", {"query": torch.zeros(4, 1, 192), "key": torch.zeros(1024, 1, 192)}),
        (Refused, "960 keys", {"actual_seq_kvlen": [960]}),
        (Refused, "1000 keys", {"actual_seq_kvlen": [1000]}),
        (Refused, "0 queries", {"actual_seq_qlen": [4, 4], "actual_seq_kvlen": [1024, 1024]}),
        (Refused, "one entry", {"actual_seq_qlen": [2, 4]}),
        (Refused, "missing", {"actual_seq_qlen": None}),
        (
            Refused,
            "more than 32",
            {"query": zeros(4, 33), "head_num": 33, **attention_outputs(zeros(4, 33), zeros(1, dim=128))},
        ),
        (Refused, "head_num", {"head_num": 2}),
        (Refused, "int32", {"topk_indices": as_list(*range(16)).repeat(4, 1, 1).long()}),
        (Refused, "from 1025", {"variants": "refuses_shortest_keys"}),
        (Trap, "2048 x 2048", {"variants": "forward_reads_mask"}),
        (Trap, "multiples of 16", {"value": zeros(1024, dim=72)}),
        (Trap, "past the 4 tokens", {"actual_seq_qlen": [5]}),
        (Trap, "-1 to 14", {"topk_indices": as_list(*range(-1, 15)).repeat(4, 1, 1)}),
        (Trap, "1 to 16 of sample 0", {"topk_indices": as_list(*range(1, 17)).repeat(4, 1, 1)}),
    ],
)
def test_refusals_and_traps(error, message, changes):
    given = {"query": zeros(4), "key": zeros(1024), "value": zeros(1024, dim=128)}
    given |= {"ids": as_list(*range(16)).repeat(4, 1, 1), "q_len": [4], "kv_len": [1024]}
    assert not forward(**given).attention.isnan().any()
    renamed = {"topk_indices": "ids", "actual_seq_qlen": "q_len", "actual_seq_kvlen": "kv_len"}
    with pytest.raises(error, match=message):
        forward(**given | {renamed.get(name, name): value for name, value in changes.items()})


def test_backward_refuses_statistics_and_traps_ids():
    given = (zeros(4), zeros(1024), zeros(1024, dim=128))
    ids, grad = as_list(*range(16)).repeat(4, 1, 1), zeros(4, dim=128)
    with pytest.raises(Refused, match="softmax_max"):
        backward(*given, ids, [4], [1024], grad, softmax_max=torch.zeros(4, 1))
    with pytest.raises(Trap, match="1 to 16"):
        backward(*given, ids + 1, [4], [1024], grad)


def test_too_many_samples():
    keys = zeros(1, dim=192).expand(1025 * 1024, -1, -1)
    lists = as_list(*range(16)).expand(1025, -1, -1)
    with pytest.raises(Refused, match="1025 samples"):
        forward(*(zeros(1025), keys, keys[..., :128], lists), list(range(1, 1026)), list(range(1024, 1025 * 1024 + 1, 1024)))
