"""What Megatron-core needs to train on a host with no accelerator.

Megatron-core calls `torch.cuda` whatever the device. Here those calls find a CPU instead, as
`torch_npu.contrib.transfer_to_npu` lets them find an NPU. Nothing happens on import: the trainer calls `install`.
Every stand-in is catalogued in `patches/__init__.py`.
"""

import functools
import inspect
import logging
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch.overrides import TorchFunctionMode

_ABSENT = object()
_replaced: list[tuple[Any, str, Any]] = []
_mode: "CPUDeviceMode | None" = None


def has_accelerator() -> bool:
    """Whether this process sees an accelerator that Megatron-core can train on."""
    npu = getattr(torch, "npu", None)
    return torch.cuda.is_available() or (npu is not None and npu.is_available())


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
    for target, stand_in in {**_CUDA, **_megatron_stand_ins()}.items():
        owner_name, name = target.rsplit(".", 1)
        owner = pkgutil.resolve_name(owner_name)
        _replaced.append((owner, name, getattr(owner, name, _ABSENT)))
        setattr(owner, name, stand_in)
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
    while _replaced:
        owner, name, original = _replaced.pop()
        if original is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


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
}


def _megatron_stand_ins() -> dict[str, Any]:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    stand_ins: dict[str, Any] = {
        "megatron.core.tensor_parallel.random._set_cuda_rng_state": _set_rng_state,
        # Only fp8 parameters need it; without Transformer Engine it raises even when there are none.
        "megatron.core.optimizer.distrib_optimizer.quantize_param_shard": lambda *args, **kwargs: None,
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states": (
            _with_own_step(DistributedOptimizer._set_main_param_and_optimizer_states)
        ),
        **_write_item_with_format(),
    }
    if not hasattr(numpy, "product"):
        # Megatron-core 0.12's checkpoints of a distributed optimizer; numpy 2 has it under one name alone.
        stand_ins["numpy.product"] = numpy.prod
    from megatron.core.transformer import multi_latent_attention

    if hasattr(multi_latent_attention, "HAVE_TE"):
        # True even without Transformer Engine, whose classes are then None, which isinstance refuses.
        stand_ins["megatron.core.transformer.multi_latent_attention.HAVE_TE"] = False
    return stand_ins


def _with_own_step(set_states: Callable) -> Callable:
    """The loader of a distributed optimizer copies what the optimizer keeps; torch's Adam keeps a step, not stored so."""

    def set_states_and_step(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        set_states(self, model_param, tensors | {name: state[name] for name in ("step",) if name in state})

    return set_states_and_step


def _write_item_with_format() -> dict[str, Any]:
    """Megatron-core before 0.14 calls torch's `_write_item` as torch 2.6 had it, without a serialization format."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import filesystem

    wanted = "serialization_format" in inspect.signature(filesystem._write_item).parameters
    if not wanted or "serialization_format" in inspect.getsource(filesystem_async):
        return {}
    torch_save = filesystem.SerializationFormat.TORCH_SAVE
    write_item = functools.partial(filesystem._write_item, serialization_format=torch_save)
    return {"megatron.core.dist_checkpointing.strategies.filesystem_async._write_item": write_item}
