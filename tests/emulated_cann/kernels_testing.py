"""Calls a kernel as torch_npu would, for the tests of the kernels."""

from types import SimpleNamespace

import torch
from torch import Tensor

from .kernels import KERNELS
from .signatures import SIGNATURES
from .variants import Variants

HUGE = 1 << 30


def call(name: str, variants: str = "", deterministic: bool = False, **given) -> SimpleNamespace:
    """Run a kernel on `given` inputs and outputs; optional inputs may be left out. Outputs are poisoned first."""
    parameters = {parameter.name: parameter for parameter in SIGNATURES[name]}
    assert given.keys() <= parameters.keys(), given.keys() - parameters.keys()
    arguments = {name: given.get(name) for name in parameters} | {"layout": given.get("layout", "TND")}
    for output in (arguments[name] for name, parameter in parameters.items() if parameter.output):
        if output is not None:
            output.fill_(torch.nan if output.is_floating_point() else HUGE)
    args = SimpleNamespace(**arguments)
    KERNELS[name](args, Variants.parse(variants), deterministic)
    return args


def statistics(query: Tensor) -> dict[str, Tensor]:
    """Room for the softmax statistics."""
    return {name: torch.empty(*query.shape[:2], 8) for name in ("softmax_max", "softmax_sum")}


def attention_outputs(query: Tensor, value: Tensor) -> dict[str, Tensor]:
    """Room for what attention returns, unrounded, so that sums can be compared exactly."""
    return {"attention": torch.empty(*query.shape[:2], value.shape[-1]), **statistics(query)}


def gradient_outputs(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
    """Room for gradients, unrounded."""
    return {f"{name}_grad": torch.empty(x.shape) for name, x in (("query", query), ("key", key), ("value", value))}


def true_order(statistic: Tensor, ends: list[int]) -> Tensor:
    """[T, N1] from copies that lie as [N1, S_b, 8], sample after sample."""
    flat, heads = statistic.flatten(), statistic.shape[1]
    spans = zip([0, *ends[:-1]], ends, strict=True)
    return torch.cat([flat[a * heads * 8 : b * heads * 8].view(heads, b - a, 8)[..., 3].T for a, b in spans])


def oracle(query: Tensor, key: Tensor, value: Tensor, scale: float, counts: Tensor) -> Tensor:
    """Attention of one sample in float64; `counts` [N2, S_q, S_kv] says how often each key is seen."""
    group = query.shape[1] // key.shape[1]
    key, value, counts = (x.repeat_interleave(group, dim) for x, dim in ((key, 1), (value, 1), (counts, 0)))
    logits = torch.einsum("qnd,knd->nqk", query, key) * scale
    probability = (logits + counts.double().log()).softmax(-1)
    return torch.einsum("nqk,knd->qnd", probability, value)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Differences are small beside the largest value expected."""
    worst = (actual.double() - expected.double()).abs().max() / expected.abs().max()
    assert worst <= tolerance, float(worst)
