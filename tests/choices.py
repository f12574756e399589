"""Settings and inputs that the tests of choosing blocks share."""

import torch

from mindspeed_nsa.ops.reference import Compressed

CHIP = {"window": 32, "stride": 16, "block": 64, "count": 16}
SMALL = {"window": 4, "stride": 2, "block": 8, "count": 4}


def settings(samples, sizes, importance="ascend", init_blocks=1, local_blocks=2, own_block=True):
    return Compressed(
        scale=0.5,
        compress_block_size=sizes["window"],
        compress_stride=sizes["stride"],
        select_block_size=sizes["block"],
        select_block_count=sizes["count"],
        causal=True,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        own_block=own_block,
        importance=importance,
        q_len=samples.ends,
        cmp_len=samples.windows(sizes["window"], sizes["stride"]),
        sel_len=samples.blocks(sizes["block"]),
        q_offset=samples.whole.q_offset,
    )


def inputs(samples, at, heads=4, kv_heads=2, dim=8, spread=1.0):
    query = spread * torch.randn(samples.ends[-1], heads, dim)
    return query, spread * torch.randn(at.cmp_len[-1], kv_heads, dim)
