"""What was measured, as a table, as JSON and as a picture.

The dotted lines in the picture bound what a kernel could reach: all its multiplications at the processor's peak, in registers.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .contenders import HEADS, QK_DIM, V_DIM
from .runner import PASSES, Result, Row, as_json

NSA, FLASH = "NSA, whole", "torch flash attention"


def write(result: Result, output: Path) -> list[Path]:
    """Write `bench.md`, `bench.json` and one picture a number of threads into a folder.

    Returns:
        The files.
    """
    output.mkdir(parents=True, exist_ok=True)
    table, data = output / "bench.md", output / "bench.json"
    table.write_text(markdown(result))
    data.write_text(json.dumps(as_json(result), indent=1) + "\n")
    return [table, data, *(_draw(result, threads, output / f"bench_{threads}.png") for threads in result.ceilings)]


# ---- the table


def markdown(result: Result) -> str:
    """Tables of medians, for each number of threads."""
    machine = result.machine
    parts = [
        f"{machine['date']}, {machine['processor']}, {machine['instruction set']}, torch {machine['torch']}, {result.dtype}; "
        f"{HEADS} query heads on 1 key/value head, dims {QK_DIM}/{V_DIM}, one causal sample. Milliseconds: medians, in "
        "brackets the fastest and the slowest. `*`: carried from the longest sample that was affordable, by T^2 (memory by T)."
    ]
    parts += [f"Not measured: {reason}." for reason in result.missing]
    for threads, found in result.ceilings.items():
        parts.append(
            f"### {threads} thread{'s' * (threads > 1)}\n\nIn the same run: {found.matrix / 1e12:.2f} TFLOP/s in registers, "
            f"{found.exp / 1e9:.2f} G exponentials/s (torch, nearest cache), {found.read / 1e9:.0f} GB/s read from memory."
        )
        # One thread's CPU time is its own, whatever else runs; of several only the wall tells.
        clock = "cpu" if threads == 1 else "wall"
        for direction in PASSES:
            rows = [row for row in result.rows if (row.threads, row.direction) == (threads, direction)]
            parts.append(f"{direction.capitalize()}, {'CPU time' if clock == 'cpu' else 'time'}:\n\n" + _times(rows, clock))
        rows = [row for row in result.rows if (row.threads, row.direction) == (threads, "backward")]
        parts.append("Peak memory beyond the inputs, forward and backward, MiB:\n\n" + _memory(rows))
    return "\n\n".join(parts) + "\n"


def _times(rows: list[Row], clock: str) -> str:
    def cell(row: Row) -> str:
        spread = getattr(row, clock)
        star = "*" if row.measured_at < row.tokens else ""
        around = f" [{spread.low:,.0f}, {spread.high:,.0f}]" if row.rounds > 1 else ""
        return f"{spread.median:,.{1 if spread.median < 10 else 0}f}{star}{around}"

    by_place = {(row.contender, row.tokens): row for row in rows}
    lines = _grid(rows, cell)
    lengths = sorted({row.tokens for row in rows})
    if all((name, tokens) in by_place for name in (NSA, FLASH) for tokens in lengths):
        times = [getattr(by_place[FLASH, t], clock).median / getattr(by_place[NSA, t], clock).median for t in lengths]
        lines.append("| **flash / NSA, whole** | " + " | ".join(f"**{x:.1f}**" for x in times) + " |")
    return "\n".join(lines)


def _memory(rows: list[Row]) -> str:
    return "\n".join(_grid(rows, lambda row: f"{row.peak_mib:,.0f}{'*' if row.measured_at < row.tokens else ''}"))


def _grid(rows: list[Row], cell: Any) -> list[str]:
    lengths, names = sorted({row.tokens for row in rows}), dict.fromkeys(row.contender for row in rows)
    by_place = {(row.contender, row.tokens): row for row in rows}
    lines = ["| | " + " | ".join(f"{tokens:,}" for tokens in lengths) + " |", "| --- |" + " ---: |" * len(lengths)]
    for name in names:
        cells = (cell(by_place[name, tokens]) if (name, tokens) in by_place else "" for tokens in lengths)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


# ---- the picture


def operations(name: str, direction: str, tokens: int) -> float:
    """Floating point operations of the multiplications of a causal sample: of the whole of NSA, or of dense attention."""
    keys = tokens * (tokens + 1) / 2
    if name == NSA:
        keys = keys / 16 + sum(min(t + 1, 1024) + min(t + 1, 512) for t in range(tokens))
    dims = QK_DIM + V_DIM if direction == "forward" else 3 * QK_DIM + 2 * V_DIM
    return 2 * HEADS * dims * keys


def _draw(result: Result, threads: int, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    clock = "cpu" if threads == 1 else "wall"
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6.5), sharey=True)
    colors = _colors([row.contender for row in result.rows])
    for axis, direction in zip(axes, PASSES, strict=True):
        rows = [row for row in result.rows if (row.threads, row.direction) == (threads, direction)]
        for name in dict.fromkeys(row.contender for row in rows):
            _line(axis, [row for row in rows if row.contender == name], clock, colors[name])
        lengths = sorted({row.tokens for row in rows})
        for name in (NSA, FLASH):
            bound = [1e3 * operations(name, direction, t) / result.ceilings[threads].matrix for t in lengths]
            axis.plot(lengths, bound, ":", color=colors[name], label=f"{name}: multiplications at the peak")
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{direction}, {result.dtype}")
        axis.set_xticks(lengths, [f"{t // 1024}k" if t % 1024 == 0 else str(t) for t in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{'CPU time' if clock == 'cpu' else 'time'}, milliseconds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8)
    machine = result.machine
    figure.suptitle(
        f"{machine['processor']}, {machine['instruction set']}, {threads} thread{'s' * (threads > 1)}, {machine['date']}"
    )
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _colors(names: Iterable[str]) -> dict[str, str]:
    """A color for each name, the same in every panel."""
    fixed = {NSA: "C0", FLASH: "C3"}
    others = [name for name in dict.fromkeys(names) if name not in fixed]
    return fixed | dict(zip(others, ("C1", "C2", "C4", "C5", "C6", "C7", "C8", "C9"), strict=False))


def _line(axis: Any, rows: list[Row], clock: str, color: str) -> None:
    """Measured values joined; carried ones hollow."""
    name = rows[0].contender
    values = [getattr(row, clock).median for row in rows]
    tokens = [row.tokens for row in rows]
    axis.plot(tokens, values, "-", linewidth=2.5 if name in (NSA, FLASH) else 1, color=color, label=name)
    for row, value in zip(rows, values, strict=True):
        carried = row.measured_at < row.tokens
        axis.plot(row.tokens, value, "o", color=color, markerfacecolor="white" if carried else None, markersize=4)
