"""Jobs of Megatron-LM's own `pretrain_gpt.py` under MindSpeed, on the emulated device."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from emulated_cann import build
from models import MODEL, arguments

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
PATHS = {name: os.environ.get(name) for name in ("MINDSPEED_PATH", "MEGATRON_LM_PATH")}
ABSENT = [name for name, path in PATHS.items() if not path]
REASON = f"{' and '.join(ABSENT)} not set" if ABSENT else build.why_not(build.torch_npu_path())

collect_ignore = ["server.py", "user_spec.py"]


class Job(NamedTuple):
    """What a job left.

    Attributes:
        codes: of its ranks.
        text: of all ranks.
        losses: of its iterations.
        calls: of each CANN operator, on the first rank.
        cores: classes of the attention cores, by layer, on the first rank.
        folder: where it ran.
    """

    codes: list[int]
    text: str
    losses: list[float]
    calls: dict[str, int]
    cores: dict[int, str]
    folder: Path


@pytest.fixture(scope="session")
def hosts(tmp_path_factory) -> dict[str, str]:
    """PYTHONPATH of the hosts, and a user's script; Megatron-LM is copied, because it builds its helpers in place."""
    if REASON:
        pytest.skip(REASON)
    folder = tmp_path_factory.mktemp("hosts")
    source = Path(PATHS["MEGATRON_LM_PATH"])
    shutil.copytree(source / "megatron", folder / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    script = (source / "pretrain_gpt.py").read_text()
    for name, line in (("nsa", "import mindspeed_nsa.megatron_adaptor"), ("dense", "import mindspeed.megatron_adaptor")):
        (folder / f"pretrain_{name}.py").write_text(script.replace("\nimport torch\n", f"\nimport torch\n{line}\n", 1))
    return {"folder": str(folder), "path": os.pathsep.join([str(folder), str(PATHS["MINDSPEED_PATH"])])}


@pytest.fixture(scope="session")
def environment(hosts) -> dict[str, str]:
    emulation = os.environ | build.environment(build.torch_npu_path())
    paths = [hosts["path"], emulation["PYTHONPATH"], str(TESTS), str(HERE)]
    ours = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return emulation | ours | {"PYTHONPATH": os.pathsep.join(paths), "PATH": tools, "EMULATED_CANN_DEVICES": "2"}


@pytest.fixture(scope="session")
def server(environment) -> Iterator[Callable[[dict], list[int]]]:
    command = [sys.executable, "-m", "emulated_cann", "-m", "server"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)

    def ask(request: dict) -> list[int]:
        print(json.dumps(request), file=process.stdin, flush=True)
        answer = next(line for line in process.stdout if line.startswith("codes "))
        return json.loads(answer.removeprefix("codes "))

    yield ask
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="session")
def run_job(hosts, server, real_text, tmp_path_factory) -> Callable[..., Job]:
    """Run a job: `run_job(LOCAL, GQA, {"bf16": True}, ranks=1, script="nsa", folder=None, ok=True, NAME="value")`; later flags
    win, and what has a name of its own is set in the environment."""

    def run(
        *flags: dict, ranks: int = 1, script: str = "nsa", folder: Path | None = None, ok: bool = True, **environment: str
    ) -> Job:
        given = {**MODEL, "data-path": real_text}
        for more in flags:
            given |= more
        # One vocabulary, whatever the layout.
        given.setdefault("make-vocab-size-divisible-by", 512 // given.get("tensor-model-parallel-size", 1))
        folder = folder or tmp_path_factory.mktemp("job")
        request = {"script": f"{hosts['folder']}/pretrain_{script}.py", "ranks": ranks}
        request |= {"folder": str(folder), "environment": environment}
        codes = server(request | {"arguments": arguments(given)})
        text = "".join((folder / f"rank{rank}.txt").read_text() for rank in range(ranks))
        assert not ok or not any(codes), text[-8000:]
        left = folder / "rank0.json"
        report = json.loads(left.read_text()) if left.exists() else {"calls": {}, "cores": {}, "traps": []}
        assert not report["traps"], report["traps"]
        losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", text)]
        cores = {int(layer): name for layer, name in report["cores"].items()}
        return Job(codes, text, losses, report["calls"], cores, folder)

    return run


@pytest.fixture(scope="session")
def run_script(server, tmp_path_factory) -> Callable[..., tuple[int, str]]:
    """Run Python in a process with the hosts on its path: `run_script(text, *argv)` to its exit code and output."""

    def run(text: str, *argv: str) -> tuple[int, str]:
        folder = tmp_path_factory.mktemp("script")
        (folder / "script.py").write_text(text)
        request = {"script": str(folder / "script.py"), "arguments": argv, "ranks": 1, "folder": str(folder)}
        (code,) = server(request)
        return code, (folder / "rank0.txt").read_text()

    return run
