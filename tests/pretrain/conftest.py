from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from jobs import JobServer, arguments, rows
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
def server(tmp_path_factory) -> Iterator[JobServer]:
    with JobServer(tmp_path_factory.mktemp("output")) as started:
        yield started


@pytest.fixture(scope="session")
def run_job(text, server, tmp_path_factory) -> Callable[..., Run]:
    """Run a small job: `run_job(*overrides, ranks=0, folder=None, ok=True)`; a job that should work must."""

    def run(*overrides: str, ranks: int = 0, folder: Path | None = None, ok: bool = True) -> Run:
        folder = folder or tmp_path_factory.mktemp("run")
        server.start(arguments(text, folder, overrides), ranks)
        code, stdout, stderr = server.wait()
        assert not ok or code == 0, stdout[-2000:] + stderr[-6000:]
        return Run(code, stdout, stderr, rows(folder))

    return run
