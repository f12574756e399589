"""How packed samples go to the operators. What is made here depends on lengths alone, is made once and kept on the device."""

import logging
from functools import cache, lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import lengths, window_count

# compress_block_size, compress_stride, select_block_size, select_block_count: what the operators document (section 2).
SIZES = WINDOW, STRIDE, BLOCK, COUNT = 32, 16, 64, 16
# Queries of a sample before this one list blocks 0 to COUNT - 1: there is no choice yet.
EARLY = BLOCK * COUNT

_logger = logging.getLogger(__name__)


@cache
def say_once(message: str) -> None:
    """Say that a slower way is taken."""
    _logger.warning("NSA on Ascend: %s", message)


class Windows(NamedTuple):
    """Samples for compressed attention: each gets places for a full list of blocks, and for its own last block.

    What fills the places beyond a sample's own windows is in the future of all its queries, hence masked.
    """

    q_len: list[int]  # prefix sums, of the samples that have tokens
    cmp_len: list[int]  # theirs, of places
    sel_len: list[int]
    fill: Tensor | None  # the window at each place; None: no place is left over
    places: Tensor | None  # of each window
    blind: Tensor  # the queries that see no window
    early: Tensor  # [T, 1, 1], whether a query is early
    first_blocks: Tensor  # [COUNT] int32, what early queries list


@lru_cache(maxsize=8)
def windows_of(ends: tuple[int, ...], device: torch.device) -> Windows:
    """The samples that end at `ends`."""
    samples = [length for length in lengths(ends) if length]
    own = [window_count(length, WINDOW, STRIDE) for length in samples]
    blocks = [max(-(-length // BLOCK), COUNT) for length in samples]
    room = [max(have, BLOCK // STRIDE * (need - 1) + 1) for have, need in zip(own, blocks, strict=True)]
    fill, places = _places(own, room)
    if room != own:
        say_once("short samples, and ones that end within a block, get places for more compressed keys, which are masked")
    position = torch.cat([torch.arange(length) for length in samples])
    return Windows(
        q_len=list(accumulate(samples)),
        cmp_len=list(accumulate(room)),
        sel_len=list(accumulate(blocks)),
        fill=None if room == own else fill.to(device),
        places=None if room == own else places.to(device),
        blind=(position < WINDOW - 1).nonzero().flatten().to(device),
        early=(position < EARLY)[:, None, None].to(device),
        first_blocks=torch.arange(COUNT, dtype=torch.int32, device=device),
    )


@lru_cache(maxsize=4)
def masks(
    tokens: int, windows: int, blocks: int, init_blocks: int, local_blocks: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which windows are masked, bool [tokens, windows], and which blocks are forced, bool [tokens, blocks].

    The arguments are the most that a sample has of each: the kernel takes the last dims for strides. A query that sees no
    window keeps window 0, because a row of nothing but masked windows sees them all (section 2).
    """
    position = torch.arange(tokens, device=device)[:, None]
    masked = torch.arange(windows, device=device) * STRIDE + WINDOW - 1 > position
    masked[: WINDOW - 1, 0] = False
    own, block = position // BLOCK, torch.arange(blocks, device=device)
    return masked, (block <= own) & ((block < init_blocks) | (block > own - local_blocks))


class Blocks(NamedTuple):
    """Samples for selected attention: tokens that go through the operator, and tokens that attend to all before them.

    What fills the places beyond a sample's own tokens is in the future of all its queries, hence masked.
    """

    q_len: list[int]  # prefix sums, of the samples for the operator; empty: none
    kv_len: list[int]  # theirs, of places: whole blocks
    rows: Tensor | None  # their tokens; None: all tokens
    fill: Tensor | None  # the token at each place; None: all tokens
    places: Tensor | None  # of each of `rows`; None: in their order
    dense_len: list[int]  # prefix sums, of what attends densely; empty: nothing
    dense: Tensor | None  # those tokens; None: all tokens


@lru_cache(maxsize=8)
def blocks_of(ends: tuple[int, ...], early_dense: bool, device: torch.device) -> Blocks:
    """The samples that end at `ends`.

    One without more blocks than a list has attends densely: its queries would list all it has. With `early_dense` so do the
    early queries of the others too, and what the operator makes of these is to be discarded.
    """
    spans = [(start, stop) for start, stop in zip((0, *ends[:-1]), ends, strict=True) if stop > start]
    long = [(start, stop) for start, stop in spans if stop - start > EARLY]
    dense = [(start, min(stop, start + EARLY)) for start, stop in spans if early_dense or stop - start <= EARLY]
    own = [stop - start for start, stop in long]
    room = [-(-length // BLOCK) * BLOCK for length in own]
    rows = _tokens(long)
    fill, places = _places(own, room)
    if room != own:
        say_once("samples that end within a block get places for more keys, which are masked")
    if dense:
        say_once("queries that have no choice of blocks attend densely, by npu_fusion_attention")
    whole = len(rows) == ends[-1]
    return Blocks(
        q_len=list(accumulate(own)),
        kv_len=list(accumulate(room)),
        rows=None if whole else rows.to(device),
        fill=None if whole and room == own else rows[fill].to(device),
        places=None if room == own else places.to(device),
        dense_len=list(accumulate(stop - start for start, stop in dense)),
        dense=None if sum(stop - start for start, stop in dense) == ends[-1] else _tokens(dense).to(device),
    )


def _places(own: list[int], room: list[int]) -> tuple[Tensor, Tensor]:
    """With `room` places for each sample's `own` items: what is at each place, and the place of each item."""
    fill, places, item, place = [], [], 0, 0
    for have, size in zip(own, room, strict=True):
        fill.append(torch.arange(item, item + size))
        places.append(torch.arange(place, place + have))
        item, place = item + have, place + size
    none = torch.arange(0)
    return torch.cat([none, *fill]).clamp(max=max(item - 1, 0)), torch.cat([none, *places])


def _tokens(spans: list[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(start, stop) for start, stop in spans)])
