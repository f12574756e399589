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

    def part(self, first: int, last: int) -> "Part":
        """The queries of the packed tokens `first` to `last` (exclusive), with the samples that they see."""
        seen = [(start, min(stop, last)) for start, stop in self.spans if start < last and stop > first]
        queries = [(max(start, first), stop) for start, stop in seen]
        before = seen[0][0]
        return Part(
            keys=slice(before, last),
            samples=Samples(tuple(stop - before for _, stop in seen)),
            before=Samples((0, *(stop for _, stop in self.spans if stop <= before))),
            q_len=list(accumulate(stop - start for start, stop in queries)),
            q_offset=[query - start for (query, _), (start, _) in zip(queries, seen, strict=True)],
        )

    @property
    def whole(self) -> "Part":
        """Every query."""
        return Part(slice(0, self.ends[-1]), self, Samples((0,)), self.ends, [0] * len(self.ends))


class Part(NamedTuple):
    """Queries of packed samples that follow one another, and what they see: their samples, cut after the last of them.

    Attributes:
        keys: the packed tokens of those samples.
        samples: those samples.
        before: the samples before `keys`, after an empty one.
        q_len: prefix sums of the queries of each sample.
        q_offset: the position in its sample of each sample's first query.
    """

    keys: slice
    samples: Samples
    before: Samples
    q_len: Sequence[int]
    q_offset: Sequence[int]

    def windows(self, block_size: int, stride: int) -> slice:
        """The compressed windows of `samples`, among those of all samples."""
        before, within = (samples.windows(block_size, stride)[-1] for samples in (self.before, self.samples))
        return slice(before, before + within)

    def positions(self, device: torch.device) -> Tensor:
        """Each query's position in its own sample: [T1]."""
        spans = zip(lengths(self.q_len), self.q_offset, strict=True)
        return torch.cat([torch.arange(offset, offset + length, device=device) for length, offset in spans])
