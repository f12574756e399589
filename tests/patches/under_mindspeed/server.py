"""Runs MindSpeed jobs on the emulated device from a process that has torch, torch_npu and MindSpeed imported: most of a small
job is its start. `python -m emulated_cann -m server` reads a JSON object a line, {"script", "arguments", "ranks", "folder"} and
perhaps "environment", and answers each with a line of "codes" and the ranks' exit codes.

A rank leaves in the folder its output as `rank0.txt`, and as `rank0.json` the calls of each operator and the attention cores.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import socket
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.utils.tensorboard
import torch_npu
from emulated_cann import device
from mindspeed.features_manager import features_manager  # noqa: F401  parses no argument yet
from torch_npu.contrib import transfer_to_npu  # noqa: F401  as the adaptor does first

with contextlib.suppress(ImportError):
    import transformers.modeling_utils  # noqa: F401  Megatron-LM imports it, seconds each time

# MindSpeed compiles its fused rotary embedding against CANN; a stand-in by the operator that torch_npu has for the same.
rotary = importlib.import_module("mindspeed.ops.npu_rotary_position_embedding")
rotary.npu_rotary_position_embedding = lambda x, cos, sin, mode=0: torch_npu.npu_rotary_mul(
    x, cos, sin, "interleave" if mode else "half"
)


def run(request: dict, rank: int) -> int:
    """One rank, as torchrun would start it."""
    folder = Path(request["folder"])
    output = os.open(folder / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(request.get("environment", {}), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["ranks"]))
    sys.argv = [request["script"], *request["arguments"]]
    code = 1
    with device.record(views=False) as log:
        try:
            runpy.run_path(request["script"], run_name="__main__")
            code = 0
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
    calls = Counter(event.name for event in log.events if event.kind == "ascend")
    (folder / f"rank{rank}.json").write_text(json.dumps({"calls": calls, "cores": cores(), "traps": device.take_traps()}))
    return code


def cores() -> dict[int, str]:
    """The class of each layer's attention core, by the layer's number in the whole model, counted from 0."""
    modules = [x for x in gc.get_objects() if issubclass(type(x), torch.nn.Module)]
    layers = [module for module in modules if hasattr(getattr(module, "self_attention", None), "core_attention")]
    return {layer.layer_number - 1: type(layer.self_attention.core_attention).__name__ for layer in layers}


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        children = {}
        for rank in range(request["ranks"]):
            child = os.fork()
            if child == 0:
                code = run(request, rank)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            children[child] = rank
        print("codes", json.dumps(wait(children)), flush=True)  # what hosts print comes between


def wait(children: dict[int, int]) -> list[int]:
    """The exit codes in the order of the ranks; where one fails the others are ended."""
    codes = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[children[child]] = os.waitstatus_to_exitcode(status)
        if codes[children[child]]:
            for other, rank in children.items():
                if rank not in codes:
                    os.kill(other, 15)
    return [codes[rank] for rank in sorted(codes)]


if __name__ == "__main__":
    main()
