"""Floating point operations of one NSA layer: the matrix products of its attention, counted as Megatron counts a dense one's.

A product of [m, k] and [k, n] is 2 * m * k * n. What is not a product (softmax, sums of scores, top-k, gates) is left out, and
so is what a kernel does beyond the model: heads padded to a width, scores computed anew in the backward pass.
"""

from typing import NamedTuple

from .config import NSAConfig


class Flops(NamedTuple):
    """Of one forward pass; a training step takes three times as much, one for each direction's products.

    Attributes:
        compression: pooling keys and values.
        compress: attention to compressed tokens.
        select: to selected blocks.
        window: to the sliding window.
        projections: from the hidden states to what a dense layer has not: the other branches' keys and values, the gates.
    """

    compression: int
    compress: int
    select: int
    window: int
    projections: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def layer_flops(
    nsa: NSAConfig, length: int, head_num: int, kv_head_num: int, qk_head_dim: int, v_head_dim: int, hidden_size: int
) -> Flops:
    """Count the forward pass of one layer on one sequence, beyond `linear_qkv` and `linear_proj`, which a dense layer has too.

    Args:
        nsa: settings.
        length: tokens of the sequence, one sample.
        head_num: query heads of the whole model.
        kv_head_num: key/value heads of the whole model.
        qk_head_dim: dim of queries and keys.
        v_head_dim: dim of values.
        hidden_size: of the model.
    """
    windows = max((length - nsa.compress_block_size) // nsa.compress_stride + 1, 0)
    compress, select, window = (2 * pairs * head_num * (qk_head_dim + v_head_dim) for pairs in visible_keys(nsa, length))
    gates = head_num * 3
    branch_kv = 2 * kv_head_num * (qk_head_dim + v_head_dim) if nsa.separate_kv else 0
    from_hidden = branch_kv + (gates if nsa.gate == "hidden" else 0)
    from_query = qk_head_dim * (gates if nsa.gate == "query" else 0)
    return Flops(
        windows * kv_head_num * sum(_pooling(nsa, dim) for dim in (qk_head_dim, v_head_dim)),
        compress,
        select,
        window,
        2 * length * (hidden_size * from_hidden + from_query),
    )


def dense_flops(length: int, head_num: int, qk_head_dim: int, v_head_dim: int) -> int:
    """What Megatron counts for the core of one dense causal layer on one sequence, forward: half of the square."""
    return length * length * head_num * (qk_head_dim + v_head_dim)


def visible_keys(nsa: NSAConfig, length: int) -> tuple[int, int, int]:
    """Pairs of a query and a key that it sees, for one head and one sample: (compress, select, window).

    A query sees the windows that end at it or before, all tokens up to itself while they fit in `select_block_count` blocks and
    that many blocks afterwards, its own up to itself, and the last `window_size` tokens.
    """
    block, count, stride = nsa.select_block_size, nsa.select_block_count, nsa.compress_stride
    rounds, rest = divmod(max(length - nsa.compress_block_size + 1, 0), stride)
    compress = stride * _triangle(rounds) + rest * (rounds + 1)
    early = min(length, block * count)
    late = length - early
    if nsa.select_own_block is False:
        select = _triangle(early) + late * block * count
    else:
        blocks, rest = divmod(late, block)
        select = _triangle(early) + late * block * (count - 1) + blocks * _triangle(block) + _triangle(rest)
    inside = min(length, nsa.window_size)
    return compress, select, _triangle(inside) + (length - inside) * nsa.window_size


def _pooling(nsa: NSAConfig, dim: int) -> int:
    """Of one window of one head."""
    if nsa.compression == "mlp":
        return 2 * (nsa.compress_block_size + 1) * dim * dim
    return 2 * nsa.compress_block_size * dim


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
