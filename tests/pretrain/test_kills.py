"""Whatever a SIGKILL leaves of a save, the last whole checkpoint is found, and the run that goes on from it is the same run."""

import itertools
import os
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

import kills

from mindspeed_nsa.pretrain import checkpoint


def test_a_run_killed_while_saving_goes_on_to_the_bit(server, text, tmp_path):
    last = 8
    killed, rows = kills.run_with_kills(server, text, tmp_path / "killed", count=3, last=last)
    whole = kills.run(server, text, tmp_path / "whole", f"training.train_iters={last}")
    assert [row["iteration"] for row in rows] == list(range(1, last + 1))
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole]
    assert killed[0].left != "nothing"


class Killed(BaseException):
    pass


def publish(root, calls=-1):
    """Put a new checkpoint of iteration 4 in its place, killed after so many changes of files: whether it was."""
    left = [calls]  # below 0: never

    def limited(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    unfinished = whole(root / ".iter_0000004.new", "new")
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (Path, "write_text")):
            patch.setattr(module, name, limited(getattr(module, name)))
        try:
            checkpoint._publish(unfinished, root, 4)
        except Killed:
            return True
    return False


def whole(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metadata.json", "job.json"):
        (folder / name).write_text(text)
    return folder


def found(root):
    return (checkpoint.find(str(root)) / "job.json").read_text()


@pytest.mark.parametrize(
    "there",
    [
        ["iter_0000002"],
        ["iter_0000002", "iter_0000004"],
        ["iter_0000004"],
        ["iter_0000004.replaced"],  # as a run leaves it that was killed between two changes
        ["iter_0000004.replaced", "iter_0000004"],
    ],
)
def test_a_checkpoint_takes_its_place_whole_or_not_at_all(tmp_path, there):
    """Killed between any two changes of files, a run leaves the checkpoint that was found before it, or its own."""
    for calls in itertools.count():
        root = tmp_path / str(calls)
        for name in there:
            whole(root / name, name)
        (root / "latest_checkpointed_iteration.txt").write_text(there[-1].removeprefix("iter_").removesuffix(".replaced"))
        assert found(root) == there[-1]
        is_killed = publish(root, calls)
        assert found(root) in ({there[-1], "new"} if is_killed else {"new"})
        publish(root)
        assert found(root) == "new" and not list(root.glob("*.replaced"))
        if not is_killed:
            break
    assert calls >= 3
