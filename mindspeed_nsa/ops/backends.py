"""Which code runs an operator: a small registry of modules whose functions are named as in `reference`."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch

_MODULES = {name: f"{__package__}.{name}" for name in ("reference", "cpu", "ascend")}
_OF_DEVICE = {"npu": "ascend", "cpu": "cpu"}
_logger = logging.getLogger(__name__)
_chosen = "auto"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators called inside on one backend.

    Args:
        name: `reference`, `cpu` or `ascend`; `auto` is the default elsewhere: ascend on NPU tensors, cpu on CPU tensors, else
            the reference.

    Raises:
        ValueError: there is no backend of that name, or it cannot run here.
    """
    global _chosen
    if name != "auto":
        load(name, "cpu")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def resolve(name: str) -> str:
    """The backend for a caller that asks for `name`: `auto` defers to `use_backend`, and stays `auto` outside of one."""
    return _chosen if name == "auto" else name


@cache
def load(name: str, device_type: str) -> ModuleType:
    """The module that runs tensors on `device_type` for a resolved backend name.

    Raises:
        ValueError: there is no backend of that name, or what it is built on does not load.
    """
    wanted = _OF_DEVICE.get(device_type, "reference") if name == "auto" else name
    if wanted not in _MODULES:
        raise ValueError(f"there is no backend {name!r}; allowed: auto, {', '.join(_MODULES)}")
    try:
        return importlib.import_module(_MODULES[wanted])
    except ImportError as error:
        if (name, wanted) == ("auto", "cpu"):
            _logger.warning("no native CPU kernels: %s; the operators run on the reference, which is slow", error)
            return importlib.import_module(_MODULES["reference"])
        raise ValueError(f"backend {wanted!r} cannot run here: {error}; `mindspeed-nsa doctor` says what to do") from error


@torch.compiler.assume_constant_result
def selects_own_block(name: str, device_type: str, group: int) -> bool:
    """Whether a query's own block may be in the selected branch: not where the chip stays causal by plan B alone.

    Args:
        name: a resolved backend name.
        device_type: of the tensors.
        group: query heads a key/value head.
    """
    backend = load(name, device_type)
    return not hasattr(backend, "plan") or backend.plan(group).name == "A"


@torch.compiler.assume_constant_result
def attends_whole(name: str, device_type: str, *types: torch.dtype) -> bool:
    """Whether a backend has one operator for the three attentions and their gates, `sparse_attention`.

    Args:
        name: a resolved backend name.
        device_type: of the tensors.
        types: of the tensors.
    """
    backend = load(name, device_type)
    return hasattr(backend, "attends_whole") and backend.attends_whole(*types)


@torch.compiler.assume_constant_result
def chooses_inside(name: str, device_type: str, group: int, own_block: bool, importance: str) -> bool:
    """Whether one operator of a backend attends and chooses blocks: it leaves no scores to sum over ranks.

    Args:
        name: a resolved backend name.
        device_type: of the tensors.
        group: query heads a key/value head, of all ranks.
        own_block: see `reference.Compressed`; `importance` likewise.
        importance: see above.
    """
    backend = load(name, device_type)
    return hasattr(backend, "operator_chooses") and backend.operator_chooses(group, own_block, importance)
