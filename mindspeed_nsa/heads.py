"""Which query heads and key/value groups a rank holds."""

from typing import NamedTuple


class HeadSplit(NamedTuple):
    """One rank's heads.

    Attributes:
        head_num: its query heads.
        kv_head_num: its key/value groups.
        first_kv_head: the first of them in the whole model.
        sharers: the ranks that hold query heads of the same groups, itself included.
    """

    head_num: int
    kv_head_num: int
    first_kv_head: int
    sharers: tuple[int, ...]


def split_heads(
    num_attention_heads: int, num_query_groups: int, size: int, rank: int, over: str = "tensor_model_parallel_size"
) -> HeadSplit:
    """Split heads over `size` ranks as Megatron-core does over tensor-parallel ones: query heads in order, with their groups.

    Where there are more ranks than groups, a group is held by several ranks, each with some of its query heads.

    Args:
        num_attention_heads: query heads to split.
        num_query_groups: their key/value groups.
        size: how many ranks there are.
        rank: which of them.
        over: what an error calls `size`.

    Raises:
        ValueError: the heads do not divide.
    """
    if num_attention_heads % num_query_groups:
        raise ValueError(f"num_attention_heads {num_attention_heads} is not a multiple of num_query_groups {num_query_groups}")
    if num_attention_heads % size:
        raise ValueError(f"num_attention_heads {num_attention_heads} is not a multiple of {over} {size}")
    if num_query_groups % size and size % num_query_groups:
        raise ValueError(f"num_query_groups {num_query_groups} and {over} {size} do not divide one another")
    if num_query_groups >= size:
        kv_head_num = num_query_groups // size
        return HeadSplit(num_attention_heads // size, kv_head_num, rank * kv_head_num, (rank,))
    ranks_per_group = size // num_query_groups
    group = rank // ranks_per_group
    sharers = tuple(range(group * ranks_per_group, (group + 1) * ranks_per_group))
    return HeadSplit(num_attention_heads // size, 1, group, sharers)
