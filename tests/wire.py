"""What the ranks of a run send in its first step: counted in their processes, and beside it what `mindspeed-nsa plan` says.

`watch` has to be called before Megatron-core is imported, which keeps some of torch's functions under names of its own.
Payloads are read off the tensors; what a rank sends for a payload is `mindspeed_nsa.plan.wire.sent`, for both (docs/plan.md).
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from mindspeed_nsa.plan.wire import DIMENSIONS, by_dimension, sent, step_messages
from mindspeed_nsa.pretrain.job import Job

CONFIG = Path(__file__).parents[1] / "configs" / "tiny.yaml"
ROWS = 384  # of its embedding


class Message(NamedTuple):
    group: str  # the name that Megatron gives the group, `undefined` for those that this project makes
    ranks: int
    collective: str
    payload: int  # bytes: the result of an all-gather, what enters the others


# What does not grow with the model has groups of its own: norms of gradients, and what ranks agree on.
_DIMENSIONS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "undefined": "scores",
    "CONTEXT_PARALLEL_GROUP": "context",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "EMBEDDING_GROUP": "pipeline",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert",
    "DATA_PARALLEL_GROUP": "data",
    "DATA_PARALLEL_GROUP_WITH_CP": "data",
    "EXPERT_DATA_PARALLEL_GROUP": "data",
}


def watch() -> Counter[Message]:
    """The messages of this process from now on, counted."""
    messages: Counter[Message] = Counter()
    for name, (collective, payload) in _COUNTED.items():
        call = _counted(getattr(distributed_c10d, name), collective, payload, messages)
        for module in (torch.distributed, distributed_c10d):
            setattr(module, name, call)
    return messages


_inside = False


def _counted(function: Callable, collective: str, payload: Callable[..., int], messages: Counter[Message]) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        global _inside
        if _inside:  # some are functions of others: the outermost says what is meant
            return function(*args, **kwargs)
        _inside = True
        try:
            result = function(*args, **kwargs)
        finally:
            _inside = False
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.distributed.ProcessGroup)]
        group = given[0] if given else torch.distributed.group.WORLD
        messages[Message(group.group_desc, group.size(), collective, payload(*args, **kwargs))] += 1
        return result

    return call


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _of_first(tensor: Tensor, *_: Any, **__: Any) -> int:
    return _bytes(tensor)


def _of_second(_: Any, tensor: Tensor, *__: Any, **___: Any) -> int:
    return _bytes(tensor)


_COUNTED: dict[str, tuple[str, Callable[..., int]]] = {
    "all_reduce": ("all-reduce", _of_first),
    "all_gather_into_tensor": ("all-gather", _of_first),
    "all_gather": ("all-gather", lambda tensors, *_, **__: sum(map(_bytes, tensors))),
    "reduce_scatter_tensor": ("reduce-scatter", _of_second),
    "all_to_all_single": ("all-to-all", _of_second),
    "isend": ("send", _of_first),
}


def write(messages: Counter[Message], path: Path) -> None:
    path.write_text(json.dumps([[*message, count] for message, count in messages.items()]))


def read(path: Path) -> Counter[Message]:
    return Counter({Message(*message): count for *message, count in json.loads(path.read_text())})


def counted(messages: Counter[Message]) -> dict[str, float]:
    """Bytes that a rank sent, by dimension; what is in none of them is under `other`."""
    totals: Counter[str] = Counter()
    for message, count in messages.items():
        if message.ranks > 1:
            dimension = _DIMENSIONS.get(message.group, "other")
            totals[dimension] += count * sent(message.collective, message.ranks, message.payload)
    return dict(totals)


def planned(overrides: tuple[str, ...], ranks: int, rank: int) -> dict[str, float]:
    """Bytes that a rank of `configs/tiny.yaml` with overrides sends on CPUs by the plan, by dimension."""
    job = Job.read(CONFIG, (*overrides, "nsa.backend=cpu"))
    stage = rank // (ranks // job.parallel.pipeline_model_parallel_size)
    return by_dimension(step_messages(job, ranks, ROWS, stage))


def table(messages: dict[str, list[Counter[Message]]], overrides: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """The table of docs/plan.md: the rank of each layout that sends most."""
    yield "| layout | dimension | counted, bytes a step and rank | planned | difference |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for name, ranks in messages.items():
        rank = max(range(len(ranks)), key=lambda rank: sum(counted(ranks[rank]).values()))
        seen, plan = counted(ranks[rank]), planned(overrides[name], len(ranks), rank)
        for dimension in DIMENSIONS:
            if dimension in plan or dimension in seen:
                here, there = seen.get(dimension, 0), plan.get(dimension, 0)
                yield f"| {name} | {dimension} | {here:,.0f} | {there:,.0f} | {here / there - 1 if there else 1:+.2%} |"
