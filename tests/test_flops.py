"""The FLOPs of a layer against cases worked out by hand, and its visible keys against a list of who sees what."""

import pytest

from mindspeed_nsa import NSAConfig
from mindspeed_nsa.flops import Flops, dense_flops, layer_flops, visible_keys


def small(**settings):
    sizes = {"compress_block_size": 4, "compress_stride": 2, "select_block_size": 4, "select_block_count": 3, "window_size": 5}
    return NSAConfig(**sizes | {"strict": False} | settings)


def listed(nsa, length):
    """Count by naming every key that a query sees."""
    compress = select = window = 0
    for t in range(length):
        ends = range(nsa.compress_block_size - 1, length, nsa.compress_stride)
        compress += sum(end <= t for end in ends)
        own = t // nsa.select_block_size
        if own < nsa.select_block_count:
            select += t + 1
        else:
            others = nsa.select_block_count - (nsa.select_own_block is not False)
            select += others * nsa.select_block_size
            select += 0 if nsa.select_own_block is False else t % nsa.select_block_size + 1
        window += len(range(max(t - nsa.window_size + 1, 0), t + 1))
    return compress, select, window


@pytest.mark.parametrize("own", ["auto", False])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 12, 13, 17, 30, 64])
def test_visible_keys_are_those_that_a_list_names(length, own):
    nsa = small(select_own_block=own)
    assert visible_keys(nsa, length) == listed(nsa, length)


def test_visible_keys_of_the_paper_s_sizes():
    assert visible_keys(NSAConfig(), 4096) == listed(NSAConfig(), 4096)


def test_a_layer_by_hand():
    """Six tokens; windows end at 3 and 5; three queries see 1, 1 and 2 of them; all select all; the last misses one token."""
    assert visible_keys(small(), 6) == (4, 21, 20)
    found = layer_flops(small(), 6, head_num=2, kv_head_num=1, qk_head_dim=3, v_head_dim=2, hidden_size=7)
    assert found == Flops(
        compression=2 * (2 * 4 * 3 + 2 * 4 * 2),
        compress=2 * 4 * 2 * 5,
        select=2 * 21 * 2 * 5,
        window=2 * 20 * 2 * 5,
        projections=2 * 6 * 7 * (2 * 5 + 6),
    )
    assert found.total == 80 + 80 + 420 + 400 + 1344


def test_gates_from_the_query_and_shared_keys_leave_only_the_gate_s_product():
    nsa = small(gate="query", separate_kv=False)
    assert layer_flops(nsa, 6, 2, 1, 3, 2, 7).projections == 2 * 6 * 3 * 6


def test_the_paper_s_network_pools_with_two_matrices():
    nsa = small(compression="mlp")
    assert layer_flops(nsa, 6, 2, 1, 3, 2, 7).compression == 2 * (2 * (4 * 3 * 3 + 3 * 3) + 2 * (4 * 2 * 2 + 2 * 2))


def test_a_long_sequence_costs_a_small_part_of_a_dense_one():
    """The paper's 27B at 64k: 1.2 thousand selected and window tokens a query, and up to 4096 compressed ones, of 64k."""
    nsa = NSAConfig()
    heads = (64, 4, 192, 128)
    sparse = layer_flops(nsa, 65536, *heads, 2560)
    dense = dense_flops(65536, 64, 192, 128)
    assert dense == 65536**2 * 64 * 320
    assert 0.10 < (sparse.compress + sparse.select + sparse.window) / dense < 0.12
