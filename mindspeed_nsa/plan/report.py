"""A plan as tables, as JSON and as a picture."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mindspeed_nsa.memory import GB, RESERVE, choosing_ranks, gathers_queries
from mindspeed_nsa.ops.reference import window_count
from mindspeed_nsa.plan.bounds import Bound, hardware
from mindspeed_nsa.plan.plan import Plan, Rank, Refusal
from mindspeed_nsa.plan.wire import DIMENSIONS, by_dimension

_MEMORY = {
    "weights": "weights",
    "gradients": "gradients, float32",
    "optimizer": "optimizer",
    "activations": "activations, and the gradients of a layer",
    "logits": "logits",
    "masks": "masks",
}
_BOUNDS = {"compute": "multiplications", "memory": "memory", "hccs": "HCCS", "roce": "RoCE"}


def write(cells: list[Plan | Refusal], output: Path) -> list[Path]:
    """Write `plan.md`, `plan.json` and `plan.png` into a folder.

    Returns:
        The files.
    """
    output.mkdir(parents=True, exist_ok=True)
    text, data, picture = (output / f"plan.{suffix}" for suffix in ("md", "json", "png"))
    text.write_text(markdown(cells), encoding="utf-8")
    data.write_text(json.dumps([as_json(cell) for cell in cells], indent=1) + "\n", encoding="utf-8")
    _draw([cell for cell in cells if isinstance(cell, Plan)], picture)
    return [text, data, picture]


def as_json(cell: Plan | Refusal) -> dict[str, Any]:
    """A cell of a sweep; bytes, seconds and operations."""
    if isinstance(cell, Refusal):
        return {"nodes": cell.nodes, "seq_length": cell.length, "refused": cell.reason}
    return {
        "nodes": cell.nodes,
        "ranks": cell.world_size,
        "seq_length": cell.job.model.seq_length,
        "flops_per_token": cell.flops._asdict() | {"nsa": cell.flops.nsa._asdict()},
        "stages": [
            {
                "layers": rank.layers,
                "parameters": rank.parameters._asdict(),
                "memory": rank.memory._asdict() | {"reserve": RESERVE, "total": rank.memory.total},
                "messages": [message._asdict() | {"sent": message.sent} for message in rank.messages],
                "least_seconds": rank.bound._asdict(),
            }
            for rank in cell.ranks
        ],
    }


def markdown(cells: list[Plan | Refusal]) -> str:
    """One plan whole; several as a row each."""
    if len(cells) == 1 and isinstance(cells[0], Plan):
        return "\n\n".join(_whole(cells[0])) + "\n"
    return "\n".join(_rows(cells)) + "\n"


# ---- a sweep


def _rows(cells: list[Plan | Refusal]) -> Iterator[str]:
    plans = [cell for cell in cells if isinstance(cell, Plan)]
    sent = [name for name in DIMENSIONS if any(name in by_dimension(plan.fullest.messages) for plan in plans)]
    yield from _head(
        ["nodes", "tokens", "GB a rank", "seconds a step, at least", "by", *(f"GB sent: {name}" for name in sent)], 2
    )
    for cell in cells:
        if isinstance(cell, Refusal):
            yield _line(
                [str(cell.nodes), f"{cell.length:,}" if cell.length else "", f"refused: {cell.reason}"] + [""] * (2 + len(sent))
            )
            continue
        slowest = max(cell.ranks, key=lambda rank: rank.bound.least)
        bytes_sent = by_dimension(cell.fullest.messages)
        total = cell.fullest.memory.total
        fits = "" if total <= hardware().hbm_bytes else ", too much"
        yield _line(
            [str(cell.nodes), f"{cell.job.model.seq_length:,}", f"{total / GB:.1f}{fits}", _seconds(slowest.bound.least)]
            + [_limit(slowest.bound)]
            + [f"{bytes_sent.get(name, 0) / GB:,.1f}" for name in sent]
        )


def _limit(bound: Bound) -> str:
    return next(_BOUNDS[name] for name, part in bound._asdict().items() if part == bound.least)


# ---- one plan


def _whole(plan: Plan) -> Iterator[str]:
    rank = plan.fullest
    yield _layout(plan)
    yield "\n".join(_holds(plan, rank))
    if plan.job.nsa.enabled:
        yield "Calls of a layer with NSA, forward, for one micro-batch:\n\n" + "\n".join(_calls(plan))
    yield "\n".join(_memory(rank))
    yield "\n".join(_flops(plan))
    if rank.messages:
        yield "\n".join(_messages(rank))
    yield "Least time of a step by published peaks, each part as if nothing else took any:\n\n" + "\n".join(_times(plan))


def _layout(plan: Plan) -> str:
    job, parallel = plan.job, plan.job.parallel
    parts = [f"tensor {parallel.tensor_model_parallel_size}{' with sequence parallel' * parallel.sequence_parallel}"]
    parts.append(f"context {parallel.context_parallel_size}{f' by {parallel.cp_comm_type}' if parallel.cp_comm_type else ''}")
    parts.append(f"pipeline {parallel.pipeline_model_parallel_size}")
    if job.model.num_experts:
        parts.append(f"expert {parallel.expert_model_parallel_size}")
    parts.append(f"data {job.data_parallel_size(plan.world_size)}")
    of_stages = ""
    if len(plan.ranks) > 1:
        of_stages = f" Figures are of stage {plan.fullest.stage}, counted from 0, whose ranks need most memory."
    batches = (
        f"{job.micro_batches(plan.world_size)} micro-batches of {job.training.micro_batch_size} x {job.model.seq_length:,}"
    )
    return (
        f"{_nodes(plan.nodes)}, {plan.world_size} ranks: {', '.join(parts)}; {batches} tokens a step; recompute "
        f"{parallel.recompute_granularity or 'none'}.{of_stages}"
    )


def _holds(plan: Plan, rank: Rank) -> Iterator[str]:
    model, held = plan.job.model, plan.job.held_heads
    yield from _head(["", "model", "a rank"], 1)
    yield _line(["query heads held", str(model.num_attention_heads), str(held.head_num)])
    yield _line(["key/value groups held", str(model.query_groups), str(held.kv_head_num)])
    yield _line(["ranks that choose the blocks of a group together", "", str(choosing_ranks(plan.job))])
    yield _line(["layers", str(model.num_layers), str(len(rank.layers))])
    yield _line(["parameters without routed experts", "", f"{rank.parameters.shared:,}"])
    yield _line(["parameters of routed experts", "", f"{rank.parameters.experts:,}"])


def _calls(plan: Plan) -> Iterator[str]:
    job, run = plan.job, plan.job.run_heads
    tokens = job.model.seq_length * job.training.micro_batch_size
    queries = tokens // (job.parallel.context_parallel_size if job.parallel.cp_comm_type == "all_gather" else 1)
    windows = window_count(job.model.seq_length, job.nsa.compress_block_size, job.nsa.compress_stride)
    windows *= job.training.micro_batch_size
    yield from _head(["operator", "calls", "head_num", "key/value heads", "queries", "keys"], 1)
    yield _line(["compress", "2, keys and values", "", str(run.kv_head_num), "", f"{tokens:,} to {windows:,}"])
    of_all = run.head_num * (choosing_ranks(job) if gathers_queries(job) else 1)
    calls = (("compress", of_all, windows), ("select", run.head_num, tokens), ("window", run.head_num, tokens))
    for name, heads, keys in calls:
        yield _line([f"{name} attention", "1", str(heads), str(run.kv_head_num), f"{queries:,}", f"{keys:,}"])


def _memory(rank: Rank) -> Iterator[str]:
    yield from _head(["memory of a rank", "GB"], 1)
    for name, title in _MEMORY.items():
        yield _line([title, f"{getattr(rank.memory, name) / GB:.2f}"])
    yield _line(["reserve, a guess", f"{RESERVE / GB:.2f}"])
    yield _line(["all", f"{rank.memory.total / GB:.2f} of {hardware().hbm_bytes / GB:.0f}"])


def _flops(plan: Plan) -> Iterator[str]:
    flops, nsa = plan.flops, plan.flops.nsa
    attention = sum(nsa) - nsa.projections + flops.dense
    yield from _head(["operations of a token, forward, whole model", "GFLOP", "of all"], 1)
    parts = {
        "NSA: pooling": nsa.compression,
        "NSA: compressed tokens": nsa.compress,
        "NSA: selected blocks": nsa.select,
        "NSA: window": nsa.window,
        "NSA: keys and values of branches, gates": nsa.projections,
        "attention of dense layers": flops.dense,
        "other matrices": flops.matrices,
        "all": flops.total,
        "beside the model: compressed tokens, by each rank for all that share its groups": flops.repeated,
    }
    for name, part in parts.items():
        if part:
            yield _line([name, f"{part / 1e9:,.3f}", f"{part / flops.total:.1%}"])
    if plan.job.nsa.enabled:
        yield _line(
            ["attention, were all layers dense", f"{flops.all_dense / 1e9:,.3f}", f"{flops.all_dense / attention:.1f} x NSA's"]
        )


def _messages(rank: Rank) -> Iterator[str]:
    yield from _head(
        ["dimension", "what is sent", "collective", "ranks", "MB a message", "messages a step", "GB sent a step"], 3
    )
    for message in rank.messages:
        sizes = [str(message.ranks), f"{message.payload / 1e6:,.3f}", f"{message.times:,.0f}", f"{message.sent / GB:,.3f}"]
        yield _line([message.dimension, message.what, message.collective, *sizes])
    for name, total in by_dimension(rank.messages).items():
        yield _line([f"**{name}**", "", "", "", "", "", f"**{total / GB:,.3f}**"])


def _times(plan: Plan) -> Iterator[str]:
    slowest = max(plan.ranks, key=lambda rank: rank.bound.least).bound
    yield from _head(["", "seconds"], 1)
    for name, title in _BOUNDS.items():
        part = getattr(slowest, name)
        yield _line([title, "unknown: no peak of float32 is published" if part is None else _seconds(part)])
    tokens = plan.job.training.global_batch_size * plan.job.model.seq_length
    rate = tokens / slowest.least / plan.world_size
    yield _line(["a step, at least", f"{_seconds(slowest.least)}: at most {rate:,.0f} tokens a second and rank"])


def _nodes(count: int) -> str:
    return f"{count} node{'s' * (count > 1)}"


def _seconds(value: float) -> str:
    return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def _head(names: list[str], left: int) -> Iterable[str]:
    return _line(names), "|" + " --- |" * left + " ---: |" * (len(names) - left)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


# ---- the picture


def _draw(plans: list[Plan], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, time, wire) = pyplot.subplots(1, 3, figsize=(16, 5))
    nodes = sorted({plan.nodes for plan in plans})
    for color, count in enumerate(nodes):
        own = [plan for plan in plans if plan.nodes == count]
        lengths = [plan.job.model.seq_length for plan in own]
        memory.plot(lengths, [plan.fullest.memory.total / GB for plan in own], "o-", color=f"C{color}", label=_nodes(count))
        time.plot(lengths, [plan.step_seconds for plan in own], "o-", color=f"C{color}", label=_nodes(count))
    memory.axhline(hardware().hbm_bytes / GB, linestyle=":", color="black", label="HBM of a die")
    memory.set(title="memory of the fullest rank", ylabel="GB")
    time.set(title="least time of a step, published peaks", ylabel="seconds", yscale="log")
    most = [plan for plan in plans if plan.nodes == nodes[-1]]
    for name in DIMENSIONS:
        sent = [by_dimension(plan.fullest.messages).get(name, 0) / GB for plan in most]
        if any(sent):
            wire.plot([plan.job.model.seq_length for plan in most], sent, "o-", label=name)
    wire.set(title=f"sent by a rank in a step, {_nodes(nodes[-1])}", ylabel="GB", yscale="log")
    lengths = sorted({plan.job.model.seq_length for plan in plans})
    for axis in (memory, time, wire):
        axis.set(xscale="log", xlabel="tokens of a sequence")
        axis.set_xticks(lengths, [f"{t // 1024}k" if t % 1024 == 0 else str(t) for t in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    memory.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
