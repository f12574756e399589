"""What a program asks of the device: operators, copies and waits, counted."""

from collections import Counter
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("ascend", "aten", "synchronising", "view", "collective")
TRAFFIC = ("host_to_device", "device_to_host", "device_to_device", "stream_syncs", "device_syncs", "event_syncs")
_MEMORY = ("aten::empty", "aten::new_empty", "aten::set_", "aten::resize_", "aten::detach", "aten::record_stream")


class Event(NamedTuple):
    """One thing asked of the device.

    Attributes:
        kind: `ascend` an aclnn operator; `aten` an aten operator that launches work; `synchronising` one for which the host
            waits; `view` one that only makes a view or memory; `collective` one between ranks; `host_to_device` and
            `device_to_host` a copy that an aten operator makes.
        name: of the operator.
        arguments: of an aclnn operator; a tensor is its shape and type.
    """

    kind: str
    name: str
    arguments: dict[str, Any] = {}  # noqa: RUF012


class Log:
    """The events inside one `record()`.

    Attributes:
        events: in the order in which they happened.
        traffic: copies and waits that the runtime saw, whoever asked for them, by the names in `TRAFFIC`.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.traffic: dict[str, int] = {}

    def counts(self) -> dict[str, int]:
        """Operators of each kind, and the runtime's copies and waits."""
        kinds = Counter(event.kind for event in self.events)
        return {kind: kinds[kind] for kind in KINDS} | self.traffic

    def calls(self, name: str) -> list[dict[str, Any]]:
        """The arguments of each call of one aclnn operator."""
        return [event.arguments for event in self.events if event.name == name]

    def table(self) -> str:
        """A line for each kind and operator with its count, then the runtime's copies and waits."""
        rows = Counter((event.kind, event.name) for event in self.events)
        lines = [f"{kind:<16} {name:<48} {count:>5}" for (kind, name), count in sorted(rows.items())]
        return "\n".join(lines + [f"{'runtime':<16} {name:<48} {count:>5}" for name, count in self.traffic.items()])


_open: list[Log] = []
counters: MutableSequence[int] = [0] * len(TRAFFIC)


def count_with(runtime_counters: MutableSequence[int]) -> None:
    """Take the runtime's counters for those of this module."""
    global counters
    counters = runtime_counters


def add(kind: str, name: str, arguments: dict[str, Any] | None = None) -> None:
    """Note an event in every log that is open."""
    event = Event(kind, name, arguments or {})
    for log in _open:
        log.events.append(event)


def add_copy(direction: str, name: str) -> None:
    """Note a copy that an aten operator makes, in the logs and in the runtime's counters."""
    counters[TRAFFIC.index(direction)] += 1
    add(direction, name)


@contextmanager
def record(views: bool = True) -> Iterator[Log]:
    """Log what the statements inside ask of the device, on every thread; `views`, which cost time, on this one."""
    log, before = Log(), list(counters[: len(TRAFFIC)])
    _open.append(log)
    try:
        with _Views() if views else nullcontext():
            yield log
    finally:
        _open.remove(log)
        log.traffic = {name: counters[i] - before[i] for i, name in enumerate(TRAFFIC)}


class _Views(TorchDispatchMode):
    """Notes views and new memory on the device: they do not reach a kernel that could."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        of_device = isinstance(out, Tensor) and out.device.type == "npu"
        if of_device and (func.is_view or func.name().startswith(_MEMORY)):
            add("view", func.name())
        return out
