"""Kill jobs in saves and in the steps between them, start them again, and see that they go on as if nothing had happened.

`PYTHONPATH=tests python tests/pretrain/kills.py` kills twenty times and prints what each left behind.
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jobs import JobServer, arguments, rows

from mindspeed_nsa.pretrain.checkpoint import find

RANKS = 2
SETTINGS = ("parallel.use_distributed_optimizer=true",)


class Kill(NamedTuple):
    moment: float  # 0 the start of a save, 1 the end of the step after it, as long as the two before took
    left: str  # of a save that was killed
    latest: str  # the checkpoint that is named


def run(server: JobServer, text: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The rows of a job that is let to end."""
    server.start(arguments(text, folder / "run", (*SETTINGS, *overrides)), RANKS)
    code, stdout, stderr = server.wait()
    assert code == 0, stdout[-2000:] + stderr[-6000:]
    return rows(folder / "run")


def run_with_kills(server: JobServer, text: Path, folder: Path, count: int, last: int) -> tuple[list[Kill], list[dict]]:
    """Kill a job so often, each time after the first save that it finishes, and let it run to the `last` iteration.

    Returns:
        What each kill left, and the rows of all iterations.
    """
    rng, kills, checkpoints = random.Random(0), [], folder / "checkpoints"
    saving = (f"training.train_iters={last}", f"checkpoint.save={checkpoints}", "checkpoint.save_interval=1")
    loading: tuple[str, ...] = ()
    for number in range(count):
        server.start(arguments(text, folder / "run", (*SETTINGS, *saving, *loading)), RANKS)
        moment = ((number + rng.random()) / count) ** 2  # more in the save, which is the smaller part
        kills.append(_kill(server, checkpoints, moment))
        loading = (f"checkpoint.load={checkpoints}",)
    return kills, run(server, text, folder, f"training.train_iters={last}", *loading)


def _kill(server: JobServer, checkpoints: Path, moment: float) -> Kill:
    before, left = _latest(checkpoints), _unfinished(checkpoints)
    _wait(lambda: _unfinished(checkpoints) - left)
    started = time.perf_counter()
    _wait(lambda: _latest(checkpoints) != before)
    _wait(lambda: _unfinished(checkpoints))
    time.sleep((time.perf_counter() - started) * moment)
    server.kill()
    code, *_ = server.wait()
    assert code == -9
    named = find(str(checkpoints)).name
    unfinished = _unfinished(checkpoints)
    assert all(folder.name > f".{named}" for folder in unfinished)
    files = sum(file.stat().st_size > 0 for folder in unfinished for file in folder.iterdir())
    return Kill(moment, f"{files} files" if unfinished else "nothing", named)


def _latest(checkpoints: Path) -> str:
    file = checkpoints / "latest_checkpointed_iteration.txt"
    return file.read_text() if file.exists() else ""


def _unfinished(checkpoints: Path) -> set[Path]:
    return set(checkpoints.glob(".iter_*"))


def _wait(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline, "the job does not get there"
        time.sleep(0.002)


def main() -> None:
    from texts import prepare_text

    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as name, JobServer(Path(name)) as server:
        folder = Path(name)
        text = prepare_text(folder, (1, 3, 40, 100, 300, 700), held_out=0.2)
        kills, rows = run_with_kills(server, text, folder / "killed", count, last=2 * count + 2)
        whole = run(server, text, folder / "whole", f"training.train_iters={2 * count + 2}")
    print("| moment of a save and a step | left unfinished | goes on from |", "| --- | --- | --- |", sep="\n")
    for kill in kills:
        print(f"| {kill.moment:.2f} | {kill.left} | {kill.latest} |")
    same = [row["loss"] for row in rows] == [row["loss"] for row in whole]
    print(f"losses of {len(rows)} iterations", "equal to the bit" if same else "NOT EQUAL")


if __name__ == "__main__":
    main()
