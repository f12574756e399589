"""A sequence split over ranks: what moves between them, so that a query sees all of its past.

Megatron's layout: a sequence is cut into 2 * R pieces over R ranks, and rank r holds the pieces r and 2 * R - 1 - r, an early
and a late one, so that causal attention costs every rank the same. Two ways, by the names of Megatron's `cp_comm_type`:

`a2a` (Ulysses): an all-to-all hands each rank the whole sequence for some of the heads; a key/value head goes to every rank
    that has query heads of it.
`all_gather`: every rank gathers the keys and values of the whole sequence and keeps its own queries, which then start in the
    midst of a sample. A compressed window that straddles two ranks is pooled from the gathered tokens; its gradient is the sum
    of what the queries of every rank give.

s: sequence, b: batch, n: heads, d: head dim.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

KINDS = ("a2a", "all_gather")


class Exchange(NamedTuple):
    """One of the two ways, over the ranks of a group."""

    kind: str
    group: ProcessGroup

    def gather(
        self, query: Tensor, gate: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """What a rank's queries need, from what each rank projects of its own pieces: [s / R, b, ...] to [s, b, ...].

        With `all_gather` query and gate stay as they are.
        """
        if self.kind == "a2a":
            query, gate = _at_once(to_heads, (query, gate), self.group)
        seen = _at_once(to_heads if self.kind == "a2a" else gather_sequence, (*keys, *values), self.group)
        return query, gate, seen[: len(keys)], seen[len(keys) :]

    def query_spans(self, length: int, batch: int) -> list[tuple[int, int]] | None:
        """The tokens whose queries `gather` leaves here, of `batch` packed sequences of `length`; None: all."""
        return None if self.kind == "a2a" else own_spans(length, batch, self.group)

    def scatter(self, attention: Tensor) -> Tensor:
        """Every head of this rank's pieces [s / R, b, n, d], from the attention of what `gather` gave."""
        return to_pieces(attention, self.group) if self.kind == "a2a" else attention


def _at_once(move: Callable[[Tensor, ProcessGroup], Tensor], tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Move tensors of the same heads [s, b, n, d] in one message."""
    return list(move(torch.cat(list(tensors), dim=-1), group).split([tensor.shape[-1] for tensor in tensors], dim=-1))


def own_pieces(tensor: Tensor, dim: int, ranks: int, rank: int) -> Tensor:
    """This rank's early and late piece of a whole sequence, which lies along `dim`."""
    pieces = tensor.chunk(2 * ranks, dim)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]], dim)


def own_spans(length: int, batch: int, group: ProcessGroup) -> list[tuple[int, int]]:
    """The tokens of this rank, first and last + 1, where `batch` sequences of `length` are packed one after another."""
    ranks, rank = group.size(), group.rank()
    piece = length // (2 * ranks)
    starts = (piece * rank, piece * (2 * ranks - 1 - rank))
    return [(length * i + start, length * i + start + piece) for i in range(batch) for start in starts]


def gather_sequence(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """The whole sequence from every rank's pieces: [s / R, ...] to [s, ...]. Gradients are summed over the ranks."""
    return _in_order(_AllGather.apply(tensor, group), group.size())


def to_heads(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Every head of a piece to some heads of the whole sequence: [s / R, b, n, d] to [s, b, n / R, d].

    Where there are fewer heads than ranks, each head goes to R / n ranks in a row.
    """
    ranks = group.size()
    if tensor.shape[2] < ranks:
        tensor = tensor.repeat_interleave(ranks // tensor.shape[2], dim=2)
    by_rank = tensor.unflatten(2, (ranks, -1)).movedim(2, 0)
    return _in_order(_AllToAll.apply(by_rank, group).flatten(0, 1), ranks)


def to_pieces(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Undo `to_heads` where no head was sent twice: [s, b, n / R, d] to [s / R, b, n, d]."""
    ranks = group.size()
    by_rank = torch.stack([own_pieces(tensor, 0, ranks, rank) for rank in range(ranks)])
    return _AllToAll.apply(by_rank, group).movedim(0, 2).flatten(2, 3)


def _in_order(gathered: Tensor, ranks: int) -> Tensor:
    """Both pieces of rank 0, of rank 1, ... to the pieces as they follow in the sequence."""
    pieces = gathered.chunk(2 * ranks)
    return torch.cat([*pieces[::2], *reversed(pieces[1::2])])


class _AllGather(torch.autograd.Function):
    """Concatenate over the ranks along the first dim; the gradient is summed and scattered."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = tensor.new_empty(tensor.shape[0] * group.size(), *tensor.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        torch.distributed.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


class _AllToAll(torch.autograd.Function):
    """Hand part r of the first dim to rank r; what comes from rank r is part r of the result."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        torch.distributed.all_to_all_single(received, tensor.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.forward(ctx, grad, ctx.group), None
