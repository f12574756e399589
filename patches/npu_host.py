"""What Megatron-core needs to train on an NPU: its calls of `torch.cuda` find the chip.

torch_npu brings most of it, for the whole process and for good: there is no way back. Nothing happens on import: the trainer's
command calls `install`. Every stand-in is catalogued in `patches/__init__.py`.
"""

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

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
