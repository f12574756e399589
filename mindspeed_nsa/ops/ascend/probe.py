"""What the installed operators really do, found out on the device before anything trusts them (contract, section 6)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference import Compressed
from . import operators
from .packing import BLOCK, COUNT, EARLY, SIZES, masks, windows_of

_TOKENS = 18 * BLOCK  # two blocks of queries that have a choice, one with 17 blocks to choose from and one with 18
_WINDOW = 512
_SCALE = 192**-0.5
# Largest difference from the reference, relative to its largest value: half types keep 8 to 11 bits, rounded a few times.
_LIMIT = 0.02
_MAY_DIFFER = 0.02  # of the rows: scores that differ by rounding alone may change places


class Plan(NamedTuple):
    """How attention stays causal and exact on a device.

    Attributes:
        name: `A`: the select operator is handed a mask, and masks by position. `B`: it is not, and lists only blocks before the
            query's own; queries that have no such list attend densely.
        chooses: the blocks that npu_nsa_compress_attention chooses are the right ones.
        pads_value: npu_fusion_attention takes no values narrower than keys.
    """

    name: str
    chooses: bool
    pads_value: bool


# What NSA_ASCEND_PLAN may say.
PLANS = {"A": Plan("A", chooses=True, pads_value=False), "B": Plan("B", chooses=False, pads_value=False)}


class Check(NamedTuple):
    """One finding. `error`: the largest difference from the reference, relative to its largest value, and what it may be."""

    operator: str
    passed: bool
    error: float | None
    limit: float | None
    finding: str


class Report(NamedTuple):
    """All findings, and the plan they allow; None: no plan."""

    checks: list[Check]
    plan: Plan | None
    reason: str


@torch.no_grad()
def probe(device: torch.device, group: int = 1) -> Report:
    """Run each operator on small inputs, forward and backward, and compare with the reference on the CPU.

    Args:
        device: an NPU.
        group: query heads a key/value head; large groups run another kernel. So does deterministic mode, if it is on.
    """
    inputs = _Inputs.random(device, group)
    dense, window = _fusion("causal", inputs, False, sparse_mode=2), _fusion("window", inputs, False, **_BAND)
    checks = [dense, window]
    pads_value = not (dense.passed and window.passed)
    if pads_value:
        dense, window = _fusion("causal", inputs, True, sparse_mode=2), _fusion("window", inputs, True, **_BAND)
        checks += [dense, window]
    compress, attention, choice = _compress(inputs), _compress_attention(inputs, pads_value), _choice(inputs)
    select = _select(inputs, masked=True)
    checks += [compress, attention, choice, select]
    if not select.passed:
        select_past = _select(inputs, masked=False)
        checks.append(select_past)
    broken = [check for check in (compress, attention, dense, window) if not check.passed]
    if broken:
        return Report(checks, None, f"{broken[0].operator}: {broken[0].finding}")
    if select.passed:
        plan = Plan("A", choice.passed, pads_value)
        return Report(checks, plan, "the select operator masks as read, forward and backward" + _exceptions(plan))
    if select_past.passed:
        plan = Plan("B", False, pads_value)
        reason = f"with a mask, {select.finding}; without, lists of past blocks are exact" + _exceptions(plan)
        return Report(checks, plan, f"{reason}; the selected branch leaves the query's own block to the window")
    return Report(checks, None, f"{select.operator}: {select.finding}; {select_past.finding}")


def _exceptions(plan: Plan) -> str:
    found = ""
    if plan.name == "A" and not plan.chooses:
        found += "; npu_nsa_compress_attention chooses other blocks, so PyTorch chooses"
    if plan.pads_value:
        found += "; npu_fusion_attention needs values as wide as keys, so they are padded"
    return found


class _Inputs(NamedTuple):
    """One sample on the device, bfloat16: query, key, value, gradient of the result; compressed keys and values."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    weight: Tensor
    small_key: Tensor
    small_value: Tensor

    @classmethod
    def random(cls, device: torch.device, group: int) -> "_Inputs":
        generator = torch.Generator().manual_seed(0)  # the job's own random numbers stay as they are
        windows = reference.window_count(_TOKENS, *SIZES[:2])
        shapes = [(_TOKENS, group, 192), (_TOKENS, 1, 192), (_TOKENS, 1, 128), (_TOKENS, group, 128), (32, 1)]
        shapes += [(windows, 1, 192), (windows, 1, 128)]
        return cls(*(torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes))

    def host(self) -> "_Inputs":
        """The same on the CPU."""
        return _Inputs(*(x.cpu() for x in self))


def _compare(operator: str, found: Callable[[], Sequence[Tensor]], expected: Callable[[], Sequence[Tensor]]) -> Check:
    """Run an operator and the reference; a result that differs, or an error of the operator, is a finding."""
    try:
        results = [x.cpu().float() for x in found()]
    except RuntimeError as error:
        return Check(operator, False, None, _LIMIT, f"it fails: {str(error).splitlines()[0]}")
    errors = [_difference(a, b.float()) for a, b in zip(results, expected(), strict=True)]
    worst = max(errors)
    if worst <= _LIMIT:
        return Check(operator, True, worst, _LIMIT, "as the reference")
    where = "the result" if errors[0] > _LIMIT else "the gradient"
    return Check(operator, False, worst, _LIMIT, f"{where} differs from the reference")


def _difference(found: Tensor, expected: Tensor) -> float:
    error = (found - expected).abs().max() / expected.abs().max()
    return error.item() if error.isfinite() else float("inf")


def _compress(inputs: _Inputs) -> Check:
    host, ends = inputs.host(), [40, _TOKENS]
    windows = sum(reference.window_count(length, *SIZES[:2]) for length in reference.lengths(ends))

    def run(x: _Inputs, forward: Any, backward: Any) -> Sequence[Tensor]:
        at = x.weight, *SIZES[:2], ends
        return forward(x.key, *at), *backward(x.small_key[:windows], x.key, *at)

    return _compare(
        "npu_nsa_compress",
        lambda: run(inputs, operators.compress, operators.compress_grad),
        lambda: run(host, reference.compress, reference.compress_backward),
    )


def _settings() -> Compressed:
    windows = windows_of((_TOKENS,), torch.device("cpu"))
    causal_init_local_own = True, 1, 2, True
    lists = windows.q_len, windows.cmp_len, windows.sel_len, [0]
    return Compressed(_SCALE, *SIZES, *causal_init_local_own, "ascend", *lists)


def _through_operator(inputs: _Inputs, at: Compressed) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    most = _TOKENS, at.cmp_len[-1], at.sel_len[-1]
    masked, forced = masks(*most, at.init_blocks, at.local_blocks, inputs.query.device)
    lists = {"actual_seq_qlen": at.q_len, "actual_cmp_seq_kvlen": at.cmp_len, "actual_sel_seq_kvlen": at.sel_len}
    results = operators.compress_attention(
        inputs.query, inputs.small_key, inputs.small_value, at.scale, SIZES, topk_mask=forced, atten_mask=masked, **lists
    )
    return results, masked


def _compress_attention(inputs: _Inputs, pads_value: bool) -> Check:
    host, at = inputs.host(), _settings()
    seen = slice(SIZES[0] - 1, None)  # the queries that see a window

    def on_device() -> Sequence[Tensor]:
        (attention, _, row_max, row_sum), masked = _through_operator(inputs, at)
        grad = inputs.grad.index_fill(0, windows_of((_TOKENS,), inputs.query.device).blind, 0)
        operands = grad, inputs.query, inputs.small_key, inputs.small_value, attention, row_max, row_sum
        how: dict[str, Any] = {"atten_mask": masked, "sparse_mode": 1, "pads_value": pads_value}
        grads = operators.fusion_attention_grad(*operands, at.scale, at.q_len, at.cmp_len, **how)
        return attention[seen], *grads

    def on_host() -> Sequence[Tensor]:
        operands = host.query, host.small_key, host.small_value, None, None
        attention, _, *statistics = reference.compress_attention(*operands, *at)
        return attention[seen], *reference.compress_attention_backward(host.grad, *operands, attention, *statistics, *at)

    return _compare("npu_nsa_compress_attention", on_device, on_host)


def _choice(inputs: _Inputs) -> Check:
    """Of scores that differ, and of scores that are equal: exactly 0, where one window has all the probability."""
    operator, at = "npu_nsa_compress_attention, choice", _settings()
    query, key = inputs.query[-1:, :1].expand_as(inputs.query).contiguous(), torch.zeros_like(inputs.small_key)
    key[BLOCK // SIZES[1] * 3] = 100 * query[0, 0]
    peaked = inputs._replace(query=query, small_key=key)
    finding, worst = "as the reference", 0.0
    for given, kind in ((inputs, "chooses other blocks"), (peaked, "breaks ties towards later blocks")):
        try:
            ids = _through_operator(given, at)[0][1].cpu()
        except RuntimeError as error:
            return Check(operator, False, None, _MAY_DIFFER, f"it fails: {str(error).splitlines()[0]}")
        operands = given.query.cpu(), given.small_key.cpu(), given.small_value.cpu(), None, None
        expected = reference.compress_attention(*operands, *at)[1]
        differ = (ids.sort(dim=-1).values != expected.sort(dim=-1).values).any(dim=-1)[EARLY:].float().mean().item()
        if differ > _MAY_DIFFER >= worst:
            finding = kind
        worst = max(worst, differ)
    return Check(operator, worst <= _MAY_DIFFER, worst, _MAY_DIFFER, finding)


_BAND: dict[str, Any] = {"sparse_mode": 4, "reach": _WINDOW - 1}


def _fusion(kind: str, inputs: _Inputs, pads_value: bool, **how: Any) -> Check:
    host, ends = inputs.host(), [_TOKENS]
    how |= {"atten_mask": operators.triangle(inputs.query.device), "pads_value": pads_value}

    def on_device() -> Sequence[Tensor]:
        operands = inputs.query, inputs.key, inputs.value
        saved = operators.fusion_attention(*operands, _SCALE, ends, ends, **how)
        return saved[0], *operators.fusion_attention_grad(inputs.grad, *operands, *saved, _SCALE, ends, ends, **how)

    def on_host() -> Sequence[Tensor]:
        operands = host.query, host.key, host.value
        at = _SCALE, how.get("reach", _TOKENS) + 1, ends, ends, [0]
        saved = reference.window_attention(*operands, *at)
        return saved[0], *reference.window_attention_backward(host.grad, *operands, *saved, *at)

    return _compare(f"npu_fusion_attention, {kind}" + (", padded values" if pads_value else ""), on_device, on_host)


def _select(inputs: _Inputs, masked: bool) -> Check:
    """With a mask: every row, the own block listed. Without: the rows that list only blocks before their own."""
    operator = f"npu_nsa_select_attention, {'masked' if masked else 'past blocks'}"
    host, ends = inputs.host(), [_TOKENS]
    kept = slice(0 if masked else EARLY, None)
    ids = _lists(masked)
    grad = torch.zeros_like(host.grad)
    grad[kept] = host.grad[kept]

    def on_device() -> Sequence[Tensor]:
        operands = inputs.query, inputs.key, inputs.value, ids.to(inputs.query.device)
        saved = operators.select_attention(*operands, _SCALE, ends, ends, masked)
        grads = operators.select_attention_grad(grad.to(inputs.grad.device), *operands, *saved, _SCALE, ends, ends, masked)
        return saved[0][kept], *grads

    def on_host() -> Sequence[Tensor]:
        operands = host.query, host.key, host.value, ids
        at = _SCALE, BLOCK, True, True, ends, ends, [0]
        saved = reference.select_attention(*operands, *at)
        return saved[0][kept], *reference.select_attention_backward(grad, *operands, *saved, *at)

    return _compare(operator, on_device, on_host)


def _lists(own_block: bool) -> Tensor:
    """Ascending lists with gaps, [_TOKENS, 1, COUNT]; the first EARLY rows list 0 to COUNT - 1."""
    ids = torch.arange(COUNT).repeat(_TOKENS, 1)
    for row in range(EARLY, _TOKENS):
        blocks = torch.arange(row // BLOCK + own_block)
        ids[row] = torch.cat([blocks[: row % COUNT], blocks[row % COUNT + len(blocks) - COUNT :]])
    return ids[:, None].int()
