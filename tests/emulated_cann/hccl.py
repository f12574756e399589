"""The emulated `hccl`: gloo, in place on the devices' memory, so that several ranks run with an emulated device each."""

from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from .aten import host
from .records import add

_COLLECTIVES = ("all", "reduce", "broadcast", "gather", "scatter", "send", "recv", "_all", "_reduce")


class _Works(NamedTuple):
    """What a coalesced batch of sends and receives returns."""

    works: list[dist.Work]

    def wait(self) -> bool:
        for work in self.works:
            work.wait()
        return True


class EmulatedHccl(dist.ProcessGroup):
    """A process group whose collectives run on CPU aliases of its tensors."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        kind = dist.ProcessGroup.BackendType.GLOO
        self._gloo = dist.ProcessGroup(store, rank, size)
        self._gloo._register_backend(torch.device("cpu"), kind, dist.ProcessGroupGloo(store, rank, size, timeout=timeout))
        self._gloo._set_default_backend(kind)
        self._in_flight: list[tuple[dist.Work, Any]] = []

    def barrier(self, opts: Any = None) -> dist.Work:
        """Options may name the device, which gloo does not know."""
        return self._gloo.barrier()

    def _get_backend(self, device: torch.device) -> "EmulatedHccl":  # type: ignore[override]
        return self

    def batch_isend_irecv(self, ops: list[str], tensors: list[Tensor], peers: list[int]) -> _Works:
        """Of torch_npu's `hccl` alone: what `torch.distributed.batch_isend_irecv` calls on a device."""
        names = [{"isend": "send", "irecv": "recv"}[op] for op in ops]
        return _Works([self._run(name, [tensor], peer, 0) for name, tensor, peer in zip(names, tensors, peers, strict=True)])

    def _run(self, name: str, *args, **kwargs) -> dist.Work:
        add("collective", name)
        work = getattr(self._gloo, name)(*tree_map(_on_host, list(args)), **tree_map(_on_host, kwargs))
        # The tensors hold the memory that gloo's threads still work on.
        self._in_flight = [pair for pair in self._in_flight if not pair[0].is_completed()] + [(work, (args, kwargs))]
        return work


def install() -> None:
    """Take the place of torch_npu's own `hccl`."""
    dist.Backend.register_backend("hccl", EmulatedHccl, devices=["npu"])


def _on_host(x: Any) -> Any:
    return host(x) if isinstance(x, Tensor) else x


def _forwarded(name: str) -> Any:
    return lambda self, *args, **kwargs: self._run(name, *args, **kwargs)


for _name in dir(dist.ProcessGroup):
    if _name.startswith(_COLLECTIVES):
        setattr(EmulatedHccl, _name, _forwarded(_name))
