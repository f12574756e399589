"""What Megatron-core needs to train on a host with no accelerator.

Megatron-core calls `torch.cuda` whatever the device. Here those calls find a CPU instead, as
`torch_npu.contrib.transfer_to_npu` lets them find an NPU. Nothing happens on import: the trainer calls `install`.
Every stand-in is catalogued in `patches/__init__.py`.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mindspeed_nsa.patches import without_te
from mindspeed_nsa.patches.npu_host import has_npu

_replaced: list[tuple[Any, str, Any]] = []
_mode: "CPUDeviceMode | None" = None


def has_accelerator() -> bool:
    """Whether this process sees an accelerator that Megatron-core can train on."""
    return torch.cuda.is_available() or has_npu()


def install() -> None:
    """Put the stand-ins in place; a second call changes nothing.

    Raises:
        RuntimeError: there is an accelerator, which the stand-ins would hide.
    """
    global _mode
    if has_accelerator():
        raise RuntimeError("patches.cpu_host hides accelerators, and this host has one")
    if _mode is not None:
        return
    without_te.install()
    without_te.replace(_CUDA, _replaced)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_is_news)
    _mode = CPUDeviceMode()
    _mode.__enter__()


def uninstall() -> None:
    """Take every stand-in away again."""
    global _mode
    if _mode is None:
        return
    _mode.__exit__(None, None, None)
    _mode = None
    logging.getLogger("megatron.core.tensor_parallel.random").removeFilter(_is_news)
    without_te.restore(_replaced)
    without_te.uninstall()


class CPUDeviceMode(TorchFunctionMode):
    """Tensors asked for on `cuda` are made on the CPU."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and _called_by_megatron():
            # Its optimizers tell trainable tensors by names such as torch.cuda.FloatTensor.
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_news(record: logging.LogRecord) -> bool:
    """Megatron's random number tracker warns that drawing on the device moved the CPU's generator: here they are one."""
    return "CPU RNG state changed" not in record.getMessage()


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def _called_by_megatron() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__")).startswith("megatron.")


def _get_rng_state(device: Any = "cuda") -> torch.Tensor:
    return torch.random.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.random.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.random.default_generator.manual_seed(seed)


_CUDA: dict[str, Any] = {
    "torch.cuda.current_device": lambda: torch.device("cpu"),
    "torch.cuda.synchronize": lambda device=None: None,
    "torch.cuda.get_rng_state": _get_rng_state,
    "torch.cuda.random.get_rng_state": _get_rng_state,
    "torch.cuda.set_rng_state": _set_rng_state,
    "torch.cuda.manual_seed": _manual_seed,
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": _set_rng_state,
}
