"""The fused operators of torch_npu that MindSpeed's dense parts call, in plain torch on the memory of the device.

They replace torch_npu's operators, not CANN's: nothing is proved of them. Attention is not among them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import records
from .aten import host, moved

_library = torch.library.Library("npu", "IMPL")


def install() -> None:
    """Register each in the place of torch_npu's kernel."""
    kernels = {
        "npu_rms_norm": _rms_norm,
        "npu_rms_norm_backward": _rms_norm_backward,
        "npu_rotary_mul": _rotary_mul,
        "npu_rotary_mul_backward": _rotary_mul_backward,
        "npu_swiglu": _swiglu,
        "npu_swiglu_backward": _swiglu_backward,
    }
    for name, kernel in kernels.items():
        _library.impl(name, kernel, "PrivateUse1", allow_override=True)


def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    records.add("aten", "npu::npu_rms_norm")
    values = host(x).float()
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)
    return moved((values * scale * host(gamma).float()).to(x.dtype)), moved(scale)


def _rms_norm_backward(grad: Tensor, x: Tensor, gamma: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    records.add("aten", "npu::npu_rms_norm_backward")
    values, by, of_gamma = (host(t).float() for t in (x, scale, gamma))
    normalised, given = values * by, host(grad).float()
    inner = given * of_gamma
    of_x = by * (inner - normalised * (inner * normalised).mean(-1, keepdim=True))
    gamma_grad = (given * normalised).flatten(0, -gamma.dim() - 1).sum(0)
    return moved(of_x.to(x.dtype)), moved(gamma_grad)


def _rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    records.add("aten", "npu::npu_rotary_mul")
    values = host(x)
    return moved(values * host(cos) + _turned(values, rotary_mode) * host(sin))


def _rotary_mul_backward(
    grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    records.add("aten", "npu::npu_rotary_mul_backward")
    given, values = host(grad), host(x)
    of_x = given * host(cos) - _turned(given * host(sin), rotary_mode)
    of_cos = (given * values).sum_to_size(cos.shape)
    of_sin = (given * _turned(values, rotary_mode)).sum_to_size(sin.shape)
    return moved(of_x), moved(of_cos), moved(of_sin)


def _turned(x: Tensor, rotary_mode: str) -> Tensor:
    """A quarter turn of each pair of the last dim; its transpose is its negative."""
    if rotary_mode == "half":
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def _swiglu(x: Tensor, dim: int = -1) -> Tensor:
    records.add("aten", "npu::npu_swiglu")
    gate, values = host(x).float().chunk(2, dim)
    return moved((F.silu(gate) * values).to(x.dtype))


def _swiglu_backward(grad: Tensor, x: Tensor, dim: int = -1) -> Tensor:
    records.add("aten", "npu::npu_swiglu_backward")
    gate, values = host(x).float().chunk(2, dim)
    given, open_ = host(grad).float(), gate.sigmoid()
    of_gate = given * values * open_ * (1 + gate * (1 - open_))
    return moved(torch.cat([of_gate, given * gate * open_], dim).to(x.dtype))
