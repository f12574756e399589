"""Inside a process that runs over the emulated CANN: hands each aclnn call to the kernel of that name."""

import ctypes
import os
import struct
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import aten, hccl, records, torchair
from .kernels_common import Refused, Trap
from .records import Log, record
from .signatures import SIGNATURES, Parameter
from .variants import Variants

__all__ = ["Log", "record", "start", "take_traps", "use_variants"]

_OK, _BAD_PARAMETER, _FAILED = 0, 161002, 561103
_DTYPES = {
    **{0: torch.float32, 1: torch.float16, 2: torch.int8, 3: torch.int32, 4: torch.uint8},
    **{6: torch.int16, 9: torch.int64, 11: torch.float64, 12: torch.bool, 27: torch.bfloat16},
}
_variants = Variants()
_traps: list[str] = []


class _Tensor(ctypes.Structure):
    """`Tensor` of opapi.c."""

    _fields_ = (
        ("ndim", ctypes.c_uint64),
        ("dtype", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("stride", ctypes.POINTER(ctypes.c_int64)),
        ("data", ctypes.c_void_p),
        ("storage_size", ctypes.c_int64),
    )


class _IntArray(ctypes.Structure):
    """`IntArray` of opapi.c."""

    _fields_ = (("size", ctypes.c_uint64), ("values", ctypes.POINTER(ctypes.c_int64)))


@cache
def start() -> None:
    """Make this process's device work, before anything runs on it.

    Raises:
        ValueError: `EMULATED_CANN_VARIANTS` names a variant that there is not.
    """
    global _variants
    _variants = Variants.parse(os.environ.get("EMULATED_CANN_VARIANTS", ""))
    first = _library("libopapi.so").emulated_set_callback(_call)
    assert first, "this module was imported under two names"
    runtime = _library("libascendcl.so")
    runtime.emulated_counters.restype = ctypes.POINTER(ctypes.c_uint64)
    runtime.emulated_deterministic.restype = ctypes.c_int64
    records.count_with(runtime.emulated_counters())
    aten.install()
    hccl.install()
    torchair.install()


@contextmanager
def use_variants(**flags: bool) -> Iterator[None]:
    """Let the kernels differ from what was read of them; the names are those of `Variants`."""
    global _variants
    before = _variants
    _variants = replace(before, **flags)
    try:
        yield
    finally:
        _variants = before


def take_traps() -> list[str]:
    """What a chip would have done wrong in silence since the last call, and forget it."""
    taken = list(_traps)
    _traps.clear()
    return taken


@cache
def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(os.environ["EMULATED_CANN"]) / name))


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64))
def _call(name: bytes, words: Any) -> int:
    operator = name.decode()
    try:
        _run(operator, words)
    except Refused as error:
        return _fail(_BAD_PARAMETER, f"{operator} refused: {error}")
    except Trap as error:
        _traps.append(f"{operator}: {error}")
        return _fail(_FAILED, f"{operator} trapped: {error}")
    except BaseException as error:
        traceback.print_exc()
        return _fail(_FAILED, f"{operator} broke: {error!r}")
    return _OK


def _run(operator: str, words: Any) -> None:
    from .kernels import KERNELS

    parameters = SIGNATURES[operator]
    with torch.no_grad(), torch._C.DisableTorchFunction():
        arguments = {p.name: _decode(p, words[i]) for i, p in enumerate(parameters)}
        records.add("ascend", operator, {name: _described(value) for name, value in arguments.items()})
        for p in parameters:
            if p.output and arguments[p.name] is not None:
                _poison(arguments[p.name])
        deterministic = bool(_library("libascendcl.so").emulated_deterministic())
        KERNELS[operator](SimpleNamespace(**arguments), _variants, deterministic)


def _decode(parameter: Parameter, word: int) -> Any:
    if parameter.kind == "i":
        return ctypes.c_int64(word).value
    if parameter.kind == "d":
        return struct.unpack("d", struct.pack("Q", word))[0]
    if word == 0:
        return None
    if parameter.kind == "s":
        return ctypes.string_at(word).decode()
    if parameter.kind == "I":
        array = _IntArray.from_address(word)
        return array.values[: array.size]
    return _tensor(_Tensor.from_address(word))


def _tensor(t: _Tensor) -> Tensor:
    shape, stride, dtype = t.shape[: t.ndim], t.stride[: t.ndim], _DTYPES[t.dtype]
    if 0 in shape or not t.data:
        return torch.empty_strided(shape, stride, dtype=dtype)
    return aten.over_memory(t.data, t.storage_size, dtype).as_strided(shape, stride, t.offset)


def _poison(output: Tensor) -> None:
    output.fill_(float("nan") if output.is_floating_point() else torch.iinfo(output.dtype).max)


def _described(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _fail(status: int, message: str) -> int:
    print(message, file=sys.stderr)
    _library("libascendcl.so").emulated_set_message(message.encode())
    return status
