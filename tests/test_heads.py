import pytest

from mindspeed_nsa.heads import HeadSplit, split_heads


def test_by_hand():
    assert split_heads(8, 2, 1, 0) == HeadSplit(8, 2, 0, (0,))
    assert [split_heads(8, 2, 2, rank) for rank in range(2)] == [HeadSplit(4, 1, 0, (0,)), HeadSplit(4, 1, 1, (1,))]
    assert [split_heads(8, 2, 4, rank) for rank in range(4)] == [
        HeadSplit(2, 1, 0, (0, 1)),
        HeadSplit(2, 1, 0, (0, 1)),
        HeadSplit(2, 1, 1, (2, 3)),
        HeadSplit(2, 1, 1, (2, 3)),
    ]


@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 4), (16, 2), (32, 1), (12, 6), (96, 8)])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
def test_every_head_has_its_group(heads, groups, size):
    if heads % size or (groups % size and size % groups):
        with pytest.raises(ValueError):
            split_heads(heads, groups, size, 0)
        return
    seen = []
    for rank in range(size):
        split = split_heads(heads, groups, size, rank)
        per_group = split.head_num // split.kv_head_num
        first_head = rank * split.head_num
        for head in range(split.head_num):
            group = (first_head + head) * groups // heads  # in the whole model
            assert split.first_kv_head + head // per_group == group
            seen.append(first_head + head)
        assert rank in split.sharers
        assert all(split_heads(heads, groups, size, other).first_kv_head == split.first_kv_head for other in split.sharers)
        assert len(split.sharers) == max(size // groups, 1)
    assert seen == list(range(heads))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((8, 3, 1), "num_attention_heads 8 is not a multiple of num_query_groups 3"),
        ((8, 2, 3), "num_attention_heads 8 is not a multiple of tensor_model_parallel_size 3"),
        ((12, 6, 4), "num_query_groups 6 and tensor_model_parallel_size 4 do not divide one another"),
        ((12, 4, 6), "num_query_groups 4 and tensor_model_parallel_size 6 do not divide one another"),
    ],
)
def test_heads_that_do_not_divide(arguments, words):
    with pytest.raises(ValueError, match=words):
        split_heads(*arguments, 0)
