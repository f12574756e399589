"""`mindspeed-nsa launch`: a job on the nodes that it has."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mindspeed_nsa.launch import environment, hosts
from mindspeed_nsa.launch.flags import left_out, megatron_arguments
from mindspeed_nsa.launch.nodes import Nodes
from mindspeed_nsa.launch.preflight import preflight
from mindspeed_nsa.pretrain.job import Job

MINDSPEED, BUILTIN = "mindspeed", "builtin"
TRAINERS = (MINDSPEED, BUILTIN)


class Launch(NamedTuple):
    """What is started where.

    Attributes:
        config: the job file.
        overrides: `section.key=value` each.
        trainer: `mindspeed`, Megatron-LM's pretrain_gpt under MindSpeed, or `builtin`, this project's.
        nodes: of the job.
        nproc_per_node: ranks a node.
    """

    config: Path
    overrides: list[str]
    trainer: str
    nodes: Nodes
    nproc_per_node: int

    def read_job(self) -> Job:
        """The job, checked as far as that can be done before the nodes are asked.

        Raises:
            ValueError: it cannot work on these ranks; one line that names the file and the key.
        """
        job = Job.read(self.config, self.overrides)
        world_size = self.nodes.nnodes * self.nproc_per_node
        try:
            if self.trainer == BUILTIN:
                job.check_trainer()
                job.check_layout(world_size)
            else:
                job.check_layout(world_size, hosts.megatron_version())
                hosts.mindspeed()
                hosts.check_options(job.megatron)
        except ValueError as error:
            raise ValueError(f"{self.config}: {error}") from None
        return job

    def doctor(self) -> list[str]:
        """The command line of the preflight on a node."""
        command = [sys.executable, "-m", "mindspeed_nsa.cli", "doctor", "--config", str(self.config)]
        return [*command, "--trainer", self.trainer, *self.overrides]

    def torchrun(self, job: Job, node_rank: int) -> list[str]:
        """The command line that starts the ranks of a node."""
        nodes = self.nodes
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", str(nodes.nnodes), "--node-rank", str(node_rank)]
        command += ["--nproc-per-node", str(self.nproc_per_node)]
        command += ["--master-addr", nodes.master_addr, "--master-port", str(nodes.master_port)]
        if self.trainer == BUILTIN:
            return [*command, "-m", "mindspeed_nsa.pretrain", "--config", str(self.config), *self.overrides]
        entry = "mindspeed_nsa.launch.pretrain_mindspeed"
        return [*command, "-m", entry, *megatron_arguments(job, self.config, self.overrides)]


def run(launch: Launch, *, dry_run: bool = False) -> int:
    """Start a job on this node, once the doctor finds every node fit.

    What the node's ranks print is also appended to `<logging.run_dir>/logs/node-<rank>.log`.

    Args:
        launch: what and where.
        dry_run: start nothing, and print what each node would run, as a shell would take it.

    Returns:
        The exit code of torchrun.

    Raises:
        ValueError: the job cannot run; one line.
    """
    job = launch.read_job()
    if launch.trainer == MINDSPEED and (keys := left_out(job)):
        print(f"# not for Megatron-LM, left out: {', '.join(keys)}", file=sys.stderr)
    if dry_run:
        print("\n".join(_describe(launch, job)))
        return 0
    variables = environment.complete(dict(os.environ))
    preflight(launch.nodes, launch.doctor(), variables)
    log = Path(job.logging.run_dir) / "logs" / f"node-{launch.nodes.rank}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = launch.torchrun(job, launch.nodes.rank)
    print(f"{launch.nodes.title(launch.nodes.rank)} of {launch.nodes.nnodes}, log in {log}", flush=True)
    return _tee(command, variables, log)


def _describe(launch: Launch, job: Job) -> Iterator[str]:
    for rank in range(launch.nodes.nnodes):
        yield f"# {launch.nodes.title(rank)} of {launch.nodes.nnodes}"
        yield from (f"export {name}={shlex.quote(value)}" for name, value in environment.shown().items())
        yield _lines(launch.doctor())
        yield _lines(launch.torchrun(job, rank))
        yield ""


def _lines(command: list[str]) -> str:
    """A command for a shell, each option on a line of its own."""
    text = ""
    for word in command:
        text += f" \\\n    {shlex.quote(word)}" if text and word.startswith("--") else f" {shlex.quote(word)}"
    return text.strip()


def _tee(command: list[str], variables: dict[str, str], log: Path) -> int:
    """Run a command, its output here and appended to a file; SIGINT and SIGTERM are handed on to it once each."""
    # In a session of its own, so that Ctrl-C does not reach the ranks both from the terminal and from here.
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    assert process.stdout is not None

    def hand_on(number: int, _: Any) -> None:
        process.send_signal(number)

    before = {each: signal.signal(each, hand_on) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with log.open("ab") as file:
            while chunk := process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
                file.write(chunk)
                file.flush()
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
        return process.wait()
    finally:
        for each in before:
            signal.signal(each, before[each])
