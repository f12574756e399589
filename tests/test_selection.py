"""Which blocks are chosen (design, rule 2)."""

import pytest
import torch
from choices import CHIP, SMALL, inputs, settings

from mindspeed_nsa import selection
from mindspeed_nsa.ops import library
from mindspeed_nsa.ops.reference import force, forced_blocks, top_blocks
from mindspeed_nsa.samples import Samples


def chosen(query, key, at):
    return selection.in_order(library.compress_attention(query, key, key, None, None, *at, "reference")[1])


@pytest.mark.parametrize("importance", ["ascend", "paper"])
@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["even", "peaked"])
def test_rules_of_the_choice(importance, spread):
    """Peaked: most probabilities underflow to 0, so that most scores tie."""
    samples = Samples((1400, 1401, 3000))
    at = settings(samples, CHIP, importance)
    ids = chosen(*inputs(samples, at, spread=spread), at)
    assert ids.shape == (3000, 2, 16)
    assert ids.dtype == torch.int32
    position = samples.whole.positions(torch.device("cpu"))
    own = (position // 64)[:, None]
    assert (ids.diff(dim=-1) > 0).all()  # ascending, unique
    assert (ids[..., 0] == 0).all()
    for forced in (own, (own - 1).clamp(min=0)):
        assert (ids == forced[:, None]).any(dim=-1).all()
    early = position < 1024
    assert (ids[early] == torch.arange(16)).all()
    assert (ids[~early] <= own[~early, None]).all()
    # Scored blocks differ from query to query and between groups.
    assert len(ids[~early].flatten(0, 1).unique(dim=0)) > 100
    assert not torch.equal(ids[:, 0], ids[:, 1])


@pytest.mark.parametrize(
    ("init_blocks", "local_blocks", "forced"),
    [(1, 2, [0, 8, 9]), (0, 1, [9]), (2, 3, [0, 1, 7, 8, 9]), (1, 1, [0, 9])],
)
def test_forced_blocks(init_blocks, local_blocks, forced):
    at = settings(Samples((200,)), SMALL, "ascend", init_blocks, local_blocks)
    rows = forced_blocks(torch.tensor([72, 79]), 25, at)
    assert [row.nonzero().flatten().tolist() for row in rows] == [forced, forced]
    assert forced_blocks(torch.tensor([0]), 25, at)[0].nonzero().flatten().tolist() == [0]


def test_without_the_own_block_only_blocks_before_it_are_chosen():
    """The best of those: the same scores choose them as choose among all."""
    samples = Samples((1400, 3000))
    at = settings(samples, CHIP)
    query, key = inputs(samples, at)
    ids, with_own = (chosen(query, key, at._replace(own_block=own)) for own in (False, True))
    position = samples.whole.positions(torch.device("cpu"))
    early, own = position < 1024, (position // 64)[:, None, None]
    assert torch.equal(ids[early], with_own[early])
    ids, with_own, own = ids[~early], with_own[~early], own[~early]
    assert (ids.diff(dim=-1) > 0).all()
    assert (ids < own).all()
    assert (ids == own - 1).any(dim=-1).all()
    # What a list has beside the own block it keeps; one more block takes its place.
    listed = torch.zeros(*ids.shape[:2], 47).scatter(-1, ids.long(), 1.0)
    kept = torch.zeros(*ids.shape[:2], 47).scatter(-1, with_own.long(), 1.0).scatter(-1, own.expand(-1, 2, 1), 0.0)
    assert (listed >= kept).all()


def test_order_of_the_choice():
    """Forced first by id, then by score, equal scores by id."""
    scores = torch.tensor([[[0.5, 3.0, 0.5, 1.0, 0.0, 3.0]]])
    forced = torch.tensor([[False, False, False, False, True, False]])
    assert top_blocks(force(scores, forced), 5).tolist() == [[[4, 1, 5, 3, 0]]]
    assert top_blocks(scores, 6).tolist() == [[[1, 5, 3, 0, 2, 4]]]
    assert selection.in_order(torch.tensor([[[4, 1, 5, 3, 0]]])).tolist() == [[[0, 1, 3, 4, 5]]]


def test_importance_is_summed_over_the_heads_of_a_group():
    """Swapping heads inside a group changes nothing; swapping them across groups does."""
    samples = Samples((120,))
    at = settings(samples, SMALL)
    query, key = inputs(samples, at)
    ids = chosen(query, key, at)
    assert torch.equal(ids, chosen(query[:, [1, 0, 3, 2]], key, at))
    assert not torch.equal(ids, chosen(query[:, [0, 2, 1, 3]], key, at))


def test_scores_are_the_chip_s_or_the_paper_s():
    samples = Samples((120,))
    at = settings(samples, SMALL)
    query, key = inputs(samples, at)
    assert not torch.equal(chosen(query, key, at), chosen(query, key, at._replace(importance="paper")))


# ---- statistics


def test_statistics_by_hand():
    """Two queries of 8-token blocks: at 0, with nothing but block 0 visible; at 47, in block 5, with blocks 0 2 4 5 listed."""
    samples = Samples((48,))
    at = settings(samples, SMALL)
    ids = torch.tensor([0, 1, 2, 3], dtype=torch.int32).repeat(48, 1, 1)
    ids[47, 0] = torch.tensor([0, 2, 4, 5])
    found = selection.statistics(ids, samples.whole.positions(ids.device), at)
    # Rows 0..7 see 1 block, 8..15 two, 16..23 three, 24..47 four; forced are 0, own, the one before.
    visible = 8 * (1 + 2 + 3 + 4 + 4 + 4)
    # Own block 3: 1 is scored. Own 4: 1 and 2; own 5: 1, 2, 3, but at 47 only 2.
    scored = 8 * 1 + 8 * 2 + 7 * 3 + 1
    distance = 8 * (8 * 2 + 8 * (3 + 2) + 7 * (4 + 3 + 2) + 3) / scored
    assert found["scored_share"] == pytest.approx(scored / visible)
    assert found["forced_share"] == pytest.approx(1 - scored / visible)
    assert found["scored_distance"] == pytest.approx(distance)


def test_statistics_where_nothing_is_scored():
    samples = Samples((1, 9))
    at = settings(samples, SMALL)
    ids = torch.arange(4, dtype=torch.int32).repeat(9, 2, 1)
    assert selection.statistics(ids, samples.whole.positions(ids.device), at) == {
        "forced_share": 1.0,
        "scored_share": 0.0,
        "scored_distance": 0.0,
    }
