"""Samples packed into one sequence: where each ends, and what that makes of windows, blocks and positions."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .ops.reference import lengths, window_count


class Samples(NamedTuple):
    """Packed samples, by prefix sums of their lengths without a leading 0."""

    ends: tuple[int, ...]

    @classmethod
    def of(cls, actual_seq_len: Sequence[int] | None, tokens: int) -> "Samples":
        """Samples that fill `tokens`; None is one sample.

        Raises:
            ValueError: the prefix sums fall, or do not end at `tokens`.
        """
        ends = (tokens,) if actual_seq_len is None else tuple(int(end) for end in actual_seq_len)
        if not ends or ends[-1] != tokens or any(length < 0 for length in lengths(ends)):
            raise ValueError(f"actual_seq_len {list(ends)} must be prefix sums that rise to the {tokens} tokens given")
        return cls(ends)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First token, and last token + 1, of each sample."""
        return list(zip((0, *self.ends[:-1]), self.ends, strict=True))

    def windows(self, block_size: int, stride: int) -> list[int]:
        """Prefix sums of the compressed windows."""
        return list(accumulate(window_count(length, block_size, stride) for length in lengths(self.ends)))

    def blocks(self, block_size: int) -> list[int]:
        """Prefix sums of the selectable blocks; the last of a sample may be ragged."""
        return list(accumulate(-(-length // block_size) for length in lengths(self.ends)))

    def window_tokens(self, block_size: int, stride: int, device: torch.device) -> Tensor:
        """The tokens of each window: [windows, block_size]."""
        return _window_tokens(self, block_size, stride, device)

    def positions(self, device: torch.device) -> Tensor:
        """Each token's position in its own sample: [T]."""
        return _positions(self, device)


@lru_cache(maxsize=32)
def _window_tokens(samples: Samples, block_size: int, stride: int, device: torch.device) -> Tensor:
    starts = [
        torch.arange(window_count(stop - start, block_size, stride), device=device) * stride + start
        for start, stop in samples.spans
    ]
    return torch.cat(starts)[:, None] + torch.arange(block_size, device=device)


@lru_cache(maxsize=32)
def _positions(samples: Samples, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(length, device=device) for length in lengths(samples.ends)])
