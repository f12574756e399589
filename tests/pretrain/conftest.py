import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from jobs import arguments, command, environment
from texts import prepare_text


class Run(NamedTuple):
    code: int
    stdout: str
    stderr: str
    rows: list[dict[str, Any]]

    def values(self, key: str) -> list[float]:
        return [row[key] for row in self.rows if key in row]


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """The prefix of datasets of the standard library's text, cut into documents of many lengths."""
    return prepare_text(tmp_path_factory.mktemp("data"), (1, 3, 40, 100, 300, 700), held_out=0.2)


@pytest.fixture(scope="session")
def forked(tmp_path_factory) -> Iterator[Callable[[list[str]], tuple[int, str, str]]]:
    """Run a job of one process (see `forked.py`): its arguments to its exit code, stdout and stderr."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forked.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    assert server.stdin and server.stdout

    def run(arguments: list[str]) -> tuple[int, str, str]:
        folder = tmp_path_factory.mktemp("output")
        stdout, stderr = folder / "stdout", folder / "stderr"
        request = {"arguments": arguments, "stdout": str(stdout), "stderr": str(stderr)}
        print(json.dumps(request), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return code, stdout.read_text(), stderr.read_text()

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="session")
def run_job(text, forked, tmp_path_factory) -> Callable[..., Run]:
    """Run a small job: `run_job(*overrides, ranks=0, folder=None, ok=True)`; a job that should work must."""

    def run(*overrides: str, ranks: int = 0, folder: Path | None = None, ok: bool = True) -> Run:
        folder = folder or tmp_path_factory.mktemp("run")
        if ranks:
            line = command(text, folder, overrides, ranks)
            done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
            code, stdout, stderr = done.returncode, done.stdout, done.stderr
        else:
            code, stdout, stderr = forked(arguments(text, folder, overrides))
        assert not ok or code == 0, stdout[-2000:] + stderr[-6000:]
        metrics = folder / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        return Run(code, stdout, stderr, rows)

    return run
