"""Compressed attention where the query heads of a key/value head are spread over ranks, which choose its blocks together.

Two exact ways, by the backend. Where one operator attends and chooses, as on Ascend, each rank brings the query heads of all
ranks together and runs it on them: the ids are then the same everywhere, and what the other heads attend to is dropped.
Elsewhere each rank scores blocks by its own heads, and the scores are summed over the ranks.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from .ops import library
from .ops.backends import chooses_inside
from .ops.reference import Compressed, choose, lengths

# Rows whose scores are summed at once. They are sent up to the block of the last one, so fewer rows send less.
_SCORE_ROWS = 1024


def compress_attention(
    query: Tensor, key: Tensor, value: Tensor, at: Compressed, group: ProcessGroup, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's query heads to compressed windows, and the blocks that the heads of all ranks choose.

    Args:
        query: this rank's heads [T, N1, D1].
        key: compressed keys [windows, N2, D1].
        value: [windows, N2, D2].
        at: settings.
        group: the ranks that hold query heads of the same key/value heads, as many each.
        backend: a resolved name.

    Returns:
        attention [T, N1, D2]; ids [T, N2, at.select_block_count] int32, best first, the same on every rank.
    """
    heads = query.shape[1] // key.shape[1] * group.size()
    if chooses_inside(backend, query.device.type, heads, at.own_block, at.importance):
        return attend_for_all(query, key, value, at, group, backend)
    here = at._replace(select_block_count=0)
    attention, _, row_max, row_sum = library.compress_attention(query, key, value, None, None, *here, backend)
    return attention, choose_together(query, key, row_max, row_sum, at, group, backend)


# ---- queries brought together


def attend_for_all(
    query: Tensor, key: Tensor, value: Tensor, at: Compressed, group: ProcessGroup, backend: str
) -> tuple[Tensor, Tensor]:
    """`compress_attention` by one call of the backend's on the query heads of all ranks; its backward runs on the own ones."""
    return _ForAll.apply(query, key, value, at, group, backend)


class _ForAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, at: Compressed, group: ProcessGroup, backend: str
    ) -> tuple[Tensor, Tensor]:
        everyone = _gather_heads(query, key.shape[1], group)
        attention, ids, *statistics = library.compress_attention(everyone, key, value, None, None, *at, backend)
        own = _own_heads(attention, key.shape[1], group)
        saved = (_own_statistic(statistic, at.q_len, key.shape[1], group) for statistic in statistics)
        ctx.save_for_backward(query, key, value, own, *saved)
        ctx.settings = *at, backend
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)  # no zeros for the ids
        return own, ids

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        query, key, value, *saved = ctx.saved_tensors
        operands = grad, query, key, value, None, None, *saved
        return *library.compress_attention_backward(*operands, *ctx.settings), None, None, None


def _gather_heads(query: Tensor, kv_heads: int, group: ProcessGroup) -> Tensor:
    """The query heads of all ranks, beside their key/value head in the order of the ranks: [T, N1, D] to [T, R * N1, D]."""
    gathered = query.new_empty(group.size() * query.shape[0], *query.shape[1:])
    torch.distributed.all_gather_into_tensor(gathered, query.contiguous(), group=group)
    return gathered.view(group.size(), query.shape[0], kv_heads, -1, query.shape[2]).movedim(0, 2).flatten(1, 3)


def _own_heads(attention: Tensor, kv_heads: int, group: ProcessGroup) -> Tensor:
    """Undo `_gather_heads`: [T, R * N1, D] to [T, N1, D]."""
    return attention.unflatten(1, (kv_heads, group.size(), -1))[:, :, group.rank()].flatten(1, 2).contiguous()


def _own_statistic(statistic: Tensor, ends: Sequence[int], kv_heads: int, group: ProcessGroup) -> Tensor:
    """The same of a softmax statistic, which lies in memory as [R * N1, S_b, 8], sample after sample (contract, section 2)."""
    heads = statistic.shape[1]
    samples = (part.view(heads, part.shape[0], 8) for part in statistic.split(lengths(ends)))
    own = [part.unflatten(0, (kv_heads, group.size(), -1))[:, group.rank()].flatten() for part in samples]
    return torch.cat(own).view(-1, heads // group.size(), 8)


# ---- scores summed


@torch.no_grad()
def choose_together(
    query: Tensor, key: Tensor, softmax_max: Tensor, softmax_sum: Tensor, at: Compressed, group: ProcessGroup, backend: str
) -> Tensor:
    """Choose blocks by scores that are summed over the ranks; arguments and ids as those of `compress_attention`.

    Args:
        softmax_max: of this rank's heads, as the operator of that name returned it; `softmax_sum` likewise.
    """
    count = at.select_block_count
    ids = torch.arange(count, dtype=torch.int32, device=query.device).repeat(query.shape[0], key.shape[1], 1)
    starts = [0, *at.q_len[:-1]]
    for start, stop, offset in zip(starts, at.q_len, at.q_offset, strict=True):
        for first, last, blocks in score_parts(offset, offset + stop - start, at.select_block_size, count):
            rows = slice(start + first - offset, start + last - offset)
            scores = library.block_scores(query, key, softmax_max, softmax_sum, rows.start, rows.stop, *at, backend)
            scores = scores[..., :blocks].contiguous()
            torch.distributed.all_reduce(scores, group=group)
            ids[rows] = choose(scores, torch.arange(first, last, device=query.device), at)
    return ids


def score_parts(first: int, last: int, block_size: int, block_count: int) -> Iterator[tuple[int, int, int]]:
    """The parts in which scores are summed, of the queries at `first` to `last` (exclusive) of a sample.

    Queries before token `block_size * block_count` have no choice.

    Returns:
        First and last + 1 of each part, and the blocks that its queries see.
    """
    for start in range(max(first, block_size * block_count), last, _SCORE_ROWS):
        stop = min(start + _SCORE_ROWS, last)
        yield start, stop, -(-stop // block_size)
