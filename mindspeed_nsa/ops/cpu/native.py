"""The shared library of the native kernels, through ctypes: the types and functions of `csrc/kernels.h`."""

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
IMPORTANCES = {"ascend": 0, "paper": 1}
_NO_MEMORY = 1
_LIBRARY = Path(__file__).with_name("libkernels.so")


class Tensor(ctypes.Structure):
    """[T, N, D] with the last dimension contiguous; strides in elements."""

    _fields_ = (("data", c_void_p), ("token_stride", c_int64), ("head_stride", c_int64))
    owner: torch.Tensor  # keeps the memory


class Attention(ctypes.Structure):
    """What all attentions share."""

    _fields_ = (
        *(("type", c_int32), ("threads", c_int32)),
        *((name, c_int64) for name in ("query_heads", "kv_heads", "qk_dim", "v_dim")),
        *(("scale", c_double), ("samples", c_int64)),
        *((name, POINTER(c_int64)) for name in ("q_end", "kv_end", "q_offset")),
    )


class Selected(ctypes.Structure):
    """Listed blocks."""

    _fields_ = (("block_size", c_int64), ("count", c_int64), ("causal", c_int32), ("ordered", c_int32), ("ids", c_void_p))


class Compressed(ctypes.Structure):
    """Compressed windows, and how blocks are chosen by them."""

    _fields_ = (
        *((name, c_int64) for name in ("compress_block_size", "compress_stride", "select_block_size", "select_block_count")),
        *(("init_blocks", c_int64), ("local_blocks", c_int64), ("own_block", c_int32), ("importance", c_int32)),
        ("sel_end", POINTER(c_int64)),
    )


_tensor, _attention, _out, _ends = POINTER(Tensor), POINTER(Attention), c_void_p, POINTER(c_int64)
_qkv = (_tensor, _tensor, _tensor)
_statistics = (c_void_p, c_void_p)
_compress = (c_int32, c_int32, *(c_int64,) * 5, _ends)
_gated = (c_int32, c_int32, c_int32, *(c_int64,) * 3)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "compress_forward": (*_compress, _tensor, c_void_p, _out),
    "compress_backward": (*_compress, _tensor, _tensor, c_void_p, _out, _out),
    "window_forward": (_attention, c_int64, *_qkv, _out, *_statistics),
    "window_backward": (_attention, c_int64, _tensor, *_qkv, _tensor, *_statistics, _out, _out, _out),
    "select_forward": (_attention, POINTER(Selected), *_qkv, _out, *_statistics),
    "select_backward": (_attention, POINTER(Selected), _tensor, *_qkv, _tensor, *_statistics, _out, _out, _out),
    "compress_attention_forward": (_attention, POINTER(Compressed), *_qkv, _out, _out, *_statistics),
    "compress_attention_backward": (
        *(_attention, POINTER(Compressed), _tensor, *_qkv, _tensor, *_statistics),
        *(_out, _out, _out),
    ),
    "block_scores": (_attention, POINTER(Compressed), _tensor, _tensor, c_int64, c_int64, _out),
    "sparse_attention_forward": (
        *(_attention, _ends, POINTER(Compressed), c_int64, _tensor, _tensor, _tensor, c_int32, c_void_p),
        *(_out, _out, *(POINTER(c_void_p),) * 3),
    ),
    "gated_sum_forward": (*_gated, c_void_p, _tensor, _out),
    "gated_sum_backward": (*_gated, _tensor, c_void_p, _tensor, _out, POINTER(c_void_p)),
}


def call(function: str, *arguments: Any) -> None:
    """Run `nsa_<function>`; the interpreter's lock is released meanwhile.

    Raises:
        MemoryError: a temporary did not fit.
    """
    status = getattr(_library, f"nsa_{function}")(*arguments)
    if status == _NO_MEMORY:
        raise MemoryError(f"native CPU kernel {function}: out of memory")
    assert status == 0, (function, status)


def int64s(values: Sequence[int]) -> Any:
    """A C array."""
    return (c_int64 * len(values))(*values)


def pointers(tensors: Sequence[torch.Tensor]) -> Any:
    """A C array of where they lie."""
    return (c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def tensor(x: torch.Tensor) -> Tensor:
    """A view of [T, N, D]; a copy, where the last dimension is not contiguous."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    view = Tensor(x.data_ptr(), x.stride(0), x.stride(1))
    view.owner = x
    return view


def isa() -> str:
    """The instruction set in use: generic, avx2, avx512 or amx."""
    return str(_library.nsa_isa().decode())


def peak(tiles: bool) -> float:
    """The floating point operations a second of the calling thread: in bfloat16 tiles, if there are, or float32."""
    return float(_library.nsa_peak(tiles))


def isas() -> list[str]:
    """The instruction sets that this build and this processor have, best last."""
    return list(_library.nsa_isas().decode().split())


def load(path: Path) -> ctypes.CDLL:
    """Make a build of the kernels the one that is called.

    Raises:
        ImportError: it is not there, or does not load.
        ValueError: NSA_CPU_ISA names an instruction set that the processor does not have.
    """
    global _library
    if not path.exists():
        note = path.with_name("not_built.txt")
        raise ImportError(note.read_text().strip() if note.exists() else f"{path} is not there")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(str(error)) from error
    for name, argument_types in _FUNCTIONS.items():
        function = getattr(library, f"nsa_{name}")
        function.argtypes, function.restype = argument_types, c_int32
    library.nsa_peak.argtypes, library.nsa_peak.restype = (c_int32,), c_double
    library.nsa_isa.restype = library.nsa_isas.restype = c_char_p
    if library.nsa_isa() is None:
        allowed = library.nsa_isas().decode().replace(" ", ", ")
        raise ValueError(f"NSA_CPU_ISA is {os.environ['NSA_CPU_ISA']!r}; this processor allows: {allowed}")
    _library = library
    return library


_library = load(_LIBRARY)
