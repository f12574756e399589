"""Runs jobs from a process that has torch and Megatron imported: most of a small job is its start.

Reads a JSON object a line, {"arguments": ..., "ranks": ..., "port": ..., "stdout": ..., "stderr": ...}, and answers each with
the job's exit code. With `ranks` 0 the job is a process as it is; else it is so many with the environment that torchrun gives
them, which are killed when the first of them fails.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys

from megatron.core.dist_checkpointing.strategies import filesystem_async

import mindspeed_nsa.pretrain.trainer  # noqa: F401


def run(arguments: list[str]) -> int:
    """The job, as `python -m mindspeed_nsa.pretrain` in a process of its own."""
    # Megatron's helper for saving: started as it does it, it would import torch again.
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    sys.argv = ["mindspeed_nsa.pretrain", *arguments]
    try:
        runpy.run_module("mindspeed_nsa.pretrain", run_name="__main__", alter_sys=True)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def run_ranks(arguments: list[str], ranks: int, port: int) -> int:
    children = set()
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in place.items()}
        children.add(fork(lambda: run(arguments)))
    while children:
        child, status = os.wait()
        children.discard(child)
        if code := os.waitstatus_to_exitcode(status):
            for other in children:
                os.kill(other, signal.SIGKILL)
            return code
    return 0


def run_request(request: dict) -> int:
    for descriptor, path in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), descriptor)
    if request["ranks"]:
        return run_ranks(request["arguments"], request["ranks"], request["port"])
    return run(request["arguments"])


def fork(function) -> int:
    """A child that ends with the function's result as its exit code, and ends what it has started itself."""
    child = os.fork()
    if child == 0:
        sys.exit(function())
    return child


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        child = fork(lambda request=request: run_request(request))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
