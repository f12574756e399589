"""Runs jobs of one process from a process that has torch and Megatron imported: most of a small job is its start.

Reads a JSON object a line, {"arguments": ..., "stdout": ..., "stderr": ...}, and answers each with the job's exit code.
"""

import json
import os
import runpy
import sys

import mindspeed_nsa.pretrain.trainer  # noqa: F401


def run(request: dict) -> int:
    """The job, as `python -m mindspeed_nsa.pretrain` in a process of its own."""
    for descriptor, path in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = ["mindspeed_nsa.pretrain", *request["arguments"]]
    try:
        runpy.run_module("mindspeed_nsa.pretrain", run_name="__main__", alter_sys=True)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = run(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
