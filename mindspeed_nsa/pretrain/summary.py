"""What a run has learned, read from the files it left: text for the terminal and a picture of the loss."""

import json
from pathlib import Path
from typing import Any

# A run's files, as the trainer names them.
METRICS, SAMPLE = "metrics.jsonl", "sample.txt"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, one an iteration; the row of iteration 0 is from before training.

    Raises:
        ValueError: the file is missing, empty, or holds a line that is no row.
    """
    path = run_dir / METRICS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["iteration"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}: line {number} is not a JSON object with an `iteration`") from None
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: empty: the run has not finished an iteration")
    return rows


def series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The iterations and values of the rows that have a key."""
    chosen = [row for row in rows if row.get(key) is not None]
    return [row["iteration"] for row in chosen], [row[key] for row in chosen]


def describe(run_dir: Path) -> str:
    """The losses on held-out text and a sample continuation, if the run has them, in lines of plain text.

    Raises:
        ValueError: the run left no metrics.
    """
    rows = read_metrics(run_dir)
    iterations, valid = series(rows, "valid_loss")
    _, unigram = series(rows, "unigram_loss")
    lines = [f"run         {run_dir} ({rows[-1]['iteration']} iterations)"]
    if valid:
        lines.append("loss on held-out text, nats per token (lower is better)")
        if iterations[0] == 0:
            lines.append(f"  {'before training':<28}{valid[0]:8.4f}")
        if unigram:
            lines.append(f"  {'unigram of the training text':<28}{unigram[-1]:8.4f}")
        if iterations[-1] > 0:
            lines.append(f"  {f'after {iterations[-1]} iterations':<28}{valid[-1]:8.4f}")
    else:
        lines.append("no evaluation on held-out text in this run")
    sample = run_dir / SAMPLE
    if sample.is_file():
        lines += ["", _printable(sample.read_text(encoding="utf-8"))]
    return "\n".join(lines)


def plot(run_dirs: list[Path], output: Path) -> None:
    """Draw the training and held-out loss of runs against the iteration, as a PNG.

    Args:
        run_dirs: one colour each, named by the folder.
        output: the picture; its folder is made if missing.

    Raises:
        ValueError: a run left no metrics, or the picture's name does not end with .png.
    """
    if output.suffix != ".png":
        raise ValueError(f"{output}: the picture's name must end with .png")
    runs = [(run_dir, read_metrics(run_dir)) for run_dir in run_dirs]

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    for number, (run_dir, rows) in enumerate(runs):
        color = f"C{number}"
        axes.plot(*series(rows, "loss"), color=color, alpha=0.35, linewidth=1, label=f"{run_dir.name}: training")
        iterations, valid = series(rows, "valid_loss")
        if valid:
            axes.plot(iterations, valid, color=color, marker="o", markersize=3.5, label=f"{run_dir.name}: held-out")
    # One corpus has one unigram: runs that share it share the line.
    for loss in sorted({loss for _, rows in runs for loss in series(rows, "unigram_loss")[1]}):
        axes.axhline(loss, color="0.5", linestyle="--", linewidth=1, label=f"unigram of the training text: {loss:.2f}")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize="small")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def _printable(text: str) -> str:
    """The text without what a terminal would obey: a model that learned little writes any byte."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text).rstrip()
