"""Samples packed into one sequence: where each ends, and what that makes of windows, blocks and positions."""

import operator
from collections.abc import Sequence
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
        given = [tokens] if actual_seq_len is None else actual_seq_len
        try:
            ends = tuple(operator.index(end) for end in given)
        except TypeError:
            ends = ()
        if not ends or ends[-1] != tokens or any(length < 0 for length in lengths(ends)):
            raise ValueError(f"actual_seq_len {given} must be prefix sums that rise to the {tokens} tokens given, integers")
        return cls(ends)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First token, and last token + 1, of each sample."""
        return list(zip((0, *self.ends[:-1]), self.ends, strict=True))

    @property
    def q_offset(self) -> list[int]:
        """The position in its sample of each sample's first query: all samples are whole here."""
        return [0] * len(self.ends)

    def windows(self, block_size: int, stride: int) -> list[int]:
        """Prefix sums of the compressed windows."""
        return list(accumulate(window_count(length, block_size, stride) for length in lengths(self.ends)))

    def blocks(self, block_size: int) -> list[int]:
        """Prefix sums of the selectable blocks; the last of a sample may be ragged."""
        return list(accumulate(-(-length // block_size) for length in lengths(self.ends)))

    def window_tokens(self, block_size: int, stride: int, device: torch.device) -> Tensor:
        """The tokens of each window: [windows, block_size]."""
        starts = [
            torch.arange(window_count(stop - start, block_size, stride), device=device) * stride + start
            for start, stop in self.spans
        ]
        return torch.cat(starts)[:, None] + torch.arange(block_size, device=device)

    def positions(self, device: torch.device) -> Tensor:
        """Each token's position in its own sample: [T]."""
        return torch.cat([torch.arange(length, device=device) for length in lengths(self.ends)])
