"""The measurement: every contender, forward and backward, in one process, interleaved, on the same inputs."""

import datetime
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..heap import prepare_heap
from ..ops.cpu import native
from .contenders import Built, Contender, check, contenders, make_inputs, why_not
from .measure import Ceilings, Clock, Spread, backward, ceilings, forward, peak_bytes

PASSES = ("forward", "backward")
ROUNDS = 6
_COLD = 2  # calls that find their memory given back: memory is counted in the first round, for which each call gives all back
_QUICK = 1.0  # seconds; what takes less is warmed up by calls that do not count, and so is what is ours


class Row(NamedTuple):
    """One contender at one length.

    Attributes:
        measured_at: the length that was measured; where it is shorter, times are carried by T^2 and memory by T.
        rounds: how many calls the spread is of.
        peak_mib: memory beyond the inputs; of backward, its forward included.
    """

    contender: str
    direction: str  # forward or backward
    threads: int
    tokens: int
    measured_at: int
    rounds: int
    cpu: Spread
    wall: Spread
    peak_mib: float


class Result(NamedTuple):
    """All that is written down."""

    machine: dict[str, str]
    dtype: str
    budget: float
    ceilings: dict[int, Ceilings]  # by threads
    missing: list[str]
    rows: list[Row]


def run(
    lengths: Sequence[int], threads: Sequence[int], dtype: torch.dtype, budget: float, say: Callable[[str], None]
) -> Iterator[Result]:
    """Measure, and tell what is known each time that a length is done: a run that is ended early was not for nothing.

    Args:
        lengths: tokens of the one causal sample, rising.
        threads: numbers of threads, each measured in turn.
        dtype: of all tensors.
        budget: seconds; another's call that would take longer is carried from a shorter sample, and a call is not repeated
            once all its rounds together have taken this long. Ours are called three times at least: two do not count.
        say: is told what goes on.

    Raises:
        RuntimeError: contenders that compute the same do not agree.
    """
    prepare_heap()  # as the trainer does, for all contenders
    before = torch.get_num_threads()
    found: dict[int, Ceilings] = {}
    rows: list[Row] = []
    try:
        torch.set_num_threads(max(threads))
        check(dtype)
        for number in threads:
            torch.set_num_threads(number)
            found[number] = ceilings(dtype, number)
            last: dict[tuple[str, str], Row] = {}
            for tokens in lengths:
                say(f"{tokens:,} tokens, {number} thread{'s' * (number > 1)}")
                rows += _at_length(tokens, number, dtype, budget, last)
                yield Result(_machine(), str(dtype).removeprefix("torch."), budget, found, why_not(), rows)
    finally:
        torch.set_num_threads(before)


def _at_length(tokens: int, threads: int, dtype: torch.dtype, budget: float, last: dict[tuple[str, str], Row]) -> list[Row]:
    """The rows of one length; `last` holds those of the longest that was measured, and is kept up."""
    inputs = make_inputs(tokens, dtype)
    carried: list[Row] = []
    calls: dict[tuple[str, str], Callable[[], Clock]] = {}
    for contender in contenders():
        measured = [
            direction for direction in PASSES if _affordable(contender, tokens, budget, last.get((contender.name, direction)))
        ]
        built = contender.build(inputs) if measured else None
        for direction in PASSES:
            key = contender.name, direction
            if built is not None and direction in measured and (direction == "forward" or built[1]):
                calls[key] = _call(built, direction)
            elif key in last:
                carried.append(_carry(last[key], tokens))
    rows = [_row(key, threads, tokens, *timed) for key, timed in _interleave(calls, budget).items()]
    last |= {(row.contender, row.direction): row for row in rows}
    return rows + carried


def _affordable(contender: Contender, tokens: int, budget: float, last: Row | None) -> bool:
    if contender.ours:
        return True
    predicted = 0.0 if last is None else last.wall.median / 1e3 * (tokens / last.measured_at) ** 2
    return tokens <= contender.most and predicted <= budget


def _call(built: Built, direction: str) -> Callable[[], Clock]:
    return (lambda: forward(built[0])) if direction == "forward" else (lambda: backward(*built))


def _interleave(
    calls: dict[tuple[str, str], Callable[[], Clock]], budget: float
) -> dict[tuple[str, str], tuple[list[Clock], int]]:
    """Round after round over all calls, so that what else the machine does meets them alike: their clocks, and peak memory."""
    clocks: dict[tuple[str, str], list[Clock]] = {key: [] for key in calls}
    peaks = {}
    for key, call in calls.items():  # memory is counted in the first round
        peaks[key] = peak_bytes(lambda call=call, taken=clocks[key]: taken.append(call()))  # type: ignore[misc]
    ours = {contender.name for contender in contenders() if contender.ours}
    for turn in range(ROUNDS):
        for key, call in calls.items():
            affordable = sum(clock.wall for clock in clocks[key]) + clocks[key][-1].wall <= budget
            if affordable or (turn < _COLD and key[0] in ours):
                clocks[key].append(call())
    # A minute of another's is too long to take it twice for a warm call.
    warm = {
        key: taken[_COLD:] if key[0] in ours or (len(taken) > _COLD and taken[0].wall < _QUICK) else taken
        for key, taken in clocks.items()
    }
    return {key: (warm[key], peaks[key]) for key in calls}


def _row(key: tuple[str, str], threads: int, tokens: int, clocks: list[Clock], peak: int) -> Row:
    cpu, wall = Spread.of([clock.cpu for clock in clocks]), Spread.of([clock.wall for clock in clocks])
    return Row(*key, threads, tokens, tokens, len(clocks), cpu, wall, peak / 2**20)


def _carry(row: Row, tokens: int) -> Row:
    longer = tokens / row.measured_at
    cpu, wall = row.cpu.times(longer**2), row.wall.times(longer**2)
    return row._replace(tokens=tokens, cpu=cpu, wall=wall, peak_mib=row.peak_mib * longer)


def _machine() -> dict[str, str]:
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine(),
        "instruction set": native.isa(),
        "torch": torch.__version__,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def as_json(result: Result) -> dict[str, Any]:
    """As plain lists and dictionaries."""
    rows = [row._asdict() | {"cpu": row.cpu._asdict(), "wall": row.wall._asdict()} for row in result.rows]
    found = {str(number): found._asdict() for number, found in result.ceilings.items()}
    return result._asdict() | {"rows": rows, "ceilings": found}
