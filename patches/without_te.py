"""What Megatron-core needs where there is no Transformer Engine, whatever the device, and where torch and numpy are newer.

Nothing happens on import: the host's module installs it. Every stand-in is catalogued in `patches/__init__.py`.
"""

import functools
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

import numpy
import torch

_ABSENT = object()
_replaced: list[tuple[Any, str, Any]] = []


def install() -> None:
    """Put the stand-ins in place."""
    replace(_stand_ins(), _replaced)


def uninstall() -> None:
    """Take every stand-in away again."""
    restore(_replaced)


def replace(stand_ins: dict[str, Any], replaced: list[tuple[Any, str, Any]]) -> None:
    """Put each stand-in where its dotted name says, and note in `replaced` what was there."""
    for target, stand_in in stand_ins.items():
        owner_name, name = target.rsplit(".", 1)
        owner = pkgutil.resolve_name(owner_name)
        replaced.append((owner, name, getattr(owner, name, _ABSENT)))
        setattr(owner, name, stand_in)


def restore(replaced: list[tuple[Any, str, Any]]) -> None:
    """Undo `replace`."""
    while replaced:
        owner, name, original = replaced.pop()
        if original is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def _stand_ins() -> dict[str, Any]:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    stand_ins: dict[str, Any] = {
        # Only fp8 parameters need it; without Transformer Engine it raises even when there are none.
        "megatron.core.optimizer.distrib_optimizer.quantize_param_shard": lambda *args, **kwargs: None,
        "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states": (
            _with_own_step(DistributedOptimizer._set_main_param_and_optimizer_states)
        ),
        **{target: wrapper(pkgutil.resolve_name(target)) for target, wrapper in write_item().items()},
    }
    if not hasattr(numpy, "product"):
        # Megatron-core 0.12's checkpoints of a distributed optimizer; numpy 2 has it under one name alone.
        stand_ins["numpy.product"] = numpy.prod
    if not hasattr(moe_utils, "te_general_gemm"):
        # Asked for whether it is None by 0.16's router, which defines it with Transformer Engine alone.
        stand_ins["megatron.core.transformer.moe.moe_utils.te_general_gemm"] = None
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


def write_item() -> dict[str, Callable]:
    """The wrapper of torch's `_write_item` that Megatron-core before 0.14 needs on this torch, by its target; empty if none.

    It calls the function as torch 2.6 had it, without the serialization format that later ones want.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import filesystem

    wanted = "serialization_format" in inspect.signature(filesystem._write_item).parameters
    if not wanted or "serialization_format" in inspect.getsource(filesystem_async):
        return {}
    return {"megatron.core.dist_checkpointing.strategies.filesystem_async._write_item": _write_item_wrapper}


def _write_item_wrapper(write_item: Callable) -> Callable:
    """`_write_item` whose format may be left out. MindSpeed's manager puts it in torch's own module too, which gives one."""
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    @functools.wraps(write_item)
    def with_format(
        transforms: Any, stream: Any, data: Any, item: Any, key: str, format: Any = SerializationFormat.TORCH_SAVE
    ) -> Any:
        return write_item(transforms, stream, data, item, key, format)

    return with_format
