"""What Megatron-core needs to train on an NPU: its calls of `torch.cuda` find the chip.

torch_npu brings most of it, for the whole process and for good: there is no way back. Nothing happens on import: the trainer's
command calls `install`. Every stand-in is catalogued in `patches/__init__.py`.
"""

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed

from mindspeed_nsa.config import NSAConfig
from mindspeed_nsa.patches import without_te

_TRANSFER = "torch_npu.contrib.transfer_to_npu"
_installed = False


def has_npu() -> bool:
    """Whether this process sees an NPU."""
    npu = getattr(torch, "npu", None)
    return npu is not None and npu.is_available()


def install() -> None:
    """Let `torch.cuda` be the NPU; a second call changes nothing.

    Raises:
        RuntimeError: there is no NPU, or Megatron-core, which keeps what it imports of `torch.cuda`, was imported before.
    """
    global _installed
    if _installed:
        return
    if not has_npu():
        raise RuntimeError("patches.npu_host is for hosts with an NPU, and this process sees none")
    if "megatron.core" in sys.modules and _TRANSFER not in sys.modules:
        raise RuntimeError("patches.npu_host is installed before Megatron-core is imported, and it is imported already")
    os.environ.setdefault("TORCH_NPU_DEVICE_CAPABILITY", "8.0")
    warnings.filterwarnings("ignore", message=".*get_device_capability")
    with warnings.catch_warnings(record=True):  # a screenful about what it replaces, and filters that it would leave
        importlib.import_module(_TRANSFER)
    torch.Tensor.type = _named_as_cuda(torch.Tensor.type)  # type: ignore[method-assign]
    without_te.install()
    _installed = True


def _named_as_cuda(type_of: Callable) -> Callable:
    @functools.wraps(type_of)
    def named(*args: Any, **kwargs: Any) -> Any:
        result = type_of(*args, **kwargs)
        return result.replace("torch.npu.", "torch.cuda.") if isinstance(result, str) else result

    return named


def uses_ascend(nsa: NSAConfig) -> bool:
    """Whether the layers of a job in this process run on the Ascend operators."""
    return has_npu() and nsa.enabled and nsa.backend in ("auto", "ascend")


def agree_on_plan(nsa: NSAConfig, group: int) -> None:
    """Find out on each rank's NPU how attention stays causal. Every rank calls it; where there is none, nothing is done.

    Args:
        nsa: settings.
        group: query heads a key/value head on this rank.

    Raises:
        ValueError: no plan holds on some rank's device, or the ranks differ; one line that names the ranks.
    """
    if not uses_ascend(nsa):
        return
    from mindspeed_nsa.ops import ascend

    found: list[Any] = [None] * torch.distributed.get_world_size()
    try:
        mine: Any = ascend.plan(group)
    except (RuntimeError, ValueError) as error:  # the other ranks wait to hear of it
        mine = str(error)
    torch.distributed.all_gather_object(found, mine)
    if trouble := disagreement(found):
        raise ValueError(trouble)


def disagreement(found: Sequence[Any]) -> str:
    """What is wrong with the ranks' plans, in one line; empty if nothing is.

    Args:
        found: in the order of the ranks, a `mindspeed_nsa.ops.ascend.Plan`, or text that says why there is none.
    """
    ranks: dict[Any, list[int]] = {}
    for rank, plan in enumerate(found):
        ranks.setdefault(plan, []).append(rank)
    failures = [plan for plan in ranks if isinstance(plan, str)]
    if failures:
        return "; ".join(f"{text} ({_listed(ranks[text])})" for text in failures)
    if len(ranks) == 1:
        return ""
    plans = "; ".join(f"{_listed(who)}: plan {', '.join(map(str, plan))}" for plan, who in ranks.items())
    fields = ", ".join(next(iter(ranks))._fields)
    return (
        f"NSA on Ascend: the ranks found different plans ({fields}): {plans}; all ranks need the same CANN and torch_npu, "
        "and the same NSA_ASCEND_PLAN or none"
    )


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
