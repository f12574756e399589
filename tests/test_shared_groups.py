"""A key/value head whose query heads are spread over ranks attends and chooses as on one, both ways."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from choices import SMALL, inputs, settings

from mindspeed_nsa import shared_groups
from mindspeed_nsa.ops import library
from mindspeed_nsa.samples import Samples

ENDS = (1, 90, 90, 121, 200)
WAYS = {"queries brought together": shared_groups.attend_for_all, "scores summed": shared_groups.compress_attention}


class Case(NamedTuple):
    ranks: int
    group: int  # query heads of a key/value head, on all ranks
    kv_heads: int = 1

    def own(self, tensor, rank):
        """A rank's heads of [T, N1, D]."""
        return tensor.unflatten(1, (self.kv_heads, self.ranks, -1))[:, :, rank].flatten(1, 2)


CASES = [Case(ranks, group) for ranks in (2, 4) for group in (2, 4, 8, 16) if group >= ranks] + [Case(2, 4, kv_heads=2)]


def tensors(case):
    """Settings; query, key, value and the gradient of the attention, of all ranks."""
    torch.manual_seed(CASES.index(case))
    samples = Samples(ENDS)
    at = settings(samples, SMALL)
    query, key = inputs(samples, at, case.group * case.kv_heads, case.kv_heads)
    return at, [x.double() for x in (query, key, torch.randn(*key.shape[:2], 5), torch.randn(*query.shape[:2], 5))]


def own_bytes(x):
    """Of a tensor's elements; copies that are one in memory count once."""
    return x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


def attend(way, grad, *operands):
    """Attention, ids, and the gradients for query, key and value."""
    leaves = [x.detach().contiguous().requires_grad_() for x in operands]
    attention, ids = way(*leaves)
    assert not ids.requires_grad
    kept = [x for x in attention.grad_fn.saved_tensors if x is not None]
    assert all(x.untyped_storage().nbytes() == own_bytes(x) for x in kept), "views keep what other ranks' heads took"
    return attention.detach(), ids, *torch.autograd.grad(attention, leaves, grad)


def on_one_of_four_ranks(rank, folder):
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 4), rank=rank, world_size=4)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = {}
    for case in CASES:
        group = dist.group.WORLD if case.ranks == 4 else pairs[rank // 2]
        at, (query, key, value, grad) = tensors(case)
        own = case.own(grad, group.rank()), case.own(query, group.rank()), key, value
        for name, way in WAYS.items():
            results[(*case, name)] = attend(lambda *x, way=way, more=(at, group, "reference"): way(*x, *more), *own)
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of four ranks found; where two share a head, the other two did the same."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_one_of_four_ranks, (folder,), nprocs=4)
    return [torch.load(folder / str(rank)) for rank in range(4)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_attend_and_choose_as_one(ranks, case, way):
    """Each has attention and gradient of its own heads, all have the same ids; gradients of keys and values add up."""
    at, (query, key, value, grad) = tensors(case)
    attention, ids, *grads = attend(
        lambda *x: library.compress_attention(*x, None, None, *at, "reference")[:2], grad, query, key, value
    )
    found = [rank[(*case, way)] for rank in ranks[: case.ranks]]
    for rank, (own_attention, own_ids, own_grad, *_) in enumerate(found):
        assert torch.equal(own_ids, ids)
        same(own_attention, case.own(attention, rank))
        same(own_grad, case.own(grads[0], rank))
    for place in (1, 2):
        same(sum(result[2 + place] for result in found), grads[place])


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_the_comparison_is_about_a_choice_that_no_rank_has_alone():
    for case in CASES:
        at, (query, key, value, _) = tensors(case)
        ids, own = (
            library.compress_attention(heads.contiguous(), key, value, None, None, *at, "reference")[1]
            for heads in (query, case.own(query, 0))
        )
        assert (ids != own).any(dim=-1).sum() > 20


# ---- scores summed


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("importance", ["ascend", "paper"])
@pytest.mark.parametrize("rows", [1, 1024])
def test_choosing_together_is_choosing(alone, monkeypatch, rows, importance):
    """Whatever parts the scores are summed in, and though these end with the block of their last row."""
    monkeypatch.setattr(shared_groups, "_SCORE_ROWS", rows)
    for own_block in (True, False):
        samples = Samples((1, 100, 100, 131, 200))
        at = settings(samples, SMALL, importance, own_block=own_block)
        query, key = inputs(samples, at)
        fused = library.compress_attention(query, key, key, None, None, *at, "reference")[1]
        assert torch.equal(shared_groups.compress_attention(query, key, key, at, alone, "reference")[1], fused)


def test_queries_that_start_within_their_sample_choose_together(alone):
    """A late part of a sample: its early rows and its blocks count from the start of the sample."""
    samples = Samples((200,))
    at = settings(samples, SMALL)
    query, key = inputs(samples, at)
    whole = library.compress_attention(query, key, key, None, None, *at, "reference")[1]
    for first, last in ((10, 60), (50, 90)):
        part = samples.part(first, last)
        windows = part.windows(SMALL["window"], SMALL["stride"])
        here = at._replace(q_len=part.q_len, q_offset=part.q_offset, cmp_len=[windows.stop])
        ids = shared_groups.compress_attention(query[first:last], key[windows], key[windows], here, alone, "reference")[1]
        assert torch.equal(ids, whole[first:last])


def test_scores_are_sent_up_to_the_block_of_the_last_row(alone, monkeypatch):
    """Nothing that no row sees, and nothing of rows that have no choice: half of all scores, in a long sample."""
    sent = []
    monkeypatch.setattr(shared_groups, "_SCORE_ROWS", 40)
    monkeypatch.setattr(dist, "all_reduce", lambda scores, group: sent.append(tuple(scores.shape)))
    samples = Samples((20, 150))
    at = settings(samples, SMALL)
    query, key = inputs(samples, at)
    shared_groups.compress_attention(query, key, key, at, alone, "reference")
    assert sent == [(40, 2, 9), (40, 2, 14), (18, 2, 17)]


def test_scores_of_ranks_add_up():
    samples = Samples((90, 91, 200))
    at = settings(samples, SMALL)
    query, key = inputs(samples, at, heads=4, kv_heads=1)

    def scores(heads):
        statistics = library.compress_attention(heads, key, key, None, None, *at, "reference")[2:]
        return library.block_scores(heads, key, *statistics, 10, 190, *at, "reference")

    torch.testing.assert_close(scores(query[:, :2]) + scores(query[:, 2:]), scores(query), rtol=1e-5, atol=1e-6)
