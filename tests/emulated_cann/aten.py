"""Every aten operator of the emulated device: its memory is host memory, so the CPU's kernels run on an alias of it."""

import ctypes
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, empty_strided, frombuffer  # not as transfer_to_npu wraps them, which costs more than they do

from . import records

# torch_npu's own code serves what only makes memory or views.
_NATIVE = {
    *("empty.memory_format", "empty_strided", "empty_like", "new_empty_strided", "set_", "set_.source_Storage"),
    *("set_.source_Storage_storage_offset", "set_.source_Tensor", "resize_", "record_stream", "is_pinned", "_pin_memory"),
    *("alias", "detach", "contiguous"),
}
# The host waits for these: their result, or its size, is known to the device alone.
_SYNCHRONISING = {
    *("equal", "nonzero", "nonzero.out", "where", "masked_select", "masked_select.out", "_unique", "_unique2", "unique_dim"),
    *("unique_consecutive", "bincount", "repeat_interleave.Tensor", "repeat_interleave.self_Tensor"),
}
_BY_INDEX = {"index.Tensor", "index.Tensor_out", "index_put", "index_put_", "_index_put_impl_"}
_library = torch.library.Library("aten", "IMPL")
_npu_library = torch.library.Library("npu", "IMPL")


def host(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of a tensor on the device; a CPU tensor as it is."""
    if tensor.device.type != "npu":
        return tensor.detach()
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = over_memory(storage.data_ptr(), storage.nbytes() // tensor.element_size(), tensor.dtype)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def over_memory(address: int, elements: int, dtype: torch.dtype) -> Tensor:
    """A flat CPU tensor over memory that somebody else owns."""
    memory = (ctypes.c_uint8 * (elements * dtype.itemsize)).from_address(address)
    return frombuffer(memory, dtype=torch.uint8).view(dtype)


def install() -> None:
    """Register a kernel for every aten operator that torch_npu has one for and that the CPU can run."""
    warnings.filterwarnings("ignore", message="Warning only once for all operators")
    warnings.filterwarnings("ignore", message=".*Overriding a previously registered kernel.*")
    special = {"matmul_backward": _matmul_backward, "copy_": _copy_, "_to_copy": _to_copy, "_local_scalar_dense": _scalar}
    for name in torch._C._dispatch_get_all_op_names():
        if not name.startswith("aten::") or not torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1"):
            continue
        short = name.removeprefix("aten::")
        op = _overload(short)
        if short in special:
            _library.impl(short, special[short], "PrivateUse1", allow_override=True)
        elif op is not None and short not in _NATIVE and not op.is_view and _runs_on_cpu(name):
            _library.impl(short, _seeded(op) if _draws(op) else _on_host(op), "PrivateUse1", allow_override=True)
    for name in ("_npu_dtype_cast", "npu_dtype_cast_backward"):
        _npu_library.impl(name, _cast, "PrivateUse1", allow_override=True)


def _overload(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, base, None), overload or "default", None)


def _runs_on_cpu(name: str) -> bool:
    kinds = ("CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd", "CompositeExplicitAutogradNonFunctional")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, kind) for kind in kinds)


def _on_host(op: Any) -> Callable:
    name, short = op.name(), op.name().removeprefix("aten::")

    def run(*args, **kwargs):
        aliased: dict[int, tuple[Tensor, Tensor]] = {}

        def to_host(x):
            if isinstance(x, torch.device):
                return torch.device("cpu")
            if not isinstance(x, Tensor) or x.device.type != "npu":
                return x
            alias = host(x)
            aliased[id(alias)] = (x, alias)
            return alias

        def to_device(x):
            if not isinstance(x, Tensor):
                return x
            return aliased[id(x)][0] if id(x) in aliased else moved(x)

        records.add("synchronising" if short in _SYNCHRONISING or _by_mask(short, args) else "aten", name)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            out = op(*_each(to_host, args), **{name: _each(to_host, value) for name, value in kwargs.items()})
            for tensor, alias in aliased.values():
                if alias.shape != tensor.shape:  # an `out=` that had to grow
                    host(tensor.resize_(alias.shape)).copy_(alias)
        return _each(to_device, out)

    return run


def _each(function: Callable, value: Any) -> Any:
    """A function of a value, or of each one in sequences, which stay what they are; thousands a step, so no pytree."""
    if isinstance(value, (tuple, list)):
        return type(value)([_each(function, one) for one in value])
    return function(value)


def _by_mask(name: str, args: tuple) -> bool:
    """Whether an operator is an index by mask, whose size depends on data."""
    indices = args[1] if name in _BY_INDEX else ()
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def moved(tensor: Tensor) -> Tensor:
    """A tensor on the device with the values of one on the CPU."""
    out = empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="npu")
    host(out).copy_(tensor)
    return out


def _draws(op: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in op.tags


def _seeded(op: Any) -> Callable:
    """An operator that draws numbers: from the device's own generator, so that draws of host and device do not mix."""
    plain = _on_host(op)

    def run(*args, generator=None, **kwargs):
        generator = generator or torch.npu.default_generators[torch.npu.current_device()]  # type: ignore[attr-defined]
        state, before = generator.get_state(), torch.default_generator.get_state()
        seed, offset = state.view(torch.int64).tolist()
        torch.default_generator.manual_seed((seed * 1000003 + offset) % 2**63)
        try:
            out = plain(*args, **kwargs)
        finally:
            torch.default_generator.set_state(before)
        state.view(torch.int64)[1] += 4
        generator.set_state(state)
        return out

    return run


def _matmul_backward(grad: Tensor, first: Tensor, second: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor]:
    """Of torch_npu alone: the gradient of its fused matmul."""
    records.add("aten", "aten::matmul_backward")
    a, b, g = host(first), host(second), host(grad)
    if first.dim() == 1:
        a, g = a.unsqueeze(-2), g.unsqueeze(-2)
    if second.dim() == 1:
        b, g = b.unsqueeze(-1), g.unsqueeze(-1)
    of_first = (g @ b.mT).sum_to_size(a.shape).reshape(first.shape)
    of_second = (a.mT @ g).sum_to_size(b.shape).reshape(second.shape)
    return moved(of_first), moved(of_second)


def _cast(tensor: Tensor, dtype: torch.dtype, *types: int | None) -> Tensor:
    """Of torch_npu alone: what its autocast does, and the gradient of that."""
    records.add("aten", "npu::npu_dtype_cast")
    return moved(host(tensor).to(dtype))


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _note_copy("aten::copy_", source.device.type, target.device.type)
    host(target).copy_(host(source))
    return target


def _to_copy(tensor: Tensor, *, device: torch.device | None = None, **kwargs) -> Tensor:
    to = tensor.device.type if device is None else torch.device(device).type
    _note_copy("aten::_to_copy", tensor.device.type, to)
    kwargs.pop("non_blocking", None)
    out = torch.ops.aten._to_copy(host(tensor), **kwargs)
    return out if to == "cpu" else moved(out)


def _note_copy(name: str, source: str, target: str) -> None:
    if source == target:
        records.add("aten", name)
    else:
        records.add_copy("host_to_device" if target == "npu" else "device_to_host", name)


def _scalar(tensor: Tensor) -> Any:
    records.add("synchronising", "aten::_local_scalar_dense")
    records.add_copy("device_to_host", "aten::_local_scalar_dense")
    return host(tensor).item()
