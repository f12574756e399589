"""What a run shows while it goes and leaves in its folder: a live line, TensorBoard's files, `metrics.jsonl`."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from mindspeed_nsa.pretrain.job import Job


class Report:
    """The reporter of one rank; on any rank but the first it does nothing.

    Args:
        job: its `logging` section and the number of iterations.
        iteration: where the run starts; rows that an earlier run left after it are dropped.
        active: whether this rank reports.
    """

    def __init__(self, job: Job, iteration: int, *, active: bool) -> None:
        self._active = active
        self._every = job.logging.log_interval
        self._total = job.training.train_iters
        if not active:
            return
        run_dir = Path(job.logging.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = _reopen(run_dir / "metrics.jsonl", iteration)
        self._board = _board(run_dir, iteration) if job.logging.tensorboard else None
        self._live = _LiveLine(iteration, self._total) if sys.stdout.isatty() else None

    def wants(self, iteration: int) -> bool:
        """Whether this iteration is shown, and needs the statistics of the attention."""
        return iteration % self._every == 0 or iteration in (1, self._total)

    def say(self, line: str) -> None:
        """Print a line above the live one."""
        if not self._active:
            return
        if self._live:
            self._live.say(line)
        else:
            print(line, flush=True)

    def iteration(self, row: dict[str, Any], statistics: dict[int, dict[str, float]]) -> None:
        """Record an iteration.

        Args:
            row: what `metrics.jsonl` gets, with at least `iteration`.
            statistics: of each NSA layer, counted from 0; empty where there are none.
        """
        if not self._active:
            return
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        number = row["iteration"]
        if self._board and (self.wants(number) or number == 0):
            for name, value in row.items():
                if name != "iteration":
                    self._board.add_scalar(name, value, number)
            for layer, values in statistics.items():
                for name, value in values.items():
                    self._board.add_scalar(f"layer_{layer}/{name}", value, number)
        if "loss" not in row:
            return
        if self._live:
            self._live.update(row)
        elif self.wants(number):
            self.say(f"iteration {number}/{self._total}  {describe(row)}")

    def close(self) -> None:
        """End the live line and close the files."""
        if not self._active:
            return
        if self._live:
            self._live.stop()
        if self._board:
            self._board.close()
        self._metrics.close()


def describe(row: dict[str, Any]) -> str:
    """The part of a line that tells of one iteration."""
    text = f"loss {row['loss']:.4f}  grad norm {row['grad_norm']:.3f}  lr {row['learning_rate']:.2e}"
    text += f"  {row['tokens_per_second']:,.0f} tokens/s"
    return text + (f"  held-out loss {row['valid_loss']:.4f}" if "valid_loss" in row else "")


def _reopen(path: Path, iteration: int) -> Any:
    """Open for appending, with the rows up to an iteration kept if the run goes on from there."""
    kept = []
    if iteration and path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            # A row that a crash cut short is dropped.
            with contextlib.suppress(ValueError):
                if json.loads(line)["iteration"] <= iteration:
                    kept.append(line)
    stream = path.open("w", encoding="utf-8")
    stream.writelines(f"{line}\n" for line in kept)
    return stream


def _board(run_dir: Path, iteration: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides points of an earlier run from purge_step on.
    return SummaryWriter(str(run_dir), purge_step=iteration + 1 if iteration else 0)


class _LiveLine:
    def __init__(self, iteration: int, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TextColumn("time left"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("starting", total=total, completed=iteration)
        self._progress.start()

    def update(self, row: dict[str, Any]) -> None:
        self._progress.update(self._task, completed=row["iteration"], description=describe(row))

    def say(self, line: str) -> None:
        self._progress.print(line, markup=False, highlight=False)

    def stop(self) -> None:
        self._progress.stop()
