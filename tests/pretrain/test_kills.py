"""Whatever a SIGKILL leaves of a save, the last whole checkpoint is found, and the run that goes on from it is the same run."""

import os
import shutil
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


@pytest.fixture
def killed_after(monkeypatch):
    """Let so many calls of those that change files through, and no more."""

    def install(count):
        left = [count]

        def limited(function):
            def call(*args, **kwargs):
                if not left[0]:
                    raise Killed
                left[0] -= 1
                return function(*args, **kwargs)

            return call

        for module, name in ((os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree")):
            monkeypatch.setattr(module, name, limited(getattr(module, name)))
        monkeypatch.setattr(Path, "write_text", limited(Path.write_text))

    return install


def whole(folder, text):
    folder.mkdir()
    for name in ("metadata.json", "job.json"):
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "again"])
@pytest.mark.parametrize("calls", range(11))
def test_a_checkpoint_takes_its_place_whole_or_not_at_all(tmp_path, monkeypatch, killed_after, calls, is_there):
    """Killed between any two changes of the file system, when the run comes to an iteration for the first time or again."""
    whole(tmp_path / "iter_0000002", "old")
    if is_there:
        whole(tmp_path / "iter_0000004", "old")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4" if is_there else "2")
    unfinished = whole(tmp_path / ".iter_0000004.new", "new")
    killed_after(calls)
    try:
        checkpoint._publish(unfinished, tmp_path, 4)
        is_killed = False
    except Killed:
        is_killed = True
    monkeypatch.undo()
    found = checkpoint.find(str(tmp_path))
    allowed = [("iter_0000002", "old"), ("iter_0000004", "new"), *[("iter_0000004", "old")] * is_there]
    assert (found.name, (found / "job.json").read_text()) in allowed
    assert is_killed or found.name == "iter_0000004"
