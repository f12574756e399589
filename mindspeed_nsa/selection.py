"""From the importance of blocks to the ids that a query attends to (paper, equations 9 to 12)."""

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .ops import library
from .ops.reference import Compressed, choose, early_rows, lengths

_SCORE_ELEMENTS = 1 << 22


def in_order(topk_indices: Tensor) -> Tensor:
    """Ids best first to ids ascending, as the select operator's backward needs them (contract, section 6)."""
    return torch.sort(topk_indices, dim=-1).values


@torch.no_grad()
def choose_together(
    query: Tensor,
    key: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    at: Compressed,
    group: torch.distributed.ProcessGroup,
    backend: str,
) -> Tensor:
    """Choose blocks where the query heads of a key/value head are spread over `group`: scores are summed over it first.

    Every rank of the group gets the same ids.

    Args:
        query: this rank's heads [T, N1, D1].
        key: compressed keys [windows, N2, D1].
        softmax_max: of this rank's heads, as `compress_attention` returned it; `softmax_sum` likewise.
        softmax_sum: see above.
        at: the settings that `compress_attention` ran with.
        group: the ranks that hold heads of the same key/value heads.
        backend: a resolved name.

    Returns:
        [T, N2, at.select_block_count] int32, best first.
    """
    count = at.select_block_count
    ids = torch.arange(count, dtype=torch.int32, device=query.device).repeat(query.shape[0], key.shape[1], 1)
    starts = [0, *at.q_len[:-1]]
    for start, stop, offset, blocks in zip(starts, at.q_len, at.q_offset, lengths(at.sel_len), strict=True):
        rows = max(_SCORE_ELEMENTS // (blocks * key.shape[1]), 1) if blocks else 1
        for first in range(start + early_rows(offset, at), stop, rows):
            last = min(first + rows, stop)
            scores = library.block_scores(query, key, softmax_max, softmax_sum, first, last, *at, backend)[..., :blocks]
            scores = scores.contiguous()
            torch.distributed.all_reduce(scores, group=group)
            position = torch.arange(first - start, last - start, device=query.device) + offset
            ids[first:last] = choose(scores, position, at)
    return ids


@torch.no_grad()
def statistics(topk_indices: Tensor, position: Tensor, at: Compressed) -> dict[str, Any]:
    """What was chosen, over all queries and key/value heads.

    Args:
        topk_indices: [T, N2, k].
        position: of each query in its sample, [T].
        at: the settings of the choice.

    Returns:
        `forced_share` and `scored_share`: shares of the visible listed blocks that are forced, and that scores chose;
        `scored_distance`: mean tokens from a block that scores chose to the query's own block, 0 where there is none.
    """
    own = position[:, None, None] // at.select_block_size
    visible = topk_indices <= own
    forced = visible & ((topk_indices < at.init_blocks) | (topk_indices > own - at.local_blocks))
    scored = visible & ~forced
    distance = ((own - topk_indices) * scored).sum() * at.select_block_size / scored.sum().clamp(min=1)
    forced_share = forced.sum() / visible.sum()
    return {
        "forced_share": forced_share.item(),
        "scored_share": 1 - forced_share.item(),
        "scored_distance": distance.item(),
    }
