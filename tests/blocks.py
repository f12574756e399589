"""Blocks and inputs that the tests of the block share."""

import torch

from mindspeed_nsa import NativeSparseAttention, NSAConfig

SMALL = {
    "compress_block_size": 4,
    "compress_stride": 2,
    "select_block_size": 8,
    "select_block_count": 4,
    "window_size": 5,
    "strict": False,
    "backend": "reference",
}
CHIP = {"backend": "reference", "window_size": 100}


def make(config, heads=4, kv_heads=2, dims=(6, 5), dtype=torch.float64):
    nsa = NativeSparseAttention(NSAConfig(**config), heads, kv_heads, *dims).to(dtype)
    with torch.no_grad():
        for parameter in nsa.parameters():  # felt, each of them
            parameter += 0.3 * torch.randn_like(parameter)
    return nsa


def inputs_of(nsa, tokens, dtype=torch.float64):
    """Query, a key and a value for each branch, gate logits."""

    def rand(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_()

    keys = tuple(rand(tokens, nsa.kv_head_num, nsa.qk_head_dim) for _ in range(3))
    values = tuple(rand(tokens, nsa.kv_head_num, nsa.v_head_dim) for _ in range(3))
    return rand(tokens, nsa.head_num, nsa.qk_head_dim), keys, values, rand(tokens, nsa.head_num, 3)


def leaves(nsa, query, keys, values, gate):
    return [query, *keys, *values, gate, *nsa.parameters()]


def only(branch, gate):
    """Gate logits that shut the two other branches, and open this one."""
    shut = torch.full_like(gate, -torch.inf)
    shut[..., branch] = torch.inf
    return shut.requires_grad_()
