"""From the importance of blocks to the ids that a query attends to (paper, equations 9 to 12)."""

from typing import Any

import torch
from torch import Tensor

from .ops.reference import Compressed


def in_order(topk_indices: Tensor) -> Tensor:
    """Ids best first to ids ascending, as the select operator's backward needs them (contract, section 6)."""
    return torch.sort(topk_indices, dim=-1).values


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
